"""Where the voxels of a mask are."""

import numpy as np
from numpy.typing import NDArray


def box_of(mask: NDArray[np.bool_], margin: int = 0) -> tuple[slice, ...]:
    """The smallest box that holds all of a mask that is not empty, and so many voxels around it, if they are there."""
    others = [tuple(other for other in range(mask.ndim) if other != axis) for axis in range(mask.ndim)]
    places = [np.flatnonzero(mask.any(axis=axes)) for axes in others]
    return tuple(slice(max(place[0] - margin, 0), place[-1] + 1 + margin) for place in places)


def inner_border(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The voxels of a mask that have a face neighbour outside of it; beyond the array all is outside."""
    inside = mask.copy()
    for axis in range(mask.ndim):
        one, other = np.moveaxis(inside, axis, 0), np.moveaxis(mask, axis, 0)
        one[1:] &= other[:-1]
        one[:-1] &= other[1:]
        one[[0, -1]] = False
    return mask & ~inside
