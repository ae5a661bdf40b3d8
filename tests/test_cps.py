"""CPS: its losses against the formulas in numpy, the crops that count, and what gets a gradient."""

from functools import partial

import by_hand
import pytest
import torch

from losses.ramps import ramp_up
from methods.cps import CPS

batch = partial(by_hand.batch, unlabeled=3)


def make(**options):
    method = by_hand.make("cps", **options)
    for network in method.networks:
        network.heads["seg"][0].bias.data.zero_()  # so that both classes are found before any training
    return method


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("on", ["all", "unlabeled"])
def test_the_losses_are_the_formulas_of_the_docstring(on, classes):
    method, data = make(pseudo_on=on, classes=classes).eval(), batch(classes=classes)
    result = method(data, 0)
    with torch.no_grad():
        q = [by_hand.distribution(network(data["image"])["seg"]) for network in method.networks]
    assert q[0].shape[1] == classes + 1
    y = [x.argmax(axis=1) for x in q]
    assert all(len(set(labels.flat)) > 1 for labels in y) and (y[0] != y[1]).any()
    parts = [slice(2, None)] + [slice(2)] * (on == "all")
    pseudo = sum(by_hand.ce(q[i][part], y[1 - i][part]) for part in parts for i in (0, 1))
    seg = sum(by_hand.seg(x[:2], data["label"].numpy()) for x in q)
    assert result.terms["seg"].item() == pytest.approx(seg, rel=1e-9)
    assert result.terms["pseudo"].item() == pytest.approx(pseudo, rel=1e-9)
    assert result.total.item() == pytest.approx(seg + 1.5 * pseudo, rel=1e-9) and result.weights == {"w": 1.5}


@pytest.mark.parametrize("classes", [1, 3])
def test_two_equal_networks_agree_in_the_log(classes):
    method = make(classes=classes, dropout=0.0)
    method.networks[1].load_state_dict(method.networks[0].state_dict())
    assert method(batch(classes), 3).monitors["pseudo/agreement"] == 1
    method.networks[1].heads["seg"][0].bias.data[0] += 100 if classes > 1 else -100  # all background
    assert method(batch(classes), 3).monitors["pseudo/agreement"] < 1


@pytest.mark.parametrize(("on", "first"), [("all", 0), ("unlabeled", 2)])
def test_the_foreground_of_the_log_is_that_of_the_labels_that_are_learned(on, first):
    """Not that of labeled crops whose pseudo-labels count for nothing; the run warns by it."""
    method, data = make(pseudo_on=on).eval(), batch()
    with torch.no_grad():
        marked = method.networks[0](data["image"])["seg"] > 0
    assert marked[:2].double().mean() != marked[2:].double().mean()
    share = method(data, 0).monitors["pseudo/foreground"].item()
    assert share == pytest.approx(marked[first:].double().mean().item(), rel=1e-6)
    assert make(pseudo_on="unlabeled")(batch(unlabeled=0), 0).monitors["pseudo/foreground"] == 0


def test_each_network_learns_the_other_s_label_and_no_gradient_reaches_that_label():
    """A logit's gradient is that of the cross-entropy to a constant label: (p - y) / number of voxels."""
    method, data = make().eval(), batch(unlabeled=2)
    logits = [network(data["image"])["seg"].detach().requires_grad_(True) for network in method.networks]
    for network, x in zip(method.networks, logits, strict=True):
        network.forward = lambda image, x=x: {"seg": x}
    method(data, 0).terms["pseudo"].backward()
    for own, other in (logits, logits[::-1]):
        expected = (own.detach().sigmoid() - (other.detach() > 0).double()) / own[:2].numel()
        torch.testing.assert_close(own.grad, expected)


def test_the_authors_code_has_one_mean_over_all_crops():
    method, data = make(pseudo_weight=CPS.PRESETS["authors"]["pseudo_weight"]).eval(), batch(unlabeled=2)
    result = method(data, 0)
    with torch.no_grad():
        q = [by_hand.distribution(network(data["image"])["seg"]) for network in method.networks]
    once = sum(by_hand.ce(q[i], q[1 - i].argmax(axis=1)) for i in (0, 1))
    assert result.weights["w"] * result.terms["pseudo"].item() == pytest.approx(1.5 * once, rel=1e-9)


def test_the_weight_is_constant_or_rises():
    constant, rising = make(iterations=40), make(iterations=40, **{"pseudo_weight": 0.1, "ramp_end": 0.5})
    assert [constant(batch(), t).weights["w"] for t in (0, 39)] == [1.5, 1.5]
    result = [rising(batch(), t).weights["w"] for t in (0, 10, 20, 39)]
    assert result == pytest.approx([0.1 * ramp_up(t, 20) for t in (0, 10, 20, 20)]) and result[2:] == [0.1, 0.1]


@pytest.mark.parametrize("on", ["all", "unlabeled"])
def test_labels_alone_are_its_control(on):
    method, data = make(pseudo_on=on).eval(), batch()
    alone, both = method({**data, "image": data["image"][:2]}, 3), method(data, 3)
    assert alone.terms["seg"].item() == pytest.approx(both.terms["seg"].item(), abs=1e-12)
    assert (alone.terms["pseudo"] == 0) == (on == "unlabeled") and not method.needs_unlabeled
