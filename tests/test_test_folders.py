"""The folder that a test writes, and the set that it reads; what stays behind where a program ends in the middle."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import TINY, load, saved_mask, score

import test_la
import train_dtml
from evaluation.predictions import PARTIAL, replace_test
from evaluation.sliding_window import predict_scan
from utils.errors import UserError

CASES = ("case08", "case09")


def test_a_set_on_another_grid_than_the_training_is_warned_of(trained, tmp_path, capsys):
    shutil.copytree(trained.parent / "set", tmp_path / "set")
    score(trained, tmp_path / "out", "--data", str(tmp_path / "set"), "--output", "seg")
    assert "A network sees" not in capsys.readouterr().err
    for case in CASES:
        with h5py.File(tmp_path / "set" / case / "mri_norm2.h5", "r+") as f:
            f.attrs["spacing"] = (1.0, 1.0, 1.0)
            f.attrs["direction"] = (0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
    score(trained, tmp_path / "out", "--data", str(tmp_path / "set"), "--output", "seg")
    axes = "has axes that point to PLI, while those of the training point to LPS"
    voxels = "voxels of 1 x 1 x 1 mm, the training of 1 x 1 x 2 mm. A network sees"
    assert f"warning: {tmp_path / 'set'} {axes}; and {voxels}" in capsys.readouterr().err


def test_a_test_on_another_set_leaves_that_on_the_own_one(trained, tmp_path):
    small = ["--checkpoint", str(trained), "--stride", "16", "16", "16", "--output", "seg", "--save", "none"]
    for name, prefix in (("moved", "case"), ("elsewhere", "scan")):
        folder = shutil.copytree(trained.parent / "set", tmp_path / name)
        for path in folder.glob("case*"):
            path.rename(folder / path.name.replace("case", prefix))
        for path in folder.glob("*.list"):
            path.write_text(path.read_text().replace("case", prefix))
    run = shutil.copytree(trained, tmp_path / "run")
    small[1] = str(run)
    for name, written in (("moved", "test"), ("elsewhere", "test-elsewhere")):
        shutil.rmtree(run / "test", ignore_errors=True)
        test_la.main([*small, "--data", str(tmp_path / name)])
        assert [path.parent.name for path in run.glob("*/cases.csv")] == [written]


def test_a_set_whose_other_scans_have_the_names_of_the_own_ones_is_another(trained, tmp_path):
    small = ["--stride", "16", "16", "16", "--output", "seg", "--save", "none"]
    for name in ("moved", "turned", "elsewhere"):
        shutil.copytree(trained.parent / "set", tmp_path / name)
    for name in ("turned", "elsewhere"):
        for i, path in enumerate(sorted((tmp_path / name).glob("case*/*.h5"))):
            with h5py.File(path, "r+") as f:
                image = f["image"][()]
                noise = np.random.default_rng(100 + i).standard_normal(image.shape)
                f["image"][...] = 2 * image[::-1] + 1 if name == "turned" else noise
    run = shutil.copytree(trained, tmp_path / "run")
    for name, written in (("moved", "test"), ("elsewhere", "test-elsewhere"), ("turned", "test")):
        shutil.rmtree(run / "test", ignore_errors=True)
        shutil.rmtree(run / "test-elsewhere", ignore_errors=True)
        test_la.main(["--checkpoint", str(run), *small, "--data", str(tmp_path / name)])
        assert [path.parent.name for path in run.glob("*/cases.csv")] == [written]
    for path in (tmp_path / "elsewhere").glob("case0[0-7]/*.h5"):  # nothing to tell by
        path.unlink()
    test_la.main(["--checkpoint", str(run), *small, "--data", str(tmp_path / "elsewhere")])
    assert (run / "test" / "cases.csv").is_file() and not (run / "test-elsewhere").exists()


def test_axes_that_only_the_set_or_only_the_training_states_are_warned_of(trained, tmp_path, capsys):
    shutil.copytree(trained.parent / "set", tmp_path / "set")
    state = load(trained)
    torch.save({**state, "orientation": None}, tmp_path / "last.pt")
    args = ["--data", str(tmp_path / "set"), "--output", "seg"]
    score(tmp_path / "last.pt", tmp_path / "out", *args)
    assert "has axes that point to LPS, while those of the training are not stated. A" in capsys.readouterr().err
    for n, text in ((1, "axes that point to LPS or are not stated"), (2, "axes that are not stated")):
        for case in CASES[:n]:
            with h5py.File(tmp_path / "set" / case / "mri_norm2.h5", "r+") as f:
                f.attrs.pop("direction", None)
        score(trained, tmp_path / "out", *args)
        assert f"has {text}, while those of the training point to LPS. A" in capsys.readouterr().err


def test_classes_with_other_numbers_than_in_the_training_are_refused(trained, tmp_path):
    shutil.copytree(trained.parent / "set", tmp_path / "set")
    state = load(trained)
    torch.save({**state, "class_names": {"1": "aorta", "2": "vein"}}, tmp_path / "last.pt")
    args = ["--data", str(tmp_path / "set"), "--output", "seg"]
    for name in ("Aorta", "vessel"):  # another way to write it, or another word
        (tmp_path / "set" / "dataset.json").write_text(json.dumps({"labels": {"1": name}}))
        score(tmp_path / "last.pt", tmp_path / "out", *args)
    (tmp_path / "set" / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "Vein": 1}}))
    with pytest.raises(UserError, match=r"set and .*last.pt number the classes .*: Vein is class 1 and class 2\."):
        score(tmp_path / "last.pt", tmp_path / "out", *args)


def test_two_tests_at_the_same_time_do_not_mix_their_files(trained, tmp_path, monkeypatch):
    def predict(*args, **window):
        monkeypatch.undo()
        with pytest.raises(UserError, match=r"another test is writing to .*out\. Wait for it"):
            score(trained, tmp_path / "out", "--output", "sdm", "--save", "all")
        return predict_scan(*args, **window)

    monkeypatch.setattr(test_la, "predict_scan", predict)
    rows = score(trained, tmp_path / "out", "--output", "seg", "--save", "all")
    saved = {case: np.count_nonzero(saved_mask(tmp_path / "out", "seg", case)) for case in CASES}
    assert saved == {row["case"]: int(row["voxels"]) for row in rows if row["component"] == "all"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_of_an_earlier_test_in_the_folder_nothing_stays_and_nothing_else_goes(trained, tmp_path):
    """Other outputs, other scans, no report: what is there is what the last test alone would have written."""
    score(trained, tmp_path / "alone", "--output", "seg")
    score(trained, tmp_path / "out", "--scans", "test", "--report")
    mine = {"notes.txt": b"mine", "predictions/seg/mine.nii.gz": b"mine", "predictions/other/case08.nii.gz": b"mine"}
    for name, data in mine.items():
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_bytes(data)
    assert (tmp_path / "out" / "report.html").exists() and saved_mask(tmp_path / "out", "sdm", "case08").any()
    score(trained, tmp_path / "out", "--output", "seg")
    alone, files = files_of(tmp_path / "alone"), files_of(tmp_path / "out")
    assert set(files) == set(alone) | set(mine)
    for name in {**alone, **mine}:
        if name.endswith((".csv", ".md")) or name in mine:
            assert files[name] == {**alone, **mine}[name], name
    np.testing.assert_array_equal(*(saved_mask(tmp_path / n, "seg", "case08") for n in ("alone", "out")))
    score(trained, tmp_path / "out", "--save", "none")
    assert set(files_of(tmp_path / "out")) == {"cases.csv", "table.md", "test.json", *mine}


def test_a_test_that_ends_early_leaves_the_one_before_as_it_was(trained, tmp_path, monkeypatch):
    score(trained, tmp_path / "out", "--report")
    before = files_of(tmp_path / "out")
    real, calls = predict_scan, []

    def interrupted(*args, **more):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return torch.ones_like(real(*args, **more))

    monkeypatch.setattr(test_la, "predict_scan", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score(trained, tmp_path / "out", "--workers", "1")
    assert files_of(tmp_path / "out") == before


# -- ended in the middle --


class Killed(BaseException):
    """In place of a signal that no code sees."""


def test_a_wrong_option_seen_in_the_first_iteration_leaves_no_run_folder(data, tmp_path, monkeypatch):
    """One crop whose deepest map is one voxel. An older folder stays, and so does that of a later failure."""
    method = ["--method", "supervised", "--unlabeled", "0", "--iterations", "3", "--log-every", "9"]
    flags = ["--data", str(data), "--runs", str(tmp_path), *TINY, *method]
    with pytest.raises(UserError, match="batch norm needs more than one voxel"):
        train_dtml.main([*flags, "--name", "new", "--batch-size", "1"])
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with pytest.raises(UserError, match="batch norm needs more than one voxel"):
        train_dtml.main([*flags, "--name", "old", "--batch-size", "1"])
    assert (tmp_path / "old" / "log.txt").is_file()

    def fails(iteration, o, real=train_dtml.current_lr):
        if iteration == 2:
            raise UserError("later")
        return real(iteration, o)

    monkeypatch.setattr(train_dtml, "current_lr", fails)
    with pytest.raises(UserError, match="later"):
        train_dtml.main([*flags, "--name", "later"])
    assert (tmp_path / "later" / "log.txt").is_file()


def prepared(test: Path, outputs: Sequence[str], cases: Sequence[str]) -> set[str]:
    """Files of a finished test in test/.partial; returns where its predictions belong."""
    names = {f"predictions/{output}/{case}.nii.gz" for output in outputs for case in cases}
    rows = [f"{case},{output},all,0.5" for output in outputs for case in cases]
    scores = "\n".join(["case,output,component,dice", *rows])
    texts = {**dict.fromkeys(names, ""), "cases.csv": scores, "test.json": ""}
    for name, text in texts.items():
        path = test / PARTIAL / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return names


@pytest.mark.parametrize("step", range(1, 12))
def test_a_test_killed_while_it_replaces_another_leaves_nothing_for_the_next(step, tmp_path, monkeypatch):
    """Four predictions and two files are deleted, two looked for, three moved. Those of the first test that are left
    would stand next to the scores of the third."""
    prepared(tmp_path, ["seg", "sdm"], ["a", "b"])
    replace_test(tmp_path)
    prepared(tmp_path, ["seg"], ["a"])
    steps = []

    def counted(real):
        def called(*args, **more):
            steps.append(args)
            if len(steps) == step:
                raise Killed
            return real(*args, **more)

        return called

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", counted(Path.unlink))
        patched.setattr(os, "replace", counted(os.replace))
        with pytest.raises(Killed):
            replace_test(tmp_path)
    expected = prepared(tmp_path, ["seg"], ["a"])
    replace_test(tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.nii.gz")} == expected
