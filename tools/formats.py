"""A table as Markdown, as LaTeX with booktabs, and as CSV with one number in a column."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from utils.text import csv_table, markdown_table

Numbers = Mapping[str, float | str]
LONG = 45  # lines from which a table in LaTeX goes on over pages
SIGNS = {"±": "$\\pm$", "\N{MINUS SIGN}": "$-$", "\N{MULTIPLICATION SIGN}": "$\\times$", "\\": "\\textbackslash{}",
         "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}  # fmt: skip
SIGNS |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
MARKS = {"**": "textbf", "*": "emph", "`": "texttt"}  # of Markdown


class Column(NamedTuple):
    """A column: its heading in Markdown, its name in CSV where a cell is a text, and which of its figures is best."""

    head: str
    name: str
    best: int = 0
    """1: the largest figure; -1: the smallest."""


class Cell(NamedTuple):
    """What stands in a cell, in Markdown; and what it stands for: column in CSV -> number. The first is its figure."""

    text: str
    numbers: Numbers = {}


class Line(NamedTuple):
    """A line of a table."""

    cells: Sequence[Cell]
    same: int = 0
    """So many first cells are as in the line above, and printed in CSV alone."""
    group: str = ""
    """In LaTeX the best figure of the lines of a group is bold; '': the line is in none."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table: its name, its title in Markdown, its columns and lines, and what CSV adds to each line."""

    name: str
    title: str
    columns: Sequence[Column]
    lines: Sequence[Line]
    more: Numbers = dataclasses.field(default_factory=dict)


def cells(line: Line) -> list[str]:
    """The texts of a line's cells."""
    return [cell.text if i >= line.same else "" for i, cell in enumerate(line.cells)]


def markdown(table: Table) -> str:
    """The table without its title."""
    return markdown_table([column.head for column in table.columns], map(cells, table.lines))


def latex(table: Table) -> str:
    """The table with its title as caption; the best figure of each group is bold. Needs booktabs and longtable."""
    numeric = [any(line.cells[i].numbers for line in table.lines) and i > 0 for i in range(len(table.columns))]
    layout = "".join("r" if right else "l" for right in numeric)
    bold = best_cells(table)
    body = [" & ".join(latex_text(column.head) for column in table.columns) + " \\\\", "\\midrule"]
    for n, line in enumerate(table.lines):
        texts = [latex_text(text) for text in cells(line)]
        texts = [f"\\textbf{{{text}}}" if (n, i) in bold else text for i, text in enumerate(texts)]
        body.append(" & ".join(texts) + " \\\\")
    caption = f"\\caption{{{latex_text(table.title)}}}"
    if len(table.lines) >= LONG:
        inside = [f"\\begin{{longtable}}{{{layout}}}", f"{caption} \\\\", "\\toprule", *body, "\\bottomrule"]
        return "\n".join([*inside, "\\end{longtable}"])
    inside = [f"\\begin{{tabular}}{{{layout}}}", "\\toprule", *body, "\\bottomrule", "\\end{tabular}"]
    return "\n".join(["\\begin{table}", "\\centering", caption, *inside, "\\end{table}"])


def best_cells(table: Table) -> set[tuple[int, int]]:
    """The line and column of the best figure of each group, and of those equal to it; none where a group has one.

    A distance that is too low, as that of a run with scans that are not penalised, is not the best; nor is any other
    above it, as the true order is not known.
    """
    best = set()
    for i, column in enumerate(table.columns):
        for group in {line.group for line in table.lines if line.group and column.best}:
            figures = {n: first_number(line.cells[i]) for n, line in enumerate(table.lines) if line.group == group}
            figures = {n: column.best * value for n, value in figures.items() if not math.isnan(value)}
            if len(figures) > 1:
                first = {n for n, value in figures.items() if value == max(figures.values())}
                best |= {(n, i) for n in first if not any(map(too_low, (table.lines[m].cells[i] for m in first)))}
    return best


def too_low(cell: Cell) -> bool:
    """Whether a distance is of runs some of whose scans have none and are not penalised."""
    return any(bool(value) for name, value in cell.numbers.items() if name.endswith("_not_penalised"))


def first_number(cell: Cell) -> float:
    """The figure of a cell; NaN if it has none."""
    return float(next(iter(cell.numbers.values()), math.nan))


def latex_text(text: str) -> str:
    """Markdown -> LaTeX: links lose their address, emphasis and code become commands, all signs are escaped."""
    text = re.sub(r"\[([^]]+)\]\([^)]*\)", r"`\1`", text)
    parts = re.split(r"(\*\*|\*|`)", text)
    open_marks: list[str] = []
    out = ""
    for part in parts:
        if part in MARKS:
            closes = part in open_marks
            out += "}" if closes else f"\\{MARKS[part]}{{"
            open_marks = [mark for mark in open_marks if mark != part] if closes else [*open_marks, part]
        elif "`" in open_marks:
            out += "".join(SIGNS.get(sign, sign) for sign in part).replace("--", "-{}-")
        else:
            part = re.sub(r"(?<![\w)])-(?=\d)", "\N{MINUS SIGN}", part)
            out += "".join(SIGNS.get(sign, sign) for sign in part).replace("--", "-{}-")
    return out


def as_csv(tables: Sequence[Table]) -> str:
    """All tables as one CSV. A line of a table is a record, whose first column names the table.

    Columns are those of all tables. A number has six decimals at most; what a line has no number for is empty.
    """
    records: list[dict[str, str]] = []
    for table in tables:
        for line in table.lines:
            record = {"table": table.name, **{name: number(value) for name, value in table.more.items()}}
            for column, cell in zip(table.columns, line.cells, strict=True):
                values = cell.numbers or ({column.name: plain(cell.text)} if cell.text else {})
                record |= {name: number(value) for name, value in values.items()}
            records.append(record)
    return csv_table(records)


def number(value: float | str) -> str:
    """A number without trailing zeros, '' for NaN; a text without its marks."""
    if isinstance(value, str):
        return plain(value)
    return "" if math.isnan(value) else f"{value:.6f}".rstrip("0").rstrip(".") if value % 1 else f"{value:.0f}"


def plain(text: str) -> str:
    """Markdown without its marks."""
    return re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", text).replace("**", "").replace("`", "")
