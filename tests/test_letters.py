"""The letters of the patient's sides in pictures: where they point, and none where that is not known."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import TINY, make_set, write_case
from scans import OBLIQUE, turned

import train_dtml
from dataloaders.cases import Case, case_file
from dataloaders.geometry import DEFAULT_GEOMETRY
from dataloaders.orientation import Turn, orientation_of, viewing_turn
from evaluation import slices
from evaluation.figures import ComparedCase, MapsRow, around, draw_comparison, draw_maps
from evaluation.slices import OPPOSITE, edge_letters, panels
from tools import pictures

DIRECTIONS = {
    "LPS": np.eye(3),
    "RAS": np.diag([-1.0, -1.0, 1.0]),
    "sagittal": np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]),
    "oblique": np.reshape(OBLIQUE["direction"], (3, 3)),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_letters_point_where_itk_s_direction_does(name):
    """A column of ITK's direction is the way in mm of one more voxel, to the patient's left, back and head."""
    direction = DIRECTIONS[name]
    letters = edge_letters(orientation_of(tuple(direction.ravel())))
    for axis, (before, after) in enumerate((("left", "right"), ("top", "bottom"))):
        way = direction[:, axis]
        nearest = int(np.abs(way).argmax())
        expected = ("LPS" if way[nearest] > 0 else "RAI")[nearest]
        assert letters[after] == expected and letters[before] == OPPOSITE[expected]
    assert edge_letters(None) == {}


def letters_in(figure) -> list[list[str]]:
    """Of each panel, the single letters written into it."""
    return [[t.get_text() for t in axes.texts if t.get_text() in OPPOSITE] for axes in figure.axes]


def test_figures_have_them_in_the_image_alone_where_they_are_known():
    image, label = np.random.default_rng(0).random((20, 24)), np.zeros((20, 24), np.uint8)
    label[5:12, 6:15] = 1
    row = MapsRow("a", image, label, {"p": image}, (1.0, 1.0), "RAS")
    assert letters_in(draw_maps([row]))[:3] == [["L", "R", "P", "A"], [], []]
    assert not any(letters_in(draw_maps([MapsRow("a", image, label, {"p": image}, (1.0, 1.0))])))
    volume, mask = np.repeat(image[..., None], 8, axis=2), np.repeat(label[..., None], 8, axis=2)
    case = ComparedCase("a", volume, mask, 4, {"run": (mask, "Dice")}, (1.0, 1.0, 1.0), "LPS")
    assert letters_in(draw_comparison([case], 160, 30))[:2] == [["R", "L", "A", "P"], []]


def test_a_training_picture_has_them_at_the_edges_of_the_image():
    image, contours = np.zeros((60, 60)), {"label": (np.zeros((60, 60), np.uint8), "#00ff00")}
    image[0, 0] = 1  # which is no percentile: all is black
    plain, unknown, known = (
        panels(image, {"p": image}, contours, orientation=orientation) for orientation in (None, None, "RAS")
    )
    assert np.array_equal(plain, unknown)
    changed = (known != plain).any(axis=2)
    height, width = changed.shape
    assert changed[:, : width // 2].any() and not changed[:, width // 2 :].any()
    assert not changed[int(0.35 * height) : int(0.45 * height), int(0.1 * width) : int(0.35 * width)].any()


@pytest.mark.parametrize(
    ("code", "seen"),
    [("RAS", "LPS"), ("LPS", "LPS"), ("LAS", "LPS"), ("ALI", "LPI"), ("RSA", "LIA"), ("SPL", "PIL")],
)
def test_slices_are_turned_as_radiologists_look_at_them(code, seen, tmp_path):
    """Axial, coronal and sagittal ones; SimpleITK turns the same array."""
    volume, grid = np.random.default_rng(0).random((5, 6, 7), np.float32), {"spacing": (1.0, 2.0, 3.0)}
    array, geometry = turned(volume, {**DEFAULT_GEOMETRY, **grid}, code)
    write_case(tmp_path / "a.h5", array, None, **geometry)
    turn, orientation = viewing_turn(Case("a", tmp_path / "a.h5", labeled=False))
    expected, there = turned(array, geometry, seen)
    assert orientation == seen and np.array_equal(turn(array), expected)
    assert turn.geometry(geometry, array.shape)["spacing"] == there["spacing"]
    letters = edge_letters(orientation)
    assert (letters["left"], letters["top"]) == {"LP": ("R", "A"), "LI": ("R", "S"), "PI": ("A", "S")}[seen[:2]]
    write_case(tmp_path / "a.h5", array, None)
    assert viewing_turn(Case("a", tmp_path / "a.h5", labeled=False)) == (Turn(), None)


def test_training_and_figures_take_them_from_the_case_and_turn_its_slices(tmp_path: Path, monkeypatch):
    """The first labeled and the first unlabeled case are one array; one is RAS, the other states nothing."""
    seen = []
    monkeypatch.setattr(slices, "slice_picture", lambda *args: seen.append(args) or np.zeros((4, 4, 3), np.uint8))
    folder = make_set(tmp_path / "set")
    with h5py.File(case_file(folder, "case00"), "a") as f, h5py.File(case_file(folder, "case04"), "a") as other:
        other["image"][...] = f["image"][()]
        f.attrs["direction"] = (-1.0, 0, 0, 0, -1, 0, 0, 0, 1)
        del other.attrs["direction"]
        image, label = f["image"][()], f["label"][()]
    argv = ["--data", str(folder), *TINY, "--iterations", "1", "--picture-every", "1", "--runs", str(tmp_path)]
    train_dtml.main([*argv, "--method", "dtc", "--name", "run"])
    (ras, *_, code), (stored, *_, unknown) = seen
    assert (code, unknown) == ("LPS", None) and np.array_equal(ras, stored[::-1, ::-1])

    rows, compared = [], []
    monkeypatch.setattr(pictures, "draw_maps", lambda drawn, _: rows.extend(drawn))
    monkeypatch.setattr(pictures, "maps_of_slice", lambda _, scan, z, *more: {"q": scan[..., z]})
    pictures.figure2([str(tmp_path / "run")], pictures.Options(cases=["case00", "case08"]))
    assert [row.orientation for row in rows] == ["LPS", "LPS"]
    z = int((label > 0).sum(axis=(0, 1)).argmax())
    x, y = around(label[::-1, ::-1, z] > 0)
    assert np.array_equal(rows[0].image, image[::-1, ::-1, z][x, y]) and np.array_equal(
        rows[0].maps["q"], rows[0].image
    )
    assert np.array_equal(rows[0].label, label[::-1, ::-1, z][x, y])

    monkeypatch.setattr(pictures, "read_scores", lambda _: [{"output": "seg"}])
    monkeypatch.setattr(pictures, "read_prediction", lambda *_: label)
    monkeypatch.setattr(pictures, "draw_comparison", lambda cases, *_: compared.extend(cases))
    pictures.figure3([str(tmp_path / "run")], pictures.Options(cases=["case00"], data=str(folder), titles=["run"]))
    (case,) = compared
    assert np.array_equal(case.image, image[::-1, ::-1]) and np.array_equal(case.label, label[::-1, ::-1])
    assert np.array_equal(case.predictions["run"][0], case.label) and case.orientation == "LPS"
