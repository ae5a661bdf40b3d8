"""The rows of tools/reproduce.py's tables, from the records of a row's runs."""

import csv
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.metrics import (
    COMPONENTS,
    METRICS,
    averaged,
    counts_of,
    distance_text,
    distances_of,
    mean_and_sd,
    mean_text,
    overlap_text,
)
from evaluation.predictions import read_scores
from evaluation.rows import read_row, rows_of
from evaluation.statistics import interval_text
from tools.comparisons import Records, compared, scans_cell
from tools.formats import Cell, Column, Line, Table, first_number
from tools.grid import Row
from utils.run_folder import MANIFEST, SCALARS, read_json

LIVE = "live_gradient/sdm"  # a column of scalars.csv
WAITS = Cell("not yet run", {"runs": 0})
BLANK = Cell("")
ROW = [Column("row", "row"), Column("labeled / unlabeled", "scans")]
FIGURES = [
    Column("Dice %", "dice", 1), Column("Jaccard %", "jaccard", 1), Column("ASD voxel", "asd", -1),
    Column("95HD voxel", "hd95", -1),
]  # fmt: skip
RUNS = Column("runs", "runs")
COLUMNS = [*ROW, Column("", "component"), *FIGURES, RUNS, Column("recipe", "recipe")]
METHOD_COLUMNS = [
    *ROW, Column("recipe", "recipe"), *FIGURES, Column("rank", "rank"), Column("cost", "cost", -1), RUNS,
]  # fmt: skip
GAIN = "mean Dice above the paper's, of the same seeds (95 % interval, what it is over)"
BEYOND_COLUMNS = [
    *ROW, Column("M_s Dice %", "dice_seg", 1), Column("M_d Dice %", "dice_sdm", 1),
    Column("mean Dice %", "dice_mean", 1), Column("mean 95HD", "hd95_mean", -1), Column(GAIN, "gain"), RUNS,
]  # fmt: skip
PHANTOM_COLUMNS = [
    Column("method", "row"), Column("Dice % (all)", "dice", 1), Column("Dice % (largest)", "dice_largest", 1),
    Column("iterations/s", "iterations_per_s", 1), Column("peak memory GiB", "peak_memory_gib", -1),
]  # fmt: skip
RUN_COLUMNS = [
    Column("run", "run"), Column("output", "output"), Column("component", "component"), Column("scans", "scans"),
    FIGURES[0], Column("median", "median"), *FIGURES[1:], Column("training", "training"),
]  # fmt: skip
LIVE_COLUMNS = [
    Column("run", "run"), Column("k", "k"), Column("live voxels, mean %", "live"),
    Column("lowest %", "lowest"), Column("iterations with none", "dead"), Column("M_d Dice %", "dice"),
]  # fmt: skip
UNLABELED_GAIN = "gain from the unlabeled scans"


def mean_cell(values: Sequence[float], name: str) -> Cell:
    """A mean, with its SD from three values on."""
    mean, sd = mean_and_sd(values)
    return Cell(mean_text(values), {name: mean, f"{name}_sd": sd})


def runs_cell(records: Records) -> Cell:
    """How many runs, and their seeds."""
    seeds = ", ".join(map(str, records))
    return Cell(f"{len(records)}: {seeds}", {"runs": len(records), "seeds": seeds})


def figures(row: Row, component: str, records: Records) -> list[Cell]:
    """The four figures of a row: the mean over its runs of their means over the scans, from three runs on with ± SD.

    Where scans lack one, the number after it says how many of all runs' have one."""
    runs = [rows_of(f"{path}:{row.output}", component) for path in records.values()]
    cells = [overlap_cell(runs, name) for name in METRICS[:2]]
    return cells + [distance_cell(runs, name, over_runs=True) for name in METRICS[2:]]


def overlap_cell(runs: Sequence[Sequence[Mapping[str, Any]]], name: str) -> Cell:
    """Dice or Jaccard: mean over the runs of their means over the scans. A scan has none if both masks are empty."""
    cell = mean_cell([100 * mean_and_sd([scan[name] for scan in run])[0] for run in runs], name)
    values = [scan[name] for run in runs for scan in run]
    count = sum(not math.isnan(value) for value in values)
    return cell if count == len(values) else cell._replace(text=f"{cell.text} ({count} of {len(values)})")


def distance_cell(runs: Sequence[Sequence[Mapping[str, Any]]], name: str, *, over_runs: bool) -> Cell:
    """A distance of several runs, or of one run's scans, as `distance_text` has it."""
    each = [distances_of(run, name) for run in runs]
    mean, sd = mean_and_sd(averaged(each, over_runs=over_runs))
    measured, _, scans = (sum(counts) for counts in zip(*map(counts_of, each), strict=True))
    numbers = {name: mean, f"{name}_sd": sd, f"{name}_scans": measured, f"{name}_of": scans}
    numbers |= {f"{name}_not_penalised": sum(run.unknown for run in each)}
    return Cell(distance_text(each, over_runs=over_runs), numbers)


def row_lines(row: Row, records: Records, recipe: str) -> list[Line]:
    """The paper's figures, if it gives them, then ours without and with the component filter."""
    quoted = [Cell(figure, {c.name: float(figure)}) for figure, c in zip(row.paper.split(), FIGURES, strict=False)]
    lines = [(Cell("paper"), *quoted, BLANK, BLANK)] if row.paper else []
    for component in COMPONENTS if records else ():
        lines.append((Cell(component), *figures(row, component, records), runs_cell(records), Cell(recipe)))
    lines += [] if records else [(WAITS, *[BLANK] * 5, Cell(recipe))]
    groups = [f"{row.labeled} {cells[0].text}" if cells[0].text in COMPONENTS else "" for cells in lines]
    return [
        Line([Cell(row.label), scans_cell(row), *cells], same=2 if i else 0, group=group)
        for i, (cells, group) in enumerate(zip(lines, groups, strict=True))
    ]


def method_lines(
    rows: Sequence[Row], done: Mapping[str, Records], recipes: Mapping[str, str], costs: Mapping[str, float]
) -> list[Line]:
    """A line for each method, without a component filter, and its rank by Dice among those with as many labels.
    `recipes` are texts of the training settings, `costs` the times of an iteration, that of the V-Net being 1, where
    they were measured; both by key, as `done`.
    """
    scored = {row: figures(row, "all", done[row.key]) for row in rows if done.get(row.key)}
    lines = []
    for row in rows:
        cost = costs.get(row.key, math.nan)
        cells = [Cell(row.label), scans_cell(row), Cell(recipes[row.key])]
        paid = Cell("-" if math.isnan(cost) else f"{cost:.2f}", {"cost": cost})
        if row not in scored:
            lines.append(Line([*cells, WAITS, *[BLANK] * 4, paid, BLANK]))
            continue
        found = [first_number(figure[0]) for other, figure in scored.items() if other.labeled == row.labeled]
        dices, ours = [dice for dice in found if not math.isnan(dice)], first_number(scored[row][0])
        rank = 1 + sum(dice > ours for dice in dices)
        place = Cell(f"{rank} of {len(dices)}", {"rank": rank, "ranked": len(dices)})
        place = place if len(dices) > 1 and not math.isnan(ours) else Cell("-")
        cells += [*scored[row], place, paid]
        lines.append(Line([*cells, runs_cell(done[row.key])], group=str(row.labeled)))
    return lines


def glance_table(rows: list[Row], done: Mapping[str, Records]) -> Table:
    """Dice without a component filter: a line for each number of labeled scans, a column for each label of a row.

    A cell has the mean over the runs, from three on with SD, and their number; the best of a line is bold. The gain of
    a row with `alone` stands at the end of its line."""
    labels = list(dict.fromkeys(row.label for row in rows))
    lines = []
    for labeled in dict.fromkeys(row.labeled for row in rows):
        line = {row.label: row for row in rows if row.labeled == labeled}
        dices = {label: figures(row, "all", done[row.key])[0] for label, row in line.items() if done.get(row.key)}
        shown = {label: round(first_number(dice), 2) for label, dice in dices.items()}  # NaN: all masks are empty
        best = max((dice for dice in shown.values() if not math.isnan(dice)), default=math.nan)
        cells, gain = [Cell(str(labeled), {"labeled": labeled})], BLANK
        for label in labels:
            if label not in dices:
                cells.append(Cell("not yet run" if label in line else ""))
                continue
            text, runs = dices[label].text, len(done[line[label].key])
            text = f"**{text}**" if len(dices) > 1 and shown[label] == best else text
            mean, sd = dices[label].numbers.values()
            cells.append(Cell(f"{text} ({runs})", {label: mean, f"{label}: SD": sd, f"{label}: runs": runs}))
        for row in line.values():
            usual = row._replace(key=row.alone)
            pair = compared(row, done.get(row.key, {}), usual, done.get(row.alone, {})) if row.alone else None
            if pair:
                c, runs = pair.comparison, len(pair.seeds)
                text = f"{c.difference:+.2f} ({interval_text(c, 2)}, {runs} run{'s' if runs > 1 else ''} each)"
                numbers = {"gain": c.difference, "gain_low": c.low, "gain_high": c.high, "gain_runs": runs}
                gain = Cell(text.replace("-", "\N{MINUS SIGN}"), numbers)
        lines.append(Line([*cells, gain]))
    columns = [Column("labeled scans", "labeled"), *(Column(label, label) for label in labels)]
    return Table("glance", "Results at a glance", [*columns, Column(UNLABELED_GAIN, "gain")], lines)


def beyond_line(row: Row, records: Records, usual: Records) -> Line:
    """Dice of M_s, of M_d and of their mean, and the gain of that mean over the runs as in the paper of the same seeds.

    A row of moving averages gives theirs."""
    begins = [Cell(row.label), scans_cell(row)]
    if not records:
        return Line([*begins, WAITS, *[BLANK] * 5])
    prefix = row.output.removesuffix("seg")
    cells = [figures(row._replace(output=prefix + name), "all", records) for name in ("seg", "sdm", "mean")]
    above = Cell("-", {"gain": math.nan})
    if records != usual or prefix:
        pair = compared(row._replace(output=f"{prefix}mean"), records, row._replace(output="mean"), usual)
        if pair:
            c = pair.comparison
            text = f"{c.difference:+.2f} ({interval_text(c, 2)}; {c.over})"
            above = Cell(text, {"gain": c.difference, "low": c.low, "high": c.high})
    dice = [suffixed(cell[0], name) for cell, name in zip(cells, ("seg", "sdm", "mean"), strict=True)]
    return Line([*begins, *dice, suffixed(cells[2][3], "mean"), above, runs_cell(records)], group="all")


def suffixed(cell: Cell, suffix: str) -> Cell:
    """The cell with other names of its numbers: dice and dice_sd -> dice_mean and dice_mean_sd."""
    first = next(iter(cell.numbers))
    return Cell(cell.text, {name.replace(first, f"{first}_{suffix}", 1): value for name, value in cell.numbers.items()})


def run_lines(record: Path) -> list[Line]:
    """Every output of one run, mean ± SD over its scans; its training time, hardware and commit.

    A run that was resumed elsewhere names all devices, threads and commits.
    """
    manifest = read_json(record / MANIFEST)
    outputs = dict.fromkeys(row["output"] for row in read_scores(record))
    parts = [manifest, *manifest.get("resumed", [])]
    device, threads, commit = (
        " and ".join(dict.fromkeys(str(part[name])[:length] for part in parts if name in part))
        for name, length in (("device", None), ("threads", None), ("commit", 7))
    )
    minutes = manifest.get("wall_s", math.nan) / 60
    made = {"minutes": minutes, "device": device, "threads": threads, "commit": commit}
    lines = []
    for i, (output, component) in enumerate(itertools.product(outputs, COMPONENTS)):
        scans = rows_of(f"{record}:{output}", component)
        dice = [100 * scan["dice"] for scan in scans if not math.isnan(scan["dice"])]
        median = statistics.median(dice) if dice else math.nan
        overlaps = [
            mean_cell([100 * scan[name] for scan in scans], name)._replace(text=overlap_text(scans, name))
            for name in METRICS[:2]
        ]
        cells = [Cell(output), Cell(component), Cell(str(len(scans)), {"scans": len(scans)}), overlaps[0]]
        cells += [Cell(f"{median:.2f}" if dice else "-", {"median": median}), overlaps[1]]
        cells += [distance_cell([scans], name, over_runs=False) for name in METRICS[2:]]
        text = "" if i else f"{minutes:.0f} min, {device}, threads: {threads}, {commit}"
        lines.append(Line([Cell(f"[{record.name}]({record.name})"), *cells, Cell(text, made)], same=1 if i else 0))
    return lines


def live_lines(record: Path) -> list[Line]:
    """The share of voxels through which M_d of a run learned, and its Dice; none if the run did not log the share."""
    with open(record / SCALARS, newline="", encoding="utf-8") as f:
        live = [float(row[LIVE]) for row in csv.DictReader(f) if LIVE in row]
    if not live:
        return []
    options = read_json(record / MANIFEST)["options"]
    dice = [100 * value for value in read_row(f"{record}:sdm", "dice", "all").values()]
    mean, least = 100 * statistics.mean(live), 100 * min(live)
    cells = [Cell(f"[{record.name}]({record.name})"), Cell(f"{options['k']:g}", {"k": options["k"]})]
    cells += [Cell(f"{mean:.3f}", {"live": mean}), Cell(f"{least:.3f}", {"lowest": least})]
    cells.append(Cell(f"{live.count(0)} of {len(live)}", {"dead": live.count(0), "logged": len(live)}))
    return [Line([*cells, mean_cell(dice, "dice")])]


def phantom_line(row: Row, records: Records) -> Line:
    """Dice and cost."""
    if not records:
        return Line([Cell(row.label), WAITS, *[BLANK] * 3])
    every, largest = (figures(row, component, records)[0] for component in COMPONENTS)
    manifests = [read_json(path / MANIFEST) for path in records.values()]
    cells = [mean_cell([m.get(name, math.nan) for m in manifests], name)
             for name in ("iterations_per_s", "peak_memory_gib")]  # fmt: skip
    return Line([Cell(row.label), every, suffixed(largest, "largest"), *cells], group=str(row.labeled))
