"""The rows of tools/reproduce.py's tables as Markdown, from the records of a row's runs."""

import csv
import dataclasses
import itertools
import json
import math
import statistics
from pathlib import Path

from evaluation.metrics import COMPONENTS, METRICS, distance_text, distances_of, mean_and_sd, mean_text, overlap_text
from evaluation.predictions import read_scores
from evaluation.rows import mean_over, read_row, rows_of
from evaluation.statistics import Comparison, compare, compare_scans, holm, interval_text, pairs_text
from tools.grid import ALL_LABELED, COMPARED_WITH, Row, Tables
from utils.run_folder import MANIFEST, SCALARS

Records = dict[int, Path]  # seed: folder
LIVE = "live_gradient/sdm"  # a column of scalars.csv
HEAD = "| row | labeled / unlabeled | | Dice % | Jaccard % | ASD voxel | 95HD voxel | runs |"
BEYOND_HEAD = (
    "| row | labeled / unlabeled | M_s Dice % | M_d Dice % | mean Dice % | mean 95HD | mean Dice above the paper's, of "
    "the same seeds (95 % interval, what it is over) | runs |"
)
GAIN = "gain from the unlabeled scans"
COMPARED_HEAD = (
    "| row | labeled / unlabeled | difference | 95 % interval | over | median of the scans | higher in | seeds |"
)
RUNS_HEAD = "| run | output | component | scans | Dice % | median | Jaccard % | ASD voxel | 95HD voxel | training |"
LIVE_HEAD = "| run | k | live voxels, mean % | lowest % | iterations with none | M_d Dice % |"
PHANTOM_HEAD = "| method | Dice % (all) | Dice % (largest) | iterations/s | peak memory GiB |"


def ruled(head: str) -> str:
    """A table's head with the line of dashes below it."""
    return f"{head}\n|{'---|' * (head.count('|') - 1)}"


def runs_text(records: Records) -> str:
    """How many runs, and their seeds."""
    return f"{len(records)}: {', '.join(map(str, records))}"


def figures(row: Row, component: str, records: Records) -> list[str]:
    """The four figures of a row: the mean over its runs of their means over the scans, from three runs on with ± SD.

    The number after a distance says how many scans of all runs have one."""
    runs = [rows_of(f"{path}:{row.output}", component) for path in records.values()]
    cells = [mean_text([100 * mean_and_sd([scan[name] for scan in run])[0] for run in runs]) for name in METRICS[:2]]
    return cells + [distance_text([distances_of(run, name) for run in runs], over_runs=True) for name in METRICS[2:]]


def row_lines(row: Row, records: Records) -> str:
    """The paper's figures, if it gives them, then ours without and with the component filter."""
    lines = [f"paper | {' | '.join(row.paper.split())} | |"] if row.paper else []
    for component in COMPONENTS if records else ():
        lines.append(f"{component} | {' | '.join(figures(row, component, records))} | {runs_text(records)} |")
    lines += [] if records else ["not yet run | | | | | |"]
    return "\n| | | ".join([f"| {row.label} | {row.scans} | {lines[0]}", *lines[1:]])


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two rows compared by their Dice in points, without a filter, over the seeds that both have. `median` is the
    Hodges-Lehmann median of the scans' differences, after a mean over the seeds."""

    row: Row
    comparison: Comparison
    median: float
    seeds: list[int]


def compared(row: Row, records: Records, usual: Row, usual_records: Records) -> Pair | None:
    """A row compared with a reference row; None without a common seed, or if they were tested on different scans."""
    shared = [seed for seed in records if seed in usual_records]
    reference, ours = (
        {seed: points(f"{folders[seed]}:{output}") for seed in shared}
        for folders, output in ((usual_records, usual.output), (records, row.output))
    )
    if len({frozenset(scans) for scans in (*reference.values(), *ours.values())}) != 1:
        return None
    median = compare_scans(mean_over(reference), mean_over(ours)).median
    return Pair(row, compare(reference, ours, most=100), median, shared)


def points(where: str) -> dict[str, float]:
    """Case -> Dice in per cent."""
    return {case: 100 * value for case, value in read_row(where, "dice", "all").items()}


def labeled_of(row: Row) -> str:
    """Its number of labeled scans."""
    return row.scans.split(" / ")[0]


def comparisons(tables: Tables, done: dict[str, Records]) -> dict[str, list[Pair]]:
    """Label of a reference row -> the rows of its tables that are compared with it, with as many labeled scans or all.

    Two rows are compared once, even if several tables have both. The label is that of the last table."""
    last = {(row.key, row.output): row for _, rows in tables.values() for row in rows}
    pairs_of: dict[str, list[Pair]] = {}
    seen: set[frozenset[tuple[str, str]]] = set()
    for name, (_, rows) in tables.items():
        references = {where if ":" in where else f"{where}:seg" for where in COMPARED_WITH.get(name, [])}
        for usual in [row for row in rows if f"{row.key}:{row.output}" in references]:
            for row in rows:
                names = frozenset([(row.key, row.output), (usual.key, usual.output)])
                if len(names) < 2 or names in seen or labeled_of(row) not in (labeled_of(usual), *ALL_LABELED):
                    continue
                seen.add(names)
                one, other = (last[side.key, side.output] for side in (usual, row))
                pair = compared(other, done.get(other.key, {}), one, done.get(one.key, {}))
                if pair:
                    pairs_of.setdefault(f"{one.label}, {one.scans}", []).append(pair)
    return pairs_of


def comparison_tables(pairs_of: dict[str, list[Pair]]) -> str:
    """A table for each row that others are compared with; Holm's correction is over all of them."""
    corrected = iter(holm([pair.comparison.p for pairs in pairs_of.values() for pair in pairs]))
    text = ""
    for usual, pairs in pairs_of.items():
        text += f"\nAgainst *{usual}*:\n\n{ruled(COMPARED_HEAD)}\n"
        for pair, p in zip(pairs, corrected, strict=False):
            c = pair.comparison
            cells = [pair.row.label, pair.row.scans, f"{c.difference:+.2f}", interval_text(c, 2), c.over]
            cells += [f"{pair.median:+.2f}", pairs_text(c, p), ", ".join(map(str, pair.seeds))]
            text += f"| {' | '.join(cells)} |\n"
    return text


def glance_table(rows: list[Row], done: dict[str, Records]) -> str:
    """Dice without a component filter: a line for each number of labeled scans, a column for each label of a row.

    A cell has the mean over the runs, from three on with SD, and their number; the best of a line is bold. The gain of
    a row with `alone` stands at the end of its line."""
    columns = list(dict.fromkeys(row.label for row in rows))
    lines = [ruled(f"| labeled scans | {' | '.join(columns)} | {GAIN} |")]
    for labeled in dict.fromkeys(labeled_of(row) for row in rows):
        line = {row.label: row for row in rows if labeled_of(row) == labeled}
        dices = {label: figures(row, "all", done[row.key])[0] for label, row in line.items() if done.get(row.key)}
        best = max((float(dice.split()[0]) for dice in dices.values()), default=math.nan)
        cells, gain = [labeled], ""
        for label in columns:
            dice = dices.get(label, "")
            if dice and len(dices) > 1 and float(dice.split()[0]) == best:
                dice = f"**{dice}**"
            waits = "not yet run" if label in line else ""
            cells.append(f"{dice} ({len(done[line[label].key])})" if dice else waits)
        for row in line.values():
            usual = row._replace(key=row.alone)
            pair = compared(row, done.get(row.key, {}), usual, done.get(row.alone, {})) if row.alone else None
            if pair:
                c, runs = pair.comparison, len(pair.seeds)
                gain = f"{c.difference:+.2f} ({interval_text(c, 2)}, {runs} run{'s' if runs > 1 else ''} each)"
        cells.append(gain.replace("-", "\N{MINUS SIGN}"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines).replace("|  |", "| |").replace("|  |", "| |")


def beyond_line(row: Row, records: Records, usual: Records) -> str:
    """Dice of M_s, of M_d and of their mean, and the gain of that mean over the runs as in the paper of the same seeds.

    A row of moving averages gives theirs."""
    if not records:
        return f"| {row.label} | {row.scans} | not yet run | | | | | |"
    prefix = row.output.removesuffix("seg")
    cells = [figures(row._replace(output=prefix + name), "all", records) for name in ("seg", "sdm", "mean")]
    above = "-"
    if records != usual or prefix:
        pair = compared(row._replace(output=f"{prefix}mean"), records, row._replace(output="mean"), usual)
        if pair:
            above = f"{pair.comparison.difference:+.2f} ({interval_text(pair.comparison, 2)}; {pair.comparison.over})"
    dice = " | ".join(cell[0] for cell in cells)
    return f"| {row.label} | {row.scans} | {dice} | {cells[2][3]} | {above} | {runs_text(records)} |"


def run_lines(record: Path) -> str:
    """Every output of one run, mean ± SD over its scans; its training time, hardware and commit.

    A run that was resumed elsewhere names all devices, threads and commits. The number after a distance says how many
    scans have one.
    """
    manifest = json.loads((record / MANIFEST).read_text(encoding="utf-8"))
    outputs = dict.fromkeys(row["output"] for row in read_scores(record))
    parts = [manifest, *manifest.get("resumed", [])]
    device, threads, commit = (
        " and ".join(dict.fromkeys(str(part[name])[:length] for part in parts if name in part))
        for name, length in (("device", None), ("threads", None), ("commit", 7))
    )
    made = f"{manifest.get('wall_s', math.nan) / 60:.0f} min, {device}, threads: {threads}, {commit}"
    lines = []
    for output, component in itertools.product(outputs, COMPONENTS):
        scans = rows_of(f"{record}:{output}", component)
        dice = [100 * scan["dice"] for scan in scans if not math.isnan(scan["dice"])]
        cells = [str(len(scans)), overlap_text(scans, "dice"), f"{statistics.median(dice):.2f}" if dice else "-"]
        cells += [overlap_text(scans, "jaccard"), *(distance_text([distances_of(scans, m)]) for m in METRICS[2:])]
        lines.append(f"{output} | {component} | {' | '.join(cells)} |")
    return "\n| | ".join(
        [f"| [{record.name}]({record.name}) | {lines[0]} {made} |", *(f"{line} |" for line in lines[1:])]
    )


def live_line(record: Path) -> str:
    """The share of voxels through which M_d of a run learned, and its Dice; '' if the run did not log the share."""
    with open(record / SCALARS, newline="", encoding="utf-8") as f:
        live = [float(row[LIVE]) for row in csv.DictReader(f) if LIVE in row]
    if not live:
        return ""
    options = json.loads((record / MANIFEST).read_text(encoding="utf-8"))["options"]
    dice = mean_text([100 * value for value in read_row(f"{record}:sdm", "dice", "all").values()])
    cells = [f"{options['k']:g}", f"{100 * statistics.mean(live):.3f}", f"{100 * min(live):.3f}"]
    cells += [f"{live.count(0)} of {len(live)}", dice]
    return f"| [{record.name}]({record.name}) | {' | '.join(cells)} |"


def phantom_line(row: Row, records: Records) -> str:
    """Dice and cost."""
    if not records:
        return f"| {row.label} | not yet run | | | |"
    cells = [figures(row, component, records)[0] for component in COMPONENTS]
    manifests = [json.loads((path / MANIFEST).read_text(encoding="utf-8")) for path in records.values()]
    cells += [mean_text([m.get(name, math.nan) for m in manifests]) for name in ("iterations_per_s", "peak_memory_gib")]
    return f"| {row.label} | {' | '.join(cells)} |"
