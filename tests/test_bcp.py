"""BCP: its mixes crop by crop, its losses against the formulas in numpy, its teacher and its pseudo-labels."""

import collections
from functools import partial

import by_hand
import numpy as np
import pytest
import torch
from scipy import ndimage

from losses.mixing import paste, random_box
from methods import bcp

make = partial(by_hand.make, "bcp")
batch = partial(by_hand.batch, labeled=4, unlabeled=4)


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
    result = method(data, iteration)
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
    assert result.terms["seg"].item() == pytest.approx(seg, rel=1e-6)
    assert result.terms["pseudo_seg"].item() == pytest.approx(other, rel=1e-6)
    assert result.total.item() == pytest.approx(seg + 0.7 * other, rel=1e-6)


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
    every, result = q.argmax(axis=1), method.pseudo_label(batch()["image"][:2]).numpy()
    for kept, label in zip(result, every, strict=True):
        for c in range(1, classes + 1):
            numbers, count = ndimage.label(label == c, np.ones((3, 3, 3)))
            assert count > 1 and (kept == c).sum() == np.bincount(numbers.flat)[1:].max()
            assert not ((kept == c) & (label != c)).any()
    method = make(classes=classes, largest_component=False)
    method.ema.student.forward = lambda image: {"seg": logits}
    assert (method.pseudo_label(batch()["image"][:2]).numpy() == every).all()


# -- boxes and pasting --


def test_crops_of_one_slice_are_mixed_too():
    method, data = make(start=0.0, halvings=[4, 4, 0]), batch()
    data = {**data, "image": data["image"][..., :1], "label": data["label"][..., :1]}
    seen = []
    method.student.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    method(data, 1)
    for mix, (outside, inside) in zip(seen[0], [(0, 4), (1, 5), (6, 2), (7, 3)], strict=True):
        shares = [(mix == data["image"][i]).sum().item() for i in (inside, outside)]
        assert shares == [10 * 10, 16**2 - 10**2]


@pytest.mark.parametrize(
    ("sides", "share", "expected"),
    [((12, 9, 7), 2 / 3, (8, 6, 4)), ((112, 112, 80), 2 / 3, (74, 74, 53)),
     ((4, 4, 4), 1.0, (4, 4, 4)), ((12, 12, 1), 2 / 3, (8, 8, 1)), ((16, 16, 2), 0.27, (4, 4, 1))],
)  # fmt: skip
def test_a_box_is_a_solid_block_of_its_share_of_each_side(sides, share, expected):
    for seed in range(5):
        torch.manual_seed(seed)
        box = random_box(sides, share)
        assert box.shape == sides and box.dtype == torch.bool and box.sum() == np.prod(expected)
        places = np.argwhere(box.numpy())
        assert tuple(np.ptp(places, axis=0) + 1) == expected


def test_a_box_of_no_voxel_is_empty():
    assert not random_box((8, 8, 8), 0.0).any()


def test_every_place_of_a_box_is_as_likely_the_first_and_the_last_too():
    torch.manual_seed(0)
    corners = [tuple(np.argwhere(random_box((5, 4, 3), 0.7).numpy()).min(axis=0)) for _ in range(3000)]
    counts = collections.Counter(corners)  # boxes of 3, 2 and 2 voxels
    assert set(counts) == {(x, y, z) for x in range(3) for y in range(3) for z in range(2)}
    assert min(counts.values()) > 110 and max(counts.values()) < 230  # 167 expected, SD 13


@pytest.mark.parametrize("own", [False, True], ids=["one box", "a box of each item"])
def test_a_mix_is_the_one_crop_inside_and_the_other_outside(own):
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 1, 6, 5, 4), torch.randint(3, (2, 3, 6, 5, 4), dtype=torch.uint8)
    boxes = torch.stack([random_box((6, 5, 4), 0.6) for _ in range(3)])
    box = boxes if own else boxes[0]
    image, label = paste(a[0], a[1], box), paste(b[0], b[1], box)
    assert image.shape == a[0].shape and label.shape == b[0].shape and label.dtype == torch.uint8
    for n, x, y, z in np.ndindex(3, 6, 5, 4):
        source = int(boxes[n if own else 0, x, y, z])
        assert image[n, 0, x, y, z] == a[source, n, 0, x, y, z] and label[n, x, y, z] == b[source, n, x, y, z]
