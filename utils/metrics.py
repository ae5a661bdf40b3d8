"""Dice, Jaccard, ASD and 95HD as medpy defines them, with an honest answer for empty masks."""

from collections.abc import Sequence

import numpy as np
from medpy.metric import binary
from numpy.typing import NDArray
from skimage.measure import label as components

# The papers' column order: many logs print 95HD before ASD.
METRICS = ("dice", "jaccard", "asd", "hd95")
NAN = float("nan")


def segmentation_metrics(
    prediction: NDArray, reference: NDArray, spacing: Sequence[float] | None = None
) -> dict[str, float]:
    """Metrics of two masks of one shape (W,H,D).

    dice, jaccard in [0,1]; asd: mean distance from the prediction's border to the reference's, one direction as
    medpy's asd; hd95: 95th percentile of both directions pooled. Distances are in voxels, or in mm when the
    spacing (mm along x, y, z) is given. Two empty masks agree perfectly (1, 1, 0, 0); if one alone is empty,
    Dice and Jaccard are 0 and the distances not a number, so that a failure never improves a mean.
    """
    a, b = np.asarray(prediction) > 0, np.asarray(reference) > 0
    if a.shape != b.shape:
        raise ValueError(f"the prediction has shape {a.shape}, the reference {b.shape}")
    if not a.any() or not b.any():
        same = not a.any() and not b.any()
        return dict(zip(METRICS, (1.0, 1.0, 0.0, 0.0) if same else (0.0, 0.0, NAN, NAN), strict=True))
    both, either = np.count_nonzero(a & b), np.count_nonzero(a | b)
    # Surfaces and their distances lie in the joint box; the voxel of margin is to spare.
    box = tuple(slice(max(i.min() - 1, 0), i.max() + 2) for i in np.nonzero(a | b))
    a, b = a[box], b[box]
    return {
        "dice": 2 * both / (both + either),
        "jaccard": both / either,
        "asd": float(binary.asd(a, b, voxelspacing=spacing)),
        "hd95": float(binary.hd95(a, b, voxelspacing=spacing)),
    }


def largest_component(mask: NDArray) -> NDArray[np.bool_]:
    """The largest 26-connected component of a mask; of equal ones the first; an empty mask stays empty."""
    found = components(np.asarray(mask) > 0)
    if found.max() == 0:
        return found > 0
    return found == np.bincount(found.ravel())[1:].argmax() + 1


def mean_and_sd(values: list[float]) -> tuple[float, float, int]:
    """Mean and sample standard deviation of the numbers among the values, and how many are not a number."""
    finite = np.asarray([v for v in values if not np.isnan(v)], float)
    mean = float(finite.mean()) if finite.size else NAN
    sd = float(finite.std(ddof=1)) if finite.size > 1 else NAN
    return mean, sd, len(values) - finite.size
