"""Prints the page of tools/reproduce.py as Markdown: the tables, the comparisons and every run."""

import json
import sys
from collections import Counter
from pathlib import Path

from evaluation.rows import read_row
from tools.grid import BEYOND_TABLE, GLANCE, TESTS, TRAINED_AS, Tables
from tools.runs import Options, Run, state
from tools.table_rows import (
    BEYOND_HEAD,
    HEAD,
    LIVE_HEAD,
    PHANTOM_HEAD,
    RUNS_HEAD,
    Records,
    beyond_line,
    comparison_tables,
    comparisons,
    glance_table,
    live_line,
    phantom_line,
    row_lines,
    ruled,
    run_lines,
)
from utils.run_folder import MANIFEST

ABOUT = """\
Profile `{profile}`, seeds {seeds}. Every run was tested at its last iteration. Each run has a mean over the
{scans}test scans, and a figure is the mean of these over the runs of a row. ± is the SD over the runs, shown from three
runs on. The last column gives the number of runs and their seeds. `all` is without a component filter, `largest` with
it. The number after a distance says how many scans of all runs have one. An empty mask has no distance and scores the
volume's diagonal. Early records have no such score: their distances are too low and marked `not penalised`."""
QUOTED = """
The lines `paper` are quoted from the DTML paper, which took most of them from the methods' own papers. Those papers
differ in the component filter and in the checkpoint that they tested, or do not report them."""
SMALL = """
**Not the paper's size:** {} Compare our lines only with each other."""
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
**Each run: mean ± SD over its scans, whose number is in the column `scans`**

The number after a distance says how many of the scans have one, as above."""
SCALES = {
    "full": QUOTED,
    "half": QUOTED + SMALL.format("half resolution, 8 filters, 2400 iterations."),
    "short": QUOTED + SMALL.format("half resolution, small crops, 8 filters, 600 iterations."),
    "phantom": SMALL.format("synthetic atria, small crops, 8 filters, 300 iterations."),
    "hippocampus": SMALL.format("whole scans of the Decathlon's hippocampus set, 8 filters, 2400 iterations."),
}


def print_tables(o: Options, runs: list[Run], tables: Tables) -> None:
    """Prints Markdown on stdout, and on stderr the records that are left out or have another number of test scans."""
    done: dict[str, Records] = {}
    scans: dict[Path, int] = {}
    devices = set()
    for this in runs:
        status = state(this)
        if status == "done":
            done.setdefault(this.key, {})[this.seed] = this.record
            if this.key not in TESTS:
                scans[this.record] = len(read_row(f"{this.record}:{this.outputs[0]}", "dice", "all"))
            manifest = json.loads((this.record / MANIFEST).read_text(encoding="utf-8"))
            devices.add(f"{manifest.get('device')}, threads: {manifest.get('threads')}")
        elif this.record.exists():
            print(f"warning: {this.record} is left out; {status}", file=sys.stderr)
    if GLANCE in tables:
        print(glance_table(tables[GLANCE][1], done))
        tables = {name: table for name, table in tables.items() if name != GLANCE}
        if not tables:
            return
    usual = Counter(scans.values()).most_common(1)[0][0] if scans else 0
    for path, count in scans.items():
        if count != usual:
            print(f"warning: {path} was tested on {count} scans, most others on {usual}.", file=sys.stderr)
    seeds = ", ".join(map(str, dict.fromkeys(this.seed for this in runs)))
    print(ABOUT.format(profile=o.profile, seeds=seeds, scans=f"{usual} " if scans else "") + SCALES[o.profile])
    phantom = o.profile == "phantom"
    if phantom and devices:
        print(f"Speed and memory on {'; '.join(sorted(devices))}.")
    for name, (title, rows) in tables.items():
        head = PHANTOM_HEAD if phantom else BEYOND_HEAD if name == BEYOND_TABLE else HEAD
        print(f"\n**{title}**\n\n{ruled(head)}")
        for row in rows:
            records = done.get(row.key, {})
            if phantom:
                print(phantom_line(row, records))
            elif name == BEYOND_TABLE:
                print(beyond_line(row, records, done.get(f"{BEYOND_TABLE}-paper", {})))
            else:
                print(row_lines(row, records))
    compared = comparisons(tables, done)
    if compared:
        print(f"\n{COMPARED}\n{comparison_tables(compared)}", end="")
    live = [live_line(path) for key, records in done.items() if key not in TRAINED_AS for path in records.values()]
    if any(live):
        print(f"\n{LIVE}\n\n{ruled(LIVE_HEAD)}\n" + "\n".join(filter(None, live)))
    if done:
        print(f"\n{EACH}\n\n{ruled(RUNS_HEAD)}")
    for records in done.values():
        for path in records.values():
            print(run_lines(path))
