"""The table of a data set: what its cases are like, compared with LA."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dataloaders.findings import LA, LA_SIDES, Facts, memory_gib
from utils.text import markdown_table

INTENSITIES = {"mean": "mean", "sd": "standard deviation", "p1": "1st percentile", "p99": "99th percentile"}
"""Attribute of `Facts` -> name of its row."""


def volumes_ml(facts: Facts) -> dict[int, float]:
    """Class -> its size in ml; {} without a spacing."""
    if facts.spacing is None:
        return {}
    return {c: n * float(np.prod(facts.spacing)) / 1000 for c, n in (facts.voxels or {}).items()}


def table(groups: dict[str, list[Facts]], classes: int, names: Mapping[int, str], channel_names: Sequence[str]) -> str:
    """Markdown: what each group (list -> facts of its cases) is like, and LA. Classes without a name, and channels
    where not all have one, are numbered.
    """
    channels = max((x.channels for group in groups.values() for x in group), default=1)

    def span(values: Iterable[float]) -> str:
        numbers = list(values)
        if not numbers:
            return ""
        low, high = f"{min(numbers):.3g}", f"{max(numbers):.3g}"
        return low if low == high else f"{low} to {high}"

    def sides(group: list[Facts]) -> str:
        ends = ["x".join(str(pick(s)) for s in zip(*(x.shape for x in group), strict=True)) for pick in (min, max)]
        return " to ".join(dict.fromkeys(ends))

    def column(group: list[Facts]) -> list[str]:
        if not group:
            return ["0"] + [""] * (3 + len(INTENSITIES) * channels + 2 * classes)
        sized = [x for x in group if x.voxels]
        spacings = [x.spacing for x in group if x.spacing]
        mm = " x ".join(span(axis) for axis in zip(*spacings, strict=True))
        cells = [str(len(group)), sides(group), mm]
        for channel in range(channels):
            having = [x.of_channel(channel) for x in group if channel < x.channels]
            cells += [span(round(getattr(x, name), 3) + 0.0 for x in having) for name in INTENSITIES]
        for c in range(1, classes + 1):
            cells += [span(100 * x.voxels[c] / np.prod(x.shape) for x in sized if x.voxels and c in x.voxels)]
            cells += [span(volumes_ml(x)[c] for x in sized if c in volumes_ml(x))]
        return [*cells, f"{memory_gib(group):.3g}"]

    rows = ["cases", "sides, voxels", "spacing, mm"]
    for channel in range(channels):
        called = channel_names[channel] if len(channel_names) == channels else f"channel {channel}"
        rows += [f"{called}, {text}" if channels > 1 else text for text in INTENSITIES.values()]
    for c in range(1, classes + 1):
        called = f"class {c} {names.get(c, '')}".rstrip()
        rows += [f"{called}, % of the voxels", f"{called}, ml"]
    rows.append("in memory, GiB")
    la = ["100", " to ".join("x".join(map(str, s)) for s in LA_SIDES), "0.625 x 0.625 x 0.625"]
    la += [span(LA[name]) for name in INTENSITIES] + [""] * (len(INTENSITIES) * (channels - 1))
    la += [span(100 * x for x in LA["share"]), span(LA["ml"]), *[""] * (2 * classes - 2), "1.13"]
    columns = [rows, *(column(group) for group in groups.values()), la]
    return markdown_table(["", *groups, "LA, all 100"], zip(*columns, strict=True))
