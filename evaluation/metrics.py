"""Dice, Jaccard, ASD and 95HD as medpy defines them, bit for bit, with an honest answer for empty masks.

medpy finds the borders and the distance of every voxel of the volume, for each figure anew. Here that is done once, in
the joint box of the masks and for the border's voxels alone: with a search tree where borders are few and near each
other, as those of segmentations are, else (noise, a shell far around another) with scipy's distance transform.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

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
MM = ("asd_mm", "hd95_mm")
PENALISED = "_penalised"  # after a distance's name
EMPTIES = ("no prediction", "no label", "neither")
NAN = float("nan")
LEAST_SD = 3  # numbers
NOISE, FAR, PROBES = 0.1, 10.0, 200
"""A tree is slower than the transform if the border's voxels are more than this share of the box, or the root mean
square of the distances, probed at so many of them, is above so many voxels."""


def segmentation_metrics(
    prediction: NDArray, reference: NDArray, spacing: Sequence[float] | None = None
) -> dict[str, float]:
    """Metrics of two masks of one shape (W,H,D).

    dice, jaccard in [0,1]; asd: mean distance from the prediction's border to the reference's, one direction as
    medpy's asd; hd95: 95th percentile of both directions pooled; both in voxels and, as asd_mm and hd95_mm, in mm when
    the spacing (mm along x, y, z) is given. If one mask alone is empty, Dice and Jaccard are 0 and the distances not a
    number; `with_penalties` gives it one. Of two empty masks nothing is a number: there was nothing to find.
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
    overlap = 0.0 if a.any() or b.any() else NAN
    names = [f"{name}{unit}" for unit in units for name in METRICS[2:]]
    return {"dice": overlap, "jaccard": overlap, **dict.fromkeys(names, NAN)}


def with_penalties(
    scores: dict[str, float], shape: Sequence[int], spacing: Sequence[float] | None = None
) -> dict[str, float]:
    """What `segmentation_metrics` found in a volume of this shape, and NAME_penalised for each of its distances: the
    distance, or where one mask alone is empty the volume's diagonal, which no distance in it reaches, so that an empty
    mask ranks behind every other."""
    sides = {"": np.asarray(shape, float)}
    if spacing is not None:
        sides["_mm"] = sides[""] * np.asarray(spacing, float)
    penalised = {}
    for unit, lengths in sides.items():
        for name in METRICS[2:]:
            one_is_empty = math.isnan(scores[f"{name}{unit}"]) and not math.isnan(scores["dice"])
            penalised[f"{name}{unit}{PENALISED}"] = (
                float(np.linalg.norm(lengths)) if one_is_empty else scores[f"{name}{unit}"]
            )
    return {**scores, **penalised}


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


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation of the numbers among the values; fewer than three have no SD."""
    finite = np.asarray([v for v in values if not math.isnan(v)], float)
    mean = float(finite.mean()) if finite.size else NAN
    return mean, float(finite.std(ddof=1)) if finite.size >= LEAST_SD else NAN


def mean_text(values: Sequence[float]) -> str:
    """The mean, with three numbers or more ± their SD; a dash without a number."""
    mean, sd = mean_and_sd(values)
    return "-" if math.isnan(mean) else f"{mean:.2f}" + ("" if math.isnan(sd) else f" ± {sd:.2f}")


def overlap_text(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """Dice or Jaccard of several scans in per cent, and how many have one if not all do: not where both masks are
    empty."""
    values = [100 * row[name] for row in rows]
    found = sum(not math.isnan(v) for v in values)
    return mean_text(values) + (f" ({found} of {len(rows)})" if found < len(rows) else "")


def empties(rows: Sequence[Mapping[str, Any]]) -> tuple[int, int, int]:
    """In how many of the scans the prediction alone is empty, the label alone, and both: the columns EMPTIES."""
    both = sum(math.isnan(row["dice"]) for row in rows)
    alone = [row for row in rows if math.isnan(row["asd"]) and not math.isnan(row["dice"])]
    return sum(row["voxels"] == 0 for row in alone), sum(row["label_voxels"] == 0 for row in alone), both


@dataclasses.dataclass(frozen=True)
class Distances:
    """A distance of the scans of one run.

    plain: of those that have one; scores: with the volume's diagonal for an empty mask, or as `plain` if a test from
    before there were penalties has `unknown` ones; scans: how many there are.
    """

    plain: list[float]
    scores: list[float]
    unknown: int
    scans: int


def distances_of(rows: Sequence[Mapping[str, Any]], name: str) -> Distances:
    """A distance's column of rows of cases.csv."""
    plain, scores, unknown = [], [], 0
    for row in rows:
        value, score = row[name], row.get(name + PENALISED, row[name])
        plain += [] if math.isnan(value) else [value]
        scores += [] if math.isnan(score) else [score]
        unknown += math.isnan(score) and math.isnan(row["asd"]) and not math.isnan(row["dice"])
    return Distances(plain, plain if unknown else scores, unknown, len(rows))


def counts_of(run: Distances) -> tuple[int, int, int]:
    """Scans with a distance, with a distance or a penalty, and all."""
    return len(run.plain), len(run.scores), run.scans


def distance_text(runs: Sequence[Distances], *, over_runs: bool = False) -> str:
    """The mean of the scores ± their SD, over the scans of one run or over the means of several; in brackets how many
    of the scans have a distance, and the mean of these alone if the others have a penalty."""
    unknown = any(run.unknown for run in runs)
    plain, scores = ([mean_and_sd(getattr(run, name))[0] for run in runs] for name in ("plain", "scores"))
    found, scored, scans = (sum(counts) for counts in zip(*map(counts_of, runs), strict=True))
    more = "; not penalised" if unknown else f"; these alone {mean_and_sd(plain)[0]:.2f}" if 0 < found < scored else ""
    over = (plain if unknown else scores) if over_runs else runs[0].scores
    return f"{mean_text(over)} ({found} of {scans}{more})"
