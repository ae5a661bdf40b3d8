"""Prints the table of docs/methods.md: what each method costs, and what it reached here with 8 labels.

    python -m tools.methods_page
    python -m tools.methods_page --write docs/methods.md     puts it there

The figures are those of `tools.reproduce --table methods`: Dice of each method's first output, without a component
filter, as the mean over the runs, from three on with their SD, and in brackets their number.
"""

import dataclasses
from pathlib import Path

from tools.comparisons import Records
from tools.formats import Cell, Column, Line, Table, markdown
from tools.grid import METHODS_TABLE, Row
from tools.runs import Options as Shown
from tools.runs import records_of, select
from tools.table_rows import figures
from tools.tables import COST, costs_of
from utils.checkpoint import write_whole
from utils.errors import UserError, run
from utils.options import option, read_flags
from utils.text import read_text

SETS = {"half": "LA", "hippocampus": "hippocampus"}  # profile: name of its data set
LABELS = 8


@dataclasses.dataclass
class Options:
    """Options of the table."""

    results: str = option("results", "where the records are")
    write: str = option("", "a page, as docs/methods.md, whose table is replaced in place of printing it")


def reached(results: str, profile: str) -> dict[str, tuple[Row, Records]]:
    """Method -> its row of the methods with unlabeled scans, or of the V-Net, and its records."""
    runs, tables = select(Shown(profile=profile, results=results, table=[METHODS_TABLE], labels=[LABELS]))
    done, methods = records_of(runs), {each.key: each.method for each in runs}
    rows = {methods[row.key]: row for row in tables[METHODS_TABLE][1]}  # of DTML+ the last, which is not its control
    return {name: (row, done.get(row.key, {})) for name, row in rows.items()}


def methods_table(results: str) -> Table:
    """A line for each method of LA's table."""
    sets = {title: reached(results, profile) for profile, title in SETS.items()}
    costs = costs_of(Path(results, "half", COST))
    lines = []
    for name, (row, _) in next(iter(sets.values())).items():
        cost = f"{costs[name]:.1f}" if name in costs else "not measured"
        cells = [Cell(f"`{name}`"), Cell(f"`{row.output}`"), Cell(cost)]
        for rows in sets.values():
            row_there, records = rows.get(name, (row, None))
            text = "one class alone" if records is None else "not run"
            cells.append(Cell(f"{figures(row_there, 'all', records)[0].text} ({len(records)})" if records else text))
        lines.append(Line(cells))
    heads = ["method", "tested", "cost", *(f"{title}, {LABELS} labels" for title in sets)]
    return Table("methods", "Methods", [Column(head, head) for head in heads], lines)


def main(argv: list[str] | None = None) -> None:
    o: Options = read_flags(Options, __doc__, "python -m tools.methods_page", argv)
    table = markdown(methods_table(o.results))
    if not o.write:
        print(table)
        return
    try:
        page = read_text(Path(o.write))
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read the page {o.write}: {e}") from e
    write_whole(Path(o.write), replaced(page, table, o.write).encode())


def replaced(page: str, table: str, name: str) -> str:
    """The page with its table of the same head replaced.

    Raises:
        UserError: the page, called `name`, has no such table.
    """
    head, lines = table.splitlines()[0], page.splitlines()
    if head not in lines:
        raise UserError(f"{name} has no table that begins with {head}")
    start = lines.index(head)
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    return "\n".join([*lines[:start], table, *lines[end:]]) + "\n"


if __name__ == "__main__":
    run(main)
