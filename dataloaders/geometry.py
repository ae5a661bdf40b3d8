"""Where a case lies in mm: the geometry that its file states, and what is known of the published LA scans.

All of it is as in ITK, in the LPS frame; dataloaders/cases.py describes the attributes of a case file.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from dataloaders.cases import FILE_NAME, LA_SUBFOLDER, Case, CaseError
from dataloaders.lists import LA_SPLITS, read_list
from utils.text import read_text

LA_SPACING = (0.625, 0.625, 0.625)  # mm, of the cases in the published lists
SPACING_FILE = "spacing.txt"
SQUARE = 1e-3  # tolerance of unit lengths and right angles: one voxel in a thousand

Geometry = dict[str, tuple[float, ...]]
"""spacing (3), origin (3) and direction (9); keys that a file does not state are missing. unnamed_direction (9) is that
of a file which does not name its frame: ITK and viewers take it for LPS, and where the axes point is not known."""
DEFAULT_GEOMETRY: Geometry = {
    "spacing": (1.0, 1.0, 1.0),
    "origin": (0.0, 0.0, 0.0),
    "direction": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
}
"""Default geometry, for pictures and files that need values which the case file does not state."""
NUMBERS = {"spacing": 3, "origin": 3, "direction": 9, "unnamed_direction": 9}
"""How many numbers each part of a geometry has."""


def complete_geometry(geometry: Geometry) -> Geometry:
    """The place at which viewers show a file: an unnamed direction is in LPS, missing values are the default ones."""
    unnamed = geometry.get("unnamed_direction", DEFAULT_GEOMETRY["direction"])
    return {**DEFAULT_GEOMETRY, "direction": unnamed, **geometry}


def stated_geometry(case: Case) -> Geometry:
    """The known parts of a case's geometry, from the attributes of its file.

    If the file states no spacing, the spacing is that of the set's spacing.txt, or 0.625 mm for the names of the
    published LA lists.

    Raises:
        CaseError: if an attribute has the wrong number of values or values that are not finite, the spacing is not
            above 0, the direction is not orthonormal, or spacing.txt does not hold three lengths.
    """
    try:
        with h5py.File(case.path, "r") as f:
            attributes = {name: np.ravel(f.attrs[name]) for name in NUMBERS if name in f.attrs}
    except Exception as e:  # as in read_case
        raise CaseError(f"has attributes that cannot be read ({e})") from e
    for name, values in attributes.items():
        count = NUMBERS[name]
        if values.dtype.kind not in "fiu" or len(values) != count or not np.isfinite(values).all():
            raise CaseError(f"has the attribute {name} {values.tolist()} where {count} finite numbers must stand")
    geometry = {name: tuple(map(float, values)) for name, values in attributes.items()}
    if min(geometry.get("spacing", (1.0,))) <= 0:
        raise CaseError(f"has the spacing {list(geometry['spacing'])}, which must be above 0 mm")
    for name in {"direction", "unnamed_direction"} & geometry.keys():
        refuse_direction(geometry[name])
    spacing = geometry.get("spacing") or _declared_spacing(case) or (LA_SPACING if published(case) else None)
    return {**geometry, "spacing": spacing} if spacing else geometry


def refuse_direction(direction: Sequence[float]) -> None:
    """Checks that the columns of the 9 cosines are unit vectors at right angles.

    Raises:
        CaseError: if they are not, within a tolerance of 1e-3.
    """
    axes = np.reshape(direction, (3, 3))
    if not np.isfinite(axes).all():
        raise CaseError(f"has a direction of {axes.ravel().tolist()}, which are not 9 numbers. Fix its header")
    lengths = np.linalg.norm(axes, axis=0)
    if np.abs(lengths - 1).max() > SQUARE:
        shown = ", ".join(f"{length:g}" for length in lengths)
        raise CaseError(
            f"has a direction whose columns are no unit vectors but {shown} long, so that the size of its voxels is "
            "not certain. Fix its header"
        )
    cosines = axes.T @ axes - np.eye(3)
    i, j = np.unravel_index(np.abs(cosines).argmax(), (3, 3))
    if abs(cosines[i, j]) > SQUARE:
        angle = math.degrees(math.acos(np.clip(cosines[i, j], -1, 1)))
        raise CaseError(
            f"has axes that are not at right angles: {'xyz'[min(i, j)]} and {'xyz'[max(i, j)]} are at {angle:.4g} "
            "degrees, as with a tilted gantry. Resample it onto a grid of right angles"
        )


def _declared_spacing(case: Case) -> tuple[float, ...] | None:
    """Spacing in mm from the spacing.txt of the case's set, or None if there is none."""
    levels = len(Path(case.name).parts) - (case.path.name != FILE_NAME)
    folder = case.path.parents[levels] if levels < len(case.path.parents) else case.path.parent
    file = (folder.parent if folder.name == LA_SUBFOLDER else folder) / SPACING_FILE
    try:
        values = read_text(file).split()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise CaseError(f"belongs to a set whose {file} cannot be read ({e})") from e
    try:
        x, y, z = map(float, values)
    except ValueError:
        x = y = z = math.nan
    if not all(0 < mm < math.inf for mm in (x, y, z)):
        raise CaseError(
            f"belongs to a set whose {file} holds {' '.join(values)[:60]!r}, where the mm along x, y and z must stand"
        )
    return x, y, z


def published(case: Case) -> bool:
    """Whether the case has the name of a published LA scan, a unique string of 20 letters and digits."""
    return case.name in _la_names()


@functools.cache
def _la_names() -> frozenset[str]:
    return frozenset(name for split in ("train", "test") for name in read_list(LA_SPLITS / f"{split}.list"))


def read_geometry(case: Case) -> Geometry:
    """The complete geometry of a case, as a NIfTI file needs it: `stated_geometry`, by `complete_geometry`.

    Raises:
        CaseError: as `stated_geometry`.
    """
    return complete_geometry(stated_geometry(case))


def known_geometry(case: Case) -> Geometry:
    """`stated_geometry`; empty if the attributes cannot be read."""
    try:
        return stated_geometry(case)
    except CaseError:
        return {}


def known_spacing(case: Case) -> tuple[float, ...] | None:
    """Spacing in mm along x, y, z; None if neither the case's file nor its set states it."""
    return known_geometry(case).get("spacing")
