"""--batch-norm separate: what a network learns from labeled crops does not depend on the other crops of the batch."""

import dataclasses

import pytest
import torch
from small_methods import make, make_batch, with_sdm
from torch import nn

from methods import METHODS
from networks.backbone import Backbone
from networks.batch_norm import BatchNorm3d
from tools import command_line
from utils.errors import UserError

MIXED = [name for name, kind in METHODS.items() if "batch_norm" in {f.name for f in dataclasses.fields(kind.Options)}]


def supervised_gradient(name, batch, batch_norm):
    """The gradient of the supervised terms for the image, (N,K,W,H,D); the noise is the same in every call."""
    method = make(name, batch_norm=batch_norm, dropout=0.0)
    image = batch["image"].clone().requires_grad_()
    torch.manual_seed(2)
    terms = method({**batch, "image": image}, 30).terms
    total = sum(value for term, value in terms.items() if term in ("seg", "mask", "sdm"))
    return torch.autograd.grad(total, image)[0]


def test_every_method_whose_passes_hold_both_kinds_has_the_option():
    """BCP mixes both kinds into one crop, DK-UXNet has batch norms over queries; the V-Net has labeled crops alone."""
    assert set(METHODS) - set(MIXED) == {"supervised", "bcp", "dk-uxnet"}


@pytest.mark.parametrize("name", MIXED)
def test_labeled_crops_are_learned_without_regard_to_unlabeled_ones(name):
    batch = with_sdm(make_batch())
    other = {**batch, "image": torch.cat([batch["image"][:2], 3 * batch["image"][2:].flip(-1) - 1])}
    separate, joint = (supervised_gradient(name, batch, kind) for kind in ("separate", "joint"))
    assert separate[:2].abs().max() > 0
    assert separate[2:].abs().max() == 0
    assert joint[2:].abs().max() > 0  # by way of batch norm
    torch.testing.assert_close(supervised_gradient(name, other, "separate")[:2], separate[:2])


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("kind", ["separate", "joint"])
def test_no_pass_that_learns_holds_both_kinds(name, kind):
    """Of 2 labeled and 3 unlabeled crops: passes of 2, of 3 or of several views of the 3, adversarial ones too."""
    method, sizes = make(name, batch_norm=kind), set()

    def seen(norm, inputs):
        if norm.training and torch.is_grad_enabled():
            sizes.add(len(inputs[0]))

    for module in method.modules():
        if isinstance(module, Backbone):
            next(m for m in module.modules() if isinstance(m, BatchNorm3d)).register_forward_pre_hook(seen)
    method(with_sdm(make_batch(2, 3)), 30)
    mixed = {size for size in sizes if size != 2 and size % 3}
    assert sizes and bool(mixed) == (kind == "joint")


def test_separate_passes_are_those_of_two_batches_through_batch_norm():
    """The running statistics too, against torch's own layer."""
    method, batch = make("mean-teacher", batch_norm="separate", dropout=0.0), make_batch(2, 3)
    norm = nn.BatchNorm3d(1)
    expected = torch.cat([norm(x) for x in batch["image"].tensor_split([2])])
    ours = nn.Sequential(nn.BatchNorm3d(1))

    def network(x):
        return {"seg": ours(x)}

    torch.testing.assert_close(method.passes(network, batch["image"], 2)["seg"], expected)
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(ours[0].state_dict()[name], value)


@pytest.mark.parametrize("name", MIXED)
def test_without_unlabeled_crops_there_is_one_pass(name):
    batch = with_sdm(make_batch(2, 0))
    if make(name).needs_unlabeled:
        pytest.skip("needs unlabeled crops")
    a, b = (supervised_gradient(name, batch, kind) for kind in ("separate", "joint"))
    assert torch.equal(a, b)


@pytest.mark.parametrize("numbers", [(1, 3), (3, 1)])
def test_a_single_crop_of_a_kind_whose_deepest_map_is_one_voxel_is_refused(numbers):
    make("dtml")(make_batch(*numbers), 0)
    with pytest.raises(UserError, match="--batch-norm separate there must be two"):
        make("dtml", batch_norm="separate")(make_batch(*numbers), 0)


def test_a_network_without_batch_norm_does_the_same_in_one_pass_and_the_flag_is_refused():
    """An old options file is replayed with joint, and a preset with separate is no mistake."""
    batch = make_batch()
    batch["image"] = batch["image"].double()
    gradients = []
    for batch_norm in ("joint", "separate"):
        method = make("cps", backbone="uxnet", dropout=0.0, batch_norm=batch_norm).double()
        method(batch, 30).total.backward()
        gradients.append([p.grad for p in method.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    uxnet = {"data": "set", "backbone": "uxnet"}
    with pytest.raises(UserError, match="--batch-norm separate does nothing with --backbone uxnet"):
        command_line.resolve({**uxnet, "batch_norm": "separate"}, METHODS["dtml"])
    for flags in ({"batch_norm": "joint", "preset": "tuned"}, {"preset": "tuned"}):
        command_line.resolve({**uxnet, **flags}, METHODS["dtml"])
