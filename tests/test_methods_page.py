"""docs/methods.md has a line for each method, and the figures of the records."""

import csv
import re

import pytest
from conftest import ROOT
from test_reproduce import write_record

from methods import METHODS
from tools import methods_page
from utils.errors import UserError

PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


def test_every_method_has_its_line_in_both_tables():
    first, second = (part.split("\n## ")[0] for part in PAGE.split("\n## ")[1:3])
    for part in (first, second):
        assert set(re.findall(r"^\| `([\w-]+)`", part, re.M)) == set(METHODS)


def test_figures_are_means_over_runs_and_costs_those_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed, value in {1337: 0.7, 1338: 0.8, 1339: 0.75}.items():
        write_record("cps-8", seed, [(value - 0.1, 1), (value + 0.1, 1)])
    write_record("plus-alone-8", 1337, [(0.5, 1)] * 2)  # the control is no line
    write_record("bcp-8", 1337, [(0.6, 1)] * 2, profile="hippocampus")
    with open(tmp_path / "results" / "half" / "cost.csv", "w", newline="") as f:
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
