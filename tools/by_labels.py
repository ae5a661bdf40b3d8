"""Dice of runs by their number of labeled scans, for the picture `labels`."""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from evaluation.metrics import mean_and_sd
from evaluation.rows import options_of, read_row, runs_of, split_output
from settings import PROFILES
from tools.runs import Options, records_of, select
from utils.errors import UserError
from utils.run_folder import MANIFEST


def dice_by_labels(paths: Sequence[str], titles: Sequence[str], table: str) -> dict[str, dict[int, list[float]]]:
    """Title -> number of labeled scans -> Dice in per cent of each run, a mean over the scans without a filter.

    Args:
        paths: a pattern of runs for each title; with a table the folder of its records.
        table: of tools.reproduce, whose rows' labels are the titles; '': none.

    Raises:
        UserError: titles that do not fit, runs that cannot be read, or as `rows_of_table`.
    """
    if titles and (table or len(titles) != len(paths)):
        raise UserError(f"--titles must give {len(paths)} names, one for each pattern, and none with --table.")
    if table:
        runs = rows_of_table(paths, table)
    elif len({*(titles or paths)}) < len(paths):
        raise UserError("labels draws a line for each pattern. Give each once, or different --titles.")
    else:
        runs = {title: runs_of(where) for title, where in zip(titles or paths, paths, strict=True)}
    lines: dict[str, dict[int, list[float]]] = {}
    for title, run_paths in runs.items():
        points = lines.setdefault(title, {})
        for run_path in run_paths:
            labeled = options_of(run_path).get("labeled")
            if labeled is None:
                folder, _ = split_output(run_path)
                raise UserError(f"{folder / MANIFEST} states no number of labeled scans. Give run folders or records.")
            dice = list(read_row(run_path, "dice", "all").values())
            points.setdefault(labeled, []).append(100 * mean_and_sd(dice)[0])
    return lines


def rows_of_table(paths: Sequence[str], table: str) -> dict[str, list[str]]:
    """Label of a row of a table of tools.reproduce -> its records, each as PATH:OUTPUT.

    Rows of one label are a line over their numbers of labeled scans. Those with as many labeled scans as another row of
    the label, as DTML without unlabeled scans, are a line of their own, named after their scans too.

    Raises:
        UserError: there is no such table, or none of its rows has a record.
    """
    folder = Path(os.path.abspath(paths[0]))
    if len(paths) > 1 or folder.name not in PROFILES:
        raise UserError("--table goes with one folder of records, as results/half.")
    runs, tables = select(Options(profile=folder.name, results=str(folder.parent), table=[table]))
    counts = Counter((row.label, row.labeled) for row in tables[table][1])
    records: dict[str, list[str]] = {}
    done = records_of(runs)
    for row in tables[table][1]:
        label = row.label if counts[row.label, row.labeled] == 1 else f"{row.label}, {row.scans}"
        records.setdefault(label, []).extend(f"{record}:{row.output}" for record in done.get(row.key, {}).values())
    waits = [label for label, of_row in records.items() if not of_row]
    if len(waits) == len(records):
        raise UserError(f"no row of the table {table} has a record in {folder}. Run it first, by tools.reproduce.")
    if waits:
        print(f"not yet run: {', '.join(waits)}", file=sys.stderr)
    return {label: records[label] for label in records if records[label]}
