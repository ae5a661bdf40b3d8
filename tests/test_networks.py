"""The V-Net: parameters, dropout and heads; batch norm in both layouts against torch's in float64. Its numbers:
test_released.py; its shapes: test_dk_uxnet.py."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from networks.backbone import uncounted
from networks.batch_norm import CHUNK, BatchNorm3d
from networks.convolution import ConvTranspose3d
from networks.vnet import VNet, parameter_count
from utils.errors import UserError

LAST = torch.channels_last_3d


def make(shape, *, offset: float = 0.0, dtype=torch.float32):
    """Two equal layers, ours and torch's in float64, and a map and a gradient of this shape."""
    torch.manual_seed(0)
    ours, torchs = BatchNorm3d(shape[1]).to(dtype), nn.BatchNorm3d(shape[1]).double()
    with torch.no_grad():
        for layer in (ours, torchs):
            layer.weight.copy_(torch.linspace(0.5, 2, shape[1]))
            layer.bias.copy_(torch.linspace(-1, 1, shape[1]))
    scale = torch.linspace(0.1, 3, shape[1])[:, None, None, None]
    x, grad = scale * torch.randn(shape) + offset, torch.randn(shape)
    return ours, torchs, x.to(dtype), grad.to(dtype)


def outcome(layer, x, grad):
    """The map, all gradients and the buffers after one training step."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(grad)
    return [y.detach(), x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]


def distance(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    "shape",
    [
        (2, 16, 32, 32, 16),
        (1, 3, 1, 1, 2),
        (2, 5, 11, 10, 9),
        (1, 8, 16, 16, CHUNK // 256),
        (2, 8, 50, 52, 33),  # two blocks, of which the second ends within a chunk
    ],
)
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_is_as_near_to_float64_as_torch_s_on_contiguous_maps(shape, offset):
    ours, in_float64, x, grad = make(shape, offset=offset)
    contiguous = nn.BatchNorm3d(shape[1])
    contiguous.load_state_dict(ours.state_dict())
    expected = outcome(in_float64, x.double(), grad.double())
    usual = outcome(contiguous, x, grad)
    result = outcome(ours, x.to(memory_format=LAST), grad)
    assert result[0].is_contiguous(memory_format=LAST)
    for i, (a, b, c) in enumerate(zip(result, expected, usual, strict=True)):
        assert distance(a, b) < 2 * distance(c, b) + 1e-6, i
    assert ours.num_batches_tracked == in_float64.num_batches_tracked == 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_gradients_by_finite_differences(layout):
    ours, _, x, _ = make((2, 3, 4, 3, 2), dtype=torch.float64)
    x = x.to(memory_format=layout).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *a: torch.func.functional_call(ours, dict(zip(("weight", "bias"), a[1:], strict=True)), a[0]),
        (x, ours.weight, ours.bias),
    )


def test_evaluation_mode_and_contiguous_maps_are_torch_s():
    ours, _, x, _ = make((2, 4, 6, 5, 4))
    plain = nn.BatchNorm3d(4)
    plain.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), plain(x)) and torch.equal(ours.running_var, plain.running_var)
    for layout in (torch.contiguous_format, LAST):
        laid = x.to(memory_format=layout)
        assert torch.equal(ours.eval()(laid), plain.eval()(laid))


def test_every_map_of_the_vnet_is_in_channels_last_on_a_cpu_and_its_state_is_torch_s():
    network, seen = VNet(heads={"seg": 1}, filters=4), []
    for module in network.modules():
        if isinstance(module, BatchNorm3d):
            module.register_forward_hook(lambda m, x, y: seen.append(y.is_contiguous(memory_format=LAST)))
    network(torch.randn(2, 1, 32, 16, 16))
    assert len(seen) == 29 and all(seen)
    assert set(BatchNorm3d(2).state_dict()) == set(nn.BatchNorm3d(2).state_dict())


@pytest.mark.parametrize("counted", [True, False])
def test_a_single_voxel_is_a_user_s_mistake_in_training_alone(counted):
    """A batch of one crop whose deepest map is one voxel."""
    network, crop = VNet(heads={"seg": 1}, filters=2), torch.randn(1, 1, 16, 16, 16)
    with (
        pytest.raises(UserError, match="Raise --patch-size or --batch-size"),
        nullcontext() if counted else uncounted(),
    ):
        network.train()(crop)
    assert network.eval()(crop)["seg"].isfinite().all()


@pytest.mark.parametrize("order", [(torch.contiguous_format, LAST), (LAST, torch.contiguous_format)])
def test_passes_in_two_layouts_before_one_backward_pass(order):
    """As where a map of one voxel loses its layout in one of them."""
    torch.manual_seed(0)
    ours, plain = BatchNorm3d(3).double(), nn.BatchNorm3d(3).double()
    x = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    for norm in (ours, plain):
        sum((norm(x.to(memory_format=layout) + i) ** 3).sum() for i, layout in enumerate(order)).backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), (_, b) in zip(ours.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


# -- the transposed convolution --


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [(2, 2, 2), (2, 1, 2), (1, 2, 2)])
def test_the_transposed_convolution_is_torch_s_with_its_gradients_in_float64(stride, bias, layout):
    torch.manual_seed(0)
    ours = ConvTranspose3d(3, 2, stride, bias=bias).double()
    plain = nn.ConvTranspose3d(3, 2, stride, stride=stride, bias=bias).double()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 4, 3, 5, dtype=torch.float64).to(memory_format=layout)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = ours(a), plain(b)
    assert torch.equal(y, expected)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(a.grad, b.grad)
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_the_transposed_convolution_s_gradients_in_float32_are_those_in_float64():
    """Of a map so large that torch's own sums over its voxels lose one or two digits more."""
    torch.manual_seed(0)
    ours, exact = ConvTranspose3d(16, 8, (2, 2, 2)), nn.ConvTranspose3d(16, 8, 2, stride=2).double()
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(2, 16, 32, 32, 24).to(memory_format=LAST)
    grad = torch.randn(2, 8, 64, 64, 48).to(memory_format=LAST)
    ours(x).backward(grad)
    exact(x.double()).backward(grad.double())
    for a, b in zip(ours.parameters(), exact.parameters(), strict=True):
        assert distance(a.grad, b.grad) < 2e-6


# -- the V-Net --


@pytest.mark.parametrize(
    ("heads", "count"), [({"seg": 1}, 9_448_849), ({"seg": 2}, 9_448_866), ({"seg": 1, "sdm": 1}, 9_448_866)]
)
def test_parameters_are_as_many_as_published(heads, count):
    assert parameter_count(VNet(heads=heads)) == count


def test_dropout_is_of_whole_channels_twice_and_only_in_training():
    torch.manual_seed(0)
    network, x, inputs, outputs = VNet(heads={"seg": 1}, filters=16), torch.randn(2, 1, 16, 16, 16), [], []
    network.dropout.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().flatten(2)))
    network.dropout.register_forward_hook(lambda _, __, out: outputs.append(out.detach().flatten(2)))
    network.train()(x)
    assert [v.shape[1] for v in inputs] == [256, 16]  # after the deepest and after the last block
    for before, after in zip(inputs, outputs, strict=True):
        dropped = (after == 0).all(-1)
        assert torch.allclose(after, torch.where(dropped[..., None], 0.0, 2 * before))
    assert 0.4 < (outputs[0] == 0).all(-1).float().mean() < 0.95  # half, and the channels that are 0 anyway
    assert torch.equal(network.eval()(x)["seg"], network(x)["seg"])
    assert torch.equal(outputs[-1], inputs[-1])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_a_head_is_the_convolution_of_the_map_after_dropout(layout):
    """Output and gradients in float64, with the channels that dropout3d draws from the same seed."""
    torch.manual_seed(0)
    network = VNet(heads={"seg": 2, "sdm": 1}, filters=4).double().train()
    x = torch.randn(3, 4, 6, 5, 4, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    weights = [head[0].weight for head in network.heads.values()]
    torch.manual_seed(1)
    outputs = network.outputs(x)
    torch.manual_seed(1)
    dropped = F.dropout3d(x, 0.5, training=True)
    assert 0 < (dropped.detach().flatten(2).abs().sum(2) == 0).sum() < 12
    expected = [F.conv3d(dropped, head[0].weight, head[0].bias) for head in network.heads.values()]
    expected[1] = expected[1].tanh()
    targets = [torch.randn_like(y) for y in outputs]
    for y, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(y, reference)
    gradients = [
        torch.autograd.grad(sum((y * t).sum() for y, t in zip(ys, targets, strict=True)), [x, *weights])
        for ys in (outputs, expected)
    ]
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference)
