"""Measures where the time of a loop goes."""

import time
from collections import defaultdict
from itertools import pairwise
from typing import Any

import torch


class Clock:
    """Measures the time between laps and adds it to the name of the later lap.

    On a GPU the laps are events in its queue. Only `shares` reads them, so the loop does not wait for the GPU.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.seconds: dict[str, float] = defaultdict(float)
        """Name -> time in all, as of the last call of `shares` or `all_shares`."""
        self._laps: list[tuple[str, Any]] = [("", self._now())]

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, name: str) -> None:
        """Assigns the time since the last lap to this name."""
        self._laps.append((name, self._now()))
        if len(self._laps) > 10_000:
            self._collect()

    def _collect(self) -> dict[str, float]:
        if self.cuda:
            self._laps[-1][1].synchronize()
        recent: dict[str, float] = defaultdict(float)
        for (_, before), (name, now) in pairwise(self._laps):
            recent[name] += before.elapsed_time(now) / 1000 if self.cuda else now - before
        for name, seconds in recent.items():
            self.seconds[name] += seconds
        self._laps = self._laps[-1:]
        return recent

    def shares(self) -> dict[str, float]:
        """Name -> share of the time since the last call; they add up to 1."""
        return _shares(self._collect())

    def all_shares(self) -> dict[str, float]:
        """Name -> share of the time since the beginning."""
        self._collect()
        return _shares(self.seconds)


def _shares(seconds: dict[str, float]) -> dict[str, float]:
    total = sum(seconds.values())
    return {name: value / total for name, value in seconds.items()} if total else {}
