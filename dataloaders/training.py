"""The cases of a training set, from the flags that describe it."""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from dataloaders.cases import MOST_CLASSES, PHANTOM_FOLDER, Case, Problem, case_file, find_cases, has_label
from dataloaders.class_names import class_names
from dataloaders.findings import Facts
from dataloaders.folds import split_fold
from dataloaders.geometry import known_spacing
from dataloaders.lists import LA_SPLITS, VALIDATION, lists_of, read_list, validation_of
from dataloaders.patients import others_of, patients_of
from dataloaders.phantom import make_phantom_set
from utils.distributed import RANK
from utils.errors import UserError
from utils.text import xyz_text

LA_LABELED, PHANTOM_LABELED = 16, 8


def is_phantom(folder: Path) -> bool:
    """Whether a path leads to the phantom set."""
    return folder.resolve() == PHANTOM_FOLDER.resolve()


def usual_labeled(folder: Path, of_profile: int | None = None) -> int:
    """Default of --labeled: 16 for LA (or the profile's number), 8 for the phantom set, else all cases with a label.

    Raises:
        UserError: for a missing folder, lists that are not valid, or labels that do not come first in train.list.
    """
    if is_phantom(folder):
        return PHANTOM_LABELED
    train, _ = lists_of(folder)
    if {*train} <= {*read_list(LA_SPLITS / "train.list"), *read_list(LA_SPLITS / "test.list")}:
        return of_profile or LA_LABELED
    labels = [has_label(case_file(folder, name), unreadable=True) for name in train]
    first = labels.index(False) if False in labels else len(train)
    later = sum(labels[first:])
    if later or not first:
        raise UserError(
            f"{train[first]}, number {first + 1} of {folder}/train.list, has no label, and {later or 'none'} of those "
            "after it have one. Put the labeled cases first in the list"
            + (f", or give --labeled {first} for those before it." if first else ".")
        )
    return first


def usual_classes(folder: Path) -> int:
    """Default of --classes: the highest label that the set's dataset.json names, 1 if it names none.

    Values above 254, which no case can hold, are left alone.

    Raises:
        UserError: if dataset.json cannot be read or has other content.
    """
    return max((c for c in class_names(folder) if c <= MOST_CLASSES), default=1)


def refuse_patch(patch_size: Sequence[int], multiples: Sequence[int]) -> None:
    """Raises UserError for a patch with a side that is no such multiple."""
    sides = list(zip(patch_size, multiples, strict=True))
    if any(side % multiple or side <= 0 for side, multiple in sides):
        shown = " ".join(map(str, patch_size))
        near = " ".join(str(max(multiple, round(side / multiple) * multiple)) for side, multiple in sides)
        raise UserError(f"--patch-size {shown} must be multiples of {xyz_text(multiples)}. Try --patch-size {near}.")


def training_cases(
    folder: Path,
    *,
    labeled: int,
    unlabeled: int | None,
    batch_size: int,
    labeled_batch: int | None,
    patch_size: Sequence[int],
    multiples: Sequence[int],
    classes: int = 1,
    channels: int | None = None,
    fold: str = "",
) -> tuple[list[Case], list[Problem], int]:
    """Selects the training cases. The phantom set is created on first use. Only the names of test cases are read.

    Args:
        labeled: the first so many cases of train.list are labeled.
        unlabeled: number of the following cases to use without label; None: all.
        labeled_batch: labeled crops in a batch; None: half, or all without unlabeled cases.
        patch_size: voxels of a crop along x, y, z.
        multiples: the sides of a patch must be multiples of these.
        classes: C, the largest allowed label value.
        channels: K, the number of channels of every case.
        fold: I/K leaves the labeled cases of this fold out, and all scans of their patients; '' for all.

    Returns:
        The labeled cases and then the unlabeled ones, a problem for each unusable case so far, and the number of
        labeled crops in a batch.

    Raises:
        UserError: for a missing folder, lists that are not valid, counts out of range, or sides that are not such
            multiples.
    """
    if is_phantom(folder):
        if RANK == 0:
            print(
                f"{folder} is the PHANTOM SET: made-up atria to try things out with, no figures to compare with any\n"
                "paper. data/README.md says where the LA data come from.",
                file=sys.stderr,
            )
        make_phantom_set(folder)
    train, _ = lists_of(folder)
    refuse_patch(patch_size, multiples)
    if not 1 <= labeled <= len(train):
        raise UserError(
            f"--labeled {labeled} must lie between 1 and {len(train)}, the cases of train.list. Give the number of its "
            "first cases that have a label."
        )
    left = len(train) - labeled
    if unlabeled is not None and not 0 <= unlabeled <= left:
        raise UserError(f"--unlabeled {unlabeled} must lie between 0 and {left}, the cases left after --labeled.")
    patients = patients_of(folder)
    names, left_out = split_fold(train[:labeled], fold, patients)
    unlabeled_names = train[labeled:] if unlabeled is None else train[labeled : labeled + unlabeled]
    unlabeled_names = others_of(unlabeled_names, left_out, patients)
    if labeled_batch is None:
        labeled_batch = max(batch_size // 2, 1) if unlabeled_names else batch_size
    if not 1 <= labeled_batch <= min(batch_size, len(names)):
        here = f" --fold {fold} leaves {len(names)} labeled cases" if fold else f" --labeled {labeled}"
        lacking = {"label more cases": len(names), "raise --batch-size": batch_size}
        more = " and ".join(advice for advice, number in lacking.items() if labeled_batch > number).capitalize()
        raise UserError(
            f"{labeled_batch} labeled crops a batch are asked for, but --batch-size is {batch_size} and"
            f"{here}. {more}, or give {'--labeled-batch' if unlabeled_names else '--batch-size'} "
            f"{max(min(batch_size - bool(unlabeled_names), len(names)), 1)}."
        )
    if (labeled_batch < batch_size) != bool(unlabeled_names):
        raise UserError(
            f"--labeled-batch {labeled_batch} of --batch-size {batch_size} does not fit "
            f"{len(unlabeled_names)} unlabeled cases. "
            + ("Raise --batch-size above it, or give --unlabeled 0." if unlabeled_names else
               "Lower --labeled, so that cases without label are used too, or give --unlabeled 0 without "
               "--labeled-batch to learn from labels alone.")
        )  # fmt: skip
    cases, problems = find_cases(folder, names, labeled=True, classes=classes, channels=channels)
    without = [case for case in cases if not has_label(case.path, unreadable=True)]
    if without:
        first = train.index(without[0].name)
        fewer = f"give --labeled {first} for those before {without[0].name}, or " if first else ""
        text = (
            f"is a labeled case without a dataset 'label', one of the first {labeled} of train.list (--labeled); "
            f"{fewer}put the labeled cases first in the list"
        )
        problems += [(case.name, f"{case.path} {text}") for case in without]
    unlabeled_cases, missing = find_cases(folder, unlabeled_names, labeled=False, classes=classes, channels=channels)
    return [case for case in cases if case not in without] + unlabeled_cases, problems + missing, labeled_batch


def validation_names(folder: Path, labeled: int, fold: str) -> list[str]:
    """Names of the cases that --validate-every scores: those of a fold I/K of the `labeled` first cases, or without one
    of validation.list.

    Raises:
        UserError: if the set has no validation.list, or lists that are not valid.
    """
    train, _ = lists_of(folder)
    names = split_fold(train[:labeled], fold, patients_of(folder))[1] if fold else validation_of(folder)
    if not names:
        raise UserError(
            f"--validate-every: there is no {folder / VALIDATION}. Make the set with --validation-share of "
            "tools.convert, or write there, one a line, labeled cases that are in no other list, or leave out a part "
            "of the labeled cases with --fold. LA has no validation set: leave --validate-every out, and its last "
            "iteration counts."
        )
    return names


def refuse_classes(facts: Sequence[Facts], classes: int) -> None:
    """Checks that at least one labeled case contains the class with the highest number.

    Raises:
        UserError: if none does; the message names the largest value in the labels.
    """
    largest = max((max(x.voxels, default=0) for x in facts if x.voxels is not None), default=0)
    if classes == 1 or largest == classes:  # empty labels cause a warning elsewhere
        return
    raise UserError(
        f"--classes {classes}, but the largest value in the labels of the labeled cases is {largest}. "
        f"Give --classes {max(largest, 1)}, or label a case that shows class {classes}. Without "
        "--classes there are as many as the set's dataset.json names."
    )


def median_spacing(cases: Sequence[Case]) -> list[float] | None:
    """Median spacing (mm along x, y, z) of the labeled cases; None if the spacing of one is not known.

    predict.py resamples scans to it.
    """
    spacings = [known_spacing(case) for case in cases if case.labeled]
    if None in spacings:
        return None
    return [float(statistics.median(along)) for along in zip(*filter(None, spacings), strict=True)]
