"""Segments one scan of any size and spacing, with one or several trained methods."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dataloaders.cases import Case, refuse_channels
from dataloaders.channels import read_channels, z_score_channels
from dataloaders.dicom import read_series
from dataloaders.geometry import DEFAULT_GEOMETRY
from dataloaders.images import Geometry, anti_alias, ending_of, grid_of_spacing, moved, resample
from dataloaders.normalization import Normalization, normalized, raw_of
from dataloaders.orientation import turn_to
from evaluation.sliding_window import mean_of_flips, sliding_window, windows
from methods import Method
from tools.given_scans import Scan
from utils.channels import each_channel
from utils.errors import warn
from utils.masks import label_map, largest_components
from utils.resample import downsample_image, upsample_probability

FEW = 16  # values of a label map; a scan has more
SLAB = 64  # voxels along x that are brought back to the scan's grid at a time


@dataclasses.dataclass
class Model:
    """One or several trained methods, and what they were trained on."""

    methods: list[Method]
    outputs: list[str]
    """The output that is used of each method."""
    downsample: int
    normalize: Normalization
    """How training normalised each volume."""
    patch_size: tuple[int, ...]
    spacing: tuple[float, ...] | None
    """mm along x, y, z, or None for the scan's own."""
    orientation: str | None
    """Where the axes of the training cases point, or None if their files do not say: axes are taken as stored."""
    classes: int
    flips: int
    channels: list[str]
    """Names of the K channels of a scan."""
    names: dict[int, str] = dataclasses.field(default_factory=dict)
    """Class -> its name, of the classes that the training set names."""

    def predict(self, patches: Tensor) -> Tensor:
        """(N,K,w,h,d) -> mean probability (N,C,w,h,d) over the methods and the flips."""

        def mean_of_methods(turned: Tensor) -> Tensor:
            pairs = zip(self.methods, self.outputs, strict=True)
            probabilities = [method.predict(turned, (output,)).float() for method, output in pairs]
            return torch.stack(probabilities).mean(0) if len(probabilities) > 1 else probabilities[0]

        return mean_of_flips(mean_of_methods, patches, self.flips)


def onto_scan(
    p: NDArray[np.float32], grid: Geometry, shape: tuple[int, ...], geometry: Geometry
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Probabilities (C,w,h,d) on one grid -> first x and (C,n,H,D) of slab after slab of the scan's own grid."""
    if grid is not geometry:
        factors = np.array(geometry["spacing"]) / grid["spacing"]
        p = np.stack([anti_alias(values, factors) for values in p]) if (factors > 1).any() else p
    for start in range(0, shape[0], SLAB):
        stop = min(start + SLAB, shape[0])
        if grid is geometry:
            yield start, p[:, start:stop]
            continue
        part = (stop - start, *shape[1:]), moved(geometry, (start, 0, 0))
        yield start, np.stack([resample(values, grid, *part, smooth=False) for values in p])


def predict_scan(
    model: Model,
    scan: Scan,
    device: torch.device,
    window: dict[str, Any],
    *,
    interpolation: str,
    largest_component: bool,
    probabilities: str,
) -> dict[str, Any]:
    """Segments a scan.

    Args:
        window: patch_size, stride, weighting and batch_size of the sliding window.
        interpolation: of the intensities, a key of INTERPOLATORS.
        largest_component: whether only the largest component of each class is kept.
        probabilities: the type in which they are returned too, or 'none'.

    Returns:
        `label` (W,H,D) uint8; `probability`, a volume (W,H,D) for each class, or None; `geometry` of the file.

    Raises:
        CaseError: a scan that cannot be read, has other channels than the model takes, or is constant, also within
            the window.
        FloatingPointError: predictions that are not finite.
    """
    path = scan.files[0]
    source, stated = read_series(scan.slices) if scan.slices else read_channels(scan.files)
    refuse_channels(source.shape, len(model.channels), model.channels)
    warn_of_unknown(path, stated, model)
    warn_of_label(path, source)
    turn = turn_to(model.orientation, stated.get("direction"))
    source = turn(source)
    shape = source.shape[-3:]
    is_case = ending_of(path) == ".h5"
    image, raw = (source, raw_of(Case(scan.name, path, labeled=False))) if is_case else z_score_channels(source)
    del source
    # The origin is left out: its rounding depends on how the scan is stored. The header brings the result to its place.
    spacing = turn.geometry(stated, shape).get("spacing")
    geometry = {**DEFAULT_GEOMETRY, "spacing": spacing or DEFAULT_GEOMETRY["spacing"]}
    size, grid = grid_of_spacing(shape, geometry, model.spacing if spacing else None)
    if grid is not geometry:
        image = each_channel(lambda x: resample(x, geometry, size, grid, interpolation), image)
    image = normalized(image, model.normalize, raw)
    coarse = [-(-side // model.downsample) for side in size]
    count = len(windows(coarse, window["patch_size"], window["stride"]))
    with tqdm(total=count, desc=scan.name, unit="window", disable=None) as bar:

        def predict(patches: Tensor) -> Tensor:
            p = model.predict(patches)
            bar.update(len(patches))
            return p

        pooled = downsample_image(torch.from_numpy(image).to(device), model.downsample)
        p = upsample_probability(sliding_window(predict, pooled, **window), model.downsample, size).numpy()
    del image, pooled
    label = np.empty(shape, np.uint8)
    kept = None if probabilities == "none" else np.empty((len(p), *shape), probabilities)
    for start, slab in onto_scan(p, grid, shape, geometry):
        here = slice(start, start + slab.shape[1])
        label[here] = label_map(torch.from_numpy(slab)).numpy()
        if kept is not None:
            kept[:, here] = slab if kept.dtype == np.float32 else np.rint(255 * slab)
    if largest_component:
        label = largest_components(label, model.classes)
    back = turn.back
    return {"label": back(label), "probability": None if kept is None else [back(p) for p in kept], "geometry": stated}


def warn_of_label(path: Path, image: NDArray[np.float32]) -> None:
    """Warns on stderr of an image with so few values that it may be a label map."""
    if len(np.unique(image.ravel()[::97])) > FEW:  # enough of a scan, and a hundredth of the time
        return
    values = [f"{value:g}" for value in np.unique(image)]
    if len(values) <= FEW:
        warn(f"{path} has only the values {', '.join(values)}. Is it a label map?")


def warn_of_unknown(path: Path, stated: Geometry, model: Model) -> None:
    """Warns on stderr of an orientation or a spacing that the scan's file does not state."""
    if model.orientation and "direction" not in stated:
        text = "does not state where its axes point; they are taken as they are stored, as if they were"
        warn(f"{path} {text} {model.orientation}.")
    if "spacing" not in stated:
        text = "does not state the size of its voxels: it is not resampled, and has no volume in ml"
        warn(f"{path} {text}.")
