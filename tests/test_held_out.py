"""Choices are made on training scans that a run left unused, never on those of test.list."""

import csv
import json
import shutil

import pytest
from conftest import TINY, make_set

import test_la
import train_dtml
from utils.errors import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """4 of 8 scans labeled, 2 unlabeled: the last two of train.list are left."""
    folder = tmp_path_factory.mktemp("held-out")
    data = str(make_set(folder / "set", labeled=8))
    words = ["--data", data, "--runs", str(folder), *TINY, "--iterations", "2"]
    train_dtml.main([*words, "--unlabeled", "2", "--name", "run"])
    train_dtml.main([*words, "--name", "all"])
    return folder


def test_held_out_scans_are_those_of_train_list_that_the_run_did_not_see(trained):
    seen = json.loads((trained / "run" / "manifest.json").read_text())["checksums"]
    test_la.main(["--checkpoint", str(trained / "run"), "--scans", "held-out", "--threads", "1"])
    with open(trained / "run" / "held-out" / "cases.csv", newline="") as f:
        names = list(dict.fromkeys(row["case"] for row in csv.DictReader(f)))
    train = (trained / "set" / "train.list").read_text().split()
    assert names == train[6:] and not set(names) & set(seen) and len(seen) == 6
    assert json.loads((trained / "run" / "held-out" / "test.json").read_text())["scans"] == "held-out"
    assert not (trained / "run" / "test").exists()


def test_a_run_that_used_every_scan_has_none(trained):
    with pytest.raises(UserError, match="--scans held-out: the training used all 8 scans"):
        test_la.main(["--checkpoint", str(trained / "all"), "--scans", "held-out", "--threads", "1"])


def test_a_list_in_another_order_brings_no_scan_of_the_training_back(trained, tmp_path):
    shutil.copytree(trained / "set", tmp_path / "set")
    lines = (tmp_path / "set" / "train.list").read_text().split()
    (tmp_path / "set" / "train.list").write_text("\n".join(lines[::-1]) + "\n")
    words = ["--checkpoint", str(trained / "run"), "--data", str(tmp_path / "set"), "--out", str(tmp_path / "out")]
    test_la.main([*words, "--scans", "held-out", "--threads", "1"])
    with open(tmp_path / "out" / "cases.csv", newline="") as f:
        assert {row["case"] for row in csv.DictReader(f)} == set(lines[6:])


@pytest.mark.parametrize("place", [0, 5], ids=["labeled", "unlabeled"])
def test_a_scan_of_the_training_is_not_tested_under_another_name(trained, tmp_path, place):
    shutil.copytree(trained / "set", tmp_path / "set")
    seen = (tmp_path / "set" / "train.list").read_text().split()[place]
    shutil.copytree(tmp_path / "set" / seen, tmp_path / "set" / "twin")
    with open(tmp_path / "set" / "test.list", "a") as f:
        f.write("twin\n")
    words = ["--checkpoint", str(trained / "run"), "--data", str(tmp_path / "set"), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"twin: .*is a scan that this checkpoint was trained on"):
        test_la.main([*words, "--threads", "1"])
    assert not (tmp_path / "out").exists()


def test_bare_weights_have_none():
    with pytest.raises(UserError, match="bare weights do not tell"):
        test_la.main(["--checkpoint", "x.pth", "--method", "dtc", "--scans", "held-out"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sdm-of", "scan"], "--sdm-of does nothing here"),
        (["--optimizer", "adamw", "--momentum", "0.5"], "--momentum does nothing with --optimizer adamw"),
        (["--lr-schedule", "cosine", "--lr-steps", "2"], "--lr-steps does nothing"),
        (["--lr-schedule", "cosine", "--lr-gamma", "0.5"], "--lr-gamma does nothing"),
        (["--mix", "1", "--unlabeled", "0"], "needs unlabeled scans"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(words, message, trained):
    argv = ["--data", str(trained / "set"), "--runs", str(trained), *TINY, "--iterations", "2", *words]
    with pytest.raises(UserError, match=message):
        train_dtml.main(argv)
