"""Loading data of a set that is larger than memory: time to start, crops per second, and peak memory.

    python -m benchmarks.stream

creates CT-size cases in a temporary folder: a few different volumes and hard links to them, to save space. Reads are
therefore mostly from the system's file cache. Each start is a separate process with --cache none, like a training run:
the first start checks every file, the later one uses the results of these checks. The last table compares layouts of
the h5 files.
"""

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.timing import side_by_side, table
from dataloaders.cases import Case
from dataloaders.training import training_cases
from dataloaders.two_stream import Patches, Slot, TwoStreamBatchSampler, make_loader
from dataloaders.volumes import Volumes
from networks.heads import HALVINGS, side_multiples
from utils.devices import peak_memory_gib
from utils.errors import run
from utils.options import option, read_flags

BATCH = 4
LAYOUTS: dict[str, dict[str, Any]] = {  # of an h5 dataset; chunks are at most as large as the volume
    "contiguous, not compressed": {"chunks": None},
    "one chunk": {"chunks": (10**6, 10**6, 10**6), "compression": "gzip"},
    "h5py's choice": {"chunks": True, "compression": "gzip"},
    "64x64x64": {"chunks": (64, 64, 64), "compression": "gzip"},
    "64x64x32": {"chunks": (64, 64, 32), "compression": "gzip"},
    "32x32x32": {"chunks": (32, 32, 32), "compression": "gzip"},
    "32x32x32, shuffled": {"chunks": (32, 32, 32), "compression": "gzip", "shuffle": True},
}
LAYOUT = "32x32x32, shuffled"


@dataclasses.dataclass
class Options:
    """Options of the benchmark."""

    volumes: int = option(1000, "cases of the set; one in ten is labeled", minimum=20)
    distinct: int = option(4, "different volumes among them", minimum=1)
    shape: list[int] = option([512, 512, 200], "voxels of a volume along x, y, z", nargs=3, minimum=1)
    patch_size: list[int] = option([112, 112, 80], "voxels of a crop along x, y, z", nargs=3, minimum=16)
    batches: int = option(25, f"batches of {BATCH} crops in a round", minimum=1)
    rounds: int = option(3, "timed repeats", minimum=1)
    folder: str = option("", "parent of the temporary folder (default the system's)")
    one: str = option("", "run only this part, in --folder, and print JSON", choices=["make", "start"])


def volume(seed: int, shape: list[int]) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Image and label (W,H,D): blocks of random brightness, like organs in Hounsfield units, and noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(0, 200, [side // 32 + 1 for side in shape]).astype(np.int16)
    blocks = coarse[np.ix_(*(np.arange(side) // 32 for side in shape))]
    return blocks + rng.integers(-16, 16, shape, dtype=np.int16), (blocks > 300).astype(np.uint8)


def write(path: Path, arrays: dict[str, NDArray], layout: str) -> None:
    """Writes a case file in one of LAYOUTS."""
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            settings = dict(LAYOUTS[layout])
            if isinstance(settings["chunks"], tuple):
                settings["chunks"] = tuple(map(min, settings["chunks"], array.shape))
            file.create_dataset(name, data=array, **settings)


def make(o: Options) -> dict[str, float]:
    """Creates the set in --folder; returns the bytes of its different files."""
    folder = Path(o.folder)
    names = [f"ct{i:05d}" for i in range(o.volumes + 1)]
    for i, name in enumerate(names):
        path = folder / f"{name}.h5"
        if i < o.distinct:
            image, label = volume(i, o.shape)
            write(path, {"image": image, "label": label}, LAYOUT)
        else:
            os.link(folder / f"{names[i % o.distinct]}.h5", path)
    (folder / "train.list").write_text("\n".join(names[:-1]), encoding="utf-8")
    (folder / "test.list").write_text(names[-1], encoding="utf-8")
    return {"bytes": sum((folder / f"{name}.h5").stat().st_size for name in names[: o.distinct])}


def start(o: Options) -> dict[str, Any]:
    """Starts as train_dtml.py does; returns seconds to the first batch, crops per second, and peak memory in GiB."""
    folder, labeled = Path(o.folder), o.volumes // 10
    began = time.perf_counter()
    cases, problems, labeled_batch = training_cases(
        folder, labeled=labeled, unlabeled=None, batch_size=BATCH, labeled_batch=None, patch_size=o.patch_size,
        multiples=side_multiples(HALVINGS),
    )  # fmt: skip
    volumes = Volumes(cases, cache="none", folder=folder / ".cache", problems=problems)
    patches = Patches(volumes, patch_size=o.patch_size, augment="d4", seed=0, sdm=False)

    def batches(first: int, workers: int) -> float:
        """Seconds for the batches from number `first` on, including the start of the workers."""
        sampler = TwoStreamBatchSampler(
            labeled, len(cases) - labeled, batch_size=BATCH, labeled_batch=labeled_batch, seed=0, start=first,
            iterations=first + (o.batches if first else 1),
        )  # fmt: skip
        began = time.perf_counter()
        for _ in make_loader(patches, sampler, workers=workers):
            pass
        return time.perf_counter() - began

    batches(0, 0)
    seconds = time.perf_counter() - began
    spent: dict[int, list[float]] = {0: [], 2: []}
    for i in range(o.rounds):
        for workers, times in spent.items():
            times.append(batches(1 + i * o.batches, workers))
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    rates = [o.batches * BATCH / median(times) for times in spent.values()]
    return {"seconds": seconds, "rates": rates, "peak": peak_memory_gib(torch.device("cpu")), "worker": worker}


def layouts(o: Options, folder: Path) -> str:
    """A table of the time of a crop (image and label) by the layout of its file."""
    image, label = volume(0, o.shape)
    patches: dict[str, Patches] = {}
    rows: dict[str, list[Any]] = {}
    for i, layout in enumerate(LAYOUTS):
        path = folder / f"layout{i}.h5"
        write(path, {"image": image, "label": label}, layout)
        volumes = Volumes([Case(path.stem, path, labeled=True)], cache="none")
        patches[layout] = Patches(volumes, patch_size=o.patch_size, augment="d4", seed=0, sdm=False)
        with h5py.File(path) as file:
            chunks = file["image"].chunks
        rows[layout] = [layout, "x".join(map(str, chunks or ["none"])), path.stat().st_size / 2**20]
    slots = [Slot(i, 0, 0) for i in range(6)]

    def crops(layout: str) -> list[torch.Tensor]:
        items = [patches[layout][slot] for slot in slots]
        return [item[name].clone() for item in items for name in ("image", "label")]

    reference = crops(next(iter(LAYOUTS)))
    for layout, t in side_by_side({layout: partial(crops, layout) for layout in LAYOUTS}, rounds=o.rounds).items():
        equal = all(map(torch.equal, reference, crops(layout)))
        rows[layout] += [1000 * t.seconds / len(slots), t.ratio, "yes" if equal else "NO"]
    head = ["file", "chunks", "MiB", "ms a crop", "times as fast", "equal bit for bit"]
    return table(head, list(rows.values()))


def main(argv: list[str] | None = None) -> None:
    o: Options = read_flags(Options, __doc__, "python -m benchmarks.stream", argv)
    if o.one:
        print(json.dumps({"make": make, "start": start}[o.one](o)))
        return
    folder = Path(tempfile.mkdtemp(dir=o.folder or None))

    def part(one: str) -> dict[str, Any]:
        args = ["--one", one, "--folder", str(folder)]
        for name in ("volumes", "distinct", "shape", "patch_size", "batches", "rounds"):
            value = getattr(o, name)
            args += ["--" + name, *map(str, value if isinstance(value, list) else [value])]
        done = subprocess.run([sys.executable, "-m", "benchmarks.stream", *args], stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout)

    try:
        written = part("make")["bytes"]
        starts = {"first": part("start"), "later": part("start")}
        compared = layouts(o, folder)
    finally:
        shutil.rmtree(folder)
    decoded = prod(o.shape) * (4 * o.volumes + o.volumes // 10) / 1e9  # float32, labels uint8
    size, patch = ("x".join(map(str, v)) for v in (o.shape, o.patch_size))
    print(f"{o.volumes} volumes of {size}, int16, {decoded:.3g} GB decoded; {o.distinct} of them different, "
          f"{written / 1e9:.3g} GB as {LAYOUT}, the others hard links.")  # fmt: skip
    print(f"Crops of {patch} in batches of {BATCH}, half of them labeled, --cache none; {o.rounds} rounds of "
          f"{o.batches}.\n")  # fmt: skip
    head = ["start", "s to the first batch", "crops/s, 0 workers", "2 workers", "peak GiB", "of a worker",
            "% of the decoded set"]  # fmt: skip
    print(table(head, [
        [name, s["seconds"], *s["rates"], s["peak"], s["worker"], 100 * s["peak"] * 2**30 / 1e9 / decoded]
        for name, s in starts.items()
    ]))  # fmt: skip
    print()
    print(compared)


if __name__ == "__main__":
    run(main)
