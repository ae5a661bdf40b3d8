"""Data workers that are watched: when one is killed, the error names the case it was at."""

import atexit
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import RawArray, active_children
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader, Dataset, get_worker_info


class Noted(Dataset[dict[str, Any]]):
    """The patches of a TwoStream loader, each worker noting its process and the case it is at."""

    def __init__(self, patches: Any, workers: int):
        self.patches, self.notes = patches, RawArray("l", 2 * workers)

    def __getitem__(self, slot: Any) -> dict[str, Any]:
        worker = get_worker_info()
        if worker is not None:
            self.notes[2 * worker.id], self.notes[2 * worker.id + 1] = os.getpid(), slot.case
        return self.patches[slot]

    def cases_of(self, pids: list[int | None]) -> list[str]:
        """What the workers of these process numbers read last, as NAME (FILE)."""
        notes = dict(zip(self.notes[::2], self.notes[1::2], strict=True))
        cases = [self.patches.volumes.cases[notes[pid]] for pid in pids if pid in notes]
        return [f"{case.name} ({case.path})" for case in cases]


def end(workers: list[BaseProcess]) -> None:
    """Kills those still there, as the loader fails or the program ends.

    The traceback of one worker's death holds torch's iterator, and with it the others. Python would ask them to end by
    SIGTERM, which they leave to the main process (ignore_stop_signals), and wait for them for ever.
    """
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()


class WatchedLoader(DataLoader):
    """A DataLoader of `Noted` patches; a killed worker is named with its case, at the batch that is then missing."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        others = active_children()
        batches = super().__iter__()
        workers = [child for child in active_children() if child not in others]
        atexit.register(end, workers)
        if self.num_workers and threading.current_thread() is threading.main_thread():
            # torch would raise the error wherever the program is just then, in the middle of a save too.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as e:
                # A killed worker's socket breaks first; then its sentinel is ready, and only then is is_alive() False.
                ended = wait([worker.sentinel for worker in workers], timeout=1)
                dead = [worker.pid for worker in workers if worker.sentinel in ended]
                end(workers)
                if not dead:
                    raise
                at = self.dataset.cases_of(dead)  # type: ignore[attr-defined]
                raise RuntimeError(
                    f"the data worker {', '.join(map(str, dead))} was killed while it read "
                    f"{', '.join(at) or 'its first case'}. The last checkpoint is intact: go on with --resume, with "
                    "fewer --workers if the memory ran out."
                ) from e
            yield batch
