"""A run that is stopped by a signal or killed saves what it can, leaves no worker, and goes on to the same end."""

import multiprocessing
import os
import select
import signal
import sys
import time

import pytest
from conftest import load
from stopped_runs import FLAGS, N, after_step, assert_same_run, in_folder, outside_handlers, train, undisturbed

import train_dtml
from dataloaders import volumes
from dataloaders.two_stream import Patches
from methods import METHODS
from utils import checkpoint
from utils.errors import Stopped, run

__all__ = ["after_step", "outside_handlers", "undisturbed"]  # fixtures


def test_15_a_second_ctrl_c_quits_without_waiting_for_the_iteration(data, after_step, tmp_path):
    def twice(iteration):
        if iteration == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    after_step(twice)
    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path / "run", "--save-every", "1")
    assert load(tmp_path / "run")["iteration"] == 2


def kill_myself(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "place, number, code",
    [
        ("a picture is made", signal.SIGTERM, 143),
        ("a checkpoint is written", signal.SIGINT, 130),
        ("a crop is read", signal.SIGTERM, 143),
    ],
)
def test_16_a_signal_at_any_other_work_lets_it_finish_and_saves(
    place, number, code, data, undisturbed, tmp_path, monkeypatch
):
    owner, name = {
        "a picture is made": (train_dtml, "show"),
        "a checkpoint is written": (checkpoint, "_reads_back"),
        "a crop is read": (Patches, "__getitem__"),
    }[place]
    real, calls = getattr(owner, name), []

    def signalled(*args):
        calls.append(args)
        if len(calls) == 2:
            kill_myself(number)
        return real(*args)

    monkeypatch.setattr(owner, name, signalled)
    every = ["--picture-every", "3", "--save-every", "3"]
    with pytest.raises(Stopped) as stopped:
        train(data, tmp_path / "run", *every)
    assert stopped.value.exit_code == code
    monkeypatch.undo()
    done = load(tmp_path / "run")["iteration"]
    assert done == {"a crop is read": 1, "a picture is made": 6, "a checkpoint is written": 7}[place]
    assert len(list((tmp_path / "run" / "pictures").glob("*.png"))) == 2 * (done // 3)
    train(data, tmp_path / "run", *every, "--resume", "auto")
    assert_same_run(tmp_path / "run", undisturbed())


def test_16_a_signal_while_the_volumes_are_read_is_not_held_back_and_leaves_nothing(data, tmp_path, monkeypatch):
    """Nothing is done yet that could be saved, so the signal ends the process as it does any other."""
    number = signal.SIGTERM
    monkeypatch.setattr(volumes, "check_all", lambda *args: kill_myself(number))
    with pytest.raises(pytest.fail.Exception, match=f"signal {number.value} was not caught"):
        train(data, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_17_a_killed_worker_is_named_with_its_case_and_the_run_goes_on_from_its_checkpoint(
    data, undisturbed, tmp_path, monkeypatch
):
    real, victim = Patches.__getitem__, tmp_path / "victim"

    def struck(self, slot):
        if slot.step == 6 and slot.slot == 1:
            while not (tmp_path / "run" / "previous.pt").exists():  # workers read ahead of the training: until its
                time.sleep(0.01)  # second checkpoint is written, which iteration 6 cannot precede
            victim.write_text(self.volumes.cases[slot.case].name)
            kill_myself(signal.SIGKILL)
        return real(self, slot)

    monkeypatch.setattr(Patches, "__getitem__", struck)
    flags = ["--workers", "2", "--cache", "none", "--save-every", "2"]
    with pytest.raises(RuntimeError, match=r"data worker \d+ was killed while it read case0\d .*mri_norm2.h5") as error:
        train(data, tmp_path / "run", *flags)
    assert f"read {victim.read_text()} (" in str(error.value)
    assert load(tmp_path / "run")["iteration"] in (4, 6)
    monkeypatch.undo()
    train(data, tmp_path / "run", *flags, "--resume", "auto")
    assert_same_run(tmp_path / "run", undisturbed())


# A process of its own, forked as that takes no time: real signals, its workers, kill -9.


def program(place, at, stderr, argv):
    """As `python train_dtml.py` with these words, but that it halts after the step of iteration `at`."""
    os.setsid()
    os.dup2(stderr, 2)
    os.close(stderr)
    sys.stderr = open(2, "w", buffering=1, closefd=False)

    def pause(self, batch, iteration):
        if iteration == at:
            (place / "ready").touch()
            while not (place / "go").exists():
                time.sleep(0.01)

    METHODS["dtml"].after_step = pause
    run(lambda: train_dtml.main(argv))


class Paused:
    """A training process, halted after the step of iteration `at`, in a process group of its own."""

    def __init__(self, data, place, at, *flags):
        self.place = place
        self.stderr, theirs = os.pipe()
        argv = ["--data", str(data), *FLAGS, *in_folder(place / "run"), *flags]
        self.process = multiprocessing.get_context("fork").Process(target=program, args=(place, at, theirs, argv))
        self.process.start()
        os.close(theirs)
        patience = time.monotonic() + 300
        while not (place / "ready").exists():
            assert self.process.is_alive(), self.end()[1]
            assert time.monotonic() < patience, "the training did not begin"
            time.sleep(0.02)

    def go(self):
        """Lets it run on, and waits for the end of it and of its workers -> exit code, stderr."""
        (self.place / "go").touch()
        return self.end()

    def end(self):
        """Workers share stderr, which therefore ends with the last of them."""
        err, part = b"", b"begin"
        while part:
            if not select.select([self.stderr], [], [], 120)[0]:
                os.killpg(self.process.pid, signal.SIGKILL)
                pytest.fail("the training or one of its workers did not end")
            part = os.read(self.stderr, 2**16)
            err += part
        os.close(self.stderr)
        self.process.join()
        return self.process.exitcode, err.decode()


@pytest.mark.slow
def test_15_a_signalled_process_saves_and_leaves_no_worker(data, undisturbed, tmp_path):
    """Ctrl-C in a terminal reaches its workers too."""
    paused = Paused(data, tmp_path, 4, "--workers", "2")
    os.killpg(paused.process.pid, signal.SIGINT)
    assert paused.process.is_alive()
    returncode, err = paused.go()
    assert returncode == 130, err
    assert "Traceback" not in err and f"stopped: saved {tmp_path / 'run'} after 5 of {N}" in err
    assert load(tmp_path / "run")["iteration"] == 5
    train_dtml.main(["--resume", str(tmp_path / "run")])
    assert_same_run(tmp_path / "run", undisturbed())


@pytest.mark.slow
def test_15_a_killed_process_leaves_a_checkpoint_and_no_worker(data, undisturbed, tmp_path):
    paused = Paused(data, tmp_path, 5, "--workers", "2", "--save-every", "2")
    paused.process.kill()
    assert paused.end()[0] == -signal.SIGKILL
    assert load(tmp_path / "run")["iteration"] == 4
    train(data, tmp_path / "run", "--resume", "auto")
    assert_same_run(tmp_path / "run", undisturbed())
