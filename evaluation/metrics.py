"""Dice, Jaccard, ASD and 95HD, equal to medpy's bit for bit, NSD, and defined results for empty masks.

For each metric medpy computes the borders and the distance of every voxel of the volume. Here the distances are
computed once, in the joint box of both masks and for border voxels only. A search tree is used if the borders have few
voxels and are close to each other, as those of segmentations are; otherwise (noise, distant shells) scipy's distance
transform.

NSD, the normalised surface Dice at a tolerance of t mm, is the share of the two surfaces that is within t of the other
one: (A(P) + A(R)) / (area of P + area of R), where A(P) is the area of those elements of the prediction's surface whose
distance to the reference's surface is at most t, and A(R) the converse. A surface has an element at each corner of
voxels where inside and outside meet; its area is that of the marching cubes triangles between the eight voxels around
that corner. That is the definition of Nikolov et al. (2018, https://arxiv.org/abs/1809.04430) and of their package
surface-distance, which the Medical Segmentation Decathlon uses.

ASSD, the average symmetric surface distance, is the mean of the distances of all border voxels of P to the border of R
and of all border voxels of R to the border of P, pooled, as medpy's assd. Others average the two directed means, or
weight surface elements by their area. RVE, the relative volume error, is (|P| - |R|) / |R| in voxels, as medpy's ravd:
above 0 if the prediction is too large, and -1 if it is empty.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, distance_transform_edt
from scipy.spatial import KDTree
from skimage.measure import marching_cubes, mesh_surface_area

from utils.masks import box_of

# Columns are in the papers' order: many logs print 95HD before ASD.
COMPONENTS = ("all", "largest")  # without and with the largest-component filter
METRICS = ("dice", "jaccard", "asd", "hd95")
MM = ("asd_mm", "hd95_mm")
OVERLAPS = ("dice", "jaccard", "nsd")  # in [0,1]; the last only where a tolerance is given
IN_PERCENT = (*OVERLAPS, "rve")  # how they are printed
HEADS = {
    "dice": "Dice %", "jaccard": "Jaccard %", "asd": "ASD voxel", "hd95": "95HD voxel", "asd_mm": "ASD mm",
    "hd95_mm": "95HD mm", "assd": "ASSD voxel", "assd_mm": "ASSD mm", "nsd": "NSD %", "rve": "RVE %",
}  # fmt: skip
"""Column of cases.csv -> its heading in the tables, which have those that there are in this order."""
MORE = ("assd", "rve")  # further metrics, on request
PENALISED = "_penalised"  # suffix of a distance's name
EMPTIES = ("no prediction", "no label", "neither")
NAN = float("nan")
ROUNDING = 1e-6  # relative error of a distance in mm: files state spacings in 32 bits, and 3 * 0.8 is above 2.4
LEAST_SD = 3  # fewest values that have a standard deviation
NOISE, FAR, PROBES = 0.1, 10.0, 200
"""The tree is used if the borders have less than the share NOISE of the box's voxels, and the root mean square of the
distances, estimated from PROBES voxels, is below FAR voxels."""


def overlaps(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> dict[str, float]:
    """Dice and Jaccard in [0,1] of two masks of which one has a voxel."""
    from medpy.metric import binary  # here, as it brings scipy.stats: half a second of every start of a training

    return {"dice": float(binary.dc(a, b)), "jaccard": float(binary.jc(a, b))}


def segmentation_metrics(
    prediction: NDArray,
    reference: NDArray,
    spacing: Sequence[float] | None = None,
    tolerance: float | None = None,
    more: Sequence[str] = (),
) -> dict[str, float]:
    """Metrics of two masks of the same shape (W,H,D).

    If only one mask is empty, Dice, Jaccard and NSD are 0 and the distances NaN (see `with_penalties`), and RVE too if
    that is the reference. If both are empty, all metrics are NaN.

    Args:
        prediction, reference: (W,H,D); voxels above 0 are inside.
        spacing: mm along x, y, z, or None.
        tolerance: of NSD, in mm; None: no NSD.
        more: those of MORE to add.

    Returns:
        dice and jaccard in [0,1]; asd, the mean distance from the prediction's border to the reference's (one
        direction, as medpy's asd); hd95, the 95th percentile of the distances in both directions. Distances are in
        voxels and, with a spacing, also in mm as asd_mm and hd95_mm. With a tolerance nsd in [0,1]. With `more` assd, a
        distance as well, and rve, a fraction.

    Raises:
        ValueError: for different shapes, or a tolerance without a spacing.
    """
    a, b = np.asarray(prediction) > 0, np.asarray(reference) > 0
    if a.shape != b.shape:
        raise ValueError(f"the prediction has shape {a.shape}, the reference {b.shape}")
    if tolerance is not None and spacing is None:
        raise ValueError(f"a tolerance of {tolerance:g} mm needs a spacing")
    units = {"": np.ones(a.ndim)} | ({} if spacing is None else {"_mm": np.asarray(spacing, float)})
    volume_error = {}
    if "rve" in more:
        inside = int(b.sum())
        volume_error["rve"] = (int(a.sum()) - inside) / inside if inside else NAN
    if a.any() and b.any():
        box = box_of(a | b)
        a, b = a[box], b[box]
        scores = overlaps(a, b)
        nsd = {}
        if tolerance is not None and spacing is not None:
            nsd["nsd"] = surface_dice(a, b, spacing, tolerance)
        a, b = (mask & ~binary_erosion(mask) for mask in (a, b))  # beyond the array is outside
        forward, backward = (distances(*pair, list(units.values())) for pair in ((a, b), (b, a)))
        for unit, a_to_b, b_to_a in zip(units, forward, backward, strict=True):
            scores[f"asd{unit}"] = float(a_to_b.mean())
            scores[f"hd95{unit}"] = float(np.percentile(np.hstack((a_to_b, b_to_a)), 95))
        if "assd" in more:
            for unit, a_to_b, b_to_a in zip(units, forward, backward, strict=True):
                scores[f"assd{unit}"] = float(np.hstack((a_to_b, b_to_a)).mean())
        return {**scores, **nsd, **volume_error}
    overlap = 0.0 if a.any() or b.any() else NAN
    names = [f"{name}{unit}" for unit in units for name in METRICS[2:]]
    names += [f"assd{unit}" for unit in units if "assd" in more]
    nsd = {} if tolerance is None else {"nsd": overlap}
    return {"dice": overlap, "jaccard": overlap, **dict.fromkeys(names, NAN), **nsd, **volume_error}


def surface_dice(a: NDArray[np.bool_], b: NDArray[np.bool_], spacing: Sequence[float], tolerance: float) -> float:
    """NSD in [0,1] of two masks (W,H,D), neither of them empty, as defined at the top of this file.

    Args:
        a, b: the masks. Everything beyond the array is outside.
        spacing: mm along x, y, z.
        tolerance: in mm. A distance that is larger by rounding alone, as of a spacing in 32 bits, is within it.
    """
    area_of = element_areas(tuple(map(float, spacing)))
    codes = [corner_codes(np.pad(mask, 1)) for mask in (a, b)]
    surfaces: list[NDArray[np.bool_]] = [(code > 0) & (code < 255) for code in codes]
    near = total = 0.0
    for i, one in enumerate(surfaces):
        areas = area_of[codes[i][one]]
        (away,) = distances(one, surfaces[1 - i], [np.asarray(spacing, float)])
        near += float(areas[away <= tolerance * (1 + ROUNDING)].sum())
        total += float(areas.sum())
    return near / total


def corner_codes(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Mask (W,H,D) -> for each inner corner of voxels, (W-1,H-1,D-1), which of the eight around it are inside: bits."""
    code = np.zeros([side - 1 for side in mask.shape], np.uint8)
    for bit, (x, y, z) in enumerate(np.ndindex(2, 2, 2)):
        code |= mask[x:, y:, z:][: code.shape[0], : code.shape[1], : code.shape[2]].astype(np.uint8) << bit
    return code


@functools.cache
def element_areas(spacing: tuple[float, ...]) -> NDArray[np.float64]:
    """Code of `corner_codes` -> area in mm2 (256,) of the marching cubes triangles between the eight voxels.

    A code and its complement have the same area: that of the one with fewer voxels inside.
    """
    areas = np.zeros(256)
    for code in range(1, 255):
        inside = np.array([code >> bit & 1 for bit in range(8)], np.float32).reshape(2, 2, 2)
        inside = inside if inside.sum() <= 4 else 1 - inside
        vertices, faces, _, _ = marching_cubes(inside, 0.5, spacing=spacing, method="lorensen")
        areas[code] = mesh_surface_area(vertices, faces)
    return areas


def with_penalties(
    scores: dict[str, float], shape: Sequence[int], spacing: Sequence[float] | None = None
) -> dict[str, float]:
    """Adds NAME_penalised for each distance NAME in `segmentation_metrics`: the distance, or the diagonal of a volume
    of this shape (voxels) and spacing (mm) if only one mask is empty.

    No distance in the volume reaches its diagonal, so an empty mask ranks last.
    """
    sides = {"": np.asarray(shape, float)}
    if spacing is not None:
        sides["_mm"] = sides[""] * np.asarray(spacing, float)
    penalised = {}
    for unit, lengths in sides.items():
        for name in [*METRICS[2:], *(["assd"] if "assd" in scores else [])]:
            value = scores[f"{name}{unit}"]
            one_is_empty = math.isnan(value) and not math.isnan(scores["dice"])
            penalised[f"{name}{unit}{PENALISED}"] = float(np.linalg.norm(lengths)) if one_is_empty else value
    return {**scores, **penalised}


def distances(start: NDArray[np.bool_], goal: NDArray[np.bool_], units: Sequence[NDArray]) -> list[NDArray[np.float64]]:
    """Distances from every voxel of `start`, in array order, to the nearest voxel of `goal`, for several voxel sizes.

    Squares are summed axis by axis, as in scipy's distance transform, so that results are equal to the last bit.

    Args:
        start, goal: masks (W,H,D), both with voxels inside.
        units: voxel sizes (3,).

    Returns:
        For each voxel size the distances (n,).
    """
    points, goals = np.argwhere(start).T, np.argwhere(goal).T
    indices: dict[tuple[float, ...], NDArray] = {}  # shape of a voxel, independent of its size -> nearest voxels
    lengths = []
    for unit in units:
        shape = tuple(unit / unit[0])
        if shape not in indices:
            indices[shape] = nearest(start, goal, points, goals, unit)
        steps = (points - indices[shape]) * unit[:, None]
        lengths.append(np.sqrt(np.add.reduce(steps * steps)))
    return lengths


def nearest(start: NDArray, goal: NDArray, points: NDArray, goals: NDArray, unit: NDArray) -> NDArray[np.intp]:
    """Indices (3,n) of the nearest voxel of `goal` (indices `goals`) for each voxel of `start` (indices `points`)."""
    if points.shape[1] + goals.shape[1] < NOISE * start.size:
        tree = KDTree(goals.T * unit)
        probes = points[:, :: -(-points.shape[1] // PROBES)]
        if (tree.query(probes.T * unit)[0] ** 2).mean() < (FAR * unit.min()) ** 2:
            return goals[:, tree.query(points.T * unit)[1]]
    return distance_transform_edt(~goal, unit, return_distances=False, return_indices=True)[:, start]


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation of the values that are not NaN; the SD of fewer than three is NaN."""
    finite = np.asarray([v for v in values if not math.isnan(v)], float)
    mean = float(finite.mean()) if finite.size else NAN
    return mean, float(finite.std(ddof=1)) if finite.size >= LEAST_SD else NAN


def mean_text(values: Sequence[float]) -> str:
    """The mean, with ± SD for three or more values; a dash if all values are NaN."""
    mean, sd = mean_and_sd(values)
    return "-" if math.isnan(mean) else f"{mean:.2f}" + ("" if math.isnan(sd) else f" ± {sd:.2f}")


def overlap_text(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """Mean Dice, Jaccard or NSD of several scans in per cent, and the number of scans that have one if not all do.

    A scan has none if both masks are empty.
    """
    values = [100 * row[name] for row in rows]
    count = sum(not math.isnan(v) for v in values)
    return mean_text(values) + (f" ({count} of {len(rows)})" if count < len(rows) else "")


def empties(rows: Sequence[Mapping[str, Any]]) -> tuple[int, int, int]:
    """Number of scans with only the prediction empty, only the label empty, and both empty: the columns EMPTIES."""
    neither = sum(math.isnan(row["dice"]) for row in rows)
    alone = [row for row in rows if math.isnan(row["asd"]) and not math.isnan(row["dice"])]
    return sum(row["voxels"] == 0 for row in alone), sum(row["label_voxels"] == 0 for row in alone), neither


@dataclasses.dataclass(frozen=True)
class Distances:
    """The values of one distance over the scans of a run.

    plain: the distances of the scans that have one; scores: these and the penalties of empty masks; unknown: scans
    without a known penalty, in files of early tests, for which `scores` equals `plain`; scans: number of scans.
    """

    plain: list[float]
    scores: list[float]
    unknown: int
    scans: int


def distances_of(rows: Sequence[Mapping[str, Any]], name: str) -> Distances:
    """The values of the distance `name` in rows of cases.csv."""
    plain, scores, unknown = [], [], 0
    for row in rows:
        value, score = row[name], row.get(name + PENALISED, row[name])
        plain += [] if math.isnan(value) else [value]
        scores += [] if math.isnan(score) else [score]
        unknown += math.isnan(score) and math.isnan(row["asd"]) and not math.isnan(row["dice"])
    return Distances(plain, plain if unknown else scores, unknown, len(rows))


def counts_of(run: Distances) -> tuple[int, int, int]:
    """Number of scans with a distance, with a distance or a penalty, and of all scans."""
    return len(run.plain), len(run.scores), run.scans


def averaged(runs: Sequence[Distances], *, over_runs: bool) -> list[float]:
    """What a mean distance is over: means of several runs, or the scans of one; with penalties, if all are known."""
    if not over_runs:
        return runs[0].scores
    unknown = any(run.unknown for run in runs)
    return [mean_and_sd(run.plain if unknown else run.scores)[0] for run in runs]


def distance_text(runs: Sequence[Distances], *, over_runs: bool = False) -> str:
    """Mean ± SD of `averaged`; where a scan has no distance, in brackets how many have one, and their mean alone."""
    text = mean_text(averaged(runs, over_runs=over_runs))
    measured, scored, scans = (sum(counts) for counts in zip(*map(counts_of, runs), strict=True))
    if measured == scans:
        return text
    plain = mean_and_sd([mean_and_sd(run.plain)[0] for run in runs])[0]
    partial = f"; these alone {plain:.2f}" if 0 < measured < scored else ""
    return f"{text} ({measured} of {scans}{'; not penalised' if any(run.unknown for run in runs) else partial})"
