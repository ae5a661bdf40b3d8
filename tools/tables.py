"""Prints the page of tools/reproduce.py: the tables, the comparisons and every run, in the format that is asked for."""

import csv
from collections import Counter
from pathlib import Path

from evaluation.rows import read_row
from tools.comparisons import Records, comparison_tables, comparisons
from tools.formats import Table, as_csv, latex, markdown
from tools.grid import BEYOND_TABLE, GLANCE, METHODS_TABLE, TESTS, TRAINED_AS, Row, Tables
from tools.runs import Options, Run, recipe_of, status_of
from tools.table_rows import (
    BEYOND_COLUMNS,
    COLUMNS,
    LIVE_COLUMNS,
    METHOD_COLUMNS,
    PHANTOM_COLUMNS,
    RUN_COLUMNS,
    beyond_line,
    glance_table,
    live_lines,
    method_lines,
    phantom_line,
    row_lines,
    run_lines,
)
from utils.errors import UserError, warn
from utils.run_folder import MANIFEST, read_json

COST = "cost.csv"  # of benchmarks.methods, next to the records
ABOUT = """\
Profile `{profile}`, seeds {seeds}. Every run was tested at its last iteration. Each run has a mean over the
{scans}test scans, and a figure is the mean of these over the runs of a row. ± is the SD over the runs, shown from three
runs on. The last column gives the number of runs and their seeds. `all` is without a component filter, `largest` with
it. An empty mask has no distance and scores the volume's diagonal. Where there are such scans, the number after a
distance says how many scans of all runs have one. Early records have no such score: their distances are too low and
marked `not penalised`."""
RECIPES = """
`recipe` is the preset of a run, with the flags that set its training settings in another way."""
QUOTED = """
The lines `paper` are quoted from the DTML paper, which took most of them from the methods' own papers. Those papers
differ in the component filter and in the checkpoint that they tested, or do not report them."""
SMALL = """
**Not the paper's size:** {} Compare our lines only with each other."""
OF_METHODS = """\
Each method's first output, `all`. `rank` is that of the mean Dice among the rows with as many labeled scans that were
run. `cost` is the time of an iteration on a CPU, with the V-Net's as 1, measured side by side by
`benchmarks.methods`; the wall times of the runs do not compare."""
COMPARED = """\
**Comparisons**

Dice in points, `all`, over the seeds that both rows have.

- `difference`: of the means over runs and scans, with its 95 % interval by a hierarchical bootstrap. `over` says
  whether the interval covers the variation of runs. An interval over scans alone compares two runs, not two methods.
- `median of the scans`: the Hodges-Lehmann median of the scans' differences, after a mean over the seeds.
- `higher in`: the number of pairs of runs with the same seed. With at least five runs on each side it also gives p of a
  permutation of the runs, and p with Holm's correction over all lines here."""
LIVE = """\
**M_d's gradient**

M_d learns only through voxels of m with 1e-3 < m < 1 - 1e-3. The table gives their share in the labeled crops, as the
mean and the lowest of all logged iterations; how many of these iterations had none; and the final Dice of M_d."""
EACH = """\
**Each run: mean ± SD over its scans, whose number is in the column `scans`**"""
SCALES = {
    "full": QUOTED,
    "half": QUOTED + SMALL.format("half resolution, 8 filters, 2400 iterations."),
    "short": QUOTED + SMALL.format("half resolution, small crops, 8 filters, 600 iterations."),
    "phantom": SMALL.format("synthetic atria, small crops, 8 filters, 300 iterations."),
    "hippocampus": SMALL.format("whole scans of the Decathlon's hippocampus set, 8 filters, 2400 iterations."),
}


def print_tables(o: Options, runs: list[Run], tables: Tables) -> None:
    """Prints the tables on stdout, and on stderr the records that are left out or have another number of test scans."""
    done: dict[str, Records] = {}
    scans: dict[Path, int] = {}
    devices = set()
    for run in runs:
        status = status_of(run)
        if status == "done":
            done.setdefault(run.key, {})[run.seed] = run.record
            if run.key not in TESTS:
                scans[run.record] = len(read_row(f"{run.record}:{run.outputs[0]}", "dice", "all"))
            manifest = read_json(run.record / MANIFEST)
            devices.add(f"{manifest.get('device')}, threads: {manifest.get('threads')}")
        elif run.record.exists():
            warn(f"{run.record} is left out; {status}")
    blocks: list[tuple[str, Table]] = []
    if GLANCE in tables:
        blocks.append(("", glance_table(tables[GLANCE][1], done)))
        tables = {name: table for name, table in tables.items() if name != GLANCE}
    usual = Counter(scans.values()).most_common(1)[0][0] if scans and tables else 0
    for path, count in scans.items() if tables else ():
        if count != usual:
            warn(f"{path} was tested on {count} scans, most others on {usual}.")
    phantom = o.profile == "phantom"
    seeds = ", ".join(map(str, dict.fromkeys(run.seed for run in runs)))
    about = ABOUT.format(profile=o.profile, seeds=seeds, scans=f"{usual} " if scans else "")
    about += ("" if phantom else RECIPES) + SCALES[o.profile]
    about += f"\nSpeed and memory on {'; '.join(sorted(devices))}." if phantom and devices else ""
    recipes = {} if phantom else {run.key: recipe_of(run.settings) for run in runs if run.key not in TESTS}
    for name, (title, rows) in tables.items():
        intro = f"**{title}**" + (f"\n\n{OF_METHODS}" if name == METHODS_TABLE and not phantom else "")
        blocks.append((intro, table_of(name, title, rows, done, runs, recipes, o)))
    for usual_row in comparison_tables(comparisons(tables, done), recipes):
        first = not any(table.name == usual_row.name for _, table in blocks)
        blocks.append((f"{COMPARED}\n\n{usual_row.title}" if first else usual_row.title, usual_row))
    records = [path for of_key in done.values() for path in of_key.values()] if tables else []
    trained = [path for key, of_key in done.items() if key not in TRAINED_AS for path in of_key.values()]
    live = [line for path in trained for line in live_lines(path)] if tables else []
    if live:
        blocks.append((LIVE, Table("live", "M_d's gradient", LIVE_COLUMNS, live)))
    if records:
        lines = [line for path in records for line in run_lines(path)]
        blocks.append((EACH, Table("runs", "Each run: mean ± SD over its scans", RUN_COLUMNS, lines)))
    print(page(o.format, about if tables else "", blocks))


def page(style: str, about: str, blocks: list[tuple[str, Table]]) -> str:
    """All tables in a format, each with its text before it in Markdown; LaTeX has the text about all as comments."""
    if style == "csv":
        return as_csv([table for _, table in blocks]).rstrip("\n")
    if style == "latex":
        notes = ["In the preamble: \\usepackage{booktabs,longtable}", *about.splitlines()]
        return "\n\n".join(["\n".join(f"% {line}".rstrip() for line in notes), *(latex(table) for _, table in blocks)])
    glance = [markdown(table) for intro, table in blocks if not intro]
    others = [f"\n{intro}\n\n{markdown(table)}" for intro, table in blocks if intro]
    return "\n".join([*glance, *([about] if about else []), *others])


def table_of(
    name: str, title: str, rows: list[Row], done: dict[str, Records], runs: list[Run], recipes: dict[str, str],
    o: Options,
) -> Table:  # fmt: skip
    """A table of the grid. `recipes` are the training settings of its runs by their keys."""
    if o.profile == "phantom":
        return Table(name, title, PHANTOM_COLUMNS, [phantom_line(row, done.get(row.key, {})) for row in rows])
    if name == BEYOND_TABLE:
        paper = done.get(f"{BEYOND_TABLE}-paper", {})
        return Table(name, title, BEYOND_COLUMNS, [beyond_line(row, done.get(row.key, {}), paper) for row in rows])
    if name == METHODS_TABLE:
        measured, methods = costs_of(Path(o.results, o.profile, COST)), {run.key: run.method for run in runs}
        costs = {
            row.key: measured[methods[row.key]]
            for row in rows
            # a method without unlabeled scans, which all but the V-Net have in the benchmark, costs less
            if methods[row.key] in measured and (not row.scans.endswith("/ 0") or methods[row.key] == "supervised")
        }
        return Table(name, title, METHOD_COLUMNS, method_lines(rows, done, recipes, costs))
    lines = [line for row in rows for line in row_lines(row, done.get(row.key, {}), recipes[row.key])]
    return Table(name, title, COLUMNS, lines)


def costs_of(path: Path) -> dict[str, float]:
    """Method -> the cost of its iteration that `benchmarks.methods` has written; {} if it has not.

    Raises:
        UserError: the file is not such a one.
    """
    if not path.exists():
        return {}
    try:
        with open(path, newline="", encoding="utf-8") as f:
            return {row["method"]: float(row["cost"]) for row in csv.DictReader(f)}
    except (KeyError, ValueError, OSError) as e:
        raise UserError(f"{path} cannot be read ({e!r}). Write it again by python -m benchmarks.methods --out.") from e
