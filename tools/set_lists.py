"""The lists of a set that grows: what they hold, where new cases are added, and the files that go with them."""

from collections.abc import Container, Iterable, Mapping, Sequence
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
    """What was once in the lists, and was taken out by hand; scans that lists from before the first conversion lack."""
    validation: list[str] = field(default_factory=list)


def read_previous(out: Path, scans: Iterable[str] = ()) -> PreviousLists:
    """The lists that a set has, none if it is new; where train.list or test.list is missing, its cases count as new.

    Lists from before the first conversion, as of a published split, say what the set is to have: of the `scans` of the
    source, those that they do not name count as taken out.

    Raises:
        UserError: lists that cannot be read, or of which two name a case.
    """
    paths = [out / f"{split}.list" for split in ("train", "test")]
    validation = validation_of(out)
    if all(path.exists() for path in paths):
        train, test = lists_of(out)
        taken_out = frozenset((listed_in(out).keys() or {*scans}) - {*train, *test, *validation})
    else:
        train, test = (read_list(path) if path.exists() else [] for path in paths)
        taken_out = frozenset()
    return PreviousLists(train, test, labeled_of(out, [*train, *test, *validation]), taken_out, validation)


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
    At the first conversion nothing is listed, and lists that are there already stay as they are.
    """
    late = [x for x in before.train if listed and x in labeled and not listed.get(x, x in before.labeled)]
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
    listed: Mapping[str, bool],
    names: dict[int, str],
    channels: Sequence[str],
    patients: Mapping[str, str],
) -> None:
    """Writes the lists, of validation cases only if there are any, then dataset.json with the names of the classes and,
    if there are several, of the channels, the patient of each scan, if known, and every case ever `listed` or taken
    out, name -> whether it has a label."""
    for split in (split for split in SPLITS if lists[split]):
        write_whole(out / f"{split}.list", "".join(f"{name}\n" for name in lists[split]).encode())
    labels = {"labels": {0: "background", **names}} if names else {}
    several = {"channel_names": {str(i): name for i, name in enumerate(channels)}} if len(channels) > 1 else {}
    known = {"patients": dict(patients)} if patients else {}
    ever = {"listed": {**listed_in(out), **listed}}
    write_json(out / DATASET, {**read_json(out / DATASET), **several, **labels, **known, **ever})
