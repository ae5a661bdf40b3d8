"""How far two rows of a table are apart, with the runs as a source of variation, and the scans.

    python -m evaluation.statistics results/half/supervised-16-seed1337 results/half/dtml-16-seed1337:seg
    python -m evaluation.statistics 'results/half/supervised-tuned-16-seed*' 'results/half/tuned-16-seed*:mean'

compares every further row with the first. A row is a folder with cases.csv, or such a file, as test_la.py writes it;
`:NAME` after it chooses the output (default: the file's first). A pattern, quoted, is all runs that match: the seeds of
a row.

What is said of a method is of its runs: the difference is that of the means over runs and scans, its interval from
resampled runs and scans, and a p there only with five runs on each side. A test of scans is of two runs alone.
"""

import dataclasses
import glob
import itertools
import math
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from evaluation.drawing import Figure, FigureCanvasAgg
from evaluation.metrics import COMPONENTS, METRICS, MM, PENALISED
from evaluation.predictions import read_scores
from utils.errors import UserError, run
from utils.options import Parser, fill, option
from utils.run_folder import MOVED_ASIDE

DISTANCES = (*METRICS[2:], *MM)
LEAST_SCANS = 6  # for an interval or a p: fewer cannot show anything at 5 %
LEAST_RUNS = 5  # on each side for a p: of 4 against 4 the smallest is 0.03, of 3 against 3 it is 0.1
LEVEL = 0.95
RESAMPLES = 10_000  # twice
SPLITS = 200_000  # of runs into two sides, that are gone through at most
OVER = {  # whether there are two runs and more of the reference, of the row: what an interval is over
    (1, 1): "scans only, one run each",
    (1, 2): "scans, and the runs of the row",
    (2, 1): "scans, and the runs of the reference",
    (2, 2): "runs and scans",
}
WHAT = f"""\
The difference is of the means over runs and scans, its interval of resampled ones. `higher in`: of the runs with the
same seed. p, with {LEAST_RUNS} runs and more on each side, is of a permutation of the runs.
"""
WHAT_OF_SCANS = """\
Scan by scan within one pair of runs, which says nothing about other runs of the same kind: the median is that of Hodges
and Lehmann, which Wilcoxon's test is of; Holm's correction is over these lines.
"""

Scans = Mapping[str, float]  # case: value
Runs = Mapping[Any, Scans]  # seed, or where a path tells none the path: its scans


@dataclasses.dataclass
class Options:
    """What to compare."""

    metric: str = option(
        "dice", "column of cases.csv", choices=[*METRICS, *MM, *(f"{name}{PENALISED}" for name in DISTANCES)]
    )
    component: str = option("all", "with (largest) or without (all) the component filter", choices=COMPONENTS)
    picture: str = option("", "PNG to write: each scan's value in both rows")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A row against the reference, over the n scans that have a number in every run of both.

    runs: of the reference, and of the row; difference: the row's mean over runs and scans - the reference's; low, high:
    its 95 % interval (`interval`), not a number with fewer than 6 scans; over: what that interval is over; pairs: runs
    with the same seed; higher: of these, where the row's mean is above the reference's; p: `permutation_p`, not a
    number with fewer than 5 runs on a side or 6 scans.
    """

    runs: tuple[int, int]
    n: int
    left_out: int
    mean: float
    reference: float
    difference: float
    low: float
    high: float
    over: str
    pairs: int
    higher: int
    p: float


@dataclasses.dataclass(frozen=True)
class ScanTest:
    """One run against one other, over the n scans that both have a number for: it says nothing of other runs.

    median: the Hodges-Lehmann estimate of row - reference, whose sign is that of the test; higher: scans where the row
    is above; p: Wilcoxon's signed-rank test, not a number with fewer than 6 scans.
    """

    n: int
    median: float
    higher: int
    p: float


# -- what test_la.py wrote --


def read_row(where: str, metric: str, component: str) -> dict[str, float]:
    """Case -> value of one run, `where` being PATH or PATH:OUTPUT. An early file has no NAME_penalised; it is NAME
    there, not a number of an empty mask.

    Raises:
        UserError: a missing or foreign file, an output or component that is not in it, a case twice.
    """
    rows = rows_of(where, component)
    missing = metric.removesuffix(PENALISED)
    try:
        return {row["case"]: row.get(metric, row[missing]) for row in rows}
    except KeyError as e:
        raise UserError(f"{where} has no column {metric}. Test the run again.") from e


def rows_of(where: str, component: str) -> list[dict[str, Any]]:
    """The rows of one output and component, of several classes those of their mean; as `read_row`."""
    name, _, output = where.partition(":") if not Path(where).exists() else (where, "", "")
    try:
        rows = [row for row in read_scores(Path(name)) if row.get("class", "mean") == "mean"]
        output = output or rows[0]["output"]
        chosen = [row for row in rows if (row["output"], row["component"]) == (output, component)]
        cases = {row["case"] for row in chosen}
    except (KeyError, IndexError) as e:
        raise UserError(f"{name} is no cases.csv of test_la.py ({e!r}). Test the run again.") from e
    if not chosen:
        known = ", ".join(dict.fromkeys(f"{row['output']} ({row['component']})" for row in rows))
        raise UserError(f"{name} has no output {output} ({component}). It has {known}.")
    if len(cases) < len(chosen):
        raise UserError(f"{name} holds a case twice. Test the run again.")
    return chosen


def read_runs(where: str, metric: str, component: str) -> dict[Any, dict[str, float]]:
    """The runs of a row: those that a pattern matches, but for what --fresh moved aside; else the one given.

    Raises:
        UserError: nothing matches, two runs of one seed do, or as `read_row`.
    """
    many = glob.has_magic(where) and not Path(where).exists()
    pattern, colon, output = where.partition(":") if many else (where, "", "")
    found = sorted(path for path in glob.glob(pattern) if not MOVED_ASIDE.search(path)) if many else [where]
    if not found:
        raise UserError(f"nothing matches {pattern}. Give folders with the cases.csv of test_la.py.")
    runs: dict[Any, dict[str, float]] = {}
    for path in found:
        told = re.findall(r"seed(\d+)", path)
        seed = int(told[-1]) if told else path
        if seed in runs:
            raise UserError(f"{where} matches two runs of seed {seed}. A row is the seeds of one kind of run.")
        runs[seed] = read_row(f"{path}{colon}{output}", metric, component)
    return runs


def mean_over(runs: Runs) -> dict[str, float]:
    """Case -> the mean of its values in the runs of a row.

    Raises:
        UserError: different sets of cases.
    """
    values = list(runs.values())
    if any(run.keys() != values[0].keys() for run in values):
        raise UserError("the runs of one row are not of the same scans. Test them alike.")
    return {case: statistics.mean(run[case] for run in values) for case in values[0]}


# -- comparing --


def compare(reference: Runs, row: Runs, most: float = math.inf) -> Comparison:
    """The runs of a row against those of the reference, paired by scan; scans without a number in any run are left out
    and counted. `most` is how far apart two values can be (Dice: 1), which an interval of two runs may exceed.

    Raises:
        UserError: different sets of cases, or no scan to compare.
    """
    a, b, left_out = matrices(reference, row)
    n, means = a.shape[1], [dict(zip(runs, found.mean(1), strict=True)) for runs, found in ((reference, a), (row, b))]
    pairs = [(means[0][seed], means[1][seed]) for seed in reference if seed in row]
    if len(reference) == len(row) == 1:
        pairs = [(a.mean(), b.mean())]
    low, high = np.clip(interval(a, b), -most, most) if n >= LEAST_SCANS else (math.nan, math.nan)
    many = n >= LEAST_SCANS and min(len(a), len(b)) >= LEAST_RUNS
    return Comparison(
        runs=(len(a), len(b)), n=n, left_out=left_out, mean=float(b.mean()), reference=float(a.mean()),
        difference=float(b.mean() - a.mean()), low=float(low), high=float(high),
        over=OVER[min(len(a), 2), min(len(b), 2)], pairs=len(pairs),
        higher=sum(bool(ours > theirs) for theirs, ours in pairs),
        p=permutation_p(a.mean(1), b.mean(1)) if many else math.nan,
    )  # fmt: skip


def compare_scans(reference: Scans, row: Scans) -> ScanTest:
    """One run against one other, scan by scan.

    Raises:
        UserError: as `compare`.
    """
    a, b, _ = matrices({0: reference}, {0: row})
    d = (b - a)[0]
    p = stats.wilcoxon(d).pvalue if d.any() else 1.0
    return ScanTest(len(d), hodges_lehmann(d), int((d > 0).sum()), float(p) if len(d) >= LEAST_SCANS else math.nan)


def matrices(reference: Runs, row: Runs) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """The values (runs, scans) of both sides, of the scans that have a number in every run, and how many have not."""
    usual, other = mean_over(reference), mean_over(row)
    if usual.keys() != other.keys():
        only = sorted(usual.keys() ^ other.keys())
        raise UserError(
            f"the rows are not of the same scans: {', '.join(only[:4])} stand in one alone. Test both alike."
        )
    shared = [case for case in usual if math.isfinite(usual[case]) and math.isfinite(other[case])]
    if not shared:
        raise UserError("no scan has a number in both rows, so there is nothing to compare.")
    a, b = (np.array([[run[case] for case in shared] for run in runs.values()]) for runs in (reference, row))
    return a, b, len(usual) - len(shared)


def interval(reference: NDArray, row: NDArray, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % interval of the mean of `row` (runs, scans) - that of `reference` (runs, the same scans), by a hierarchical
    bootstrap: runs are drawn anew on each side, then scans, the same for both. The seed is fixed.

    As it is that is too narrow for a few runs: k values drawn from k vary by (k - 1) / k of what they should, and their
    own spread is badly known. So deviations of runs and of scans are stretched by sqrt(k / (k - 1)), and the
    percentiles' distances by Student's t over the normal quantile, with the degrees of freedom of Satterthwaite (1946).
    A side of one run has no run to draw: then the interval leaves the runs of that side out.

    Source: Owen, The pigeonhole bootstrap, Annals of Applied Statistics 2007; Hesterberg, What teachers should know
    about the bootstrap, The American Statistician 2015, on narrowness in small samples.
    """
    difference = row.mean(0) - reference.mean(0)
    n, middle = difference.size, difference.mean()
    shares = resample(n, resamples, 2) / n
    scans = stretch(n) * (shares @ difference - middle)
    parts, drawn = [(difference.var(ddof=1) / n, n - 1)], []
    for streams in ((0, 1), (1, 0)):  # both, so that exchanged sides turn the interval round and nothing else
        total = scans
        for sign, runs, stream in zip((-1, 1), (reference, row), streams, strict=True):
            k = len(runs)
            if k > 1:
                chosen = resample(k, resamples, stream) / k
                total = total + sign * stretch(k) * ((chosen @ (runs - runs.mean(0))) * shares).sum(1)
        drawn.append(total)
    parts += [(runs.mean(1).var(ddof=1) / len(runs), len(runs) - 1) for runs in (reference, row) if len(runs) > 1]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return float(middle), float(middle)
    freedom = variance**2 / sum(part**2 / df for part, df in parts)
    tail = (1 - LEVEL) / 2
    wider = stats.t.ppf(tail, freedom) / stats.norm.ppf(tail)
    low, high = middle + wider * np.quantile(np.concatenate(drawn), [tail, 1 - tail])
    return float(low), float(high)


def resample(k: int, resamples: int, stream: int) -> NDArray[np.int64]:
    """How often each of k is drawn when k are (resamples, k), the same for the same stream."""
    return np.random.default_rng([0, stream]).multinomial(k, np.full(k, 1 / k), resamples)


def stretch(k: int) -> float:
    """What makes up for k values that are drawn from k varying too little."""
    return math.sqrt(k / (k - 1))


def permutation_p(reference: NDArray, row: NDArray) -> float:
    """Two-sided p of the difference of the means of two groups of runs, each run by its mean over the scans: the share
    of all ways to deal the runs out to two such groups whose difference is as large. Of very many ways so many are
    drawn with a fixed seed."""
    runs = np.concatenate([reference, row])
    k, size, total = len(reference), len(runs), runs.sum()
    if math.comb(size, k) <= SPLITS:
        groups = np.array(list(itertools.combinations(range(size), k)))
    else:
        groups = np.random.default_rng(0).permuted(np.tile(np.arange(size), (SPLITS, 1)), axis=1)[:, :k]
        groups[0] = np.arange(k)  # that which was observed
    sums = runs[groups].sum(1)
    apart = np.abs((total - sums) / (size - k) - sums / k)
    observed = abs(row.mean() - reference.mean())
    return float((apart >= observed - 1e-12 * max(np.abs(runs).max(), 1)).mean())


def hodges_lehmann(d: NDArray) -> float:
    """The median of the means of all pairs of differences, each with itself too: above 0 just where Wilcoxon's sum of
    positive ranks is above half of all. Differences of 0 are left out, as Wilcoxon's test leaves them."""
    d = d[d != 0]
    first, second = np.triu_indices(len(d))
    return float(np.median((d[first] + d[second]) / 2)) if len(d) else 0.0


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction of several p-values: each times the number of those not below it, never falling. What
    is not a number counts for none."""
    corrected, largest = [math.nan] * len(p), 0.0
    order = sorted((i for i in range(len(p)) if not math.isnan(p[i])), key=lambda i: p[i])
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[i]))
        corrected[i] = largest
    return corrected


# -- telling --


def interval_text(c: Comparison, digits: int) -> str:
    """The interval, or why there is none."""
    if math.isnan(c.low):
        return f"none: {c.n} scans are too few"
    return f"{c.low:+.{digits}f} to {c.high:+.{digits}f}"


def pairs_text(c: Comparison, corrected: float) -> str:
    """In how many pairs of runs the row is higher, and p where there is one."""
    found = f"{c.higher} of {c.pairs}" if c.pairs else "no seed in common"
    return found + ("" if math.isnan(c.p) else f"; p = {c.p:.2g}, Holm {corrected:.2g}")


def scatter(reference: Scans, rows: Mapping[str, Scans], title: str, path: Path) -> None:
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
    """Prints a Markdown table, a line per comparison, and a second one of those of two runs alone."""
    parser = Parser(description=__doc__, prog="python -m evaluation.statistics")
    parser.add_argument("rows", nargs="+", metavar="ROW", help="the reference row, then the rows to compare with it")
    parser.add_dataclass(Options)
    given = parser.parse(argv)
    o: Options = fill(Options, given)
    names = given["rows"]
    if len(names) < 2:
        raise UserError("give at least two rows: the first is compared with each of the others.")
    reference, *rows = (read_runs(name, o.metric, o.component) for name in names)
    most = 1 if o.metric in METRICS[:2] else math.inf
    found = [compare(reference, row, most) for row in rows]
    if o.picture:
        means = {name: mean_over(row) for name, row in zip(names[1:], rows, strict=True)}
        scatter(mean_over(reference), means, names[0], Path(o.picture))
    print(f"{o.metric}, component {o.component}; reference {names[0]}, runs: {len(reference)}\n")
    print(WHAT)
    print("| row | runs | scans (left out) | mean | reference | difference | 95 % interval | over | higher in |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, c, corrected in zip(names[1:], found, holm([c.p for c in found]), strict=True):
        numbers = f"{c.mean:.4f} | {c.reference:.4f} | {c.difference:+.4f} | {interval_text(c, 4)} | {c.over}"
        print(f"| {name} | {c.runs[1]} | {c.n} ({c.left_out}) | {numbers} | {pairs_text(c, corrected)} |")
    single = [(name, *row.values()) for name, row in zip(names[1:], rows, strict=True) if len(row) == 1]
    if len(reference) == 1 and single:
        (usual,) = reference.values()
        tests = [compare_scans(usual, row) for _, row in single]
        print(f"\n{WHAT_OF_SCANS}")
        print("| row | scans | median difference | higher on | Wilcoxon p | Holm |\n|---|---|---|---|---|---|")
        for (name, _), test, corrected in zip(single, tests, holm([test.p for test in tests]), strict=True):
            few = math.isnan(test.p)
            shown = f"none: {test.n} scans are too few | " if few else f"{test.p:.3g} | {corrected:.3g}"
            print(f"| {name} | {test.n} | {test.median:+.4f} | {test.higher} of {test.n} | {shown} |")
    if o.picture:
        print(f"picture: {o.picture}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
