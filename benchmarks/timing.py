"""Several forms of one computation side by side: interleaved repeats, medians, peak memory, agreement; Markdown."""

import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dataloaders.cases import LA_FOLDER, find_cases, lists_of, read_case
from dataloaders.phantom import phantom

LA_SHAPE = (256, 208, 88)


class Timing(NamedTuple):
    """Of one form."""

    seconds: float
    """Median over the rounds."""
    ratio: float
    """How often faster than the first form: median of the rounds' ratios."""
    peak_mib: float
    """Most memory that it asked Python and numpy for at a time; what a library allocates by itself is not seen."""


def side_by_side(forms: Mapping[str, Callable[[], Any]], *, rounds: int) -> dict[str, Timing]:
    """Runs every form once a round, each round beginning with another one, after a first run that is not timed."""
    names = list(forms)
    peaks = {}
    for name in names:
        tracemalloc.start()
        forms[name]()
        peaks[name] = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            began = time.perf_counter()
            forms[name]()
            seconds[name].append(time.perf_counter() - began)
    return {
        name: Timing(
            statistics.median(mine),
            statistics.median(a / b for a, b in zip(seconds[names[0]], mine, strict=True)),
            peaks[name],
        )
        for name, mine in seconds.items()
    }


def digits(x: Any) -> str:
    """Three digits of a float; anything else as it is."""
    if not isinstance(x, float):
        return str(x)
    if x and not 1e-3 <= abs(x) < 1e9:
        return f"{x:.2g}"
    return np.format_float_positional(x, precision=3, unique=False, fractional=False, trim="-")


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown."""
    cells = [[digits(x) for x in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(head), ["---"] * len(head), *cells])


def scans(folder: str, count: int) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.uint8]]]:
    """Name, image and label of the first test scans of a data set; phantoms of LA's size if there is none."""
    if folder or LA_FOLDER.is_dir():
        where = Path(folder or LA_FOLDER)
        cases, _ = find_cases(where, lists_of(where)[1][:count], labeled=True)
        for case in cases:
            image, label = read_case(case)
            assert label is not None
            yield case.name, image, label
    else:
        for i in range(count):
            image, label = phantom(0, i, LA_SHAPE)
            yield f"phantom {i}", image.astype(np.float32), label.astype(np.uint8)
