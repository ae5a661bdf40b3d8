"""One folder, one run: a second process is refused, and the lock of one that was killed is recognised."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import TINY, flat, load

import train_dtml
from methods import METHODS
from utils.errors import UserError
from utils.run_lock import LOCK, _birth, inherited_lock, refuse_locked, run_lock

N = 6


def train(data, folder, *flags):
    argv = ["--data", str(data), *TINY, "--batch-size", "2", "--iterations", str(N), "--save-every", "1"]
    train_dtml.main([*argv, "--runs", str(folder.parent), "--name", folder.name, *flags])


def forked(function, *argv):
    """Calls the function in a process of its own, as fast as a fork."""
    process = multiprocessing.get_context("fork").Process(target=function, args=argv)
    process.start()
    return process


def wait_for(condition):
    patience = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < patience, "it did not come about"
        time.sleep(0.01)


def owner(**changes):
    """The text of a lock held by this very process, but for what is changed."""
    me = {"pid": os.getpid(), "born": re.split(r"\) ", open("/proc/self/stat").read())[1].split()[19], "job": ""}
    return json.dumps({**me, "host": os.uname().nodename, **changes})


def paused_training(data, folder, at):
    """Trains, and stands still inside iteration `at`."""

    def wait(self, batch, iteration):
        while iteration == at:
            time.sleep(0.01)

    METHODS["dtml"].after_step = wait
    train(data, folder)


def test_41_a_second_run_in_the_folder_is_refused_and_disturbs_nothing(data, tmp_path):
    folder = tmp_path / "run"
    first = forked(paused_training, data, folder, 3)
    try:
        wait_for(lambda: (folder / "last.pt").exists() and load(folder)["iteration"] == 3)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        for flags in (["--resume", "auto"], ["--fresh"], [], ["--resume", str(folder)]):
            with pytest.raises(
                UserError, match=rf"process {first.pid} on {os.uname().nodename} is training in {folder}"
            ):
                train(data, folder, *flags)
        assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    finally:
        first.kill()
        first.join()


def test_41_the_lock_of_a_killed_run_is_taken_over_with_what_it_left_half_written(data, tmp_path, capsys):
    folder = tmp_path / "run"
    first = forked(paused_training, data, folder, 3)
    wait_for(lambda: (folder / "last.pt").exists() and load(folder)["iteration"] == 3)
    first.kill()
    first.join()
    assert (folder / LOCK).exists()
    (folder / ".last.pt.1.partial").write_bytes(b"half")
    train(data, folder, "--resume", "auto")
    assert f"process {first.pid} was killed while it trained in {folder}. Its lock" in capsys.readouterr().err
    train(data, tmp_path / "undisturbed")
    assert flat(load(folder)["method"]) == flat(load(tmp_path / "undisturbed")["method"])
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("end", ["done", "an error", "a signal"])
def test_41_a_run_that_ends_takes_its_lock_away(end, data, tmp_path, monkeypatch):
    def after_step(self, batch, iteration):
        assert (tmp_path / "run" / LOCK).exists()
        if iteration == 2 and end == "an error":
            raise ZeroDivisionError
        if iteration == 2 and end == "a signal":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(METHODS["dtml"], "after_step", after_step)
    try:
        train(data, tmp_path / "run")
    except Exception:
        assert end != "done"
    assert (tmp_path / "run" / "last.pt").exists() and not (tmp_path / "run" / LOCK).exists()


LIVING = {
    "this very process": {},
    "another computer's": {"host": "elsewhere", "pid": 1},
    "another process of this job": {"pid": os.getppid(), "born": _birth(os.getppid()), "job": "77"},
}
GONE = {
    "a dead process": {"pid": 2**22 - 1},  # as many as there can be
    "a number given anew": {"born": "1"},
    "a job before it was queued again": {"host": "elsewhere", "pid": 1, "job": "77"},
}


@pytest.mark.parametrize("kind", LIVING)
def test_41_a_lock_that_may_be_alive_is_respected(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    text = owner(**LIVING[kind])
    (tmp_path / LOCK).write_text(text)
    for ask in (lambda: refuse_locked(tmp_path), lambda: run_lock(tmp_path).__enter__()):
        with pytest.raises(UserError, match=rf"{json.loads(text)['host']} is training in .* delete .*{LOCK}"):
            ask()
    assert (tmp_path / LOCK).read_text() == text


@pytest.mark.parametrize("kind", GONE)
def test_41_a_stale_lock_is_recognised(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    (tmp_path / LOCK).write_text(owner(**GONE[kind]))
    refuse_locked(tmp_path)
    with run_lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        assert "was killed while it trained" in capsys.readouterr().err
    assert not (tmp_path / LOCK).exists()


def take_turns(folder, count, log):
    for _ in range(count):
        try:
            with run_lock(folder):
                os.write(log, b"(")
                time.sleep(0.001)
                os.write(log, b")")
        except UserError:
            time.sleep(0.0005)


def test_41_of_many_processes_one_holds_the_lock_at_a_time(tmp_path):
    log = os.open(tmp_path / "log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    crowd = [forked(take_turns, tmp_path, 100, log) for _ in range(6)]
    for process in crowd:
        process.join(60)
    text = (tmp_path / "log").read_bytes()
    assert [process.exitcode for process in crowd] == [0] * 6
    assert text == b"()" * (len(text) // 2) and len(text) > 100


def hold_with_a_child(path):
    """Takes the lock, and ends after a child was started that holds it for longer."""
    with inherited_lock(path) as lock:
        argv = ["sh", "-c", f"echo $$ > {path}.pid; exec sleep 60"]
        subprocess.Popen(argv, pass_fds=[lock.fileno()])
        wait_for(lambda: Path(f"{path}.pid").exists() and Path(f"{path}.pid").read_text().strip())
        os.kill(os.getpid(), signal.SIGKILL)


def test_41_a_child_that_survives_a_killed_parent_still_holds_the_inherited_lock(tmp_path):
    path = tmp_path / "lock"
    parent = forked(hold_with_a_child, path)
    parent.join(60)
    child = int(Path(f"{path}.pid").read_text())
    with inherited_lock(path) as lock:
        assert parent.exitcode == -signal.SIGKILL and lock is None
    os.kill(child, signal.SIGKILL)

    def is_free():
        with inherited_lock(path) as lock:
            return lock is not None

    wait_for(is_free)


def test_41_a_run_that_another_process_went_on_with_meanwhile_starts_again(data, tmp_path, monkeypatch):
    """It has read its checkpoint, and before it locks the folder another process trains there to the end."""
    real = train_dtml.make_run_folder

    def slow(folder, *, fresh):
        monkeypatch.setattr(train_dtml, "make_run_folder", real)
        train(data, tmp_path / "run", "--resume", "auto")
        real(folder, fresh=fresh)

    for _ in range(2):  # without a checkpoint, then with one
        monkeypatch.setattr(train_dtml, "make_run_folder", slow)
        with pytest.raises(UserError, match="another process trained"):
            train(data, tmp_path / "run", "--resume", "auto")
        assert load(tmp_path / "run")["iteration"] == N
        (tmp_path / "run" / "previous.pt").replace(tmp_path / "run" / "last.pt")
