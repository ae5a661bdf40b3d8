"""Saving survives kill -9 and full disks, and loading notices damage."""

import contextlib
import errno
import os
import random
import signal
import stat
import subprocess
import time
from collections import OrderedDict
from pathlib import Path

import h5py  # noqa: F401  (its C library must be loaded before a fork)
import pytest
import torch
from checkpoints import state, train
from conftest import load

from utils import checkpoint
from utils.checkpoint import LAST, PREVIOUS, load_checkpoint, save_checkpoint, write_whole
from utils.errors import UserError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Saving.


def test_01_a_whole_checkpoint_has_the_name_at_every_step_of_saving(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, state(0))
    save_checkpoint(tmp_path, state(1))
    steps = []

    def look(name):
        steps.append((name, load(tmp_path / LAST)["n"], load(tmp_path / PREVIOUS)["n"]))

    for name in ("fsync", "link", "replace"):
        real = getattr(os, name)

        def spied(*args, name=name, real=real):
            look(f"before {name}")
            real(*args)
            look(f"after {name}")

        monkeypatch.setattr(os, name, spied)
    save_checkpoint(tmp_path, state(2))
    numbers = [step[1:] for step in steps]
    assert set(numbers) == {(1, 0), (2, 0), (2, 1)} and numbers == sorted(numbers)
    done = [name for name, *_ in steps if name.startswith("after")]
    assert done[0] == "after fsync", "the new file must be on the disk before it takes the name"
    assert done[-2:] == ["after replace", "after fsync"], "the folder must be synced after the rename"


@pytest.mark.slow
def test_01_kill_9_at_any_time_leaves_a_whole_checkpoint(tmp_path):
    known = -1
    for trial in range(20):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                for n in range(known + 1, known + 1000):
                    save_checkpoint(tmp_path, state(n, 5_000_000))  # 20 MB
                    os.write(writer, n.to_bytes(8, "little"))
            os._exit(1)
        os.close(writer)
        # without waiting, the kill may come before the first save of this child
        first = os.read(reader, 8) if trial % 4 else b""
        time.sleep(random.Random(trial).uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(reader, "rb") as pipe:
            told = first + pipe.read()
        saved = int.from_bytes(told[-8:], "little") if told else known
        saved = max(saved, known)
        if not (tmp_path / LAST).exists():
            assert saved < 0
            continue
        loaded = load_checkpoint(tmp_path / LAST)
        assert saved <= loaded["n"] <= saved + 1 and (loaded["x"] == loaded["n"]).all()
        if (tmp_path / PREVIOUS).exists():
            assert load_checkpoint(tmp_path / PREVIOUS)["n"] in (loaded["n"] - 2, loaded["n"] - 1)
        known = loaded["n"]
        for leftover in tmp_path.glob(".*.partial*"):
            leftover.unlink()  # a killed process cannot take its half-written file away
    assert known >= 14  # 15 of the children saved at least once, counted from 0


def test_01_what_reads_back_as_something_else_does_not_take_the_name(tmp_path, monkeypatch):
    """A disk, or the memory before it, that keeps other bytes than it was given."""
    save_checkpoint(tmp_path, state(0))
    save_checkpoint(tmp_path, state(1))
    real = os.fsync

    def spoil(handle):
        if stat.S_ISREG(os.fstat(handle).st_mode):
            with open(next(tmp_path.glob(".*.partial*")), "r+b") as f:
                f.seek(200)
                f.write(b"other bytes")
        real(handle)

    monkeypatch.setattr(os, "fsync", spoil)
    assert_refused_and_untouched(tmp_path, lambda: save_checkpoint(tmp_path, state(2)))
    monkeypatch.undo()
    assert load_checkpoint(tmp_path)["n"] == 1


def test_01_a_damaged_last_costs_the_whole_previous_nothing_before_the_new_one_stands(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, state(0))
    save_checkpoint(tmp_path, state(1))
    (tmp_path / LAST).write_bytes((tmp_path / LAST).read_bytes()[:100])
    real, seen = os.replace, []

    def look(*names):
        seen.append(load_checkpoint(tmp_path)["n"])
        real(*names)
        seen.append(load_checkpoint(tmp_path)["n"])

    monkeypatch.setattr(os, "replace", look)
    save_checkpoint(tmp_path, state(2))
    assert seen == [0, 2, 2, 2]


def test_01_an_old_checkpoint_that_cannot_be_renamed_is_named_and_the_new_one_stands(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, state(0))
    save_checkpoint(tmp_path, state(1))
    real = os.replace

    def refuse(source, target):
        if Path(target).name == PREVIOUS:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=f"cannot write .*{PREVIOUS}: Input/output error"):
        save_checkpoint(tmp_path, state(2))
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / LAST)["n"] == 2 and load_checkpoint(tmp_path / PREVIOUS)["n"] == 0
    assert not list(tmp_path.glob(".*"))


class Unsavable:
    """Fails in the middle of being saved."""

    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_02_an_exception_while_saving_leaves_the_folder_as_it_was(error, tmp_path):
    with pytest.raises(error):
        save_checkpoint(tmp_path, state(2, bad=Unsavable(error())))
    assert names(tmp_path) == []
    save_checkpoint(tmp_path, state(0))
    save_checkpoint(tmp_path, state(1))
    with pytest.raises(error):
        save_checkpoint(tmp_path, state(2, bad=Unsavable(error())))
    assert names(tmp_path) == [LAST, PREVIOUS]
    assert load(tmp_path / LAST)["n"] == 1 and load(tmp_path / PREVIOUS)["n"] == 0


@pytest.mark.parametrize("mask, bits", [(0o077, 0o600), (0o002, 0o664)])
def test_04_permissions_follow_the_umask(mask, bits, tmp_path):
    before = os.umask(mask)
    try:
        save_checkpoint(tmp_path, state(0))
        save_checkpoint(tmp_path, state(1))
        write_whole(tmp_path / "options.txt", b"text")
    finally:
        os.umask(before)
    for name in (LAST, PREVIOUS, "options.txt"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == bits


def assert_refused_and_untouched(folder, save):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError) as refused:
        save()
    assert str(folder) in str(refused.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@contextlib.contextmanager
def small_disk(folder, size="1m"):
    """A real file system of this size; the test is skipped where it may not be mounted."""
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    try:
        mounted = os.geteuid() == 0 and subprocess.run(mounting, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("no permission to mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a writer thread may still hold a file


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writing thread
@pytest.mark.parametrize("size", ["4k", "700k"])  # from the first file to the second checkpoint
def test_03_a_run_on_a_disk_that_fills_up_ends_with_a_word_and_goes_on_once_there_is_room(size, tiny_set, tmp_path):
    with small_disk(tmp_path / "disk", size) as disk:
        with pytest.raises(UserError, match=rf"cannot (write|write to|make the run folder) {disk}/run.*No space left"):
            train(tiny_set, disk / "run", "--save-every", "1", "--log-every", "1")
        left = list((disk / "run").rglob("*")) if (disk / "run").exists() else []
        assert not [path for path in left if "partial" in path.name or path.name == ".lock"]
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        train(tiny_set, disk / "run", "--resume", "auto", "--log-every", "1")
        assert load(disk / "run" / LAST)["iteration"] == 8


def test_03_a_folder_that_became_read_only_is_named_and_left_as_it_was(tiny_set, tmp_path):
    with small_disk(tmp_path / "disk", "50m") as disk:
        train(tiny_set, disk / "run", "--iterations", "4", "--save-every", "2")
        (disk / "run" / PREVIOUS).rename(disk / "run" / LAST)
        before = files(disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for argv, path in ((["--resume", "auto"], "run"), (["--name", "new"], "new"), (["--fresh"], "run")):
            with pytest.raises(UserError, match=rf"cannot .* {disk}/{path}.*Read-only"):
                train(tiny_set, disk / "run", "--iterations", "4", *argv)
        assert files(disk) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_03_a_failing_disk_is_named(step, number, tmp_path, monkeypatch):
    save_checkpoint(tmp_path, state(0))

    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(UserError, match=f"{tmp_path}.*{os.strerror(number)}"):
        save_checkpoint(tmp_path, state(1))
    monkeypatch.undo()
    assert names(tmp_path) == [LAST] and load(tmp_path / LAST)["n"] == 0


# Loading.


@pytest.mark.parametrize("share", [0, 0.99])
def test_05_a_folder_falls_back_to_previous_when_last_is_cut_short(share, tmp_path, capsys):
    save_checkpoint(tmp_path, state(0))
    save_checkpoint(tmp_path, state(1))
    whole = (tmp_path / LAST).read_bytes()
    (tmp_path / LAST).write_bytes(whole[: int(share * len(whole))])
    assert load_checkpoint(tmp_path)["n"] == 0
    said = capsys.readouterr()
    assert "warning" in said.err and LAST in said.err and PREVIOUS in said.err
    assert said.out == "", "a warning must not stand in the table that a program prints"
    with pytest.raises(UserError, match=LAST):
        load_checkpoint(tmp_path / LAST)
    (tmp_path / LAST).unlink()
    assert load_checkpoint(tmp_path)["n"] == 0


def test_06_no_damage_goes_unnoticed(tmp_path):
    """Bytes all over a small file, changed or missing: an error that names the file, or what was saved."""
    path = save_checkpoint(tmp_path, state(3, text="abc", x=torch.arange(10.0)))
    whole = path.read_bytes()
    draw = random.Random(0)
    damaged = [bytes([*whole[:i], whole[i] ^ 1 << draw.randrange(8), *whole[i + 1 :]]) for i in range(0, len(whole), 2)]
    damaged += [whole[:length] for length in range(0, len(whole), 7)]
    noticed = 0
    for data in damaged:
        path.write_bytes(data)
        try:
            result = load_checkpoint(path)
        except UserError as e:
            assert str(path) in str(e)
            noticed += 1
        else:
            assert result["n"] == 3 and result["text"] == "abc" and torch.equal(result["x"], torch.arange(10.0))
    assert noticed > len(damaged) / 3


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_09_bare_weights_of_the_released_code_are_refused_in_words(legacy, tmp_path):
    weights = OrderedDict({"block_one.conv.0.weight": torch.zeros(16, 1, 3, 3, 3)})
    torch.save(weights, tmp_path / "iter_6000.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"iter_6000\.pth is .*no checkpoint"):
        load_checkpoint(tmp_path / "iter_6000.pth")


@pytest.mark.parametrize("content", [{"x": 1}, {"format": 0}, {"format": 2, "n": 1}, [1, 2], torch.zeros(3)])
def test_10_other_formats_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt.*format"):
        load_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize("entry", checkpoint.CONTENTS)
def test_10_a_checkpoint_that_lacks_something_is_refused(entry, tmp_path):
    content = state(0, format=checkpoint.FORMAT)
    del content[entry]
    torch.save(content, tmp_path / "less.pt")
    with pytest.raises(UserError, match=rf"less\.pt.*{entry}"):
        load_checkpoint(tmp_path / "less.pt")
