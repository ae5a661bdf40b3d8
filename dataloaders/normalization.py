"""--normalize: the intensities of a volume, brought to one scale by its own statistics.

Not of any paper: LA's published volumes were normalised over the whole scan and cropped afterwards, so that the
standard deviation of the crops ranges from 0.31 to 1.66, and a network meets each at another scale.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NORMALIZATIONS = ("none", "scan")
CLIPPED = (0.5, 99.5)
"""Percentiles of a volume's intensities that 'scan' clips to."""


class Scaling(NamedTuple):
    """image -> (clip(image, low, high) - mean) / sd, all four those of one volume."""

    low: float
    high: float
    mean: float
    sd: float

    def __call__(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """A volume, or a part of it, of any shape; float32."""
        scaled = np.clip(image, np.float32(self.low), np.float32(self.high))
        scaled -= np.float32(self.mean)
        scaled /= np.float32(self.sd)
        return scaled


def scaling_of(image: NDArray[np.float32], kind: str) -> Scaling | None:
    """What `kind` does to a volume (W,H,D), in voxels of its own grid, before any pooling; None changes nothing.

    none    nothing
    scan    clipped to its 0.5 and 99.5 percentiles, then zero mean and unit variance over all its voxels

    'scan' gives the same for image and a*image + b with a > 0, up to rounding. A volume of which all but the clipped
    voxels are equal is not clipped.
    """
    if kind == "none":
        return None
    low, high = map(float, np.percentile(image, CLIPPED))
    if low >= high:
        low, high = float(image.min()), float(image.max())
    clipped = np.clip(image, np.float32(low), np.float32(high))
    mean = clipped.mean(dtype=np.float64)
    sd = float(np.sqrt(np.square(clipped - mean).mean(dtype=np.float64)))
    return Scaling(low, high, float(mean), sd or 1.0)  # resampling can make a scan constant


def normalized(image: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    """A whole volume (W,H,D) scaled as `kind` says."""
    scaling = scaling_of(image, kind)
    return image if scaling is None else scaling(image)
