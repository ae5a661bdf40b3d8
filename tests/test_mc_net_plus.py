"""MC-Net+: its loss from the formula in numpy, its decoders and its ways to double a map, and what gets a gradient."""

import itertools
import math
from functools import partial

import by_hand
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from methods.mc_net_plus import disagreement, sharpened
from networks.decoders import UPS, Decoders, Doubled
from networks.vnet import VNet, parameter_count

make = partial(by_hand.make, "mc-net-plus", iterations=100)
batch = by_hand.batch


@pytest.mark.parametrize(("classes", "softmax"), [(1, False), (1, True), (2, False), (2, True)])
def test_the_loss_is_the_formula_in_numpy(classes, softmax, monkeypatch):
    method, data = make(classes=classes, softmax=softmax), batch(classes)
    torch.manual_seed(2)
    logits = [3 * torch.randn(4, classes + softmax, 16, 16, 16, dtype=torch.float64) for _ in UPS]
    monkeypatch.setattr(method.network, "forward", lambda image: [{"seg": x} for x in logits])
    result = method(data, 20)
    p = [np.exp(x.numpy()) for x in logits]
    p = [e / e.sum(1, keepdims=True) for e in p] if softmax else [e / (1 + e) for e in p]
    p = [e[:, -classes:] for e in p]
    s = [e**10 / (e**10 + (1 - e) ** 10) for e in p]
    dice = 0
    for e in p:
        for c in range(classes):
            a, y = e[:2, c], (data["label"].numpy() == c + 1).astype(float)
            dice += (1 - (2 * (a * y).sum() + 1e-5) / ((a**2).sum() + y.sum() + 1e-5)) / classes
    consistency = sum(((p[i] - s[j]) ** 2).mean() for i, j in itertools.permutations(range(3), 2))
    lambda_ = math.exp(-5 * (1 - 20 / 40) ** 2)
    assert result.terms["seg"].item() == pytest.approx(dice, rel=1e-12)
    assert result.terms["consistency"].item() == pytest.approx(consistency, rel=1e-12)
    assert result.total.item() == pytest.approx(0.5 * dice + lambda_ * consistency, rel=1e-12)
    assert method(data, 40).weights["lambda"] == method(data, 99).weights["lambda"] == 1


@pytest.mark.parametrize("target_gradient", [False, True])
def test_the_gradient_is_that_of_the_formula(target_gradient):
    """d/dp_i of sum_{i != j} mean (p_i - s_j)^2, with or without the part through s_i."""
    method = make(target_gradient=target_gradient)
    p = [torch.rand(2, 1, 3, 3, 3, dtype=torch.float64).clamp(0.05, 0.95).requires_grad_() for _ in UPS]
    result = torch.autograd.grad(method.consistency(p), p)
    q = [x.detach() for x in p]
    s = [1 / (1 + ((1 - x) / x) ** 10) for x in q]
    for i in range(3):
        others = [j for j in range(3) if j != i]
        expected = sum(2 * (q[i] - s[j]) for j in others)
        if target_gradient:
            slope = 10 * s[i] * (1 - s[i]) / (q[i] * (1 - q[i]))
            expected = expected - slope * sum(2 * (q[j] - s[i]) for j in others)
        torch.testing.assert_close(result[i], expected / q[i].numel(), rtol=1e-9, atol=1e-12)


def test_sharpening_keeps_a_half_and_both_ends():
    p = torch.tensor([0.0, 0.4, 0.5, 0.6, 1.0], requires_grad=True)
    s = sharpened(p, 0.1)
    s.sum().backward()
    assert s[[0, 2, 4]].tolist() == [0, 0.5, 1] and s[1] < 0.02 and s[3] > 0.98 and p.grad.isfinite().all()
    torch.testing.assert_close(sharpened(p, 1.0), p)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("mode", ["trilinear", "nearest"])
def test_doubling_and_its_gradient_are_those_of_torch(mode, layout):
    x = torch.randn(2, 3, 4, 1, 5, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    corners = {"align_corners": False} if mode == "trilinear" else {}
    y, expected = Doubled(mode)(x), F.interpolate(x, scale_factor=2, mode=mode, **corners)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=layout)
    gradient_of_y = torch.randn_like(y)
    for grad in (gradient_of_y, gradient_of_y.transpose(2, 4).contiguous().transpose(2, 4)):  # in another layout too
        (result,), (gradient,) = (torch.autograd.grad(z, x, grad, retain_graph=True) for z in (y, expected))
        torch.testing.assert_close(result, gradient)


def test_the_disagreement_is_the_mean_standard_deviation():
    p = torch.rand(3, 2, 1, 4, 4, 4, dtype=torch.float64)
    assert disagreement(list(p)).item() == pytest.approx(p.numpy().std(axis=0).mean(), rel=1e-12)


def test_the_decoders_share_one_encoder_and_the_first_is_a_backbone():
    network = Decoders(VNet, heads={"seg": 1}, filters=2).eval()
    x = torch.randn(1, 1, 16, 16, 16)
    result = network(x)
    assert torch.equal(result[0]["seg"], network.first(x)["seg"]) and len(result) == len(UPS) == 3
    assert not torch.equal(result[1]["seg"], result[2]["seg"])
    full, ours = parameter_count(VNet(heads={"seg": 1}, filters=2)), parameter_count(network.first)
    assert full == ours and not hasattr(network.others[0], "encoder")
    assert {n.split(".")[2] for n, _ in network.others.named_parameters(prefix="others")} == {"up", "decoder", "heads"}
