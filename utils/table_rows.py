"""The rows of reproduce.py's tables as Markdown, from the records of a row's runs."""

import csv
import itertools
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path

from utils.grid import ALL_LABELED, Row
from utils.metrics import COMPONENTS, METRICS, mean_and_sd
from utils.run_folder import MANIFEST
from utils.statistics import Comparison, compare, holm, mean_over, read_row

Records = dict[int, Path]  # seed: folder
HEAD = "| row | labeled / unlabeled | | Dice % | Jaccard % | ASD voxel | 95HD voxel | seeds |"
BEYOND_HEAD = (
    "| row | labeled / unlabeled | M_s Dice % | M_d Dice % | mean Dice % | mean 95HD | mean Dice above the paper's "
    "(95 % interval over the scans) | seeds |"
)
PAIRED = """
Paired tests against *{row}*: Dice, `all`, over the scans, each its mean over the seeds that both have; Holm's
correction is of Wilcoxon's p over these lines.

"""
PAIRED_HEAD = (
    "| row | labeled / unlabeled | difference | 95 % interval | higher on | t-test p | Wilcoxon p | Holm | seeds |"
)
RUNS_HEAD = "| run | output | component | Dice % | median | Jaccard % | ASD voxel | 95HD voxel | training |"
PHANTOM_HEAD = "| method | Dice % (all) | Dice % (largest) | iterations/s | peak memory GiB | lines of code |"


def ruled(head: str) -> str:
    """A table's head with the line of dashes below it."""
    return f"{head}\n|{'---|' * (head.count('|') - 1)}"


def with_sd(values: Iterable[float]) -> str:
    """The mean, and with two numbers or more ± their sample SD."""
    mean, sd, _ = mean_and_sd(list(values))
    return "-" if math.isnan(mean) else f"{mean:.2f}" + ("" if math.isnan(sd) else f" ± {sd:.2f}")


def figures(row: Row, component: str, records: Records) -> tuple[list[str], str]:
    """The four figures of a row, over the seeds' means over the scans, and how many scans the distances leave out."""
    cells, left_out = [], ""
    for metric in METRICS:
        scans = [list(read_row(f"{path}:{row.output}", metric, component).values()) for path in records.values()]
        found = [mean_and_sd(values) for values in scans]
        cells.append(with_sd((100 if metric in ("dice", "jaccard") else 1) * mean for mean, *_ in found))
        empty = sum(count for *_, count in found)
        if empty:
            left_out = f"; {empty} of {sum(map(len, scans))} predictions empty, without a distance"
    return cells, left_out


def row_lines(row: Row, records: Records) -> str:
    """The paper's figures if it has some, then ours without and with the component filter."""
    lines = [f"paper | {' | '.join(row.paper.split())} | |"] if row.paper else []
    for component in COMPONENTS if records else ():
        cells, left_out = figures(row, component, records)
        lines.append(f"{component} | {' | '.join(cells)} | {', '.join(map(str, records))}{left_out} |")
    lines += [] if records else ["not yet run | | | | | |"]
    return "\n| | | ".join([f"| {row.label} | {row.scans} | {lines[0]}", *lines[1:]])


def compared(row: Row, records: Records, usual: Row, usual_records: Records) -> tuple[Comparison, list[int]] | None:
    """A row's Dice in points, without a filter, beside the usual row's: each scan's mean over the seeds that both have,
    and these seeds; None if there are none, or not the same two scans and more in all."""
    shared = [seed for seed in records if seed in usual_records]
    sides = [
        [read_row(f"{folders[seed]}:{output}", "dice", "all") for seed in shared]
        for folders, output in ((usual_records, usual.output), (records, row.output))
    ]
    cases = {tuple(sorted(values)) for values in itertools.chain(*sides)}
    if len(cases) != 1 or len(*cases) < 2:
        return None
    reference, found = ({case: 100 * v for case, v in mean_over(side).items()} for side in sides)
    return compare(reference, found), shared


def labeled_of(row: Row) -> str:
    """Its number of labeled scans."""
    return row.scans.split(" / ")[0]


def paired_table(rows: list[Row], done: dict[str, Records], usual: Row) -> str:
    """The paired tests of a table's rows, of as many labeled scans or of all, against one of them, Holm's correction
    over these; nothing without a pair."""
    labels = {labeled_of(usual), str(ALL_LABELED)}
    others = [row for row in rows if (row.key, row.output) != (usual.key, usual.output) and labeled_of(row) in labels]
    others = list(dict.fromkeys(others))
    found = [(row, compared(row, done.get(row.key, {}), usual, done.get(usual.key, {}))) for row in others]
    tested = [(row, *pair) for row, pair in found if pair]
    lines = [
        f"| {row.label} | {row.scans} | {c.difference:+.2f} | {c.low:+.2f} to {c.high:+.2f} | {c.higher} of {c.n} | "
        f"{c.t_p:.2g} | {c.w_p:.2g} | {corrected:.2g} | {', '.join(map(str, seeds))} |"
        for (row, c, seeds), corrected in zip(tested, holm([c.w_p for _, c, _ in tested]), strict=True)
    ]
    title = PAIRED.format(row=f"{usual.label}, {usual.scans}")
    return title + "".join(f"{line}\n" for line in [ruled(PAIRED_HEAD), *lines]) if lines else ""


def beyond_line(row: Row, records: Records, usual: Records) -> str:
    """Dice of M_s, of M_d and of their mean, and how far that is above the mean's of the runs as in the paper, of the
    same seeds; moving averages' if the row is of them."""
    if not records:
        return f"| {row.label} | {row.scans} | not yet run | | | | | |"
    prefix = row.output.removesuffix("seg")
    cells = [figures(row._replace(output=prefix + name), "all", records)[0] for name in ("seg", "sdm", "mean")]
    above = "-"
    if records != usual or prefix:
        pair = compared(row._replace(output=f"{prefix}mean"), records, row._replace(output="mean"), usual)
        above = f"{pair[0].difference:+.2f} ({pair[0].low:+.2f} to {pair[0].high:+.2f})" if pair else above
    dice = " | ".join(cell[0] for cell in cells)
    return f"| {row.label} | {row.scans} | {dice} | {cells[2][3]} | {above} | {', '.join(map(str, records))} |"


def run_lines(record: Path) -> str:
    """Every output of one run, mean ± SD over the scans, and what it took to train, on which hardware, at which commit.

    A run that was resumed elsewhere or in another way names each. A count behind a distance is that of the scans that
    have one, where some predictions are empty.
    """
    manifest = json.loads((record / MANIFEST).read_text(encoding="utf-8"))
    with open(record / "cases.csv", newline="", encoding="utf-8") as f:
        outputs = dict.fromkeys(line["output"] for line in csv.DictReader(f))
    parts = [manifest, *manifest.get("resumed", [])]
    device, threads, commit = (
        " and ".join(dict.fromkeys(str(part[name])[:length] for part in parts if name in part))
        for name, length in (("device", None), ("threads", None), ("commit", 7))
    )
    made = f"{manifest.get('wall_s', math.nan) / 60:.0f} min, {device}, threads: {threads}, {commit}"
    lines = []
    for output, component in itertools.product(outputs, COMPONENTS):
        dice, jaccard, *distances = (
            list(read_row(f"{record}:{output}", metric, component).values()) for metric in METRICS
        )
        cells = [with_sd(100 * v for v in dice), f"{100 * statistics.median(dice):.2f}"]
        cells += [with_sd(100 * v for v in jaccard)]
        for values in distances:
            found = sum(not math.isnan(v) for v in values)
            cells.append(with_sd(values) + (f" ({found})" if found < len(values) else ""))
        lines.append(f"{output} | {component} | {' | '.join(cells)} |")
    return "\n| | ".join(
        [f"| [{record.name}]({record.name}) | {lines[0]} {made} |", *(f"{line} |" for line in lines[1:])]
    )


def phantom_line(row: Row, records: Records, length: int | str) -> str:
    """Dice, cost, and the length of the method's file in lines."""
    if not records:
        return f"| {row.label} | not yet run | | | | {length} |"
    cells = [figures(row, component, records)[0][0] for component in COMPONENTS]
    manifests = [json.loads((path / MANIFEST).read_text(encoding="utf-8")) for path in records.values()]
    cells += [with_sd(m.get(name, math.nan) for m in manifests) for name in ("iterations_per_s", "peak_memory_gib")]
    return f"| {row.label} | {' | '.join(cells)} | {length} |"
