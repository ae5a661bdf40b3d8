"""Data workers that live and send nothing, as the shared memory is full or a disk hangs: no run waits for ever."""

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from multiprocessing import active_children

import pytest
import torch
from conftest import TINY, flat, load

import train_dtml
from dataloaders import watched
from dataloaders.two_stream import Patches
from methods import METHODS
from utils.errors import UserError, run

N = 6
FLAGS = [*TINY, "--batch-size", "2", "--iterations", str(N), "--workers", "2", "--cache", "ram"]
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_dtml.main([*args(data, folder), "--workers", "0"])
    return folder


def args(data, folder, *more):
    return ["--data", str(data), *FLAGS, "--runs", str(folder.parent), "--name", folder.name, *more]


def hang_at(step, monkeypatch, started=None):
    """Every crop of this batch and later ones takes for ever, in a worker."""
    real, main = Patches.__getitem__, os.getpid()

    def hanging(self, slot):
        if slot.step >= step and os.getpid() != main:
            if started:
                started.touch()
            time.sleep(600)
        return real(self, slot)

    monkeypatch.setattr(Patches, "__getitem__", hanging)


@pytest.mark.parametrize(
    ("number", "code", "step", "waiting"),
    [(signal.SIGTERM, 143, 0, True), (signal.SIGINT, 130, 3, True), (signal.SIGINT, 130, 3, False)],
)
def test_17_a_signal_while_no_batch_comes_saves_and_leaves(
    step, number, code, waiting, data, whole, tmp_path, monkeypatch, capsys
):
    """The signal comes while the loop waits for the batch, or in the iteration before."""
    others, folder, hangs = set(active_children()), tmp_path / "run", tmp_path / "hangs"
    real, done = METHODS["dtml"].after_step, []

    def after_step(self, batch, iteration):
        real(self, batch, iteration)
        done.append(iteration)
        if not waiting and len(done) == step:
            interrupt()

    def interrupt():
        while not hangs.exists() or len(done) < step:
            time.sleep(0.05)
        if waiting:
            time.sleep(1)  # until the loop asks for the batch
        os.kill(os.getpid(), number)

    with monkeypatch.context() as patched:
        hang_at(step, patched, hangs)
        patched.setattr(METHODS["dtml"], "after_step", after_step)
        if waiting:
            threading.Thread(target=interrupt, daemon=True).start()
        began = time.monotonic()
        with pytest.raises(SystemExit) as left:
            run(lambda: train_dtml.main(args(data, folder, *([] if step else ["--fresh"]))))
    assert left.value.code == code and time.monotonic() - began < 300
    assert f"stopped: saved {folder} after {step} of {N} iterations" in capsys.readouterr().err
    assert others.issuperset(active_children())
    train_dtml.main(args(data, folder, "--resume", "auto"))
    assert not [*tmp_path.glob("run.*")]  # moved aside, as the run began with --fresh
    a, b = (load(path) for path in (folder, whole))
    assert flat(a["method"]) == flat(b["method"]) and flat(a["optimizer"]) == flat(b["optimizer"])
    assert (folder / "scalars.csv").read_text() == (whole / "scalars.csv").read_text()


def test_17_workers_that_live_and_send_nothing_are_told_of_and_then_given_up(data, tmp_path, monkeypatch, capsys):
    others = set(active_children())
    hang_at(3, monkeypatch)
    monkeypatch.setattr(watched, "WARN_AFTER", 2)
    monkeypatch.setattr(watched, "GIVE_UP_AFTER", 4)
    with pytest.raises(UserError, match=r"no batch came for 4 s, .* read case0\d \(.*mri_norm2.h5\)") as error:
        train_dtml.main(args(data, tmp_path / "run"))
    assert "--workers 0" in str(error.value) and "/dev/shm has" in str(error.value)
    assert "warning: no batch came for 2 s" in capsys.readouterr().err
    assert others.issuperset(active_children())


def test_17_a_batch_that_the_shared_memory_has_no_room_for_is_told_with_its_size(data, tmp_path, monkeypatch):
    """torch asks for the room as a thread of the worker sends the batch, where nobody sees that it failed."""

    def full(self, *args):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    others = set(active_children())
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    with pytest.raises(UserError, match=r"hand over its batch of 0.0 MiB .*No space left") as error:
        train_dtml.main(args(data, tmp_path / "run"))
    total, _, free = shutil.disk_usage("/dev/shm")
    assert f"/dev/shm has {total / 2**20:.1f} MiB, {free / 2**20:.1f} of them free" in str(error.value)
    assert "--workers 0" in str(error.value) and others.issuperset(active_children())


def test_17_a_worker_that_died_of_a_page_without_memory_blames_the_shared_memory(data, tmp_path, monkeypatch):
    def struck(self, slot):
        os.kill(os.getpid(), signal.SIGBUS)

    monkeypatch.setattr(Patches, "__getitem__", struck)
    with pytest.raises(UserError, match=r"was killed while it read case0\d .*/dev/shm has .*--workers 0"):
        train_dtml.main(args(data, tmp_path / "run"))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are programs of their own")
def test_17_workers_share_the_volumes_also_where_python_would_start_them_anew(data, whole, tmp_path, monkeypatch):
    """As Python does from 3.14 on: it would copy every volume into the shared memory."""
    shared, real = [], torch.UntypedStorage._share_fd_cpu_
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", lambda self: shared.append(self.nbytes()) or real(self))
    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        train_dtml.main(args(data, tmp_path / "run"))
    finally:
        multiprocessing.set_start_method(usual, force=True)
    assert shared == [] and flat(load(tmp_path / "run")["method"]) == flat(load(whole)["method"])
