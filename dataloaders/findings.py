"""Warnings and notes about a data set that can be read: facts of each case, and findings from all of them.

The thresholds come from the LA set. Its scans were normalised to mean 0 and standard deviation 1 before they were
cropped around the atrium, so the crops are brighter. LA holds the smallest and the largest value over its 100 scans
(computed on 22 November 2026 from all voxels; intensities from every seventh).
"""

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataloaders.cases import Case
from dataloaders.fingerprints import DIGITS, fingerprint, groups
from dataloaders.geometry import SPACING_FILE, known_spacing, published
from dataloaders.orientation import known_orientation
from utils.channels import with_channels
from utils.devices import GIB
from utils.text import some

LEVELS = ("error", "warning", "note")
LA_SIDES = ((148, 132, 88), (244, 160, 88))  # voxels
LA = {
    "mean": (0.05, 1.94),
    "sd": (0.31, 1.66),
    "p1": (-0.87, -0.39),
    "p99": (0.86, 6.78),
    "share": (0.035, 0.192),
    "ml": (18.6, 132.2),
}
"""Mean, sd and percentiles of the intensities; the atrium's share of the voxels and its volume in ml."""
MEAN, SD = 4.0, (0.15, 3.5)  # limits for a normalised scan: twice as far as LA's
FAR = 6.0  # outlier limit in units of 1.48 median absolute deviations over the cases
SAMPLE = 20_000  # voxels of an image whose intensities are used


@dataclass(frozen=True)
class Finding:
    """A message about some cases or about the whole set (no case), with advice."""

    level: str
    cases: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{some(self.cases) or 'all cases'}: {self.text}"


@dataclass(frozen=True)
class Facts:
    """Facts about one case, from reading it once."""

    case: Case
    shape: tuple[int, ...]
    spacing: tuple[float, ...] | None
    """mm along x, y, z; None if not read, or if neither the file nor the set states it."""
    mean: float
    sd: float
    p1: float
    p99: float
    """Mean, standard deviation and percentiles of the intensities of about SAMPLE evenly spread voxels, of the first
    channel."""
    voxels: dict[int, int] | None
    """Class -> number of voxels, without the background; None if the label was not opened."""
    fingerprint: str
    """Fingerprint of the image, see dataloaders/fingerprints.py."""
    orientation: str | None = None
    """Three letters, see dataloaders/orientation.py; None if not read, or if the file does not state it."""
    others: tuple[tuple[float, float, float, float], ...] = ()
    """mean, sd, p1 and p99 of each further channel."""

    @property
    def channels(self) -> int:
        """K, the number of channels of the image."""
        return 1 + len(self.others)

    def of_channel(self, channel: int) -> "Facts":
        """The same facts with the intensities of a channel, counted from 0."""
        if channel == 0:
            return self
        mean, sd, p1, p99 = self.others[channel - 1]
        return dataclasses.replace(self, mean=mean, sd=sd, p1=p1, p99=p99)


def facts_of(case: Case, image: NDArray[np.float32], label: NDArray[np.uint8] | None) -> Facts:
    """Facts from image and label of `read_case`, without spacing and orientation (see `with_spacing`)."""
    channels = with_channels(image)
    step = max(channels[0].size // SAMPLE, 1)
    while math.gcd(step, image.shape[-2] * image.shape[-1]) > 1:  # otherwise whole planes would be skipped
        step += 1
    first, *others = (_intensities_of(channel.ravel()[::step]) for channel in channels)
    voxels = None
    if label is not None:  # ten times faster than numpy.bincount for a few classes
        counts = {c: int(np.count_nonzero(label == c)) for c in range(1, int(label.max()) + 1)}
        voxels = {c: n for c, n in counts.items() if n}
    return Facts(case, image.shape[-3:], None, *first, voxels, fingerprint(image), others=tuple(others))


def _intensities_of(sample: NDArray[np.float32]) -> tuple[float, float, float, float]:
    """Mean, standard deviation, 1st and 99th percentile."""
    low, high = np.percentile(sample, (1, 99))
    return float(sample.mean(dtype=np.float64)), float(sample.std(dtype=np.float64)), float(low), float(high)


def with_spacing(facts: Facts) -> Facts:
    """Adds spacing and orientation from the attributes of the case's file, without reading a volume."""
    case = facts.case
    return dataclasses.replace(facts, spacing=known_spacing(case), orientation=known_orientation(case))


def findings_of(
    facts: Sequence[Facts], *, trained: Sequence[Facts] = (), patch_size: Sequence[int] = (), downsample: int = 1,
    normalize: str = "none",
) -> list[Finding]:  # fmt: skip
    """Warnings and notes about intensities, spacing, orientation, sizes and empty labels; none for the LA set.

    Args:
        facts: facts of the cases, with spacing.
        trained: those of the training cases among them, whose median spacing all should have; (): all.
        patch_size: voxels of a crop along x, y, z; () skips the check of the sizes.
        downsample: pooling factor before the crop.
        normalize: normalisation of each volume; unless it is 'none' the intensities are not checked.
    """
    return [
        *_channels(facts),
        *(_intensities(facts) if normalize == "none" else []),
        *_spacings(facts, usual_spacing(trained) or usual_spacing(facts)),
        *_orientations(facts),
        *(_small(facts, patch_size, downsample) if patch_size else []),
        *_labels(facts),
    ]


def _channels(facts: Sequence[Facts]) -> list[Finding]:
    counts = Counter(x.channels for x in facts)
    if len(counts) < 2:
        return []
    (usual, _), *rare = counts.most_common()
    names = tuple(x.case.name for x in facts if x.channels != usual)
    text = f"the image has {' or '.join(str(n) for n, _ in rare)} channels, those of the other cases {usual}. "
    more = "A network takes one number of them: convert all cases from the same files."
    return [Finding("error", names, text + more)]


def _intensities(facts: Sequence[Facts]) -> list[Finding]:
    findings = []
    for channel in range(max((x.channels for x in facts), default=1)):
        several = [x.of_channel(channel) for x in facts if channel < x.channels]
        named = f"in channel {channel} " if channel or any(x.channels > 1 for x in several) else ""
        findings += _intensities_of_one(several, named)
    return findings


def unnormalised(x: Facts) -> bool:
    """Whether the intensities of the first channel are not those of a normalised scan."""
    return abs(x.mean) > MEAN or not SD[0] <= x.sd <= SD[1]


def _intensities_of_one(facts: Sequence[Facts], named: str) -> list[Finding]:
    strange = [x for x in facts if unnormalised(x)]
    findings = []
    if strange:
        means, sds = ([getattr(x, name) for x in strange] for name in ("mean", "sd"))
        text = f"{named}the intensities have mean {_range(means)} and standard deviation {_range(sds)}, which is not "
        more = "that of a normalised scan. Subtract the mean of the whole scan and divide by its standard deviation."
        findings.append(Finding("warning", tuple(x.case.name for x in strange), text + more))
    rest = [x for x in facts if not unnormalised(x)]
    for name, word in (("mean", "mean"), ("sd", "standard deviation")):
        values = np.array([getattr(x, name) for x in rest])
        if len(values) < 5:
            break
        middle = float(np.median(values))
        spread = max(1.4826 * float(np.median(np.abs(values - middle))), 0.1)
        for x, value in zip(rest, values, strict=True):
            if abs(value - middle) > FAR * spread:
                text = f"{named}the {word} of its intensities is {value:.3g}, that of most others near {middle:.3g}. "
                text += "See whether it was normalised as they were."
                findings.append(Finding("warning", (x.case.name,), text))
    return findings


def usual_spacing(facts: Sequence[Facts]) -> tuple[float, ...] | None:
    """Median spacing of the cases that state one, mm along x, y, z; None if none does."""
    spacings = [x.spacing for x in facts if x.spacing]
    return tuple(np.median(spacings, axis=0).tolist()) if spacings else None


def of_other_spacing(facts: Sequence[Facts], middle: Sequence[float] | None) -> list[Facts]:
    """The cases whose spacing differs from the usual one, `middle`, by more than 1 %; none if it is not known."""
    return [x for x in facts if x.spacing and middle and np.abs(np.divide(x.spacing, middle) - 1).max() > 0.01]


def _spacings(facts: Sequence[Facts], middle: Sequence[float] | None) -> list[Finding]:
    findings = []
    unknown = tuple(x.case.name for x in facts if not x.spacing)
    if unknown:
        text = "neither the file nor the set states the size of a voxel, so that nothing is known in mm. Write it into "
        more = f"the files (attribute spacing) or, the mm along x, y and z, into {SPACING_FILE} next to the lists."
        findings.append(Finding("warning", () if len(unknown) == len(facts) else unknown, text + more))
    if middle is None:
        return findings
    others = of_other_spacing(facts, middle)
    target = " ".join(f"{mm:.3g}" for mm in middle)
    if others:
        ranges = " x ".join(_range(mm) for mm in zip(*(x.spacing for x in facts if x.spacing), strict=True))
        text = f"voxels of another size than {target} mm; in the set they are {ranges} mm. A network sees voxels, not "
        more = f"mm: resample all cases with python -m tools.convert --spacing {target}."
        findings.append(Finding("warning", tuple(x.case.name for x in others), text + more))
    if max(middle) > 2.5 * min(middle):
        text = f"voxels are {target} mm, {max(middle) / min(middle):.1f} times as long along one axis. "
        more = "Take fewer of them along that axis in --patch-size and --halvings, or resample."
        findings.append(Finding("note", (), text + more))
    return findings


def _orientations(facts: Sequence[Facts]) -> list[Finding]:
    """Findings about orientations. Published LA scans are skipped: they state none, but all have the same axes."""
    facts = [x for x in facts if x.orientation or not published(x.case)]
    findings = []
    unknown = tuple(x.case.name for x in facts if not x.orientation)
    if unknown:
        text = "the file does not state where its axes point. A network learns them as they are stored, and predict.py "
        more = "takes those of a new scan as they are stored too. Convert it from files that state it, if you can."
        findings.append(Finding("warning", () if len(unknown) == len(facts) else unknown, text + more))
    counts = Counter(x.orientation for x in facts if x.orientation)
    if len(counts) > 1:
        (usual, _), *rare = counts.most_common()
        names = tuple(x.case.name for x in facts if x.orientation not in (None, usual))
        text = f"the axes point to {', '.join(str(code) for code, _ in rare)}, those of the other cases to {usual}. "
        more = "A network sees axes as they are stored: convert all scans again, which brings them to one orientation."
        findings.append(Finding("warning", names, text + more))
    return findings


def _small(facts: Sequence[Facts], patch_size: Sequence[int], downsample: int) -> list[Finding]:
    by_axes = defaultdict(list)
    for x in facts:
        sides = [-(-side // downsample) for side in x.shape]
        axes = "".join(a for a, side, p in zip("xyz", sides, patch_size, strict=True) if side < p)
        if axes:
            by_axes[axes].append(x)
    patch = " ".join(map(str, patch_size))
    many = 4 * sum(map(len, by_axes.values())) > len(facts)  # tools.check suggests a patch that leaves a quarter so
    advice = "Take a smaller --patch-size." if many else "They are a quarter of the scans at most."
    return [
        Finding(
            "warning" if many else "note",
            tuple(x.case.name for x in small),
            f"smaller than the patch {patch} along {', '.join(axes)} (the smallest is "
            f"{'x'.join(str(min(sides)) for sides in zip(*(x.shape for x in small), strict=True))}"
            f"{f' before --downsample {downsample}' if downsample > 1 else ''}), so their crops are filled up with "
            f"zeros. {advice}",
        )
        for axes, small in by_axes.items()
    ]


def _labels(facts: Sequence[Facts]) -> list[Finding]:
    empty = tuple(x.case.name for x in facts if x.voxels == {})
    if not empty:
        return []
    text = "the label is empty. If there is an object in the scan, fix the label or take the case out of the lists."
    return [Finding("warning", empty, text)]


def duplicates(facts: Sequence[Facts], test: Sequence[str] = (), validation: Sequence[str] = ()) -> list[Finding]:
    """Findings about images that occur under several names, also turned or rounded.

    A pair of cases from two of training, test and validation is an error, others are warnings.
    """
    findings = []
    uses = {**dict.fromkeys(test, "to test on"), **dict.fromkeys(validation, "to validate on")}
    for group in groups([x.fingerprint for x in facts]):
        names = tuple(facts[i].case.name for i in group)
        equal = len({facts[i].fingerprint[:DIGITS] for i in group}) == 1
        used = sorted({uses.get(name, "to train on") for name in names}, reverse=True)
        same = "the same image" if equal else "the same image, but for its direction, scale or rounding,"
        leak = f"{' and '.join(used)}: figures of such a test mean nothing"
        so = leak if len(used) > 1 else "which then counts as often"
        text = f"{same} under several names, {so}. Keep one of them in the lists."
        findings.append(Finding("error" if len(used) > 1 else "warning", names, text))
    return findings


def absent_classes(group: str, voxels: Sequence[Mapping[int, int]], classes: int) -> dict[int, str]:
    """Class -> a sentence about it, for each class that no case of a group (training, test or validation) has. `voxels`
    are, for each of its labels, class -> voxels; empty labels do not count.
    """
    shown = {c for counts in voxels for c in counts}
    what = "scored" if group in ("test", "validation") else "learned"
    text = f"no {group} case has class {{}}, so that it cannot be {what}. See --classes and the order of the list."
    return {c: text.format(c) for c in range(1, classes + 1) if shown and c not in shown}


def warnings_of(facts: Sequence[Facts], *, patch_size: Sequence[int], downsample: int, normalize: str) -> list[str]:
    """Warning lines for the start of a training."""
    facts = [with_spacing(x) for x in facts]
    findings = findings_of(facts, patch_size=patch_size, downsample=downsample, normalize=normalize)
    voxels = [x.voxels for x in facts if x.voxels is not None]
    texts = absent_classes("labeled training", voxels, facts[0].case.classes)
    findings += [Finding("warning", (), text) for text in texts.values()]
    return [f"warning: {finding}" for finding in findings + duplicates(facts) if finding.level == "warning"]


def memory_gib(facts: Sequence[Facts]) -> float:
    """Memory of all volumes in GiB: float32 images and uint8 labels."""
    return sum((4 * x.channels + 1) * math.prod(x.shape) for x in facts) / GIB


def _range(values: Sequence[float] | NDArray) -> str:
    low, high = min(values), max(values)
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"
