"""--batch-norm separate: what a network learns from labeled crops does not depend on the other crops of the batch."""

import dataclasses

import pytest
import torch
from small_methods import make, make_batch, with_sdm
from torch import nn

from losses.perturbation import Transformation
from methods import METHODS
from methods.ss_net import Separator
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
def test_no_pass_by_statistics_of_the_batch_holds_both_kinds(name, kind):
    """Of 2 labeled and 3 unlabeled crops: passes of 2, of 3 or of several views of either, adversarial ones and those
    of a teacher and of SS-Net's features too."""
    on_all = {"consistency_on": "all"} if hasattr(METHODS[name].Options, "consistency_on") else {}
    method, sizes = make(name, batch_norm=kind, **on_all), set()

    def seen(norm, inputs):
        if norm.training:
            sizes.add(len(inputs[0]))

    for part, module in method.named_modules():
        if isinstance(module, Backbone) or part.startswith(("separator.h", "separator.k", "separator.w.")):
            norms = [m for m in module.modules() if isinstance(m, BatchNorm3d)]
            for norm in norms[:1]:
                norm.register_forward_pre_hook(seen)
    method(with_sdm(make_batch(2, 3)), 30)
    mixed = {size for size in sizes if size not in (2, 4) and size % 3}
    assert sizes and bool(mixed) == (kind == "joint")


@pytest.mark.parametrize("name", ["mean-teacher", "tcse", "ua-mt", "double-unc"])
def test_the_teacher_s_targets_are_those_of_each_kind_by_itself(name, monkeypatch):
    """The consistency is then the mean of what labeled and unlabeled crops have alone, weighted by their numbers."""
    stay = Transformation([0] * 5, [False] * 5, [1.0] * 5)
    monkeypatch.setattr(Transformation, "draw", lambda shape, scale: stay)
    method = make(name, consistency_on="all", batch_norm="separate", noise=0.0, dropout=0.0).double()
    method.threshold = lambda iteration: 1.0  # of UA-MT: every voxel is certain
    torch.manual_seed(2)
    image, p = torch.randn(5, 1, 16, 16, 16).double(), torch.rand(5, 1, 16, 16, 16).double()
    image[2:] *= 3
    together = method.consistency(p, image, 30, labeled=2)[0]
    stay.turns, stay.flips, stay.zooms = [0] * 2, [False] * 2, [1.0] * 2
    alone = method.consistency(p[:2], image[:2], 30)[0]
    stay.turns, stay.flips, stay.zooms = [0] * 3, [False] * 3, [1.0] * 3
    other = method.consistency(p[2:], image[2:], 30)[0]
    torch.testing.assert_close(together, (2 * alone + 3 * other) / 5, rtol=1e-12, atol=0)


def test_ss_net_s_features_are_those_of_each_kind_by_itself():
    """The prototypes are of labeled crops alone, so that what these cost does not depend on the others."""
    torch.manual_seed(5)
    separator = Separator(3, classes=(1,)).double().train()
    maps, y = torch.randn(5, 3, 4, 4, 4).double(), torch.ones(5, 4, 4, 4, dtype=torch.uint8)
    nowhere = torch.cat([y[:2], 0 * y[2:]])  # no unlabeled voxel is of the class, which leaves the labeled crops' loss

    def loss(maps, predicted, **how):
        return separator(maps, predicted, y[:2], prototypes=4, largest=True, **how)[0].item()

    alone = loss(maps[:2], y[:2])
    assert loss(maps, nowhere, apart=True) == pytest.approx(alone, rel=1e-12)
    assert loss(maps, nowhere) != pytest.approx(alone, rel=1e-6)


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


@pytest.mark.parametrize("name", MIXED)
def test_two_passes_are_refused_without_unlabeled_scans(name):
    """test_without_unlabeled_crops_there_is_one_pass shows that they are one."""
    alone = {"data": "set", "unlabeled": 0}
    with pytest.raises(UserError, match="--batch-norm separate does nothing with --unlabeled 0"):
        command_line.resolve({**alone, "batch_norm": "separate"}, METHODS[name])
    for flags in ({"batch_norm": "joint", "preset": "tuned"}, {"preset": "tuned"}):
        command_line.resolve({**alone, **flags}, METHODS[name])
