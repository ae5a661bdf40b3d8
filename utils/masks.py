"""Masks and label maps: from probabilities to labels, bounding boxes and components."""

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.measure import label as components
from torch import Tensor


def label_map(p: Tensor) -> Tensor:
    """Foreground probabilities (C,W,H,D) in [0,1] -> uint8 (W,H,D), the class 0..C of each voxel.

    A voxel has one class alone, so what the classes leave of 1 is the background's. The largest counts, with one class
    where p > 0.5.
    """
    if len(p) == 1:
        return (p[0] > 0.5).to(torch.uint8)
    p = torch.cat([1 - p.sum(dim=0, keepdim=True), p])
    return p.max(dim=0).indices.to(torch.uint8)  # argmax takes ten times as long on a CPU


def label_maps(p: Tensor) -> Tensor:
    """Foreground probabilities (N,C,W,H,D) in [0,1] -> uint8 (N,W,H,D), the label map of each item."""
    return torch.stack([label_map(x) for x in p])


def box_of(mask: NDArray[np.bool_], margin: int = 0) -> tuple[slice, ...]:
    """The bounding box of a mask that is not empty, enlarged by a margin as far as the volume reaches."""
    others = [tuple(other for other in range(mask.ndim) if other != axis) for axis in range(mask.ndim)]
    places = [np.flatnonzero(mask.any(axis=axes)) for axes in others]
    return tuple(slice(max(place[0] - margin, 0), place[-1] + 1 + margin) for place in places)


def largest_component(mask: NDArray) -> NDArray[np.bool_]:
    """The largest 26-connected component of a mask (W,H,D); the first of equal ones; empty for an empty mask."""
    mask = np.asarray(mask) > 0
    kept = np.zeros_like(mask)
    if mask.any():
        box = box_of(mask)
        numbers = components(mask[box])
        kept[box] = numbers == np.bincount(numbers.ravel())[1:].argmax() + 1
    return kept


def largest_components(prediction: NDArray, classes: int) -> NDArray[np.uint8]:
    """Label map (W,H,D) of 0..classes -> the same with only the largest component of each class."""
    kept = np.zeros(prediction.shape, np.uint8)
    for c in range(1, classes + 1):
        kept[largest_component(prediction == c)] = c
    return kept
