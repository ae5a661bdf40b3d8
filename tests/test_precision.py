"""What --precision promises: bf16 has every layer's gradient on every CPU; tf32 is where it belongs, nowhere else."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from losses.terms import seg_loss
from methods import METHODS
from networks.backbone import Backbone, set_precision, set_recompute
from networks.backbones import BACKBONES
from networks.convolution import Conv3d, ConvTranspose3d
from networks.uxnet import Depthwise
from utils.devices import seed_iteration
from utils.options import fill

CROPS = [(16, 16, 16), (32, 32, 32)]
REPEATS = {CROPS[0]: 5, CROPS[1]: 1}
LAYOUTS = [torch.channels_last_3d, torch.contiguous_format]


def litter():
    """Fills memory that is then free with not-a-number: who reads what nobody wrote finds it."""
    return [torch.full((n,), torch.nan) for n in (1003, 10003, 100003, 1000003)]


def cosine(a, b):
    """Of two tensors, in float64; 1 of two that are 0, not-a-number where one is not finite."""
    a, b = a.detach().flatten().double(), b.detach().flatten().double()
    if not a.any() and not b.any():
        return 1.0
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))


def make_crops(shape):
    """Four noisy balls and their labels."""
    torch.manual_seed(1)
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, side) for side in shape], indexing="ij"))
    label = torch.stack([((grid - c) ** 2).sum(dim=0) < 0.3 for c in (0, 0.2, -0.2, 0.1)]).to(torch.uint8)
    return (label + 0.3 * torch.randn(label.shape))[:, None], label


def make_network(backbone, **options):
    torch.manual_seed(0)
    return BACKBONES[backbone](heads={"seg": 1}, filters=4, dropout=0.0, **options)


def gradients(network, image, label, precision):
    network.precision = precision
    network.zero_grad()
    litter()
    seg_loss(network(image)["seg"], label).backward()
    return {name: p.grad.clone() for name, p in network.named_parameters()}


# -- bf16 --


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("layer", "sides"),
    [
        (lambda: Conv3d(1, 8, 3, padding=1), (1, 2, 3, 4)),
        (lambda: Conv3d(4, 6, 3, padding=1), (1, 2, 3, 4)),
        (lambda: Conv3d(16, 16, 3, padding=1, bias=False), (1, 2, 3, 4)),
        (lambda: Conv3d(5, 7, 1), (1, 2, 3)),
        (lambda: Conv3d(8, 16, 2, stride=2), (2, 3, 4)),
        (lambda: ConvTranspose3d(16, 8, (2, 2, 2)), (1, 2, 3)),
        (lambda: ConvTranspose3d(16, 8, (2, 1, 2), bias=False), (1, 2, 3)),
        (lambda: Depthwise(4, 5, bias=False), (2, 4, 5)),
        (lambda: Depthwise(4, 7), (2, 6, 7)),
        (lambda: Conv3d(1, 4, 7, stride=2, padding=3), (7, 8)),
    ],
)
def test_a_convolution_in_bf16_is_that_of_the_rounded_numbers(layer, sides, layout):
    torch.manual_seed(0)
    for shape in itertools.product(sides, repeat=3):
        conv = layer()
        x = torch.randn(2, conv.in_channels, *shape).to(memory_format=layout)
        low, exact = x.clone().requires_grad_(), x.bfloat16().double().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(low)
        assert y.dtype == torch.bfloat16
        g = torch.randn(y.shape).bfloat16()
        litter()
        y.backward(g)
        ours = [y, low.grad, *(p.grad for p in conv.parameters())]
        conv.zero_grad()
        conv.bfloat16().double()
        z = conv(exact)
        z.backward(g.double())
        expected = [z, exact.grad, *(p.grad for p in conv.parameters())]
        for a, b in zip(ours, expected, strict=True):
            assert cosine(a, b) > 0.9999, shape
            assert float(a.detach().double().norm() / b.detach().norm()) == pytest.approx(1, abs=0.01), shape


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # of the first layer: the scan has no gradient
@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_in_bf16_the_gradients_of_every_layer_are_those_of_what_entered_it(backbone, crop):
    """In float64: weight, bias and input of each convolution, as one batch goes there and back."""
    network, (image, label) = make_network(backbone).train(), make_crops(crop)
    entered = {}
    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
            module.register_forward_hook(lambda m, x, y, name=name: entered.update({name: [x[0].detach().clone()]}))
            module.register_full_backward_hook(
                lambda m, of_x, of_y, name=name: entered[name].extend((of_x[0], of_y[0].clone()))
            )
    for _ in range(REPEATS[crop]):
        gradients(network, image, label, "bf16")
        assert len(entered) > 25
        for name, (x, of_x, of_y) in entered.items():
            m = network.get_submodule(name)
            rounded = (lambda t: t.double()) if "heads" in name or "last" in name else (lambda t: t.bfloat16().double())
            x, w = rounded(x).requires_grad_(), rounded(m.weight.detach()).requires_grad_()
            if isinstance(m, nn.ConvTranspose3d):
                y = F.conv_transpose3d(x, w, stride=m.stride)
            else:
                y = F.conv3d(x, w, stride=m.stride, padding=m.padding, groups=m.groups)
            of_w, exact = torch.autograd.grad(y, [w, x], of_y.double())
            assert cosine(m.weight.grad, of_w) > 0.999, name
            if m.bias is not None:  # sums that may cancel, as before a batch norm
                sums, sizes = (t.double().sum(dim=(0, 2, 3, 4)) for t in (of_y, of_y.abs()))
                assert ((m.bias.grad - sums).abs() <= 2**-8 * sizes).all(), name
            assert of_x is None or cosine(of_x, exact) > 0.999, name


# -- tf32 --


class Watch(TorchDispatchMode):
    """Notes the flag that each convolution finds, on its way there and on its way back, by the name of its weight."""

    CONVOLUTIONS = {torch.ops.aten.convolution.default: 1, torch.ops.aten.convolution_backward.default: 2}

    def __init__(self):
        super().__init__()
        self.seen = []
        """(weight's address, there or back, flag), in order."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        place = self.CONVOLUTIONS.get(function)
        if place is not None:
            way = "there" if place == 1 else "back"
            self.seen.append((args[place].data_ptr(), way, torch.backends.cudnn.allow_tf32))
        return function(*args, **(kwargs or {}))

    def take(self, method):
        """(name of the weight, way) -> the set of its flags; forgotten then."""
        names, result = {p.data_ptr(): name for name, p in method.named_parameters()}, {}
        for address, way, flag in self.seen:
            if address in names:  # the kernel of a blur is nobody's weight
                result.setdefault((names[address], way), set()).add(flag)
        self.seen.clear()
        return result


def own_flag(method, name, precision):
    """Whether a weight is of a convolution that --precision tf32 is about: one in the maps of a network that is not
    kept in float32 by a distance head and a large k."""
    steep = getattr(method.options, "k", math.inf) > 50
    for prefix, network in reversed(list(method.named_modules())):  # a network inside of another comes first
        if isinstance(network, Backbone) and name.startswith(f"{prefix}."):
            part = name.removeprefix(f"{prefix}.").split(".")[0]
            return precision == "tf32" and not (steep and "sdm" in network.heads) and part not in ("heads", "last")
    return False


def make_method(name, **options):
    torch.manual_seed(0)
    kind, small = METHODS[name], {"filters": 2, "query_channels": 16, "passes": 2, "feature_blocks": "bottom"}
    return kind(fill(kind.Options, {**small, **options}), iterations=4).train()


def make_batch(method):
    """Two labeled crops and, where the method learns from them, two others."""
    image, label = make_crops((16, 16, 16))
    labeled = 2 if method.uses_unlabeled else 4
    batch = {"image": image, "label": label[:labeled], "case": list("abcd")}
    batch["sdm"] = torch.rand(labeled, method.options.classes, 16, 16, 16)
    return batch | {"other_image": image.flip(0), "other_label": label.flip(0)[:labeled]}


CASES = {
    **{name: (name, {}) for name in METHODS if name not in ("dtml-plus", "bcp")},  # unlabeled crops count later
    "dtml-plus, from the start": ("dtml-plus", {"start": 0.0, "full": 0.0}),
    "bcp, from the start": ("bcp", {"start": 0.0}),
    "dtml, k of 50": ("dtml", {"k": 50.0}),
    "dtml, uxnet": ("dtml", {"backbone": "uxnet"}),
    "dk-uxnet, a convolution": ("dk-uxnet", {"kmax": False, "consistency_terms": "segc"}),
    "dk-uxnet, two V-Nets": ("dk-uxnet", {"share_weights": False, "backbone": "vnet"}),
}


@pytest.mark.parametrize(("k", "training", "kept"), [(50, True, False), (51, True, True), (1500, False, False)])
@pytest.mark.parametrize("name", ["dtml", "dtc"])
def test_a_network_with_a_distance_head_is_trained_in_low_precision_up_to_k_of_50(name, k, training, kept):
    method = make_method(name, k=float(k))
    some = set_precision(method, "bf16", training=training)
    networks = {m: "sdm" in m.heads for m in method.modules() if isinstance(m, Backbone)}
    assert any(networks.values())
    assert [m.precision for m in networks] == ["fp32" if kept and sdm else "bf16" for sdm in networks.values()]
    assert some == any(m.precision == "bf16" for m in networks)


FLAGS = [(case, "tf32", i % 2 == 0, False) for i, case in enumerate(CASES)]
FLAGS += [(case, precision, False, True) for case in ("dtml", "dk-uxnet") for precision in ("fp32", "tf32")]


@pytest.mark.parametrize(("case", "precision", "recompute", "outside"), FLAGS)
def test_every_part_finds_its_own_tf32_flag_in_every_iteration_and_leaves_none(
    case, precision, recompute, outside, monkeypatch
):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", outside)
    name, options = CASES[case]
    method, seen = make_method(name, **options), []
    set_precision(method, precision, training=True)
    set_recompute(method, recompute)
    weights = [p for p in method.parameters() if p.requires_grad]
    optimizer, batch, watch = torch.optim.SGD(weights, lr=0.01), make_batch(method), Watch()
    for iteration in range(2):
        seed_iteration(1, iteration)
        with watch:
            losses = method(batch, iteration)
            assert torch.backends.cudnn.allow_tf32 == outside
            optimizer.zero_grad()
            losses.total.backward()
            assert torch.backends.cudnn.allow_tf32 == outside
            optimizer.step()
            method.after_step(batch, iteration)
        assert torch.backends.cudnn.allow_tf32 == outside
        seen.append(watch.take(method))
    assert seen[0] == seen[1]
    assert len({weight for weight, way in seen[0] if way == "back"}) >= 20
    for (weight, way), flags in seen[0].items():
        network = [p for p, m in method.named_modules() if isinstance(m, Backbone) and weight.startswith(f"{p}.")]
        assert flags == {own_flag(method, weight, precision) if network else outside}, (weight, way)
