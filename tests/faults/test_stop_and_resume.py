"""A run that was stopped, killed or resumed equals one that was not, bit for bit."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, csv_rows, flat, load, make_set, method_words
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_dtml
from dataloaders import volumes
from dataloaders.two_stream import Patches
from methods import METHODS
from utils import checkpoint
from utils.devices import seed_iteration
from utils.errors import Stopped, UserError

N = 9
FLAGS = [*TINY, "--batch-size", "2", "--iterations", str(N), "--log-every", "1"]
# With 4 labeled cases an epoch is 4 iterations of DTML, 2 of the supervised method.
KINDS = {
    "dtml": [],
    "dtml, both losses": ["--sdm-loss", "both"],
    "supervised": method_words("supervised"),
    "mean-teacher": method_words("mean-teacher"),
    "ua-mt": [*method_words("ua-mt"), "--passes", "3"],
    "tcse": [*method_words("tcse"), "--scale", "0.2"],
    "double-unc": [*method_words("double-unc"), "--passes", "2"],
    "dtc": method_words("dtc"),
    "sassnet": method_words("sassnet"),
    "asdnet": [*method_words("asdnet"), "--critic-image"],
    "dk-uxnet": method_words("dk-uxnet"),
    "dtml, AdamW on UX-Net": ["--backbone", "uxnet", "--optimizer", "adamw", "--lr", "0.001"],
}

KINDS |= {m: method_words(m) for m in METHODS if not any(m in (kind.split(",")[0], *KINDS[kind]) for kind in KINDS)}
KINDS |= {kind: [*words, "--iterations", "6"] for kind, words in KINDS.items() if kind != "dtml"}


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """Kind -> the folder of its uninterrupted run, made once."""
    folders = {}

    def made(kind="dtml"):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("undisturbed") / "run"
            train(data, folders[kind], *KINDS[kind])
        return folders[kind]

    return made


@pytest.fixture(autouse=True)
def outside_handlers():
    """A signal that the training does not catch fails the test in place of ending the tests."""

    def uncaught(number, frame):
        pytest.fail(f"signal {number} was not caught by the training")

    before = {number: signal.signal(number, uncaught) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    assert [signal.getsignal(number) for number in before] == [uncaught] * 2, "the handlers were not put back"
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def after_step(monkeypatch):
    """Sets what happens after what every method does after each step; None: nothing more."""
    own = {kind: kind.after_step for kind in METHODS.values()}

    def set_hook(hook):
        for kind, real in own.items():

            def after(self, batch, iteration, real=real):
                real(self, batch, iteration)
                if hook:
                    hook(iteration)

            monkeypatch.setattr(kind, "after_step", after)

    return set_hook


def in_folder(folder):
    return ["--runs", str(folder.parent), "--name", folder.name]


def train(data, folder, *flags):
    train_dtml.main(["--data", str(data), *FLAGS, *in_folder(folder), *flags])


def signal_after(k, number=signal.SIGTERM):
    """Sends this process the signal when k iterations are done but for the saving."""
    return lambda iteration: os.kill(os.getpid(), number) if iteration + 1 == k else None


def assert_same_run(folder, expected):
    """Weights, batch-norm buffers, optimisers, data and curves are equal to the last bit, teachers and critics too."""
    a, b = load(folder), load(expected)
    for part in ("method", "optimizer", "iteration", "checksums"):
        ours, theirs = flat(a[part]), flat(b[part])
        assert list(ours) == list(theirs)
        assert [name for name in theirs if ours[name] != theirs[name]] == [], f"{part} differs"
    assert (folder / "scalars.csv").read_text() == (expected / "scalars.csv").read_text()


def iterations_of(folder):
    return [int(row["iteration"]) for row in csv_rows(folder / "scalars.csv")]


# After the first iteration, at the end of an epoch, within one.
@pytest.mark.parametrize(("kind", "k"), [("dtml", 1), ("dtml", 4), *((kind, 3) for kind in KINDS)])
def test_11_stopped_and_resumed_equals_undisturbed(kind, k, data, undisturbed, after_step, tmp_path):
    folder = tmp_path / "run"
    after_step(signal_after(k))
    with pytest.raises(Stopped) as stopped:
        train(data, folder, *KINDS[kind])
    assert stopped.value.exit_code == 143 and str(folder) in str(stopped.value)
    assert load(folder)["iteration"] == k and iterations_of(folder) == list(range(k))
    after_step(None)
    train_dtml.main(["--resume", str(folder)])
    assert_same_run(folder, undisturbed(kind))
    assert iterations_of(folder) == list(range(N if kind == "dtml" else 6))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_12_workers_and_cache_may_change_at_the_resume(data, undisturbed, after_step, tmp_path):
    before, after = ["--workers", "2", "--cache", "none"], ["--workers", "3", "--cache", "ram"]
    folder, kind = tmp_path / "run", "dtml, both losses"
    after_step(signal_after(3))
    with pytest.raises(Stopped):
        train(data, folder, *KINDS[kind], *before)
    after_step(None)
    train_dtml.main(["--resume", str(folder), *after])
    assert_same_run(folder, undisturbed(kind))


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

    def signalled(*words):
        calls.append(words)
        if len(calls) == 2:
            kill_myself(number)
        return real(*words)

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
    monkeypatch.setattr(volumes, "check_all", lambda *words: kill_myself(number))
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


def test_42_a_run_that_moved_to_another_computer_with_another_clock_goes_on(
    data, undisturbed, after_step, tmp_path, monkeypatch
):
    after_step(signal_after(4))
    with pytest.raises(Stopped):
        train(data, tmp_path / "run")
    after_step(None)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").rename(tmp_path / "elsewhere" / "moved")
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    real = time.time
    monkeypatch.setattr("time.time", lambda: real() - 1e6)
    train_dtml.main(["--resume", str(tmp_path / "elsewhere" / "moved")])
    assert_same_run(tmp_path / "elsewhere" / "moved", undisturbed())


def crash_after(k):
    def crash(iteration):
        if iteration + 1 == k:
            raise ZeroDivisionError

    return crash


def test_11_tensorboard_and_scalars_csv_of_a_resumed_run_have_each_iteration_once_and_count_alike(
    data, after_step, tmp_path
):
    every = 2
    words = ["--save-every", "4", "--picture-every", "4", "--log-every", str(every)]
    after_step(crash_after(7))
    with pytest.raises(ZeroDivisionError):
        train(data, tmp_path / "run", *words)
    after_step(None)
    train(data, tmp_path / "run", *words, "--resume", "auto")
    board = EventAccumulator(str(tmp_path / "run")).Reload()
    rows = csv_rows(tmp_path / "run" / "scalars.csv")
    expected = sorted({*range(every - 1, N, every), N - 1})
    assert [int(row["iteration"]) for row in rows] == expected
    for tag in set(rows[0]) - {"iteration"}:
        points = {event.step: event.value for event in board.Scalars(tag)}
        assert list(points) == expected, tag
        assert list(points.values()) == pytest.approx([float(row[tag]) for row in rows], rel=1e-5, abs=1e-7)
    assert [event.step for event in board.Images("labeled")] == [3, 7, 8]  # the last iterations before each


def test_11_dropout_differs_between_iterations_seeds_and_ranks():
    def mask(*key):
        torch.rand(3)
        seed_iteration(*key)
        return torch.nn.functional.dropout(torch.ones(64)).tolist()

    keys = [(1337, 0, 0), (1337, 1, 0), (1338, 0, 0), (1337, 0, 1)]
    masks = [mask(*key) for key in keys]
    assert len({tuple(m) for m in masks}) == len(keys)
    assert masks == [mask(*key) for key in keys]


@pytest.mark.parametrize("source, done", [("", 6), ("last.pt", 6), ("previous.pt", 4)])
def test_11_any_checkpoint_of_a_run_resumes_it(source, done, data, undisturbed, after_step, tmp_path):
    after_step(signal_after(6))
    with pytest.raises(Stopped):
        train(data, tmp_path / "run", "--save-every", "4")
    assert load(tmp_path / "run" / (source or "last.pt"))["iteration"] == done
    seen = []
    after_step(seen.append)
    train_dtml.main(["--resume", str(tmp_path / "run" / source)])
    assert seen == list(range(done, N))
    assert_same_run(tmp_path / "run", undisturbed())


def test_14_resume_auto_starts_again_what_ended_before_its_first_checkpoint(data, undisturbed, after_step, tmp_path):
    after_step(crash_after(3))
    with pytest.raises(ZeroDivisionError):
        train(data, tmp_path / "run", "--resume", "auto")
    after_step(None)
    train(data, tmp_path / "run", "--resume", "auto")
    assert_same_run(tmp_path / "run", undisturbed())


# A process of its own: real signals, its workers, kill -9.

DRIVER = """
import sys, time
from pathlib import Path
import train_dtml
from methods import METHODS
from utils.errors import run

place, at = Path(__file__).parent, int(sys.argv.pop(1))

def pause(self, batch, iteration):
    if iteration == at:
        (place / "ready").touch()
        while not (place / "go").exists():
            time.sleep(0.01)

METHODS["dtml"].after_step = pause
run(train_dtml.main)
"""


class Paused:
    """A training process, halted after the step of iteration `at`, in a process group of its own."""

    def __init__(self, data, place, at, *flags):
        self.place = place
        (place / "driver.py").write_text(DRIVER)
        words = ["--data", str(data), *FLAGS, *in_folder(place / "run"), *flags]
        self.process = subprocess.Popen(
            [sys.executable, "driver.py", str(at), *words],
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        patience = time.monotonic() + 300
        while not (place / "ready").exists():
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < patience, "the training did not begin"
            time.sleep(0.02)

    def go(self):
        """Lets it run on, and waits for the end of it and of its workers -> exit code, stderr."""
        (self.place / "go").touch()
        return self.end()

    def end(self):
        try:
            # Workers share stderr, which therefore ends with the last of them.
            _, err = self.process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            pytest.fail("the training or one of its workers did not end")
        return self.process.returncode, err


@pytest.mark.slow
def test_15_a_signalled_process_saves_and_leaves_no_worker(data, undisturbed, tmp_path):
    """Ctrl-C in a terminal reaches its workers too."""
    paused = Paused(data, tmp_path, 4, "--workers", "2")
    os.killpg(paused.process.pid, signal.SIGINT)
    assert paused.process.poll() is None
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


def test_42_a_set_that_moved_is_found_again_and_another_one_is_refused(data, undisturbed, after_step, tmp_path):
    """The path of the data may change between two parts of a run, the volumes may not."""
    folder = tmp_path / "run"
    after_step(lambda iteration: os.kill(os.getpid(), signal.SIGTERM) if iteration == 3 else None)
    with pytest.raises(Stopped):
        train(data, folder)
    after_step(None)
    other = make_set(tmp_path / "other", shape=(24, 22, 20))
    with pytest.raises(UserError, match="not those"):
        train_dtml.main(["--resume", str(folder), "--data", str(other)])
    moved = make_set(tmp_path / "moved")
    train_dtml.main(["--resume", str(folder), "--data", str(moved)])
    assert flat(load(folder)["method"]) == flat(load(undisturbed())["method"])
