"""Random crops, quarter turns and flips in the x-y plane, and intensity augmentation."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

AUGMENTATIONS = ("d4", "mirror", "none")
FLIPPED = ((), (0,), (0, 1), (1,))  # axes to flip for 0..3 quarter turns, after the transpose of odd turns


@dataclass(frozen=True)
class Draw:
    """The random parameters of one crop: the box to take, its quarter turns and its flip."""

    start: tuple[int, int, int]
    """First voxel of the box in the volume, which is padded to at least the size of the box."""
    size: tuple[int, int, int]
    """Size of the box in voxels before turning; after it the crop has the size of the patch."""
    turns: int
    """Quarter turns from x to y, 0 to 3."""
    flip: int | None
    """The axis to flip after turning, 0 or 1; None: no flip."""


def draw_augmentation(
    generator: np.random.Generator, shape: Sequence[int], patch_size: Sequence[int], kind: str = "d4"
) -> Draw:
    """Draws the parameters of a crop from a volume of this shape; all offsets are equally likely.

    d4      all eight turns and reflections of the square, as described in the DTML paper
    mirror  a turn, then always a flip: only the four reflections, as in the released codes
    none    no turns and flips

    Raises:
        ValueError: for another kind.
    """
    if kind not in AUGMENTATIONS:
        raise ValueError(f"augment must be one of {AUGMENTATIONS}, not {kind!r}")
    turns, axis, coin = (int(generator.integers(n)) for n in (4, 2, 2))
    if kind == "none":
        turns, flip = 0, None
    else:
        flip = axis if kind == "mirror" or coin else None
    x, y, z = patch_size
    size = (y, x, z) if turns % 2 else (x, y, z)
    start = tuple(int(generator.integers(max(side - s, 0) + 1)) for side, s in zip(shape, size, strict=True))
    return Draw(start, size, turns, flip)  # type: ignore[arg-type]


def turn_and_flip(volume: Tensor, draw: Draw) -> Tensor:
    """Box (...,w,h,d) -> patch: torch.rot90 in x-y, then a flip, with at most one copy.

    Turning the cropped box gives the same patch as turning the whole volume before cropping, and is much cheaper.
    """
    turned = volume.transpose(-3, -2) if draw.turns % 2 else volume
    axes = [axis - 3 for axis in (0, 1) if (axis in FLIPPED[draw.turns]) != (axis == draw.flip)]
    return turned.flip(axes) if axes else turned


def random_intensities(image: Tensor, generator: np.random.Generator, strength: float) -> Tensor:
    """Intensity augmentation of one channel (w,h,d) of any range: gamma, then contrast and brightness.

    With u the image scaled to [0,1] and independent random g, a, b:

        image'  =  a (low + (high - low) u^g) + b       g, a in [exp(-strength), exp(strength)], log-uniform
                                                        b in [-strength, strength], in standard deviations of a scan
    """
    gamma, contrast, shift = generator.uniform(-strength, strength, 3).tolist()
    low, high = image.aminmax()
    u = (image - low) / (high - low).clamp(min=torch.finfo(image.dtype).tiny)
    return float(np.exp(contrast)) * (low + (high - low) * u ** float(np.exp(gamma))) + shift
