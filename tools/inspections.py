"""What a look at one case, and at the labels of all, says about a data set."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from skimage.measure import label as components

from dataloaders.cases import Case, CaseError, by_problem, has_label, read_case
from dataloaders.findings import Facts, Finding, absent_classes, duplicates, facts_of, with_spacing
from dataloaders.geometry import stated_geometry
from tools.overview import volumes_ml
from utils.run_folder import digest

SPECK = 0.01  # of the voxels of a class: a smaller part is a speck
DIFFERENT = 10.0  # times larger or smaller than the usual object


@dataclass(frozen=True)
class Inspection:
    """One inspected case: what is wrong with it, or its facts and what its label shows."""

    name: str
    problem: str = ""
    facts: Facts | None = None
    image: str = ""
    """Fingerprint of the image."""
    label: str = ""
    """Digest of the label, '' if it is empty or was not opened."""
    has_label: bool = False
    """Whether the file has a label, opened or not."""
    parts: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    """Class -> voxels of its parts (26-connectivity), the largest first."""
    border: tuple[int, ...] = ()
    """The classes that touch the border of the volume."""


def inspect(case: Case) -> Inspection:
    """Reads a case once. Its label is opened only if `case.labeled`."""
    try:
        image, label = read_case(case)
        stated_geometry(case)  # an error here, where training would not mind
    except CaseError as e:
        return Inspection(case.name, f"{case.path} {e}")
    facts, labeled = with_spacing(facts_of(case, image, label)), has_label(case.path, unreadable=False)
    result = Inspection(case.name, facts=facts, image=facts.fingerprint, has_label=labeled)
    if label is None or not facts.voxels:
        return result
    faces = [np.unique(label.take((0, -1), axis=axis)) for axis in range(3)]
    border = tuple(int(c) for c in np.unique(np.concatenate(faces)) if c)
    sizes = {c: np.bincount(components(label == c, connectivity=3).ravel())[1:] for c in facts.voxels}
    parts = {c: sorted(voxels.tolist(), reverse=True) for c, voxels in sizes.items()}
    return dataclasses.replace(result, label=digest(label), parts=parts, border=border)


def findings_of_inspections(
    inspections: Sequence[Inspection],
    *,
    classes: int,
    labeled: Sequence[str],
    test: Sequence[str],
    validation: Sequence[str],
) -> list[Finding]:
    """Findings that training does not report itself: labels, parts, sizes of objects, duplicates."""
    good = [x for x in inspections if x.facts is not None]
    fix = "Fix the file or take the case out of the lists."
    findings = [
        Finding("error", tuple(same), f"{text if len(same) > 1 else next(iter(same.values()))}. {fix}")
        for text, same in by_problem((x.name, x.problem) for x in inspections if x.problem).items()
    ]
    findings += duplicates([x.facts for x in good if x.facts], test, validation)
    findings += _same_labels(good)
    findings += _classes(good, classes, {"labeled training": labeled, "test": test, "validation": validation})
    findings += _sizes(good)
    findings += _parts_of_classes(good)
    touching = tuple(x.name for x in good if x.border)
    if touching:
        text = "the object touches the border of the scan, so that it is cut or the crop was too narrow. "
        findings.append(Finding("note", touching, text + "Crop with a margin if you can."))
    shown = tuple(x.name for x in good if x.has_label and x.facts and not x.facts.case.labeled)
    if shown:
        text = "without label in this check and in training though the file has one; it is never opened. "
        findings.append(Finding("note", shown, text + "Raise --labeled to learn from it."))
    return findings


def _same_labels(inspections: Sequence[Inspection]) -> list[Finding]:
    groups: dict[str, list[Inspection]] = defaultdict(list)
    for x in inspections:
        if x.label:
            groups[x.label].append(x)
    text = "the same label with different images. See whether they are one scan, or a label was saved under a wrong "
    alike = [group for group in groups.values() if len({x.image for x in group}) > 1]
    return [Finding("warning", tuple(x.name for x in group), f"{text}name.") for group in alike]


def _classes(inspections: Sequence[Inspection], classes: int, groups: dict[str, Sequence[str]]) -> list[Finding]:
    """A warning for a class that no label of a group has, a note for one that some lack. Empty labels do not count."""
    findings = []
    for group, names in groups.items():
        voxels = {x.name: x.facts.voxels for x in inspections if x.facts and x.facts.voxels and x.name in names}
        nowhere = absent_classes(group, list(voxels.values()), classes)
        for c in range(1, classes + 1):
            without = tuple(name for name, counts in voxels.items() if c not in counts)
            if c in nowhere:
                findings.append(Finding("warning", (), nowhere[c]))
            elif without:
                text = f"class {c} is absent. Fine if the object is not in the scan."
                findings.append(Finding("note", without, text))
    return findings


def _sizes(inspections: Sequence[Inspection]) -> list[Finding]:
    """Objects much larger or smaller than the others of their class, and labels with more object than background."""
    findings = []
    sizes: dict[int, dict[str, float]] = defaultdict(dict)
    unit = "ml" if all(x.facts.spacing for x in inspections if x.facts) else "voxels"
    for x in inspections:
        if x.facts and x.facts.voxels:
            for c, size in (volumes_ml(x.facts) if unit == "ml" else x.facts.voxels).items():
                sizes[c][x.name] = size
            if 2 * sum(x.facts.voxels.values()) > np.prod(x.facts.shape):
                text = "more object than background. See whether the label is inverted."
                findings.append(Finding("warning", (x.name,), text))
    for c, named in sizes.items():
        usual = float(np.median(list(named.values())))
        for name, size in named.items():
            if not usual / DIFFERENT <= size <= usual * DIFFERENT:
                text = f"class {c} has {size:.3g} {unit}, where {usual:.3g} {unit} are usual. "
                text += "See its label and its spacing."
                findings.append(Finding("warning", (name,), text))
    return findings


def _parts_of_classes(inspections: Sequence[Inspection]) -> list[Finding]:
    """A note for each case where a class has specks, and one for all where it has several parts without them."""
    findings = []
    several: dict[int, list[Inspection]] = defaultdict(list)
    for x in inspections:
        for c, (first, *others) in x.parts.items():
            if any(n < SPECK * (first + sum(others)) for n in others):
                text = f"{_parts_text(x, c)}. See whether the specks belong to it."
                findings.append(Finding("note", (x.name,), text))
            elif others:
                several[c].append(x)
    for c, having in sorted(several.items()):
        text = _parts_text(having[0], c) + (f" in {having[0].name}" if len(having) > 1 else "")
        names = tuple(x.name for x in having)
        findings.append(Finding("note", names, f"{text}. Fine if the object has several parts."))
    return findings


def _parts_text(x: Inspection, c: int) -> str:
    first, *others = x.parts[c]
    return f"class {c} lies in {len(others) + 1} parts of {first}, {', '.join(map(str, others[:4]))} voxels"
