"""Comparisons of rows: intervals that cover, p by enumeration, medians by brute force, and refusals."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from evaluation import statistics
from evaluation.figures import as_png
from evaluation.rows import read_row, read_runs
from evaluation.statistics import compare, compare_scans, hodges_lehmann, holm, permutation_p
from utils.errors import UserError


def row(seed: int, n: int = 20, shift: float = 0.0) -> dict[str, float]:
    values = np.random.default_rng(seed).normal(0.85 + shift, 0.05, n)
    return {f"case{i}": float(v) for i, v in enumerate(values)}


def write(path, values, output="seg"):
    lines = ["case,output,component,dice,jaccard,asd,hd95"]
    for case, v in values.items():
        lines += [f"{case},{output},all,{v},0,nan,1", f"{case},{output},largest,{v / 2},0,nan,1"]
    path.write_text("\n".join(lines) + "\n")
    return path


# -- words, and few scans --


@pytest.mark.parametrize(
    ("runs", "over"),
    [((1, 1), "scans only, one run each"), ((3, 2), "runs and scans"), ((1, 2), "scans, and the runs of the row")],
)  # fmt: skip
def test_it_says_what_it_is_over(runs, over):
    sides = [{seed: row(100 * side + seed) for seed in range(k)} for side, k in enumerate(runs)]
    result = compare(*sides)
    assert (result.runs, result.over) == (runs, over) and result.low < result.difference < result.high
    assert result.difference == pytest.approx(result.mean - result.reference)


@pytest.mark.parametrize("n", [1, 5, 6])
def test_below_six_scans_there_is_neither_interval_nor_p(n):
    sides = [{seed: row(100 * side + seed, n) for seed in range(5)} for side in range(2)]
    result = compare(*sides)
    assert math.isnan(result.low) == math.isnan(result.high) == math.isnan(result.p) == (n < 6)
    assert math.isnan(compare_scans(row(0, n), row(1, n)).p) == (n < 6) and math.isfinite(result.difference)


# -- runs --


def test_p_is_the_share_of_all_ways_to_deal_the_runs_out():
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(0, 1, k), rng.normal(1, 1, m)) for k, m in ((5, 5), (5, 7), (6, 5))]
    pairs += [np.array([[0.812, 0.809, 0.807, 0.804, 0.804], [0.8, 0.801, 0.8, 0.802, 0.812]])]  # some splits are equal
    for a, b in pairs:
        runs, k, m = [*a, *b], len(a), len(b)
        ways = [
            abs(np.mean(group) - np.mean([runs[i] for i in range(k + m) if i not in chosen]))
            for chosen in itertools.combinations(range(k + m), k)
            for group in [[runs[i] for i in chosen]]
        ]
        assert permutation_p(a, b) == pytest.approx(np.mean([way >= abs(a.mean() - b.mean()) - 1e-12 for way in ways]))
    assert permutation_p(np.arange(5.0), np.arange(5.0) + 100) == pytest.approx(2 / math.comb(10, 5))
    assert permutation_p(np.ones(5), np.ones(5)) == 1


def test_very_many_runs_are_dealt_out_at_random_and_never_to_a_p_of_0():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 15), rng.normal(0.5, 1, 15)
    assert permutation_p(a, b) == pytest.approx(stats.ttest_ind(a, b).pvalue, abs=0.02)
    assert 0 < permutation_p(a, a + 100) < 1e-4


@pytest.mark.parametrize("runs", [(4, 9), (9, 4), (5, 5)])
def test_p_needs_five_runs_on_each_side(runs):
    sides = [{seed: row(100 * side + seed) for seed in range(k)} for side, k in enumerate(runs)]
    result = compare(*sides)
    assert math.isnan(result.p) == (min(runs) < 5)
    if min(runs) >= 5:
        means = [np.array([np.mean(list(scans.values())) for scans in side.values()]) for side in sides]
        assert result.p == permutation_p(*means)


# -- scans of one pair of runs --


def test_the_median_is_that_of_all_pairs_and_has_the_sign_of_the_test():
    rng = np.random.default_rng(0)
    for n in (1, 2, 6, 15):
        for _ in range(20):
            d = rng.normal(0.2, 1, n) * rng.choice([1, 8], n)
            pairs = [(d[i] + d[j]) / 2 for i in range(n) for j in range(i, n)]
            assert hodges_lehmann(d) == pytest.approx(np.median(pairs))
            ranks = stats.rankdata(np.abs(d))
            above = ranks[d > 0].sum() - n * (n + 1) / 4
            assert above * hodges_lehmann(d) >= 0
    assert hodges_lehmann(np.zeros(4)) == 0 and hodges_lehmann(np.array([0, 0, 3.0])) == 3


@pytest.mark.parametrize("unequal", [1, 2, 5, 9])
def test_scans_with_equal_values_leave_the_p_exact(unequal):
    """p is the share of all signs of the other differences whose rank sum is at least as far from its middle."""
    d = np.random.default_rng(unequal).normal(1, 1, unequal)
    reference = {f"case{i}": 0.5 for i in range(20)}
    row = {case: value + (d[i] if i < unequal else 0) for i, (case, value) in enumerate(reference.items())}
    ranks = stats.rankdata(np.abs(d))
    signs = np.array(list(itertools.product((-1, 1), repeat=unequal)))
    p = (np.abs(signs @ ranks) >= abs(np.sign(d) @ ranks) - 1e-9).mean()
    test = compare_scans(reference, row)
    assert test.p == pytest.approx(p) and (p >= 1 / 16) == (unequal <= 5)


def test_differences_that_are_equal_as_decimals_are_ties():
    d, reference = np.array([1, -1, 2, -1, 1, -1, 1, -1]) / 10, (0.31, 0.6, 0.05, 0.8, 0.42, 0.47, 0.2, 0.9)
    sides = ({str(i): round(v, 6) for i, v in enumerate(values)} for values in (reference, reference + d))
    assert compare_scans(*sides).p == 1  # ranks of 20 and 16, as near as fours and an eight come; it was 0.84


def test_a_mean_and_a_median_of_other_signs_are_both_told():
    a = row(0)
    b = {case: value - 0.01 for case, value in a.items()} | {"case3": a["case3"] + 0.9}
    assert compare({1: a}, {1: b}).difference > 0 > compare_scans(a, b).median
    assert compare_scans(a, b).p == pytest.approx(stats.wilcoxon([b[case] - a[case] for case in a]).pvalue)
    assert compare_scans(a, b).higher == 1


def test_equal_rows_and_constant_differences_give_no_nonsense():
    same, equal = compare({1: row(0)}, {1: row(0)}), compare_scans(row(0), row(0))
    assert (same.difference, same.low, same.high) == (0, 0, 0) and (equal.p, equal.median, equal.higher) == (1, 0, 0)
    a, b = ({f"case{i}": i / 16 + more for i in range(12)} for more in (0, 0.5))
    above, scans = compare({1: a}, {1: b}), compare_scans(a, b)
    assert (above.difference, above.low, above.high) == (0.5, 0.5, 0.5)
    assert (scans.median, scans.higher, scans.p) == (0.5, 12, pytest.approx(2 / 2**12))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.5]) == [1.0, 1.0] and holm([0.02]) == [0.02]
    corrected = holm([math.nan, 0.01, math.nan, 0.04])
    assert corrected[1::2] == pytest.approx([0.02, 0.04]) and math.isnan(corrected[0]) and math.isnan(corrected[2])


# -- scans --


def test_a_scan_without_a_number_in_one_run_is_left_out_and_counted():
    a, b, c = row(0), row(1), row(2)
    b["case3"] = math.nan
    result = compare({1: c}, {1: a, 2: b})
    assert (result.n, result.left_out) == (19, 1)
    with pytest.raises(UserError, match="no scan has a number"):
        compare({1: {"a": 1.0, "b": math.nan}}, {1: {"a": math.nan, "b": 0.5}})


def test_different_scans_are_refused():
    with pytest.raises(UserError, match="case19"):
        compare({1: row(0)}, {1: row(0, 19)})
    with pytest.raises(UserError, match="not of the same scans"):
        compare({1: row(0)}, {1: row(0), 2: row(1, n=19)})


def test_a_penalised_column_of_an_early_test_is_the_distance_or_not_a_number(tmp_path):
    lines = ["case,output,component,dice,jaccard,asd,hd95,voxels,label_voxels", "a,seg,all,0.5,0.3,2,3,9,9"]
    (tmp_path / "cases.csv").write_text("\n".join([*lines, "b,seg,all,0,0,nan,nan,0,9", "c,seg,all,1,1,0,0,0,0\n"]))
    result = read_row(str(tmp_path), "hd95_penalised", "all")
    assert result["a"] == 3 and math.isnan(result["b"])
    dice = read_row(str(tmp_path), "dice", "all")
    assert dice["b"] == 0 and math.isnan(dice["c"]) and math.isnan(result["c"]), "both masks empty: nothing to measure"


# -- the command --


def test_a_run_without_a_test_is_told_its_other_tests(tmp_path):
    (tmp_path / "run" / "best-test").mkdir(parents=True)
    write(tmp_path / "run" / "best-test" / "cases.csv", row(0))
    with pytest.raises(UserError, match=r"run/cases.csv: .*Give one of its tests: .*run/best-test\.$"):
        read_row(str(tmp_path / "run"), "dice", "all")


def test_the_command_prints_a_line_per_row_and_draws(tmp_path, capsys, monkeypatch):
    a, b = write(tmp_path / "a.csv", row(0)), tmp_path / "run"
    b.mkdir()
    write(b / "cases.csv", row(1), output="sdm")
    picture, drawn = tmp_path / "scatter.png", []
    monkeypatch.setattr(statistics, "as_png", lambda figure, *a, **b: drawn.append(figure) or as_png(figure, *a, **b))
    statistics.main([str(a), f"{b}:sdm", str(b), "--component", "largest", "--picture", str(picture)])
    (axes,) = drawn[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == (f"dice, largest: {a}:seg", "dice, largest: the others")
    rows, scans = capsys.readouterr().out.split("Scan by scan")
    lines = [[line for line in part.splitlines() if line.startswith("| /")] for part in (rows, scans)]
    assert [len(part) for part in lines] == [2, 2] and picture.read_bytes()[1:4] == b"PNG"
    assert f"| {np.mean(list(row(1).values())) / 2:.4f} |" in lines[0][0]
    assert "scans only, one run each | " in lines[0][0]
    test = compare_scans({c: v / 2 for c, v in row(0).items()}, {c: v / 2 for c, v in row(1).items()})
    assert f"| {test.median:+.4f} | {test.higher} of 20 | {test.p:.3g} | {min(1, 2 * test.p):.3g} |" in lines[1][0]


def test_a_row_of_several_seeds_is_compared_by_its_runs(tmp_path, capsys):
    for name, seeds in {"old": (0, 1), "new": (2, 3, 4, "4.20261122-131415", "4.20261122-131415.1")}.items():
        for seed in seeds:  # the last two are what --fresh moved aside
            (tmp_path / f"{name}-seed{seed}").mkdir()
            write(tmp_path / f"{name}-seed{seed}" / "cases.csv", row(seed if seed in range(5) else 9), output="sdm")
    statistics.main([f"{tmp_path}/old-seed*", f"{tmp_path}/new-seed*:sdm", f"{tmp_path}/new-seed3"])
    old, new = ({seed: row(seed) for seed in seeds} for seeds in ((0, 1), (2, 3, 4)))
    out = capsys.readouterr().out
    shown, of_all, of_one = [line for line in out.splitlines() if str(tmp_path) in line]
    result = compare(old, new)
    assert (
        shown.endswith("old-seed*:sdm, runs: 2 (seeds 0, 1)") and "new-seed*:sdm | 3 (seeds 2, 3, 4) | 20 (0)" in of_all
    )
    assert f"| {result.difference:+.4f} | {result.low:+.4f} to {result.high:+.4f} | runs and scans | no seed" in of_all
    assert (
        "new-seed3:sdm | 1 (seed 3) | 20 (0)" in of_one
        and "the runs of the reference" in of_one
        and "Wilcoxon" not in out
    )


def test_the_table_names_the_outputs_and_a_row_has_one(tmp_path, capsys):
    """Without :NAME the first of the file counts, which need not be that of another test."""
    write(tmp_path / "a-seed1.csv", row(1), output="seg")
    write(tmp_path / "a-seed2.csv", row(2), output="mean")
    first, second = (str(tmp_path / f"a-seed{i}.csv") for i in (1, 2))
    statistics.main([first, second])
    out = capsys.readouterr().out
    assert f"reference {first}:seg, runs: 1" in out and out.count(f"| {second}:mean |") == 2
    with pytest.raises(UserError, match=r"different outputs: seg in .*seed1.csv; mean in .*seed2.csv. Name one: "):
        statistics.main([first, f"{tmp_path}/a-seed*"])


def test_five_runs_have_a_p_and_five_scans_neither(tmp_path, capsys):
    for name, n in {"a": 20, "b": 20, "few": 5, "few_b": 5}.items():
        for seed in range(5):
            write(tmp_path / f"{name}-seed{seed}.csv", row(seed + 10 * len(name) * (name[-1] == "b"), n))
    statistics.main([f"{tmp_path}/a-seed*", f"{tmp_path}/b-seed*"])
    result = compare(*(read_runs(f"{tmp_path}/{name}-seed*", "dice", "all") for name in "ab"))
    assert f"| {result.higher} of 5; p = {result.p:.2g}, Holm {result.p:.2g} |" in capsys.readouterr().out
    statistics.main([f"{tmp_path}/few-seed*", f"{tmp_path}/few_b-seed*"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert "none: 5 scans are too few" in line and "p =" not in line
    statistics.main([f"{tmp_path}/few-seed0.csv", f"{tmp_path}/few_b-seed0.csv"])
    assert capsys.readouterr().out.splitlines()[-1].count("none: 5 scans are too few") == 1


def test_two_runs_of_one_seed_are_no_row(tmp_path):
    for name in ("a-seed1.csv", "b-seed1.csv"):
        write(tmp_path / name, row(0))
    with pytest.raises(UserError, match="two runs of seed 1"):
        read_runs(f"{tmp_path}/*", "dice", "all")


@pytest.mark.parametrize(
    ("args", "text"),
    [(["a.csv"], "two rows"), (["a.csv", "none.csv"], "none.csv"), (["a.csv", "a.csv:mean"], "no output mean"),
     (["a.csv", "b*.csv"], "nothing matches b"),
     (["a.csv", "text.csv"], "text.csv is no"), (["a.csv", "a.csv", "--metric", "hd96"], "hd96"),
     (["a.csv", "a.csv", "--metric", "hd95_mm"], "no column hd95_mm")],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, monkeypatch, args, text):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.csv", row(0))
    (tmp_path / "text.csv").write_text("hello\n")
    with pytest.raises(UserError, match=text):
        statistics.main(args)


def test_metrics_on_request_are_compared_and_nsd_at_one_tolerance(tmp_path, capsys):
    more = {"nsd": 0.9, "assd": 1.5, "assd_mm": 1.2, "assd_mm_penalised": 1.2, "rve": -0.1}
    for name, shift in (("a", 0.0), ("b", 0.25)):
        (tmp_path / name).mkdir()
        lines = [",".join(["case,output,component,dice", *more])]
        lines += [",".join([f"case{i},seg,all,0.8", *(f"{v + shift}" for v in more.values())]) for i in range(8)]
        (tmp_path / name / "cases.csv").write_text("\n".join(lines) + "\n")
        (tmp_path / name / "test.json").write_text('{"nsd_tolerance_mm": 2.0}')
    args = [str(tmp_path / "a"), str(tmp_path / "b")]
    for metric, value in more.items():
        statistics.main([*args, "--metric", metric])
        assert f"| {value + 0.25:.4f} | {value:.4f} | +0.2500 |" in capsys.readouterr().out
    (tmp_path / "b" / "test.json").write_text('{"nsd_tolerance_mm": 1.0}')
    with pytest.raises(UserError, match=r"different tolerances: 2 mm in .*a; 1 mm in .*b\. Test them"):
        statistics.main([*args, "--metric", "nsd"])
    write(tmp_path / "plain.csv", row(0))
    for metric, flag in (("nsd", "--nsd-tolerance"), ("assd_mm", "--metrics assd"), ("rve", "--metrics rve")):
        with pytest.raises(UserError, match=f"no column {metric}. Test the run again with {flag}"):
            statistics.main([str(tmp_path / "plain.csv")] * 2 + ["--metric", metric])
