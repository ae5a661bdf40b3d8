"""BCP: its mixes crop by crop, its losses against the formulas in numpy, its teacher and its pseudo-labels."""

import by_hand
import numpy as np
import pytest
import torch
from scipy import ndimage

from losses.mixing import random_box
from methods import bcp
from methods.bcp import BCP


def make(iterations=10, **options) -> BCP:
    torch.manual_seed(0)
    return BCP(BCP.Options(filters=2, **options), iterations=iterations).double().train()


def batch(labeled=4, unlabeled=4, classes=1):
    torch.manual_seed(1)
    image = torch.randn(labeled + unlabeled, 1, 16, 16, 16, dtype=torch.float64)
    label = torch.randint(0, classes + 1, (labeled, 16, 16, 16)).to(torch.uint8)
    return {"image": image, "label": label, "case": ["x"] * (labeled + unlabeled)}


def test_the_mixes_are_those_of_the_paper_and_take_any_number_of_crops():
    pairs = [
        list(zip(*(x.tolist() for x in mixes), strict=True)) for mixes in (bcp.mix_labeled(4), bcp.mix_both_kinds(4, 4))
    ]
    assert pairs[0] == [(0, 2), (1, 3), (2, 0), (3, 1)]
    assert pairs[1] == [(0, 4), (1, 5), (6, 2), (7, 3)]  # X a, b around u a, b; u c, d around X c, d
    for labeled in range(1, 6):
        outside, inside = bcp.mix_labeled(labeled)
        assert set(outside.tolist()) == set(inside.tolist()) == set(range(labeled))
        for unlabeled in range(1, 6):
            outside, inside = bcp.mix_both_kinds(labeled, unlabeled)
            half = len(outside) // 2
            assert len(outside) == 2 * half and set(torch.cat([outside, inside]).tolist()) == set(
                range(labeled + unlabeled)
            )
            assert all(outside[:half] < labeled) and all(inside[:half] >= labeled)
            assert all(outside[half:] >= labeled) and all(inside[half:] < labeled)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("iteration", [1, 5], ids=["warm-up", "then"])
def test_the_losses_are_the_formulas_of_the_docstring(iteration, classes, monkeypatch):
    method, data = make(start=0.3, pseudo_weight=0.7, classes=classes).eval(), batch(classes=classes)
    pseudo = torch.randint(0, classes + 1, (4, 16, 16, 16)).to(torch.uint8)
    monkeypatch.setattr(method, "pseudo_label", lambda image: pseudo)
    torch.manual_seed(3)
    box = random_box((16, 16, 16), 2 / 3)
    torch.manual_seed(3)
    found = method(data, iteration)
    crops = list(zip(data["image"], [*data["label"], *pseudo], strict=True))
    mixes = [(0, 4), (1, 5), (6, 2), (7, 3)] if iteration == 5 else [(0, 2), (1, 3), (2, 0), (3, 1)]
    m = box.double()
    image = torch.stack([(1 - m) * crops[a][0] + m * crops[b][0] for a, b in mixes])
    y = torch.stack([(1 - m) * crops[a][1] + m * crops[b][1] for a, b in mixes]).numpy()
    with torch.no_grad():
        q = by_hand.distribution(method.student(image)["seg"])
    inside, outside = np.stack([box.numpy()] * 2), np.stack([~box.numpy()] * 2)
    if iteration == 5:
        seg = by_hand.seg(q[:2], y[:2], outside) + by_hand.seg(q[2:], y[2:], inside)
        other = by_hand.seg(q[:2], y[:2], inside) + by_hand.seg(q[2:], y[2:], outside)
    else:
        seg, other = by_hand.seg(q, y), 0.0
    assert found.terms["seg"].item() == pytest.approx(seg, rel=1e-6)
    assert found.terms["pseudo_seg"].item() == pytest.approx(other, rel=1e-6)
    assert found.total.item() == pytest.approx(seg + 0.7 * other, rel=1e-6)


def test_the_teacher_is_the_student_until_the_start_and_then_its_average():
    method, data = make(iterations=20, start=0.2), batch()
    name = "heads.seg.0.weight"
    expected = None
    for t in range(8):
        method.student.state_dict()[name].add_(torch.randn((), dtype=torch.float64))
        method.after_step(data, t)
        own = method.student.state_dict()[name]
        expected = own.clone() if t < 4 else 0.99 * expected + 0.01 * own
        torch.testing.assert_close(method.ema.student.state_dict()[name], expected, rtol=1e-12, atol=1e-12)
    assert not any(module.training for module in method.train().ema.modules()) and method.student.training


@pytest.mark.parametrize("classes", [1, 2])
def test_pseudo_labels_keep_the_largest_component_of_each_class(classes):
    torch.manual_seed(2)
    logits = torch.randn(2, classes + (classes > 1), 16, 16, 16, dtype=torch.float64)
    logits[:, 0] += 2.0 if classes > 1 else -1.5  # more background, so that a class falls into many components
    method = make(classes=classes)
    method.ema.student.forward = lambda image: {"seg": logits}
    q = by_hand.distribution(logits)
    every, found = q.argmax(axis=1), method.pseudo_label(batch()["image"][:2]).numpy()
    for kept, label in zip(found, every, strict=True):
        for c in range(1, classes + 1):
            numbers, count = ndimage.label(label == c, np.ones((3, 3, 3)))
            assert count > 1 and (kept == c).sum() == np.bincount(numbers.flat)[1:].max()
            assert not ((kept == c) & (label != c)).any()
    method = make(classes=classes, largest_component=False)
    method.ema.student.forward = lambda image: {"seg": logits}
    assert (method.pseudo_label(batch()["image"][:2]).numpy() == every).all()
