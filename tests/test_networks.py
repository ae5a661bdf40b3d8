"""The V-Net against table 1.5 of the method notes: parameters, shapes, channels, dropout."""

import pytest
import torch
import torch.nn.functional as F

from networks.vnet import Convs, Down, Up, VNet, parameter_count

PARAMETERS = {  # of each block with 16 filters, counted by hand from kernel sizes and channels
    "encoder.0": 480, "down.0": 4_192, "encoder.1": 55_488, "down.1": 16_576, "encoder.2": 332_352, "down.2": 65_920,
    "encoder.3": 1_328_256, "down.3": 262_912, "bottom": 5_310_720, "up.0": 262_528, "decoder.0": 1_328_256,
    "up.1": 65_728, "decoder.1": 332_352, "up.2": 16_480, "decoder.2": 55_488, "up.3": 4_144, "decoder.3": 6_960,
    "heads.seg": 17,
}  # fmt: skip


def test_parameters_of_every_block():
    network = VNet(heads={"seg": 1})
    assert {name: parameter_count(network.get_submodule(name)) for name in PARAMETERS} == PARAMETERS
    assert parameter_count(network) == sum(PARAMETERS.values()) == 9_448_849


@pytest.mark.parametrize("heads", [{"seg": 2}, {"seg": 1, "sdm": 1}])
def test_two_output_channels_have_9448866_parameters(heads):
    assert parameter_count(VNet(heads=heads)) == 9_448_866


@pytest.mark.parametrize("shape", [(16, 16, 16), (32, 16, 48)])
def test_heads_keep_the_shape_and_tanh_bounds_the_map(shape):
    out = VNet(heads={"seg": 2, "sdm": 1}, filters=2)(torch.randn(2, 1, *shape))
    assert out["seg"].shape == (2, 2, *shape) and out["sdm"].shape == (2, 1, *shape)
    assert out["sdm"].abs().max() <= 1 < out["seg"].detach().abs().max() * 100


def test_feature_maps_halve_and_double_as_in_the_table():
    network, seen = VNet(heads={"seg": 1}, filters=16), []
    for module in network.modules():
        if isinstance(module, (Convs, Down, Up)):
            module.register_forward_hook(lambda _, __, out: seen.append((out.shape[1], *out.shape[2:])))
    network.eval()(torch.zeros(1, 1, 112, 112, 80))
    sizes = {16: (112, 112, 80), 32: (56, 56, 40), 64: (28, 28, 20), 128: (14, 14, 10), 256: (7, 7, 5)}
    channels = [16, 32, 32, 64, 64, 128, 128, 256, 256, 128, 128, 64, 64, 32, 32, 16, 16]
    assert seen == [(c, *sizes[c]) for c in channels]


def test_a_side_not_divisible_by_16_is_refused():
    with pytest.raises(ValueError, match="multiple of 16"):
        VNet(heads={"seg": 1}, filters=2)(torch.zeros(1, 1, 16, 24, 16))


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


def test_long_skips_are_sums():
    """With the decoder's upward path silenced the first skip alone must reach the last block, unchanged."""
    network = VNet(heads={"seg": 1}, filters=2).eval()
    torch.nn.init.zeros_(network.up[3][0].weight)
    torch.nn.init.zeros_(network.up[3][0].bias)
    inputs, x = [], torch.randn(1, 1, 16, 16, 16)
    network.decoder[3].register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    network(x)
    assert torch.allclose(inputs[0], network.encoder[0](x))


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
