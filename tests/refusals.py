"""Tiny trainings, commands that must be refused and leave every file as it was, and edited cases."""

import contextlib
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import TINY, load

import train_dtml
from utils.errors import UserError

SHAPE = (24, 22, 18)


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    """What lies below a folder, with the time and size of each thing."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def flags(folder: Path, *more: str) -> list[str]:
    """A run of one iteration on the set of the folder, its run folder beside the set."""
    return ["--data", str(folder), "--runs", str(folder.parent / "runs"), *TINY, "--iterations", "1", *more]


def train(folder: Path, *more: str) -> dict:
    """Trains and returns the checkpoint; without a --name the run is called `run`."""
    name = more[more.index("--name") + 1] if "--name" in more else "run"
    train_dtml.main(flags(folder, "--name", "run", *more))
    return load(folder.parent / "runs" / name)


def refuse(argv: list[str], *texts: str, untouched: Path, main=train_dtml.main) -> str:
    """Asserts that the command ends in an error with these texts and changes no file; returns the error's text."""
    before = files(untouched)
    with pytest.raises(UserError) as caught:
        main(argv)
    message = str(caught.value)
    for text in texts:
        assert text in message
    assert files(untouched) == before
    return message


def edit(folder: Path, name: str, **datasets: object) -> None:
    """Replaces datasets of a case file; None removes one."""
    with h5py.File(folder / name / "mri_norm2.h5", "a") as f:
        for key, value in datasets.items():
            if key in f:
                del f[key]
            if value is not None:
                f[key] = value


def image(value: float | None = None) -> np.ndarray:
    """An image of noise with one voxel of this value."""
    noise = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    if value is not None:
        noise[3, 4, 5] = value
    return noise


@contextlib.contextmanager
def bounded_memory(mebibytes=64):
    """Fails if this process holds that much more at any moment than at the beginning."""

    def held(line):
        return int(re.search(rf"{line}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10

    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not report the memory of a process")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = held("VmRSS")
    yield
    assert held("VmHWM") - before < mebibytes
