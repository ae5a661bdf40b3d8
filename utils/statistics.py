"""Whether two rows of a table differ: paired tests over the scans that both were tested on.

    python -m utils.statistics results/half/supervised-16-seed1337 results/half/dtml-16-seed1337:seg
    python -m utils.statistics 'results/half/supervised-best-16-seed*' 'results/half/best-16-seed*:mean'

compares every further row with the first. A row is a folder with cases.csv, or such a file, as test_la.py writes it;
`:NAME` after it chooses the output (default: the file's first). A path with a *, quoted, is all runs that match, such
as a row's seeds: the value of a scan is then its mean over them.
"""

import csv
import dataclasses
import glob
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from utils.drawing import Figure, FigureCanvasAgg
from utils.errors import UserError, run
from utils.metrics import COMPONENTS, METRICS
from utils.options import Parser, fill, option
from utils.run_folder import MOVED_ASIDE


@dataclasses.dataclass
class Options:
    """What to compare."""

    metric: str = option("dice", "column of cases.csv", choices=[*METRICS, "asd_mm", "hd95_mm"])
    component: str = option("all", "with (largest) or without (all) the component filter", choices=COMPONENTS)
    picture: str = option("", "PNG to write: each scan's value in both rows")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A row against the reference, over the n scans where both have a number.

    difference: mean of row - reference; low, high: its 95 % bootstrap interval (BCa, scipy); t_p: the paired t-test
    of the DTML paper; w_p: Wilcoxon's signed-rank test; higher: scans where the row's value is above the reference's.
    """

    n: int
    left_out: int
    mean: float
    reference: float
    difference: float
    low: float
    high: float
    t_p: float
    w_p: float
    higher: int


def read_row(where: str, metric: str, component: str) -> dict[str, float]:
    """Case -> value of one row, `where` being PATH or PATH:OUTPUT.

    Raises:
        UserError: a missing or foreign file, an output or component that is not in it, a case twice.
    """
    name, _, output = where.partition(":") if not Path(where).exists() else (where, "", "")
    path = Path(name) / "cases.csv" if Path(name).is_dir() else Path(name)
    try:
        with open(path, newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
        output = output or rows[0]["output"]
        rows = [row for row in rows if row.get("class", "mean") == "mean"]  # of several classes
        chosen = [row for row in rows if (row["output"], row["component"]) == (output, component)]
        values = {row["case"]: float(row[metric]) for row in chosen}
    except OSError as e:
        raise UserError(
            f"cannot read {path}: {e.strerror or e}. Give the cases.csv of test_la.py, or its folder."
        ) from e
    except (KeyError, IndexError, ValueError, TypeError) as e:
        raise UserError(f"{path} is no cases.csv of test_la.py ({e!r}). Test the run again.") from e
    if not values:
        known = ", ".join(dict.fromkeys(f"{row['output']} ({row['component']})" for row in rows))
        raise UserError(f"{path} has no output {output} ({component}). It has {known}.")
    if len(values) < len(chosen):
        raise UserError(f"{path} holds a case twice. Test the run again.")
    return values


def runs_of(where: str) -> list[str]:
    """The runs that a row is of: those that a path with a * matches, but for what --fresh moved aside; else the row as
    it is given.

    Raises:
        UserError: nothing matches.
    """
    if "*" not in where:
        return [where]
    pattern, colon, output = where.partition(":")
    found = sorted(path for path in glob.glob(pattern) if not MOVED_ASIDE.search(path))
    if not found:
        raise UserError(f"nothing matches {pattern}. Give folders with the cases.csv of test_la.py.")
    return [f"{path}{colon}{output}" for path in found]


def mean_over(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Case -> the mean of its values in several rows, those of a row's seeds.

    Raises:
        UserError: different sets of cases.
    """
    if any(row.keys() != rows[0].keys() for row in rows):
        raise UserError("the runs of one row are not of the same scans. Test them alike.")
    return {case: statistics.mean(row[case] for row in rows) for case in rows[0]}


def read_mean(where: str, metric: str, component: str) -> dict[str, float]:
    """As `read_row`, but of all runs of the row: each case its mean over them.

    Raises:
        UserError: as `runs_of`, `read_row` and `mean_over` do.
    """
    return mean_over([read_row(one, metric, component) for one in runs_of(where)])


def compare(reference: dict[str, float], row: dict[str, float]) -> Comparison:
    """Paired comparison of two rows, case -> value; scans without a number in one of them are left out and counted.

    Raises:
        UserError: different sets of cases, or fewer than two scans to compare.
    """
    if reference.keys() != row.keys():
        only = sorted(reference.keys() ^ row.keys())
        raise UserError(
            f"the rows are not of the same scans: {', '.join(only[:4])} stand in one alone. Test both alike."
        )
    a, b = (np.array([values[case] for case in reference]) for values in (reference, row))
    paired = np.isfinite(a) & np.isfinite(b)
    a, b = a[paired], b[paired]
    if len(a) < 2:
        raise UserError(f"only {len(a)} scans have a number in both rows, too few to compare.")
    d = b - a
    low, high, t_p, w_p = d.mean(), d.mean(), math.nan, 1.0
    if np.ptp(d) > 0:
        interval = stats.bootstrap((d,), np.mean, n_resamples=9999, rng=np.random.default_rng(0)).confidence_interval
        low, high, t_p = interval.low, interval.high, stats.ttest_rel(b, a).pvalue
    if d.any():
        w_p = stats.wilcoxon(b, a).pvalue
    return Comparison(
        n=len(a), left_out=int((~paired).sum()), mean=float(b.mean()), reference=float(a.mean()),
        difference=float(d.mean()), low=float(low), high=float(high), t_p=float(t_p), w_p=float(w_p),
        higher=int((d > 0).sum()),
    )  # fmt: skip


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction of several p-values: each times the number of those not below it, never falling."""
    corrected, largest = [math.nan] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected


def scatter(reference: dict[str, float], rows: dict[str, dict[str, float]], title: str, path: Path) -> None:
    """PNG of each scan's value: the reference's along x, each row's along y, and the line where both are equal."""
    figure = Figure(figsize=(5, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    everything = [v for values in (reference, *rows.values()) for v in values.values() if math.isfinite(v)]
    edge = 0.05 * (max(everything) - min(everything)) or 1
    limits = (min(everything) - edge, max(everything) + edge)
    axes.plot(limits, limits, color="0.7", linewidth=1)
    for name, values in rows.items():
        axes.scatter(list(reference.values()), [values[case] for case in reference], s=18, alpha=0.8, label=name)
    axes.set(xlim=limits, ylim=limits, aspect="equal", xlabel=title, ylabel="the others")
    axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_png(str(path))


def main(argv: list[str] | None = None) -> None:
    """Prints a Markdown table, a line per comparison."""
    parser = Parser(description=__doc__, prog="python -m utils.statistics")
    parser.add_argument("rows", nargs="+", metavar="ROW", help="the reference row, then the rows to compare with it")
    parser.add_dataclass(Options)
    given = parser.parse(argv)
    o: Options = fill(Options, given)
    names = given["rows"]
    if len(names) < 2:
        raise UserError("give at least two rows: the first is compared with each of the others.")
    reference, *rows = (read_mean(name, o.metric, o.component) for name in names)
    found = [compare(reference, row) for row in rows]
    titles = [f"{name} ({len(runs_of(name))} runs)" if "*" in name else name for name in names]
    if o.picture:
        scatter(reference, dict(zip(titles[1:], rows, strict=True)), titles[0], Path(o.picture))
    print(f"{o.metric}, component {o.component}; reference {titles[0]}\n")
    print(
        "| row | n (left out) | mean | reference | difference | 95 % interval | t-test p | Wilcoxon p | Holm | higher |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for title, c, corrected in zip(titles[1:], found, holm([c.w_p for c in found]), strict=True):
        numbers = f"{c.mean:.4f} | {c.reference:.4f} | {c.difference:+.4f} | {c.low:+.4f} to {c.high:+.4f}"
        tests = f"{c.t_p:.3g} | {c.w_p:.3g} | {corrected:.3g} | {c.higher} of {c.n}"
        print(f"| {title} | {c.n} ({c.left_out}) | {numbers} | {tests} |")
    if o.picture:
        print(f"picture: {o.picture}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
