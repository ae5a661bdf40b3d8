"""NSD against closed forms, scipy's distance transform and DeepMind's own package, and in the test script."""

import csv
import itertools
import json
import math

import h5py
import numpy as np
import pytest
from conftest import TINY, make_set
from scipy import ndimage
from test_metrics import blob

import test_la
import train_dtml
from evaluation.metrics import element_areas, segmentation_metrics
from evaluation.scores import class_scores
from utils.errors import UserError

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


# -- rows and the test script --


def test_each_class_has_its_own_and_the_mean_is_over_those_that_are_there():
    label = np.zeros((12, 12, 12), np.uint8)
    label[1:4, 1:4, 1:4], label[6:10, 6:10, 6:10] = 1, 2
    prediction = label.copy()
    prediction[6:10, 6:10, 6:10] = 0
    one, two, three, mean = class_scores(prediction, label, 3, (1.0, 1.0, 1.0), 1.0)
    assert (one["nsd"], two["nsd"], mean["nsd"]) == (1, 0, 0.5) and math.isnan(three["nsd"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nsd")
    words = [*TINY, "--iterations", "20", "--lr", "0.1", "--lr-steps", "--k", "10", "--filters", "4"]
    train_dtml.main(["--data", str(make_set(folder / "set")), "--runs", str(folder), "--name", "run", *words])
    return folder


def score(trained, out, *words):
    test_la.main(["--checkpoint", str(trained / "run"), "--out", str(out), "--stride", "8", "8", "8", "--threads", "1",
                  "--output", "seg", *words])  # fmt: skip
    with open(out / "cases.csv", newline="") as f:
        return list(csv.DictReader(f)), json.loads((out / "test.json").read_text())


def test_the_test_script_adds_a_column_and_changes_nothing_else(trained, tmp_path, capsys):
    usual, about = score(trained, tmp_path / "usual")
    capsys.readouterr()
    rows, told = score(trained, tmp_path / "nsd", "--nsd-tolerance", "1.5", "--report")
    text = capsys.readouterr().out
    assert [{k: v for k, v in row.items() if k != "nsd"} for row in rows] == usual
    assert told["nsd_tolerance_mm"] == 1.5 and "nsd_tolerance_mm" not in about
    values = [float(row["nsd"]) for row in rows if row["component"] == "all"]
    assert all(0 < value < 1 for value in values)
    assert "at most 1.5 mm" in text and "| 95HD mm | NSD % | no prediction |" in text
    assert f"| {100 * np.mean(values):.2f} |" in next(line for line in text.splitlines() if "| seg | all |" in line)
    assert "NSD %" in (tmp_path / "nsd" / "report.html").read_text()


def test_a_tolerance_without_a_spacing_is_refused(trained, tmp_path):
    data = make_set(tmp_path / "set")
    with h5py.File(data / "case09" / "mri_norm2.h5", "a") as f:
        del f.attrs["spacing"]
    with pytest.raises(UserError, match=r"--nsd-tolerance 2 is in mm, and the spacing of case09 is not known"):
        score(trained, tmp_path / "out", "--data", str(data), "--nsd-tolerance", "2")
    assert not (tmp_path / "out").exists()
    (data / "spacing.txt").write_text("1 1 2")
    assert "nsd" in score(trained, tmp_path / "out", "--data", str(data), "--nsd-tolerance", "2")[0][0]
    with pytest.raises(UserError, match="-1 must be at least 0"):
        score(trained, tmp_path / "other", "--nsd-tolerance=-1")
