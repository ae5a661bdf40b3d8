"""The tables of a report page as HTML: the means, every figure, and bars of each scan."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from evaluation.metrics import HEADS, IN_PERCENT, PENALISED, distances_of
from evaluation.predictions import COUNTS
from evaluation.scores import means

NAMES = {**HEADS, "voxels": "voxels", "label_voxels": "of the label"}


def keys_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The columns that identify a row of a scan: output, component, and any other before the metrics."""
    names = list(rows[0])
    return [name for name in names[: names.index("dice")] if name not in ("case", "shape")]


def groups(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """Output, component, ... -> the rows of all scans."""
    rows_of: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        rows_of.setdefault(tuple(row[name] for name in keys_of(rows)), []).append(row)
    return rows_of


def text_of(name: str, value: float) -> str:
    """A figure as the page prints it; a dash for what does not exist."""
    if name in COUNTS:
        return f"{value:.0f}"
    return f"{100 * value if name in IN_PERCENT else value:.2f}" if math.isfinite(value) else "-"


def metrics_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The columns of figures, without the counts and the penalised distances."""
    names = list(rows[0])
    return [name for name in names[names.index("dice") :] if name not in COUNTS and not name.endswith(PENALISED)]


def html_table(header: Iterable[str], lines: Iterable[Sequence[str]], text_columns: int, name: str) -> str:
    """A table with the id `name`, whose first `text_columns` columns are text. Every cell is escaped."""
    kind = ['class="word"' if i < text_columns else "" for i in range(99)]
    head = "".join(f'<th scope="col" {k}>{escape(cell)}</th>' for k, cell in zip(kind, header, strict=False))
    body = "\n".join(
        "<tr>" + "".join(f"<td {k}>{escape(cell)}</td>" for k, cell in zip(kind, line, strict=False)) + "</tr>"
        for line in lines
    )
    return f'<table id="{name}"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>'


def results_table(rows: Sequence[dict[str, Any]]) -> str:
    """Mean ± SD over the scans, of every output and filter."""
    header, lines = means(rows)
    return html_table(header, lines, header.index("scans"), "means")


def every_table(rows: Sequence[dict[str, Any]]) -> str:
    """All of cases.csv."""
    keys, names = ["case", *keys_of(rows)], [*metrics_of(rows), *COUNTS]
    lines = [[*(row[key] for key in keys), *(text_of(name, row[name]) for name in names)] for row in rows]
    return html_table([*keys, *(NAMES.get(name, name) for name in names)], lines, len(keys), "cases")


def bars(rows: Sequence[dict[str, Any]]) -> str:
    """For each output and filter the scans by their Dice, with bars of Dice and of 95HD."""
    choices, tables = [], []
    largest = max((distance for row in rows for distance in distances_of([row], "hd95").scores), default=1) or 1
    means_first = sorted(groups(rows).items(), key=lambda group: group[0][-1] != "mean")  # of several classes
    for i, (key, chosen) in enumerate(means_first):
        name = escape(", ".join(key))
        choices.append(f'<option value="{i}">{name}</option>')
        lines = []
        for row in sorted(chosen, key=lambda row: (math.isnan(row["dice"]), row["dice"])):
            tip = ", ".join(f"{NAMES.get(m, m)} {text_of(m, row[m])}" for m in metrics_of(rows))
            cells = "".join(
                f'<td class="bar"><i style="width:{100 * share:.1f}%"></i></td><td>{text_of(metric, row[metric])}</td>'
                for metric, share in (("dice", np.nan_to_num(row["dice"])), ("hd95", hd95_share(row, largest)))
            )
            lines.append(
                f'<tr title="{escape(tip)}"><th scope="row" class="word">{escape(row["case"])}</th>{cells}</tr>'
            )
        tables.append(
            f'<div class="perkey" data-key="{i}"{" hidden" if i else ""}><table class="bars">'
            f'<caption class="soft">{name}: every scan, the lowest Dice first</caption><thead><tr>'
            '<th scope="col" class="word">scan</th><th scope="col" colspan="2">Dice %</th>'
            '<th scope="col" colspan="2">95HD voxel</th></tr></thead><tbody>\n'
            + "\n".join(lines)
            + "\n</tbody></table></div>"
        )
    select = f'<p><label>Output and filter <select id="choice">{"".join(choices)}</select></label></p>'
    return f'<h2 id="scans">Scan by scan</h2>{select}<div class="scroll">{"".join(tables)}</div>'


def hd95_share(row: dict[str, Any], largest: float) -> float:
    """The length of a scan's bar of 95HD, 0 to 1: 1 if one mask is empty and has no penalty, 0 if both are empty."""
    scores = distances_of([row], "hd95").scores
    return scores[0] / largest if scores else float(not math.isnan(row["dice"]))
