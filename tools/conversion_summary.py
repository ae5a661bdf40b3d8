"""What `tools.convert` says of the set that it made."""

from collections import Counter
from collections.abc import Container, Sequence
from pathlib import Path

from dataloaders.class_names import DATASET, named_classes
from dataloaders.lists import LA_SPLITS, read_list
from tools.case_of_scan import Outcome
from tools.set_lists import PreviousLists
from tools.sources import SourceSet, paths_text
from tools.split import count_to_test, count_to_validate
from utils.text import some


def summary(
    outcomes: Sequence[Outcome], lists: dict[str, list[str]], labeled: Container[str], names: dict[int, str]
) -> list[str]:
    """A few lines about the set that was made."""
    counts = Counter(outcome.status for outcome in outcomes)
    parts = [f"{counts['converted']} converted, {counts['there']} already there, {counts['refused']} refused"]
    parts += [f"{counts['labeled']} made again with the label that they now have"] if counts["labeled"] else []
    parts += [f"{counts['kept']} kept that the source does not have"] if counts["kept"] else []
    lines = [", ".join(parts)]
    train = [name in labeled for name in lists["train"]]
    first = next((i for i, has_label in enumerate(train) if not has_label), len(train))
    line = f"train.list: {first} labeled, then {len(train) - first} unlabeled; test.list: {len(lists['test'])}"
    lines.append(line + (f"; validation.list: {len(lists['validation'])}" if lists["validation"] else ""))
    if later := sum(train[first:]):
        lines.append(f"{later} of those unlabeled ones have a label, but stand behind one that has none")
    values = Counter(value for outcome in outcomes for value in outcome.values)
    lines.append("label values: " + ", ".join(f"{v} in {n} cases" for v, n in sorted(values.items())))
    if names:
        lines.append(f"classes: {named_classes(names)}")
        lines += [f"class {c}, {name}, is in no label" for c, name in names.items() if c not in values]
        lines += [f"class {c} has no name in {DATASET}" for c in sorted(values) if c not in names]
    if max(values, default=1) > 1:
        flag = "" if max(values) == max(names, default=1) else f" with --classes {max(values)}"
        lines.append(f"train on all of them{flag}, or keep some with --labels")
    orientations = Counter(outcome.orientation for outcome in outcomes if outcome.orientation)
    if len(orientations) > 1:
        counted = ", ".join(f"{code} in {n} cases" for code, n in sorted(orientations.items()))
        lines.append(f"orientations differ: {counted}. A network sees the axes as they are stored; is this meant?")
    elif "unknown" in orientations:
        lines.append("no file states where its axes point; they are kept as they are stored")
    return lines


def remarks(
    source_set: SourceSet,
    lists: dict[str, list[str]],
    before: PreviousLists,
    labeled: int,
    share: float | None,
    validation_share: float,
    source: Path,
) -> list[str]:
    """Lines about files that were not read, and about lists with so many `labeled` cases that a user may not expect."""
    lines = []
    if source_set.unread:
        lines.append(f"not read: {paths_text(source_set.unread, source)}")
    for what, names in (
        (f"listed in {DATASET}, but scan or label is not there", source_set.absent),
        ("in none of the lists, and so left out", sorted(before.taken_out)),
    ):
        if names:
            lines.append(f"{what}: {some(names)}")
    if share is not None and before.test and (wanted := count_to_test(labeled, share)) != len(lists["test"]):
        lines.append(f"--test-share {share:g} asks for {wanted} test cases; no case goes from one list to the other")
    wanted = count_to_validate(labeled, validation_share)
    if validation_share and wanted != (there := len(lists["validation"])):
        lines.append(
            f"--validation-share {validation_share:g} asks for {wanted} validation cases, and {there} can be had: no "
            "case goes from one list to another, and one labeled case is left to train on"
        )
    published = [name for name in read_list(LA_SPLITS / "train.list") if name in set(lists["train"])]
    if source_set.challenge and set(lists["train"]) == set(published) and lists["train"] != published:
        lines.append(
            "train.list is in another order than the published one, so its first 16 are others. For the published "
            "order move both lists away and convert again"
        )
    return lines
