"""Reads the rows of a table: the values of every scan in the runs of one kind, from cases.csv of test_la.py."""

import glob
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.metrics import MORE, PENALISED
from evaluation.predictions import read_scores, test_of
from utils.errors import UserError
from utils.run_folder import MANIFEST, MOVED_ASIDE, read_json

Scans = Mapping[str, float]  # case -> value
Runs = Mapping[Any, Scans]  # seed, or the path if it states no seed -> scans


def split_output(where: str) -> tuple[Path, str]:
    """PATH or PATH:OUTPUT -> the path and the output, '' without one. A path that exists is never taken apart."""
    path, colon, output = where.rpartition(":")
    return (Path(path), output) if colon and not Path(where).exists() else (Path(where), "")


def read_row(where: str, metric: str, component: str) -> dict[str, float]:
    """Reads a column of cases.csv of one run, PATH or PATH:OUTPUT, with one of COMPONENTS: case -> value.

    Early files have no NAME_penalised; NAME is read instead, which is NaN for an empty mask.

    Raises:
        UserError: if the file is missing or not of test_la.py, lacks the output or component, or has a case twice.
    """
    rows = rows_of(where, component)
    missing = metric.removesuffix(PENALISED)
    try:
        return {row["case"]: row.get(metric, row[missing]) for row in rows}
    except KeyError as e:
        flags = {"nsd": "with --nsd-tolerance", **dict.fromkeys(MORE, f"with --metrics {missing.removesuffix('_mm')}")}
        how = flags.get(missing.removesuffix("_mm"), "")
        raise UserError(f"{where} has no column {metric}. Test the run again{' ' if how else ''}{how}.") from e


def tolerance_of(where: str) -> float | None:
    """The tolerance of NSD in mm that the test.json of one run states, or None. Argument as `read_row`."""
    path, _ = split_output(where)
    return read_json((test_of(path) if path.is_dir() else path.parent) / "test.json").get("nsd_tolerance_mm")


def options_of(where: str) -> dict[str, Any]:
    """The options that a tested run was trained with, {} where nothing states them. Argument as `read_row`.

    They are in manifest.json of the record, or of the run folder: the one that the test lies in, or that of the
    checkpoint which test.json states.
    """
    path, _ = split_output(where)
    folder = path if path.is_dir() else path.parent
    stated = read_json(test_of(folder) / "test.json").get("checkpoint")
    places = [folder, folder.parent, *((Path(stated), Path(stated).parent) if stated else ())]
    return next((found for place in places if (found := read_json(place / MANIFEST).get("options"))), {})


def seed_of(where: str) -> Any:
    """The seed that a run was trained with, or the one in its name, or the argument if neither is known."""
    in_name = re.findall(r"seed(\d+)", where)
    return options_of(where).get("seed", int(in_name[-1]) if in_name else where)


def rows_of(where: str, component: str) -> list[dict[str, Any]]:
    """The rows of one output and component; with several classes the rows of their mean. Arguments as `read_row`.

    Raises:
        UserError: as `read_row`.
    """
    name, output = split_output(where)
    try:
        rows = [row for row in read_scores(name) if row.get("class", "mean") == "mean"]
        output = output or rows[0]["output"]
        chosen = [row for row in rows if (row["output"], row["component"]) == (output, component)]
        cases = {row["case"] for row in chosen}
    except (KeyError, IndexError) as e:
        raise UserError(f"{name} is no cases.csv of test_la.py ({e!r}). Test the run again.") from e
    if not chosen:
        available = ", ".join(dict.fromkeys(f"{row['output']} ({row['component']})" for row in rows))
        raise UserError(f"{name} has no output {output} ({component}). It has {available}.")
    if len(cases) < len(chosen):
        raise UserError(f"{name} holds a case twice. Test the run again.")
    return chosen


def runs_of(where: str) -> list[str]:
    """The runs of a row, each as PATH or PATH:OUTPUT. A pattern matches all runs but those that --fresh moved aside.

    Raises:
        UserError: if nothing matches.
    """
    if Path(where).exists() or not glob.has_magic(where):
        return [where]
    pattern, output = split_output(where)
    paths = sorted(path for path in glob.glob(str(pattern)) if not MOVED_ASIDE.search(path))
    if not paths:
        raise UserError(f"nothing matches {pattern}. Give folders with the cases.csv of test_la.py.")
    return [f"{path}:{output}" if output else path for path in paths]


def with_output(where: str, component: str) -> str:
    """A row as PATH:OUTPUT, with the output that its runs have first if `where` names none. Arguments as `read_runs`.

    Raises:
        UserError: if that is not the same output in all runs, so that different ones would be mixed.
    """
    path, output = split_output(where)
    if output:
        return where
    first = {rows_of(run, component)[0]["output"]: run for run in runs_of(where)}
    if len(first) > 1:
        shown = "; ".join(f"{name} in {run}" for name, run in first.items())
        raise UserError(f"the runs of {where} begin with different outputs: {shown}. Name one: {path}:{min(first)}.")
    return f"{path}:{next(iter(first))}"


def read_runs(where: str, metric: str, component: str) -> dict[Any, dict[str, float]]:
    """Reads the runs of a row, which `where` names as for `runs_of`: seed (or path, if it states no seed) -> case ->
    value.

    Raises:
        UserError: if two runs have the same seed; else as `runs_of`, `with_output` and `read_row`.
    """
    runs: dict[Any, dict[str, float]] = {}
    for path in runs_of(with_output(where, component)):
        seed = seed_of(path)
        if seed in runs:
            raise UserError(f"{where} matches two runs of seed {seed}. A row is the seeds of one kind of run.")
        runs[seed] = read_row(path, metric, component)
    return runs


def mean_over(runs: Runs) -> dict[str, float]:
    """Case -> mean value over the runs of a row.

    Raises:
        UserError: if the runs have different cases.
    """
    values = list(runs.values())
    if any(run.keys() != values[0].keys() for run in values):
        raise UserError("the runs of one row are not of the same scans. Test them alike.")
    return {case: statistics.mean(run[case] for run in values) for case in values[0]}
