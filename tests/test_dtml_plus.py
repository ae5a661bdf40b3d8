"""DTML+: its losses against the formulas in numpy, what gets a gradient, its schedule and its strong views."""

from functools import partial

import by_hand
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from losses import perturbation
from methods import METHODS
from methods.dtml_plus import DTMLPlus

EPS = 1e-5


make = partial(by_hand.make, "dtml-plus")
batch = by_hand.batch


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def dice_by_hand(p, y, a):
    return 1 - (2 * (a * p * y).sum() + EPS) / ((a * (p**2 + y)).sum() + EPS)


def ce_by_hand(p, y, a):
    return (a * -(y * np.log(p) + (1 - y) * np.log(1 - p))).mean()


@pytest.mark.parametrize("trust", ["all", "voxel", "both"])
def test_the_losses_are_the_formulas_of_the_docstring(trust):
    method, data = make(trust=trust, start=0.0, full=0.0, strong=0.0, pseudo_weight=0.7), batch()
    method.M_s.eval(), method.M_d.eval()  # no dropout, and no batch statistics that this test would have to copy
    for name in ("M_s", "M_d"):  # averages that differ from their networks
        for weight in method.ema[name].parameters():
            weight.data += 0.1 * torch.randn_like(weight)
    result = method(data, 3)
    with torch.no_grad():
        x, u = data["image"][:2], data["image"][2:]
        p, z = (net(x)[head].numpy() for net, head in ((method.M_s, "seg"), (method.M_d, "sdm")))
        pu, zu = (net(u)[head].numpy() for net, head in ((method.M_s, "seg"), (method.M_d, "sdm")))
        q, s = (net(u)[head].numpy() for net, head in ((method.ema.M_s, "seg"), (method.ema.M_d, "sdm")))
    p, m, pu, mu, q, n = sigmoid(p), sigmoid(-50 * z), sigmoid(pu), sigmoid(-50 * zu), sigmoid(q), sigmoid(-50 * s)
    pseudo = ((q + n) / 2 > 0.5).astype(float)
    a = np.ones_like(q) if trust == "all" else ((q > 0.5) == (n > 0.5)).astype(float)
    for i in range(2) if trust == "both" else ():
        one, other = q[i] > 0.5, n[i] > 0.5
        a[i] *= 2 * (one & other).sum() / (one.sum() + other.sum())
    y = data["label"][:, None].numpy().astype(float)
    expected = {
        "seg": 0.5 * (ce_by_hand(p, y, 1.0) + dice_by_hand(p, y, np.ones_like(p))),
        "mask": dice_by_hand(m, y, np.ones_like(m)),
        "pseudo_seg": 0.5 * (ce_by_hand(pu, pseudo, a) + dice_by_hand(pu, pseudo, a)),
        "pseudo_mask": dice_by_hand(mu, pseudo, a),
    }
    assert trust == "all" or 0 < a.mean() < 1
    for name, value in expected.items():
        assert result.terms[name].item() == pytest.approx(value, rel=1e-6), name
    total = expected["seg"] + expected["mask"] + 0.7 * (expected["pseudo_seg"] + expected["pseudo_mask"])
    assert result.total.item() == pytest.approx(total, rel=1e-6)


def test_the_weight_waits_rises_and_stays():
    method = make(iterations=100, start=0.2, full=0.4)
    result = [method.ramp(t) for t in range(100)]
    assert result[:20] == [0.0] * 20 and result[40:] == [1.0] * 60
    assert result[30] == pytest.approx(np.exp(-5 * 0.25)) and all(np.diff(result) >= 0)
    assert method(batch(), 10).terms["pseudo_seg"] == 0 and method(batch(), 10).weights["w"] == 0


@pytest.mark.parametrize("classes", [1, 2])
def test_outputs_are_the_networks_their_averages_and_the_means(classes):
    method, image = make(classes=classes).eval(), batch()["image"][:1]
    with torch.no_grad():
        p = {name: method.predict(image, (name,)) for name in method.outputs}
        together = method.predict(image, method.outputs)
    assert torch.equal(together, torch.cat(list(p.values()), dim=1)) and p["seg"].shape[1] == classes
    for prefix in ("", "ema_"):
        torch.testing.assert_close(p[f"{prefix}mean"], (p[f"{prefix}seg"] + p[f"{prefix}sdm"]) / 2)
    assert METHODS["dtml-plus"] is DTMLPlus and method.outputs[0] == "ema_mean"


def test_blur_is_scipys():
    torch.manual_seed(3)
    x, sigma = torch.randn(3, 1, 12, 10, 9, dtype=torch.float64), torch.tensor([0.5, 0.8, 1.0]).view(3, 1, 1, 1, 1)
    result = perturbation.blurred(x, sigma)
    for i in range(3):
        expected = gaussian_filter(x[i, 0].numpy(), sigma[i].item(), mode="nearest", radius=3)
        np.testing.assert_allclose(result[i, 0].numpy(), expected, atol=1e-7)


def test_strong_views_differ_by_item_and_are_a_function_of_the_seed():
    x = torch.randn(4, 1, 8, 8, 8)
    torch.manual_seed(4)
    one, other = perturbation.strong_view(x, 0.5), perturbation.strong_view(x, 0.5)
    torch.manual_seed(4)
    assert torch.equal(one, perturbation.strong_view(x, 0.5)) and not torch.equal(one, other)
    same = perturbation.strong_view(x[:1].repeat(2, 1, 1, 1, 1), 0.5)
    assert not torch.equal(same[0], same[1])
    assert perturbation.strong_view(x, 0.0) is x and len(perturbation.strong_view(x[:0], 0.5)) == 0


def test_with_several_classes_a_pseudo_label_is_a_class_that_is_likelier_than_not(monkeypatch):
    """Voxel by voxel; two classes at 0.35 each leave less than that to the background, and are no label."""
    method = make(classes=2)
    g = torch.Generator().manual_seed(0)
    q, n = torch.rand(2, 2, 4, 4, 4, generator=g), torch.rand(2, 2, 4, 4, 4, generator=g)
    q[0, :, 0, 0, 0] = n[0, :, 0, 0, 0] = 0.35
    for name, head, value in (("M_s", "seg", q.logit()), ("M_d", "sdm", (-n.logit() / 50))):
        monkeypatch.setattr(method.ema[name], "forward", lambda image, head=head, value=value: {head: value})
    pseudo, a, _ = method.pseudo_label(torch.zeros(2, 1, 4, 4, 4))

    def label(values):
        return max((1, 2), key=lambda c: values[c - 1]) if max(values) > 0.5 else 0

    assert pseudo[0, 0, 0, 0] == 0 and a[0, 0, 0, 0, 0] > 0
    for i, x, y, z in np.ndindex(2, 4, 4, 4):
        one, other = q[i, :, x, y, z].tolist(), n[i, :, x, y, z].tolist()
        assert pseudo[i, x, y, z] == label([(u + v) / 2 for u, v in zip(one, other, strict=True)])
        assert (a[i, 0, x, y, z] > 0) == (label(one) == label(other))
