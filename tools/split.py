"""Which cases of a data set are trained on, tested on and validated on."""

import hashlib
from collections.abc import Sequence

from dataloaders.cases import LA_SPLITS, read_list
from tools.growing import Before
from tools.sources import Source
from utils.errors import UserError

TEST_SHARE = 0.2  # of the labeled cases


def choose_split(
    scans: Sequence[Source],
    *,
    challenge: bool,
    share: float | None,
    seed: int,
    validation_share: float = 0.0,
    before: Before | None = None,
) -> tuple[list[str], list[str], list[str]]:
    """Names for train.list, the labeled ones first, for test.list and for validation.list; of a set that grows, the new
    ones alone.

    No case goes from one list to another: where a share is to be tested on, as many of the new labeled cases are chosen
    as bring the whole set nearest to it. Of those that are left, validation cases are chosen in the same way, so that
    `validation_share` does not change what is tested on.

    Raises:
        UserError: a --test-share for a source that states its split, a source that states another split than the
            lists, too few labeled cases, or none that can become a validation case.
    """
    before = before or Before()
    old_names = {*before.train, *before.test, *before.validation, *before.taken_out}
    order = [scan.name for scan in scans]
    labeled = {scan.name for scan in scans if scan.label is not None} - before.taken_out
    if any(scan.split for scan in scans):
        if share is not None:
            raise UserError("--test-share is given, but the source states what to test on. Leave one of them out.")
        for split, old in (("train", "test"), ("test", "train"), ("test", "validation")):
            wrong = [scan.name for scan in scans if scan.split == split and scan.name in set(getattr(before, old))]
            if wrong:
                raise UserError(
                    f"{', '.join(wrong[:5])} stands in {old}.list and is a {split} case of the source. A case never "
                    "goes from one list to the other. Choose another --out."
                )
        test = {scan.name for scan in scans if scan.split == "test"}
    else:
        published = [read_list(LA_SPLITS / f"{split}.list") for split in ("train", "test")]
        if challenge and share is None and set(order) <= {name for names in published for name in names}:
            order = [name for names in published for name in names if name in set(order)]
            test = set(order) & set(published[1])
        else:
            ranked = sorted(labeled - old_names, key=lambda name: rank(name, seed))
            count = count_to_test(len(labeled | before.labeled), share) - len(before.test)
            test = set(ranked[: max(count, 0)])
    test, new = test - old_names, [name for name in order if name not in old_names]
    to_train = {*labeled, *before.labeled} - test - {*before.test, *before.validation}
    if not (test or before.test) or not to_train:
        raise UserError(
            f"{len(to_train)} labeled cases to train on and {len(test) + len(before.test)} to test on: at least one of "
            "each is needed. Add labeled scans, or change the split."
        )
    free = sorted(to_train - old_names, key=lambda name: rank(name, seed))
    count = count_to_validate(len(labeled | before.labeled), validation_share) - len(before.validation)
    validation = set(free[: max(min(count, len(to_train) - 1), 0)])
    if validation_share and not (validation or before.validation):
        raise UserError(
            f"--validation-share {validation_share:g}: none of the {len(to_train)} labeled cases to train on can be "
            "validated on. One must be left to train on, and what is in train.list stays there. Add labeled scans, or "
            "choose another --out."
        )
    chosen = test | validation
    train = sorted((name for name in new if name not in chosen), key=lambda name: name not in labeled)
    return train, [name for name in new if name in test], [name for name in new if name in validation]


def rank(name: str, seed: int) -> bytes:
    """The place of a case in the order in which cases are drawn for test.list and validation.list."""
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def count_to_test(labeled: int, share: float | None) -> int:
    """How many of so many labeled cases are tested on."""
    return min(max(round((TEST_SHARE if share is None else share) * labeled), 1), max(labeled - 1, 0))


def count_to_validate(labeled: int, share: float) -> int:
    """How many of so many labeled cases are validated on."""
    return max(round(share * labeled), 1) if share else 0
