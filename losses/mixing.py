"""Mixing of crops: a random box, and one crop pasted into another inside of it.

All random numbers are torch's, so they are a function of (seed, iteration).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def random_box(sides: Sequence[int], share: float | Sequence[float]) -> Tensor:
    """Draws a box inside a crop; every place has the same probability, the first and the last too.

    For a box of each item, stack several: (N,W,H,D).

    Args:
        sides: W, H, D of the crop in voxels.
        share: sides of the box as shares of those of the crop, in [0,1], rounded down to voxels, but not to none; one
            for all axes, or one for each. 0: no box.

    Returns:
        Mask (W,H,D) of bool on the CPU, True inside the box.

    Raises:
        ValueError: for a share outside of [0,1], or not as many shares as axes.
    """
    shares = [share] * len(sides) if isinstance(share, (int, float)) else list(share)
    if not all(0 <= s <= 1 for s in shares):
        raise ValueError(f"the shares of a box must be in [0,1], not {shares}")
    mask = torch.ones(*sides, dtype=torch.bool)
    for axis, (side, s) in enumerate(zip(sides, shares, strict=True)):
        length = max(math.floor(s * side), 1) if s else 0
        start = int(torch.randint(side - length + 1, ()))
        along = torch.arange(side)
        inside = (along >= start) & (along < start + length)
        mask &= inside.view([-1 if a == axis else 1 for a in range(len(sides))])
    return mask


def paste(outside: Tensor, inside: Tensor, box: Tensor) -> Tensor:
    """One crop inside the box, the other around it.

    Args:
        outside, inside: images (N,C,W,H,D) or labels (N,W,H,D), both of the same shape and type.
        box: mask of bool on their device, (W,H,D) for all items or (N,W,H,D).

    Returns:
        The mix, of the shape of both.
    """
    return torch.where(box[:, None] if box.dim() == 4 and outside.dim() == 5 else box, inside, outside)


def paste_next(x: Tensor, boxes: Tensor) -> Tensor:
    """CutMix: inside its box (N,W,H,D) each image or label of x has the next one of the batch."""
    return paste(x, x.roll(1, dims=0), boxes)
