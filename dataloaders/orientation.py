"""Which way the axes of a scan point, and turning scans to one orientation and back: no voxel changes its value.

An orientation is three letters, one for each axis of the array, that tell where its indices grow to: R or L is the
patient's right or left, A or P front or back, S or I head or feet. RAS is what nibabel calls closest canonical; LPS is
ITK's direction of ones. An oblique axis is called by the nearest of these.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt2axcodes, ornt_transform
from numpy.typing import NDArray

from dataloaders.cases import Case, CaseError, Geometry, told_geometry

RAS = "RAS"
"""What scans are brought to; another orientation does as well, so long as it is one."""
TO_RAS = np.diag([-1.0, -1.0, 1.0])  # ITK's frame is LPS
# An axis midway between two is called by the same of them however the scan is stored, if nothing lies exactly midway.
OFF_MIDWAY = np.eye(3) + 1e-4 * np.array([[0.0, -1.0, 1.7], [1.0, 0.0, -2.3], [-1.7, 2.3, 0.0]])


def orientation_of(direction: Sequence[float]) -> str:
    """9 cosines of ITK, row by row -> the orientation's three letters."""
    return "".join(ornt2axcodes(_axes(direction)))


def _axes(direction: Sequence[float]) -> NDArray:
    affine = np.eye(4)
    affine[:3, :3] = OFF_MIDWAY @ TO_RAS @ np.reshape(direction, (3, 3))
    return io_orientation(affine)


@dataclass(frozen=True)
class Turn:
    """Permutes and mirrors the axes of an array: axis i of the result is axis order[i], backwards if steps[i] is -1."""

    order: tuple[int, ...] = (0, 1, 2)
    steps: tuple[int, ...] = (1, 1, 1)

    @property
    def back(self) -> "Turn":
        """The one that undoes it."""
        order = tuple(self.order.index(i) for i in range(3))
        return Turn(order, tuple(self.steps[i] for i in order))

    def __call__(self, array: NDArray[Any]) -> NDArray[Any]:
        """(W,H,D) -> the turned array, contiguous; the array itself if nothing is to be done."""
        if self == Turn():
            return array
        return np.ascontiguousarray(array.transpose(self.order)[tuple(slice(None, None, s) for s in self.steps)])

    def geometry(self, geometry: Geometry, shape: Sequence[int]) -> Geometry:
        """The geometry of the turned array, of one of `shape` before; what is not told stays so."""
        turned = dict(geometry)
        if "spacing" in geometry:
            turned["spacing"] = tuple(geometry["spacing"][axis] for axis in self.order)
        if "direction" in geometry:
            axes = np.reshape(geometry["direction"], (3, 3))
            turned["direction"] = tuple(map(float, (axes[:, self.order] * self.steps).ravel() + 0.0))  # no -0.0
            if "origin" in geometry and "spacing" in geometry:
                first = [shape[axis] - 1 if step < 0 else 0 for axis, step in zip(self.order, self.steps, strict=True)]
                shift = axes[:, self.order] @ (np.array(turned["spacing"]) * first)
                turned["origin"] = tuple(map(float, geometry["origin"] + shift))
        return turned


def turn_to(orientation: str | None, direction: Sequence[float] | None) -> Turn:
    """From 9 cosines to an orientation; nothing is turned where one of both is not known."""
    if orientation is None or direction is None:
        return Turn()
    change = ornt_transform(_axes(direction), axcodes2ornt(orientation))  # of each axis: its new place, and step
    order = np.argsort(change[:, 0])
    return Turn(tuple(map(int, order)), tuple(int(step) for step in change[order, 1]))


def known_orientation(case: Case) -> str | None:
    """The orientation that a case's file states, else None."""
    try:
        direction = told_geometry(case).get("direction")
    except CaseError:
        return None
    return None if direction is None else orientation_of(direction)


def common_orientation(cases: Sequence[Case]) -> str | None:
    """That of all cases; None if one of them does not state it, or they differ."""
    found = Counter(map(known_orientation, cases))
    return next(iter(found)) if len(found) == 1 else None
