"""Tables of tools.reproduce in three formats: LaTeX by its structure, CSV by the numbers of the records."""

import csv
import functools
import io
import itertools
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import ROOT
from records import cells, write_record

from evaluation import statistics
from evaluation.predictions import read_scores
from evaluation.statistics import compare
from methods import METHODS
from tools import methods_page, pictures, reproduce, table_rows
from tools.command_line import read_options
from tools.formats import Cell, Column, Line, Table, as_csv, latex, latex_text, markdown
from tools.grid import LA_RUNS, LA_TABLES, METHODS_TABLE, PHANTOM_TABLES, Row
from tools.runs import GRIDS, recipe_of
from utils.errors import UserError
from utils.text import markdown_table

PREAMBLE = "\\documentclass{article}\\usepackage{booktabs,longtable}\\begin{document}\n"


def check_latex(text, folder):
    """Compiles a page of tables where pdflatex is there; else looks at commands, braces, columns and signs."""
    if shutil.which("pdflatex"):
        (folder / "page.tex").write_text(f"{PREAMBLE}{text}\n\\end{{document}}\n", encoding="utf-8")
        args = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
        done = subprocess.run(args, cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout[-2000:]
        return
    text = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert text.isascii()
    open_ones = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if kind == "begin":
            open_ones.append(name)
        else:
            assert open_ones.pop() == name
    assert not open_ones
    bare = re.sub(r"\\[&%$#_{}\\]", "", text)  # signs that are escaped, and ends of lines
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0 and not set(bare) & set("%#_~^")
    assert set(re.findall(r"\$([^$]*)\$", bare)) <= {"\\pm", "-", "\\times"}
    commands = set(re.findall(r"\\([a-zA-Z]+)", text))
    assert commands <= {"begin", "end", "centering", "caption", "toprule", "midrule", "bottomrule", "textbf", "texttt",
                        "emph", "pm", "times", "textbackslash"}  # fmt: skip
    tables = re.findall(r"\\begin\{(tabular|longtable)\}\{([lr]+)\}(.*?)\\end\{\1\}", text, re.S)
    assert tables
    for _, layout, body in tables:
        inside = body[body.index("\\toprule") : body.index("\\bottomrule")]
        rows = [line for line in inside.splitlines() if line.endswith("\\\\")]
        assert len(rows) > 1
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(layout) - 1}


def printed(capsys, *args):
    reproduce.main(list(args))
    return capsys.readouterr().out


def records_of(capsys, *args):
    """The lines of a CSV by the name of their table."""
    rows = list(csv.DictReader(io.StringIO(printed(capsys, *args, "--format", "csv"))))
    assert rows and None not in rows[0]
    return {name: list(lines) for name, lines in itertools.groupby(rows, lambda row: row["table"])}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_csv_has_the_numbers_of_the_records(here, capsys):
    rng = np.random.default_rng(0)
    dice = {key: rng.uniform(0.6, 0.9, (3, 6)) for key in ("supervised-normalized-8", "cps-8", "plus-8")}
    asd = rng.uniform(1, 5, (3, 6))
    for key, runs in dice.items():
        for i, scans in enumerate(runs):
            write_record(key, 1337 + i, list(zip(scans, asd[i], strict=True)))
    (here / "results" / "half" / "cost.csv").write_text("method,cost\nsupervised,1\ncps,2.5\ndtml-plus,3.25\n")
    parts = records_of(capsys, "--profile", "half", "--table", "methods", "--labels", "8")
    rows = {row["row"]: row for row in parts["methods"]}
    means = {key: 100 * runs.mean(1) for key, runs in dice.items()}
    order = sorted(means, key=lambda key: -means[key].mean())
    for label, key in {"V-Net": "supervised-normalized-8", "CPS": "cps-8", "DTML+": "plus-8"}.items():
        row = rows[label]
        numbers = {"dice": means[key].mean(), "dice_sd": means[key].std(ddof=1), "jaccard": means[key].mean() / 2,
                   "asd": asd.mean(1).mean(), "asd_sd": asd.mean(1).std(ddof=1), "hd95": 2 * asd.mean(), "runs": 3,
                   "rank": 1 + order.index(key), "ranked": 3, "labeled": 8, "asd_scans": 18}  # fmt: skip
        assert {name: float(row[name]) for name in numbers} == pytest.approx(numbers, abs=1e-6)
        assert row["recipe"] == "tuned" and row["seeds"] == "1337, 1338, 1339"
    assert [rows[label]["cost"] for label in ("V-Net", "CPS", "DTML+", "UA-MT")] == ["1", "2.5", "3.25", ""]
    assert rows["DTML+, labeled scans alone"]["cost"] == "" and rows["UA-MT"]["runs"] == "0"
    assert rows["UA-MT"]["dice"] == ""
    one = {row["reference"]: row for row in parts["comparisons"] if row["row"] == "CPS"}["V-Net, 8 / 0"]
    usual, ours = ({1337 + i: dict(enumerate(100 * run)) for i, run in enumerate(dice[k])}
                   for k in ("supervised-normalized-8", "cps-8"))  # fmt: skip
    c = compare(usual, ours, most=100)
    numbers = {"difference": c.difference, "low": c.low, "high": c.high, "higher": c.higher, "pairs": 3}
    assert {name: float(one[name]) for name in numbers} == pytest.approx(numbers, abs=1e-6)
    single = next(r for r in parts["runs"] if (r["run"], r["component"]) == ("cps-8-seed1338", "largest"))
    assert float(single["dice"]) == pytest.approx(100 * (dice["cps-8"][1] + 0.01).mean(), abs=1e-6)
    assert float(single["dice_sd"]) == pytest.approx(100 * dice["cps-8"][1].std(ddof=1), abs=1e-6)


def test_the_best_of_as_many_labels_is_bold_in_latex_and_not_in_markdown(here, capsys):
    for key, value in {"supervised-normalized-8": 0.7, "cps-8": 0.8, "supervised-normalized-80": 0.9}.items():
        write_record(key, 1337, [(value, 10 * value)] * 6)
    args = ["--profile", "half", "--table", "methods", "--labels", "8", "80"]
    text = printed(capsys, *args, "--format", "latex")
    check_latex(text, here)
    text = text.split("\\end{table}")[0]
    lines = {line.split(" & ")[0]: line.split(" & ") for line in text.splitlines() if " & " in line}
    assert lines["CPS"][3:7] == ["\\textbf{80.00}", "\\textbf{40.00}", "8.00", "16.00"]
    vnet = [line.split(" & ") for line in text.splitlines() if line.startswith("V-Net & ")]
    assert vnet[0][3:6] == ["70.00", "35.00", "\\textbf{7.00}"]  # a smaller distance is better
    assert vnet[1][3] == "90.00"  # alone with its labels
    assert "**80.00**" not in printed(capsys, *args)


def test_a_distance_that_is_too_low_is_not_the_best_in_latex(here, capsys):
    """An empty prediction of an early record has neither distance nor penalty: the other scan's 2 is not below 3."""
    for key, scans in {"supervised-normalized-8": [(0, math.nan), (0.9, 2)], "cps-8": [(0.8, 3), (0.8, 3)]}.items():
        folder = write_record(key, 1337, scans)
        lines = (folder / "cases.csv").read_text().splitlines()
        counted = [lines[0] + ",voxels,label_voxels", *(f"{line},{0 if 'nan' in line else 9},9" for line in lines[1:])]
        (folder / "cases.csv").write_text("\n".join(counted) + "\n")
    args = ["--profile", "half", "--table", "methods", "--labels", "8", "--format", "latex"]
    lines = [line.split(" & ") for line in printed(capsys, *args).split("\\end{table}")[0].splitlines()]
    rows = {line[0]: line[3:7] for line in lines if len(line) > 1}
    assert rows["CPS"] == ["\\textbf{80.00}", "\\textbf{40.00}", "3.00", "6.00"]
    assert rows["V-Net"] == ["45.00", "22.50", "2.00 (1 of 2; not penalised)", "4.00 (1 of 2; not penalised)"]
    write_record("bcp-8", 1337, [(0.5, 1)] * 2)  # below what is too low, and so the best
    lines = [line.split(" & ") for line in printed(capsys, *args).split("\\end{table}")[0].splitlines()]
    assert [line[5] for line in lines if line[0] == "BCP"] == ["\\textbf{1.00}"]


def test_cost_rank_and_recipe_stand_in_markdown(here, capsys):
    for key, value in {"supervised-normalized-8": 0.7, "cps-8": 0.8}.items():
        write_record(key, 1337, [(value, 1)] * 2)
    (here / "results" / "half" / "cost.csv").write_text("method,cost\nsupervised,1\ncps,2.499\n")
    text = printed(capsys, "--profile", "half", "--table", "methods")
    (row,) = cells(text, "CPS")
    assert row[2] == "`tuned`" and row[7:] == ["1 of 2", "2.50", "1: 1337"]
    (waits,) = cells(text, "UA-MT")
    assert waits[2:4] == ["`tuned`", "not yet run"] and waits[8] == "-"
    (here / "results" / "half" / "cost.csv").write_text("method,cost\ncps,fast\n")
    with pytest.raises(UserError, match=r"cost\.csv cannot be read.*benchmarks\.methods --out"):
        reproduce.main(["--profile", "half", "--table", "methods"])


@pytest.mark.parametrize("profile", ["half", "phantom"])
def test_all_recorded_tables_are_latex_and_csv(profile, monkeypatch, tmp_path, capsys):
    """Those of the repository, with every text of the grid; here few resamples do."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(statistics, "RESAMPLES", 20)
    monkeypatch.setattr("evaluation.rows.read_scores", functools.cache(read_scores))  # each once
    text = printed(capsys, "--profile", profile, "--format", "latex")
    check_latex(text, tmp_path)
    assert "\\begin{longtable}" in text  # all runs
    parts = records_of(capsys, "--profile", profile)
    assert {"half": {"3", "plus", "methods", "comparisons", "live", "runs"}, "phantom": {"methods"}}[profile] <= {
        *parts
    }


def test_the_glance_table_has_a_column_for_each_number(here, capsys):
    for seed, value in {1337: 0.8, 1338: 0.7, 1339: 0.9}.items():
        write_record("supervised-normalized-16", seed, [(value, 2)] * 6)
    args = ["--profile", "half", "--table", "glance"]
    rows = {row["labeled"]: row for row in records_of(capsys, *args)["glance"]}
    shown = rows["16"]["V-Net"], rows["16"]["V-Net: SD"], rows["16"]["V-Net: runs"], rows["8"]["V-Net"]
    assert shown == ("80", "10", "3", "not yet run")
    check_latex(printed(capsys, *args, "--format", "latex"), here)


def test_a_row_whose_masks_are_all_empty_is_neither_best_nor_ranked(here, capsys):
    for key, dice in {"supervised-normalized-8": math.nan, "tuned-normalized-8": 0.7, "bcp-8": 0.8}.items():
        write_record(key, 1337, [(dice, dice)] * 6)
    line = cells(printed(capsys, "--profile", "half", "--table", "glance"), "8")[0]
    assert line[1:3] == ["- (0 of 6) (1)", "**70.00** (1)"]


def test_a_rank_is_of_rows_with_a_dice():
    rows = [Row(name, "8 / 0", name) for name in ("none", "low", "high", "equal")]
    dices = {"none": [math.nan], "low": [0.7], "high": [0.8], "equal": [0.8]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_rows, "figures", lambda row, *_: [table_rows.mean_cell(dices[row.key], "dice")] * 4)
        lines = table_rows.method_lines(rows, {name: {1337: None} for name in dices}, dict.fromkeys(dices, ""), {})
    assert [line.cells[7].text for line in lines] == ["-", "3 of 3", "1 of 3", "1 of 3"]


def test_a_bar_in_a_name_is_no_column():
    assert markdown_table(["class"], [["1 left|right"]]).splitlines()[-1] == r"| 1 left\|right |"


def test_signs_and_marks():
    text = "**89.1 ± 0.1** (3), \N{MINUS SIGN}1.5 & -2 to 16-8: `--lr-schedule`, *M_s* [a_b](x_y) 50 %"
    assert latex_text(text) == (
        "\\textbf{89.1 $\\pm$ 0.1} (3), $-$1.5 \\& $-$2 to 16-8: \\texttt{-{}-lr-schedule}, \\emph{M\\_s} "
        "\\texttt{a\\_b} 50 \\%"
    )
    columns = [Column("name", "name"), Column("Dice", "dice", 1)]
    lines = [Line([Cell("a, `b`"), Cell("1.00", {"dice": 1.0})], group="x"),
             Line([Cell("a, `b`"), Cell("", {"dice": float("nan")})], same=1, group="x"),
             Line([Cell("c"), Cell("2.00", {"dice": 2.0})], group="x")]  # fmt: skip
    table = Table("t", "title", columns, lines, {"of": "y"})
    assert markdown(table) == "| name | Dice |\n|---|---|\n| a, `b` | 1.00 |\n| | |\n| c | 2.00 |"
    assert as_csv([table]) == 'table,of,name,dice\nt,y,"a, b",1\nt,y,"a, b",\nt,y,c,2\n'
    assert "c & \\textbf{2.00}" in latex(table) and latex(table).count("textbf") == 1


# -- the grid --


def test_all_methods_have_a_row_with_8_labels_and_their_first_output():
    """On the hippocampus those that know several classes."""
    for runs, tables in ((LA_RUNS, LA_TABLES), GRIDS["hippocampus"]):
        rows = [row for row in tables[METHODS_TABLE][1] if row.labeled == 8 and not row.label.endswith("alone")]
        result = {runs[row.key].split()[1]: row for row in rows}
        several = {name for name, kind in METHODS.items() if kind.multiclass}
        assert result.keys() == (METHODS.keys() if runs is LA_RUNS else several) and len(result) == len(rows)
        for name, row in result.items():
            assert row.output == METHODS[name].outputs[0] if METHODS[name].outputs else "seg"
            o, *_ = read_options([*runs[row.key].split(), "--profile", "half"])
            assert (o.preset, recipe_of(runs[row.key].split())) == ("tuned", "`tuned`")


def test_a_recipe_names_what_differs_from_the_preset():
    texts = {"supervised-tuned-16": "`tuned`, `--normalize none`", "dtml-authors-16": "`authors`", "plus-8": "`tuned`",
             "dk-uxnet-16": "`repaired`", "dtml-both-16": "`paper`",
             "dtml-adamw-16": "`paper`, `--optimizer adamw`, `--lr 0.001`, `--weight-decay 0.01`"}  # fmt: skip
    assert {key: recipe_of(LA_RUNS[key].split()) for key in texts} == texts
    assert recipe_of(GRIDS["hippocampus"][0]["supervised-pasted-8"].split()) == "`tuned`, `--paste 0.67`"


def test_labels_select_rows(here, capsys):
    text = printed(capsys, "--profile", "half", "--table", "plus", "--labels", "4", "16")
    assert {line.split("|")[2].split("/")[0].strip() for line in text.splitlines() if "not yet run" in line} == {
        "4",
        "16",
    }
    out = printed(capsys, "--profile", "half", "--labels", "4", "--list", "--seeds", "1337")
    assert set(re.findall(r"--labeled (\d+)", out)) == {"4"}
    for args, message in ((["--labels", "5"], "--labels 5 is not in this grid. Choose from 4, 8, 16, 80"),
                           (["--labels", "4", "--rows", "cps"], "no row is in all of")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            reproduce.main(["--profile", "half", *args])
    assert PHANTOM_TABLES["methods"][1][0].labeled == 8


# -- docs/methods.md: a line for each method, and the figures of the records --


PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


def test_every_method_has_its_line_in_both_tables():
    first, second = (part.split("\n## ")[0] for part in PAGE.split("\n## ")[1:3])
    for part in (first, second):
        assert set(re.findall(r"^\| `([\w-]+)`", part, re.M)) == set(METHODS)


def test_figures_are_means_over_runs_and_costs_those_measured(here, capsys):
    for seed, value in {1337: 0.7, 1338: 0.8, 1339: 0.75}.items():
        write_record("cps-8", seed, [(value - 0.1, 1), (value + 0.1, 1)])
    write_record("plus-alone-8", 1337, [(0.5, 1)] * 2)  # the control is no line
    write_record("bcp-8", 1337, [(0.6, 1)] * 2, profile="hippocampus")
    with open(here / "results" / "half" / "cost.csv", "w", newline="") as f:
        csv.writer(f).writerows([("method", "cost"), ("cps", 2.46), ("supervised", 1.0)])
    methods_page.main([])
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    lines = {line[0].strip("`"): line[1:] for line in cells[2:]}
    assert lines["cps"] == ["`seg`", "2.5", "75.00 ± 5.00 (3)", "not run"]
    assert lines["bcp"][1:] == ["not measured", "not run", "60.00 (1)"]
    assert lines["dtml-plus"][::2] == ["`ema_mean`", "not run"] and lines["asdnet"][3] == "one class alone"


def test_the_table_of_a_page_is_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace("| `cps` | `seg` |", "| `cps` | `other` |"))
    assert page.read_text() != PAGE
    methods_page.main(["--write", str(page)])
    assert page.read_text(encoding="utf-8") == PAGE
    page.write_text("no table\n")
    with pytest.raises(UserError, match="has no table that begins with"):
        methods_page.main(["--write", str(page)])
    assert page.read_text() == "no table\n"
    with pytest.raises(UserError, match=r"cannot read the page nowhere\.md"):
        methods_page.main(["--write", "nowhere.md"])


# -- the picture of the rows of a table --


def test_the_rows_of_a_table_are_lines_with_a_bar_from_three_runs_on(here, capsys):
    """A point is at the mean of the runs, which are those that the table counts; a row without a record is named."""
    dice = {"supervised-normalized-8": {1337: 0.7, 1338: 0.8, 1339: 0.75}, "supervised-normalized-80": {1337: 0.9},
            "cps-8": {1337: 0.85}, "bcp-8": {1337: 0.5}}  # fmt: skip
    for key, of_seed in dice.items():
        for seed, value in of_seed.items():
            change = {"pseudo_weight": 7.0} if key == "bcp-8" else {}
            write_record(key, seed, [(value - 0.05, 1), (value + 0.05, 1)], change=change)
    (axes,) = pictures.labels(["results/half"], pictures.Options(table="methods")).axes
    handles, names = axes.get_legend_handles_labels()
    assert names == ["V-Net", "CPS"]
    assert capsys.readouterr().err.startswith("not yet run: DTML, DTML+, labeled scans alone, DTML+, Mean Teacher")
    vnet = handles[0].get_xydata()
    assert vnet[:, 0] == pytest.approx([8, 80], rel=0.05) and vnet[:, 1] == pytest.approx([75, 90])
    (bar,) = [
        segment for lines in axes.collections if hasattr(lines, "get_segments") for segment in lines.get_segments()
    ]
    sd = np.std([70, 80, 75], ddof=1)
    assert bar[:, 1] == pytest.approx([75 - sd, 75 + sd])


def test_two_rows_of_one_label_and_as_many_labels_are_two_lines(here):
    """Table 2 has DTML with 16 / 0 and with 16 / 64 scans: no point is the mean of both."""
    for key, value in {"dtml-16-0": 0.6, "dtml-16": 0.8}.items():
        write_record(key, 1337, [(value, 1)] * 2)
    (axes,) = pictures.labels(["results/half"], pictures.Options(table="2")).axes
    lines = {name: line.get_ydata() for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    assert lines == {"DTML, 16 / 0": pytest.approx([60]), "DTML, 16 / 64": pytest.approx([80])}


@pytest.mark.parametrize(
    ("paths", "options", "message"),
    [
        (["results/half", "results/short"], {"table": "methods"}, "--table goes with one folder of records"),
        (["results/other"], {"table": "methods"}, "--table goes with one folder of records"),
        (["results/half"], {"table": "9"}, "--table 9 is not in this grid. Choose from .*methods"),
        (["results/half"], {"table": "methods"}, "no row of the table methods has a record in .*results/half"),
        (["results/half"], {"table": "methods", "titles": ["a"]}, "none with --table"),
        (["a", "b"], {"titles": ["one", "one"]}, "Give each once, or different --titles"),
        (["a", "a"], {}, "Give each once, or different --titles"),
    ],
)
def test_what_cannot_be_drawn_is_a_user_s_mistake(paths, options, message, here):
    with pytest.raises(UserError, match=message):
        pictures.labels(paths, pictures.Options(**options))
