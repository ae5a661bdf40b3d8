"""Makes and prints the grid (tools/grid.py): every row of the DTML paper's Tables 1 to 3 and DK-UXNet's, and its seeds.

    python -m tools.reproduce                                     the tables, from what is in results/full
    python -m tools.reproduce --list                              every run: how far it is, and its command
    python -m tools.reproduce --missing                           train and test what is missing, then print the tables
    python -m tools.reproduce --missing --budget 60               the same for an hour; the same command goes on
    python -m tools.reproduce --profile half --table 3 --rows ua-mt dtc --seeds 1337
    python -m tools.reproduce --profile half --table glance       the README's table
    python -m tools.reproduce --profile half --table methods --labels 8 --format latex    all methods, trained alike
    python -m tools.reproduce --submit slurm --slurm gpus_per_node=1 timeout_min=240

A run is the two commands that a user would type, train_dtml.py and test_la.py; then its options, manifest, curves and
metrics are copied to RESULTS/PROFILE/KEY-seedSEED. Such a record counts only if it fits what its row asks for today.
"""

import sys
from pathlib import Path

from dataloaders.lists import lists_of
from tools.make_runs import make_missing, submit
from tools.runs import Options, data_of, print_list, select
from tools.tables import print_tables
from utils.errors import UserError, run
from utils.options import read_flags


def main(argv: list[str] | None = None) -> None:
    o: Options = read_flags(Options, __doc__, "python -m tools.reproduce", argv)
    runs, tables = select(o)
    if o.budget and (o.submit or not o.missing):
        raise UserError("--budget goes with --missing alone. A job's own end is --slurm timeout_min=MINUTES.")
    if o.list:
        print_list(runs, tables)
        return
    failed = []
    if o.submit or o.missing:
        if o.data or o.profile != "phantom":
            lists_of(Path(o.data or data_of(o.profile)))  # or else every run would say that there is no data
        failed = submit(o, runs) if o.submit else make_missing(o, runs)
    if o.submit != "slurm":
        print_tables(o, runs, tables)
    if failed:
        print("failed:", *failed, sep="\n  ", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run(main)
