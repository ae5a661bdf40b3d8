"""What a data set suggests for its training: spacing, halvings, patch and batch, as a command to paste."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dataloaders.findings import Facts, memory_gib, of_other_spacing, unnormalised, usual_spacing
from dataloaders.training import usual_classes
from dataloaders.volumes import ON_DEVICE
from methods import Method
from networks.heads import HALVINGS
from settings import Options
from tools.memory import MARGIN, meta_method, step_bytes, trainable_bytes
from utils.devices import GIB
from utils.errors import UserError

USUAL_MEMORY = 8.0  # GiB, of a computer without a GPU
CROPS = Options.batch_size  # as in the papers, and where all crops are labeled
FEW_VOXELS = 64**3  # of a patch: below it half as many crops are suggested
THICK = 2.0  # times as long: an axis with such voxels is left alone by the first halvings
QUARTER = 25  # percentile of the scans' sides that a patch must not exceed


@dataclass(frozen=True)
class Planned:
    """The training that the suggestion is for."""

    folder: str
    labeled: int | None
    """--labeled, if given."""
    method: str
    classes: int
    downsample: int
    gib: float
    """Memory of the device."""


@dataclass(frozen=True)
class Suggestion:
    """Settings for the training on a set."""

    spacing: tuple[float, ...] | None
    """Median, mm along x, y, z; None if no case states it."""
    sides: tuple[int, ...]
    """25th percentile of the scans' sides, in voxels of this spacing, after --downsample."""
    halvings: tuple[int, ...]
    patch_size: tuple[int, ...]
    batch_size: int
    gib: float
    """Memory of a step."""
    volumes_gib: float
    """Memory of the scans next to it."""


def device_gib() -> float:
    """Memory of the GPU in GiB; 8 without one."""
    return torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else USUAL_MEMORY


def halvings_for(spacing: Sequence[float], sides: Sequence[int]) -> tuple[int, ...]:
    """How often each axis should be halved, so that the voxels of the deepest map are about as long as wide.

    An axis whose voxels are r times as long as the shortest, r >= 2, is left alone in floor(log2 r) of the four steps.
    So is an axis of fewer voxels than would be one after the halvings.

    Args:
        spacing: mm along x, y, z.
        sides: voxels of a small scan of the set.
    """
    steps = max(HALVINGS)
    halvings = []
    for mm, side in zip(spacing, sides, strict=True):
        ratio = mm / min(spacing) + 1e-6  # rounding of 1 1 2 mm
        left_alone = int(math.log2(ratio)) if ratio >= THICK else 0
        halvings.append(max(min(steps - left_alone, int(math.log2(max(side, 1)))), 0))
    return tuple(halvings) if max(halvings) == steps else HALVINGS


def suggest(facts: Sequence[Facts], labeled: int, t: Planned) -> Suggestion:
    """Settings for a training.

    The patch is the largest whose sides are multiples of what the method needs, no longer than those of a quarter of
    the scans, and whose training step fits into the memory. Its longest side in mm is shortened first. A batch has the
    crops of the method's first preset; two where these would leave a patch of less than 64^3 voxels, and fewer with few
    labeled scans.

    Args:
        facts: of the training cases, with spacing.
        labeled: how many of them are labeled, at least one.

    Raises:
        UserError: if not even the smallest patch fits, or for several classes if the method handles only one.
    """
    spacing = usual_spacing(facts)
    shapes = [np.array(x.shape) * (np.divide(x.spacing, spacing) if x.spacing and spacing else 1) for x in facts]
    sides = tuple(int(side) for side in np.percentile(shapes, QUARTER, axis=0) / t.downsample)
    halvings = halvings_for(spacing or (1.0, 1.0, 1.0), sides)
    counted = meta_method(t.method, {"classes": t.classes, "channels": facts[0].channels, "halvings": list(halvings)})
    usual, of_them = usual_batch(counted, alone=labeled == len(facts))
    step = StepMemory(counted, usual, of_them)
    volumes = memory_gib(facts) / t.downsample**3
    volumes = volumes if volumes < ON_DEVICE * t.gib else 0.0  # larger ones stay out of a GPU
    crops = usual if labeled >= of_them else min(CROPS, labeled if of_them == usual else 2 * labeled)
    patches = {
        n: largest_patch(sides, counted.side_multiples, spacing, step.most_voxels(n, t.gib - volumes))
        for n in {crops, min(crops, CROPS // 2)}
    }
    if math.prod(patches[crops]) < FEW_VOXELS:
        crops = max(patches, key=lambda n: (math.prod(patches[n]), n))
    patch = patches[crops]
    if not math.prod(patch):
        raise UserError(
            f"--memory {t.gib:.3g} does not suffice for {t.method}, not even with the smallest patch. Give more."
        )
    return Suggestion(spacing, sides, halvings, patch, crops, step.gib(patch, crops), volumes)


def usual_batch(method: Method, *, alone: bool) -> tuple[int, int]:
    """The crops of a batch by the method's first preset, and how many of them are labeled: all without unlabeled scans
    (`alone`)."""
    if alone or not method.uses_unlabeled:
        return CROPS, CROPS
    preset = next(iter(method.PRESETS.values()))
    crops = preset.get("batch_size", CROPS)
    return crops, preset.get("labeled_batch", crops // 2)


class StepMemory:
    """The memory of a training step of a method, as a function of patch and batch.

    All but weights, momentum and gradients is proportional to the voxels of a batch, so it is counted once, for a batch
    of so many crops, `labeled` of them labeled. For a large patch the sum is a little too much: most gradients are made
    when most activations are gone.
    """

    def __init__(self, method: Method, crops: int, labeled: int):
        patch = [max(side, 64) for side in method.side_multiples]
        fixed, rest = step_bytes(method, patch, crops, labeled)
        self.fixed = fixed + trainable_bytes(method)
        self.per_voxel = rest / (crops * math.prod(patch))

    def gib(self, patch_size: Sequence[int], batch_size: int) -> float:
        """GiB with the margin for what the count does not know."""
        return MARGIN * (self.fixed + self.per_voxel * batch_size * math.prod(patch_size)) / GIB

    def most_voxels(self, batch_size: int, gib: float) -> int:
        """The most voxels of a patch with which a step fits into the memory; below 0 if the weights alone do not."""
        return math.floor((gib * GIB / MARGIN - self.fixed) / (self.per_voxel * batch_size))


def largest_patch(
    sides: Sequence[int], multiples: Sequence[int], spacing: Sequence[float] | None, most: int
) -> tuple[int, ...]:
    """The patch within these sides of at most so many voxels, its longest side in mm shortened first.

    A side is at least one multiple, also where the scans are smaller; (0, 0, 0) if that is too much.
    """
    patch = [max(side // m, 1) * m for side, m in zip(sides, multiples, strict=True)]
    mm = spacing or (1.0, 1.0, 1.0)
    while math.prod(patch) > most:
        longer = [axis for axis in range(3) if patch[axis] > multiples[axis]]
        if not longer:
            return (0, 0, 0)
        axis = max(longer, key=lambda axis: patch[axis] * mm[axis])
        patch[axis] -= multiples[axis]
    return tuple(patch)


def described(s: Suggestion, facts: Sequence[Facts], t: Planned) -> str:
    """The suggestion as text, the command last."""

    def by_x(numbers: Sequence[float]) -> str:
        return " x ".join(f"{n:.3g}" for n in numbers)

    lines = [f"Suggested for a training of {t.method} with {t.gib:.3g} GiB of memory:"]
    mm = ""
    if s.spacing:
        lines.append(f"  spacing   {by_x(s.spacing)} mm, the median")
        mm = f", {by_x([n * one * t.downsample for n, one in zip(s.patch_size, s.spacing, strict=True)])} mm"
        if of_other_spacing(facts, s.spacing):
            target = " ".join(f"{one:.3g}" for one in s.spacing)
            lines[-1] += f"; resample first: python -m tools.convert --source SCANS --out NEW --spacing {target}"
    if s.halvings != HALVINGS:
        lines.append(f"  halvings  {' '.join(map(str, s.halvings))}: fewer along long voxels and short sides")
    lines.append(f"  patch     {by_x(s.patch_size)} voxels{mm}; the 25th percentile of the sides is {by_x(s.sides)}")
    scans = f", and {s.volumes_gib:.2g} GiB for the scans" if s.volumes_gib else ""
    lines.append(f"  batch     {s.batch_size} crops; {s.gib:.2g} GiB for a step{scans}")
    return "\n".join([*lines, "", command(s, facts, t)])


def command(s: Suggestion, facts: Sequence[Facts], t: Planned) -> str:
    """The command of the training, to be pasted into a shell."""
    words: list[str | int] = ["python", "train_dtml.py", "--data", t.folder]
    words += ["--method", t.method] if t.method != Options.method else []
    words += ["--labeled", t.labeled] if t.labeled is not None else []
    words += ["--classes", t.classes] if t.classes != usual_classes(Path(t.folder)) else []
    words += ["--downsample", t.downsample] if t.downsample > 1 else []
    channels = [x.of_channel(channel) for x in facts for channel in range(x.channels)]
    words += ["--normalize", "scan"] if any(map(unnormalised, channels)) else []
    words += ["--halvings", *s.halvings] if s.halvings != HALVINGS else []
    if s.halvings[0] != s.halvings[1]:  # turns would exchange the long and the short sides of the voxels
        words += ["--augment", "none"]
    return shlex.join(map(str, [*words, "--patch-size", *s.patch_size, "--batch-size", s.batch_size]))
