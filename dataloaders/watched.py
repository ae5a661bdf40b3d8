"""A data loader that watches its workers, reports why a batch does not come, and never waits for ever."""

import atexit
import math
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import RawArray, active_children
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from utils.distributed import RANKS
from utils.errors import StopSignal, UserError, warn

SHARED_MEMORY = Path("/dev/shm")
LOOK_EVERY = 1  # seconds between checks of the stop signal and the workers while no batch comes
WARN_AFTER, GIVE_UP_AFTER = 60, 600  # seconds without a batch
PATIENCE = 10  # seconds that one of several processes waits after a stop signal for a batch that the others need


class TrackedPatches(Dataset[dict[str, Any]]):
    """Wraps patches; in shared memory each worker notes its process id, its current case and the one pasted into it.

    Raises:
        UserError: if there is no shared memory.
    """

    def __init__(self, patches: Any, workers: int):
        self.patches = patches
        try:
            self.notes = RawArray("l", 3 * workers) if workers else []
        except OSError as e:
            raise UserError(f"the data workers cannot be started ({e}). {advice(workers)}") from e

    def __getitem__(self, slot: Any) -> dict[str, Any]:
        worker = get_worker_info()
        if worker is not None:
            cases = [sample.case for sample in self.patches.slots_of(slot)[0]]
            self.notes[3 * worker.id : 3 * worker.id + 3] = [os.getpid(), cases[0], cases[-1]]
        return self.patches[slot]

    def cases_of(self, pids: list[int | None]) -> list[str]:
        """The cases, as NAME (FILE), that the workers with these process ids read last."""
        notes = {pid: read for pid, *read in zip(self.notes[::3], self.notes[1::3], self.notes[2::3], strict=True)}
        numbers = dict.fromkeys(number for pid in pids for number in notes.get(pid, []))
        cases = [self.patches.volumes.cases[number] for number in numbers]
        return [f"{case.name} ({case.path})" for case in cases]


def kill(workers: list[BaseProcess]) -> None:
    """Kills the remaining workers when the loader fails or the program ends.

    The traceback of a worker's death keeps torch's iterator alive, and with it the other workers. At exit Python would
    send them SIGTERM, which they ignore (ignore_stop_signals), and wait for ever.
    """
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()


class UnsentBatch(NamedTuple):
    """Sent by a worker in place of a batch that did not fit into shared memory."""

    reason: str
    size: int
    """Size of the batch in bytes."""


class WorkerCollate:
    """Collates a batch; in a worker it also pickles the batch, which moves its tensors into shared memory.

    By default torch pickles in a thread of the worker: an error there is only printed, and the loader waits for ever.
    """

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, items: list[Any]) -> Any:
        batch = self.collate(items)
        if get_worker_info() is None:
            return batch
        try:
            return bytes(ForkingPickler.dumps(batch))
        except (OSError, RuntimeError) as e:
            size = sum(x.nbytes for x in batch.values() if isinstance(x, torch.Tensor))
            return UnsentBatch(str(e), size)


def shared_memory_text() -> str:
    """A sentence about the free shared memory; empty if the system has no /dev/shm."""
    if not SHARED_MEMORY.is_dir():
        return ""
    total, _, free = shutil.disk_usage(SHARED_MEMORY)
    return f"The shared memory {SHARED_MEMORY} has {total / 2**20:.1f} MiB, {free / 2**20:.1f} of them free. "


def advice(workers: int) -> str:
    """Advice for full shared memory.

    Each worker holds up to two batches, one ready and one in preparation; one more is in use.
    """
    return (
        f"{shared_memory_text()}--workers {workers} keep up to {2 * workers + 1} batches there. Give it more "
        "(docker run --shm-size 2g), or go on with --resume auto --workers 0."
    )


class WatchedLoader(DataLoader):
    """A DataLoader of `TrackedPatches` that does not wait for ever.

    While no batch comes it checks the stop signal and the workers every second. A stop signal ends the batches early.
    Workers are forked on Linux, so that they share the volumes: from 3.14 on Python starts new programs unless told so,
    and every volume would be copied into the shared memory for them.

    Args:
        workers: number of data workers; 0: the main process.
        collate: items -> batch.
        more: further arguments of DataLoader.

    Raises:
        UserError: if the workers cannot be started, a batch does not fit into shared memory, or none comes for ten
            minutes.
        RuntimeError: if a worker was killed; the message names its case.
    """

    def __init__(
        self,
        patches: TrackedPatches,
        *,
        workers: int,
        collate: Callable[..., Any],
        stop: StopSignal | None,
        **more: Any,
    ):
        super().__init__(
            patches,
            num_workers=workers,
            collate_fn=WorkerCollate(collate),
            timeout=LOOK_EVERY if workers else 0,
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            **more,
        )
        self.stop = stop

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        before = active_children()
        try:
            batches = super().__iter__()
        except OSError as e:
            raise UserError(f"the data workers cannot be started ({e}). {advice(self.num_workers)}") from e
        workers = [child for child in active_children() if child not in before]
        atexit.register(kill, workers)
        if self.num_workers and threading.current_thread() is threading.main_thread():
            # torch's handler would raise the error at any point of the program, even within a save.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        since, stopped, warned = time.monotonic(), math.inf, False
        while True:
            try:
                batch = next(batches)
                batch = pickle.loads(batch) if isinstance(batch, bytes) else batch
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as e:
                if not str(e).startswith("DataLoader timed out"):
                    killed = self._killed(workers)
                    if killed is None:
                        raise
                    raise killed from e
                now = time.monotonic()
                stopped = min(stopped, now) if self.stop is not None and self.stop.number else stopped
                if now - stopped >= (0 if RANKS == 1 else PATIENCE):
                    kill(workers)
                    return
                if now - since >= (GIVE_UP_AFTER if warned else WARN_AFTER):
                    self._warn_or_give_up(workers, warned)
                    warned = True
                continue
            if isinstance(batch, UnsentBatch):
                kill(workers)
                size = f"{batch.size / 2**20:.1f} MiB"
                raise UserError(
                    f"a data worker could not hand over its batch of {size} ({batch.reason}). "
                    f"{advice(self.num_workers)}"
                )
            try:
                yield batch
            except GeneratorExit:  # torch would wait for workers that hang, and leave them
                kill(workers)
                raise
            since, warned = time.monotonic(), False

    def _killed(self, workers: list[BaseProcess]) -> Exception | None:
        """Ends the workers, and returns an error if one of them was killed before."""
        # A killed worker's socket breaks first; then its sentinel is ready, and only then is is_alive() False.
        ended = wait([worker.sentinel for worker in workers], timeout=1)
        dead = [worker for worker in workers if worker.sentinel in ended]
        kill(workers)
        if not dead:
            return None
        pids = ", ".join(str(worker.pid) for worker in dead)
        what = f"the data worker {pids} was killed while it read {self._cases_of(dead) or 'its first case'}."
        if -signal.SIGBUS in [worker.exitcode for worker in dead]:  # shared memory that is full, or a file cut short
            return UserError(f"{what} {advice(self.num_workers)}")
        return RuntimeError(
            f"{what} What was saved is intact: use --resume auto, and fewer --workers if the memory ran out."
        )

    def _warn_or_give_up(self, workers: list[BaseProcess], warned: bool) -> None:
        """Warns that no batch comes; the second time it raises a UserError."""
        at = self._cases_of(workers) or "no case yet"
        seconds = GIVE_UP_AFTER if warned else WARN_AFTER
        what = f"no batch came for {seconds} s, though the data workers live, which read {at}. {shared_memory_text()}"
        if warned:
            kill(workers)
            raise UserError(f"{what}What was saved is intact: go on with --resume auto, or --workers 0 too.")
        warn(f"{what}If the disk is not that slow, stop and go on with --workers 0.")

    def _cases_of(self, workers: list[BaseProcess]) -> str:
        return ", ".join(self.dataset.cases_of([worker.pid for worker in workers]))  # type: ignore[attr-defined]
