"""The runs that tools.reproduce makes: once each, past failures and signals, as jobs, equal to those made by hand."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TINY
from records import cells, here, options_of, write_record, write_run

import test_la
import train_dtml
from tools import make_runs, reproduce, runs
from tools.grid import LA_RUNS, Row
from utils.errors import UserError, run
from utils.run_lock import inherited_lock

__all__ = ["here"]  # a fixture

# runs, with stand-ins for the two scripts

TRAIN = """
import os, shutil, signal, sys, time
from pathlib import Path
here, value = Path(__file__).parent, lambda flag: sys.argv[sys.argv.index(flag) + 1]
folder = Path(value("--runs")) / value("--name")
with open(here / "calls", "a") as calls:
    calls.write(f"{folder.name}\\n")
plan = here / f"plan-{folder.name}"
words = plan.read_text().split() if plan.exists() else []
shutil.copytree(here / folder.name, folder, dirs_exist_ok=True)
(folder / "last.pt").touch()
if words and words[0] == "exit":
    sys.exit(int(words[1]))
if words:  # a signal to the parent, or none; then save at the first signal
    got = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: got.append(number))
    plan.unlink()
    (here / "ready").touch()
    for word in words[1:]:
        before = len(got)
        os.kill(os.getppid(), int(word))
        while len(got) == before:
            time.sleep(0.01)
    while not got:
        time.sleep(0.01)
    (here / "saved").write_text(" ".join(map(str, map(int, got))))
    sys.exit(128 + got[0])
"""
TEST = """
import sys
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--checkpoint") + 1])
with open(Path(__file__).parent / "calls", "a") as calls:
    calls.write(f"test {folder.name}\\n")
"""


@pytest.fixture
def stage(here, monkeypatch):
    """Scripts that copy finished runs into place; plan(name, words) sets what a training does in place of that."""
    scripts = here / "scripts"
    scripts.mkdir()
    (here / "data" / "la").mkdir(parents=True)
    (scripts / "train_dtml.py").write_text(TRAIN)
    (scripts / "test_la.py").write_text(TEST)
    for key in ("supervised-16", "dtml-16"):
        for seed in (1337, 1338):
            options = options_of([*LA_RUNS[key].split(), "--profile", "half", "--seed", str(seed)])
            write_run(scripts / f"{key}-seed{seed}", options, [(0.8, 1), (0.9, 2)])
    monkeypatch.setattr(make_runs, "ROOT", scripts)

    def missing(*more):
        rows = ["--table", "3", "--rows", "supervised-16", "dtml-16", "--seeds", "1337", "1338"]
        return run(lambda: reproduce.main(["--profile", "half", *rows, "--missing", *more]))

    return SimpleNamespace(
        missing=missing,
        scripts=scripts,
        plan=lambda name, args: (scripts / f"plan-{name}").write_text(args),
        calls=lambda: (scripts / "calls").read_text().splitlines() if (scripts / "calls").exists() else [],
        records=lambda: sorted(path.name for path in (here / "results").rglob("[!.]*-seed*")),
    )


ALL = [f"{key}-seed{seed}" for seed in (1337, 1338) for key in ("supervised-16", "dtml-16")]


def test_missing_runs_are_made_seed_by_seed_and_once(stage, here, capfd):
    write_record("dtml-16", 1337, [(0.1, 1), (0.1, 2)])
    stage.missing("--threads", "1")
    out, err = capfd.readouterr()
    names = [name for name in ALL if name != "dtml-16-seed1337"]
    assert stage.calls() == [line for name in names for line in (name, f"test {name}")]
    assert stage.records() == sorted(ALL) and "+ python train_dtml.py --method supervised" in err
    made = here / "results" / "half" / "dtml-16-seed1338"
    assert sorted(path.name for path in made.iterdir()) == [
        "cases.csv", "manifest.json", "options.txt", "scalars.csv", "table.md", "test.json",
    ]  # fmt: skip
    assert cells(out, "V-Net")[1][3] == "85.00" and cells(out, "DTML")[1][7] == "2: 1337, 1338"
    assert not [path for path in made.parent.iterdir() if path.name.startswith(".")]
    stage.missing()
    assert len(stage.calls()) == 6


def test_a_failed_run_is_named_and_the_others_go_on(stage, capfd):
    stage.plan("supervised-16-seed1337", "exit 3")
    stage.plan("dtml-16-seed1338", "exit 2")
    with pytest.raises(SystemExit) as left:
        stage.missing()
    out, err = capfd.readouterr()
    assert left.value.code == 1 and stage.records() == ["dtml-16-seed1337", "supervised-16-seed1338"]
    end = err.split("failed:\n")[-1]
    assert "supervised-16-seed1337: train_dtml.py left with exit code 3 (diverged)" in end
    assert "dtml-16-seed1338: train_dtml.py left with exit code 2" in end and cells(out, "DTML")[1][7] == "1: 1337"


@pytest.mark.parametrize(
    ("signals", "code", "text"), [("15", 143, "the same command goes on"), ("2 2", 130, "stopped: Ctrl-C")]
)
def test_signals_are_handed_on_and_end_all(stage, signals, code, text, capfd):
    stage.plan("dtml-16-seed1337", f"signal {signals}")
    with pytest.raises(SystemExit) as left:
        stage.missing()
    assert left.value.code == code and (stage.scripts / "saved").read_text().startswith(signals)
    assert stage.records() == ["supervised-16-seed1337"] and text in capfd.readouterr().err
    stage.missing()
    assert stage.records() == sorted(ALL)


def test_a_run_that_another_process_is_at_is_left_to_it(stage, here, capfd):
    folder = here / "runs" / "reproduce" / "half"
    folder.mkdir(parents=True)
    unfinished = here / "results" / "half" / ".dtml-16-seed1337.partial"
    unfinished.mkdir(parents=True)
    with inherited_lock(folder / ".dtml-16-seed1337.lock"), pytest.raises(SystemExit, match="1"):
        stage.missing()
    assert "dtml-16-seed1337: another process is at it" in capfd.readouterr().err
    assert stage.records() == sorted(set(ALL) - {"dtml-16-seed1337"}) and unfinished.exists()


# jobs


def test_slurm_jobs_are_submitted_and_not_waited_for(stage, here, monkeypatch, capfd):
    write_record("dtml-16", 1337, [(0.1, 1), (0.1, 2)])
    with pytest.raises(UserError, match="srun"):
        reproduce.main(["--profile", "half", "--rows", "dtml", "--submit", "slurm"])
    for name in ("srun", "sbatch"):
        (here / name).write_text('#!/bin/sh\ncat "$1" >> batch\necho Submitted batch job 4$(grep -c shebang batch)\n')
        (here / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{here}{os.pathsep}{os.environ['PATH']}")
    args = ["--profile", "half", "--table", "1", "--rows", "dtml-16", "--submit", "slurm", "--slurm"]
    with pytest.raises(UserError, match="gpu_per_node"):
        reproduce.main([*args, "gpu_per_node=1"])
    reproduce.main([*args, "gpus_per_node=1", "slurm_partition=long"])
    out = capfd.readouterr().out
    assert [line.split(": ")[1] for line in out.splitlines()] == ["dtml-16-seed1338", "dtml-16-seed1339"]
    batch = (here / "batch").read_text()
    args = ["--profile", "half", "--table", "beyond", "--rows", "beyond-paper", "beyond-flips", "--seeds", "1337"]
    reproduce.main([*args, "--submit", "slurm", "--slurm", "gpus_per_node=1"])
    out = capfd.readouterr().out
    assert [line.split(": ")[1] for line in out.splitlines()] == ["beyond-paper-seed1337 beyond-flips-seed1337"]
    assert "--gpus-per-node=1" in batch and "--partition=long" in batch and "--time=1440" in batch
    assert stage.calls() == [] and stage.records() == ["dtml-16-seed1337"]


# the real thing


def test_a_job_makes_all_runs_of_its_folder(monkeypatch):
    monkeypatch.setattr(make_runs, "make", lambda this, stop: {"a": "", "b": "broken", "c": "worse"}[this])
    assert make_runs.Job(["a", "b", "a", "c"])() == "broken; worse" and make_runs.Job(["a"])() == ""


@pytest.mark.slow
def test_a_run_cut_short_and_finished_by_a_job_equals_one_in_one_go(tiny_set, here, monkeypatch, capfd):
    flags = [*TINY, "--method", "supervised", "--batch-size", "2", "--iterations", "12", "--log-every", "1"]
    monkeypatch.setattr(runs, "LA_RUNS", {"supervised-4": " ".join(flags)})
    monkeypatch.setattr(runs, "LA_TABLES", {"3": ("Table 3", [Row("V-Net", "4 / 0", "supervised-4")])})
    args = ["--seeds", "7", "--data", str(tiny_set), "--threads", "1"]
    scalars = here / "runs" / "reproduce" / "full" / "supervised-4-seed7" / "scalars.csv"
    seen = SimpleNamespace(
        monotonic=lambda: 1e9 * (scalars.exists() and len(scalars.read_text().splitlines()) > 2), sleep=time.sleep
    )
    with monkeypatch.context() as patch:
        patch.setattr(make_runs, "time", seen)
        reproduce.main([*args, "--missing", "--budget", "1"])
    assert "not yet run" in capfd.readouterr().out and 2 < len(scalars.read_text().splitlines()) < 13
    reproduce.main([*args, "--list"])
    assert "7 started" in capfd.readouterr().out
    reproduce.main([*args, "--submit", "local"])
    assert cells(capfd.readouterr().out, "V-Net")[1][7] == "1: 7"

    train_dtml.main([*flags, "--seed", "7", "--data", str(tiny_set), "--runs", "whole", "--name", "run"])
    test_la.main(["--checkpoint", "whole/run"])
    record = here / "results" / "full" / "supervised-4-seed7"
    assert (record / "scalars.csv").read_text() == Path("whole/run/scalars.csv").read_text()
    assert (record / "cases.csv").read_text() == Path("whole/run/test/cases.csv").read_text()
    assert json.loads((record / "manifest.json").read_text())["resumed"]
