"""The orientation of a scan's axes, and turning scans to another orientation and back without interpolation.

An orientation is three letters, one for each axis of the array, for the direction of increasing indices: R or L is the
patient's right or left, A or P front or back, S or I head or feet. RAS is nibabel's closest canonical orientation; LPS
is ITK's identity direction. An oblique axis has the letter of the nearest direction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt2axcodes, ornt_transform
from numpy.typing import NDArray

from dataloaders.cases import Case
from dataloaders.geometry import DEFAULT_GEOMETRY, Geometry, known_geometry, stated_geometry

RAS = "RAS"
"""The orientation to which scans are turned; any other would do, if it is the same for all."""
TO_RAS = np.diag([-1.0, -1.0, 1.0])  # ITK's frame is LPS
# A tiny rotation, so that an axis midway between two directions gets the same letter however the scan is stored.
OFF_MIDWAY = np.eye(3) + 1e-4 * np.array([[0.0, -1.0, 1.7], [1.0, 0.0, -2.3], [-1.7, 2.3, 0.0]])


def orientation_of(direction: Sequence[float]) -> str:
    """ITK's 9 cosines, row by row -> the three letters of the orientation."""
    return "".join(ornt2axcodes(_axes(direction)))


def _axes(direction: Sequence[float]) -> NDArray:
    affine = np.eye(4)
    affine[:3, :3] = OFF_MIDWAY @ TO_RAS @ np.reshape(direction, (3, 3))
    return io_orientation(affine)


@dataclass(frozen=True)
class Turn:
    """Permutes and mirrors axes: axis i of the result is axis order[i] of the array, reversed if steps[i] is -1."""

    order: tuple[int, ...] = (0, 1, 2)
    steps: tuple[int, ...] = (1, 1, 1)

    @property
    def back(self) -> "Turn":
        """The inverse."""
        order = tuple(self.order.index(i) for i in range(3))
        return Turn(order, tuple(self.steps[i] for i in order))

    def __call__(self, array: NDArray[Any]) -> NDArray[Any]:
        """Array (...,W,H,D) -> the turned array, contiguous; the same object if nothing changes."""
        if self == Turn():
            return array
        before = array.ndim - 3
        turned = array.transpose(*range(before), *(before + axis for axis in self.order))
        steps: Any = (..., *(slice(None, None, step) for step in self.steps))
        return np.ascontiguousarray(turned[steps])

    def geometry(self, geometry: Geometry, shape: Sequence[int]) -> Geometry:
        """Geometry of the turned array, from the geometry and shape before; missing values stay missing."""
        turned = dict(geometry)
        if "spacing" in geometry:
            turned["spacing"] = tuple(geometry["spacing"][axis] for axis in self.order)
        if "direction" in geometry:
            axes = np.reshape(geometry["direction"], (3, 3))
            turned["direction"] = tuple(map(float, (axes[:, self.order] * self.steps).ravel() + 0.0))  # no -0.0
            if "origin" in geometry:
                first = [shape[axis] - 1 if step < 0 else 0 for axis, step in zip(self.order, self.steps, strict=True)]
                spacing = turned.get("spacing", DEFAULT_GEOMETRY["spacing"])
                shift = axes[:, self.order] @ (np.array(spacing) * first)
                turned["origin"] = tuple(map(float, geometry["origin"] + shift))
        return turned


def turn_to(orientation: str | None, direction: Sequence[float] | None) -> Turn:
    """The turn from a direction (9 cosines) to an orientation; the identity if one of them is None."""
    if orientation is None or direction is None:
        return Turn()
    change = ornt_transform(_axes(direction), axcodes2ornt(orientation))  # for each axis its new position and its step
    order = np.argsort(change[:, 0])
    return Turn(tuple(map(int, order)), tuple(int(step) for step in change[order, 1]))


def known_orientation(case: Case) -> str | None:
    """The orientation of a case, or None if its file does not state it."""
    direction = known_geometry(case).get("direction")
    return None if direction is None else orientation_of(direction)


def viewing_turn(case: Case) -> tuple[Turn, str | None]:
    """The turn of a case to slices as radiologists look at them, and its orientation after it.

    With x to the right and y down, axial slices have the patient's right on the left and the front at the top, coronal
    ones the right on the left and the head at the top, sagittal ones the front on the left and the head at the top. The
    slices and their numbers stay the same. A case that does not state its direction is not turned.
    """
    orientation = known_orientation(case)
    if orientation is None:
        return Turn(), None
    ends = [next(end for end in ("RL", "AP", "SI") if letter in end)[1] for letter in orientation[:2]]
    seen = "".join(sorted(ends, key="LPI".index)) + orientation[2]
    return turn_to(seen, stated_geometry(case)["direction"]), seen
