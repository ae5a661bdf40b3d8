"""What a run says of itself and, as `tools.check` does, of the scans that it reads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_check import change, log_of, volumes

import train_dtml
from methods.base import Losses
from utils import clock as clocks
from utils import report as reports
from utils.clock import Clock
from utils.errors import UserError
from utils.report import Report

SHORT = ["--iterations", "6", "--log-every", "2", "--save-every", "3"]
CLOCK = Clock(torch.device("cpu"))
LABEL = torch.zeros(2, 4, 4, 4)
LABEL[:, 0, 0] = 1  # 1/16 of it


def losses(live: float) -> Losses:
    one = torch.tensor(1.0)
    return Losses(one, {"mask": one}, {"lambda": 0.1}, {"live_gradient/sdm": torch.tensor(live)})


def test_an_output_without_a_live_gradient_is_warned_of_once(tmp_path, capsys):
    with Report(tmp_path, start=0, iterations=4, log_every=1) as report:
        for iteration, live in enumerate((0.01, 0.0, 0.0, 0.002)):
            report.iteration(iteration, losses(live), LABEL, lr=0.01, clock=CLOCK, memory=1.5)
    lines = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "warning" in line]
    assert len(lines) == 1 and "live_gradient/sdm is 0 at iteration 1" in lines[0]
    assert "live_gradient/sdm is 0" in capsys.readouterr().err


@pytest.mark.parametrize(("shares", "warned"), [([0.0, 0.9], True), ([0.2], True), ([0.18], False), ([0.0], False)])
def test_pseudo_labels_with_far_too_much_foreground_are_warned_of_once(shares, warned, tmp_path):
    """A few crops may differ by chance: the mean of ten logged iterations counts, without those before the start."""
    one = torch.tensor(1.0)
    with Report(tmp_path, start=0, iterations=40, log_every=1) as report:
        for iteration in range(40):
            monitors = {"pseudo/foreground": torch.tensor(shares[iteration % len(shares)])}
            report.iteration(iteration, Losses(one, {}, {}, monitors), LABEL, lr=0.01, clock=CLOCK, memory=1.5)
    lines = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "warning" in line]
    assert len(lines) == warned
    if warned:
        at = 10 * len(shares) - 1
        assert f"at iteration {at} the pseudo-labels are {max(shares):.0%} foreground, the labels 6%" in lines[0]


def test_only_every_nth_iteration_and_the_last_are_logged(tmp_path):
    with Report(tmp_path, start=0, iterations=7, log_every=3) as report:
        for iteration in range(7):
            report.iteration(iteration, losses(0.5), LABEL, lr=0.01, clock=CLOCK, memory=1.5)
    rows = (tmp_path / "scalars.csv").read_text().splitlines()
    assert rows[0] == "iteration,loss/total,loss/mask,lambda,lr,live_gradient/sdm"
    assert [row.split(",")[0] for row in rows[1:]] == ["2", "5", "6"]


@pytest.mark.parametrize(("threads", "used", "said"), [(4, 0.1, True), (4, 4.0, False), (1, 0.1, False)])
def test_threads_that_wait_for_cores_are_reported(threads, used, said, tmp_path, monkeypatch):
    """An iteration a second, in which the process computes for `used` seconds on all cores together."""
    monkeypatch.setattr(reports.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(reports.time, "process_time", lambda: used * seconds[0])
    monkeypatch.setattr(reports.torch, "get_num_threads", lambda: threads)
    seconds = [0.0]
    with Report(tmp_path, start=0, iterations=20, log_every=20) as report:
        for iteration in range(12):
            seconds[0] = float(iteration)
            report.iteration(iteration, losses(0.5), LABEL, lr=0.01, clock=CLOCK, memory=1.5)
    text = (tmp_path / "log.txt").read_text()
    assert "about 10 s left: 1 s an iteration" in text
    assert ("4 threads had 0.1 cores. If other programs run, --threads 1 may be faster." in text) == said


def test_the_clock_s_shares_are_those_of_the_time_between_laps(monkeypatch):
    times = iter([0.0, 1.0, 4.0, 5.0, 5.0, 7.0, 8.0, 9.0])
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: next(times))
    clock = Clock(torch.device("cpu"))
    for name in ("data", "forward", "data"):
        clock.lap(name)
    assert clock.shares() == {"data": 0.4, "forward": 0.6}
    for name in ("data", "forward"):
        clock.lap(name)
    assert clock.shares() == {"data": 0, "forward": 1}
    clock.lap("backward")
    assert (
        clock.all_shares() == {"data": 0.25, "forward": 0.625, "backward": 0.125} and sum(clock.seconds.values()) == 8
    )
    assert Clock(torch.device("cpu")).shares() == {}


def test_a_run_tells_where_its_time_went(tiny_set, tmp_path, capsys):
    train_dtml.main(["--data", str(tiny_set), "--runs", str(tmp_path), "--name", "run", *TINY, *SHORT])
    names = {"data", "forward", "backward", "step", "logging", "saving"}
    shares = json.loads((tmp_path / "run" / "manifest.json").read_text())["time_shares"]
    assert set(shares) == names and sum(shares.values()) == pytest.approx(1, abs=1e-3) and min(shares.values()) > 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("time:")]
    assert line in (tmp_path / "run" / "log.txt").read_text() and all(f"{name} " in line for name in names)
    curves = EventAccumulator(str(tmp_path / "run")).Reload()
    assert {tag for tag in curves.Tags()["scalars"] if tag.startswith("time/")} == {f"time/{name}" for name in names}
    for i, last in enumerate(curves.Scalars("time/forward")):
        assert last.step == min(2 * (i + 1), 6) - 1 and 0 < last.value < 1


# -- of the scans --


def test_training_tells_of_a_class_that_no_labeled_scan_has(tiny_set, tmp_path):
    for i in range(4):
        label = volumes(tiny_set, f"case{i:02d}")[1]
        change(tiny_set, f"case{i:02d}", label=np.where(label > 0, 3 if i else 1, 0).astype(np.uint8))
    text = (
        "no labeled training case has class 2, so that it cannot be learned. See --classes and the order of the list."
    )
    said = [f"warning: all cases: {text}"]
    assert log_of(tiny_set, tmp_path / "once", "--classes", "3", "--cache", "disk") == said
    change(tiny_set, "case03")  # alone read anew; the cache knows the others
    assert log_of(tiny_set, tmp_path / "again", "--classes", "3", "--cache", "disk") == said


def test_training_tells_what_it_sees_and_a_clean_set_is_silent(tiny_set, tmp_path, capsys):
    assert log_of(tiny_set, tmp_path / "clean") == []
    image, _ = volumes(tiny_set, "case01")
    change(tiny_set, "case06", image=image)
    change(tiny_set, "case02", label=np.zeros(image.shape, np.uint8))
    change(tiny_set, "case03", spacing=(1.0, 1.0, 3.0))
    change(tiny_set, "case05", image=900 * volumes(tiny_set, "case05")[0])
    (tiny_set / "case09" / "mri_norm2.h5").write_bytes(b"a test case is no business of training")
    capsys.readouterr()
    lines = log_of(tiny_set, tmp_path / "run", "--patch-size", "32", "16", "16")
    assert [next(word for word in ("normalised", "another size", "smaller", "empty", "same image") if word in line)
            for line in lines] == ["normalised", "another size", "smaller", "empty", "same image"]  # fmt: skip
    err = capsys.readouterr().err
    assert all(err.count(line) == 1 for line in lines)
    for name in ("made", "used"):  # the second does not read the files again, and says the same
        flags = ["--patch-size", "32", "16", "16", "--cache", "disk"]
        assert log_of(tiny_set, tmp_path / name, *flags) == lines


def test_a_resumed_run_refuses_cases_that_state_something_else(tiny_set, tmp_path):
    """The voxels are the same; spacing and direction go into the checkpoint, mean and sd into a window."""
    run, windowed = tmp_path / "run", tmp_path / "windowed"
    log_of(tiny_set, run)
    log_of(tiny_set, windowed, "--normalize", "window", "--window", "1", "4")

    def resume(folder: Path, iterations: int) -> None:
        train_dtml.main(["--resume", str(folder), "--iterations", str(iterations)])

    for stated in ({"spacing": (1.0, 1.0, 2.5)}, {"direction": (-1.0, 0, 0, 0, -1, 0, 0, 0, 1)}):
        change(tiny_set, "case01", **stated)
        with pytest.raises(UserError, match=r"^spacing, direction, mean or sd that the files of case01 in .*set state"):
            resume(run, 2)
    change(tiny_set, "case01", mean=0.5, sd=2.0)
    resume(run, 2)
    with pytest.raises(UserError, match="the files of case01 in"):
        resume(windowed, 2)
    state = load(windowed)
    del state["attributes"]  # an early checkpoint, which does not know them
    torch.save(state, windowed / "last.pt")
    resume(windowed, 2)
