"""Makes a data set of h5 cases from scans in NIfTI, NRRD or MetaImage.

    python -m tools.convert --source scans --out data/mine --spacing 1 1 1
    python -m tools.convert --source scans.csv --out data/mine --labels 1 3 --workers 4
    python -m tools.convert --source "Training Set" --out data/la      the folders of the 2018 atrial challenge

What --source may be:

    FOLDER/images/NAME.nii.gz and FOLDER/labels/NAME.nii.gz       the same names; a scan without label is unlabeled
    FOLDER/imagesTr/NAME.nii.gz, labelsTr, imagesTs               of the Medical Segmentation Decathlon
    FOLDER/imagesTr/NAME_0000.nii.gz, labelsTr/NAME.nii.gz        of nnU-Net; imagesTs and labelsTs, if that is there,
                                                                  become the test cases
    FOLDER/NAME/image.nii.gz and FOLDER/NAME/label.nii.gz
    FOLDER/NAME/lgemri.nrrd and FOLDER/NAME/laendo.nrrd           the challenge's folders
    FILE.csv with the columns image and, if wanted, label, split (train, test), name; paths are from the CSV's folder

The axes of each scan are brought to RAS, those of the challenge's folders stay as the published LA set has them. It is
normalised to zero mean and unit variance over all its voxels, then resampled, then cropped. --out gets
NAME/mri_norm2.h5, train.list, the labeled cases first, test.list, and dataset.json, which tells the classes' names and
which cases were ever listed. What is there already is left alone, so the same command goes on where it was stopped;
what was made from another file or with other options is refused.

A set can grow: the lists keep their lines, whatever order they were brought to, and no case goes from one to the other.
New labeled cases are added behind the labeled ones that train.list begins with, new unlabeled ones at its end, new test
cases at the end of test.list.
"""

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from skimage.filters import threshold_otsu
from tqdm import tqdm

from dataloaders.cases import FILE_NAME, LA_SPLITS, UNTOLD, CaseError, case_file, read_list
from dataloaders.class_names import DATASET, class_names
from dataloaders.images import (
    INTERPOLATORS,
    Geometry,
    grid_of_spacing,
    moved,
    normalise,
    read_image,
    read_label,
    resample,
    same_grid,
)
from dataloaders.orientation import RAS, orientation_of, turn_to
from tools.growing import SPLITS, Before, grown, labeled_of, listed_in, read_before, write_set
from tools.sources import IMAGES_TS, Found, Source, choose_split, count_to_test, find_sources, shown
from utils.errors import UserError, ignore_stop_signals, run
from utils.masks import box_of
from utils.options import Parser, fill, option

VERSION = 1  # of what is done to a scan; written into every case
CROPS = ("label", "label-xy", "foreground", "none")
MARGINS = ((10, 19), (10, 19), (5, 9))  # voxels beyond the label along x, y, z, drawn for each side
SMALLEST = (112, 112, 80)  # sides of a crop around a label, where the scan has as much
CHUNK = 32


@dataclasses.dataclass
class Options:
    source: str = option("", "folder of the scans, or a CSV that lists them", group="what")
    out: str = option("", "folder of the data set", group="what")
    spacing: list[float] | None = option(
        None, "mm along the axes of RAS to resample to (default each scan's own)", type=float, nargs=3, minimum=1e-3
    )
    interpolation: str = option("linear", "of the intensities", choices=[k for k in INTERPOLATORS if k != "nearest"])
    labels: list[int] | None = option(
        None,
        "values of the labels that become 1, 2, ..., all others 0 (default as they are; 255 alone becomes 1)",
        type=int,
        nargs="+",
        minimum=1,
    )
    crop: str = option(
        "",
        "label: box of the label with a random margin at each side, 10 to 19 voxels along x and y, 5 to 9 along z, and "
        "at least 112 112 80 in all; label-xy: the same, all slices kept; foreground: box of what is brighter than "
        "Otsu's threshold; none. New patients have no label to crop around (default label-xy, as the LA set is "
        "published, for the challenge's folders, else none)",
        choices=CROPS,
    )
    test_share: float | None = option(
        None,
        "share of the labeled cases for test.list (default what the source tells, the published lists for the "
        "challenge's, else 0.2)",
        type=float,
        minimum=0,
        maximum=1,
    )
    images_ts: str = option(
        "",
        "scans of imagesTs that have no label: train on them without one, or leave them out (default leave where "
        "labelsTs has labels of others of them, else unlabeled)",
        choices=IMAGES_TS,
    )
    seed: int = option(1337, "of margins and of the choice of test cases, with each case's name", minimum=0)
    workers: int = option(1, "processes; their number changes nothing in the files", minimum=1)


# -- one case --


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker needs to know to make one case."""

    scan: Source
    path: Path
    crop: str
    spacing: tuple[float, ...] | None
    interpolation: str
    labels: tuple[int, ...] | None
    seed: int
    orientation: str | None = RAS
    """What the axes are brought to; None leaves them as they are stored."""

    @property
    def settings(self) -> str:
        """What decides, beside the files, what the case holds."""
        kept = {
            key: getattr(self, key) for key in ("crop", "spacing", "interpolation", "labels", "seed", "orientation")
        }
        return json.dumps({"version": VERSION, **kept})


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one scan: `status` is 'converted', 'labeled' if it was there without its label, 'there', 'kept' if
    it was there and the source does not have it, or, for the reason `why`, 'refused'."""

    name: str
    status: str
    why: str = ""
    values: tuple[int, ...] = ()
    orientation: str = ""


def convert_case(job: Job) -> Outcome:
    """Makes the case unless it is there; what is wrong with the scan is told, not raised."""
    try:
        sources = {"source_image": job.scan.image.name, "source_image_sha256": sha256(job.scan.image)}
        if job.scan.label is not None:
            sources |= {"source_label": job.scan.label.name, "source_label_sha256": sha256(job.scan.label)}
        there = job.path.exists()
        if there and (known := _refuse_other(job, sources)):
            return Outcome(job.scan.name, "there", **known)
        image, label, about = make_case(job)
        values = () if label is None else tuple(int(v) for v in np.unique(label) if v)
        about |= {**sources, "settings": job.settings, "values": np.array(values, np.int64)}
        write_case(job.path, image, label, about)
        status = "labeled" if there else "converted"
        return Outcome(job.scan.name, status, values=values, orientation=_orientation(about))
    except CaseError as e:
        return Outcome(job.scan.name, "refused", str(e))


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise CaseError(f"{path} cannot be read ({e.strerror})") from e


def _refuse_other(job: Job, sources: dict[str, str]) -> dict[str, Any]:
    """What is known of a case that is there; nothing if it has to be made anew, as it was made without its label.

    Raises:
        CaseError: it was not made from these sources in this way.
    """
    about = _about(job.path)
    names = ("source_image", "source_image_sha256", "source_label", "source_label_sha256")
    before = {**{name: about.get(name) for name in names}, **json.loads(about.get("settings", "{}"))}
    now = {**{name: sources.get(name) for name in names}, **json.loads(job.settings)}
    other = [name for name in now if before.get(name) != now[name]]
    if other == ["source_label", "source_label_sha256"] and before["source_label"] is None:
        return {}
    differ = [f"{name}: {before.get(name)} before, {now[name]} now" for name in other]
    if differ:
        raise CaseError(
            f"{job.path} was made from something else or in another way ({'; '.join(differ)}). Move it away, or choose "
            "another --out"
        )
    return {"values": tuple(map(int, about["values"])), "orientation": _orientation(about)}


def _about(path: Path) -> dict[str, Any]:
    """The attributes of a case file."""
    try:
        with h5py.File(path, "r") as f:
            return dict(f.attrs)
    except Exception as e:  # as in read_case
        raise CaseError(f"{path} is there and is no whole h5 file. Move it away") from e


def _orientation(about: dict[str, Any]) -> str:
    return orientation_of(about["direction"]) if "direction" in about else "unknown"


def make_case(job: Job) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None, dict[str, Any]]:
    """image float32 (W,H,D), label uint8 (W,H,D) or None, and the attributes: the geometry, and how they came about.

    Raises:
        CaseError: what is wrong with the scan or its label, or that there is none to crop around.
    """
    stored, stored_geometry = _of(job.scan.image, read_image)
    turn = turn_to(job.orientation, stored_geometry.get("direction"))
    source, told = turn(stored), turn.geometry(stored_geometry, stored.shape)
    geometry = {**UNTOLD, **told}
    label: NDArray | None = None
    if job.scan.label is not None:
        stored_label, label_told = _of(job.scan.label, read_label)
        turn = turn_to(job.orientation, label_told.get("direction"))
        where = f"{_told(stored_label.shape, label_told)} where the scan has {_told(stored.shape, stored_geometry)}"
        found, label_geometry = turn(stored_label), {**UNTOLD, **turn.geometry(label_told, stored_label.shape)}
        if not same_grid(source.shape, geometry, found.shape, label_geometry):
            raise CaseError(
                f"{job.scan.label} lies on another grid than {job.scan.image}: {where}. "
                + _advice(stored.shape, stored_geometry, stored_label.shape, label_told)
            )
        label = map_labels(found, job.labels)
    image, mean, sd = normalise(source)
    if job.spacing is not None and "spacing" not in told:
        raise CaseError(
            f"{job.scan.image} does not tell the size of its voxels. Write it into the file, or leave out --spacing"
        )
    shape, grid = grid_of_spacing(source.shape, geometry, job.spacing)
    about: dict[str, Any] = {f"source_{key}": value for key, value in stored_geometry.items()}
    about |= {"source_size": stored.shape, "mean": mean, "sd": sd}
    if grid is not geometry:
        here = {
            **UNTOLD,
            "spacing": geometry["spacing"],
        }  # not the place in mm, whose rounding hangs on how it is stored
        there = grid_of_spacing(source.shape, here, job.spacing)[1]
        image = resample(image, here, shape, there, job.interpolation)
        label = None if label is None else resample(label, here, shape, there, "nearest")
    box, margins = crop_box(image, label, job)
    corner = [s.start for s in box]
    kept = {key: value for key, value in moved(grid, corner).items() if key in told}
    about |= {"crop": job.crop, "crop_corner": corner, "crop_margins": margins, **kept}
    if (image := image[box]).min() == image.max():
        raise CaseError("is constant within the crop")
    return image, None if label is None else label[box], about


def _of(path: Path, read: Any) -> Any:
    try:
        return read(path)
    except CaseError as e:
        raise CaseError(f"{path} {e}") from e


def _told(shape: Sequence[int], geometry: Geometry) -> str:
    parts = [f"{key} {' '.join(f'{v:g}' for v in values)}" for key, values in geometry.items()]
    return ", ".join([f"{shape} voxels", *parts])


def _advice(shape: Sequence[int], geometry: Geometry, label_shape: Sequence[int], label_geometry: Geometry) -> str:
    """What to do about a label on another grid than its scan's, both as they are stored.

    A label that was saved without its scan's affine has no place of its own, and resampling would move it.
    """

    def nowhere(geometry: Geometry) -> bool:
        straight = [np.diag(axes).ravel().tolist() for axes in ((1.0, 1.0, 1.0), (-1.0, -1.0, 1.0))]  # LPS and RAS
        return not any(geometry.get("origin", ())) and list(geometry.get("direction", straight[0])) in straight

    for what, one, other in (("label", label_geometry, geometry), ("scan", geometry, label_geometry)):
        if nowhere(one) and not nowhere(other):
            why = f"The {what} has no place of its own, as if it was saved without its affine, "
            if tuple(shape) == tuple(label_shape):
                return f"{why}so do not resample the label: that would move it. Give the {what} the other's affine"
            if sorted(shape) == sorted(label_shape):
                return f"{why}and its axes are in another order. Save it again with the other's axes and affine"
            return f"{why}and other voxels. Do not resample it: save it again as it lay on the other"
    same = tuple(shape) == tuple(label_shape)
    drawn = ", or, if it was drawn on these very voxels, give it the scan's affine" if same else ""
    return f"Resample the label onto the scan{drawn}"


def map_labels(label: NDArray[np.integer], labels: Sequence[int] | None) -> NDArray[np.uint8]:
    """The given values -> 1, 2, ..., all others -> 0; without any, values stay, but where 255 is the only one, it is 1.

    Raises:
        CaseError: values above 255, or 255 beside others, where none are named.
    """
    if labels is not None:
        mapped = np.zeros(label.shape, np.uint8)
        for number, value in enumerate(labels, 1):
            mapped[label == value] = number
        return mapped
    values = np.unique(label)
    if set(values) <= {0, 255}:
        return (label > 0).astype(np.uint8)
    if values[-1] >= 255:
        raise CaseError(f"has the label values {' '.join(map(str, values[:9]))}. Name those you mean by --labels")
    return label.astype(np.uint8)


def crop_box(
    image: NDArray[np.float32], label: NDArray[np.uint8] | None, job: Job
) -> tuple[tuple[slice, slice, slice], list[int]]:
    """The box to keep, and the margins before and after x, y, z that were drawn for it."""
    if job.crop == "none":
        return tuple(slice(0, side) for side in image.shape), [0] * 6  # type: ignore[return-value]
    if job.crop == "foreground":
        return tuple(slice(s.start, s.stop) for s in box_of(image > threshold_otsu(image))), [0] * 6  # type: ignore[return-value]
    if label is None or not label.any():
        what = "no label" if label is None else "an empty label"
        raise CaseError(f"has {what} to crop around. Use --crop foreground or --crop none")
    number = int.from_bytes(hashlib.sha256(job.scan.name.encode()).digest()[:8])
    draw = np.random.default_rng([job.seed, number])
    margins = [int(draw.integers(low, high + 1)) for low, high in MARGINS for _ in range(2)]
    box = []
    for axis, s in enumerate(box_of(label > 0)):
        side = image.shape[axis]
        missing = max(SMALLEST[axis] - (s.stop - s.start), 0)
        start = max(s.start - margins[2 * axis] - missing // 2, 0)
        stop = min(s.stop + margins[2 * axis + 1] + (missing + 1) // 2, side)
        short = max(SMALLEST[axis] - (stop - start), 0)  # the scan's edge was in the way: more at the other side
        start, stop = max(start - short, 0), min(stop + short, side)
        box.append(slice(0, side) if axis == 2 and job.crop == "label-xy" else slice(start, stop))
    return tuple(box), margins  # type: ignore[return-value]


def write_case(path: Path, image: NDArray, label: NDArray | None, about: dict[str, Any]) -> None:
    """Writes an h5 case in compressed chunks of 32^3, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(partial, "w") as f:
            for name, values in (("image", image), ("label", label)):
                if values is None:
                    continue
                chunks = tuple(min(CHUNK, side) for side in values.shape)
                f.create_dataset(name, data=values, chunks=chunks, compression="gzip", shuffle=True)
            f.attrs.update(about)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:  # h5py raises either for a full disk
        why = getattr(e, "strerror", None) or str(e)
        raise UserError(f"cannot write {path}: {why}. Mend that; the same command then goes on.") from e
    finally:
        if partial.parent.is_dir():
            partial.unlink(missing_ok=True)


# -- the set --


def keep(out: Path, before: Before, here: Container[str], settings: str) -> list[Outcome]:
    """Of the cases of the lists those that the source does not have: they stay as they are.

    Raises:
        UserError: they are not there either, or were made with other settings.
    """
    kept = []
    gone = [(name, which) for which in SPLITS for name in getattr(before, which) if name not in here]
    for name, split in gone:
        path = case_file(out, name)
        if path is None:
            raise UserError(
                f"{out / split}.list names {name}, which this command would not put there: neither the source nor "
                f"{out} has it. Take it out, move the list away, or choose another --out."
            )
        try:
            about = _about(path)
        except CaseError as e:
            raise UserError(f"{e}, or take {name} out of {split}.list.") from e
        now = json.loads(settings)
        then = json.loads(about.get("settings", settings))  # what was not converted here tells none
        differ = [f"{key}: {then.get(key)} before, {now[key]} now" for key in now if then.get(key) != now[key]]
        if differ:
            raise UserError(
                f"{path}, which the source does not have, was made in another way ({'; '.join(differ)}). A set is made "
                "in one way: choose another --out."
            )
        kept.append(Outcome(name, "kept", values=tuple(map(int, about.get("values", ())))))
    return kept


def named(found: dict[int, str], labels: Sequence[int] | None, out: Path) -> dict[int, str]:
    """Class -> its name: from the names of the label values that were found, and those that the set has.

    Raises:
        UserError: the two differ, or voxels are to be ignored.
    """
    if labels is not None:
        classes = {c: found[value] for c, value in enumerate(labels, 1) if value in found}
    elif "ignore" in found.values():
        raise UserError(
            f"{DATASET} tells of voxels to ignore, and every voxel is learned from here. Name the values that are "
            "classes by --labels; all others become background."
        )
    else:
        classes = {1: found[255]} if list(found) == [255] else found
    before = class_names(out)
    differ = [f"{c} is {before[c]} there, {classes[c]} now" for c in classes if before.get(c, classes[c]) != classes[c]]
    if differ:
        raise UserError(f"{out} has other classes: {'; '.join(differ)}. Choose another --out.")
    return dict(sorted((before | classes).items()))


def refuse_absent(labels: Sequence[int], scans: Sequence[Source], kept: Sequence[Outcome]) -> None:
    """Raises UserError if one of the values of --labels is in no label; reads labels until each was seen."""
    missing = set(labels) - {labels[c - 1] for outcome in kept for c in outcome.values if c <= len(labels)}
    seen: set[int] = set()
    for scan in scans:
        if missing and scan.label is not None:
            with contextlib.suppress(CaseError):  # of which the conversion tells
                seen |= {int(value) for value in np.unique(read_label(scan.label)[0]) if value}
                missing -= seen
    if missing:
        raise UserError(
            f"--labels {' '.join(map(str, sorted(missing)))}: no label holds that. They hold "
            f"{' '.join(map(str, sorted(seen))) or 'nothing but 0'}."
        )


def outcomes_of(jobs: Sequence[Job], workers: int) -> Iterator[Outcome]:
    """What became of each job, in order; several processes if asked for.

    Raises:
        UserError: one of them was killed.
    """
    if workers == 1:
        yield from map(convert_case, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_alone) as pool:
        try:
            yield from pool.map(convert_case, jobs)
        except BrokenProcessPool as e:
            raise UserError(
                "a process that converted scans was killed, as if memory ran out. Give fewer --workers; what is done "
                "is left alone."
            ) from e
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _alone() -> None:
    """A worker keeps to one core, and leaves Ctrl-C to the main process."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    ignore_stop_signals()


def summary(
    outcomes: Sequence[Outcome], lists: dict[str, list[str]], labeled: Container[str], names: dict[int, str]
) -> list[str]:
    """What was made, in a few lines."""
    counts = Counter(outcome.status for outcome in outcomes)
    parts = [f"{counts['converted']} converted, {counts['there']} already there, {counts['refused']} refused"]
    parts += [f"{counts['labeled']} made again with the label that they now have"] if counts["labeled"] else []
    parts += [f"{counts['kept']} kept that the source does not have"] if counts["kept"] else []
    lines = [", ".join(parts)]
    train = [name in labeled for name in lists["train"]]
    first = next((i for i, has_label in enumerate(train) if not has_label), len(train))
    lines.append(f"train.list: {first} labeled, then {len(train) - first} unlabeled; test.list: {len(lists['test'])}")
    if later := sum(train[first:]):
        lines.append(f"{later} of those unlabeled ones have a label, but stand behind one that has none")
    values = Counter(value for outcome in outcomes for value in outcome.values)
    lines.append("label values: " + ", ".join(f"{v} in {n} cases" for v, n in sorted(values.items())))
    if names:
        lines.append("classes: " + ", ".join(f"{c} {name}" for c, name in names.items()))
        lines += [f"class {c}, {name}, is in no label" for c, name in names.items() if c not in values]
        lines += [f"class {c} has no name in {DATASET}" for c in sorted(values) if c not in names]
    if max(values, default=1) > 1:
        lines.append(f"train on all of them with --classes {max(values)}, or keep some with --labels")
    orientations = Counter(outcome.orientation for outcome in outcomes if outcome.orientation)
    if len(orientations) > 1:
        told = ", ".join(f"{code} in {n} cases" for code, n in sorted(orientations.items()))
        lines.append(f"orientations differ: {told}. A network sees the axes as they are stored; is this meant?")
    elif "unknown" in orientations:
        lines.append("no file tells where its axes point; they are kept as they are stored")
    return lines


def remarks(found: Found, lists: dict[str, list[str]], before: Before, share: float | None, source: Path) -> list[str]:
    """What the source holds besides, and where the lists are not what could be expected."""
    lines = []
    if found.unread:
        lines.append(f"not read: {shown(found.unread, source)}")
    for what, names in (
        (f"listed in {DATASET}, but scan or label is not there", found.absent),
        ("taken out of the lists by hand, and so left out", sorted(before.taken_out)),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            lines.append(f"{what}: {', '.join(names[:5])}{more}")
    known = (before.labeled | {scan.name for scan in found.scans if scan.label is not None}) - before.taken_out
    if share is not None and before.test and (asked := count_to_test(len(known), share)) != len(lists["test"]):
        lines.append(f"--test-share {share:g} asks for {asked} test cases; no case goes from one list to the other")
    published = [name for name in read_list(LA_SPLITS / "train.list") if name in set(lists["train"])]
    if found.challenge and set(lists["train"]) == set(published) and lists["train"] != published:
        lines.append(
            "train.list is in another order than the published one, so its first 16 are others. For the published "
            "order move both lists away and convert again"
        )
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, prog="python -m tools.convert")
    parser.add_dataclass(Options)
    o: Options = fill(Options, parser.parse(argv))
    if not o.source or not o.out:
        raise UserError(f"--{'source' if not o.source else 'out'} is missing. See --help.")
    if o.labels is not None and len(set(o.labels)) < len(o.labels):
        raise UserError("--labels names a value twice. Name each once.")
    out = Path(o.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file. Give a folder.")

    # what there is, and what it is to become
    found = find_sources(Path(o.source), o.images_ts)
    scans, before = found.scans, read_before(out)
    crop = o.crop or ("label-xy" if found.challenge else "none")
    spacing = None if o.spacing is None else tuple(o.spacing)
    labels = None if o.labels is None else tuple(o.labels)
    jobs = [
        Job(
            scan, out / scan.name / FILE_NAME, crop, spacing, o.interpolation, labels, o.seed,
            orientation=None if found.challenge else RAS,  # the published LA files have the challenge's own axes
        )
        for scan in scans
    ]  # fmt: skip
    kept = keep(out, before, {scan.name for scan in scans}, jobs[0].settings)
    train, test = choose_split(scans, challenge=found.challenge, share=o.test_share, seed=o.seed, before=before)
    without = [scan.name for scan in scans if scan.name in test and scan.label is None]
    if without:
        raise UserError(f"{', '.join(without[:5])} cannot be tested on without label. Add it, or make it a train case.")
    names = named(found.names, labels, out)
    if labels is not None:
        refuse_absent(labels, scans, kept)
    if found.left_out:
        print(
            f"left out: {len(found.left_out)} scans of imagesTs without label; predict.py is for those, or train on "
            "them with --images-ts unlabeled.",
            file=sys.stderr,
        )

    # the cases, and the lists of those that were not refused
    outcomes = list(tqdm(outcomes_of(jobs, o.workers), total=len(jobs), unit="scan", disable=not sys.stderr.isatty()))
    refused = {outcome.name: outcome.why for outcome in outcomes if outcome.status == "refused"}
    train, test = ([name for name in new if name not in refused] for new in (train, test))
    labeled = labeled_of(out, [*before.train, *before.test, *train, *test])
    lists = grown(before, train, test, labeled=labeled, listed=listed_in(out))
    if lists["train"] and lists["test"]:
        write_set(out, lists, labeled, names)
        lines = summary([*outcomes, *kept], lists, labeled, names)
        print("\n".join(lines + remarks(found, lists, before, o.test_share, Path(o.source))))
    if refused:
        listing = "\n".join(f"  {name}: {why}" for name, why in refused.items())
        raise UserError(f"{len(refused)} of {len(scans)} scans were refused, the others are in {out}:\n{listing}")


if __name__ == "__main__":
    run(main)
