"""Trains, tests and records the missing runs of tools/reproduce.py: one after the other, or as jobs of submitit."""

import dataclasses
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import submitit
import torch
from submitit.core.utils import UncompletedJobError

from dataloaders.cases import ROOT
from tools.runs import READ_ERRORS, TEST, Options, Run, mismatches, status_of
from utils.checkpoint import fsync, write_whole
from utils.errors import Stopped, StopSignal, UserError
from utils.run_folder import MANIFEST, OPTIONS, SCALARS
from utils.run_lock import inherited_lock


class OutOfTime(Exception):
    """The budget is used up."""


def call(command: list[str], lock: IO[str], stop: StopSignal, deadline: float) -> int:
    """Runs one of the scripts and returns its exit code. Passes a signal on to it, and SIGTERM at the deadline.

    Raises:
        Stopped, OutOfTime: after the script has saved and ended because of it.
    """

    def due() -> int:
        return stop.number or (signal.SIGTERM if time.monotonic() >= deadline else 0)

    sent, code = due(), 0
    if not sent:
        print(f"+ python {shlex.join(command)}", file=sys.stderr, flush=True)
        # A process group of its own, so that Ctrl-C reaches it once, from here. A cluster sends SIGUSR2 to everyone.
        child = subprocess.Popen(
            [sys.executable, str(ROOT / command[0]), *command[1:]], stdin=subprocess.DEVNULL, stdout=2, process_group=0,
            pass_fds=[lock.fileno()], preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
        )  # fmt: skip
        try:
            while child.poll() is None:
                if not sent and due():
                    sent = due()
                    child.send_signal(sent)
                time.sleep(0.1)
            code = child.returncode
        except KeyboardInterrupt:  # the second Ctrl-C
            child.send_signal(signal.SIGINT)
            raise
        finally:
            child.terminate()
            child.wait()
    if stop.number:
        raise Stopped(stop.number, "the same command goes on from here")
    if sent:
        raise OutOfTime
    return code


def record(run: Run) -> str:
    """Copies the files of a trained and tested run to its record, all or none. Returns why not, or ''."""
    partial = run.record.with_name(f".{run.record.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        trained, tested = (OPTIONS, MANIFEST, SCALARS), ("cases.csv", "table.md", TEST)
        for path in [*(run.folder / name for name in trained), *(run.tested / name for name in tested)]:
            write_whole(partial / path.name, path.read_bytes())
        problems = mismatches(run, partial)
        if not problems:
            partial.rename(run.record)
            fsync(run.record.parent)
        return "; ".join(problems)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def make(run: Run, stop: StopSignal, deadline: float = math.inf) -> str:
    """Trains, tests and records one run from its present state on. Returns the problem, or ''."""
    try:
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        with inherited_lock(run.folder.with_name(f".{run.folder.name}.lock")) as lock:
            if lock is None:
                return "another process is at it"
            status = status_of(run)
            if status == "done":
                return ""
            if status not in ("missing", "started"):
                return f"{run.record if run.record.exists() else run.folder} is not overwritten; {status}"
            for command in (run.train, run.test):
                code = call(command, lock, stop, deadline)
                if code:
                    return f"{command[0]} left with exit code {code}{' (diverged)' if code == 3 else ''}"
            return record(run)
    except READ_ERRORS as e:
        return f"cannot be recorded ({e})"


def make_missing(o: Options, runs: list[Run]) -> list[str]:
    """Makes one run after the other until the budget is used up. Returns a line for each run that failed."""
    deadline = time.monotonic() + 60 * o.budget if o.budget else math.inf
    failed = []
    with StopSignal() as stop:
        for run in runs:
            try:
                problem = "" if status_of(run) == "done" else make(run, stop, deadline)
            except OutOfTime:
                print(f"{o.budget:g} minutes are used up; the same command goes on from here.", file=sys.stderr)
                break
            if problem:
                failed.append(f"{run.record.name}: {problem}")
                print(f"failed: {failed[-1]}", file=sys.stderr)
    return failed


@dataclasses.dataclass(frozen=True)
class Job(submitit.helpers.Checkpointable):
    """A job of submitit: the runs of one folder. Queued again at its time limit, it goes on from the checkpoint."""

    runs: list[Run]

    def __call__(self) -> str:
        with StopSignal() as stop:
            return "; ".join(filter(None, (make(run, stop) for run in self.runs)))


def submit(o: Options, runs: list[Run]) -> list[str]:
    """Submits every missing run. Waits for local jobs and returns a line for each that failed."""
    settings: dict[str, Any] = {"name": "dtml", "timeout_min": 24 * 60}
    settings |= {"gpus_per_node": torch.cuda.device_count()} if o.submit == "local" else {}
    settings |= {
        key: int(value) if value.isdigit() else value
        for key, _, value in (setting.partition("=") for setting in o.slurm)
    }
    try:
        executor = submitit.AutoExecutor(folder=Path(o.runs) / "submitit", cluster=o.submit)
        executor.update_parameters(**settings)
    except (RuntimeError, NameError, AssertionError, ValueError, OSError) as e:
        raise UserError(f"--submit {o.submit} {shlex.join(o.slurm)}: {e} Fix --slurm, or use --missing.") from e
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # jobs import this code
    missing: dict[Path, list[Run]] = {}
    for run in runs:
        if status_of(run) != "done":
            missing.setdefault(run.folder, []).append(run)
    names = [" ".join(run.record.name for run in same_folder) for same_folder in missing.values()]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # so that at Ctrl-C submitit lets local jobs save
    jobs = [executor.submit(Job(same_folder)) for same_folder in missing.values()]
    signal.signal(signal.SIGINT, before)
    failed = []
    for name, job in zip(names, jobs, strict=True):
        print(f"job {job.job_id}: {name}", file=sys.stdout if o.submit == "slurm" else sys.stderr)
    for name, job in zip(names, jobs, strict=True) if o.submit == "local" else ():
        try:
            problem = job.result()
        except UncompletedJobError:
            problem = f"its job broke off, see {job.paths.stderr}"
        failed += [f"{name}: {problem}"] if problem else []
    return failed
