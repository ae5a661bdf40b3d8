"""Masks and label maps: from probabilities to labels, bounding boxes and borders."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def label_map(p: Tensor) -> Tensor:
    """Foreground probabilities (C,W,H,D) in [0,1] -> uint8 (W,H,D), the class 0..C of each voxel.

    A voxel has one class alone, so what the classes leave of 1 is the background's. The largest counts, with one class
    where p > 0.5.
    """
    if len(p) == 1:
        return (p[0] > 0.5).to(torch.uint8)
    return torch.cat([1 - p.sum(dim=0, keepdim=True), p]).argmax(dim=0).to(torch.uint8)


def box_of(mask: NDArray[np.bool_], margin: int = 0) -> tuple[slice, ...]:
    """The bounding box of a mask that is not empty, enlarged by a margin as far as the volume reaches."""
    others = [tuple(other for other in range(mask.ndim) if other != axis) for axis in range(mask.ndim)]
    places = [np.flatnonzero(mask.any(axis=axes)) for axes in others]
    return tuple(slice(max(place[0] - margin, 0), place[-1] + 1 + margin) for place in places)


def inner_border(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The voxels of a mask with a face neighbour outside of it. Everything beyond the array is outside."""
    inside = mask.copy()
    for axis in range(mask.ndim):
        one, other = np.moveaxis(inside, axis, 0), np.moveaxis(mask, axis, 0)
        one[1:] &= other[:-1]
        one[:-1] &= other[1:]
        one[[0, -1]] = False
    return mask & ~inside
