"""Choices are made on training scans that a run left unused, never on those of test.list."""

import json
import shutil

import numpy as np
import pytest
from conftest import TINY, csv_rows, make_set, write_case

import test_la
import train_dtml
from dataloaders.cases import Case, case_file, read_case
from dataloaders.folds import split_fold
from tools import share
from tools.tested_scans import chosen_cases
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """4 of 8 scans labeled, 2 unlabeled: the last two of train.list are left."""
    folder = tmp_path_factory.mktemp("held-out")
    data = str(make_set(folder / "set", labeled=8))
    args = ["--data", data, "--runs", str(folder), *TINY, "--iterations", "2"]
    train_dtml.main([*args, "--unlabeled", "2", "--name", "run"])
    train_dtml.main([*args, "--name", "all"])
    return folder


def test_held_out_scans_are_those_of_train_list_that_the_run_did_not_see(trained):
    seen = json.loads((trained / "run" / "manifest.json").read_text())["checksums"]
    test_la.main(["--checkpoint", str(trained / "run"), "--scans", "held-out", "--threads", "1"])
    names = list(dict.fromkeys(row["case"] for row in csv_rows(trained / "run" / "held-out" / "cases.csv")))
    train = (trained / "set" / "train.list").read_text().split()
    assert names == train[6:] and not set(names) & set(seen) and len(seen) == 6
    told = json.loads((trained / "run" / "held-out" / "test.json").read_text())
    assert (told["scans"], told["patch_size"]) == ("held-out", [16, 16, 16])
    assert told["stride"] == [16, 16, 4], "the papers' 18 18 4 is too wide for a patch of 16"
    assert not (trained / "run" / "test").exists()


def test_scans_that_best_was_chosen_on_are_not_held_out(trained):
    """As of a run with --fold 1/2: of its labeled scans those of the fold were validated on."""
    state, folder = load_checkpoint(trained / "run"), trained / "set"
    train = (folder / "train.list").read_text().split()
    fold = split_fold(train[:4], "1/2", {})[1]
    state["checksums"] = {name: mark for name, mark in state["checksums"].items() if name not in fold}
    state["options"]["fold"] = "1/2"
    assert set(chosen_cases(folder, "held-out", [], state)) == {*fold, *train[6:]}  # without validation
    state["best"] = {"iteration": 1, "dice": 0.5, "scans": fold}
    assert chosen_cases(folder, "held-out", [], state) == train[6:]
    assert chosen_cases(folder, "validation", [], state) == fold
    with pytest.raises(UserError, match=rf"  {fold[0]} is in its fold: --scans validation has it\."):
        chosen_cases(folder, "held-out", fold[:1], state)


def test_a_run_that_used_every_scan_has_none(trained):
    with pytest.raises(UserError, match="--scans held-out: the training used all 8 scans"):
        test_la.main(["--checkpoint", str(trained / "all"), "--scans", "held-out", "--threads", "1"])


def test_a_list_in_another_order_brings_no_scan_of_the_training_back(trained, tmp_path):
    shutil.copytree(trained / "set", tmp_path / "set")
    lines = (tmp_path / "set" / "train.list").read_text().split()
    (tmp_path / "set" / "train.list").write_text("\n".join(lines[::-1]) + "\n")
    args = ["--checkpoint", str(trained / "run"), "--data", str(tmp_path / "set"), "--out", str(tmp_path / "out")]
    test_la.main([*args, "--scans", "held-out", "--threads", "1"])
    assert {row["case"] for row in csv_rows(tmp_path / "out" / "cases.csv")} == set(lines[6:])


def voxel(array):
    """The array with one voxel changed, 0 and 1 exchanged."""
    array = array.copy()
    array[3, 4, 5] = 1 - array[3, 4, 5]
    return array


CHANGED = {
    "a voxel of the label": lambda image, label: (image, voxel(label)),
    "another label": lambda image, label: (image, 1 - label),
    "float64": lambda image, label: (image.astype(np.float64), voxel(label)),
    "float16": lambda image, label: (image.astype(np.float16), voxel(label)),
    "a voxel of the image": lambda image, label: (voxel(image), voxel(label)),
    "turned": lambda image, label: (image[::-1].transpose(2, 0, 1), voxel(label)[::-1].transpose(2, 0, 1)),
    "scaled": lambda image, label: (40 * image + 200, voxel(label)),
    "nothing": lambda image, label: (image, label),
}


def put(data, name, image, label):
    """A set of which one training case's image and label are also a test case, called twin."""
    write_case(data / "twin" / "mri_norm2.h5", image, label)
    (data / "test.list").write_text((data / "test.list").read_text() + "twin\n")


@pytest.mark.parametrize(("how", "place"), [(how, (0, 5)[i % 2]) for i, how in enumerate(CHANGED)])
def test_a_scan_of_the_training_is_known_by_its_image(trained, tmp_path, how, place):
    """Whatever became of its label, or of the file that the image stands in."""
    shutil.copytree(trained / "set", tmp_path / "set")
    name = (tmp_path / "set" / "train.list").read_text().split()[place]
    put(tmp_path / "set", name, *CHANGED[how](*read_case(Case(name, case_file(tmp_path / "set", name), True))))
    args = ["--checkpoint", str(trained / "run"), "--data", str(tmp_path / "set"), "--out", str(tmp_path / "out")]
    message = rf"^1 case is(?s:.*)twin: .*is a scan of the training, there called {name}"
    with pytest.raises(UserError, match=message):
        test_la.main([*args, "--threads", "1"])
    assert not (tmp_path / "out").exists()


def test_images_are_kept_where_the_volumes_are_not_decoded_again(trained, tmp_path):
    """The checkpoint of a run that found its cases in the cache knows their images too; so do shared weights."""
    args = ["--data", str(trained / "set"), "--cache", "disk", "--cache-folder", str(tmp_path / "cache"), *TINY]
    for name in ("first", "second"):
        train_dtml.main([*args, "--runs", str(tmp_path), "--unlabeled", "2", "--name", name, "--iterations", "1"])
    share.main([str(tmp_path / "second"), str(tmp_path / "weights")])
    expected = load_checkpoint(trained / "run")["images"]
    assert len(expected) == 6
    for name in ("first", "second", "weights"):
        assert load_checkpoint(tmp_path / name)["images"] == expected


def test_an_early_checkpoint_still_refuses_the_very_scan(trained, tmp_path):
    """It holds no fingerprint of its images, but digests of image and label together."""
    shutil.copytree(trained / "set", tmp_path / "set")
    state = load_checkpoint(trained / "run")
    early = {key: value for key, value in state.items() if key not in ("images", "file", "saved", "format")}
    save_checkpoint(tmp_path, early)
    args = ["--checkpoint", str(tmp_path), "--data", str(tmp_path / "set"), "--out", str(tmp_path / "out")]
    test_la.main([*args, "--threads", "1"])
    name = (tmp_path / "set" / "train.list").read_text().split()[0]
    put(tmp_path / "set", name, *read_case(Case(name, case_file(tmp_path / "set", name), True)))
    with pytest.raises(UserError, match=rf"twin: .*is a scan of the training, there called {name}"):
        test_la.main([*args, "--threads", "1"])
