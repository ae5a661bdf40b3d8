"""The scans of a data set that test_la.py tests, by --scans and --cases."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dataloaders.folds import split_fold
from dataloaders.lists import VALIDATION, lists_of, validation_of
from dataloaders.patients import others_of, patients_of
from utils.errors import UserError
from utils.text import did_you_mean

SCANS = ("test", "validation", "held-out")


def names_of(folder: Path, scans: str, seen: Collection[str], trained: Mapping[str, Any]) -> list[str]:
    """The names of the scans to test.

    Args:
        scans: 'test' for test.list, 'validation' for validation.list, or the fold of a run with --fold, 'held-out' for
            the scans of train.list that are not in `seen`, nor other scans of a patient in it.
        seen: names of the scans used in training, also those of its fold that it was validated on.

    Raises:
        UserError: for lists that are not valid, or if there is no such scan.
    """
    train, test = lists_of(folder)
    if scans == "test":
        return test
    if scans == "validation":
        fold = trained.get("fold", "")  # early checkpoints do not state it
        labeled = train[: trained["labeled"]]
        validation = split_fold(labeled, fold, patients_of(folder))[1] if fold else validation_of(folder)
        if not validation:
            raise UserError(f"--scans validation: there is no {folder}/validation.list. Choose other --scans.")
        return validation
    held_out = others_of(train, seen, patients_of(folder))
    if not held_out:
        raise UserError(
            f"--scans held-out: the training used all {len(train)} scans of {folder}/train.list, or other scans of the "
            "same patients. Train with fewer --unlabeled, and the last of the list are held out."
        )
    return held_out


def chosen_cases(folder: Path, scans: str, cases: Sequence[str], state: Mapping[str, Any]) -> list[str]:
    """The scans to test of `names_of`, in their order: those of --cases, or all. `state` is that of the checkpoint.

    Raises:
        UserError: as `names_of`; for cases that are not among the scans, with the list that each is in, or the name
            most like it.
    """
    seen, trained = state["checksums"], state["options"]
    used = {*seen, *(state.get("best") or {}).get("scans", ())}  # best.pt was chosen on these, which may be of a fold
    names = names_of(folder, scans, used, trained)
    lists = {"test": "test.list", "validation": "its fold" if trained.get("fold") else VALIDATION}
    lists |= {"held-out": "train.list"}

    def where(name: str) -> str:
        if name in seen:
            return f"{name} is in train.list, and the checkpoint was trained on it."
        for other, file in lists.items():
            with suppress(UserError):  # there are no such scans
                if name in names_of(folder, other, used, trained):
                    return f"{name} is in {file}: --scans {other} has it."
        if name in lists_of(folder)[0]:
            return f"{name} is in train.list, and the training used another scan of its patient."
        return f"{name}.{did_you_mean(name, names)}"

    unknown = [name for name in cases if name not in names]
    if unknown:
        lines = "\n".join(f"  {where(name)}" for name in unknown)
        raise UserError(f"--cases: {len(unknown)} of {len(cases)} not among the {len(names)} {scans} scans:\n{lines}")
    return [name for name in names if name in cases] if cases else names
