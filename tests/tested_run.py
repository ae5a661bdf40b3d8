"""A network that has learned something, its tests, and what they write."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import TINY, csv_rows, make_set

import test_la
import train_dtml

# 30 iterations are enough for balls: both networks then segment most of each, with a ragged border.
FLAGS = [*TINY, "--iterations", "30", "--lr", "0.1", "--lr-steps", "--k", "10", "--filters", "4", "--save-every", "20"]
STRIDE = ["--stride", "8", "8", "8"]
CASES = ("case08", "case09")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a network that has learned something; beside it, `set`."""
    folder = tmp_path_factory.mktemp("trained")
    train_dtml.main(["--data", str(make_set(folder / "set")), "--runs", str(folder), "--name", "run", *FLAGS])
    return folder / "run"


def score(checkpoint: Path, out: Path, *args: str) -> list[dict[str, str]]:
    """Tests a checkpoint and returns the rows of cases.csv."""
    test_la.main(["--checkpoint", str(checkpoint), "--out", str(out), "--threads", "1", *STRIDE, *args])
    return rows_of(out)


def rows_of(out: Path) -> list[dict[str, str]]:
    """The rows of cases.csv."""
    return csv_rows(out / "cases.csv")


def saved_mask(out: Path, output: str, case: str) -> np.ndarray:
    """A saved prediction as (W,H,D)."""
    picture = sitk.ReadImage(str(out / "predictions" / output / f"{case}.nii.gz"))
    return sitk.GetArrayFromImage(picture).transpose(2, 1, 0)
