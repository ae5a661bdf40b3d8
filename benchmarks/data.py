"""Time of an augmented crop by the place of the volumes, and time until the first crop of a run.

    python -m benchmarks.data

The released form decodes the whole h5 volume for every sample, turns it, flips it and then crops.
"""

import dataclasses
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from benchmarks.timing import labeled_cases, side_by_side, table
from dataloaders.augmentation import AUGMENTATIONS, draw_augmentation
from dataloaders.cases import LA_FOLDER
from dataloaders.two_stream import Patches, Slot, collate
from dataloaders.volumes import Volumes
from utils.devices import keep_freed_memory
from utils.errors import run
from utils.options import option, read_flags


@dataclasses.dataclass
class Options:
    """Options of the benchmark."""

    data: str = option(str(LA_FOLDER), "folder of the data set")
    patch_size: list[int] = option([112, 112, 80], "voxels of a crop along x, y, z", nargs=3, minimum=1)
    augment: str = option("d4", "turns and flips of a crop", choices=[kind for kind in AUGMENTATIONS if kind != "flip"])
    threads: int = option(1, "CPU threads", minimum=1)
    samples: int = option(16, "crops in a round", minimum=1)
    rounds: int = option(5, "timed repeats", minimum=1)


def released(patches: Patches, slot: Slot) -> dict[str, Any]:
    """The released form: decode, turn and flip the whole volume, then crop. Returns the same crop as `Patches`."""
    case, size = patches.volumes.cases[slot.case], patches.patch_size
    with h5py.File(case.path, "r") as f:
        volumes = [f["image"][()], f["label"][()]]
    generator = np.random.default_rng([patches.seed, 1, slot.step, slot.slot])
    draw = draw_augmentation(generator, volumes[0].shape, size, patches.augment)
    turned = [np.rot90(v, draw.turns, (0, 1)) for v in volumes]
    turned = [np.flip(v, draw.flips).copy() for v in turned]
    corner = np.zeros(volumes[0].shape[:2], bool)  # position of the box after turning
    corner[draw.start[0] : draw.start[0] + draw.size[0], draw.start[1] : draw.start[1] + draw.size[1]] = True
    corner = np.flip(np.rot90(corner, draw.turns), draw.flips)
    x, y = (int(np.flatnonzero(corner.any(axis=1 - axis))[0]) for axis in (0, 1))
    z = draw.start[2]
    crops = [torch.from_numpy(v[x : x + size[0], y : y + size[1], z : z + size[2]].copy()) for v in turned]
    return {"image": crops[0][None], "label": crops[1], "case": case.name}


Maker = Callable[[Slot], dict[str, Any]]


def batches_of(item: Maker, slots: list[Slot]) -> Iterator[dict[str, Any]]:
    """Batches of four crops, collated as in the loader of train_dtml.py."""
    return (collate(list(map(item, slots[i : i + 4]))) for i in range(0, len(slots), 4))


def use_up(item: Maker, slots: list[Slot]) -> None:
    """Iterates over the batches, each freed when the next one is made, as in training."""
    deque(batches_of(item, slots), maxlen=0)


def main(argv: list[str] | None = None) -> None:
    o: Options = read_flags(Options, __doc__, "python -m benchmarks.data", argv)
    torch.set_num_threads(o.threads)
    keep_freed_memory()
    cases = labeled_cases(Path(o.data))
    folder = Path(tempfile.mkdtemp())
    try:
        starts = []
        patches = {}
        for name, cache in (("h5, box alone (none)", "none"), ("memory (ram)", "ram"),
                            ("plain arrays, first run (disk)", "disk"), ("plain arrays (disk)", "disk")):  # fmt: skip
            began = time.perf_counter()
            volumes = Volumes(cases, cache=cache, folder=folder)
            starts.append([name, len(cases), time.perf_counter() - began])
            patches[name] = Patches(volumes, patch_size=o.patch_size, augment=o.augment, seed=0, sdm=False)
        del patches["plain arrays, first run (disk)"]
        slots = [Slot(i, 0, i % len(cases)) for i in range(o.samples)]
        makers: dict[str, Maker] = {"h5, whole volume (released)": partial(released, patches["memory (ram)"])}
        makers |= {name: source.__getitem__ for name, source in patches.items()}
        timings = side_by_side({n: partial(use_up, make, slots) for n, make in makers.items()}, rounds=o.rounds)
        rows = []
        for name, t in timings.items():
            reference = batches_of(makers["h5, whole volume (released)"], slots)
            batches = batches_of(makers[name], slots)
            equal = all(
                torch.equal(a[k], b[k]) for a, b in zip(reference, batches, strict=True) for k in ("image", "label")
            )
            rows.append([name, 1000 * t.seconds / o.samples, o.samples / t.seconds, t.ratio, "yes" if equal else "NO"])
    finally:
        shutil.rmtree(folder)
    size = "x".join(map(str, o.patch_size))
    print(f"Batches of 4 crops of {size}, image and label, {o.augment}, threads: {o.threads}.")
    print(f"{o.rounds} rounds of {o.samples} crops.\n")
    print(table(["volumes in", "ms a crop", "crops/s", "times as fast", "equal bit for bit"], rows))
    print()
    print(table(["volumes in", "scans", "seconds to start"], starts))


if __name__ == "__main__":
    run(main)
