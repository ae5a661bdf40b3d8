"""The phantom set: what its volumes hold, how it lies on disk, and that it appears whole or not at all."""

import h5py
import numpy as np
import pytest
from scipy import ndimage

from dataloaders import phantom as module
from dataloaders.phantom import case_shape, make_phantom_set, phantom, threshold_dice
from utils.errors import UserError

SEED = 2021
TEST_INDICES = range(40, 44)


@pytest.fixture(scope="module")
def cases():
    return [phantom(SEED, index, case_shape(SEED, index)) for index in TEST_INDICES]


def test_is_a_function_of_its_arguments(cases):
    shape = case_shape(SEED, 40)
    np.random.seed(7)
    image, label = phantom(SEED, 40, shape)
    assert np.array_equal(image, cases[0][0]) and np.array_equal(label, cases[0][1])
    for other in (phantom(SEED, 41, shape), phantom(SEED + 1, 40, shape)):
        assert not np.array_equal(image, other[0]) and not np.array_equal(label, other[1])


def test_case_shapes_vary_within_their_range():
    shapes = np.array([case_shape(SEED, index) for index in range(60)])
    assert (shapes.min(0) >= (72, 64, 40)).all() and (shapes.max(0) <= (88, 80, 48)).all()
    assert all(len(np.unique(shapes[:, axis])) > 4 for axis in range(3))


def test_an_image_is_z_scored_and_its_label_one_atrium_clear_of_the_border(cases):
    for index, (image, label) in zip(TEST_INDICES, cases, strict=True):
        assert image.dtype == np.float32 and np.isfinite(image).all()
        assert abs(image.mean(dtype=np.float64)) < 1e-4 and abs(image.std(dtype=np.float64) - 1) < 1e-4
        assert label.dtype == np.uint8 and label.shape == image.shape == case_shape(SEED, index)
        assert set(np.unique(label)) == {0, 1} and ndimage.label(label)[1] == 1 and 0.06 <= label.mean() <= 0.14
        assert label[1:-1, 1:-1, 1:-1].sum() == label.sum()


@pytest.mark.parametrize("largest_component", [False, True])
def test_no_threshold_segments_the_set(cases, largest_component):
    assert 0.2 < threshold_dice(cases, largest_component) < 0.65


def test_set_lies_as_la_does(tmp_path):
    folder = tmp_path / "data" / "phantom"
    make_phantom_set(folder, seed=5, train=2, test=1)
    assert (folder / "train.list").read_text().split() == ["phantom_000", "phantom_001"]
    assert (folder / "test.list").read_text().split() == ["phantom_002"]
    for index in range(3):
        image, label = phantom(5, index, case_shape(5, index))
        with h5py.File(folder / f"phantom_{index:03d}" / "mri_norm2.h5") as file:
            assert file["image"].dtype == np.float32 and file["label"].dtype == np.uint8
            assert file["image"].compression == file["label"].compression == "gzip"
            assert np.array_equal(file["image"][:], image) and np.array_equal(file["label"][:], label)
            assert tuple(file.attrs["spacing"]) == (1.0, 1.0, 1.0)
    assert [path.name for path in folder.parent.iterdir()] == ["phantom"]


@pytest.mark.parametrize("args", [["--test", "0"], ["--seed", "-1"], ["--classes", "4"], ["--train", "x"]])
def test_numbers_that_make_no_set_are_refused(args, tmp_path):
    with pytest.raises(UserError, match=rf"{args[0]}: "):
        module.main([str(tmp_path / "set"), *args])
    assert not list(tmp_path.iterdir())


def test_a_set_that_is_there_is_kept_and_never_taken_for_another_one(tmp_path, capsys):
    made = [str(tmp_path / "set"), "--train", "1", "--test", "1", "--seed", "5", "--classes", "2"]
    module.main(made)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.h5")}
    for args in (made, made[:1], made[:3]):
        module.main(args)
    for flag, value in {"--train": "2", "--test": "2", "--seed": "6", "--classes": "1"}.items():
        with pytest.raises(UserError, match=rf"set is there already, made with another {flag}, and is kept"):
            module.main([*made, flag, value])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.h5")} == before


def test_interrupted_generation_leaves_nothing(tmp_path, monkeypatch):
    def fail_midway(seed, index, shape, classes):
        if index == 1:
            raise KeyboardInterrupt
        return phantom(seed, index, shape, classes)

    monkeypatch.setattr(module, "phantom", fail_midway)
    with pytest.raises(KeyboardInterrupt):
        make_phantom_set(tmp_path / "set", train=2, test=1)
    assert list(tmp_path.iterdir()) == []
