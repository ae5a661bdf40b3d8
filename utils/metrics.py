"""Dice, Jaccard, ASD and 95HD as medpy defines them, bit for bit, with an honest answer for empty masks.

medpy finds the borders and the distance of every voxel of the volume, for each figure anew. Here that is done once, in
the joint box of the masks and for the border's voxels alone: with a search tree where borders are few and near each
other, as those of segmentations are, else (noise, a shell far around another) with scipy's distance transform.
"""

from collections.abc import Sequence

import numpy as np
from medpy.metric import binary
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from scipy.spatial import KDTree
from skimage.measure import label as components

from utils.masks import box_of, inner_border

# The papers' column order: many logs print 95HD before ASD.
COMPONENTS = ("all", "largest")  # of a prediction: without and with the largest-component filter
METRICS = ("dice", "jaccard", "asd", "hd95")
NAN = float("nan")
NOISE, FAR, PROBES = 0.1, 10.0, 200
"""A tree is slower than the transform if the border's voxels are more than this share of the box, or the root mean
square of the distances, probed at so many of them, is above so many voxels."""


def segmentation_metrics(
    prediction: NDArray, reference: NDArray, spacing: Sequence[float] | None = None
) -> dict[str, float]:
    """Metrics of two masks of one shape (W,H,D).

    dice, jaccard in [0,1]; asd: mean distance from the prediction's border to the reference's, one direction as
    medpy's asd; hd95: 95th percentile of both directions pooled; both in voxels and, as asd_mm and hd95_mm, in mm when
    the spacing (mm along x, y, z) is given. Two empty masks agree perfectly (1, 1, 0, 0); if one alone is empty,
    Dice and Jaccard are 0 and the distances not a number, so that a failure never improves a mean.
    """
    a, b = np.asarray(prediction) > 0, np.asarray(reference) > 0
    if a.shape != b.shape:
        raise ValueError(f"the prediction has shape {a.shape}, the reference {b.shape}")
    units = {"": np.ones(a.ndim)} | ({} if spacing is None else {"_mm": np.asarray(spacing, float)})
    if a.any() and b.any():
        box = box_of(a | b)
        a, b = a[box], b[box]
        found = {"dice": float(binary.dc(a, b)), "jaccard": float(binary.jc(a, b))}
        a, b = inner_border(a), inner_border(b)
        there, back = (distances(*pair, list(units.values())) for pair in ((a, b), (b, a)))
        for unit, one, other in zip(units, there, back, strict=True):
            found[f"asd{unit}"] = float(one.mean())
            found[f"hd95{unit}"] = float(np.percentile(np.hstack((one, other)), 95))
        return found
    overlap, distance = (0.0, NAN) if a.any() or b.any() else (1.0, 0.0)
    names = [f"{name}{unit}" for unit in units for name in METRICS[2:]]
    return {"dice": overlap, "jaccard": overlap, **dict.fromkeys(names, distance)}


def distances(start: NDArray[np.bool_], goal: NDArray[np.bool_], units: Sequence[NDArray]) -> list[NDArray[np.float64]]:
    """From every voxel of `start`, in the array's order, to the nearest of `goal`, for each of several voxel sizes.

    Squares are summed axis by axis, as scipy's distance transform does it, so that the last bit is the same.
    """
    points, goals = np.argwhere(start).T, np.argwhere(goal).T
    found: dict[tuple[float, ...], NDArray] = {}  # shape of a voxel: indices of the nearest, whatever its size
    lengths = []
    for unit in units:
        shape = tuple(unit / unit[0])
        if shape not in found:
            found[shape] = nearest(start, goal, points, goals, unit)
        steps = (points - found[shape]) * unit[:, None]
        lengths.append(np.sqrt(np.add.reduce(steps * steps)))
    return lengths


def nearest(start: NDArray, goal: NDArray, points: NDArray, goals: NDArray, unit: NDArray) -> NDArray[np.intp]:
    """Indices (3,n) of the voxel of `goal` (indices `goals`) nearest to each of `start` (indices `points`)."""
    if points.shape[1] + goals.shape[1] < NOISE * start.size:
        tree = KDTree(goals.T * unit)
        probes = points[:, :: -(-points.shape[1] // PROBES)]
        if (tree.query(probes.T * unit)[0] ** 2).mean() < (FAR * unit.min()) ** 2:
            return goals[:, tree.query(points.T * unit)[1]]
    return distance_transform_edt(~goal, unit, return_distances=False, return_indices=True)[:, start]


def largest_component(mask: NDArray) -> NDArray[np.bool_]:
    """The largest 26-connected component of a mask; of equal ones the first; an empty mask stays empty."""
    mask = np.asarray(mask) > 0
    kept = np.zeros_like(mask)
    if mask.any():
        box = box_of(mask)
        found = components(mask[box])
        kept[box] = found == np.bincount(found.ravel())[1:].argmax() + 1
    return kept


def largest_components(found: NDArray, classes: int) -> NDArray[np.uint8]:
    """A label map of 0..classes with the largest component of each class alone."""
    kept = np.zeros(found.shape, np.uint8)
    for c in range(1, classes + 1):
        kept[largest_component(found == c)] = c
    return kept


def mean_and_sd(values: list[float]) -> tuple[float, float, int]:
    """Mean and sample standard deviation of the numbers among the values, and how many are not a number."""
    finite = np.asarray([v for v in values if not np.isnan(v)], float)
    mean = float(finite.mean()) if finite.size else NAN
    sd = float(finite.std(ddof=1)) if finite.size > 1 else NAN
    return mean, sd, len(values) - finite.size
