"""What test_la.py left in a test folder: the metrics of every scan and the predictions."""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from utils.errors import UserError

COUNTS = ("voxels", "label_voxels")


def read_scores(test: Path) -> list[dict[str, Any]]:
    """The rows of a test folder's cases.csv, or of such a file, in its order: case, output, component and so on as
    text, metrics and counts as numbers.

    Raises:
        UserError: there is no such file, or it is no cases.csv of test_la.py.
    """
    path = test if test.suffix == ".csv" else test / "cases.csv"
    try:
        with open(path, newline="", encoding="utf-8") as f:
            rows: list[dict[str, Any]] = list(csv.DictReader(f))
        numbers = list(rows[0])[list(rows[0]).index("dice") :]
        for row in rows:
            row.update({name: int(row[name]) if name in COUNTS else float(row[name]) for name in numbers})
            if row.get("class") != "mean" and not any(row.get(name, 1) for name in COUNTS):
                # Both masks are empty, which early tests scored 1 and 0.
                row.update({name: math.nan for name in numbers if name not in COUNTS})
    except OSError as e:
        raise UserError(
            f"cannot read {path}: {e.strerror or e}. Run test_la.py --checkpoint RUN, which writes it."
        ) from e
    except (KeyError, IndexError, ValueError, TypeError) as e:
        raise UserError(f"{path} is no cases.csv of test_la.py ({e!r}). Test the run again.") from e
    return rows


def read_prediction(test: Path, output: str, case: str) -> NDArray[np.uint8]:
    """The prediction (W,H,D) of one output of a run for a case: 0, or the class.

    Raises:
        UserError: it was not saved, or cannot be read.
    """
    path = test / "predictions" / output / f"{case}.nii.gz"
    if not path.is_file():
        raise UserError(f"there is no {path}. Run test_la.py --checkpoint {test.parent}, which writes it.")
    try:
        picture = sitk.ReadImage(str(path))
    except RuntimeError as e:
        raise UserError(f"cannot read {path}: {str(e).splitlines()[-1]}. Test the run again.") from e
    return sitk.GetArrayFromImage(picture).transpose(2, 1, 0).astype(np.uint8)  # SimpleITK's arrays are z, y, x
