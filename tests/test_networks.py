"""The V-Net: parameters, dropout and heads. Its numbers: test_released.py; its shapes: test_dk_uxnet.py."""

import pytest
import torch
import torch.nn.functional as F

from networks.vnet import VNet, parameter_count


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
