"""The table of volumes that predict.py writes: a row for each scan and class, kept from prediction to prediction."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataloaders.geometry import Geometry
from evaluation.scores import as_csv
from utils.checkpoint import write_whole
from utils.errors import UserError
from utils.text import markdown_table

COLUMNS = ["scan", "class", "name", "voxels", "ml"]


def volume_rows(scan: str, label: NDArray, geometry: Geometry, names: Mapping[int, str], classes: int) -> list[dict]:
    """The rows of one scan with the label (W,H,D) of 0 to `classes`. Without a spacing in the geometry there is no
    volume in ml. `names` are those of the classes that have one.
    """
    counts = np.bincount(label.ravel(), minlength=classes + 1)
    voxel = math.prod(geometry["spacing"]) / 1000 if "spacing" in geometry else None
    return [
        {"scan": scan, "class": c, "name": names.get(c, ""), "voxels": int(counts[c]),
         "ml": "" if voxel is None else int(counts[c]) * voxel}
        for c in range(1, classes + 1)
    ]  # fmt: skip


def read_volumes(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier table as text; none if there is no file.

    Raises:
        UserError: if it is another file, or cannot be read.
    """
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as f:
            reader = csv.DictReader(f)
            rows = list(reader)
    except (OSError, ValueError, csv.Error) as e:
        raise UserError(f"cannot read {path}: {e}. Name another file with --report.") from e
    if reader.fieldnames != COLUMNS or any(None in row or None in row.values() for row in rows):
        raise UserError(f"{path} is no table of predict.py, which adds nothing to it. Name another file with --report.")
    return rows


def write_volumes(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the table, whole or not at all: the rows of other scans that are there by now, then these.

    Raises:
        UserError: if it cannot be written, or as `read_volumes`.
    """
    new = {row["scan"] for row in rows}
    others = [row for row in read_volumes(path) if row["scan"] not in new]
    write_whole(path, as_csv([*others, *rows]).encode())


def volumes_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line per scan and class."""
    lines = [
        [r["scan"], f"{r['class']} {r['name']}".strip(), str(r["voxels"]),
         "unknown" if r["ml"] == "" else f"{r['ml']:.3f}"] for r in rows
    ]  # fmt: skip
    return markdown_table(["scan", "class", "voxels", "ml"], lines) + "\n"
