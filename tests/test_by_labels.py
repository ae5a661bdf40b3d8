"""The picture `labels` of the rows of a table of tools.reproduce."""

import numpy as np
import pytest
from test_reproduce import write_record

from tools import pictures
from utils.errors import UserError


def test_the_rows_of_a_table_are_lines_with_a_bar_from_three_runs_on(tmp_path, monkeypatch, capsys):
    """A point is at the mean of the runs, which are those that the table counts; a row without a record is named."""
    monkeypatch.chdir(tmp_path)
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


@pytest.mark.parametrize(
    ("paths", "options", "message"),
    [
        (["results/half", "results/short"], {"table": "methods"}, "--table goes with one folder of records"),
        (["results/other"], {"table": "methods"}, "--table goes with one folder of records"),
        (["results/half"], {"table": "9"}, "--table 9 is not in this grid. Choose from .*methods"),
        (["results/half"], {"table": "methods"}, "no row of the table methods has a record in .*results/half"),
        (["results/half"], {"table": "methods", "titles": ["a"]}, "none with --table"),
    ],
)
def test_what_cannot_be_drawn_is_a_user_s_mistake(paths, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        pictures.labels(paths, pictures.Options(**options))
