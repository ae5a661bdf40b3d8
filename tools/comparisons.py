"""The comparisons of the rows of tools/reproduce.py's tables, over the seeds that two rows have in common."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluation.rows import mean_over, read_row
from evaluation.statistics import Comparison, compare, compare_scans, holm, interval_text, pairs_text
from tools.formats import Cell, Column, Line, Table
from tools.grid import ALL_LABELED, COMPARED_WITH, Row, Tables

Records = dict[int, Path]  # seed: folder
COLUMNS = [
    Column("row", "row"), Column("labeled / unlabeled", "scans"), Column("difference", "difference"),
    Column("95 % interval", "interval"), Column("over", "over"), Column("median of the scans", "median"),
    Column("higher in", "higher"), Column("seeds", "seeds"), Column("recipe", "recipe"),
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two rows compared by their Dice in points, without a filter, over the seeds that both have. `median` is the
    Hodges-Lehmann median of the scans' differences, after a mean over the seeds."""

    row: Row
    comparison: Comparison
    median: float
    seeds: list[int]


def compared(row: Row, records: Records, usual: Row, usual_records: Records) -> Pair | None:
    """A row compared with a reference row; None without a common seed, if they were tested on different scans, or if
    no scan has a Dice in both."""
    shared = [seed for seed in records if seed in usual_records]
    reference, ours = (
        {seed: points(f"{folders[seed]}:{output}") for seed in shared}
        for folders, output in ((usual_records, usual.output), (records, row.output))
    )
    runs = [*reference.values(), *ours.values()]
    if len({frozenset(scans) for scans in runs}) != 1:
        return None
    if not any(all(math.isfinite(scans[case]) for scans in runs) for case in runs[0]):
        return None
    median = compare_scans(mean_over(reference), mean_over(ours)).median
    return Pair(row, compare(reference, ours, most=100), median, shared)


def points(where: str) -> dict[str, float]:
    """Case -> Dice in per cent."""
    return {case: 100 * value for case, value in read_row(where, "dice", "all").items()}


def comparisons(tables: Tables, done: dict[str, Records]) -> dict[Row, list[Pair]]:
    """Reference row -> the rows of its tables that are compared with it, with as many labeled scans or all.

    Two rows are compared once, even if several tables have both. A label is that of the last table."""
    last = {(row.key, row.output): row for _, rows in tables.values() for row in rows}
    pairs_of: dict[Row, list[Pair]] = {}
    seen: set[frozenset[tuple[str, str]]] = set()
    for name, (_, rows) in tables.items():
        references = {where if ":" in where else f"{where}:seg" for where in COMPARED_WITH.get(name, [])}
        for usual in [row for row in rows if f"{row.key}:{row.output}" in references]:
            for row in rows:
                names = frozenset([(row.key, row.output), (usual.key, usual.output)])
                if len(names) < 2 or names in seen or row.labeled not in (usual.labeled, *ALL_LABELED):
                    continue
                seen.add(names)
                one, other = (last[side.key, side.output] for side in (usual, row))
                pair = compared(other, done.get(other.key, {}), one, done.get(one.key, {}))
                if pair:
                    pairs_of.setdefault(one, []).append(pair)
    return pairs_of


def comparison_tables(pairs_of: Mapping[Row, Sequence[Pair]], recipes: Mapping[str, str]) -> list[Table]:
    """A table for each row that others are compared with, by `comparisons`; Holm's correction is over all of them.
    `recipes`, key -> text of its training settings, tell rows of one label apart.
    """
    corrected = iter(holm([pair.comparison.p for pairs in pairs_of.values() for pair in pairs]))
    tables = []
    for usual, pairs in pairs_of.items():
        lines = []
        for pair, p in zip(pairs, corrected, strict=False):
            c, seeds = pair.comparison, ", ".join(map(str, pair.seeds))
            lines.append(Line([
                Cell(pair.row.label), scans_cell(pair.row), Cell(f"{c.difference:+.2f}", {"difference": c.difference}),
                Cell(interval_text(c, 2), {"low": c.low, "high": c.high}), Cell(c.over),
                Cell(f"{pair.median:+.2f}", {"median": pair.median}),
                Cell(pairs_text(c, p), {"higher": c.higher, "pairs": c.pairs, "p": c.p, "p_holm": p}), Cell(seeds),
                Cell(recipes[pair.row.key]),
            ]))  # fmt: skip
        name, recipe = f"{usual.label}, {usual.scans}", recipes[usual.key]
        more = {"reference": name, "reference_recipe": recipe}
        tables.append(Table("comparisons", f"Against *{name}* ({recipe}):", COLUMNS, lines, more))
    return tables


def scans_cell(row: Row) -> Cell:
    """Its labeled / unlabeled scans."""
    labeled, unlabeled = map(int, row.scans.split(" / "))
    return Cell(row.scans, {"labeled": labeled, "unlabeled": unlabeled})
