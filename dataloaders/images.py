"""Scans as files, and from one grid to another: the one place that reads and writes NIfTI, NRRD and MetaImage.

An array is (W,H,D), along x, y, z of the file. Its geometry is ITK's, in the LPS frame (mm to the patient's left, back
and head): `spacing` of the voxels along the array's axes, `origin` the place of the middle of voxel (0,0,0),
`direction` 9 cosines row by row, whose columns are the array's axes. Voxel i lies at
origin + direction @ (spacing * i).
"""

import gzip
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from dataloaders.cases import FILE_NAME, MOST_BYTES, Case, CaseError, read_case, read_geometry
from utils.errors import UserError

Geometry = dict[str, tuple[float, ...]]
"""spacing (3), origin (3) and direction (9)."""

WRITTEN_AS = {".nii.gz": ".nii.gz", ".nii": ".nii", ".nrrd": ".nrrd", ".mha": ".mha", ".mhd": ".mha", ".h5": ".nii.gz"}
"""Ending of a scan that can be read -> ending of what is written for it."""
INTERPOLATORS = {"linear": sitk.sitkLinear, "bspline": sitk.sitkBSpline, "nearest": sitk.sitkNearestNeighbor}
SAME_SPACING = 1e-3
"""Relative difference of spacings below which nothing is resampled."""
SAME_PLACE = 0.1
"""Voxels that the corners of two grids may lie apart and still be called the same."""
CHUNK = 2**20

sitk.ProcessObject.SetGlobalWarningDisplay(False)  # what matters is raised; the rest would break the progress bar


def ending_of(path: Path) -> str:
    """The ending by which a scan's format is known, of those in WRITTEN_AS, or ''."""
    return next((ending for ending in WRITTEN_AS if path.name.lower().endswith(ending)), "")


def scan_name(path: Path) -> str:
    """A scan's name: that of its file without the ending, or of its folder if all files are called mri_norm2.h5."""
    return path.parent.name if path.name == FILE_NAME else path.name[: len(path.name) - len(ending_of(path))]


def read_image(path: Path) -> tuple[NDArray[np.float32], Geometry]:
    """A scan as float32 (W,H,D), its intensities as they are in the file, and its geometry.

    Raises:
        CaseError: missing, no scan, cut short, not three-dimensional numbers, larger than 2 GiB in float32,
            intensities that are not finite (in a NIfTI ITK reads those as 0); for an h5 case what `read_case` raises.
    """
    if ending_of(path) == ".h5":
        case = Case(scan_name(path), path, labeled=False)
        return read_case(case)[0], read_geometry(case)
    picture = _read(path)
    image = _array(picture, np.float32)
    if not np.isfinite(image.sum(dtype=np.float64)):
        raise CaseError("holds intensities that are not a number or infinite")
    return image, _geometry(picture)


def read_label(path: Path) -> tuple[NDArray[np.integer], Geometry]:
    """A label map as integers (W,H,D), its values as they are in the file, and its geometry.

    Raises:
        CaseError: as for `read_image`, and values that are negative or no integers.
    """
    picture = _read(path)
    label = _array(picture)
    if label.dtype.kind == "f":
        wrong = label[~(label == np.rint(label))]
        if wrong.size or np.abs(label).max() >= 2**31:
            raise CaseError(f"holds {wrong[0] if wrong.size else np.abs(label).max():g}, and labels are integers")
        label = label.astype(np.int32)
    if label.min() < 0:
        raise CaseError(f"holds {label.min()}, and labels are 0 or above")
    return label, _geometry(picture)


def _read(path: Path) -> sitk.Image:
    """The file's image; what its header claims is looked at before any of its voxels."""
    if not path.is_file():
        raise CaseError("does not exist" if not path.exists() else "is no file")
    if not ending_of(path):
        raise CaseError(f"is no format that is read here: {', '.join(WRITTEN_AS)}")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        size, kind = reader.GetSize(), reader.GetPixelIDValue()
        if len(size) < 3 or any(side > 1 for side in size[3:]):
            raise CaseError(f"has {len(size)} dimensions, {size}, where a scan has three")
        if reader.GetNumberOfComponents() != 1 or "complex" in sitk.GetPixelIDValueAsString(kind):
            raise CaseError(f"has voxels of {sitk.GetPixelIDValueAsString(kind)}, where one number must stand")
        if 4 * int(np.prod(size, dtype=object)) > MOST_BYTES:
            raise CaseError(f"claims {size} voxels, more than {MOST_BYTES / 2**30:g} GiB in float32")
        if ".nii" in ending_of(path):
            _refuse_cut_nifti(path)
        reader.SetExtractSize([*size[:3], *[0] * (len(size) - 3)])
        return reader.Execute()
    except RuntimeError as e:
        raise CaseError(f"is no whole scan ({_reason(e)})") from e


def _refuse_cut_nifti(path: Path) -> None:
    """Raises CaseError for a NIfTI that is shorter than its header says, or whose gzip checksum is wrong: ITK would
    fill up with zeros without a word."""
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb") as f:
            header = f.read(540)
            order = "<" if header[0] or header[1] else ">"
            if struct.unpack_from(order + "i", header)[0] == 540:  # NIfTI-2
                bits, sides = (
                    struct.unpack_from(order + "h", header, 14)[0],
                    struct.unpack_from(order + "8q", header, 16),
                )
                offset = struct.unpack_from(order + "q", header, 168)[0]
            else:
                sides, bits = (
                    struct.unpack_from(order + "8h", header, 40),
                    struct.unpack_from(order + "h", header, 72)[0],
                )
                offset = int(struct.unpack_from(order + "f", header, 108)[0])
            voxels = int(np.prod([max(side, 1) for side in sides[1 : 1 + sides[0]]], dtype=object))
            found, expected = len(header), offset + voxels * bits // 8
            while found <= expected + CHUNK and (piece := f.read(CHUNK)):  # to the end, where the checksum stands
                found += len(piece)
    except (OSError, EOFError, zlib.error, struct.error, IndexError) as e:
        raise CaseError(f"is cut short or damaged ({e})") from e
    if found < expected:
        raise CaseError(f"is cut short: {found} bytes where its header tells of {expected}")


def _reason(e: RuntimeError) -> str:
    """The last line of ITK's long story that says something."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return lines[-1].removeprefix("ITK ERROR: ") if lines else "no reason given"


def _geometry(picture: sitk.Image) -> Geometry:
    return {"spacing": picture.GetSpacing(), "origin": picture.GetOrigin(), "direction": picture.GetDirection()}


def _array(picture: sitk.Image, dtype: Any = None) -> NDArray[Any]:
    """A copy, as the view dies with the picture; SimpleITK's arrays are z, y, x."""
    return np.array(sitk.GetArrayViewFromImage(picture).transpose(2, 1, 0), dtype=dtype, order="C", copy=True)


def _picture(array: NDArray[Any], geometry: Geometry) -> sitk.Image:
    picture = sitk.GetImageFromArray(array.transpose(2, 1, 0))
    picture.SetSpacing(geometry["spacing"])
    picture.SetOrigin(geometry["origin"])
    picture.SetDirection(geometry["direction"])
    return picture


def write_image(path: Path, array: NDArray[Any], geometry: Geometry) -> None:
    """Writes an array (W,H,D) of numbers as the format of the path's ending, compressed but for .nii; whole or not at
    all: under another name first, which is renamed.

    Raises:
        UserError: the folder or the file cannot be written.
    """
    partial = path.with_name(f".{os.getpid()}.partial.{path.name}")  # ITK goes by the ending
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(_picture(array, geometry), str(partial), useCompression=True)
        if ".nii" in ending_of(path):
            _refuse_cut_nifti(partial)  # ITK does not tell that a disk is full
        with open(partial, "rb") as f:
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (RuntimeError, OSError, CaseError) as e:
        why = _reason(e) if isinstance(e, RuntimeError) else getattr(e, "strerror", None) or str(e)
        raise UserError(f"cannot write {path}: {why}. Mend that or choose another folder.") from e
    finally:
        if partial.parent.is_dir():
            partial.unlink(missing_ok=True)


def normalise(image: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, float]:
    """(W,H,D) -> zero mean and unit variance over all its voxels, as the LA set is published; and that mean and
    standard deviation.

    Raises:
        CaseError: a constant scan.
    """
    mean, sd = float(image.mean(dtype=np.float64)), float(image.std(dtype=np.float64))
    if sd <= 1e-6 * abs(mean) or sd == 0:
        raise CaseError(f"is constant ({mean:g})")
    scaled = image - np.float32(mean)
    scaled /= np.float32(sd)
    return scaled, mean, sd


def to_physical(geometry: Geometry, index: Sequence[float] | NDArray) -> NDArray[np.float64]:
    """Indices (...,3) of voxels -> their places (...,3) in mm."""
    axes = np.reshape(geometry["direction"], (3, 3)) * geometry["spacing"]
    return np.asarray(index, float) @ axes.T + geometry["origin"]


def moved(geometry: Geometry, corner: Sequence[float]) -> Geometry:
    """The geometry of a part of the array that begins at voxel `corner`."""
    return {**geometry, "origin": tuple(map(float, to_physical(geometry, corner)))}


def same_grid(shape: Sequence[int], geometry: Geometry, other_shape: Sequence[int], other: Geometry) -> bool:
    """Whether two arrays have one shape and their corners lie less than a tenth of a voxel apart."""
    if tuple(shape) != tuple(other_shape):
        return False
    corners = np.array(np.meshgrid(*[(-0.5, side - 0.5) for side in shape])).reshape(3, 8).T
    apart = np.linalg.norm(to_physical(geometry, corners) - to_physical(other, corners), axis=1).max()
    return bool(apart < SAME_PLACE * min(geometry["spacing"]))


def grid_of_spacing(
    shape: Sequence[int], geometry: Geometry, spacing: Sequence[float] | None
) -> tuple[tuple[int, int, int], Geometry]:
    """Shape and geometry of the grid with this spacing (mm along the array's axes) in the place of a given one.

    The axes and the middle stay; the sides differ by less than half a voxel. None, and a spacing that differs by less
    than a thousandth, leave all as it is.
    """
    old, new = np.array(geometry["spacing"]), np.array(geometry["spacing"] if spacing is None else spacing)
    if np.allclose(old, new, rtol=SAME_SPACING, atol=0):
        return tuple(shape), geometry  # type: ignore[return-value]
    size = np.maximum(np.rint(shape * old / new), 1)
    corner = (np.array(shape) - 1) / 2 - (size - 1) / 2 * new / old
    x, y, z = map(int, size)
    return (x, y, z), {**moved(geometry, corner), "spacing": tuple(map(float, new))}


def resample(
    array: NDArray[Any],
    geometry: Geometry,
    shape: Sequence[int],
    onto: Geometry,
    how: str = "linear",
    *,
    smooth: bool = True,
) -> NDArray[Any]:
    """An array (W,H,D) of one geometry -> its values at the voxels of another one with the same direction, (*shape).

    Args:
        how: 'linear' or 'bspline' (cubic) for images, 'nearest' for labels; beyond the edge the nearest value counts.
        smooth: whether an axis that becomes coarser by a factor f is first blurred with a standard deviation of
            (f-1)/2 voxels, so that what lies between the new voxels is not lost; 'nearest' never is.
    """
    if how != "nearest" and smooth:
        array = anti_alias(array, np.array(onto["spacing"]) / geometry["spacing"])
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize([int(side) for side in shape])
    resampler.SetOutputSpacing(onto["spacing"])
    resampler.SetOutputOrigin(onto["origin"])
    resampler.SetOutputDirection(onto["direction"])
    resampler.SetInterpolator(INTERPOLATORS[how])
    resampler.SetUseNearestNeighborExtrapolator(True)
    return _array(resampler.Execute(_picture(array, geometry)))


def anti_alias(array: NDArray[Any], factors: NDArray[np.float64]) -> NDArray[Any]:
    """(W,H,D) blurred along each axis that is to become coarser by this factor, as `resample` says."""
    for axis, factor in enumerate(factors):
        if factor > 1 + SAME_SPACING:
            array = gaussian_filter1d(array, (factor - 1) / 2, axis=axis, mode="nearest")
    return array
