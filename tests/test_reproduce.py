"""The grid of the paper's tables: what is in it, which records count, the tables by hand, and those of results/."""

import functools
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from records import GRIDS, cells, here, options_of, printed, write_record, write_run

import test_la
from evaluation.statistics import compare, hodges_lehmann
from methods import METHODS
from networks.backbone import set_precision
from tools import command_line, reproduce
from tools.grid import RETIRED, TRAINED_AS
from tools.runs import recipe_of
from utils.errors import UserError
from utils.options import Parser, fill, flag_of

__all__ = ["here"]  # a fixture
SCANS = {"half": 80, "phantom": 40, "hippocampus": 209}  # of train.list
PAPER = ["90.12", "82.14", "1.82", "7.01"]


# the grid


@pytest.mark.parametrize("profile", GRIDS)
def test_every_run_is_in_a_table_and_every_row_has_its_run(profile):
    runs, tables = GRIDS[profile]
    assert {row.key for _, rows in tables.values() for row in rows} == set(runs)


@pytest.mark.parametrize("profile", GRIDS)
def test_the_flags_parse_and_the_row_s_output_and_scans_are_the_run_s(profile):
    runs, tables = GRIDS[profile]

    @functools.cache
    def outputs_and_scans(args):
        o, method_options, *_ = command_line.read_options([*args.split(), "--profile", profile, "--filters", "2"])
        unlabeled = SCANS[profile] - o.labeled if o.unlabeled is None else o.unlabeled
        with torch.device("meta"):
            method = METHODS[o.method](method_options, iterations=1)
        assert set_precision(method, o.precision, training=True), f"{args}: train_dtml.py refuses this --precision"
        return method.outputs, f"{o.labeled} / {unlabeled}"

    for row in (row for _, rows in tables.values() for row in rows if row.key not in RETIRED):
        outputs, scans = outputs_and_scans(runs[row.key])
        assert row.output in outputs and row.scans == scans


# tables


def test_mean_and_sd_over_runs(here):
    scans = {1337: [(0.8, 1), (0.9, 2)], 1338: [(0.7, 3), (0.9, 5)], 1339: [(0.84, 2), (0.88, 3)]}
    for seed, values in scans.items():
        write_record("dtml-16", seed, values, outputs=("sdm", "seg"))
    out, err = printed("--table", "3")
    paper, ours, filtered = cells(out, "DTML")
    assert paper == ["DTML", "16 / 64", "paper", *PAPER, "", ""] and err == ""
    dice, asd = [85.0, 80.0, 86.0], [1.5, 4.0, 2.5]

    def shown(values):
        return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"

    assert ours[2:] == [
        "all", shown(dice), shown([v / 2 for v in dice]), shown(asd),
        shown([2 * v for v in asd]), "3: 1337, 1338, 1339", "`paper`",
    ]  # fmt: skip
    assert filtered[2:4] == ["largest", shown([v + 1 for v in dice])]
    assert cells(out, "UA-MT")[1][2] == "not yet run" and len(cells(out, "UA-MT")) == 2
    assert cells(out, "Mean Teacher (not in the paper)")[0][2] == "not yet run"
    assert "2 test scans" in out and "Not the paper's size" in out


def test_a_dice_says_how_many_scans_have_one(here):
    """Both masks of a scan are empty: nothing is measured there."""
    for seed, first in {1337: (0.8, 1), 1338: ("nan", "nan")}.items():
        folder = write_record("dtml-16", seed, [(0.6, 2), (0.7, 3)])
        text = (folder / "cases.csv").read_text().replace("case0,seg,all,0.6,0.3,2,4", "case0,seg,all,{0},{0},{1},{1}")
        (folder / "cases.csv").write_text(text.format(*first))
    _, ours, _ = cells(printed("--table", "3")[0], "DTML")
    assert ours[3] == f"{100 * statistics.mean([(0.8 + 0.7) / 2, 0.7]):.2f} (3 of 4)" and ours[5].endswith("(3 of 4)")


@pytest.mark.parametrize("seeds", [[1337], [1, 2, 3, 1337, 1338]])
def test_rows_are_compared_by_the_runs_of_the_seeds_that_both_have(here, seeds):
    rng = np.random.default_rng(0)
    usual, other, bound = ({s: rng.uniform(0.7, 0.9, 8) for s in (1, 2, 3, 1337, 1338, 1339)} for _ in range(3))
    chosen = {"supervised-16": (usual, [1, 2, 3, 1337, 1338]), "dtml-16": (other, [*seeds, 1339])}
    for key, (dice, which) in (chosen | {"supervised-80": (bound, seeds)}).items():
        for seed in which:
            write_record(key, seed, [(d, 1) for d in dice[seed]])
    text = printed("--table", "3")[0].split("**Comparisons**")[1].split("**Each run")[0]
    part = text.split("Against *V-Net, 16 / 0*")[1].split("Against")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]
    rows = {(name, scans): rest for name, scans, *rest in lines}
    a = {seed: dict(enumerate(100 * usual[seed])) for seed in seeds}
    for name, dice in {("V-Net", "80 / 0"): bound, ("DTML", "16 / 64"): other}.items():
        c = compare(a, {seed: dict(enumerate(100 * dice[seed])) for seed in seeds})
        difference, interval, over, median, higher, shown_seeds, recipe = rows[name]
        assert recipe == "`paper`"
        assert difference == f"{c.difference:+.2f}" and interval == f"{c.low:+.2f} to {c.high:+.2f}"
        assert over == ("runs and scans" if len(seeds) > 1 else "scans only, one run each")
        d = 100 * np.mean([dice[seed] - usual[seed] for seed in seeds], axis=0)
        assert median == f"{hodges_lehmann(d):+.2f}" and shown_seeds == ", ".join(map(str, seeds))
        above = sum(dice[seed].mean() > usual[seed].mean() for seed in seeds)
        assert higher.split(";")[0] == f"{above} of {len(seeds)}" and ("p = " in higher) == (len(seeds) == 5)
    if len(seeds) == 5:  # Holm's correction is over all lines, the one against DTML too
        assert text.count("Holm 0") + text.count("Holm 1") == 3


def test_runs_of_one_label_are_told_apart_in_the_comparisons(here):
    """V-Net, 8 / 0 is the paper's in one table and that of `tuned` in another: both are rows here, and references."""
    dice = {"supervised-8": 0.6, "dtml-8": 0.7, "supervised-normalized-8": 0.8, "cps-8": 0.85}
    dice |= {"supervised-16": 0.62, "supervised-tuned-16": 0.7, "supervised-normalized-16": 0.83}
    for key, value in dice.items():
        write_record(key, 1337, [(value + i / 1000, 1) for i in range(6)])
    text = printed()[0].split("**Comparisons**")[1].split("**Each run")[0]
    parts = {part.splitlines()[0]: part for part in text.split("Against ")[1:]}
    paper, tuned, normalized = "`paper`", "`tuned`, `--normalize none`", "`tuned`"
    expected = {
        f"*V-Net, 8 / 0* ({paper}):": [("DTML", "8 / 72", "+10.00", paper)],
        f"*V-Net, 8 / 0* ({normalized}):": [("CPS", "8 / 72", "+5.00", normalized)],
        f"*V-Net, schedule and augmentation of `tuned`, 16 / 0* ({tuned}):": [
            ("V-Net", "16 / 0", "-8.00", paper), ("V-Net", "16 / 0", "+13.00", normalized)
        ],
    }  # fmt: skip
    assert parts.keys() == expected.keys()
    for title, rows in expected.items():
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in parts[title].splitlines()[4:-1]]
        assert [(*line[:3], line[-1]) for line in lines if len(line) > 1] == rows


@pytest.mark.parametrize("profile", [name for name in GRIDS if name != "phantom"])
def test_label_scans_and_recipe_name_one_run_in_the_comparisons(profile):
    runs, tables = GRIDS[profile]
    last = {(row.key, row.output): row for name, (_, rows) in tables.items() for row in rows if name != "beyond"}
    names = [(row.label, row.scans, recipe_of([*runs[row.key].split(), "--profile", profile])) for row in last.values()]
    assert len(set(names)) == len(names)


def test_rows_without_a_common_seed_or_of_other_scans_are_not_compared(here):
    write_record("supervised-16", 1337)
    write_record("dtml-16", 1338)
    write_record("ua-mt-16", 1337, [(0.8, 1), (0.9, 2), (0.9, 2)])
    out, err = printed("--table", "3")
    assert "Comparisons" not in out and "ua-mt-16-seed1337 was tested on 3 scans, most others on 2" in err


def test_a_row_of_empty_masks_alone_is_not_compared(here):
    """A Dice of an empty prediction and an empty label is not measured."""
    write_record("supervised-16", 1337, [(0.8, 1), (0.9, 2)])
    write_record("dtml-16", 1337, [(math.nan, math.nan)] * 2)
    write_record("ua-mt-16", 1337, [(0.7, 1), (0.9, 2)])
    comparisons = printed("--table", "3")[0].split("**Comparisons**")[1].split("**Each run")[0]
    assert cells(comparisons, "UA-MT") and "| DTML |" not in comparisons


def test_a_row_whose_option_is_gone_shows_its_records_and_is_not_run(here):
    write_record("beyond-mix", 1338, [(0.72, 1), (0.84, 2)])
    args = ["--table", "beyond", "--rows", "beyond-mix"]
    out, err = printed(*args)
    assert cells(out, "crops pasted into one another")[0][2] == "78.00" and not err
    lines = printed(*args, "--list")[0].splitlines()
    assert lines[1].strip() == "1338 done" and "no longer has" in lines[3] and len(lines) == 4
    runs, _ = reproduce.select(fill(reproduce.Options, {"profile": "half", "rows": ["beyond-mix"], "seeds": [1337]}))
    assert not runs


@pytest.mark.parametrize(
    "tested",
    [{"flips": 8}, {"stride": [18, 18, 4]}, {"patch_size": [64, 64, 64]}, {"scans": "test"}, {"cases": ["case0"]}],
)
def test_a_record_that_was_tested_in_another_way_is_left_out(here, tested):
    table, row = ("beyond", "beyond-intensity") if "scans" in tested else ("1", "dtml-16")
    write_record(row, 1337, tested=tested)
    out, err = printed("--table", table, "--rows", row)
    assert "not yet run" in out and f"tested with {flag_of(next(iter(tested)))}" in err


def test_runs_of_the_same_training_share_its_folder_and_not_their_tests():
    lines = printed("--table", "beyond", "--seeds", "1337", "--list")[0].splitlines()
    commands = {line.split()[0]: lines[i + 2].strip() for i, line in enumerate(lines) if line.startswith("beyond-")}
    assert len(set(commands.values())) == len(commands) - len(TRAINED_AS)
    runs, _ = reproduce.select(fill(reproduce.Options, {"profile": "half", "table": ["beyond"], "seeds": [1337]}))
    assert len({this.tested for this in runs}) == len({this.record for this in runs}) == len(commands)
    parser = Parser()
    parser.add_dataclass(test_la.Options)
    tests = {this.key: fill(test_la.Options, parser.parse(this.test[1:])) for this in runs}
    for this in runs:
        assert tests[this.key].scans == "held-out" and str(this.tested) in this.test
        assert this.tested.parent == this.folder and tests[this.key].stride == [16, 16, 8]
    flipped = next(this for this in runs if this.key == "beyond-flips")
    assert tests["beyond-flips"].flips == 8 and flipped.folder.name == "beyond-paper-seed1337"


# records that do not count


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"change": {"k": 10.0}}, "--k 1500.0 here, 10.0 in the record"),
        ({"change": {"unlabeled": 0}}, "--unlabeled None here, 0 in the record"),
        ({"iteration": 1200}, "tested at iteration 1200 of 2400"),
        ({"outputs": ("sdm",)}, "no output seg"),
    ],
)
def test_a_record_that_does_not_fit_is_left_out_named_and_kept(here, capsys, more, text):
    record = write_record("dtml-16", 1337, **more)
    before = (record / "manifest.json").read_bytes()
    args = ["--table", "1", "--rows", "dtml-16", "--seeds", "1337"]
    line = printed(*args, "--list")[0].splitlines()[1]
    assert line.startswith("  1337 other options: ") and text in line
    out, err = printed(*args)
    assert cells(out, "L_mask")[1][2] == "not yet run" and "is left out; other options" in err and text in err
    (here / "data" / "la").mkdir(parents=True)
    with pytest.raises(SystemExit, match="1"):
        reproduce.main(["--profile", "half", *args, "--missing"])
    assert "is not overwritten; other options" in capsys.readouterr().err
    assert (record / "manifest.json").read_bytes() == before and not list((here / "runs").rglob("*.pt"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("manifest.json", None), ("manifest.json", '{"options": []}'), ("test.json", "["), ("cases.csv", "")],
)
def test_a_broken_record_is_left_out(here, name, content):
    path = write_record("dtml-16", 1337) / name
    path.unlink() if content is None else path.write_text(content)
    out, err = printed("--table", "1")
    assert cells(out, "L_mask")[1][2] == "not yet run" and "dtml-16-seed1337 is left out" in err


def test_what_cannot_change_a_result_and_options_of_later_do_not_matter(here):
    harmless = {"runs": "elsewhere", "name": "x", "device": "cuda", "threads": 3, "data": "/la", "labeled_batch": 2}
    path = write_record("dtml-16", 1337, change=harmless) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["options"]["consistency_times"], manifest["options"]["momentum"]
    path.write_text(json.dumps(manifest))
    assert "1337 done" in printed("--rows", "dtml-16", "--seeds", "1337", "--list")[0]


# the command line


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--rows", "dtml", "ua-m"], r"--rows ua-m is not in this grid. Choose from .*supervised-16, .*ua-mt"),
        (["--rows", "dtml-4"], r"--rows dtml-4 .* dtml-16"),
        (["--table", "4"], r"--table 4 .* 1, 2, 3"),
        (["--profile", "phantom", "--table", "1"], r"--table 1 .* methods"),
        (["--budget", "5"], "--budget goes with --missing"),
        (["--submit", "local", "--budget", "5"], "timeout_min"),
        (["--missing"], "data/la does not exist"),
    ],
)
def test_mistakes_are_named_before_anything_is_run(here, capsys, args, text):
    with pytest.raises(UserError, match=text):
        reproduce.main(args)
    assert not list(here.iterdir())


def test_the_list_states_state_and_command(here):
    write_record("dtml-16", 1337)
    started = here / "runs" / "reproduce" / "half" / "dtml-16-seed1338"
    write_run(started, options_of(["--labeled", "16", "--profile", "half", "--seed", "1338"]), [(0.8, 1)])
    (started / "last.pt").touch()
    lines = printed("--list", "--rows", "dtml-16", "--threads", "2")[0].splitlines()
    assert lines[0] == "dtml-16 (table 1, 2, 3, authors, tuned, dk-uxnet)"
    assert [line.strip() for line in lines[1::2]] == ["1337 done", "1338 started", "1339 missing"]
    assert lines[2].strip() == (
        "python train_dtml.py --method dtml --labeled 16 --profile half --seed 1337 --resume auto --runs "
        "runs/reproduce/half --name dtml-16-seed1337 --data data/la --threads 2"
    )
    assert command_line.read_options(lines[6].split()[2:])[2] == started.with_name("dtml-16-seed1339").relative_to(here)


# the records of results/


@pytest.mark.parametrize("profile", sorted(path.parent.name for path in (ROOT / "results").glob("*/tables.md")))
def test_committed_tables_are_what_the_committed_records_give(profile, monkeypatch):
    """Every kind of table is among them: comparisons, each run, live voxels, and what goes beyond the paper."""
    monkeypatch.chdir(ROOT)
    assert printed(profile=profile)[0].strip() == Path(f"results/{profile}/tables.md").read_text().strip()


def test_the_readme_has_the_table_at_a_glance(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert printed("--table", "glance")[0].strip() in Path("README.md").read_text(encoding="utf-8")
