"""Paired comparisons against scipy on the same pairs, values by hand, and refusals."""

import math

import numpy as np
import pytest
from scipy import stats

from utils import statistics
from utils.errors import UserError
from utils.statistics import compare, holm, mean_over


def row(seed: int, n: int = 20, shift: float = 0.0) -> dict[str, float]:
    values = np.random.default_rng(seed).normal(0.85 + shift, 0.05, n)
    return {f"case{i}": float(v) for i, v in enumerate(values)}


def write(path, values, output="seg"):
    lines = ["case,output,component,dice,jaccard,asd,hd95"]
    for case, v in values.items():
        lines += [f"{case},{output},all,{v},0,nan,1", f"{case},{output},largest,{v / 2},0,nan,1"]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_tests_are_paired_and_two_sided():
    a, b = row(0), row(1, shift=0.02)
    found = compare(a, b)
    x, y = np.array(list(a.values())), np.array(list(b.values()))
    assert found.t_p == pytest.approx(stats.ttest_1samp(y - x, 0).pvalue)
    assert found.w_p == pytest.approx(stats.wilcoxon(y - x).pvalue)
    assert found.difference == pytest.approx((y - x).mean()) and found.higher == (y > x).sum()
    assert found.low < found.difference < found.high
    back = compare(b, a)
    assert (back.t_p, back.w_p) == pytest.approx((found.t_p, found.w_p))
    assert back.difference == pytest.approx(-found.difference)


def test_the_order_of_the_cases_does_not_matter():
    a, b = row(0), row(1)
    assert compare(a, dict(reversed(b.items()))).t_p == pytest.approx(compare(a, b).t_p)


def test_the_interval_covers_the_truth_about_95_times_in_100():
    hits = 0
    for seed in range(60):
        a, noise = row(seed), np.random.default_rng(1000 + seed).normal(0.01, 0.03, 20)
        found = compare(a, {case: v + d for (case, v), d in zip(a.items(), noise, strict=True)})
        hits += found.low <= 0.01 <= found.high
    assert 50 <= hits <= 60


def test_scans_without_a_number_are_left_out_and_counted():
    a, b = row(0, 6), row(1, 6)
    b["case2"] = math.nan
    found = compare(a, b)
    assert (found.n, found.left_out) == (5, 1)
    pairs = [(a[c], b[c]) for c in a if c != "case2"]
    assert found.t_p == pytest.approx(stats.ttest_rel(*zip(*pairs, strict=True)).pvalue)


def test_equal_rows_and_constant_differences_give_no_nonsense():
    same = compare(row(0), row(0))
    assert same.w_p == 1 and (same.difference, same.low, same.high) == (0, 0, 0)
    above = compare({f"case{i}": i / 16 for i in range(12)}, {f"case{i}": i / 16 + 0.5 for i in range(12)})
    assert (above.difference, above.low, above.high, above.higher) == (0.5, 0.5, 0.5, 12)
    assert math.isnan(above.t_p) and above.w_p == pytest.approx(2 / 2**12)
    with pytest.raises(UserError, match="too few"):
        compare({"a": 1.0, "b": math.nan}, {"a": 0.5, "b": 0.5})


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.5]) == [1.0, 1.0] and holm([0.02]) == [0.02]


def test_different_scans_are_refused():
    with pytest.raises(UserError, match="case19"):
        compare(row(0), row(0, 19))


def test_the_command_prints_a_line_per_row_and_draws(tmp_path, capsys):
    a, b = write(tmp_path / "a.csv", row(0)), tmp_path / "run"
    b.mkdir()
    write(b / "cases.csv", row(1), output="sdm")
    picture = tmp_path / "scatter.png"
    statistics.main([str(a), f"{b}:sdm", str(b), "--component", "largest", "--picture", str(picture)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert len(lines) == 2 and picture.read_bytes()[1:4] == b"PNG"
    assert f"{np.mean(list(row(1).values())) / 2:.4f}" in lines[0]


def test_a_row_of_several_seeds_is_each_scan_s_mean_over_them(tmp_path, capsys):
    for name, seeds in {"old": (0, 1), "new": (2, 3, 4, "4.20261122-131415", "4.20261122-131415.1")}.items():
        for seed in seeds:  # the last two are what --fresh moved aside
            (tmp_path / f"{name}-seed{seed}").mkdir()
            write(tmp_path / f"{name}-seed{seed}" / "cases.csv", row(seed if seed in range(5) else 9), output="sdm")
    statistics.main([f"{tmp_path}/old-seed*", f"{tmp_path}/new-seed*:sdm", f"{tmp_path}/new-seed3"])
    old, new = (np.mean([list(row(seed).values()) for seed in seeds], axis=0) for seeds in ((0, 1), (2, 3, 4)))
    shown, of_all, of_one = [line for line in capsys.readouterr().out.splitlines() if str(tmp_path) in line]
    assert shown.endswith("old-seed* (2 runs)") and "new-seed*:sdm (3 runs) | 20 (0)" in of_all
    assert f"| {new.mean():.4f} | {old.mean():.4f} | {(new - old).mean():+.4f} |" in of_all
    assert f"| {stats.wilcoxon(new, old).pvalue:.3g} |" in of_all and f"| {(new > old).sum()} of 20 |" in of_all
    assert "new-seed3 | 20 (0)" in of_one and "runs)" not in of_one


def test_a_scan_without_a_number_in_one_seed_is_left_out():
    a, b, c = row(0), row(1), row(2)
    b["case3"] = math.nan
    found = compare(c, mean_over([a, b]))
    assert (found.n, found.left_out) == (19, 1)


def test_seeds_of_different_scans_are_refused():
    with pytest.raises(UserError, match="not of the same scans"):
        mean_over([row(0), row(1, n=19)])


@pytest.mark.parametrize(
    ("words", "text"),
    [(["a.csv"], "two rows"), (["a.csv", "none.csv"], "none.csv"), (["a.csv", "a.csv:mean"], "no output mean"),
     (["a.csv", "b*.csv"], "nothing matches b"),
     (["a.csv", "text.csv"], "text.csv is no"), (["a.csv", "a.csv", "--metric", "hd96"], "hd96")],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, monkeypatch, words, text):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.csv", row(0))
    (tmp_path / "text.csv").write_text("hello\n")
    with pytest.raises(UserError, match=text):
        statistics.main(words)
