"""The hierarchical interval of a difference: what it covers, by hand, its symmetry and its words."""

import numpy as np
import pytest
from scipy import stats

from evaluation.statistics import interval


def simulated(seed, k, n, *, run_sd, scan_sd=2.0, noise=1.0, difference=1.0):
    """Two methods of k runs on n scans, whose true difference is known."""
    rng = np.random.default_rng(seed)
    scans, own = rng.normal(80, 5, n), rng.normal(difference, scan_sd, n)
    first, second = (rng.normal(0, run_sd, (k, 1)) + rng.normal(0, noise, (k, n)) for _ in range(2))
    return scans + first, scans + own + second


@pytest.mark.parametrize(("k", "run_sd"), [(1, 0.0), (3, 3.0)])
def test_the_interval_covers_the_true_difference_at_least_as_often_as_it_says(k, run_sd, monkeypatch):
    """Of 300: 95 % are 285, two standard errors below that 277."""
    monkeypatch.setattr("evaluation.statistics.RESAMPLES", 999)
    sides = [simulated(seed, k, 20, run_sd=run_sd) for seed in range(300)]
    result = [interval(*pair) for pair in sides]
    hits = sum(low <= 1 <= high for low, high in result)
    assert hits >= (274 if k == 1 else 277)  # scans alone: a percentile interval of 20 is a little narrow


@pytest.mark.parametrize(
    ("k", "spreads", "share", "least", "most"),
    [(3, (3.0, 0.1), 0, 0.91, 0.97), (5, (3.0, 0.1), 0, 0.92, 0.98), (5, (0.5, 0.5), 0.05, 0.72, 0.86)],
)
def test_what_the_interval_covers_is_what_the_findings_say(k, spreads, share, least, most, monkeypatch):
    """Runs of unequal spread; and a gain of which one scan in twenty has nearly all, 20 points. The true mean is 1."""
    monkeypatch.setattr("evaluation.statistics.RESAMPLES", 999)
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        own = 20.0 * (rng.random(20) < share) + rng.normal(1 - 20 * share, 0.5, 20)
        sides = [rng.normal(0, spread, (k, 1)) + rng.normal(0, 1, (k, 20)) for spread in spreads]
        low, high = interval(sides[0], sides[1] + own)
        hits += low <= 1 <= high
    assert least <= hits / 400 <= most


@pytest.mark.parametrize(
    ("k", "run_sd", "scan_sd", "own_sd"), [(5, (0.35, 0), (2.54, 0.69), 2.17), (3, (2.2, 1.5), (9.4, 3.1), 7.6)]
)
def test_it_is_wider_than_needed_where_runs_differ_on_single_scans(k, run_sd, scan_sd, own_sd, monkeypatch):
    """With the variances of plus-alone-8 and plus-8, and of supervised-16 and dtml-16; needed is 2 t SD."""
    monkeypatch.setattr("evaluation.statistics.RESAMPLES", 999)
    rng, hits, widths, differences = np.random.default_rng(0), 0, [], []
    for _ in range(300):
        a, b = (rng.normal(0, r, (k, 1)) + rng.normal(0, s, (k, 20)) for r, s in zip(run_sd, scan_sd, strict=True))
        b = b + rng.normal(0, own_sd, 20)
        low, high = interval(a, b)
        hits += low <= 0 <= high
        widths.append(high - low)
        differences.append(b.mean() - a.mean())
    assert hits / 300 >= 0.96
    assert 1.05 <= np.mean(widths) / (2 * stats.t.ppf(0.975, 19) * np.std(differences)) <= 1.55


def test_two_runs_a_side_by_hand():
    """Means of 0 and 2 on both sides, alike on all scans. One draw in 16 takes the lower run twice here and the higher
    twice there: 2 apart, by sqrt(2) as two draws vary by half of what they should. Each mean has the variance 1, with
    1 degree of freedom, and so their difference 2."""
    runs = np.repeat([[0.0], [2.0]], 8, axis=1)
    end = 2 * 2**0.5 * stats.t.ppf(0.975, 2) / stats.norm.ppf(0.975)
    assert interval(runs, runs + 5) == pytest.approx((5 - end, 5 + end))


def test_six_scans_by_hand():
    """Differences 1 and five times 0: of six draws r are the 1 with a binomial law, whose ends are 0 and 3."""
    a = np.zeros((1, 6))
    b = np.array([[1.0, 0, 0, 0, 0, 0]])
    assert [int(stats.binom.ppf(p, 6, 1 / 6)) for p in (0.025, 0.975)] == [0, 3]
    factor = (6 / 5) ** 0.5 * stats.t.ppf(0.975, 5) / stats.norm.ppf(0.975)
    assert interval(a, b) == pytest.approx((1 / 6 - factor / 6, 1 / 6 + factor * 2 / 6))


@pytest.mark.parametrize("runs", [(2, 5), (1, 1)])
def test_it_is_the_same_each_time_and_turns_with_its_sides(runs):
    a, b = (side[:k] for side, k in zip(simulated(1, 5, 20, run_sd=1.0), runs, strict=True))
    assert interval(a, b) == interval(a, b)
    low, high = interval(b, a)
    assert (-high, -low) == pytest.approx(interval(a, b), rel=1e-12)
