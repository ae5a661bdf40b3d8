"""Labeled cases that a training has not seen."""

from collections.abc import Collection, Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.cases import Case, CaseError, check_all, find_cases, read_case
from dataloaders.fingerprints import DIGITS, alike, fingerprint
from dataloaders.geometry import known_spacing, read_geometry
from dataloaders.lists import lists_of
from dataloaders.normalization import OF_RAW, Normalization, scalings_of_case
from dataloaders.orientation import known_orientation
from utils.run_folder import digest

OTHER_SPACING = 0.1  # relative difference of the median spacing from that of the training


def open_cases(
    folder: Path,
    names: Sequence[str],
    classes: int,
    seen: Mapping[str, str],
    images: Mapping[str, str],
    channels: int,
    normalize: Normalization,
) -> tuple[list[Case], list[tuple[int, ...]]]:
    """Reads all cases once, so that errors are raised before any prediction. `seen` and `images` are the checksums and
    the fingerprints of the scans used in training, by their names; early checkpoints have no fingerprints.

    Returns:
        The cases and their shapes.

    Raises:
        UserError: naming all unusable cases and all that were used in training.
    """
    marks = {**{checksum: name for name, checksum in seen.items()}, **{x[:DIGITS]: name for name, x in images.items()}}
    cases, problems = find_cases(folder, names, labeled=True, classes=classes, channels=channels)
    shapes: list[tuple[int, ...]] = []

    def check(case: Case) -> None:
        image, label = read_case(case)
        assert label is not None
        read_geometry(case)
        if normalize.kind in OF_RAW:
            scalings_of_case(case, image, normalize)  # raises what would be raised later
        mark = fingerprint(image)
        matches = [name for name, same in zip(images, alike(mark, list(images.values())), strict=True) if same]
        matches += [marks[x] for x in (mark[:DIGITS], digest(image, label)) if x in marks]
        if matches:
            raise CaseError(f"is a scan of the training, there called {matches[0]}")
        shapes.append(label.shape)

    check_all(cases, check, problems)
    return cases, shapes


def is_other_set(folder: Path, seen: Collection[str], images: Mapping[str, str]) -> bool:
    """Whether a data set's train.list names none of the scans used in training, `seen`, or has another scan by the
    name of one. `images` are their fingerprints, as for `open_cases`. A file that cannot be read tells nothing.
    """
    shared = [name for name in lists_of(folder)[0] if name in seen]
    for case in find_cases(folder, [name for name in shared if name in images], labeled=False)[0]:
        with suppress(CaseError):
            return not alike(fingerprint(read_case(case)[0]), [images[case.name]])[0]
    return not shared


def axes_text(codes: Set[str]) -> str:
    """Orientations, '' for one that is not stated -> the end of a sentence about axes."""
    known = ", ".join(sorted(filter(None, codes)))
    texts = [f"point to {known}"] * bool(known) + ["are not stated"] * ("" in codes)
    return " or ".join(texts)


def other_grid(cases: Sequence[Case], trained: Mapping[str, Any]) -> str:
    """A warning that continues a sentence, if the axes or the voxels of cases are not as in the training, whose
    checkpoint states `orientation` and `spacing`, or if only one of the two states its axes; '' otherwise.
    """
    orientation, spacing = trained.get("orientation"), trained.get("spacing")
    codes = {known_orientation(case) or "" for case in cases}
    spacings = [mm for mm in map(known_spacing, cases) if mm]
    differ = []
    if codes - {orientation or ""}:
        there = axes_text({orientation or ""})
        differ.append(f"axes that {axes_text(codes)}, while those of the training {there}")
    if spacing and spacings:
        middle = np.median(spacings, axis=0)
        if np.abs(middle / spacing - 1).max() > OTHER_SPACING:
            here, there = (" x ".join(f"{mm:.3g}" for mm in sizes) for sizes in (middle, spacing))
            differ.append(f"voxels of {here} mm, the training of {there} mm")
    advice = "A network sees voxels as they are stored: convert the scans as those of the training."
    return f"has {'; and '.join(differ)}. {advice}" if differ else ""
