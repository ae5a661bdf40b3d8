"""Which cases of a data set are trained on, tested on and validated on."""

import hashlib
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from dataloaders.lists import LA_SPLITS, read_list
from dataloaders.patients import patients_by_name, patients_of, refuse_shared
from tools.set_lists import SPLITS, PreviousLists
from tools.sources import Source, SourceSet
from utils.errors import UserError
from utils.text import some

TEST_SHARE = 0.2  # of the labeled cases


def choose_split(
    scans: Sequence[Source],
    *,
    challenge: bool,
    share: float | None,
    seed: int,
    validation_share: float = 0.0,
    before: PreviousLists | None = None,
    patients: Mapping[str, str] | None = None,
    unusable: Container[str] = (),
) -> tuple[list[str], list[str], list[str]]:
    """Names for train.list, the labeled ones first, for test.list and for validation.list; of a set that grows, the new
    ones alone.

    No case goes from one list to another: where a share is to be tested on, as many of the new labeled cases are chosen
    as bring the whole set nearest to it. Of those that are left, validation cases are chosen in the same way, so that
    `validation_share` does not change what is tested on.

    `patients` is name of a case -> its patient; a case that is not named is a patient of its own. All labeled cases of
    a patient come to one list, that of earlier ones. Unlabeled cases of a patient who is tested or validated on are in
    no list.

    The `unusable` ones of the scans come to no list, and the shares are of the others.

    Raises:
        UserError: a --test-share for a source that states its split, a source that states another split than the
            lists, too few labeled cases, none that can become a validation case, or a patient in two lists.
    """
    before, patients = before or PreviousLists(), patients or {}
    old_names = {*before.train, *before.test, *before.validation, *before.taken_out}
    patient = {name: patients.get(name, name) for name in (*(scan.name for scan in scans), *old_names)}
    place = {patient[name]: split for split in SPLITS for name in getattr(before, split)}  # of the patients seen before
    stated, names = any(scan.split for scan in scans), {scan.name for scan in scans}
    scans = [scan for scan in scans if scan.name not in unusable]
    order = [scan.name for scan in scans]
    labeled = {scan.name for scan in scans if scan.label is not None} - before.taken_out
    if stated:
        if share is not None:
            raise UserError("--test-share is given, but the source states what to test on. Leave one of them out.")
        for split, old in (("train", "test"), ("test", "train"), ("test", "validation")):
            wrong = [scan.name for scan in scans if scan.split == split and scan.name in set(getattr(before, old))]
            if wrong:
                raise UserError(
                    f"{some(wrong)} stands in {old}.list and is a {split} case of the source. A case never "
                    "goes from one list to the other. Choose another --out."
                )
        test = {scan.name for scan in scans if scan.split == "test"}
    else:
        published = [read_list(LA_SPLITS / f"{split}.list") for split in ("train", "test")]
        if challenge and share is None and names <= {name for split in published for name in split}:
            order = [name for split in published for name in split if name in set(order)]
            test = set(order) & set(published[1])
        else:
            test = {name for name in labeled - old_names if place.get(patient[name]) == "test"}
            free = {name for name in labeled - old_names if patient[name] not in place}
            count = count_to_test(len(labeled | before.labeled), share) - len(before.test) - len(test)
            most = len({*labeled, *before.labeled} - test - {*before.test, *before.validation}) - 1
            test |= draw(free, count, patient, seed, needed=not (test or before.test), most=most)
    test, new = test - old_names, [name for name in order if name not in old_names]
    to_train = {*labeled, *before.labeled} - test - {*before.test, *before.validation}
    if not (test or before.test) or not to_train:
        raise UserError(
            f"{len(to_train)} labeled cases to train on and {len(test) + len(before.test)} to test on: at least one of "
            "each is needed. Add labeled scans, or change the split."
        )
    validation = {name for name in to_train - old_names if place.get(patient[name]) == "validation"}
    free = {name for name in to_train - old_names if patient[name] not in place}
    count = count_to_validate(len(labeled | before.labeled), validation_share) - len(before.validation)
    count = min(count, len(to_train) - 1) - len(validation)
    needed = bool(validation_share) and not (validation or before.validation)
    validation |= draw(free, count, patient, seed, needed=needed, most=len(to_train) - 1)
    if validation_share and not (validation or before.validation):
        raise UserError(
            f"--validation-share {validation_share:g}: none of the {len(to_train)} labeled cases to train on can be "
            "validated on. One must be left to train on, and what is in train.list stays there. Add labeled scans, or "
            "choose another --out."
        )
    chosen = test | validation
    elsewhere = {patient[name] for name in (*chosen, *before.test, *before.validation)}
    train = [name for name in new if name not in chosen and (name in labeled or patient[name] not in elsewhere)]
    train.sort(key=lambda name: name not in labeled)
    lists = {"test": [name for name in new if name in test], "validation": [name for name in new if name in validation]}
    everything = {split: [*getattr(before, split), *{"train": train, **lists}[split]] for split in SPLITS}
    refuse_shared({f"{split}.list": names for split, names in everything.items()}, patients, "Change the split.")
    return train, lists["test"], lists["validation"]


def patients_in(source_set: SourceSet, pattern: str, out: Path) -> dict[str, str]:
    """Name of each scan, also of earlier ones in the set -> its patient; {} where nothing says who it is.

    Raises:
        UserError: --patient is given although a CSV names patients, or the set has patients and the source has none.
    """
    before = patients_of(out)
    stated = {scan.name: scan.patient for scan in source_set.scans if scan.patient}
    if stated and pattern:
        raise UserError("--patient is given, but the CSV has a column patient. Leave one of them out.")
    if pattern:
        return before | patients_by_name([scan.name for scan in source_set.scans], pattern)
    if before and not stated:
        raise UserError(f"{out} was made with patients, and would get scans without. Give --patient as before.")
    return before | stated


def draw(free: set[str], count: int, patient: Mapping[str, str], seed: int, *, needed: bool, most: int) -> set[str]:
    """Cases for test.list or validation.list: those of as many patients as bring their number nearest to `count`.

    Args:
        free: names of the cases to draw from.
        count: how many cases are wanted.
        patient: name of a case -> its patient.
        seed: of the order in which patients are drawn.
        needed: whether there must be one; if `count` is less than half of the cases of each patient, the one with the
            fewest is drawn.
        most: how many can be drawn at most.
    """
    sizes = Counter(patient[name] for name in free)
    ranked = sorted(sizes, key=lambda one: hashlib.sha256(f"{seed}:{one}".encode()).digest())
    drawn: set[str] = set()
    for one in ranked:
        if count > 0 and sizes[one] <= min(2 * count, most):
            drawn.add(one)
            count, most = count - sizes[one], most - sizes[one]
    fits = [one for one in ranked if sizes[one] <= most]
    if needed and not drawn and fits and count > 0:
        drawn.add(min(fits, key=lambda one: sizes[one]))
    return {name for name in free if patient[name] in drawn}


def count_to_test(labeled: int, share: float | None) -> int:
    """How many of so many labeled cases are tested on."""
    return min(max(round((TEST_SHARE if share is None else share) * labeled), 1), max(labeled - 1, 0))


def count_to_validate(labeled: int, share: float) -> int:
    """How many of so many labeled cases are validated on."""
    return max(round(share * labeled), 1) if share else 0
