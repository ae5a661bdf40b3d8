"""Boxes and pasting: sizes and places against counts by hand, mixes voxel by voxel."""

import collections

import numpy as np
import pytest
import torch

from losses.mixing import paste, random_box


@pytest.mark.parametrize(
    ("sides", "share", "expected"),
    [
        ((12, 9, 7), 2 / 3, (8, 6, 4)),
        ((112, 112, 80), 2 / 3, (74, 74, 53)),
        ((12, 9, 7), (1, 0.5, 0.3), (12, 4, 2)),
        ((4, 4, 4), 1.0, (4, 4, 4)),
    ],
)
def test_a_box_is_a_solid_block_of_its_share_of_each_side(sides, share, expected):
    for seed in range(5):
        torch.manual_seed(seed)
        box = random_box(sides, share)
        assert box.shape == sides and box.dtype == torch.bool and box.sum() == np.prod(expected)
        places = np.argwhere(box.numpy())
        assert tuple(np.ptp(places, axis=0) + 1) == expected


def test_a_box_of_no_voxel_is_empty_and_a_wrong_share_is_refused():
    assert not random_box((8, 8, 8), 0.1).any() and not random_box((8, 8, 8), (1.0, 0.0, 1.0)).any()
    for share in (1.1, -0.1, (0.5, 0.5), (0.5, 0.5, 2.0)):
        with pytest.raises(ValueError):
            random_box((8, 8, 8), share)


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
