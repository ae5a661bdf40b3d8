"""A run that was stopped and resumed equals one that was not, bit for bit."""

import os
import shutil
import signal
import time

import pytest
import torch
from conftest import csv_rows, flat, load, make_set
from stopped_runs import KINDS, N, after_step, assert_same_run, outside_handlers, train, undisturbed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_dtml
from utils.devices import seed_iteration
from utils.errors import Stopped, UserError

__all__ = ["after_step", "outside_handlers", "undisturbed"]  # fixtures


def signal_after(k, number=signal.SIGTERM):
    """Sends this process the signal when k iterations are done but for the saving."""
    return lambda iteration: os.kill(os.getpid(), number) if iteration + 1 == k else None


def iterations_of(folder):
    return [int(row["iteration"]) for row in csv_rows(folder / "scalars.csv")]


@pytest.mark.parametrize("k", [1, 4, 3])  # after the first iteration, at the end of an epoch, within one
def test_11_stopped_and_resumed_equals_undisturbed(k, data, undisturbed, after_step, tmp_path):
    folder = tmp_path / "run"
    after_step(signal_after(k))
    with pytest.raises(Stopped) as stopped:
        train(data, folder)
    assert stopped.value.exit_code == 143 and str(folder) in str(stopped.value)
    assert load(folder)["iteration"] == k and iterations_of(folder) == list(range(k))
    after_step(None)
    train_dtml.main(["--resume", str(folder)])
    assert_same_run(folder, undisturbed())
    assert iterations_of(folder) == list(range(N))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dtml"])
def test_11_every_method_goes_on_from_a_checkpoint_to_the_same_end(kind, undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed(kind), tmp_path / "run")
    (folder / "previous.pt").replace(folder / "last.pt")
    assert load(folder)["iteration"] == 2
    train_dtml.main(["--resume", str(folder)])
    assert_same_run(folder, undisturbed(kind))


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
    args = ["--save-every", "4", "--picture-every", "4", "--log-every", str(every)]
    after_step(crash_after(7))
    with pytest.raises(ZeroDivisionError):
        train(data, tmp_path / "run", *args)
    after_step(None)
    train(data, tmp_path / "run", *args, "--resume", "auto")
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


def test_42_a_set_that_moved_is_found_again_and_another_one_is_refused(data, undisturbed, after_step, tmp_path):
    """The path of the data may change between two parts of a run, the volumes may not."""
    folder = tmp_path / "run"
    after_step(lambda iteration: os.kill(os.getpid(), signal.SIGTERM) if iteration == 3 else None)
    with pytest.raises(Stopped):
        train(data, folder)
    after_step(None)
    other = make_set(tmp_path / "other", shape=(24, 22, 20))
    with pytest.raises(UserError, match=f"not those.* start a new run from its weights with --init {folder}"):
        train_dtml.main(["--resume", str(folder), "--data", str(other)])
    moved = make_set(tmp_path / "moved")
    train_dtml.main(["--resume", str(folder), "--data", str(moved)])
    assert flat(load(folder)["method"]) == flat(load(undisturbed())["method"])
