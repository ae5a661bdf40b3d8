"""NSD against closed forms and scipy's distance transform. In the test script: test_on_request.py."""

import itertools
import math

import numpy as np
import pytest
from scipy import ndimage
from test_metrics import blob

from evaluation.metrics import element_areas, segmentation_metrics
from evaluation.scores import class_scores

SPACINGS = [(1.0, 1.0, 1.0), (0.625, 0.8, 2.5)]


def nsd(a, b, tolerance, spacing=(1, 1, 1)):
    return segmentation_metrics(a, b, spacing, tolerance)["nsd"]


def cuboid(shape, *sides):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(low, high) for low, high in sides)] = True
    return mask


# -- closed forms --


@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_elements_of_a_plane_an_edge_and_a_corner_have_their_area(spacing):
    x, y, z = spacing
    areas = element_areas(spacing)
    assert areas[0] == areas[255] == 0 and (areas[1:255] > 0).all()
    codes = np.arange(256)
    np.testing.assert_allclose(areas[codes], areas[255 - codes])
    for bits, area in (
        ([0, 1, 2, 3], y * z),  # the four voxels at the lower x
        ([0, 1, 4, 5], x * z),
        ([0, 2, 4, 6], x * y),
        ([0, 1], z * math.hypot(x, y) / 2),  # a column along z: the bevelled edge
        ([0], math.sqrt((x * y) ** 2 + (y * z) ** 2 + (x * z) ** 2) / 8),  # the triangle between three half edges
    ):
        assert areas[sum(1 << bit for bit in bits)] == pytest.approx(area, rel=1e-6)


def surface_area(sides, spacing):
    """Of a cuboid with so many voxels along its sides, bevelled by half a voxel at its edges and corners."""
    n, mm = np.array(sides) - 1, np.array(spacing)
    faces = sum(2 * n[i] * n[j] * mm[i] * mm[j] for i, j in itertools.combinations(range(3), 2))
    edges = sum(4 * n[k] * mm[k] * math.hypot(mm[i], mm[j]) / 2 for k, i, j in ((0, 1, 2), (1, 0, 2), (2, 0, 1)))
    corner = math.sqrt(sum((mm[i] * mm[j]) ** 2 for i, j in itertools.combinations(range(3), 2))) / 8
    return faces + edges + 8 * corner


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_longer_cuboid_differs_by_its_end(axis, spacing):
    """Three voxels longer along one axis. Within a tolerance below one voxel lies all of the shorter one but its end,
    and all of the longer one but for three voxels of its walls, and its end."""
    sides = [8, 9, 10]
    longer = [side + 3 * (i == axis) for i, side in enumerate(sides)]
    a, b = (cuboid((16, 16, 16), *((2, 2 + side) for side in lengths)) for lengths in (sides, longer))
    i, j = (k for k in range(3) if k != axis)
    mm = np.array(spacing)
    n = np.array(sides) - 1
    corner = math.sqrt(sum((mm[p] * mm[q]) ** 2 for p, q in itertools.combinations(range(3), 2))) / 8
    edges = n[i] * mm[i] * math.hypot(mm[axis], mm[j]) + n[j] * mm[j] * math.hypot(mm[axis], mm[i])
    end = n[i] * n[j] * mm[i] * mm[j] + edges + 4 * corner
    rim = edges + 4 * corner  # of the shorter one's end: it lies on the walls of the longer one
    ring = mm[axis] * (2 * n[i] * mm[i] + 2 * n[j] * mm[j] + 2 * math.hypot(mm[i], mm[j]))  # walls, one voxel long
    small, large = surface_area(sides, spacing), surface_area(longer, spacing)
    near = (small - (end - rim)) + (large - end - 2 * ring)
    assert nsd(a, b, 0, spacing) == pytest.approx(near / (small + large), rel=1e-6)
    assert nsd(a, b, 3 * mm[axis] + 1e-9, spacing) == 1


@pytest.mark.parametrize("mm", [0.3, 0.7, 0.8, 1.2])
@pytest.mark.parametrize("voxels", [1, 2, 3])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_shift_by_as_many_voxels_as_the_tolerance_is_within_it(kind, voxels, mm):
    """Files state a spacing of 0.8 as 0.800000012 mm, and 3 * 0.8 is 2.4000000000000004."""
    a, b = (cuboid((16, 10, 10), (x, x + 6), (2, 8), (2, 8)) for x in (3, 3 + voxels))
    assert nsd(a, b, round(voxels * mm, 1), (float(kind(mm)),) * 3) == 1
    assert nsd(a, b, round(voxels * mm, 1) - 0.01, (float(kind(mm)),) * 3) < 1


def test_empty_masks():
    full, empty = cuboid((8, 8, 8), (2, 5), (2, 5), (2, 5)), np.zeros((8, 8, 8), bool)
    assert nsd(full, empty, 100) == nsd(empty, full, 100) == 0
    assert math.isnan(nsd(empty, empty, 1))
    assert "nsd" not in segmentation_metrics(full, full, (1, 1, 1))
    with pytest.raises(ValueError, match="a tolerance of 1 mm needs a spacing"):
        segmentation_metrics(full, full, None, 1.0)


# -- other code --


def by_scipy(a, b, tolerance, spacing):
    """The share of elements by scipy's distance transform, each with the area that `element_areas` has for it."""
    weights = (1 << np.arange(8)).reshape(2, 2, 2)
    codes = [ndimage.correlate(np.pad(m, 2).astype(int), weights, mode="constant") for m in (a, b)]
    on = [(code > 0) & (code < 255) for code in codes]
    away = [ndimage.distance_transform_edt(~surface, sampling=spacing) for surface in on]
    areas = [element_areas(spacing)[code] for code in codes]
    near = sum(areas[i][on[i] & (away[1 - i] <= tolerance)].sum() for i in range(2))
    return near / sum(areas[i][on[i]].sum() for i in range(2))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("seed", range(3))
def test_equal_to_scipys_distance_transform(seed, spacing):
    a, b = blob(seed), blob(seed + 50) | blob(seed)
    for tolerance in (0, 1, 2.5):
        assert nsd(a, b, tolerance, spacing) == pytest.approx(by_scipy(a, b, tolerance, spacing), abs=1e-12)


# -- rows --


def test_each_class_has_its_own_and_the_mean_is_over_those_that_are_there():
    label = np.zeros((12, 12, 12), np.uint8)
    label[1:4, 1:4, 1:4], label[6:10, 6:10, 6:10] = 1, 2
    prediction = label.copy()
    prediction[6:10, 6:10, 6:10] = 0
    one, two, three, mean = class_scores(prediction, label, 3, (1.0, 1.0, 1.0), 1.0)
    assert (one["nsd"], two["nsd"], mean["nsd"]) == (1, 0, 0.5) and math.isnan(three["nsd"])
