"""The lists of a set that grows: what they hold, where new cases are added, and the files that go with them."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dataloaders.cases import case_file, has_label
from dataloaders.class_names import DATASET
from dataloaders.lists import lists_of, read_list, validation_of
from utils.checkpoint import write_whole
from utils.run_folder import read_json, write_json

SPLITS = ("train", "test", "validation")


@dataclass(frozen=True)
class PreviousLists:
    """The lists of a set that is to grow, all empty for a new one."""

    train: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    labeled: frozenset[str] = frozenset()
    """Those of them that have a label."""
    taken_out: frozenset[str] = frozenset()
    """What was once in the lists, and was taken out by hand."""
    validation: list[str] = field(default_factory=list)
    by_hand: bool = False
    """Whether train.list and test.list were there before the first conversion: the set is to have these cases alone."""


def read_previous(out: Path) -> PreviousLists:
    """The lists that a set has, none if it is new; where train.list or test.list is missing, its cases count as new.

    Raises:
        UserError: lists that cannot be read, or of which two name a case.
    """
    paths = [out / f"{split}.list" for split in ("train", "test")]
    validation = validation_of(out)
    if all(path.exists() for path in paths):
        train, test = lists_of(out)
        taken_out = frozenset(listed_in(out).keys() - {*train, *test, *validation})
    else:
        train, test = (read_list(path) if path.exists() else [] for path in paths)
        taken_out = frozenset()
    by_hand = all(path.exists() for path in paths) and not listed_in(out)
    return PreviousLists(train, test, labeled_of(out, [*train, *test, *validation]), taken_out, validation, by_hand)


def labeled_of(out: Path, names: Sequence[str]) -> frozenset[str]:
    """The cases that are there and have a label."""
    return frozenset(name for name in names if has_label(case_file(out, name), unreadable=False))


def listed_in(out: Path) -> dict[str, bool]:
    """Every case that was ever in the lists -> whether it had a label then."""
    listed = read_json(out / DATASET).get("listed")
    return listed if isinstance(listed, dict) else {}


def extended_lists(
    before: PreviousLists,
    train: Sequence[str],
    test: Sequence[str],
    validation: Sequence[str],
    *,
    labeled: Container[str],
    listed: dict[str, bool],
) -> dict[str, list[str]]:
    """The lists with the new cases of `train`, `test` and `validation`.

    The old lines stay in their order. New labeled cases follow the labeled ones that train.list begins with, and so do
    those that got a label since they were `listed`: what the first N were, if those were labeled, they still are.
    Lists that were written by hand stay as they are at the first conversion.
    """
    late = [x for x in before.train if x in labeled and not listed.get(x, x in before.labeled) and not before.by_hand]
    old = [name for name in before.train if name not in late]
    first = next((i for i, name in enumerate(old) if name not in labeled), len(old))
    new = [name for name in train if name in labeled]
    others = [name for name in train if name not in labeled]
    return {
        "train": [*old[:first], *late, *new, *old[first:], *others],
        "test": [*before.test, *test],
        "validation": [*before.validation, *validation],
    }


def write_set(
    out: Path,
    lists: dict[str, list[str]],
    labeled: Container[str],
    names: dict[int, str],
    channels: Sequence[str],
    patients: Mapping[str, str],
    left_out: Mapping[str, bool],
) -> None:
    """Writes the lists, of validation cases only if there are any, then dataset.json with the names of the classes and,
    if there are several, of the channels, the patient of each scan, if known, and every case ever listed. Those
    `left_out`, name -> whether it has a label, count as listed and taken out, so that they stay out."""
    for split in (split for split in SPLITS if lists[split]):
        write_whole(out / f"{split}.list", "".join(f"{name}\n" for name in lists[split]).encode())
    labels = {"labels": {0: "background", **names}} if names else {}
    listed = dict(left_out) | listed_in(out) | {name: name in labeled for split in SPLITS for name in lists[split]}
    several = {"channel_names": {str(i): name for i, name in enumerate(channels)}} if len(channels) > 1 else {}
    known = {"patients": dict(patients)} if patients else {}
    write_json(out / DATASET, {**read_json(out / DATASET), **several, **labels, **known, "listed": listed})
