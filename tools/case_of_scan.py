"""One scan and its label, as NIfTI, NRRD or MetaImage, to one h5 case: oriented, normalised, resampled and cropped."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from skimage.filters import threshold_otsu

from dataloaders.cases import CaseError, refuse_channels
from dataloaders.channels import described, read_channels, z_score_channels
from dataloaders.geometry import DEFAULT_GEOMETRY, complete_geometry
from dataloaders.images import Geometry, ending_of, grid_of_spacing, moved, read_image, read_label, resample, same_grid
from dataloaders.orientation import RAS, orientation_of, turn_to
from tools.sources import Source
from utils.channels import each_channel, with_channels
from utils.checkpoint import whole
from utils.masks import box_of
from utils.text import some

VERSION = 1  # of what is done to a scan; written into every case
CROPS = ("label", "label-xy", "foreground", "none")
MARGINS = ((10, 19), (10, 19), (5, 9))  # voxels beyond the label along x, y, z, drawn for each side
SMALLEST = (112, 112, 80)  # sides of a crop around a label, where the scan has as much
CHUNK = 32
OPTIONAL = ("channels", "margin")  # settings of a case that are written only where they are not the usual ones


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker needs to know to make one case."""

    scan: Source
    path: Path
    crop: str
    spacing: tuple[float, ...] | None
    interpolation: str
    labels: tuple[int | tuple[int, ...], ...] | None
    """For each class the value, or values, that it has in the labels; None: as they are."""
    seed: int
    orientation: str | None = RAS
    """What the axes are brought to; None leaves them as they are stored."""
    channels: tuple[str, ...] = ("",)
    """Names of the channels."""
    margin: int | None = None
    """Voxels around the label at each side; None: drawn from MARGINS, and at least SMALLEST in all."""

    @property
    def settings(self) -> str:
        """The settings that decide, together with the files, what the case holds."""
        kept = {
            key: getattr(self, key) for key in ("crop", "spacing", "interpolation", "labels", "seed", "orientation")
        }
        several = {"channels": self.channels} if len(self.channels) > 1 else {}
        margin = {"margin": self.margin} if self.margin is not None else {}
        return json.dumps({"version": VERSION, **kept, **several, **margin})


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
    """Makes the case unless it exists. Reports a problem of the scan in the outcome and raises nothing."""
    try:
        images = job.scan.images
        sources = {"source_image": " ".join(path.name for path in images)}
        sources |= {"source_image_sha256": " ".join(map(sha256, images))}
        if job.scan.label is not None:
            sources |= {"source_label": job.scan.label.name, "source_label_sha256": sha256(job.scan.label)}
        there = job.path.exists()
        if there and (existing := _refuse_other(job, sources)):
            return Outcome(job.scan.name, "there", **existing)
        image, label, about = make_case(job)
        values = () if label is None else tuple(int(v) for v in np.unique(label) if v)
        about |= {**sources, "settings": job.settings, "values": np.array(values, np.int64)}
        write_case(job.path, image, label, about)
        status = "labeled" if there else "converted"
        return Outcome(job.scan.name, status, values=values, orientation=_orientation(about))
    except CaseError as e:
        return Outcome(job.scan.name, "refused", str(e))


def sha256(path: Path) -> str:
    """SHA-256, in hexadecimal, of a file, and of a .mhd with its voxels, which other files hold."""
    try:
        with open(path, "rb") as f:
            digest = hashlib.file_digest(f, "sha256")
    except OSError as e:
        raise CaseError(f"{path} cannot be read ({e.strerror})") from e
    if ending_of(path) == ".mhd":
        digest.update(_of(path, read_image)[0])
    return digest.hexdigest()


def _refuse_other(job: Job, sources: dict[str, str]) -> dict[str, Any]:
    """What an existing case holds; nothing if it must be made again because it was made without its label.

    Raises:
        CaseError: it was not made from these sources in this way.
    """
    about = attributes_of(job.path)
    names = ("source_image", "source_image_sha256", "source_label", "source_label_sha256")
    before = {**{name: about.get(name) for name in names}, **json.loads(about.get("settings", "{}"))}
    now = {**{name: sources.get(name) for name in names}, **json.loads(job.settings)}
    differ = differences(before, now)
    if [*differ] == ["source_label", "source_label_sha256"] and before["source_label"] is None:
        return {}
    if differ:
        raise CaseError(
            f"{job.path} was made from something else or in another way ({'; '.join(differ.values())}). Move it away, "
            "or choose another --out"
        )
    return {"values": tuple(map(int, about["values"])), "orientation": _orientation(about)}


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Setting -> what it was and what it is, of those that differ."""
    names = [name for name in {**now, **dict.fromkeys(OPTIONAL)} if before.get(name) != now.get(name)]
    return {name: f"{name}: {before.get(name)} before, {now.get(name)} now" for name in names}


def attributes_of(path: Path) -> dict[str, Any]:
    """The attributes of a case file."""
    try:
        with h5py.File(path, "r") as f:
            return dict(f.attrs)
    except Exception as e:  # as in read_case
        raise CaseError(f"{path} is there and is damaged or incomplete. Move it away") from e


def _orientation(about: dict[str, Any]) -> str:
    return orientation_of(about["direction"]) if "direction" in about else "unknown"


def make_case(job: Job) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None, dict[str, Any]]:
    """image float32 (W,H,D) or (K,W,H,D), label uint8 (W,H,D) or None, and the attributes: the geometry, and how they
    came about.

    Raises:
        CaseError: what is wrong with the scan or its label, or that there is none to crop around.
    """
    stored, stored_geometry = _read(job)
    turn, size = turn_to(job.orientation, stored_geometry.get("direction")), stored.shape[-3:]
    source, stated = turn(stored), turn.geometry(stored_geometry, size)
    geometry = complete_geometry(stated)
    label: NDArray | None = None
    if job.scan.label is not None:
        stored_label, label_stated = _of(job.scan.label, read_label)
        turn = turn_to(job.orientation, label_stated.get("direction"))
        ours, scans = described(stored_label.shape, label_stated), described(size, stored_geometry)
        turned_label = turn(stored_label)
        label_geometry = complete_geometry(turn.geometry(label_stated, stored_label.shape))
        if not same_grid(source.shape[-3:], geometry, turned_label.shape, label_geometry):
            raise CaseError(
                f"{job.scan.label} lies on another grid than {job.scan.image}: {ours} where the scan has {scans}. "
                + _advice(size, stored_geometry, stored_label.shape, label_stated)
            )
        label = map_labels(turned_label, job.labels)
    try:
        image, raw = z_score_channels(source)
    except CaseError as e:
        raise CaseError(f"{some(job.scan.images)} {e}") from e
    mean, sd = raw[0] if source.ndim == 3 else zip(*raw, strict=True)
    if job.spacing is not None and "spacing" not in stated:
        raise CaseError(
            f"{job.scan.image} does not state the size of its voxels. Write it into the file, or leave out --spacing"
        )
    shape, grid = grid_of_spacing(source.shape[-3:], geometry, job.spacing)
    about: dict[str, Any] = {f"source_{key}": value for key, value in stored_geometry.items()}
    about |= {"source_size": size, "mean": mean, "sd": sd}
    if grid is not geometry:
        # without the origin, whose rounding depends on how the scan is stored
        here = {**DEFAULT_GEOMETRY, "spacing": geometry["spacing"]}
        there = grid_of_spacing(source.shape[-3:], here, job.spacing)[1]
        image = each_channel(lambda x: resample(x, here, shape, there, job.interpolation), image)
        label = None if label is None else resample(label, here, shape, there, "nearest")
    box, margins = crop_box(image, label, job)
    corner = [s.start for s in box]
    kept = {key: value for key, value in moved(grid, corner).items() if key in stated}
    about |= {"crop": job.crop, "crop_corner": corner, "crop_margins": margins, **kept}
    image = image[(..., *box)]
    if any(channel.min() == channel.max() for channel in with_channels(image)):
        raise CaseError(f"{some(job.scan.images)} is constant within the crop")
    return image, None if label is None else label[box], about


def _read(job: Job) -> tuple[NDArray[np.float32], Geometry]:
    """image (W,H,D) or (K,W,H,D) and geometry, as they are stored."""

    def one_file(path: Path) -> tuple[NDArray[np.float32], Geometry]:
        image, geometry = read_image(path)
        refuse_channels(image.shape, len(job.channels), job.channels)
        return image, geometry

    return _of(job.scan.image, one_file) if len(job.scan.images) == 1 else read_channels(job.scan.images)


def _of(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except CaseError as e:
        raise CaseError(f"{path} {e}") from e


def _advice(shape: Sequence[int], geometry: Geometry, label_shape: Sequence[int], label_geometry: Geometry) -> str:
    """What to do about a label on another grid than its scan's, both as they are stored.

    A label that was saved without its scan's affine has no place of its own, and resampling would move it.
    """

    def nowhere(geometry: Geometry) -> bool:
        straight = [np.diag(axes).ravel().tolist() for axes in ((1.0, 1.0, 1.0), (-1.0, -1.0, 1.0))]  # LPS and RAS
        place = complete_geometry(geometry)
        return not any(place["origin"]) and list(place["direction"]) in straight

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


def map_labels(label: NDArray[np.integer], labels: Sequence[int | tuple[int, ...]] | None) -> NDArray[np.uint8]:
    """Listed values, or groups of values, -> 1, 2, ..., all others -> 0; without any, values stay, but where 255 is the
    only one, it is 1.

    Raises:
        CaseError: values above 255, or 255 together with others, where none are named.
    """
    if labels is not None:
        mapped = np.zeros(label.shape, np.uint8)
        for number, group in enumerate(labels, 1):
            mapped[np.isin(label, group)] = number
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
    """The box to keep, and the margins before and after x, y, z that are meant for it."""
    if job.crop == "none":
        return tuple(slice(0, side) for side in image.shape[-3:]), [0] * 6  # type: ignore[return-value]
    if job.crop == "foreground":
        bright = np.any([channel > threshold_otsu(channel) for channel in with_channels(image)], axis=0)
        bright = bright if label is None else bright | (label > 0)
        return tuple(slice(s.start, s.stop) for s in box_of(bright)), [0] * 6  # type: ignore[return-value]
    if label is None or not label.any():
        what = "no label" if label is None else "an empty label"
        raise CaseError(f"has {what} to crop around. Use --crop foreground or --crop none")
    number = int.from_bytes(hashlib.sha256(job.scan.name.encode()).digest()[:8])
    draw = np.random.default_rng([job.seed, number])
    margins = [int(draw.integers(low, high + 1)) for low, high in MARGINS for _ in range(2)]
    margins, smallest = (margins, SMALLEST) if job.margin is None else ([job.margin] * 6, (0, 0, 0))
    box = []
    for axis, s in enumerate(box_of(label > 0)):
        side = image.shape[-3:][axis]
        missing = max(smallest[axis] - (s.stop - s.start), 0)
        start = max(s.start - margins[2 * axis] - missing // 2, 0)
        stop = min(s.stop + margins[2 * axis + 1] + (missing + 1) // 2, side)
        short = max(smallest[axis] - (stop - start), 0)  # the scan's edge was in the way: more at the other side
        start, stop = max(start - short, 0), min(stop + short, side)
        box.append(slice(0, side) if axis == 2 and job.crop == "label-xy" else slice(start, stop))
    return tuple(box), margins  # type: ignore[return-value]


def write_case(path: Path, image: NDArray, label: NDArray | None, about: dict[str, Any]) -> None:
    """Writes an h5 case in compressed chunks of 32^3, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    with whole(path, "Fix that; the same command then goes on.") as partial, h5py.File(partial, "w") as f:
        for name, values in (("image", image), ("label", label)):
            if values is None:
                continue
            chunks = (1,) * (values.ndim - 3) + tuple(min(CHUNK, side) for side in values.shape[-3:])
            f.create_dataset(name, data=values, chunks=chunks, compression="gzip", shuffle=True)
        f.attrs.update(about)
