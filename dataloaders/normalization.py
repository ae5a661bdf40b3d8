"""--normalize: scaling of the intensities of an image, each channel by its own statistics or by a fixed window.

The same code scales the cases of a training, of a test and of a prediction. Every kind is a clip and an affine map, so
that a crop can be scaled as its whole volume is.

A case made by tools.convert holds each channel with zero mean and unit variance, and states mean and standard deviation
of the scan in its attributes `mean` and `sd`. With them 'window' and 'foreground' see the scan's own intensities. A
case that states none holds its own intensities.

LA's published volumes were normalised over the whole scan and then cropped. The standard deviations of the cropped
volumes therefore range from 0.31 to 1.66.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from dataloaders.cases import Case, CaseError
from utils.channels import with_channels

NORMALIZATIONS = ("none", "scan", "foreground", "window")
OF_RAW = ("foreground", "window")
"""Kinds that depend on the scan's own intensities."""
CLIPPED = (0.5, 99.5)
"""Percentiles of a volume's intensities that 'scan' clips to."""
ROUNDING = 1e-4  # of a standard deviation: the error with which an intensity of 0 is recovered
LEAST_SD = 0.01  # of the intensities in a window, in widths; 400 HU of an abdomen have 0.3
Raw = Sequence[tuple[float, float]]
"""Mean and standard deviation of each channel: stored value * sd + mean is the scan's own intensity."""


class Normalization(NamedTuple):
    """--normalize, and --window LEVEL WIDTH in the scan's own intensities, such as HU: for all channels or for each."""

    kind: str = "none"
    window: tuple[float, ...] | None = None

    @property
    def suffix(self) -> str:
        """Part of the name of a cache's folder, '' for 'none'."""
        window = "_".join(np.format_float_positional(value, trim="-") for value in self.window or ())
        return "" if self.kind == "none" else f"-{self.kind}{'-' * bool(window)}{window}"

    def of_channels(self, count: int) -> list["Normalization"]:
        """That of each of so many channels, with one window each.

        Raises:
            CaseError: for windows of another number of channels.
        """
        window = self.window
        if window is None or len(window) == 2:
            return [self] * count
        if len(window) != 2 * count:
            raise CaseError(
                f"has {count} channel{'s' * (count > 1)}, and --window names {len(window) // 2} windows. Give one LEVEL"
                " WIDTH for all channels, or one for each"
            )
        return [self._replace(window=window[i : i + 2]) for i in range(0, len(window), 2)]


NONE = Normalization()


def normalization_of(options: Mapping[str, Any]) -> Normalization:
    """The normalisation of a training, from its options; early checkpoints state none."""
    window = options.get("window")
    return Normalization(options.get("normalize", "none"), tuple(window) if window else None)


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


def raw_of(case: Case) -> Raw | None:
    """Mean and standard deviation of each channel's intensities before tools.convert; None if the file states none.

    Raises:
        CaseError: for attributes that are not as many finite numbers as there are channels, or an sd not above 0.
    """
    try:
        with h5py.File(case.path, "r") as f:
            shape = f["image"].shape
            if not {"mean", "sd"} <= set(f.attrs):
                return None
            means, sds = (np.ravel(f.attrs[name]) for name in ("mean", "sd"))
    except Exception as e:  # as in read_case
        raise CaseError(f"has attributes that cannot be read ({e})") from e
    count = shape[0] if len(shape) == 4 else 1
    for values in (means, sds):
        if values.dtype.kind not in "fiu" or len(values) != count or not np.isfinite(values).all() or sds.min() <= 0:
            raise CaseError(f"has the attributes mean {means.tolist()} and sd {sds.tolist()}, which are no scaling")
    return [(float(mean), float(sd)) for mean, sd in zip(means, sds, strict=True)]


def scaling_of(image: NDArray[np.float32], how: Normalization, raw: tuple[float, float] | None = None) -> Scaling:
    """The scaling of a channel (W,H,D) by a kind other than 'none', from all its voxels before pooling.

    scan        clip to the 0.5 and 99.5 percentiles, then zero mean and unit variance
    foreground  zero mean and unit variance over the voxels whose own intensity is not 0; the others are scaled alike
    window      clip to LEVEL - WIDTH/2 and LEVEL + WIDTH/2, then scale these to 0 and 1

    'scan' gives the same result for image and a*image + b with a > 0, up to rounding. If the two percentiles are equal,
    the volume is not clipped.

    Args:
        raw: its mean and sd, see `Raw`; None: the image holds its own intensities.

    Raises:
        CaseError: if almost all voxels are equal within the window.
    """
    mean_before, sd_before = raw or (0.0, 1.0)
    if how.kind == "window":
        return _window_scaling(image, how, mean_before, sd_before)
    if how.kind == "foreground":
        object_ = np.abs(image + mean_before / sd_before) > (0.0 if raw is None else ROUNDING)
        low, high = float(image.min()), float(image.max())
        values = image[object_] if object_.any() else image
    else:
        low, high = map(float, np.percentile(image, CLIPPED))
        if low >= high:
            low, high = float(image.min()), float(image.max())
        values = np.clip(image, np.float32(low), np.float32(high))
    mean = values.mean(dtype=np.float64)
    sd = float(np.sqrt(np.square(values - mean).mean(dtype=np.float64)))
    return Scaling(low, high, float(mean), sd or 1.0)  # resampling can make a scan constant


def _window_scaling(image: NDArray[np.float32], how: Normalization, mean_before: float, sd_before: float) -> Scaling:
    assert how.window is not None
    level, width = how.window
    low, high = ((edge - mean_before) / sd_before for edge in (level - width / 2, level + width / 2))
    scaling = Scaling(low, high, low, high - low)
    if scaling(image).std(dtype=np.float64) < LEAST_SD:
        darkest, brightest = (float(x) * sd_before + mean_before for x in (image.min(), image.max()))
        raise CaseError(
            f"has intensities from {darkest:g} to {brightest:g}, which are almost all alike in --window {level:g} "
            f"{width:g}. Train with a window of the scans' own intensities, or leave this scan out"
        )
    return scaling


def scalings_of(image: NDArray[np.float32], how: Normalization, raw: Raw | None = None) -> list[Scaling] | None:
    """`scaling_of` each channel of (W,H,D) or (K,W,H,D); None for kind 'none'."""
    if how.kind == "none":
        return None
    channels = with_channels(image)
    raws: Sequence[tuple[float, float] | None] = raw or [None] * len(channels)
    hows = how.of_channels(len(channels))
    return [scaling_of(channel, one, scale) for channel, one, scale in zip(channels, hows, raws, strict=True)]


def scalings_of_case(case: Case, image: NDArray[np.float32], how: Normalization) -> list[Scaling] | None:
    """`scalings_of` the image of a case, whose file may state the scan's own intensities.

    Raises:
        CaseError: as `raw_of` and `scaling_of`.
    """
    return scalings_of(image, how, raw_of(case) if how.kind in OF_RAW else None)


def scaled(image: NDArray[np.float32], scalings: Sequence[Scaling] | None) -> NDArray[np.float32]:
    """Scales each channel of a whole image or a part of it, (W,H,D) or (K,W,H,D)."""
    if scalings is None:
        return image
    channels = [scaling(channel) for scaling, channel in zip(scalings, with_channels(image), strict=True)]
    return channels[0] if image.ndim == 3 else np.stack(channels)


def normalized(image: NDArray[np.float32], how: Normalization, raw: Raw | None = None) -> NDArray[np.float32]:
    """Scales each channel of a whole image (W,H,D) or (K,W,H,D), see `scaling_of`."""
    return scaled(image, scalings_of(image, how, raw))


def normalized_case(case: Case, image: NDArray[np.float32], how: Normalization) -> NDArray[np.float32]:
    """Scales the whole image of a case, see `scalings_of_case`."""
    return scaled(image, scalings_of_case(case, image, how))
