"""What a run says at its start, a finished run that goes further, and flags and folders that belong elsewhere."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, csv_rows, load, make_set, write_case
from scans import make_scans
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

import predict
import train_dtml
from dataloaders.cases import LA_SUBFOLDER, Case
from dataloaders.lists import LA_SPLITS, read_list
from dataloaders.training import median_spacing
from evaluation.slices import LABEL, PREDICTION, panels
from losses.ramps import ramp_up
from methods import restore
from settings import Options
from tools import training_start
from tools.training_start import extension_note, header
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.report import duration

WORDS = [*TINY, "--device", "cpu", "--log-every", "1", "--lr-steps", "5", "10", "--sdm-loss", "mask"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of 12 iterations, finished, with what it said on stderr beside it."""
    folder = tmp_path_factory.mktemp("start")
    data = ["--data", str(make_set(folder / "set")), "--runs", str(folder)]
    train_dtml.main([*data, *WORDS, "--name", "run", "--iterations", "12", "--save-every", "6"])
    return folder / "run"


def rates(run: Path) -> dict[int, tuple[float, float]]:
    """Iteration -> learning rate and weight of the consistency."""
    return {int(row["iteration"]): (float(row["lr"]), float(row["lambda"])) for row in csv_rows(run / "scalars.csv")}


def test_the_log_begins_with_what_is_trained_and_says_how_long_it_will_take(run):
    lines = (run / "log.txt").read_text().splitlines()
    head = dict(line.split(maxsplit=1) for line in lines[:7])
    assert list(head) == ["run", "method", "data", "batch", "device", "precision", "iterations"]
    assert head["run"] == str(run) and head["precision"] == "fp32"
    weights = sum(p.numel() for p in restore(load_checkpoint(run)).parameters())
    assert head["method"] == f"dtml, preset paper, {weights:,} parameters"
    assert head["data"] == f"{run.parent / 'set'}: 4 labeled and 4 unlabeled scans"
    assert head["batch"] == "4 crops of 16x16x16 voxels, 2 of them labeled"
    assert head["device"] == "cpu, 1 thread (--device cpu)"
    assert head["iterations"] == "0 to 12, sgd, learning rate 0.01 at first"
    place = [i for i, line in enumerate(lines) if " left: " in line and "2 iterations to go" in line]
    assert len(place) == 1 and lines[place[0] + 1].startswith("10/12  ")


def test_the_batch_in_the_log_is_that_of_each_process(run, monkeypatch):
    o = Options(data="set", batch_size=6, patch_size=[32, 16, 16], downsample=2)
    t: Any = SimpleNamespace(o=o, folder=run, method=restore(load_checkpoint(run)), labeled=4, unlabeled=4,
                             validation=[], labeled_batch=2, start=0, class_names={})  # fmt: skip
    batches = []
    for ranks in (1, 2):
        monkeypatch.setattr(training_start, "RANKS", ranks)
        batches.append(header(t, "cpu", 0.01)[3].split(maxsplit=1)[1])
    crops = "6 crops of 32x16x16 voxels at 1/2 of the resolution, 2 of them labeled"
    assert batches == [crops, f"{crops}, in each of 2 processes"]


def test_times_are_written_as_people_say_them():
    assert [duration(s) for s in (3.4, 89, 90, 3600, 5460, 36000)] == [
        "3 s", "89 s", "2 min", "60 min", "1 h 31 min", "10 h 00 min"
    ]  # fmt: skip


def test_tensorboard_has_the_options_of_the_run_in_its_own_folder(run):
    events = EventAccumulator(str(run)).Reload()
    metadata = events.SummaryMetadata("_hparams_/session_start_info").plugin_data
    content = plugin_data_pb2.HParamsPluginData.FromString(metadata.content)
    result = content.session_start_info.hparams
    assert result["lr"].number_value == 0.01 and result["patch_size"].string_value == "[16, 16, 16]"
    assert result["method"].string_value == "dtml" and result["seed"].number_value == 1337
    assert not [path for path in run.iterdir() if path.is_dir()]  # no folder of its own


def test_a_finished_run_goes_further_with_the_schedules_of_the_longer_one(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    before = (copy / "last.pt").read_bytes()
    capsys.readouterr()
    train_dtml.main(["--resume", str(copy), "--iterations", "16", "--lr-steps", "14", "--save-every", "2"])
    said = capsys.readouterr().err
    assert "This run was finished after 12 iterations and goes on to 16" in said
    assert "the learning rate was 0.0001 at last and is 0.01 now" in said
    curve, first = rates(copy), rates(run)
    assert {i: curve[i] for i in range(12)} == first and sorted(curve) == list(range(16))
    for i in range(12, 16):
        assert curve[i] == pytest.approx((0.01 if i < 14 else 0.001, 0.1 * ramp_up(i, 16)), rel=1e-5)
    assert (copy / "finished-12.pt").read_bytes() == before
    last, manifest = load(copy / "last.pt"), json.loads((copy / "manifest.json").read_text())
    assert (last["iteration"], last["options"]["iterations"], last["extended"]) == (16, 16, [12])
    assert manifest["extended"] == [12] and manifest["options"]["iterations"] == 12
    # Stopped on its way and resumed without a word more, it ends the same.
    (copy / "previous.pt").replace(copy / "last.pt")
    assert load(copy / "last.pt")["iteration"] == 14
    train_dtml.main(["--resume", str(copy)])
    again = load(copy / "last.pt")
    assert again["extended"] == [12] and "goes on to" not in capsys.readouterr().err
    assert all(torch.equal(weight, again["method"][name]) for name, weight in last["method"].items())
    train_dtml.main(["--resume", str(copy)])
    assert "more --iterations goes on from there" in capsys.readouterr().err


def test_a_run_killed_before_its_new_end_does_not_state_the_time_of_the_old_one(run, tmp_path, monkeypatch):
    """Killed between its last checkpoint and its manifest; given again, it is done, with the time of all iterations."""
    copy = shutil.copytree(run, tmp_path / "run")
    old = json.loads((copy / "manifest.json").read_text())
    with monkeypatch.context() as killed:
        killed.setattr(train_dtml, "summarize", lambda *_: None)
        train_dtml.main(["--resume", str(copy), "--iterations", "16"])
    manifest = json.loads((copy / "manifest.json").read_text())
    assert set(old) - set(manifest) == {"wall_s", "iterations_per_s", "peak_memory_gib", "time_shares"}
    train_dtml.main(["--resume", str(copy)])
    manifest, seconds = json.loads((copy / "manifest.json").read_text()), load(copy / "last.pt")["seconds"]
    assert manifest["wall_s"] == round(seconds, 1) and manifest["iterations_per_s"] == round(16 / seconds, 4)


def test_steps_that_were_not_chosen_move_along(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    state = load(tmp_path / "run" / "last.pt")
    for saved, expected in (([5, 10], [8, 17]), ([3], [3])):  # 5/12 and 5/6 of 20
        state["options"]["lr_steps"] = saved
        torch.save(state, tmp_path / "run" / "last.pt")
        o = train_dtml.read_options(["--resume", str(tmp_path / "run"), "--iterations", "20"])[0]
        assert (o.iterations, o.lr_steps) == (20, expected)


def test_a_run_from_before_its_preset_set_batch_norm_says_that_it_goes_on_in_one_pass(run, tmp_path, capsys):
    words = ["--data", str(run.parent / "set"), "--runs", str(tmp_path), "--name", "run", *TINY, "--device", "cpu"]
    words += ["--preset", "tuned", "--iterations", "2", "--save-every", "1"]
    train_dtml.main([*words, "--batch-norm", "joint"])
    finished, state = (load(tmp_path / "run" / name) for name in ("last.pt", "previous.pt"))
    del state["options"]["batch_norm"]
    note = (
        "goes on as it began, with --batch-norm joint. A new one with --preset tuned would have --batch-norm separate"
    )
    for more, said in ([], True), (["--batch-norm", "joint"], False):
        torch.save(state, tmp_path / "run" / "last.pt")
        capsys.readouterr()
        train_dtml.main([*words, *more, "--resume", "auto"])
        assert (note in capsys.readouterr().err) == said
    assert (tmp_path / "run" / "log.txt").read_text().count(note) == 1
    again = load(tmp_path / "run")["method"]
    assert all(torch.equal(weight, finished["method"][name]) for name, weight in again.items())


def test_a_damaged_manifest_is_written_anew_by_a_resumed_run(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "previous.pt").replace(copy / "last.pt")
    (copy / "manifest.json").write_text("{")
    train_dtml.main(["--resume", str(copy)])
    again, first = (json.loads((path / "manifest.json").read_text()) for path in (copy, run))
    assert again.keys() == first.keys() and again["checksums"] == first["checksums"]


def test_an_unfinished_run_keeps_its_iterations_and_none_gets_fewer(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    with pytest.raises(UserError, match=r"--iterations: 12 before, 8 now"):
        train_dtml.main(["--resume", str(tmp_path / "run"), "--iterations", "8"])
    with pytest.raises(UserError, match=r"--lr: 0.01 before, 0.1 now"):
        train_dtml.main(["--resume", str(tmp_path / "run"), "--iterations", "20", "--lr", "0.1"])
    with pytest.raises(UserError, match=r"--lr-steps 20 never comes in --iterations 20"):
        train_dtml.main(["--resume", str(tmp_path / "run"), "--iterations", "20", "--lr-steps", "14", "20"])
    (tmp_path / "run" / "previous.pt").replace(tmp_path / "run" / "last.pt")
    with pytest.raises(UserError, match=r"12 before, 20 now\n  --iterations can be raised once the run is finished"):
        train_dtml.main(["--resume", str(tmp_path / "run"), "--iterations", "20"])


def test_predict_tells_flags_of_other_projects_apart():
    """The other scripts: faults/test_bad_input.py."""
    with pytest.raises(UserError, match=r"Here it is --out\."):
        predict.main(["--output-dir", "x"])


@pytest.mark.parametrize("where", ["", "images"])
def test_scans_that_were_not_converted_name_the_command_that_does_it(where, tmp_path):
    make_scans(tmp_path / "raw scans", labeled=1, unlabeled=0)
    with pytest.raises(UserError) as caught:
        train_dtml.main(["--data", str(tmp_path / "raw scans" / where), *TINY])
    assert f"python -m tools.convert --source '{tmp_path / 'raw scans'}' --out data/mine" in str(caught.value)
    assert "patient0.nii.gz and no converted data set" in str(caught.value)


def test_the_caption_of_a_narrow_picture_is_wrapped_and_not_cut_off():
    image = np.random.default_rng(0).random((32, 48))
    contours = {"prediction": (np.zeros((32, 48)), PREDICTION), "label": (np.zeros((32, 48)), LABEL)}
    for title in (
        "hippocampus_001, iteration 12",
        "a long name of a patient, of a scan and of a hospital, iteration 12000",
    ):
        picture = panels(image, {"p": image}, contours, title)
        dark = (picture < 128).all(axis=2)
        rows, columns = np.nonzero(dark[: len(picture) - 290])  # above the panels and their names
        assert rows.size > 300 and rows.min() > 0 and columns.max() < picture.shape[1] - 5


def test_a_checkpoint_tells_the_median_spacing_of_its_labeled_cases(tmp_path):
    cases = []
    for i, x in enumerate((0.5, 2.0, 0.7, 9.0)):
        path = tmp_path / f"c{i}.h5"
        write_case(path, np.random.random((4, 4, 4)), None, spacing=(x, 1.0, 2 * x))
        cases.append(Case(f"c{i}", path, labeled=i < 3))
    assert median_spacing(cases) == [0.7, 1.0, 1.4]
    write_case(tmp_path / "c1.h5", np.random.random((4, 4, 4)), None)
    assert median_spacing(cases) is None
    in_la = [dataclasses.replace(case, path=tmp_path / LA_SUBFOLDER / case.path.name) for case in cases]
    for case in in_la:
        write_case(case.path, np.random.random((4, 4, 4)), None)
    assert median_spacing(in_la) is None  # a folder's name declares nothing, the names of the published scans do
    names = read_list(LA_SPLITS / "train.list")
    published = [dataclasses.replace(c, name=n) for c, n in zip(in_la, names, strict=False)]
    assert median_spacing(published) == [0.625] * 3


def test_the_note_of_a_longer_run_says_when_unlabeled_scans_count_again():
    state = {"iteration": 100, "options": {"start": 0.12}}
    assert "Unlabeled scans count again from iteration 240 on (--start)." in extension_note(state, 2000, 0.1, 0.1)
    assert "count again" not in extension_note(state, 120, 0.1, 0.1)
    state["options"]["unlabeled"] = 0
    assert "count again" not in extension_note(state, 2000, 0.1, 0.1)
