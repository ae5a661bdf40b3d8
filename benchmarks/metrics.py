"""Dice, Jaccard, ASD and 95HD of a scan: medpy on whole volumes compared with ours, on segmentations and hard masks.

    python -m benchmarks.metrics

The segmentations are the labels, blurred, with noise, and moved. The hard masks are noise, which consists of border
voxels only, and shells around balls, where all distances are about equal.
"""

import dataclasses

import numpy as np
from medpy.metric import binary
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, shift

from benchmarks.timing import scans, side_by_side, table
from evaluation.metrics import segmentation_metrics
from utils.errors import run
from utils.options import option, read_flags

Pair = tuple[NDArray[np.bool_], NDArray[np.bool_]]


@dataclasses.dataclass
class Options:
    """Options of the benchmark."""

    data: str = option("", "folder of the data set (default data/la, else phantoms)")
    scans: int = option(6, "number of test scans", minimum=1)
    side: int = option(96, "side of the worst masks", minimum=16)
    rounds: int = option(5, "timed repeats", minimum=1)


def by_medpy(a: NDArray, b: NDArray) -> tuple[float, ...]:
    """medpy's metrics, as in the papers' test scripts."""
    return binary.dc(a, b), binary.jc(a, b), binary.asd(a, b), binary.hd95(a, b)


def segmented(label: NDArray, seed: int) -> NDArray[np.bool_]:
    """A label (W,H,D) -> a mask like a network's prediction: rough, slightly moved, with some islands."""
    rng = np.random.default_rng(seed)
    noise = gaussian_filter(rng.standard_normal(label.shape, dtype=np.float32), 3)
    return shift(gaussian_filter(label.astype(np.float32), 2), rng.uniform(-2, 2, 3), order=1) + 4 * noise > 0.5


def worst(side: int) -> dict[str, Pair]:
    """Masks with sides of `side` voxels on which one of the algorithms is slow."""
    rng, shape = np.random.default_rng(0), (side, side, side)
    squares = ((np.indices(shape) - side / 2) ** 2).sum(0)

    def shell(inner: float, outer: float) -> NDArray[np.bool_]:
        return (squares >= (inner * side) ** 2) & (squares <= (outer * side) ** 2)

    return {
        "speckle, half": (rng.random(shape) < 0.5, rng.random(shape) < 0.5),
        "speckle, 2 %": (rng.random(shape) < 0.02, rng.random(shape) < 0.02),
        "full volume": (np.ones(shape, bool), np.ones(shape, bool)),
        "full volume and a ball": (np.ones(shape, bool), shell(0, 0.12)),
        "shell around a ball": (shell(0.45, 0.47), shell(0, 0.16)),
        "ball in a ball": (shell(0, 0.2), shell(0, 0.47)),
        "opposite corners": (np.indices(shape).max(0) < side // 6, np.indices(shape).min(0) > side - side // 6),
    }


def main(argv: list[str] | None = None) -> None:
    o: Options = read_flags(Options, __doc__, "python -m benchmarks.metrics", argv)
    pairs = [(segmented(label, i), label > 0) for i, (_, _, label) in enumerate(scans(o.data, o.scans))]
    groups: dict[str, list[Pair]] = {f"segmentations of {len(pairs)} scans": pairs}
    groups |= {name: [pair] for name, pair in worst(o.side).items()}
    rows = []
    for name, group in groups.items():
        forms = {
            "medpy": lambda group=group: [by_medpy(*pair) for pair in group],
            "ours": lambda group=group: [tuple(segmentation_metrics(*pair).values()) for pair in group],
        }
        timings, equal = side_by_side(forms, rounds=o.rounds), forms["medpy"]() == forms["ours"]()
        times = [1000 * t.seconds / len(group) for t in timings.values()]
        peaks = [t.peak_mib for t in timings.values()]
        rows.append([name, *times, timings["ours"].ratio, *peaks, "yes" if equal else "NO"])
    print(f"One thread, {o.rounds} rounds.\n")
    print(table(["masks", "medpy ms", "ours ms", "times as fast", "medpy MiB", "ours MiB", "equal bit for bit"], rows))


if __name__ == "__main__":
    run(main)
