"""The figures of docs/findings.md and docs/curves.md are those of the records."""

import csv
import json
import re
import statistics

import pytest
from conftest import ROOT

from evaluation.rows import Runs, read_runs
from evaluation.statistics import Comparison, compare

FINDINGS, CURVES = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("findings.md", "curves.md"))
CLAIMS = {  # section: of each of its lines the reference and the row, as evaluation.statistics takes them
    "mutual-learning": [("half/supervised-16-seed*", "half/dtml-16-seed*")],
    "m_d-alone": [("half/supervised-16-seed133[78]", "half/supervised-sdm-16-seed*")],
    "the-loss-of-m_d": [("half/dtml-dis-16-seed1337", "half/dtml-16-seed1337")],
    "what-the-unlabeled-scans-add": [
        ("half/dtml-16-0-seed1337", "half/dtml-16-seed1337"),
        ("half/tuned-16-0-seed*:mean", "half/tuned-16-seed133[78]:mean"),
    ],
    "all-labels": [("half/supervised-16-seed*", "half/supervised-80-seed*")],
    "a-better-recipe-for-the-v-net": [("half/dtml-16-seed*", "half/supervised-tuned-16-seed*")],
    "the-preset-tuned": [
        ("half/dtml-16-seed*", "half/tuned-16-seed*"),
        ("half/supervised-tuned-16-seed*", "half/tuned-16-seed*"),
    ],
    "each-scan-on-its-own-scale": [
        (f"half/supervised-tuned-{n}-seed*", f"half/supervised-normalized-{n}-seed*") for n in (16, 8)
    ],
    "dtml": [
        ("half/plus-alone-8-seed*:ema_mean", "half/plus-8-seed*:ema_mean"),
        ("half/supervised-normalized-8-seed*", "half/plus-8-seed*:ema_mean"),
        ("half/plus-alone-4-seed*:ema_mean", "half/plus-4-seed*:ema_mean"),
        ("half/supervised-normalized-4-seed*", "half/plus-4-seed*:ema_mean"),
        ("half/plus-alone-16-seed*:ema_mean", "half/plus-16-seed*:ema_mean"),
    ],
    "dtml-on-the-hippocampus": [
        ("hippocampus/plus-alone-8-seed*:ema_mean", "hippocampus/plus-8-seed*:ema_mean"),
        ("hippocampus/supervised-normalized-8-seed*", "hippocampus/plus-alone-8-seed*:ema_mean"),
    ],
    "newer-methods": [
        ("hippocampus/supervised-softmax-8-seed*", "hippocampus/bcp-8-seed*"),
        ("hippocampus/supervised-softmax-8-seed*", "hippocampus/ad-mt-8-seed*:teacher_1"),
    ],
    "dk-uxnet-after-600-iterations": [("short/supervised-16-seed1337", "short/dk-uxnet-16-seed1337")],
}
OTHERS = ("asdnet", "tcse", "ua-mt", "dtc", "sassnet", "double-unc")


def shown(c: Comparison) -> str:
    """A comparison of Dice in points, as the page has it."""
    text = f"{100 * c.difference:+.2f} ({100 * c.low:+.2f} to {100 * c.high:+.2f}; {c.runs[0]} and {c.runs[1]} runs"
    return text.replace("-", "\N{MINUS SIGN}") + (", scans only)" if c.over.startswith("scans only") else ")")


def verdict(reference: Runs, row: Runs) -> str:
    """By the page's rule."""

    def excluded(out: str | None = None) -> bool:
        """Whether the interval excludes 0, without one scan if it is named."""
        both = ({seed: {scan: v for scan, v in run.items() if scan != out} for seed, run in side.items()}
                for side in (reference, row))  # fmt: skip
        c = compare(*both, most=1)
        return c.low > 0 or c.high < 0

    if not excluded():
        return "not shown"
    several = min(len(reference), len(row)) > 1
    return "shown" if several and all(map(excluded, next(iter(reference.values())))) else "open"


def curve(run: str, column: str) -> dict[int, float]:
    """Iteration -> value of a column of scalars.csv in results/; {} if it has none."""
    with open(ROOT / "results" / run / "scalars.csv", newline="") as f:
        return {int(row["iteration"]): float(row[column]) for row in csv.DictReader(f) if column in row}


def test_other_figures_are_what_the_records_give():
    """Live voxels by k, the spread of the V-Nets, the scan that is not drawn, and a median of the screening."""
    live: dict[float, list[float]] = {}
    for path in [*(ROOT / "results" / "half").glob("*-seed*"), *(ROOT / "results" / "short").glob("*-seed*")]:
        options = json.loads((path / "manifest.json").read_text())["options"]
        own = options["method"] == "dtml" or options.get("head") == "sdm"
        if own and not re.match("beyond-(flips|grow)", path.name):  # the test of another run; k changes
            share = curve(f"{path.parent.name}/{path.name}", "live_gradient/sdm").values()
            live.setdefault(options["k"], []).append(100 * statistics.mean(share))
    text = " ".join(FINDINGS.split())
    assert f"learn, {min(live[1500]):.2f} to {max(live[1500]):.2f} % of all" in text
    assert f"4 of {len(live[1500])} runs with k = 1500" in text and f"4 of the {len(live[1500])} recorded" in text
    assert f"k = 50, {min(live[50]):.0f} to {max(live[50]):.0f} % of the voxels learn" in text
    assert f"none of {len(live[50])} runs of DTML failed" in text
    died = curve("half/supervised-sdm-16-seed1338", "live_gradient/sdm")
    assert max(share for i, share in died.items() if 69 <= i < 510) < 1e-4 and died[69] == 0 < died[59]
    rows = {path.name[: path.name.index("-seed")] for path in (ROOT / "results" / "half").glob("supervised*-seed*")}
    vnets = [read_runs(f"{ROOT}/results/half/{row}-seed*", "dice", "all") for row in rows if "sdm" not in row]
    means = [[statistics.mean(run.values()) for run in runs.values()] for runs in vnets]
    assert f"furthest apart differ by {100 * max(max(row) - min(row) for row in means):.2f}." in text
    names = [f"{ROOT}/results/half/{row}-16-seed1337" for row in ("supervised", "dtml")]
    vnet, dtml = (read_runs(name, "dice", "all")[1337] for name in names)
    assert f"one scan is {100 * max(dtml[scan] - vnet[scan] for scan in vnet):.0f} points lower" in text
    both, every = (read_runs(f"{ROOT}/results/screening/quick-plus-4{name}-seed*:ema_mean", "dice", "all")[1337]
                   for name in ("", "-all"))  # fmt: skip
    gains = [100 * (every[scan] - both[scan]) for scan in both]
    page = (ROOT / "results/screening/README.md").read_text(encoding="utf-8")
    shown_median = f"{statistics.median(gains):.2f}".replace("-", "\N{MINUS SIGN}")
    assert f"lower on {sum(gain < 0 for gain in gains)} of {len(gains)} scans (median {shown_median})" in page


# methods whose weight rises over the whole run, and the others
LATE = ("cps", "double-unc", "dtc", "dtml", "mean-teacher", "sassnet", "tcse", "ua-mt")
EARLY = ("ad-mt", "bcp", "mc-net-plus", "plus", "ss-net")


def test_the_weight_of_the_unlabeled_loss_counts_as_the_records_give():
    """Its mean by its maximum, with the learning rate as weight, in every run of `tuned` with 8 labels."""
    shares: dict[str, float] = {}
    for path in [*(ROOT / "results/half").glob("*-8-seed*"), *(ROOT / "results/hippocampus").glob("*-8-seed*")]:
        row = re.sub(r"(-tuned|-softmax|-joint|-pasted)?-8-seed\d+$", "", path.name)
        if row in LATE + EARLY:
            run = f"{path.parent.name}/{path.name}"
            weight, lr = curve(run, "lambda") or curve(run, "w"), curve(run, "lr")
            share = sum(lr[i] * weight[i] for i in lr) / sum(lr.values()) / max(weight.values())
            assert shares.setdefault(row, share) == pytest.approx(share, abs=0.001)
    assert {*LATE, *EARLY} == shares.keys()
    late, early = ([f"{shares[row]:.2f}" for row in sorted(rows, key=shares.__getitem__)] for rows in (LATE, EARLY))
    text = " ".join(FINDINGS.split())
    assert {*late} == {"0.15"} and "its mean is 0.15 of its maximum" in text
    assert f"{early[0]} to {early[-1]} in DTML+, AD-MT, MC-Net+, SS-Net and BCP" in text


def test_the_live_voxels_of_the_curves_are_those_of_the_run():
    table = CURVES.split("| iterations | ")[1].splitlines()
    spans = [(int(a), int(b)) for a, b in re.findall(r"(\d+)\D(\d+)", table[0])]
    columns = {"live voxels": ("live_gradient/sdm", 100, "{:.2f} %"), "L_mask": ("loss/mask", 1, "{:.2f}"),
               "Dice of M_d in training": ("dice/train_sdm", 1, "{:.2f}"),
               "Dice of M_s in training": ("dice/train_seg", 1, "{:.2f}")}  # fmt: skip
    for line in table[2:6]:
        name, *figures = (cell.strip() for cell in line.strip("|").split("|"))
        column, factor, form = columns.pop(name)
        values = curve("half/dtml-16-seed1337", column)
        means = [statistics.mean(v for i, v in values.items() if start <= i < end) for start, end in spans]
        assert figures == [form.format(factor * mean) for mean in means]
    assert not columns


def test_the_claims_are_what_the_records_give():
    lines = re.findall(r"^\| \[[^]]+\]\(#([\w-]+)\) \|[^|]*\| ([^|]*) \| ([\w ]+) \|$", FINDINGS, re.M)
    result = {}
    for section, here, word in lines:
        result.setdefault(section, []).append((here, word))
    compared = [compare(*(read_runs(f"{ROOT}/results/half/{name}-16-seed1337", "dice", "all") for name in pair))
                for pair in ((other, "dtml") for other in OTHERS)]  # fmt: skip
    assert all(c.low < 0 < c.high for c in compared)
    least, most = (f"{100 * end(c.difference for c in compared):+.2f}" for end in (min, max))
    ((here, word),) = result.pop("the-other-methods")
    assert here.startswith(f"{least} to {most} (every interval contains 0; 1 and 1 runs".replace("-", "\N{MINUS SIGN}"))
    assert word == "not shown" and result.keys() == CLAIMS.keys()
    for section, pairs in CLAIMS.items():
        runs = [[read_runs(f"{ROOT}/results/{where}", "dice", "all") for where in pair] for pair in pairs]
        assert result[section] == [(shown(compare(*pair, most=1)), verdict(*pair)) for pair in runs]
    slugs = [
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall("^#+ (.*)", FINDINGS, re.M)
    ]
    assert {section for section, *_ in lines} <= set(slugs)
