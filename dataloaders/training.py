"""From the flags that describe a training set to its cases."""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from dataloaders.cases import LA_FOLDER, PHANTOM_FOLDER, Case, find_cases, known_spacing, lists_of
from dataloaders.phantom import make_phantom_set
from utils.distributed import RANK
from utils.errors import UserError


def training_cases(
    folder: Path,
    *,
    labeled: int,
    unlabeled: int | None,
    batch_size: int,
    labeled_batch: int | None,
    patch_size: Sequence[int],
    multiple: int,
    classes: int = 1,
) -> tuple[list[Case], list[str], int]:
    """The first `labeled` cases of train.list, then the unlabeled ones; what is wrong so far; labeled crops a batch.

    `unlabeled` None means all others; `labeled_batch` None means half of the batch, or all of it without unlabeled
    cases. The phantom set is made on first use. Of the test cases only the names are read.

    Raises:
        UserError: a missing folder, bad lists, counts out of bounds, a patch whose sides are not multiples of
            `multiple`.
    """
    if folder == PHANTOM_FOLDER:
        if RANK == 0:
            print(
                f"No LA data in {LA_FOLDER}, so this is the PHANTOM SET in {folder}: made-up atria to try things out\n"
                "with, no figures to compare with any paper. data/README.md tells where the LA data come from.",
                file=sys.stderr,
            )
        make_phantom_set(folder)
    train, _ = lists_of(folder)
    shown = " ".join(map(str, patch_size))
    if any(side % multiple or side <= 0 for side in patch_size):
        near = " ".join(str(max(multiple, round(side / multiple) * multiple)) for side in patch_size)
        raise UserError(f"--patch-size {shown} must be multiples of {multiple}. Try --patch-size {near}.")
    if not 1 <= labeled <= len(train):
        raise UserError(f"--labeled {labeled} must lie between 1 and {len(train)}, the cases of train.list.")
    left = len(train) - labeled
    if unlabeled is not None and not 0 <= unlabeled <= left:
        raise UserError(f"--unlabeled {unlabeled} must lie between 0 and {left}, the cases left after --labeled.")
    others = train[labeled:] if unlabeled is None else train[labeled : labeled + unlabeled]
    if labeled_batch is None:
        labeled_batch = max(batch_size // 2, 1) if others else batch_size
    if not 1 <= labeled_batch <= min(batch_size, labeled):
        raise UserError(
            f"{labeled_batch} labeled crops a batch are asked for, but --batch-size is {batch_size} and --labeled "
            f"{labeled}. Label more cases, or set --labeled-batch to at most the smaller of both."
        )
    if (labeled_batch < batch_size) != bool(others):
        raise UserError(
            f"--labeled-batch {labeled_batch} of --batch-size {batch_size} does not fit {len(others)} unlabeled cases. "
            "A batch has unlabeled crops exactly if there are unlabeled cases."
        )
    cases, problems = find_cases(folder, train[:labeled], labeled=True, classes=classes)
    more, more_problems = find_cases(folder, others, labeled=False, classes=classes)
    return cases + more, problems + more_problems, labeled_batch


def median_spacing(cases: Sequence[Case]) -> list[float] | None:
    """Median spacing (mm along x, y, z) of the labeled cases, to which predict.py resamples a scan; None if a file does
    not tell its own."""
    spacings = [known_spacing(case) for case in cases if case.labeled]
    if None in spacings:
        return None
    return [float(statistics.median(along)) for along in zip(*filter(None, spacings), strict=True)]
