"""Validation while a run trains: the curve, best.pt, resuming, and what is refused."""

import json
import math
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import TINY, csv_rows, flat, load, make_validated_set, write_case
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import predict
import test_la
import train_dtml
from dataloaders.cases import Case, read_case
from utils.errors import UserError

# Enough for balls, and validated between two points of the log too.
FLAGS = [*TINY, "--iterations", "30", "--lr", "0.1", "--lr-steps", "--k", "10", "--filters", "4", "--log-every", "4",
         "--device", "cpu"]  # fmt: skip
VALIDATION = ["case10", "case11", "case12"]
SHORT = [*TINY, "--iterations", "6", "--log-every", "2", "--save-every", "4", "--validate-every", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `set`, and of it the runs `plain` and `validated`, which differ in --validate-every alone."""
    folder = tmp_path_factory.mktemp("validation")
    args = ["--data", str(make_validated_set(folder / "set")), "--runs", str(folder), *FLAGS]
    train_dtml.main([*args, "--name", "plain"])
    train_dtml.main([*args, "--name", "validated", "--validate-every", "10"])
    return folder


def scalars(run: Path) -> list[dict[str, str]]:
    return csv_rows(run / "scalars.csv")


def rows_of(out: Path, *args: str) -> list[dict[str, str]]:
    test_la.main([*args, "--stride", "8", "8", "8", "--threads", "1"])
    return csv_rows(out / "cases.csv")


def test_validating_changes_nothing_in_what_is_learned(folder):
    plain, validated = (load(folder / name / "last.pt") for name in ("plain", "validated"))
    for part in ("method", "optimizer", "checksums", "images"):
        assert flat(plain[part]) == flat(validated[part]), part
    assert set(validated) - set(plain) == {"best"}
    files = [{path.name for path in (folder / name).iterdir() if "tfevents" not in path.name}
             for name in ("plain", "validated")]  # fmt: skip
    assert files[1] - files[0] == {"best.pt"}


def test_the_curve_is_in_scalars_csv_and_in_tensorboard(folder):
    rows, usual = scalars(folder / "validated"), scalars(folder / "plain")
    curve = {int(row["iteration"]): float(row.pop("dice/validation")) for row in rows}
    assert [i for i, dice in curve.items() if not math.isnan(dice)] == [9, 19, 29]
    assert [row for row in rows if row["iteration"] != "9"] == usual  # the others are logged anyway
    events = EventAccumulator(str(folder / "validated")).Reload().Scalars("dice/validation")
    assert {event.step: pytest.approx(event.value, rel=1e-5) for event in events} == {i: curve[i] for i in (9, 19, 29)}


def test_best_is_the_highest_dice_which_the_test_script_finds_again(folder):
    run = folder / "validated"
    best = load(run / "best.pt")
    curve = {int(row["iteration"]) + 1: float(row["dice/validation"]) for row in scalars(run)}
    top = max((dice, i) for i, dice in curve.items() if not math.isnan(dice))
    assert best["iteration"] == top[1] == best["best"]["iteration"] == load(run / "last.pt")["best"]["iteration"]
    stated = json.loads((run / "manifest.json").read_text())["best"]
    assert best["best"] == {**stated, "scans": VALIDATION} and set(stated) == {"iteration", "dice"}
    rows = rows_of(run / "best-validation", "--checkpoint", str(run / "best.pt"), "--scans", "validation")
    rows = [row for row in rows if (row["output"], row["component"]) == ("seg", "all")]
    assert [row["case"] for row in rows] == VALIDATION
    assert np.mean([float(row["dice"]) for row in rows]) == pytest.approx(top[0], abs=2e-6) and top[0] > 0.5


def test_best_is_tested_and_predicted_with_and_called_finished(folder, tmp_path, capsys):
    run = folder / "validated"
    state = load(run / "best.pt")
    state["iteration"] = 20  # whichever it was
    torch.save(state, tmp_path / "best.pt")
    rows = rows_of(tmp_path / "best-test", "--checkpoint", str(tmp_path / "best.pt"))
    assert {row["case"] for row in rows} == {"case08", "case09"}
    scan = str(folder / "set" / "case08" / "mri_norm2.h5")
    predict.main(["--checkpoint", str(tmp_path / "best.pt"), scan, "-o", str(tmp_path / "out")])
    assert "not finished" not in capsys.readouterr().err
    (tmp_path / "best.pt").rename(tmp_path / "previous.pt")
    rows_of(tmp_path / "previous-test", "--checkpoint", str(tmp_path / "previous.pt"))  # not in place of last.pt's
    assert "not finished: 20 of 30" in capsys.readouterr().err
    torch.save(state, run / "finished-20.pt")
    with pytest.raises(UserError, match=r"is at iteration 20, and its run at 30, .*--init .*finished-20.pt for a new"):
        train_dtml.main(["--resume", str(run / "finished-20.pt")])
    (run / "finished-20.pt").unlink()


def test_each_class_has_a_curve_which_the_test_script_finds_again(folder, tmp_path):
    data = shutil.copytree(folder / "set", tmp_path / "set")
    for path in data.glob("*/mri_norm2.h5"):
        with h5py.File(path, "a") as f:
            if "label" in f:
                f["label"][:, :11] *= 2
    dataset = {"labels": {"background": 0, "left": 1, "right": 2}}
    (data / "dataset.json").write_text(json.dumps(dataset))
    args = ["--data", str(data), "--runs", str(tmp_path), "--name", "run", *FLAGS, "--classes", "2"]
    train_dtml.main([*args, "--validate-every", "30"])
    last = scalars(tmp_path / "run")[-1]
    rows = rows_of(tmp_path / "run" / "validation", "--checkpoint", str(tmp_path / "run"), "--scans", "validation")
    for name, c in (("", "mean"), ("_1", "1"), ("_2", "2")):
        dices = [float(row["dice"]) for row in rows
                 if (row["output"], row["component"], row["class"]) == ("seg", "all", c)]  # fmt: skip
        assert float(last[f"dice/validation{name}"]) == pytest.approx(np.nanmean(dices), abs=2e-6)
    assert re.search(r"Dice \d+\.\d\d % \(left .*, right .*\), 3 scans", (tmp_path / "run" / "log.txt").read_text())


def faked(monkeypatch: pytest.MonkeyPatch, *dices: float) -> None:
    values = iter(dices)
    monkeypatch.setattr(train_dtml, "validation_scores", lambda *args, **more: {"dice/validation": next(values)})


def test_a_resumed_run_keeps_the_best_of_before_and_ends_as_if_nothing_had_been(folder, tmp_path, monkeypatch):
    args = ["--data", str(folder / "set"), "--runs", str(tmp_path), *SHORT]
    faked(monkeypatch, 0.5, 0.3, 0.4)
    train_dtml.main([*args, "--name", "whole"])
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    (tmp_path / "stopped" / "previous.pt").replace(tmp_path / "stopped" / "last.pt")  # after 4 iterations
    faked(monkeypatch, 0.4)
    train_dtml.main(["--resume", str(tmp_path / "stopped")])
    whole, resumed = (load(tmp_path / name / "last.pt") for name in ("whole", "stopped"))
    assert resumed["best"] == whole["best"] == {"iteration": 2, "dice": 0.5, "scans": VALIDATION}
    for part in ("method", "optimizer", "best"):
        assert flat(whole[part]) == flat(resumed[part])
    for name in ("best.pt", "scalars.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


@pytest.mark.parametrize(("resumed", "best"), [([0.6], (4, 0.9)), ([0.95], (6, 0.95))])
def test_a_best_from_after_the_last_checkpoint_of_a_killed_run_is_the_best_so_far(
    resumed, best, folder, tmp_path, monkeypatch
):
    """It was saved between two checkpoints, and --validate-every may be another now."""
    args = ["--data", str(folder / "set"), "--runs", str(tmp_path), "--name", "run", *SHORT]
    faked(monkeypatch, 0.5, 0.9, 0.4)
    train_dtml.main([*args, "--save-every", "3"])
    run = tmp_path / "run"
    (run / "previous.pt").replace(run / "last.pt")
    state = load(run / "last.pt")
    assert (state["iteration"], state["best"]["iteration"], load(run / "best.pt")["iteration"]) == (3, 2, 4)
    faked(monkeypatch, *resumed)
    train_dtml.main(["--resume", str(run), "--validate-every", "6"])
    stated = json.loads((run / "manifest.json").read_text())["best"]
    assert stated == dict(zip(("iteration", "dice"), best, strict=True))
    assert load(run / "best.pt")["iteration"] == best[0] and load(run / "last.pt")["best"] == {
        **stated, "scans": VALIDATION
    }  # fmt: skip


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"no checkpoint")])
def test_a_best_that_is_gone_or_damaged_is_chosen_anew(spoil, folder, tmp_path, monkeypatch):
    args = ["--data", str(folder / "set"), "--runs", str(tmp_path), "--name", "run", *SHORT]
    faked(monkeypatch, 0.5, 0.3, 0.2)
    train_dtml.main(args)
    run = tmp_path / "run"
    (run / "previous.pt").replace(run / "last.pt")  # after 4 iterations
    spoil(run / "best.pt")
    faked(monkeypatch, 0.2)
    train_dtml.main(["--resume", str(run)])
    assert load(run / "best.pt")["best"] == {"iteration": 6, "dice": 0.2, "scans": VALIDATION}


def test_the_best_of_other_validation_scans_is_not_compared_with(folder, tmp_path, monkeypatch, capsys):
    data = shutil.copytree(folder / "set", tmp_path / "set")
    faked(monkeypatch, 0.5, 0.3, 0.4)
    train_dtml.main(["--data", str(data), "--runs", str(tmp_path), "--name", "run", *SHORT])
    (data / "validation.list").write_text("\n".join(VALIDATION[:2]) + "\n")
    (tmp_path / "run" / "previous.pt").replace(tmp_path / "run" / "last.pt")  # after 4 iterations
    faked(monkeypatch, 0.2)
    capsys.readouterr()
    train_dtml.main(["--resume", str(tmp_path / "run")])
    assert "after 2 iterations, was chosen on other validation scans" in capsys.readouterr().err
    best = {"iteration": 6, "dice": 0.2}
    assert load(tmp_path / "run" / "best.pt")["best"] == {**best, "scans": VALIDATION[:2]}
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["best"] == best


# -- what is refused --


def spoilt(data: Path, how: str) -> None:
    names = {"missing": None, "empty": "\n", "trained": "case10\ncase03\n", "tested": "case10\ncase09\n",
             "gone": "case10\nnobody\n"}  # fmt: skip
    if how in names:
        (data / "validation.list").unlink()
        if names[how] is not None:
            (data / "validation.list").write_text(names[how])
        return
    path = data / "case11" / "mri_norm2.h5"
    image, _ = read_case(Case("case11", path, True))
    if how == "unlabeled":
        write_case(path, image, None)
    else:  # an image of the training in another direction
        image, label = read_case(Case("case00", data / "case00" / "mri_norm2.h5", True))
        write_case(path, image[::-1], label[::-1])


REFUSED = {
    "missing": r"--validate-every: there is no .*validation\.list\. .*--validation-share.* LA has no validation set",
    "empty": r"the list .*validation\.list names no case",
    "trained": r"train\.list and .*validation\.list both name case03\. Keep each case in one list",
    "tested": r"test\.list and .*validation\.list both name case09\. Keep each case in one list",
    "gone": "nobody: listed, but there is no",
    "unlabeled": r"case11: .*is a labeled case without a dataset 'label'",
    "twin": r"case11: .*is a scan of the training, there called case00",
}


@pytest.mark.parametrize("how", REFUSED)
def test_lists_and_cases_that_cannot_be_validated_on_are_refused(how, tmp_path):
    data = make_validated_set(tmp_path / "set")
    spoilt(data, how)
    with pytest.raises(UserError, match=REFUSED[how]):
        train_dtml.main(["--data", str(data), "--runs", str(tmp_path / "runs"), "--name", "run", *SHORT])
    assert not (tmp_path / "runs").exists()
