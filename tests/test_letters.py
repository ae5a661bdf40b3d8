"""The letters of the patient's sides in pictures: where they point, and none where that is not known."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import TINY, make_set
from scans import OBLIQUE

import train_dtml
from dataloaders.cases import case_file
from dataloaders.orientation import orientation_of
from evaluation import slices
from evaluation.figures import ComparedCase, MapsRow, draw_comparison, draw_maps
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


def test_training_and_figures_take_them_from_the_case(tmp_path: Path, monkeypatch):
    seen = []
    monkeypatch.setattr(slices, "slice_picture", lambda *args: seen.append(args[-1]) or np.zeros((4, 4, 3), np.uint8))
    folder = make_set(tmp_path / "set")
    with h5py.File(case_file(folder, "case04"), "a") as f:  # the first unlabeled one
        del f.attrs["direction"]
    argv = ["--data", str(folder), *TINY, "--iterations", "1", "--picture-every", "1", "--runs", str(tmp_path)]
    train_dtml.main([*argv, "--method", "dtc", "--name", "run"])
    assert seen == ["LPS", None]
    rows = []
    monkeypatch.setattr(pictures, "draw_maps", rows.extend)
    pictures.figure2([str(tmp_path / "run")], pictures.Options(cases=["case00", "case08"]))
    assert [row.orientation for row in rows] == ["LPS", "LPS"]
