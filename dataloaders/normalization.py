"""--normalize: scaling of the intensities of a volume by its own statistics.

No paper does this. LA's published volumes were normalised over the whole scan and then cropped. The standard deviations
of the cropped volumes therefore range from 0.31 to 1.66.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from utils.channels import with_channels

NORMALIZATIONS = ("none", "scan")
CLIPPED = (0.5, 99.5)
"""Percentiles of a volume's intensities that 'scan' clips to."""


class Scaling(NamedTuple):
    """image -> (clip(image, low, high) - mean) / sd, with the four values of one volume."""

    low: float
    high: float
    mean: float
    sd: float

    def __call__(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scales the volume or a part of it, any shape, to float32."""
        scaled = np.clip(image, np.float32(self.low), np.float32(self.high))
        scaled -= np.float32(self.mean)
        scaled /= np.float32(self.sd)
        return scaled


def scaling_of(image: NDArray[np.float32], kind: str) -> Scaling | None:
    """The scaling of a volume (W,H,D), from all its voxels before pooling; None for kind 'none'.

    none    no scaling
    scan    clip to the 0.5 and 99.5 percentiles, then zero mean and unit variance

    'scan' gives the same result for image and a*image + b with a > 0, up to rounding. If the two percentiles are equal,
    the volume is not clipped.
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


def scalings_of(image: NDArray[np.float32], kind: str) -> list[Scaling] | None:
    """`scaling_of` each channel of (W,H,D) or (K,W,H,D); None for kind 'none'."""
    scalings = [scaling for channel in with_channels(image) if (scaling := scaling_of(channel, kind)) is not None]
    return scalings or None


def scaled(image: NDArray[np.float32], scalings: Sequence[Scaling] | None) -> NDArray[np.float32]:
    """Scales each channel of a whole image or a part of it, (W,H,D) or (K,W,H,D)."""
    if scalings is None:
        return image
    channels = [scaling(channel) for scaling, channel in zip(scalings, with_channels(image), strict=True)]
    return channels[0] if image.ndim == 3 else np.stack(channels)


def normalized(image: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    """Scales each channel of a whole image (W,H,D) or (K,W,H,D), see `scaling_of`."""
    return scaled(image, scalings_of(image, kind))
