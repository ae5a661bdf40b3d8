"""Metrics against medpy on whole volumes, against values known by hand, and on empty masks; NSD against closed forms
and scipy's distance transform. In the test script: test_on_request.py."""

import itertools
import math

import numpy as np
import pytest
from medpy.metric import binary
from scipy import ndimage
from scipy.ndimage import gaussian_filter, label

from evaluation import metrics
from evaluation.metrics import (
    distance_text,
    distances_of,
    element_areas,
    empties,
    mean_and_sd,
    mean_text,
    overlap_text,
    segmentation_metrics,
    with_penalties,
)
from evaluation.scores import class_scores
from utils.masks import largest_component


def blob(seed: int, shape=(40, 36, 30)) -> np.ndarray:
    return gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 3) > 0.02


def ball(radius: int) -> np.ndarray:
    return ((np.indices((40, 40, 40)) - 20) ** 2).sum(0) <= radius**2


def from_medpy(a: np.ndarray, b: np.ndarray, spacing=None) -> dict[str, float]:
    result = {"dice": binary.dc(a, b), "jaccard": binary.jc(a, b), "asd": binary.asd(a, b), "hd95": binary.hd95(a, b)}
    in_mm = {} if spacing is None else {"asd_mm": binary.asd(a, b, spacing), "hd95_mm": binary.hd95(a, b, spacing)}
    return result | in_mm


@pytest.mark.parametrize("spacing", [None, (0.625,) * 3, (0.7, 0.7, 0.7), (0.625, 0.625, 1.25)])
@pytest.mark.parametrize("seed", range(4))
def test_equal_to_medpy_on_the_whole_volume_bit_for_bit(seed, spacing):
    """Large blobs touch the volume's edge, small ones leave most of it empty."""
    a, b = blob(seed), blob(seed + 50) | blob(seed)
    if seed % 2:
        window = np.zeros_like(a)
        window[10:25, 5:20, 8:22] = True
        a, b = a & window, b & window
    assert segmentation_metrics(a, b, spacing) == from_medpy(a, b, spacing)


WORST = {
    "noise": tuple(np.random.default_rng(0).random((2, 24, 30, 20)) < 0.5),
    "thin noise": tuple(np.random.default_rng(0).random((2, 24, 30, 20)) < 0.01),
    "full": (np.ones((9, 8, 7), bool), np.ones((9, 8, 7), bool)),
    "shell around a ball": (ball(18) & ~ball(16), ball(3)),
    "one voxel": (ball(0), ball(19)),
    "slabs": (np.indices((20, 12, 10))[0] < 2, np.indices((20, 12, 10))[0] > 17),
    "a plane": (np.ones((12, 12, 1), bool), np.eye(12, dtype=bool)[..., None]),
}


@pytest.mark.parametrize("spacing", [(0.625,) * 3, (0.5, 1, 2)])
@pytest.mark.parametrize("name", WORST)
def test_equal_to_medpy_on_the_worst_masks_by_tree_and_by_transform(name, spacing, monkeypatch):
    a, b = WORST[name]
    expected = [from_medpy(*pair, spacing) for pair in ((a, b), (b, a))]
    for share, far in ((metrics.NOISE, metrics.FAR), (0, 0), (10, math.inf)):
        monkeypatch.setattr(metrics, "NOISE", share)
        monkeypatch.setattr(metrics, "FAR", far)
        assert [segmentation_metrics(*pair, spacing) for pair in ((a, b), (b, a))] == expected


def test_asd_is_one_way_from_prediction_to_reference():
    reference, prediction = np.zeros((2, 20, 20, 20), bool)
    reference[5, 5, 5] = reference[5, 5, 15] = prediction[5, 5, 5] = True
    assert segmentation_metrics(prediction, reference)["asd"] == 0
    assert segmentation_metrics(reference, prediction)["asd"] == 5


def test_concentric_balls():
    grid = ((np.stack(np.meshgrid(*[np.arange(40)] * 3, indexing="ij")) - 20) ** 2).sum(0)
    result = segmentation_metrics(grid <= 12**2, grid <= 15**2)
    assert result["asd"] == pytest.approx(3, abs=0.3) and result["hd95"] == pytest.approx(3, abs=0.7)
    assert result["dice"] == pytest.approx(2 * 12**3 / (12**3 + 15**3), abs=0.01)


def test_empty_masks_never_look_perfect():
    full, empty = np.ones((4, 4, 4)), np.zeros((4, 4, 4))
    for a, b in ((empty, full), (full, empty)):
        result = segmentation_metrics(a, b)
        assert result["dice"] == result["jaccard"] == 0 and math.isnan(result["asd"]) and math.isnan(result["hd95"])
        assert list(segmentation_metrics(a, b, (1, 1, 1))) == list(segmentation_metrics(full, full, (1, 1, 1)))
    assert all(math.isnan(value) for value in segmentation_metrics(empty, empty, (1, 1, 1)).values())


def test_an_empty_mask_scores_the_diagonal_and_two_score_nothing():
    shape, spacing = (3, 4, 12), (2.0, 1.0, 0.5)
    full, empty = np.ones(shape), np.zeros(shape)
    for pair in ((empty, full), (full, empty)):
        result = with_penalties(segmentation_metrics(*pair, spacing), shape, spacing)
        assert result["asd_penalised"] == result["hd95_penalised"] == 13  # 3, 4, 12
        assert result["asd_mm_penalised"] == result["hd95_mm_penalised"] == pytest.approx(math.sqrt(36 + 16 + 36))
        assert "hd95_mm_penalised" not in with_penalties(segmentation_metrics(*pair), shape)
    result = with_penalties(segmentation_metrics(empty, empty, spacing), shape, spacing)
    assert all(math.isnan(value) for value in result.values())
    a, b = blob(1), blob(2)
    result = with_penalties(segmentation_metrics(a, b, spacing), a.shape, spacing)
    assert all(result[f"{name}_penalised"] == result[name] for name in ("asd", "hd95", "asd_mm", "hd95_mm"))


def test_two_numbers_have_no_sd():
    assert mean_and_sd([1.0, 3.0, 8.0, math.nan]) == (4.0, pytest.approx(math.sqrt(13)))
    assert mean_text([1.0, 3.0, 8.0]) == "4.00 ± 3.61"
    for values in ([1.0, 3.0], [2.0], [2.0, math.nan]):
        assert mean_and_sd(values)[0] == 2 and math.isnan(mean_and_sd(values)[1]) and mean_text(values) == "2.00"
    assert math.isnan(mean_and_sd([math.nan])[0]) and mean_text([]) == "-"


def scans_of(values, *, diagonal=None):
    """Rows of cases.csv: None has no distance, its prediction being empty; "both" has nothing at all."""
    rows = []
    for value in values:
        measured = {"dice": 0.8, "asd": value, "voxels": 5, "label_voxels": 5}
        if value is None or value == "both":
            measured = {"dice": 0.0 if value is None else math.nan, "asd": math.nan, "voxels": 0}
            measured["label_voxels"] = 5 if value is None else 0
        if diagonal:
            measured["asd_penalised"] = diagonal if value is None else measured["asd"]
        rows.append(measured)
    return rows


@pytest.mark.parametrize(
    ("values", "diagonal", "text"),
    [
        ([1.0, 2.0, 6.0], 100, "3.00 ± 2.65"),
        ([1.0, 2.0, None], 100, "34.33 ± 56.87 (2 of 3; these alone 1.50)"),
        ([1.0, 2.0, None], None, "1.50 (2 of 3; not penalised)"),
        ([1.0, 2.0, "both"], 100, "1.50 (2 of 3)"),
        ([None, None, None], 100, "100.00 ± 0.00 (0 of 3)"),
        ([None, None], None, "- (0 of 2; not penalised)"),
    ],
)  # fmt: skip
def test_a_mean_distance_says_how_many_scans_have_one_where_some_have_none(values, diagonal, text):
    assert distance_text([distances_of(scans_of(values, diagonal=diagonal), "asd")]) == text


def test_over_runs_the_means_are_averaged_and_the_scans_counted():
    runs = [[1.0, 3.0], [2.0, None], [4.0, 6.0]]
    result = [distances_of(scans_of(run, diagonal=10), "asd") for run in runs]
    assert (
        distance_text(result, over_runs=True) == "4.33 ± 2.08 (5 of 6; these alone 3.00)"
    )  # of 2, 6, 5 and of 2, 2, 5
    early = [*result[:2], distances_of(scans_of([4.0, None]), "asd")]
    assert distance_text(early, over_runs=True) == "2.67 ± 1.15 (4 of 6; not penalised)"  # of 2, 2, 4
    assert distance_text(result[:1], over_runs=True) == "2.00"


def test_scans_without_a_prediction_a_label_and_either_are_counted_apart():
    rows = scans_of([1.0, None, "both", None], diagonal=10)
    rows.append({"dice": 0.0, "asd": math.nan, "voxels": 5, "label_voxels": 0})
    assert empties(rows) == (2, 1, 1)
    assert overlap_text(rows, "dice") == "20.00 ± 40.00 (4 of 5)" and overlap_text(rows[:1], "dice") == "80.00"


def test_largest_component_equals_scipy_on_noise():
    mask = np.random.default_rng(0).random((20, 20, 20)) < 0.08
    labels, _ = label(mask, np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel())[1:]
    assert (largest_component(mask) == (labels == sizes.argmax() + 1)).all()


# -- NSD --


SPACINGS = [(1.0, 1.0, 1.0), (0.625, 0.8, 2.5)]


def nsd(a, b, tolerance, spacing=(1, 1, 1)):
    return segmentation_metrics(a, b, spacing, tolerance)["nsd"]


def cuboid(shape, *sides):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(low, high) for low, high in sides)] = True
    return mask


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


def test_each_class_has_its_own_and_the_mean_is_over_those_that_are_there():
    label = np.zeros((12, 12, 12), np.uint8)
    label[1:4, 1:4, 1:4], label[6:10, 6:10, 6:10] = 1, 2
    prediction = label.copy()
    prediction[6:10, 6:10, 6:10] = 0
    one, two, three, mean = class_scores(prediction, label, 3, (1.0, 1.0, 1.0), 1.0)
    assert (one["nsd"], two["nsd"], mean["nsd"]) == (1, 0, 0.5) and math.isnan(three["nsd"])
