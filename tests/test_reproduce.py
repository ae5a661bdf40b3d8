"""The grid of the paper's tables: what is in it, which records count, the tables by hand, and runs that are stopped."""

import dataclasses
import json
import os
import re
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, TINY

import settings
import test_la
import train_dtml
from evaluation.statistics import compare, hodges_lehmann
from methods import METHODS
from tools import make_runs, reproduce, runs
from tools.comparisons import comparison_tables, comparisons
from tools.grid import (
    COMPARED_WITH,
    LA_RUNS,
    LA_TABLES,
    RETIRED,
    TESTS,
    TRAINED_AS,
    Row,
)
from utils.errors import UserError, run
from utils.options import Parser, fill
from utils.run_lock import inherited_lock

GRIDS = {"half": (LA_RUNS, LA_TABLES), **runs.GRIDS}
SCANS = {"half": 80, "phantom": 40, "hippocampus": 209}  # of train.list
PAPER = ["90.12", "82.14", "1.82", "7.01"]


def cells(text, label):
    """The cells of the row that begins with the label, and of the lines below it that have none."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    start = next(i for i, line in enumerate(lines) if line[0] == label)
    rest = next((i for i, line in enumerate(lines[start + 1 :], start + 1) if line[0]), len(lines))
    return lines[start:rest]


def options_of(words):
    o, method_options, *_ = settings.read_options(words)
    return {**dataclasses.asdict(o), **dataclasses.asdict(method_options)}


def write_run(folder, options, scans, outputs=("seg",), iteration=None, test="test"):
    """The files of a trained and tested run. scans: (dice, asd) of each, the filter adding 0.01 to both."""
    (folder / test).mkdir(parents=True, exist_ok=True)
    (folder / "options.txt").write_text("--method dtml\n")
    (folder / "scalars.csv").write_text("iteration\n0\n")
    measured = {"iterations_per_s": 2.5, "peak_memory_gib": 1.25, "device": "a processor", "threads": 1}
    (folder / "manifest.json").write_text(json.dumps({"options": options, **measured}))
    lines = ["case,output,component,dice,jaccard,asd,hd95"]
    for i, (dice, asd) in enumerate(scans):
        for output in outputs:
            lines += [f"case{i},{output},all,{dice},{dice / 2},{asd},{2 * asd}"]
            lines += [f"case{i},{output},largest,{dice + 0.01},{dice / 2},{asd + 0.01},{2 * asd}"]
    (folder / test / "cases.csv").write_text("\n".join(lines) + "\n")
    (folder / test / "table.md").write_text("| seg |\n")
    tested = {"iteration": options["iterations"] if iteration is None else iteration}
    (folder / test / "test.json").write_text(json.dumps(tested))


def write_record(results, key, seed, scans, *, profile="half", change=(), **more):
    runs, tables = GRIDS[profile]
    scored = [row.output for _, rows in tables.values() for row in rows if row.key == key]
    more = {"outputs": list(dict.fromkeys(["seg", "sdm", "mean", *scored]))} | more
    words = [] if key in RETIRED else runs[key].split()
    options = options_of([*words, "--profile", profile, "--seed", str(seed)]) | dict(change)
    write_run(results / profile / f"{key}-seed{seed}", options, scans, test=".", **more)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty place where the default folders results/ and runs/ are."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# the grid


@pytest.mark.parametrize("profile", GRIDS)
def test_every_run_is_in_a_table_and_every_row_has_its_run(profile):
    runs, tables = GRIDS[profile]
    assert {row.key for _, rows in tables.values() for row in rows} == set(runs)


@pytest.mark.parametrize("profile", GRIDS)
def test_the_flags_parse_and_the_row_s_output_and_scans_are_the_run_s(profile):
    runs, tables = GRIDS[profile]
    for row in (row for _, rows in tables.values() for row in rows):
        words = runs[row.key].split()
        name = words[words.index("--method") + 1]
        if name not in METHODS or row.key in RETIRED:
            continue
        o, method_options, *_ = settings.read_options([*words, "--profile", profile, "--filters", "2"])
        assert row.output in METHODS[name](method_options, iterations=1).outputs
        unlabeled = SCANS[profile] - o.labeled if o.unlabeled is None else o.unlabeled
        assert row.scans == f"{o.labeled} / {unlabeled}"


@pytest.mark.parametrize(
    ("table", "reference", "others"),
    [("dk-uxnet", "supervised-8", {"8 / 0", "8 / 72"}), ("dk-uxnet", "supervised-16", {"16 / 0", "16 / 64"}),
     ("tuned", "supervised-tuned-16", {"16 / 0", "16 / 64", "80 / 0"}),
     ("tuned", "supervised-tuned-8", {"8 / 72", "80 / 0"}),
     ("normalized", "supervised-tuned-80", {"80 / 0"})],
)  # fmt: skip
def test_rows_are_compared_with_one_of_as_many_labels_and_the_bound_with_all(here, table, reference, others):
    title, rows = LA_TABLES[table]
    for key in {row.key for row in rows}:
        write_record(here / "results", key, 1337, [(0.8, 1), (0.9, 2), (0.7, 1)])
    done = {row.key: {1337: here / "results" / "half" / f"{row.key}-seed1337"} for row in rows}
    (usual,) = (row for row in rows if row.key == reference)
    with pytest.MonkeyPatch.context() as patch:  # or else what was compared with another row before is left out
        patch.setitem(COMPARED_WITH, table, [reference])
        (pairs,) = comparisons({table: (title, rows)}, done).values()
    assert {pair.row.scans for pair in pairs} == others
    assert len(pairs) == sum(row.scans in others and row != usual for row in rows)


def test_two_rows_are_compared_once_however_many_tables_they_stand_in(here):
    for key in {row.key for _, rows in LA_TABLES.values() for row in rows}:
        write_record(here / "results", key, 1337, [(0.8, 1)] * 6)
    done = {path.name[:-9]: {1337: path} for path in (here / "results" / "half").iterdir()}
    found = comparisons({name: table for name, table in LA_TABLES.items() if name != "beyond"}, done)
    titles = [table.title for table in comparison_tables(found)]
    assert len(titles) == len(found) and "Against *DTML, 16 / 64*:" in titles
    keys = [(pair.row.key, pair.row.output) for pairs in found.values() for pair in pairs]
    tuned = ("dtml-16", "seg")
    assert keys.count(tuned) == 2  # beside the V-Net, and beside the V-Net with the rate of `tuned`
    names = {name: {(pair.row.key, pair.row.output) for pair in pairs} for name, pairs in found.items()}
    assert ("supervised-16", "seg") not in names["DTML, 16 / 64"] and tuned in names["V-Net, 16 / 0"]
    assert sum(map(len, names.values())) == len(keys), "a pair stands twice"


# tables


def test_mean_and_sd_over_runs(here, capsys):
    scans = {1337: [(0.8, 1), (0.9, 2)], 1338: [(0.7, 3), (0.9, 5)], 1339: [(0.84, 2), (0.88, 3)]}
    for seed, values in scans.items():
        write_record(here / "results", "dtml-16", seed, values, outputs=("sdm", "seg"))
    reproduce.main(["--profile", "half", "--table", "3"])
    out, err = capsys.readouterr()
    paper, ours, filtered = cells(out, "DTML")
    assert paper == ["DTML", "16 / 64", "paper", *PAPER, "", ""] and err == ""
    dice = [85.0, 80.0, 86.0]
    asd = [1.5, 4.0, 2.5]

    def shown(values):
        return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"

    assert ours[2:] == [
        "all", shown(dice), shown([v / 2 for v in dice]), f"{shown(asd)} (6 of 6)",
        f"{shown([2 * v for v in asd])} (6 of 6)", "3: 1337, 1338, 1339", "`paper`",
    ]  # fmt: skip
    assert filtered[2:4] == ["largest", shown([v + 1 for v in dice])]
    assert cells(out, "UA-MT")[1][2] == "not yet run" and len(cells(out, "UA-MT")) == 2
    assert cells(out, "Mean Teacher (not in the paper)") == [[
        "Mean Teacher (not in the paper)", "16 / 64", "not yet run", *5 * [""], "`paper`"
    ]]  # fmt: skip
    assert "2 test scans" in out and "Not the paper's size" in out


@pytest.mark.parametrize("seeds", [["1337"], ["1337", "1338"]])
def test_fewer_than_three_runs_have_no_sd_and_seeds_restrict(here, capsys, seeds):
    write_record(here / "results", "dtml-16", 1337, [(0.8, 1), (0.9, 2)])
    write_record(here / "results", "dtml-16", 1338, [(0.2, 1), (0.3, 2)])
    reproduce.main(["--profile", "half", "--table", "1", "--rows", "dtml-16", "--seeds", *seeds])
    text = capsys.readouterr().out
    dice, scans = {1: ("85.00", "42.50"), 2: ("55.00", "27.50")}[len(seeds)], 2 * len(seeds)
    distances = [f"1.50 ({scans} of {scans})", f"3.00 ({scans} of {scans})"]
    assert cells(text, "L_mask")[1][2:-1] == ["all", *dice, *distances, f"{len(seeds)}: {', '.join(seeds)}"]
    assert "L_dis" not in text and "Table 2" not in text


def test_more_seeds_that_are_recorded_are_in_the_tables(here, capsys):
    for seed in (1337, 1338, 1339, 1340, 7):
        write_record(here / "results", "dtml-16", seed, [(0.8, 1), (0.9, 2)])
    write_record(here / "results", "dtml-16-0", 1337, [(0.8, 1), (0.9, 2)])
    reproduce.main(["--profile", "half", "--table", "1", "2"])
    text = capsys.readouterr().out
    assert cells(text, "L_mask")[1][7] == "5: 7, 1337, 1338, 1339, 1340" and "runs/reproduce" not in text
    reproduce.main(["--profile", "half", "--rows", "dtml-16-0", "--list"])
    assert "1340" not in capsys.readouterr().out


def test_scans_without_a_distance_are_counted_and_early_ones_not_penalised(here, capsys):
    nan = float("nan")
    write_record(here / "results", "dtml-16", 1337, [(0.8, 1), (0.0, nan)])
    write_record(here / "results", "dtml-16", 1338, [(0.0, nan), (0.0, nan)])
    reproduce.main(["--profile", "half", "--table", "1", "--rows", "dtml"])
    _, ours, _ = cells(capsys.readouterr().out, "L_mask")
    assert ours[3] == "20.00"
    assert ours[5:8] == ["1.00 (1 of 4; not penalised)", "2.00 (1 of 4; not penalised)", "2: 1337, 1338"]


def test_with_penalties_a_mean_is_of_all_scans(here, capsys):
    nan = float("nan")
    for seed, asd in {1337: (1, 11), 1338: (11, 11)}.items():
        write_record(here / "results", "dtml-16", seed, [(0.8, a) if a < 11 else (0.0, nan) for a in asd])
        path = here / "results" / "half" / f"dtml-16-seed{seed}" / "cases.csv"
        head, *lines = path.read_text().splitlines()
        values = [line.split(",")[5:] for line in lines]
        more = [f"{11 if asd == 'nan' else asd},{11 if hd95 == 'nan' else hd95}" for asd, hd95 in values]
        lines = [f"{line},{text}" for line, text in zip(lines, more, strict=True)]
        path.write_text("\n".join([f"{head},asd_penalised,hd95_penalised", *lines, ""]))
    reproduce.main(["--profile", "half", "--table", "1", "--rows", "dtml"])
    _, ours, _ = cells(capsys.readouterr().out, "L_mask")
    assert ours[5:7] == [
        "8.50 (1 of 4; these alone 1.00)",
        "8.75 (1 of 4; these alone 2.00)",
    ]  # of 6 and 11; 6.5 and 11


def test_each_run_is_there_with_every_output_and_what_it_took(here, capsys):
    scans = [(0.8, 1), (0.0, float("nan")), (0.7, 4)]
    write_record(here / "results", "dtml-16", 1338, scans, outputs=("seg", "sdm"))
    manifest = here / "results" / "half" / "dtml-16-seed1338" / "manifest.json"
    measured = {"wall_s": 3600.0, "commit": "0123456789"}
    measured["resumed"] = [{"device": "a processor", "threads": n, "commit": "0123456789"} for n in (2, 1)]
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | measured))
    reproduce.main(["--profile", "half", "--table", "1"])
    found = cells(capsys.readouterr().out, "[dtml-16-seed1338](dtml-16-seed1338)")
    assert [line[1:4] for line in found] == [[o, c, "3"] for o in ("seg", "sdm") for c in ("all", "largest")]
    assert found[0][4:] == [
        f"50.00 ± {np.std([80, 0, 70], ddof=1):.2f}", "70.00", f"25.00 ± {np.std([40, 0, 35], ddof=1):.2f}",
        "2.50 (2 of 3; not penalised)", "5.00 (2 of 3; not penalised)",
        "60 min, a processor, threads: 1 and 2, 0123456",
    ]  # fmt: skip
    assert found[1][5] == "71.00" and found[1][9] == ""


def test_other_test_scans_are_told(here, capsys):
    write_record(here / "results", "dtml-16", 1337, [(0.8, 1), (0.9, 2)])
    write_record(here / "results", "dtml-16", 1338, [(0.8, 1), (0.9, 2)])
    write_record(here / "results", "supervised-16", 1337, [(0.8, 1)])
    reproduce.main(["--profile", "half"])
    assert "supervised-16-seed1337 was tested on 1 scans, most others on 2" in capsys.readouterr().err


@pytest.mark.parametrize("seeds", [[1337], [1337, 1338], [1, 2, 3, 1337, 1338]])
def test_rows_are_compared_by_the_runs_of_the_seeds_that_both_have(here, capsys, seeds):
    rng = np.random.default_rng(0)
    every = (1, 2, 3, 1337, 1338, 1339)
    usual, other, bound = ({seed: rng.uniform(0.7, 0.9, 8) for seed in every} for _ in range(3))
    for key, dice, which in (
        ("supervised-16", usual, (1, 2, 3, 1337, 1338)),
        ("dtml-16", other, [*seeds, 1339]),
        ("supervised-80", bound, seeds),
    ):
        for seed in which:
            write_record(here / "results", key, seed, [(d, 1) for d in dice[seed]])
    reproduce.main(["--profile", "half", "--table", "3"])
    text = capsys.readouterr().out.split("**Comparisons**")[1].split("**Each run")[0]
    assert text.count("Against *") == 2 and "Against *V-Net, 16 / 0*" in text
    part = text.split("Against *V-Net")[1].split("Against")[0]
    lines = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")]
    found = {(line[0].strip(), line[1].strip()): [cell.strip() for cell in line[2:]] for line in lines}
    a = {seed: dict(enumerate(100 * usual[seed])) for seed in seeds}
    for name, dice in {("V-Net", "80 / 0"): bound, ("DTML", "16 / 64"): other}.items():
        b = {seed: dict(enumerate(100 * dice[seed])) for seed in seeds}
        c = compare(a, b)
        difference, interval, over, median, higher, told = found[name]
        assert difference == f"{c.difference:+.2f}" and interval == f"{c.low:+.2f} to {c.high:+.2f}"
        assert over == ("runs and scans" if len(seeds) > 1 else "scans only, one run each")
        d = 100 * np.mean([dice[seed] - usual[seed] for seed in seeds], axis=0)
        assert median == f"{hodges_lehmann(d):+.2f}" and told == ", ".join(map(str, seeds))
        above = sum(dice[seed].mean() > usual[seed].mean() for seed in seeds)
        assert higher.split(";")[0] == f"{above} of {len(seeds)}" and ("p = " in higher) == (len(seeds) == 5)
    if len(seeds) == 5:  # Holm's correction is over all lines, the one against DTML too
        assert text.count("Holm 0") + text.count("Holm 1") == 3


def test_rows_without_a_common_seed_or_of_other_scans_are_not_compared(here, capsys):
    write_record(here / "results", "supervised-16", 1337, [(0.8, 1), (0.9, 2)])
    write_record(here / "results", "dtml-16", 1338, [(0.8, 1), (0.9, 2)])
    write_record(here / "results", "ua-mt-16", 1337, [(0.8, 1), (0.9, 2), (0.9, 2)])
    reproduce.main(["--profile", "half", "--table", "3"])
    assert "Comparisons" not in capsys.readouterr().out


def test_the_phantom_table(here, capsys):
    write_record(here / "results", "dtml-8", 1337, [(0.8, 1), (0.9, 2)], profile="phantom")
    reproduce.main(["--profile", "phantom"])
    text = capsys.readouterr().out
    assert cells(text, "dtml") == [["dtml", "85.00", "86.00", "2.50", "1.25"]]
    assert "a processor, threads: 1" in text and cells(text, "supervised, M_d alone")[0][1] == "not yet run"


def test_the_table_at_a_glance(here, capsys):
    for seed, dice in {1337: 0.8, 1338: 0.7, 1339: 0.9}.items():
        write_record(here / "results", "supervised-normalized-16", seed, [(dice, 2)] * 6)
        write_record(here / "results", "plus-16", seed, [(dice + 0.02, 3)] * 6)
    for seed in (1337, 1338):
        write_record(here / "results", "plus-alone-16", seed, [(0.7, 1)] * 5 + [(0.1, float("nan"))])
    reproduce.main(["--profile", "half", "--table", "glance"])
    out, err = capsys.readouterr()
    head, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    rows = {line[0]: dict(zip(head[1:], line[1:], strict=True)) for line in lines}
    assert list(rows) == ["4", "8", "16", "80"] and set(rows["8"].values()) == {"not yet run", ""}
    assert rows["16"]["V-Net"] == "80.00 ± 10.00 (3)" and rows["80"]["DTML+"] == ""
    assert rows["16"]["DTML+, labeled scans alone"] == "60.00 (2)" and rows["16"]["DTML+"] == "**82.00 ± 10.00** (3)"
    gain = rows["16"]["gain from the unlabeled scans"]
    assert gain.startswith("+17.00 (") and gain.endswith(", 2 runs each)") and err == ""
    reproduce.main(["--profile", "half"])
    assert "gain from the unlabeled scans" not in capsys.readouterr().out


THREE = ("seg", "sdm", "mean")


def write_beyond(results, key, dice, *, tested=(), outputs=THREE, seed=1337):
    """A record on held-out scans, with other dice for each output."""
    write_record(results, key, seed, [(0.5, 1)] * len(dice), outputs=outputs)
    folder = results / "half" / f"{key}-seed{seed}"
    lines = ["case,output,component,dice,jaccard,asd,hd95"]
    for i, output in enumerate(outputs):
        for c, value in enumerate(dice):
            for component in ("all", "largest"):
                lines.append(f"case{c},{output},{component},{value + 0.01 * i},0.4,2,{3 + i}")
    (folder / "cases.csv").write_text("\n".join(lines) + "\n")
    how = {"iteration": 2400, **TESTS[key], **dict(tested)}
    (folder / "test.json").write_text(json.dumps(how))


def test_the_table_of_what_goes_beyond_the_paper(here, capsys):
    reproduce.main(["--profile", "half"])
    assert "held-out" not in capsys.readouterr().out  # no records, not asked for
    paper, other = (0.70, 0.80, 0.75, 0.85, 0.75, 0.80), (0.72, 0.84, 0.74, 0.90, 0.76, 0.84)
    write_beyond(here / "results", "beyond-paper", paper)
    write_beyond(here / "results", "beyond-intensity", other, outputs=THREE)
    reproduce.main(["--profile", "half"])
    text = capsys.readouterr().out
    (usual,), (more,) = (cells(text, label) for label in ("as in the paper", "with intensity augmentation"))
    assert usual[2:] == ["77.50", "78.50", "79.50", "5.00 (6 of 6)", "-", "1: 1337"]
    assert more[2:6] == ["80.00", "81.00", "82.00", "5.00 (6 of 6)"]
    pattern = r"\+2.50 \(([+-][\d.]+) to ([+-][\d.]+); scans only, one run each\)"
    d = 100 * (np.array(other) - np.array(paper))
    low, high = map(float, re.fullmatch(pattern.replace("2.50", f"{d.mean():.2f}"), more[6]).groups())
    assert low < d.mean() < high and high - low < 2 * np.ptp(d)
    assert cells(text, "k = 50")[0][2] == "not yet run"


def test_a_row_whose_option_is_gone_shows_its_records_and_is_not_run(here, capsys):
    write_beyond(here / "results", "beyond-mix", (0.72, 0.84), seed=1338)
    words = ["--profile", "half", "--table", "beyond", "--rows", "beyond-mix"]
    reproduce.main(words)
    out, err = capsys.readouterr()
    assert cells(out, "crops pasted into one another")[0][2] == "78.00" and not err
    reproduce.main([*words, "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].strip() == "1338 done" and "no longer has" in lines[3] and len(lines) == 4
    runs, _ = reproduce.select(fill(reproduce.Options, {"profile": "half", "rows": ["beyond-mix"], "seeds": [1337]}))
    assert not runs


@pytest.mark.parametrize("tested", [{"scans": "test"}])
def test_a_record_that_was_tested_in_another_way_is_left_out(here, capsys, tested):
    write_beyond(here / "results", "beyond-intensity", (0.7, 0.8), tested=tested, outputs=THREE)
    reproduce.main(["--profile", "half", "--table", "beyond", "--rows", "beyond-intensity"])
    out, err = capsys.readouterr()
    assert "not yet run" in out and f"tested with --{next(iter(tested))}" in err


@pytest.mark.parametrize(
    "tested",
    [{"flips": 8}, {"stride": [18, 18, 4]}, {"patch_size": [64, 64, 64]}],
)
def test_so_is_a_record_of_the_paper_s_tables(here, capsys, tested):
    write_record(here / "results", "dtml-16", 1337, [(0.8, 1), (0.9, 2)])
    path = here / "results" / "half" / "dtml-16-seed1337" / "test.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | tested))
    reproduce.main(["--profile", "half", "--table", "1", "--rows", "dtml-16"])
    out, err = capsys.readouterr()
    assert "not yet run" in out and f"tested with --{next(iter(tested))}" in err


def test_runs_of_the_same_training_share_its_folder_and_not_their_tests(capsys):
    reproduce.main(["--profile", "half", "--table", "beyond", "--seeds", "1337", "--list"])
    lines = capsys.readouterr().out.splitlines()
    commands = {line.split()[0]: lines[i + 2].strip() for i, line in enumerate(lines) if line.startswith("beyond-")}
    assert len(set(commands.values())) == len(commands) - len(TRAINED_AS)
    runs, _ = reproduce.select(fill(reproduce.Options, {"profile": "half", "table": ["beyond"], "seeds": [1337]}))
    assert len({this.tested for this in runs}) == len({this.record for this in runs}) == len(commands)
    for this in runs:
        assert this.test[this.test.index("--scans") + 1] == "held-out" and str(this.tested) in this.test
        assert this.tested.parent == this.folder and given_to_test(this).stride == [16, 16, 8]
    flipped = next(this for this in runs if this.key == "beyond-flips")
    assert given_to_test(flipped).flips == 8 and flipped.folder.name == "beyond-paper-seed1337"


def given_to_test(this):
    parser = Parser()
    parser.add_dataclass(test_la.Options)
    return fill(test_la.Options, parser.parse(this.test[1:]))


# records that do not count


@pytest.mark.parametrize(
    "more, text",
    [
        ({"change": {"k": 10.0}}, "--k 1500.0 here, 10.0 in the record"),
        ({"change": {"unlabeled": 0}}, "--unlabeled None here, 0 in the record"),
        ({"iteration": 1200}, "tested at iteration 1200 of 2400"),
        ({"outputs": ("sdm",)}, "no output seg"),
    ],
)
def test_a_record_that_does_not_fit_is_left_out_named_and_kept(here, capsys, more, text):
    write_record(here / "results", "dtml-16", 1337, [(0.8, 1), (0.9, 2)], **more)
    record = here / "results" / "half" / "dtml-16-seed1337"
    before = (record / "manifest.json").read_bytes()
    words = ["--profile", "half", "--table", "1", "--rows", "dtml-16", "--seeds", "1337"]
    reproduce.main([*words, "--list"])
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("  1337 other options: ") and text in line
    reproduce.main(words)
    out, err = capsys.readouterr()
    assert cells(out, "L_mask")[1][2] == "not yet run" and "is left out; other options" in err and text in err
    (here / "data" / "la").mkdir(parents=True)
    with pytest.raises(SystemExit, match="1"):
        reproduce.main([*words, "--missing"])
    assert "is not overwritten; other options" in capsys.readouterr().err
    assert (record / "manifest.json").read_bytes() == before and not list((here / "runs").rglob("*.pt"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("manifest.json", None), ("manifest.json", '{"options": []}'), ("test.json", "{"), ("test.json", "[]"),
     ("cases.csv", None), ("cases.csv", "")],
)  # fmt: skip
def test_a_broken_record_is_left_out(here, capsys, name, content):
    write_record(here / "results", "dtml-16", 1337, [(0.8, 1), (0.9, 2)])
    path = here / "results" / "half" / "dtml-16-seed1337" / name
    path.unlink() if content is None else path.write_text(content)
    reproduce.main(["--profile", "half", "--table", "1"])
    out, err = capsys.readouterr()
    assert cells(out, "L_mask")[1][2] == "not yet run" and "dtml-16-seed1337 is left out" in err


def test_what_cannot_change_a_result_and_options_of_later_do_not_matter(here, capsys):
    harmless = {"runs": "elsewhere", "name": "x", "device": "cuda", "threads": 3, "data": "/la", "labeled_batch": 2}
    write_record(here / "results", "dtml-16", 1337, [(0.8, 1), (0.9, 2)], change=harmless)
    path = here / "results" / "half" / "dtml-16-seed1337" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["options"]["consistency_times"], manifest["options"]["momentum"]
    path.write_text(json.dumps(manifest))
    reproduce.main(["--profile", "half", "--rows", "dtml-16", "--seeds", "1337", "--list"])
    assert "1337 done" in capsys.readouterr().out


def test_a_preset_s_name_does_not_matter_but_what_it_sets_does(here, capsys):
    """Records of `tuned` from when it was called `best`."""
    write_record(here / "results", "tuned-16", 1337, [(0.8, 1), (0.9, 2)], change={"preset": "best"})
    write_record(here / "results", "tuned-16", 1338, [(0.8, 1), (0.9, 2)], change={"preset": "best", "k": 1500.0})
    reproduce.main(["--profile", "half", "--rows", "tuned-16", "--list"])
    text = capsys.readouterr().out
    assert "1337 done" in text and "1338 other options: --k 50.0 here, 1500.0 in the record\n" in text


def test_live_voxels_are_those_of_the_runs_that_logged_them(here, capsys):
    for key, live in (("dtml-16", (0.01, 0, 0.02)), ("supervised-16", ())):
        write_record(here / "results", key, 1337, [(0.8, 1), (0.9, 2)])
        curve = "".join(f"{i},{share}\n" for i, share in enumerate(live))
        (here / "results" / "half" / f"{key}-seed1337" / "scalars.csv").write_text(
            "iteration,live_gradient/sdm\n" + curve
        )
    reproduce.main(["--profile", "half", "--table", "2"])
    name = "[dtml-16-seed1337](dtml-16-seed1337)"
    text = capsys.readouterr().out
    table = text[text.index("**M_d's gradient**") : text.index("**Each run")]
    assert cells(table, name) == [[name, "1500", "1.000", "0.000", "1 of 3", "85.00"]] and "supervised" not in table


# the command line


@pytest.mark.parametrize(
    "words, text",
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
def test_mistakes_are_named_before_anything_is_run(here, capsys, words, text):
    with pytest.raises(UserError, match=text):
        reproduce.main(words)
    assert not list(here.iterdir())


def test_the_list_tells_state_and_command(here, capsys):
    write_record(here / "results", "dtml-16", 1337, [(0.8, 1), (0.9, 2)])
    started = here / "runs" / "reproduce" / "half" / "dtml-16-seed1338"
    write_run(started, options_of(["--labeled", "16", "--profile", "half", "--seed", "1338"]), [(0.8, 1)])
    (started / "last.pt").touch()
    reproduce.main(["--list", "--profile", "half", "--rows", "dtml-16", "--threads", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "dtml-16 (table 1, 2, 3, authors, tuned, dk-uxnet)"
    assert [line.strip() for line in lines[1::2]] == ["1337 done", "1338 started", "1339 missing"]
    assert lines[2].strip() == (
        "python train_dtml.py --method dtml --labeled 16 --profile half --seed 1337 --resume auto --runs "
        "runs/reproduce/half --name dtml-16-seed1337 --data data/la --threads 2"
    )
    assert settings.read_options(lines[6].split()[2:])[2] == started.with_name("dtml-16-seed1339").relative_to(here)


# runs, with stand-ins for the two scripts

TRAIN = """
import os, shutil, signal, sys, time
from pathlib import Path
here, value = Path(__file__).parent, lambda flag: sys.argv[sys.argv.index(flag) + 1]
folder = Path(value("--runs")) / value("--name")
with open(here / "calls", "a") as calls:
    calls.write(f"{folder.name}\\n")
plan = here / f"plan-{folder.name}"
words = plan.read_text().split() if plan.exists() else []
shutil.copytree(here / folder.name, folder, dirs_exist_ok=True)
(folder / "last.pt").touch()
if words and words[0] == "exit":
    sys.exit(int(words[1]))
if words:  # a signal to the parent, or none; then save at the first signal
    got = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: got.append(number))
    plan.unlink()
    (here / "ready").touch()
    for word in words[1:]:
        before = len(got)
        os.kill(os.getppid(), int(word))
        while len(got) == before:
            time.sleep(0.01)
    while not got:
        time.sleep(0.01)
    (here / "saved").write_text(" ".join(map(str, map(int, got))))
    sys.exit(128 + got[0])
"""
TEST = """
import sys
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--checkpoint") + 1])
with open(Path(__file__).parent / "calls", "a") as calls:
    calls.write(f"test {folder.name}\\n")
"""


@pytest.fixture
def stage(here, monkeypatch):
    """Scripts that copy finished runs into place; plan(name, words) sets what a training does in place of that."""
    scripts = here / "scripts"
    scripts.mkdir()
    (here / "data" / "la").mkdir(parents=True)
    (scripts / "train_dtml.py").write_text(TRAIN)
    (scripts / "test_la.py").write_text(TEST)
    for key in ("supervised-16", "dtml-16"):
        for seed in (1337, 1338):
            options = options_of([*LA_RUNS[key].split(), "--profile", "half", "--seed", str(seed)])
            write_run(scripts / f"{key}-seed{seed}", options, [(0.8, 1), (0.9, 2)])
    monkeypatch.setattr(make_runs, "ROOT", scripts)

    def missing(*more):
        rows = ["--table", "3", "--rows", "supervised-16", "dtml-16", "--seeds", "1337", "1338"]
        return run(lambda: reproduce.main(["--profile", "half", *rows, "--missing", *more]))

    return SimpleNamespace(
        missing=missing,
        scripts=scripts,
        plan=lambda name, words: (scripts / f"plan-{name}").write_text(words),
        calls=lambda: (scripts / "calls").read_text().splitlines() if (scripts / "calls").exists() else [],
        records=lambda: sorted(path.name for path in (here / "results").rglob("[!.]*-seed*")),
    )


ALL = [f"{key}-seed{seed}" for seed in (1337, 1338) for key in ("supervised-16", "dtml-16")]


def test_missing_runs_are_made_seed_by_seed_and_once(stage, here, capfd):
    write_record(here / "results", "dtml-16", 1337, [(0.1, 1), (0.1, 2)])
    stage.missing("--threads", "1")
    out, err = capfd.readouterr()
    names = [name for name in ALL if name != "dtml-16-seed1337"]
    assert stage.calls() == [line for name in names for line in (name, f"test {name}")]
    assert stage.records() == sorted(ALL) and "+ python train_dtml.py --method supervised" in err
    made = here / "results" / "half" / "dtml-16-seed1338"
    assert sorted(path.name for path in made.iterdir()) == [
        "cases.csv", "manifest.json", "options.txt", "scalars.csv", "table.md", "test.json",
    ]  # fmt: skip
    assert cells(out, "V-Net")[1][3] == "85.00" and cells(out, "DTML")[1][7] == "2: 1337, 1338"
    assert not [path for path in made.parent.iterdir() if path.name.startswith(".")]
    stage.missing()
    assert len(stage.calls()) == 6


def test_a_failed_run_is_named_and_the_others_go_on(stage, capfd):
    stage.plan("supervised-16-seed1337", "exit 3")
    stage.plan("dtml-16-seed1338", "exit 2")
    with pytest.raises(SystemExit) as left:
        stage.missing()
    out, err = capfd.readouterr()
    assert left.value.code == 1 and stage.records() == ["dtml-16-seed1337", "supervised-16-seed1338"]
    end = err.split("failed:\n")[-1]
    assert "supervised-16-seed1337: train_dtml.py left with exit code 3 (diverged)" in end
    assert "dtml-16-seed1338: train_dtml.py left with exit code 2" in end and cells(out, "DTML")[1][7] == "1: 1337"


def test_a_run_folder_of_other_options_is_not_gone_on_with(stage, here, capfd):
    options = options_of([*LA_RUNS["dtml-16"].split(), "--profile", "half", "--k", "10"])
    folder = here / "runs" / "reproduce" / "half" / "dtml-16-seed1337"
    write_run(folder, options, [(0.8, 1)])
    (folder / "last.pt").touch()
    with pytest.raises(SystemExit, match="1"):
        stage.missing()
    assert "dtml-16-seed1337 is not overwritten; other options: --k 1500.0 here, 10.0" in capfd.readouterr().err
    assert "dtml-16-seed1337" not in stage.calls() and len(stage.records()) == 3


def test_the_budget_ends_a_training_and_the_same_command_goes_on(stage, monkeypatch, capfd):
    stage.plan("dtml-16-seed1337", "wait")
    clock = SimpleNamespace(monotonic=lambda: 1e9 * (stage.scripts / "ready").exists(), sleep=time.sleep)
    monkeypatch.setattr(make_runs, "time", clock)
    stage.missing("--budget", "60")
    out, err = capfd.readouterr()
    assert (stage.scripts / "saved").read_text() == "15" and stage.records() == ["supervised-16-seed1337"]
    assert "60 minutes are used up; the same command goes on" in err and cells(out, "DTML")[1][2] == "not yet run"
    (stage.scripts / "ready").unlink()
    stage.missing("--budget", "60")
    assert stage.records() == sorted(ALL) and stage.calls().count("dtml-16-seed1337") == 2


@pytest.mark.parametrize("number, code", [(15, 143)])
def test_a_signal_is_handed_on_and_ends_all(stage, number, code, capfd):
    stage.plan("dtml-16-seed1337", f"signal {number}")
    with pytest.raises(SystemExit) as left:
        stage.missing()
    assert left.value.code == code and (stage.scripts / "saved").read_text() == str(number)
    assert stage.records() == ["supervised-16-seed1337"] and "the same command goes on" in capfd.readouterr().err
    stage.missing()
    assert stage.records() == sorted(ALL)


def test_the_second_ctrl_c_reaches_the_script_too(stage):
    stage.plan("supervised-16-seed1337", "signal 2 2")
    with pytest.raises(SystemExit) as left:
        stage.missing()
    assert left.value.code == 130 and (stage.scripts / "saved").read_text().startswith("2 2")


def test_a_run_that_another_process_is_at_is_left_to_it(stage, here, capfd):
    folder = here / "runs" / "reproduce" / "half"
    folder.mkdir(parents=True)
    unfinished = here / "results" / "half" / ".dtml-16-seed1337.partial"
    unfinished.mkdir(parents=True)
    with inherited_lock(folder / ".dtml-16-seed1337.lock"), pytest.raises(SystemExit, match="1"):
        stage.missing()
    assert "dtml-16-seed1337: another process is at it" in capfd.readouterr().err
    assert stage.records() == sorted(set(ALL) - {"dtml-16-seed1337"}) and unfinished.exists()


# jobs


def test_slurm_jobs_are_submitted_and_not_waited_for(stage, here, monkeypatch, capfd):
    write_record(here / "results", "dtml-16", 1337, [(0.1, 1), (0.1, 2)])
    with pytest.raises(UserError, match="srun"):
        reproduce.main(["--profile", "half", "--rows", "dtml", "--submit", "slurm"])
    for name in ("srun", "sbatch"):
        (here / name).write_text('#!/bin/sh\ncat "$1" >> batch\necho Submitted batch job 4$(grep -c shebang batch)\n')
        (here / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{here}{os.pathsep}{os.environ['PATH']}")
    words = ["--profile", "half", "--table", "1", "--rows", "dtml-16", "--submit", "slurm", "--slurm"]
    with pytest.raises(UserError, match="gpu_per_node"):
        reproduce.main([*words, "gpu_per_node=1"])
    reproduce.main([*words, "gpus_per_node=1", "slurm_partition=long"])
    out = capfd.readouterr().out
    assert [line.split(": ")[1] for line in out.splitlines()] == ["dtml-16-seed1338", "dtml-16-seed1339"]
    batch = (here / "batch").read_text()
    words = ["--profile", "half", "--table", "beyond", "--rows", "beyond-paper", "beyond-flips", "--seeds", "1337"]
    reproduce.main([*words, "--submit", "slurm", "--slurm", "gpus_per_node=1"])
    out = capfd.readouterr().out
    assert [line.split(": ")[1] for line in out.splitlines()] == ["beyond-paper-seed1337 beyond-flips-seed1337"]
    assert "--gpus-per-node=1" in batch and "--partition=long" in batch and "--time=1440" in batch
    assert stage.calls() == [] and stage.records() == ["dtml-16-seed1337"]


# the real thing


def test_a_job_makes_all_runs_of_its_folder(monkeypatch):
    monkeypatch.setattr(make_runs, "make", lambda this, stop: {"a": "", "b": "broken", "c": "worse"}[this])
    assert make_runs.Job(["a", "b", "a", "c"])() == "broken; worse" and make_runs.Job(["a"])() == ""


@pytest.mark.slow
def test_a_run_cut_short_and_finished_by_a_job_equals_one_in_one_go(tiny_set, here, monkeypatch, capfd):
    flags = [*TINY, "--method", "supervised", "--batch-size", "2", "--iterations", "24", "--log-every", "1"]
    monkeypatch.setattr(runs, "LA_RUNS", {"supervised-4": " ".join(flags)})
    monkeypatch.setattr(runs, "LA_TABLES", {"3": ("Table 3", [Row("V-Net", "4 / 0", "supervised-4")])})
    words = ["--seeds", "7", "--data", str(tiny_set), "--threads", "1"]
    scalars = here / "runs" / "reproduce" / "full" / "supervised-4-seed7" / "scalars.csv"
    seen = SimpleNamespace(
        monotonic=lambda: 1e9 * (scalars.exists() and len(scalars.read_text().splitlines()) > 2), sleep=time.sleep
    )
    with monkeypatch.context() as patch:
        patch.setattr(make_runs, "time", seen)
        reproduce.main([*words, "--missing", "--budget", "1"])
    assert "not yet run" in capfd.readouterr().out and 2 < len(scalars.read_text().splitlines()) < 25
    reproduce.main([*words, "--list"])
    assert "7 started" in capfd.readouterr().out
    reproduce.main([*words, "--submit", "local"])
    assert cells(capfd.readouterr().out, "V-Net")[1][7] == "1: 7"

    train_dtml.main([*flags, "--seed", "7", "--data", str(tiny_set), "--runs", "whole", "--name", "run"])
    test_la.main(["--checkpoint", "whole/run"])
    record = here / "results" / "full" / "supervised-4-seed7"
    assert (record / "scalars.csv").read_text() == Path("whole/run/scalars.csv").read_text()
    assert (record / "cases.csv").read_text() == Path("whole/run/test/cases.csv").read_text()
    assert json.loads((record / "manifest.json").read_text())["resumed"]


@pytest.mark.parametrize("profile", sorted(path.parent.name for path in (ROOT / "results").glob("*/tables.md")))
def test_committed_tables_are_what_the_committed_records_give(profile, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    reproduce.main(["--profile", profile])
    committed, printed = Path(f"results/{profile}/tables.md").read_text(), capsys.readouterr().out
    assert printed.strip() == committed.strip()


def test_the_readme_has_the_table_at_a_glance(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    reproduce.main(["--profile", "half", "--table", "glance"])
    assert capsys.readouterr().out.strip() in Path("README.md").read_text(encoding="utf-8")
