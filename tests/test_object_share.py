"""--object-share: where labeled crops lie, against counting. Runs with it: test_augmentation.py."""

import numpy as np
import pytest
import torch
from conftest import write_case

from dataloaders.cases import Case
from dataloaders.two_stream import MOST_VOXELS, Patches, Slot, voxels_of_classes
from dataloaders.volumes import Volumes

SHAPE, PATCH = (30, 26, 20), (8, 6, 8)
SHARE, COUNT = 0.33, 2000


def label_map() -> np.ndarray:
    """Class 1 of 40 voxels in a corner, class 2 of 2 voxels, no class 3."""
    label = np.zeros(SHAPE, np.uint8)
    label[:4, :5, :2] = 1
    label[20, 12, 10:12] = 2
    return label


@pytest.fixture
def volumes(tmp_path) -> Volumes:
    """A labeled case and one whose label must not be opened, of the same volumes."""
    image = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    for name in ("a", "b"):
        write_case(tmp_path / f"{name}.h5", image, label_map())
    cases = [Case(name, tmp_path / f"{name}.h5", name == "a", classes=3) for name in ("a", "b")]
    return Volumes(cases)


def patches(volumes: Volumes, share: float, **more) -> Patches:
    options = {"patch_size": PATCH, "augment": "d4", "seed": 5, "sdm": False, **more}
    return Patches(volumes, object_share=share, **options)


def holds(draw, mask: np.ndarray) -> bool:
    return bool(mask[tuple(slice(a, a + s) for a, s in zip(draw.start, draw.size, strict=True))].any())


def chance(size: tuple[int, ...], mask: np.ndarray) -> float:
    """The share of all boxes of this size that hold a voxel of the mask, by counting them."""
    boxes = np.lib.stride_tricks.sliding_window_view(mask, size)
    return float(boxes.any(axis=(3, 4, 5)).mean())


def test_the_share_of_crops_that_hold_the_object_is_that_of_chance_and_of_the_option(volumes):
    """Of all classes, and of each: half of the placed crops are around it, the others hold it by chance alone."""
    p = patches(volumes, SHARE)
    draws = [p.draws(Slot(step, 1, 0))[0][0] for step in range(COUNT)]
    for mask, part in ((label_map() > 0, 1.0), (label_map() == 1, 0.5), (label_map() == 2, 0.5)):
        sizes = (PATCH, (PATCH[1], PATCH[0], PATCH[2]))  # half of the boxes are turned
        free = np.mean([chance(size, mask) for size in sizes])
        assert free < 0.1
        expected = SHARE * part + (1 - SHARE) * free
        result = np.mean([holds(draw, mask) for draw in draws])
        assert abs(result - expected) < 4 * np.sqrt(expected * (1 - expected) / COUNT)


def test_a_placed_crop_has_the_voxel_in_its_middle_or_ends_with_the_volume(volumes):
    p, usual = patches(volumes, 1.0), patches(volumes, 0.0)
    voxels = {tuple(x): int(label_map()[tuple(x)]) for x in np.argwhere(label_map())}
    starts: dict[tuple, dict[tuple, set]] = {}
    for size in (PATCH, (PATCH[1], PATCH[0], PATCH[2])):
        for x, c in voxels.items():
            middle = np.array(x) - np.array(size) // 2
            start = tuple(np.clip(middle, 0, np.array(SHAPE) - size).tolist())
            starts.setdefault(size, {}).setdefault(start, set()).add(c)
    seen, classes = set(), []
    for step in range(COUNT):
        draw, before = p.draws(Slot(step, 0, 0))[0][0], usual.draws(Slot(step, 0, 0))[0][0]
        assert (draw.size, draw.turns, draw.flips) == (before.size, before.turns, before.flips)
        (c,) = starts[draw.size][draw.start]
        seen.add((draw.size, draw.start))
        classes.append(c)
    assert seen == {(size, start) for size, there in starts.items() for start in there}  # every voxel is drawn
    assert abs(np.mean(np.array(classes) == 1) - 0.5) < 4 * 0.5 / np.sqrt(COUNT)  # 40 voxels or 2: all alike
    item = p[Slot(3, 0, 0)]
    assert item["label"].shape == PATCH and item["label"].any()


def test_other_crops_stay_where_they_are(volumes):
    """Those of an unlabeled case, of an empty label, and, of a labeled one, those that chance does not place."""
    some, none = patches(volumes, SHARE), patches(volumes, 0.0)
    slots = [Slot(step, slot, case) for step in range(300) for slot, case in ((0, 0), (2, 1))]
    moved = [some.draws(slot)[0] != none.draws(slot)[0] for slot in slots]
    assert not any(moved[1::2])
    assert abs(np.mean(moved[::2]) - SHARE) < 4 * np.sqrt(SHARE * (1 - SHARE) / 300)
    assert 1 not in some._objects  # its label was not read
    volumes._labels[0] = torch.zeros(SHAPE, dtype=torch.uint8)
    empty = patches(volumes, 1.0)
    assert empty.draws(slots[0])[0] == none.draws(slots[0])[0]


def test_a_second_crop_is_placed_on_its_own(volumes):
    p = patches(volumes, 1.0, other=True)
    pairs = [p.draws(Slot(step, 0, 0))[0] for step in range(20)]
    assert all(holds(draw, label_map() > 0) for pair in pairs for draw in pair)
    assert len({pair[0].start == pair[1].start for pair in pairs}) == 2


def test_crops_of_pooled_volumes_hold_the_pooled_object(volumes):
    coarse = Volumes(volumes.cases[:1], downsample=2)
    _, small = coarse.read(0, tuple(slice(0, side) for side in coarse.shapes[0]))
    p = patches(coarse, 1.0)
    assert small.any() and all(holds(p.draws(Slot(step, 0, 0))[0][0], small.numpy() > 0) for step in range(50))


def test_a_crop_larger_than_the_scan_is_padded(volumes):
    item = patches(volumes, 1.0, patch_size=(48, 16, 32))[Slot(0, 0, 0)]
    assert item["image"].shape == (1, 48, 16, 32) and item["label"].any()


def test_of_a_large_object_a_choice_of_voxels_is_stored():
    label = np.zeros((40, 40, 40), np.uint8)
    label[5:35, 5:35, 5:35] = 2
    (voxels,) = voxels_of_classes(label)
    assert len(np.unique(voxels, axis=0)) == len(voxels) == MOST_VOXELS < label.astype(bool).sum()
    assert (label[tuple(voxels.T)] == 2).all()
    assert np.abs(voxels.mean(axis=0) - 19.5).max() < 4 * 30 / np.sqrt(12 * MOST_VOXELS)
