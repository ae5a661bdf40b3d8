"""Records of trained and tested runs in results/, and what tools.reproduce prints of them."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import pytest

from tools import command_line, reproduce, runs
from tools.grid import LA_RUNS, LA_TABLES, RETIRED, TESTS

GRIDS = {"half": (LA_RUNS, LA_TABLES), **runs.GRIDS}


def cells(text, label):
    """The cells of the row that begins with the label, and of the lines below it that have none."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    start = next(i for i, line in enumerate(lines) if line[0] == label)
    rest = next((i for i, line in enumerate(lines[start + 1 :], start + 1) if line[0]), len(lines))
    return lines[start:rest]


def options_of(args):
    o, method_options, *_ = command_line.read_options(args)
    return {**dataclasses.asdict(o), **dataclasses.asdict(method_options)}


def write_run(folder, options, scans, outputs=("seg",), iteration=None, test="test", tested=()):
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
    tested = {"iteration": options["iterations"] if iteration is None else iteration, **dict(tested)}
    (folder / test / "test.json").write_text(json.dumps(tested))


SCORES = [(0.8, 1), (0.9, 2)]


def write_record(key, seed, scans=SCORES, *, profile="half", change=(), tested=(), **more):
    """A record in results/ of the working directory; returns its folder."""
    runs, tables = GRIDS[profile]
    scored = [row.output for _, rows in tables.values() for row in rows if row.key == key]
    more = {"outputs": list(dict.fromkeys(["seg", "sdm", "mean", *scored]))} | more
    args = [] if key in RETIRED else runs[key].split()
    options = options_of([*args, "--profile", profile, "--seed", str(seed)]) | dict(change)
    folder = Path("results", profile, f"{key}-seed{seed}")
    write_run(folder, options, scans, test=".", tested=TESTS.get(key, {}) | dict(tested), **more)
    return folder


def printed(*args, profile="half"):
    """stdout and stderr of the command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        reproduce.main(["--profile", profile, *args])
    return out.getvalue(), err.getvalue()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty place where the default folders results/ and runs/ are."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
