"""Random crop, quarter turns and flips in the x-y plane, and random intensities."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

AUGMENTATIONS = ("d4", "mirror", "none")
FLIPPED = ((), (0,), (0, 1), (1,))  # axes that so many quarter turns flip, after exchanging x and y if they are odd


@dataclass(frozen=True)
class Draw:
    """What one sample does to its volume: take the box, turn it, flip it."""

    start: tuple[int, int, int]
    """First voxel of the box in the volume, after padding to the box's size."""
    size: tuple[int, int, int]
    """The box before turning, so that the result has the patch's size."""
    turns: int
    """Quarter turns from x to y."""
    flip: int | None
    """The axis to flip after turning, 0 or 1."""


def draw_augmentation(
    generator: np.random.Generator, shape: Sequence[int], patch_size: Sequence[int], kind: str = "d4"
) -> Draw:
    """A random draw for a volume of this shape; every offset is equally likely, the last one included.

    d4      all eight turns and reflections of the square, as the text of the DTML paper reads
    mirror  a turn, then always a flip: only the four reflections, as the released codes do
    none    the crop alone
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
    """(w,h,d) box -> patch: torch.rot90, then a flip, in one copy at most. Cropping first equals turning the whole
    volume first, at a fraction of the cost."""
    turned = volume.transpose(0, 1) if draw.turns % 2 else volume
    axes = [axis for axis in (0, 1) if (axis in FLIPPED[draw.turns]) != (axis == draw.flip)]
    return turned.flip(axes) if axes else turned


def random_intensities(image: Tensor, generator: np.random.Generator, strength: float) -> Tensor:
    """A crop as another scanner might show it: gamma, then contrast and brightness.

    image (w,h,d) of any range; with u the image stretched to [0,1] and g, a, b drawn on their own:

        image'  =  a (low + (high - low) u^g) + b       g, a in [exp(-strength), exp(strength)], log-uniform
                                                        b in [-strength, strength], in standard deviations of a scan
    """
    gamma, contrast, shift = generator.uniform(-strength, strength, 3).tolist()
    low, high = image.aminmax()
    u = (image - low) / (high - low).clamp(min=torch.finfo(image.dtype).tiny)
    return float(np.exp(contrast)) * (low + (high - low) * u ** float(np.exp(gamma))) + shift
