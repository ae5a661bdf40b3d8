"""Mixing of crops: a random box, and one crop pasted into another inside of it.

Random numbers are torch's, a function of (seed, iteration), unless the caller brings its own.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def torch_integer(n: int) -> int:
    """An integer from 0 to n - 1 of torch's generator."""
    return int(torch.randint(n, ()))


def random_box(sides: Sequence[int], share: float, integer: Callable[[int], int] = torch_integer) -> Tensor:
    """Draws a box inside a crop; every place has the same probability, the first and the last too.

    For a box of each item, stack several: (N,W,H,D).

    Args:
        sides: W, H, D of the crop in voxels.
        share: of each side of the crop, in [0,1], rounded down to voxels, but not to none. 0: no box.
        integer: n -> an integer from 0 to n - 1, all alike.

    Returns:
        Mask (W,H,D) of bool on the CPU, True inside the box.
    """
    mask = torch.ones(*sides, dtype=torch.bool)
    for axis, side in enumerate(sides):
        length = max(math.floor(share * side), 1) if share else 0
        start = integer(side - length + 1)
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
