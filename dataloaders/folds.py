"""Folds of a cross-validation: which labeled scans a run leaves out to be validated and tested on.

The patients of the labeled scans are dealt out in rounds, in the order of train.list; as a rule each scan is a patient
of its own. In a round each of the K folds gets one patient with all scans, in an order that depends on K and the number
of the round alone, so that no pattern of the list becomes one of the folds. The folds differ by one patient at most. A
scan that is added behind the others changes no earlier scan's fold.
"""

import argparse
import hashlib
import re
from collections.abc import Mapping, Sequence

from utils.errors import UserError


def fold_text(word: str) -> str:
    """Checks a value of --fold, I/K with 0 <= I < K and K at least 2, and returns it in its shortest form; '' is none.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", word)
    if not word:
        return word
    if not match:
        raise argparse.ArgumentTypeError(f"{word!r} is no fold. Write the fold and their number, as 0/5")
    fold, folds = map(int, match.groups())
    if folds < 2 or fold >= folds:
        last = f"0/{folds} to {folds - 1}/{folds}" if folds > 1 else "0/2 and 1/2, or more"
        raise argparse.ArgumentTypeError(f"there is no fold {word}. Folds count from 0: {last}")
    return f"{fold}/{folds}"


def fold_numbers(count: int, folds: int) -> list[int]:
    """The fold, 0 to `folds` - 1, of each of `count` patients in their order."""

    def order(start: int) -> list[int]:
        return sorted(range(folds), key=lambda fold: hashlib.sha256(f"{folds} {start} {fold}".encode()).digest())

    return [fold for start in range(0, count, folds) for fold in order(start // folds)][:count]


def split_fold(labeled: Sequence[str], fold: str, patients: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The labeled scans that a run of a fold is trained on, and those of the fold; all and none without a fold.

    Args:
        fold: I/K as of `fold_text`, or ''.
        patients: name of a scan -> its patient; a scan that is not named is a patient of its own.

    Raises:
        UserError: if there are fewer patients than folds.
    """
    if not fold:
        return list(labeled), []
    chosen, folds = map(int, fold.split("/"))
    patient = {name: patients.get(name, name) for name in labeled}
    order = list(dict.fromkeys(patient.values()))
    if len(order) < folds:
        of = "" if len(order) == len(labeled) else f", of {len(order)} patients"
        raise UserError(
            f"--fold {fold} deals out {folds} folds, but only {len(labeled)} scans are labeled{of}. Choose fewer "
            "folds, or label more scans."
        )
    number = dict(zip(order, fold_numbers(len(order), folds), strict=True))
    left_out = [name for name in labeled if number[patient[name]] == chosen]
    return [name for name in labeled if number[patient[name]] != chosen], left_out
