"""Comparison of several forms of one computation: interleaved repeats, medians, peak memory, Markdown tables."""

import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dataloaders.cases import LA_FOLDER, Case, find_cases, has_label, read_case, together
from dataloaders.lists import lists_of
from dataloaders.normalization import NONE, Normalization, normalized, normalized_case
from dataloaders.phantom import make_phantom_set, phantom
from dataloaders.training import is_phantom
from utils.errors import UserError
from utils.text import markdown_table

LA_SHAPE = (256, 208, 88)


class Timing(NamedTuple):
    """Results of one form."""

    seconds: float
    """Median of the seconds over the rounds."""
    ratio: float
    """Speed relative to the first form: median of the ratios of the rounds."""
    peak_mib: float
    """Peak memory in MiB allocated by Python and numpy; allocations inside other libraries are not included."""


def side_by_side(forms: Mapping[str, Callable[[], Any]], *, rounds: int) -> dict[str, Timing]:
    """Runs every form once per round, each round starting with another form, after one untimed run."""
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
    """A float with three significant digits; str(x) of anything else."""
    if not isinstance(x, float):
        return str(x)
    if x and not 1e-3 <= abs(x) < 1e9:
        return f"{x:.2g}"
    return np.format_float_positional(x, precision=3, unique=False, fractional=False, trim="-")


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    return markdown_table(head, [[digits(x) for x in row] for row in rows])


def labeled_cases(folder: Path, count: int | None = None) -> list[Case]:
    """The cases of train.list that have a label, the first `count` of them if it is given. Makes the phantom set.

    Raises:
        UserError: if there are fewer, or a case has no file.
    """
    if is_phantom(folder):
        make_phantom_set(folder)
    cases, problems = find_cases(folder, lists_of(folder)[0], labeled=True)
    if problems:
        raise UserError("\n".join(together(problems)))
    cases = [case for case in cases if has_label(case.path, unreadable=True)][:count]
    if len(cases) < (count or 1):
        raise UserError(f"{folder}/train.list names {len(cases)} cases with a label; {count or 1} are needed.")
    return cases


def scans(
    folder: str, count: int, normalize: Normalization = NONE
) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.uint8]]]:
    """Yields name, scaled image and label (W,H,D) of the first test scans; phantoms of LA's size without a data set."""
    if folder or LA_FOLDER.is_dir():
        where = Path(folder or LA_FOLDER)
        cases, _ = find_cases(where, lists_of(where)[1][:count], labeled=True)
        for case in cases:
            image, label = read_case(case)
            assert label is not None
            yield case.name, normalized_case(case, image, normalize), label
    else:
        for i in range(count):
            image, label = phantom(0, i, LA_SHAPE)
            yield f"phantom {i}", normalized(image, normalize), label.astype(np.uint8)
