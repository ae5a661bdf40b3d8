"""Makes a data set of h5 cases from scans in NIfTI, NRRD or MetaImage.

    python -m dataloaders.convert --source scans --out data/mine --spacing 1 1 1
    python -m dataloaders.convert --source scans.csv --out data/mine --labels 1 3 --workers 4
    python -m dataloaders.convert --source "Training Set" --out data/la      the folders of the 2018 atrial challenge

What --source may be:

    FOLDER/images/NAME.nii.gz and FOLDER/labels/NAME.nii.gz       the same names; a scan without label is unlabeled
    FOLDER/imagesTr/NAME_0000.nii.gz, labelsTr/NAME.nii.gz        imagesTs and labelsTs become the test cases
    FOLDER/NAME/image.nii.gz and FOLDER/NAME/label.nii.gz
    FOLDER/NAME/lgemri.nrrd and FOLDER/NAME/laendo.nrrd           the challenge's folders
    FILE.csv with the columns image and, if wanted, label, split (train, test), name; paths are from the CSV's folder

The axes of each scan are brought to RAS, those of the challenge's folders stay as the published LA set has them. It is
normalised to zero mean and unit variance over all its voxels, then resampled, then cropped. --out gets
NAME/mri_norm2.h5, train.list, the labeled cases first, and test.list. What is there already is left alone, so the same
command goes on where it was stopped; what was made from another file or with other options is refused.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
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

from dataloaders.cases import FILE_NAME, UNTOLD, CaseError, read_list
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
from dataloaders.sources import Source, choose_split, find_sources
from utils.checkpoint import write_whole
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
    """What became of one scan: `status` is 'converted', 'there' or, for the reason `why`, 'refused'."""

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
        if job.path.exists():
            return Outcome(job.scan.name, "there", **_refuse_other(job, sources))
        image, label, about = make_case(job)
        values = () if label is None else tuple(int(v) for v in np.unique(label) if v)
        about |= {**sources, "settings": job.settings, "values": np.array(values, np.int64)}
        write_case(job.path, image, label, about)
        return Outcome(job.scan.name, "converted", values=values, orientation=_orientation(about))
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
    """What is known of a case that is there; CaseError if it was not made from these sources in this way."""
    try:
        with h5py.File(job.path, "r") as f:
            about = dict(f.attrs)
    except Exception as e:  # as in read_case
        raise CaseError(f"{job.path} is there and is no whole h5 file. Move it away") from e
    names = ("source_image", "source_image_sha256", "source_label", "source_label_sha256")
    before = {**{name: about.get(name) for name in names}, **json.loads(about.get("settings", "{}"))}
    now = {**{name: sources.get(name) for name in names}, **json.loads(job.settings)}
    differ = [f"{name}: {before.get(name)} before, {now[name]} now" for name in now if before.get(name) != now[name]]
    if differ:
        raise CaseError(
            f"{job.path} was made from something else or in another way ({'; '.join(differ)}). Move it away, or choose "
            "another --out"
        )
    return {"values": tuple(map(int, about["values"])), "orientation": _orientation(about)}


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
        found, label_told = _of(job.scan.label, read_label)
        turn = turn_to(job.orientation, label_told.get("direction"))
        shown = f"{_told(found.shape, label_told)} where the scan has {_told(stored.shape, stored_geometry)}"
        found, label_geometry = turn(found), {**UNTOLD, **turn.geometry(label_told, found.shape)}
        if not same_grid(source.shape, geometry, found.shape, label_geometry):
            raise CaseError(
                f"{job.scan.label} lies on another grid than {job.scan.image}: {shown}. "
                "Resample the label onto the scan"
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


def write_lists(out: Path, lists: dict[str, list[str]]) -> None:
    """Writes train.list and test.list; lists that are there may gain cases, and nothing else.

    Raises:
        UserError: lists that are there name a case that is none of these, or in the other list.
    """
    for split, names in lists.items():
        path = out / f"{split}.list"
        gone = [name for name in read_list(path) if name not in names] if path.exists() else []
        if gone:
            raise UserError(
                f"{path} names {', '.join(gone[:5])}, which this command would not put there. Move it away, or choose "
                "another --out."
            )
    for split, names in lists.items():
        write_whole(out / f"{split}.list", "".join(f"{name}\n" for name in names).encode())


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


def summary(outcomes: Iterable[Outcome], lists: dict[str, list[str]], labeled: set[str]) -> str:
    """What was made, in a few lines."""
    counts = Counter(outcome.status for outcome in outcomes)
    lines = [f"{counts['converted']} converted, {counts['there']} already there, {counts['refused']} refused"]
    train = lists["train"]
    first = sum(name in labeled for name in train)
    lines.append(f"train.list: {first} labeled, then {len(train) - first} unlabeled; test.list: {len(lists['test'])}")
    values = Counter(value for outcome in outcomes for value in outcome.values)
    lines.append("label values: " + ", ".join(f"{v} in {n} cases" for v, n in sorted(values.items())))
    if max(values, default=1) > 1:
        lines.append(f"train on all of them with --classes {max(values)}, or keep some with --labels")
    orientations = Counter(outcome.orientation for outcome in outcomes if outcome.orientation)
    if len(orientations) > 1:
        shown = ", ".join(f"{code} in {n} cases" for code, n in sorted(orientations.items()))
        lines.append(f"orientations differ: {shown}. A network sees the axes as they are stored; is this meant?")
    elif "unknown" in orientations:
        lines.append("no file tells where its axes point; they are kept as they are stored")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, prog="python -m dataloaders.convert")
    parser.add_dataclass(Options)
    o: Options = fill(Options, parser.parse(argv))
    if not o.source or not o.out:
        raise UserError(f"--{'source' if not o.source else 'out'} is missing. See --help.")
    if o.labels is not None and len(set(o.labels)) < len(o.labels):
        raise UserError("--labels names a value twice. Name each once.")
    out = Path(o.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file. Give a folder.")
    scans, challenge = find_sources(Path(o.source))
    crop = o.crop or ("label-xy" if challenge else "none")
    lists = dict(
        zip(("train", "test"), choose_split(scans, challenge=challenge, share=o.test_share, seed=o.seed), strict=True)
    )
    without = [scan.name for scan in scans if scan.name in lists["test"] and scan.label is None]
    if without:
        raise UserError(f"{', '.join(without[:5])} cannot be tested on without label. Add it, or make it a train case.")

    spacing = None if o.spacing is None else tuple(o.spacing)
    labels = None if o.labels is None else tuple(o.labels)
    jobs = [
        Job(
            scan, out / scan.name / FILE_NAME, crop, spacing, o.interpolation, labels, o.seed,
            orientation=None if challenge else RAS,  # the published LA files have the challenge's own axes
        )
        for scan in scans
    ]  # fmt: skip
    outcomes = list(tqdm(outcomes_of(jobs, o.workers), total=len(jobs), unit="scan", disable=not sys.stderr.isatty()))
    refused = {outcome.name: outcome.why for outcome in outcomes if outcome.status == "refused"}
    made = {job.scan.name for job in jobs if job.scan.name not in refused or job.path.exists()}
    lists = {split: [name for name in names if name in made] for split, names in lists.items()}
    if lists["train"] and lists["test"]:
        write_lists(out, lists)
        print(summary(outcomes, lists, {scan.name for scan in scans if scan.label is not None}))
    if refused:
        listing = "\n".join(f"  {name}: {why}" for name, why in refused.items())
        raise UserError(f"{len(refused)} of {len(scans)} scans were refused, the others are in {out}:\n{listing}")


if __name__ == "__main__":
    run(main)
