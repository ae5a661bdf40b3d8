"""Statistical comparison of the rows of a table, with runs and scans as sources of variation.

    python -m evaluation.statistics results/half/supervised-16-seed1337 results/half/dtml-16-seed1337:seg
    python -m evaluation.statistics 'results/half/supervised-tuned-16-seed*' 'results/half/tuned-16-seed*:mean'

compares the second and all further rows with the first. A row is a cases.csv of test_la.py or its folder; `:NAME` after
it selects the output (default: the first in the file). A quoted pattern selects all matching runs: the seeds of a row.

Methods are compared over their runs. The difference is that of the means over runs and scans; its interval comes from
resampled runs and scans. There is a p only with five or more runs on each side. A test over scans compares two single
runs.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from evaluation.figures import as_png
from evaluation.metrics import COMPONENTS, METRICS, MM, OVERLAPS, PENALISED
from evaluation.rows import Runs, Scans, mean_over, read_runs, runs_of, tolerance_of, with_output
from utils.checkpoint import write_whole
from utils.errors import UserError, run
from utils.options import option, read_flags
from utils.text import markdown_table, some

DISTANCES = (*METRICS[2:], *MM, "assd", "assd_mm")
COLUMNS = [*METRICS, *MM, "nsd", "assd", "assd_mm", "rve", *(f"{name}{PENALISED}" for name in DISTANCES)]
LEAST_SCANS = 6  # for an interval or a p; fewer cannot be significant at 5 %
LEAST_RUNS = 5  # on each side for a p; the smallest p of 4 against 4 is 0.03, of 3 against 3 it is 0.1
LEVEL = 0.95
RESAMPLES = 10_000  # for each of two passes
SPLITS = 200_000  # largest number of splits of the runs in a permutation test
DIGITS = 10  # after the point, to which equal differences are equal, as 0.3 - 0.2 and 0.1; cases.csv has six
OVER = {  # number of runs (1, or 2 and more) of the reference and of the row -> text: what the interval covers
    (1, 1): "scans only, one run each",
    (1, 2): "scans, and the runs of the row",
    (2, 1): "scans, and the runs of the reference",
    (2, 2): "runs and scans",
}
HEAD = ["row", "runs", "scans (left out)", "mean", "reference", "difference", "95 % interval", "over", "higher in"]
WHAT = f"""\
The difference is that of the means over runs and scans; its interval comes from resampled runs and scans. `higher in`
counts pairs of runs with the same seed, or the two single runs. p is from a permutation of the runs, if each side has
{LEAST_RUNS} or more.
"""
WHAT_OF_SCANS = """\
Scan by scan, two single runs: this says nothing about other runs of the same kind. The median difference is the
Hodges-Lehmann estimate, which belongs to Wilcoxon's test. Holm's correction is over these lines.
"""


@dataclasses.dataclass
class Options:
    """Options of the comparison."""

    rows: list[str] = option([], "the reference row, then the rows to compare with it", word="ROW", type=str, nargs="+")
    metric: str = option(
        "dice", "column of cases.csv; nsd, assd and rve where the test had them. rve has a sign: nearer to 0 is better",
        choices=COLUMNS,
    )  # fmt: skip
    component: str = option("all", "with (largest) or without (all) the component filter", choices=COMPONENTS)
    picture: str = option("", "PNG to write: each scan's value in both rows")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A row compared with the reference, over the n scans that have a value in every run of both.

    runs: number of runs of the reference and of the row; left_out: scans without a value; mean, reference: means of the
    row and of the reference over runs and scans; difference: mean - reference; low, high: its 95 % interval
    (`interval`), NaN with fewer than 6 scans; over: what the interval covers; pairs: pairs of runs with the same seed,
    or the two single runs; higher: pairs where the row's mean is above the reference's; p: `permutation_p`, NaN with
    fewer than 5 runs on a side or 6 scans.
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
    """Two single runs compared over the n scans that have a value in both; this says nothing about other runs.

    median: Hodges-Lehmann estimate of row - reference, with the sign of the test; higher: scans where the row is
    higher; p: Wilcoxon's signed-rank test, NaN with fewer than 6 scans.
    """

    n: int
    median: float
    higher: int
    p: float


# -- comparing --


def compare(reference: Runs, row: Runs, most: float = math.inf) -> Comparison:
    """Compares the runs of a row with those of the reference, paired by scan.

    Args:
        reference, row: the runs. Scans without a value in some run are left out and counted.
        most: largest possible difference of two values (Dice: 1), to which the interval is clipped.

    Raises:
        UserError: if the rows have different cases, or no scan has a value in both.
    """
    a, b, left_out = matrices(reference, row)
    n, means = a.shape[1], [dict(zip(runs, values.mean(1), strict=True)) for runs, values in ((reference, a), (row, b))]
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
    """Compares two single runs scan by scan.

    Raises:
        UserError: as `compare`.
    """
    a, b, _ = matrices({0: reference}, {0: row})
    d = (b - a)[0].round(DIGITS)
    unequal = d[d != 0]  # the others have no sign; among more than 13 scans scipy's p would be approximate with them
    p = stats.wilcoxon(unequal).pvalue if len(unequal) else 1.0
    return ScanTest(len(d), hodges_lehmann(d), int((d > 0).sum()), float(p) if len(d) >= LEAST_SCANS else math.nan)


def matrices(reference: Runs, row: Runs) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """Values (runs, scans) of reference and row for the scans with a value in every run, and the number of others.

    Raises:
        UserError: as `compare`.
    """
    means_a, means_b = mean_over(reference), mean_over(row)
    if means_a.keys() != means_b.keys():
        only = sorted(means_a.keys() ^ means_b.keys())
        raise UserError(f"the rows are not of the same scans: {some(only)} stand in one alone. Test both alike.")
    shared = [case for case in means_a if math.isfinite(means_a[case]) and math.isfinite(means_b[case])]
    if not shared:
        raise UserError("no scan has a number in both rows, so there is nothing to compare.")
    a, b = (np.array([[run[case] for case in shared] for run in runs.values()]) for runs in (reference, row))
    return a, b, len(means_a) - len(shared)


def interval(reference: NDArray, row: NDArray) -> tuple[float, float]:
    """95 % interval of mean(row) - mean(reference), by a hierarchical bootstrap with a fixed seed.

    Runs are resampled on each side, and scans jointly for both sides. The plain bootstrap interval is too narrow for
    few runs: the variance of k values drawn from k is too small by the factor (k - 1) / k, and its estimate is
    uncertain. Deviations of runs and of scans are therefore multiplied by sqrt(k / (k - 1)). The distances of the
    percentiles from the difference are multiplied by the ratio of Student's t quantile to the normal one, with the
    degrees of freedom of Satterthwaite (1946). A side with a single run has no variation of runs in the interval.
    `reference` and `row` are the values (runs, scans) of the same scans.

    Source: Owen, The pigeonhole bootstrap, Annals of Applied Statistics 2007; Hesterberg, What teachers should know
    about the bootstrap, The American Statistician 2015, on narrowness in small samples.
    """
    difference = row.mean(0) - reference.mean(0)
    n, middle = difference.size, difference.mean()
    shares = resample(n, 2) / n
    scans = stretch(n) * (shares @ difference - middle)
    parts, drawn = [(difference.var(ddof=1) / n, n - 1)], []
    for streams in ((0, 1), (1, 0)):  # two passes, so that exchanging the sides only changes the sign of the interval
        total = scans
        for sign, runs, stream in zip((-1, 1), (reference, row), streams, strict=True):
            k = len(runs)
            if k > 1:
                chosen = resample(k, stream) / k
                total = total + sign * stretch(k) * ((chosen @ (runs - runs.mean(0))) * shares).sum(1)
        drawn.append(total)
    parts += [(runs.mean(1).var(ddof=1) / len(runs), len(runs) - 1) for runs in (reference, row) if len(runs) > 1]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return float(middle), float(middle)
    freedom = variance**2 / sum(part**2 / df for part, df in parts)
    tail = (1 - LEVEL) / 2
    widening = stats.t.ppf(tail, freedom) / stats.norm.ppf(tail)
    low, high = middle + widening * np.quantile(np.concatenate(drawn), [tail, 1 - tail])
    return float(low), float(high)


def resample(k: int, stream: int) -> NDArray[np.int64]:
    """Counts (RESAMPLES, k) of each of k items in k draws with replacement; a function of the stream."""
    return np.random.default_rng([0, stream]).multinomial(k, np.full(k, 1 / k), RESAMPLES)


def stretch(k: int) -> float:
    """sqrt(k / (k - 1)): corrects the standard deviation of a bootstrap from k values."""
    return math.sqrt(k / (k - 1))


def permutation_p(reference: NDArray, row: NDArray) -> float:
    """Two-sided permutation test of the difference of the means of two groups of runs.

    p is the share of all splits of the runs into two groups of these sizes whose difference is at least as large. If
    there are more than SPLITS splits, so many are drawn with a fixed seed. `reference` and `row` are (runs,), the mean
    over the scans of each run.
    """
    test = stats.permutation_test(
        (reference, row), lambda a, b, axis: np.abs(b.mean(axis) - a.mean(axis)).round(DIGITS), alternative="greater",
        n_resamples=SPLITS, rng=0,
    )  # fmt: skip
    return float(test.pvalue)


def hodges_lehmann(d: NDArray) -> float:
    """Hodges-Lehmann estimate: the median of the means of all pairs of differences d (n,), including (i, i).

    It is above 0 if Wilcoxon's sum of positive ranks is above half of the total. Differences of 0 are left out,
    as in Wilcoxon's test.
    """
    d = d[d != 0]
    first, second = np.triu_indices(len(d))
    return float(np.median((d[first] + d[second]) / 2)) if len(d) else 0.0


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction of p-values, in the same order; NaN stays NaN and does not count as a test."""
    corrected, largest = [math.nan] * len(p), 0.0
    order = sorted((i for i in range(len(p)) if not math.isnan(p[i])), key=lambda i: p[i])
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[i]))
        corrected[i] = largest
    return corrected


# -- output --


def interval_text(c: Comparison, digits: int) -> str:
    """The interval with so many digits, or why there is none."""
    if math.isnan(c.low):
        return f"none: {c.n} scans are too few"
    return f"{c.low:+.{digits}f} to {c.high:+.{digits}f}"


def pairs_text(c: Comparison, corrected: float) -> str:
    """The number of pairs of runs in which the row is higher, and p if there is one."""
    text = f"{c.higher} of {c.pairs}" if c.pairs else "no seed in common"
    return text + ("" if math.isnan(c.p) else f"; p = {c.p:.2g}, Holm {corrected:.2g}")


def runs_text(row: Runs) -> str:
    """The number of runs of a row, and their seeds where they are known."""
    seeds = [str(seed) for seed in row if isinstance(seed, int)]
    known = f" (seed{'s' * (len(row) > 1)} {', '.join(seeds)})" if len(seeds) == len(row) else ""
    return f"{len(row)}{known}"


def refuse_tolerances(names: Sequence[str]) -> None:
    """Raises UserError for rows whose NSD was measured with different tolerances."""
    tolerances = {tolerance_of(path): path for name in names for path in runs_of(name)}
    if len(tolerances) > 1:
        shown = "; ".join(f"{'unknown' if mm is None else f'{mm:g} mm'} in {path}" for mm, path in tolerances.items())
        raise UserError(f"the rows have NSD at different tolerances: {shown}. Test them with one --nsd-tolerance.")


def scatter(reference: Scans, rows: Mapping[str, Scans], title: str, what: str, path: Path) -> None:
    """Writes a PNG with the value of each scan: reference along x, rows along y, and the line of equal values.

    `what` is the metric and the component, for the axes.
    """
    from evaluation.drawing import Figure  # here, as matplotlib takes half a second of every start

    figure = Figure(figsize=(5, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    everything = [v for values in (reference, *rows.values()) for v in values.values() if math.isfinite(v)]
    edge = 0.05 * (max(everything) - min(everything)) or 1
    limits = (min(everything) - edge, max(everything) + edge)
    axes.plot(limits, limits, color="0.7", linewidth=1)
    for name, values in rows.items():
        axes.scatter(list(reference.values()), [values[case] for case in reference], s=18, alpha=0.8, label=name)
    axes.set(xlim=limits, ylim=limits, aspect="equal", xlabel=f"{what}: {title}", ylabel=f"{what}: the others")
    axes.legend(fontsize=8)
    write_whole(path, as_png(figure, 120, palette=False))


def main(argv: list[str] | None = None) -> None:
    """Prints a Markdown table with a line per comparison, and a second table for pairs of single runs."""
    o: Options = read_flags(Options, __doc__, "python -m evaluation.statistics", argv)
    names = o.rows
    if len(names) < 2:
        raise UserError("give at least two rows: the first is compared with each of the others.")
    reference, *rows = (read_runs(name, o.metric, o.component) for name in names)
    if o.metric == "nsd":
        refuse_tolerances(names)
    names = [with_output(name, o.component) for name in names]  # shown, as two rows may begin with different ones
    most = 1 if o.metric in OVERLAPS else math.inf
    comparisons = [compare(reference, row, most) for row in rows]
    if o.picture:
        means = {name: mean_over(row) for name, row in zip(names[1:], rows, strict=True)}
        scatter(mean_over(reference), means, names[0], f"{o.metric}, {o.component}", Path(o.picture))
    print(f"{o.metric}, component {o.component}; reference {names[0]}, runs: {runs_text(reference)}\n")
    print(WHAT)
    lines = []
    for name, row, c, corrected in zip(names[1:], rows, comparisons, holm([c.p for c in comparisons]), strict=True):
        numbers = f"{c.n} ({c.left_out})", f"{c.mean:.4f}", f"{c.reference:.4f}", f"{c.difference:+.4f}"
        lines.append([name, runs_text(row), *numbers, interval_text(c, 4), c.over, pairs_text(c, corrected)])
    print(markdown_table(HEAD, lines))
    single = [(name, next(iter(row.values()))) for name, row in zip(names[1:], rows, strict=True) if len(row) == 1]
    if len(reference) == 1 and single:
        (reference_scans,) = reference.values()
        tests = [compare_scans(reference_scans, row) for _, row in single]
        lines = []
        for (name, _), test, corrected in zip(single, tests, holm([test.p for test in tests]), strict=True):
            few = [f"none: {test.n} scans are too few", ""]
            shown = few if math.isnan(test.p) else [f"{test.p:.3g}", f"{corrected:.3g}"]
            lines.append([name, str(test.n), f"{test.median:+.4f}", f"{test.higher} of {test.n}", *shown])
        head = ["row", "scans", "median difference", "higher on", "Wilcoxon p", "Holm"]
        print(f"\n{WHAT_OF_SCANS}\n{markdown_table(head, lines)}")
    if o.picture:
        print(f"picture: {o.picture}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
