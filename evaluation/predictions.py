"""Files of a test folder, which test_la.py writes: the metrics of every scan and the predictions."""

import csv
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from utils.distributed import RANK, wait_for_rank_0
from utils.errors import UserError
from utils.run_folder import has_checkpoint
from utils.run_lock import folder_lock

COUNTS = ("voxels", "label_voxels")
PARTIAL = ".partial"  # folder in a test folder, for the files of a running test
FILES = ("test.json", "cases.csv", "table.md", "report.html")


def test_of(path: Path) -> Path:
    """The test folder of a run folder, RUN/test, also where it is still to be written; another folder itself."""
    inner = path / "test"
    of_run = (inner / "cases.csv").is_file() or has_checkpoint(path)
    return inner if of_run and not (path / "cases.csv").is_file() else path


def read_scores(test: Path) -> list[dict[str, Any]]:
    """Reads the rows of a cases.csv, of a test folder, or of a run folder with one, in their order; metrics and counts
    become numbers, other columns stay text.

    Raises:
        UserError: if the file is missing or is no cases.csv of test_la.py.
    """
    path = test if test.suffix == ".csv" else test_of(test) / "cases.csv"
    try:
        with open(path, newline="", encoding="utf-8") as f:
            rows: list[dict[str, Any]] = list(csv.DictReader(f))
        numbers = list(rows[0])[list(rows[0]).index("dice") :]
        for row in rows:
            row.update({name: int(row[name]) if name in COUNTS else float(row[name]) for name in numbers})
            if row.get("class") != "mean" and not any(row.get(name, 1) for name in COUNTS):
                # Both masks are empty; early tests wrote scores of 1 and 0.
                row.update({name: math.nan for name in numbers if name not in COUNTS})
    except OSError as e:
        run = path.parent.parent if has_checkpoint(path.parent.parent) else "RUN"
        others = sorted(str(file.parent) for file in test.glob("*/cases.csv"))
        how = f"Run test_la.py --checkpoint {run}, which writes it"
        how = f"Give one of its tests: {', '.join(others)}" if others else how
        raise UserError(f"cannot read {path}: {e.strerror or e}. {how}.") from e
    except (KeyError, IndexError, ValueError, TypeError) as e:
        raise UserError(f"{path} is no cases.csv of test_la.py ({e!r}). Test the run again.") from e
    return rows


def read_prediction(test: Path, output: str, case: str) -> NDArray[np.uint8]:
    """Reads the predicted label map (W,H,D) of one output for a case.

    Raises:
        UserError: if it was not saved or cannot be read.
    """
    path = test / "predictions" / output / f"{case}.nii.gz"
    if not path.is_file():
        raise UserError(f"there is no {path}. Run test_la.py --checkpoint {test.parent}, which writes it.")
    try:
        picture = sitk.ReadImage(str(path))
    except RuntimeError as e:
        raise UserError(f"cannot read {path}: {str(e).splitlines()[-1]}. Test the run again.") from e
    return sitk.GetArrayFromImage(picture).transpose(2, 1, 0).astype(np.uint8)  # SimpleITK's arrays are z, y, x


@contextmanager
def new_test(test: Path) -> Iterator[Path]:
    """Context with the empty folder test/.partial for the files of all processes; removed if they fail.

    Raises:
        UserError: another test is writing there, whose files would be mixed with these.
    """
    folder = test / PARTIAL
    with folder_lock(test, "another test") if RANK == 0 else nullcontext():
        if RANK == 0:
            shutil.rmtree(folder, ignore_errors=True)  # left by a killed test
        wait_for_rank_0()
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def replace_test(test: Path) -> None:
    """Moves the files of test/.partial to the test folder and removes all files of an earlier test.

    Its report and its predictions of other outputs or scans are removed too.
    """
    try:
        rows = read_scores(test / "cases.csv")
    except UserError:  # no file, or not one of test_la.py
        rows = []
    folder = test / "predictions"
    earlier = {folder / row["output"] / f"{row['case']}.nii.gz" for row in rows}
    stale = [path for path in earlier if path.resolve().is_relative_to(folder.resolve())]
    for path in (*stale, *(test / name for name in FILES)):  # cases.csv names the others, if this is interrupted
        path.unlink(missing_ok=True)
    for path in sorted((test / PARTIAL).rglob("*"), reverse=True):  # cases.csv last
        if path.is_file():
            target = test / path.relative_to(test / PARTIAL)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    shutil.rmtree(test / PARTIAL)
