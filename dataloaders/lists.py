"""The lists of a data set: train.list, test.list and validation.list, one case name a line (dataloaders/cases.py)."""

import itertools
import shlex
from collections import Counter
from pathlib import Path

from dataloaders.cases import ROOT, case_file
from dataloaders.patients import patients_of, refuse_shared
from utils.errors import UserError
from utils.text import read_text

LA_SPLITS = ROOT / "data" / "splits" / "la"
VALIDATION = "validation.list"
UNCONVERTED = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".dcm")  # endings of scans
SOURCES = ("", "images", "imagesTr", "labels", "labelsTr")  # folders of a source that have them


def read_list(path: Path) -> list[str]:
    """Case names of a .list file, one per line; blank lines and surrounding white space are ignored.

    Raises:
        UserError: if the list is missing, unreadable or empty, or names a case twice or a path outside the data set.
    """
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read the list {path}: {e}. It must be a text file with one case name a line.") from e
    names = [Path(line).as_posix() for line in lines if line]  # ./A and A/ become A
    if not names:
        raise UserError(f"the list {path} names no case. Write one case name a line.")
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise UserError(f"the list {path} names {', '.join(twice)} more than once. Keep each case once.")
    unnamable = [name for name in names if not name.isprintable()]
    if unnamable:
        raise UserError(
            f"the list {path} holds {unnamable[0]!r}, which is not a valid case name. Write one name a line."
        )
    outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise UserError(
            f"the list {path} names paths outside the data set: {', '.join(outside)}. Use plain case names."
        )
    return names


def refuse_unconverted(folder: Path) -> None:
    """Refuses a folder without lists that holds scans of other formats than h5, itself or in its folders of images.

    Raises:
        UserError: naming a scan, and the command that converts them.
    """
    for part in SOURCES:
        inner = folder / part
        files = sorted(inner.iterdir()) if inner.is_dir() else []
        scan = next((path for path in files if path.name.lower().endswith(UNCONVERTED)), None)
        if scan is not None:
            source = shlex.quote(str(folder if part or folder.name not in SOURCES else folder.parent))
            raise UserError(
                f"{folder} holds scans such as {scan.relative_to(folder)} and no converted data set. Convert them "
                f"first: python -m tools.convert --source {source} --out data/mine. Then name data/mine in its place."
            )


def lists_of(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the training cases and of the test cases, from the folder's lists or else the published LA lists.

    Raises:
        UserError: if the folder is missing, only one of the two exists, there is none and the folder holds other
            files than LA's cases, a list is not valid, or a case or a patient is in two lists, that of
            `validation_of` among them.
    """
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise UserError(
            f"the data folder {folder} {what}. See data/README.md for where LA comes from and the layout, "
            "docs/own-data.md for scans of your own."
        )
    own = [(folder / f"{split}.list").exists() for split in ("train", "test")]
    if any(own) and not all(own):
        raise UserError(f"{folder} has only one of train.list and test.list. Put both there, or neither to use LA's.")
    if not any(own):
        refuse_unconverted(folder)
    where = folder if all(own) else LA_SPLITS
    train, test = read_list(where / "train.list"), read_list(where / "test.list")
    if where is LA_SPLITS and any(folder.iterdir()) and not any(case_file(folder, name) for name in (*train, *test)):
        raise UserError(
            f"{folder} has no train.list and test.list, and none of LA's cases. Write the names of its cases into "
            "both, one a line, the labeled ones first, or give the tools.convert command again."
        )
    lists = {f"{where}/train.list": train, f"{where}/test.list": test, f"{folder}/{VALIDATION}": validation_of(folder)}
    for (one, names), (other, others) in itertools.combinations(lists.items(), 2):
        shared = sorted(set(names) & set(others))
        if shared:
            raise UserError(f"{one} and {other} both name {', '.join(shared)}. Keep each case in one list.")
    refuse_shared(lists, patients_of(folder), "Move the scans, or correct dataset.json.")
    return train, test


def validation_of(folder: Path) -> list[str]:
    """Names of the validation cases; none if the set has no validation.list.

    Raises:
        UserError: for a list that is not valid or empty.
    """
    path = folder / VALIDATION
    return read_list(path) if path.exists() else []
