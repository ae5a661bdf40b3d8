"""Scores of a prediction for each class and their mean, as rows, Markdown table and CSV."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics import (
    EMPTIES,
    HEADS,
    IN_PERCENT,
    MM,
    PENALISED,
    distance_text,
    distances_of,
    empties,
    mean_and_sd,
    mean_text,
    overlap_text,
    overlaps,
    segmentation_metrics,
    with_penalties,
)
from utils.text import csv_table, markdown_table

MEAN = "mean"  # class of the mean over the classes
CAPTION = """\
Mean ± SD over the scans, each on its own grid; fewer than three scans have no SD. ASD is from prediction to reference.
A scan with only the prediction or only the label empty has no distance: the diagonal of its volume counts instead.
Where there are such scans, the number in brackets says how many have a distance, and `these alone` is their mean. Where
both are empty the scan is not measured. The last three columns count such scans.
"""
MORE_CAPTIONS = {
    "assd": "ASSD is the mean distance over the border voxels of both, each to the border of the other.\n",
    "rve": "RVE is the relative volume error, above 0 where the prediction is larger than the label.\n",
}
NSD_CAPTION = "NSD is the share of both surfaces that is at most {:g} mm from the other one.\n"


def caption_of(tolerance: float | None, more: Sequence[str]) -> str:
    """What stands above a table with NSD at this tolerance in mm (None: no NSD) and with `more` of MORE."""
    nsd = "" if tolerance is None else NSD_CAPTION.format(tolerance)
    return CAPTION + nsd + "".join(text for name, text in MORE_CAPTIONS.items() if name in more)


def class_scores(
    prediction: NDArray,
    label: NDArray,
    classes: int,
    spacing: Sequence[float] | None,
    tolerance: float | None = None,
    more: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Metrics, penalised distances and voxel counts of two label maps.

    Args:
        prediction, label: (W,H,D) of 0..classes.
        classes: C.
        spacing: mm along x, y, z; None: distances in mm are NaN.
        tolerance: of NSD, in mm; None: no NSD.
        more: those of MORE to add.

    Returns:
        One entry for a single class; for several an entry for each and one for their mean. The mean is over the classes
        in either map. Its distances are NaN if one of these classes has none, and its voxel counts are the smallest.
    """
    scores: list[dict[str, Any]] = []
    for c in range(1, classes + 1):
        a, b = prediction == c, label == c
        voxels = {"voxels": int(a.sum()), "label_voxels": int(b.sum())}
        measured = with_penalties(segmentation_metrics(a, b, spacing, tolerance, more), label.shape, spacing)
        names = [*MM, *(["assd_mm"] if "assd" in more else [])]
        in_mm = {} if spacing else dict.fromkeys([*names, *(name + PENALISED for name in names)], math.nan)
        scores.append({"class": c, **measured, **in_mm, **voxels})
    if classes == 1:
        return [{key: value for key, value in scores[0].items() if key != "class"}]
    present = [score for score in scores if not math.isnan(score["dice"])] or scores
    columns = {key: [score[key] for score in present] for key in scores[0] if key != "class"}
    mean = {key: min(values) if "voxels" in key else float(np.mean(values)) for key, values in columns.items()}
    return [*scores, {"class": MEAN, **mean}]


def class_dices(prediction: NDArray, label: NDArray, classes: int) -> list[float]:
    """Dice in [0,1] of each class of two label maps (W,H,D) of 0..classes; NaN for a class that is in neither."""
    pairs = [(prediction == c, label == c) for c in range(1, classes + 1)]
    return [overlaps(a, b)["dice"] if a.any() or b.any() else math.nan for a, b in pairs]


def by_dice(rows: Sequence[dict[str, Any]], output: str, component: str) -> dict[str, float]:
    """The scans and their Dice (mean of the classes), the lowest first; those without one stand last."""
    dices_of: dict[str, list[float]] = {}
    for row in rows:
        if (row["output"], row["component"]) == (output, component):
            dices_of.setdefault(row["case"], []).append(row["dice"])
    means = {name: mean_and_sd(dices)[0] for name, dices in dices_of.items()}
    names = sorted(means, key=lambda name: (math.isnan(means[name]), means[name]))
    return {name: means[name] for name in names}


def with_class_names(rows: Sequence[dict[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows of cases.csv with `1 anterior` for the class 1, to be shown. `names` are by class, as text; a class without
    one keeps its number.
    """
    texts = {c: f"{c} {name}" for c, name in names.items()}
    return [{**row, "class": texts.get(str(row["class"]), row["class"])} if "class" in row else row for row in rows]


def means(rows: Sequence[dict[str, Any]], over: str = "") -> tuple[list[str], list[list[str]]]:
    """Header and lines of mean and SD, a line per output, filter and class; columns as in the papers, and NSD, ASSD
    and RVE if the rows have them.

    Args:
        rows: rows of cases.csv.
        over: '' for mean and SD over the scans; or a column of the rows, such as fold: mean and SD over its values, of
            the means over the scans of each.
    """
    keys = ["output", "component", *(["class"] if "class" in rows[0] else [])]
    metrics, rows_of = [name for name in HEADS if name in rows[0]], defaultdict(list)
    for row in rows:
        rows_of[tuple(str(row[key]) for key in keys)].append(row)
    lines = []
    for key, chosen in rows_of.items():
        values = dict.fromkeys(row[over] for row in chosen) if over else {}
        groups = [[row for row in chosen if row[over] == value] for value in values] or [chosen]
        cells = [
            overlap_cell(groups, name)
            if name in IN_PERCENT
            else distance_text([distances_of(group, name) for group in groups], over_runs=bool(over))
            for name in metrics
        ]
        lines.append([*key, str(len(chosen)), *cells, *map(str, empties(chosen))])
    return [*keys, "scans", *(HEADS[name] for name in metrics), *EMPTIES], lines


def table(rows: Sequence[dict[str, Any]], over: str = "") -> str:
    """`means` as a Markdown table."""
    return markdown_table(*means(rows, over)) + "\n"


def overlap_cell(groups: Sequence[Sequence[dict[str, Any]]], name: str) -> str:
    """Mean ± SD in per cent over the scans of one group of rows, or over the means of several groups."""
    if len(groups) == 1:
        return overlap_text(groups[0], name)
    return mean_text([mean_and_sd([100 * row[name] for row in group])[0] for group in groups])


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """CSV with a line per case, output, filter and, if there are several, class; overlaps and RVE are fractions."""
    return csv_table([{k: f"{v:.6f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows])
