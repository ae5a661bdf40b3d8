"""Reading and writing scans (NIfTI, NRRD, MetaImage, h5), and resampling them to another grid.

An array is (W,H,D), along x, y, z of the file. Its geometry is that of ITK, in the LPS frame (mm to the patient's left,
back and head): `spacing` of the voxels along the array's axes; `origin`, the position of the centre of voxel (0,0,0);
`direction`, 9 cosines row by row, whose columns are the array's axes. Voxel i is at
origin + direction @ (spacing * i). Values that a file does not state are missing from its geometry.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from dataloaders.cases import FILE_NAME, MOST_BYTES, Case, CaseError, read_case
from dataloaders.geometry import Geometry, complete_geometry, refuse_direction, stated_geometry
from dataloaders.nifti import read_nifti, write_nifti
from utils.checkpoint import whole

WRITTEN_AS = {".nii.gz": ".nii.gz", ".nii": ".nii", ".nrrd": ".nrrd", ".mha": ".mha", ".mhd": ".mha", ".h5": ".nii.gz"}
"""Ending of a scan that can be read -> ending of the files written for it."""
INTERPOLATORS = {"linear": sitk.sitkLinear, "bspline": sitk.sitkBSpline, "nearest": sitk.sitkNearestNeighbor}
SAME_SPACING = 1e-3
"""Relative difference of spacings below which nothing is resampled."""
SAME_PLACE = 0.1
"""Largest distance in voxels between the corners of two grids that count as the same."""
INWARDS = 1e-6
ROUNDING = 1e-6  # relative error of a label's integer that was scaled by a factor of 32 bits
HEADER = 2**16  # bytes within which the text of a header ends
MM = {"", "?", "mm", "millimeter", "millimeters", "millimetre", "millimetres"}

sitk.ProcessObject.SetGlobalWarningDisplay(False)  # errors are raised; warnings would break the progress bar


def ending_of(path: Path) -> str:
    """The key of WRITTEN_AS with which the file name ends, or ''."""
    return next((ending for ending in WRITTEN_AS if path.name.lower().endswith(ending)), "")


def written_as(path: Path) -> str:
    """The ending of the files written for a scan; NIfTI's for the folder of a DICOM series."""
    return WRITTEN_AS.get(ending_of(path), ".nii.gz")


def scan_name(path: Path) -> str:
    """Name of a scan: the file name without its ending, or the name of the folder for mri_norm2.h5."""
    return path.parent.name if path.name == FILE_NAME else path.name[: len(path.name) - len(ending_of(path))]


def read_image(path: Path) -> tuple[NDArray[np.float32], Geometry]:
    """Reads a scan as float32 (W,H,D) with unchanged intensities, and the geometry that the file states.

    A 4-D NIfTI of K volumes and an h5 case of K channels are (K,W,H,D).

    Raises:
        CaseError: if the file is missing, no scan or truncated; if its voxels are not three-dimensional numbers, need
            more than 2 GiB in float32, or are not finite; if the size of a voxel is ambiguous or the axes are not at
            right angles; for an h5 case as `read_case` and `stated_geometry`.
    """
    if ending_of(path) == ".h5":
        case = Case(scan_name(path), path, labeled=False)
        return read_case(case)[0], stated_geometry(case)
    voxels, geometry = _read(path, several=True)
    with np.errstate(over="ignore"):  # values beyond float32 become infinite, which the next check refuses
        image = np.ascontiguousarray(voxels, np.float32)
    if not np.isfinite(image.sum(dtype=np.float64)):
        raise CaseError("holds intensities that are not a number or infinite")
    return image, geometry


def read_label(path: Path) -> tuple[NDArray[np.integer], Geometry]:
    """Reads a label map as integers (W,H,D) with unchanged values, and the geometry that the file states.

    Raises:
        CaseError: as `read_image`, and for values that are negative or no integers.
    """
    voxels, geometry = _read(path)
    label = np.ascontiguousarray(voxels, voxels.dtype.newbyteorder("="))
    if label.dtype.kind == "f":
        with np.errstate(invalid="ignore"):  # infinity less itself is no number
            wrong = label[~(np.abs(label - np.rint(label)) <= ROUNDING * np.abs(label))]
        if wrong.size or np.abs(label).max() >= 2**31:
            raise CaseError(f"holds {wrong[0] if wrong.size else np.abs(label).max():g}, and labels are integers")
        label = np.rint(label).astype(np.int32)
    if label.min() < 0:
        raise CaseError(f"holds {label.min()}, and labels are 0 or above. Is it a scan?")
    return label, geometry


def _read(path: Path, *, several: bool = False) -> tuple[NDArray[Any], Geometry]:
    """The file's voxels (W,H,D), or (K,W,H,D) if it may hold `several` channels, and geometry; the header is checked
    before any voxel is read."""
    if not path.is_file():
        raise CaseError("does not exist" if not path.exists() else "is no file")
    if not ending_of(path):
        raise CaseError(f"is no format that is read here: {', '.join(WRITTEN_AS)}")
    if ".nii" in ending_of(path):
        return read_nifti(path, several=several)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if ending_of(path) == ".nrrd" else "MetaImageIO")  # ITK finds no reader for .MHA
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
        reader.SetExtractSize([*size[:3], *[0] * (len(size) - 3)])
        picture = reader.Execute()
    except RuntimeError as e:
        if "determinant" in str(e):
            raise CaseError("has a direction of determinant 0: its axes span no volume. Fix its header") from e
        raise CaseError(_unreadable(path, e)) from e
    direction = picture.GetDirection()
    refuse_direction(direction)
    geometry = {"spacing": picture.GetSpacing(), "origin": picture.GetOrigin()}
    geometry |= {"direction": direction, "unnamed_direction": direction}
    return _array(picture), {name: values for name, values in geometry.items() if name in _stated_by(path, picture)}


def _stated_by(path: Path, picture: sitk.Image) -> set[str]:
    """Which parts of the geometry the header of a NRRD or MetaImage states; ITK fills in the others.

    Raises:
        CaseError: for lengths in units other than mm.
    """
    text = _header_text(path)
    if ending_of(path) == ".nrrd":
        lines = re.findall(r"^([\w ]+):=?(.*)$", text.partition("\n\n")[0], re.MULTILINE)
        fields = {name.strip().lower(): value.strip() for name, value in lines}
        units = re.findall(r'"(.*?)"', fields.get("space units", "") + fields.get("units", ""))
        frame = "NRRD_space" in picture.GetMetaDataKeys() and picture.GetMetaData("NRRD_space").split("-")[0]
        spacing = "space directions" in fields or "spacings" in fields
        origin, axes = "space origin" in fields, "space directions" in fields
        direction = axes and frame in ("left", "right")  # ITK has converted it to LPS
    else:
        fields = dict(re.findall(r"^(\w+) *= *(.*?) *$", text.partition("ElementDataFile")[0], re.MULTILINE))
        units = [fields.get("DistanceUnits", "")]
        spacing = "ElementSpacing" in fields or "ElementSize" in fields
        origin = not {"Offset", "Position", "Origin"}.isdisjoint(fields)
        axes = direction = not {"TransformMatrix", "Rotation", "Orientation"}.isdisjoint(fields)
    strange = [unit for unit in units if unit.lower() not in MM]
    if strange:
        raise CaseError(f"states its lengths in {strange[0]}, which programs read in different ways. Write them in mm")
    stated = {"spacing": spacing, "origin": origin or direction, "direction": direction}
    stated["unnamed_direction"] = axes and not direction
    return {name for name, there in stated.items() if there}


def _header_text(path: Path) -> str:
    with open(path, "rb") as f:
        return f.read(HEADER).decode("latin-1").replace("\r", "")


def _unreadable(path: Path, e: RuntimeError) -> str:
    """Why ITK cannot read a NRRD or MetaImage: the file of voxels that a .mhd names and that is not there, or the last
    line of ITK's message; of a MetaImage that is the last error of the system, which need not be of this file."""
    voxels = re.search(r"^ElementDataFile *= *([^%\n]+\.\w+) *$", _header_text(path), re.MULTILINE)  # one file's name
    if ending_of(path) == ".mhd" and voxels and not (path.parent / voxels[1]).exists():
        return f"names the file {voxels[1]} for its voxels, which is not there. Put it into the same folder"
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    told = bool(lines) and not lines[-1].startswith("Reason: ")
    return "is damaged or incomplete" + (f" ({lines[-1].removeprefix('ITK ERROR: ')})" if told else "")


def _array(picture: sitk.Image) -> NDArray[Any]:
    """Array (W,H,D) of a picture. It is a copy, as a view ends with the picture. SimpleITK's order is z, y, x."""
    return np.array(sitk.GetArrayViewFromImage(picture).transpose(2, 1, 0), order="C", copy=True)


def _picture(array: NDArray[Any], geometry: Geometry) -> sitk.Image:
    complete = complete_geometry(geometry)
    picture = sitk.GetImageFromArray(array.transpose(2, 1, 0))
    picture.SetSpacing(complete["spacing"])
    picture.SetOrigin(complete["origin"])
    picture.SetDirection(complete["direction"])
    return picture


def write_image(path: Path, array: NDArray[Any], geometry: Geometry, like: Path | None = None) -> None:
    """Writes an array (W,H,D) of numbers in the format of the path's ending, compressed except for .nii.

    The file is written under another name and then renamed, so it is never incomplete.

    Args:
        path: file to write; its folder is created.
        like: a NIfTI whose header is kept if `path` is a NIfTI too.

    Raises:
        UserError: if the folder or the file cannot be written.
    """
    with whole(path) as partial:
        try:
            if ".nii" in ending_of(path):
                write_nifti(partial, array, geometry, like if like and ".nii" in ending_of(like) else None)
            else:
                sitk.WriteImage(_picture(array, geometry), str(partial), useCompression=True)
        except CaseError as e:
            raise OSError(e) from e


def z_score(image: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, float]:
    """Scales an image (W,H,D) to zero mean and unit variance over all voxels, as the LA set is published.

    Returns:
        The scaled image, and the mean and standard deviation before scaling.

    Raises:
        CaseError: for a constant scan.
    """
    mean, sd = float(image.mean(dtype=np.float64)), float(image.std(dtype=np.float64))
    if sd <= 1e-6 * abs(mean) or sd == 0:
        raise CaseError(f"is constant ({mean:g})")
    scaled = image - np.float32(mean)
    scaled /= np.float32(sd)
    return scaled, mean, sd


def to_physical(geometry: Geometry, index: Sequence[float] | NDArray) -> NDArray[np.float64]:
    """Voxel indices (...,3) -> positions (...,3) in mm."""
    axes = np.reshape(geometry["direction"], (3, 3)) * geometry["spacing"]
    return np.asarray(index, float) @ axes.T + geometry["origin"]


def moved(geometry: Geometry, corner: Sequence[float] | NDArray) -> Geometry:
    """The geometry of the part of an array that begins at voxel `corner`."""
    return {**geometry, "origin": tuple(map(float, to_physical(geometry, corner)))}


def same_grid(shape: Sequence[int], geometry: Geometry, other_shape: Sequence[int], other: Geometry) -> bool:
    """Whether two grids have the same shape and corners less than a tenth of a voxel apart."""
    if tuple(shape) != tuple(other_shape):
        return False
    corners = np.array(np.meshgrid(*[(-0.5, side - 0.5) for side in shape])).reshape(3, 8).T
    apart = np.linalg.norm(to_physical(geometry, corners) - to_physical(other, corners), axis=1).max()
    return bool(apart < SAME_PLACE * min(geometry["spacing"]))


def grid_of_spacing(
    shape: Sequence[int], geometry: Geometry, spacing: Sequence[float] | None
) -> tuple[tuple[int, int, int], Geometry]:
    """Shape and geometry of a grid with another spacing at the same place.

    Axes and centre stay the same; the lengths of the sides differ by less than half a voxel. The grid is returned
    unchanged for None, or a spacing that differs by less than a thousandth.

    Args:
        spacing: mm along the array's axes, or None.
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
    """Resamples an array (W,H,D) to another grid with the same direction.

    Args:
        array, geometry: the original voxels and their geometry.
        shape, onto: shape and geometry of the new grid.
        how: 'linear' or 'bspline' (cubic) for images, 'nearest' for labels; beyond the edge the nearest value is used.
        smooth: against aliasing, first blur each axis that becomes coarser by a factor f with a standard deviation of
            (f-1)/2 voxels; ignored for 'nearest'.
    """
    if how != "nearest" and smooth:
        array = anti_alias(array, np.array(onto["spacing"]) / geometry["spacing"])
    if how == "bspline" and 2 in array.shape:
        # Of an axis of two voxels ITK reads beyond their mirror images. Given these, it has the same spline.
        mirrored = [int(side == 2) for side in array.shape]
        array = np.pad(array, [(n, n) for n in mirrored], mode="reflect")
        geometry = moved(geometry, [-n for n in mirrored])
    if how == "nearest":  # midway between two voxels take the inner one; taking the upper one would shift labels
        inner = tuple(mm * (1 - INWARDS) for mm in onto["spacing"])
        onto = {**moved(onto, INWARDS * (np.array(shape) - 1) / 2), "spacing": inner}
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize([int(side) for side in shape])
    resampler.SetOutputSpacing(onto["spacing"])
    resampler.SetOutputOrigin(onto["origin"])
    resampler.SetOutputDirection(onto["direction"])
    resampler.SetInterpolator(INTERPOLATORS[how])
    resampler.SetUseNearestNeighborExtrapolator(True)
    return _array(resampler.Execute(_picture(array, geometry)))


def anti_alias(array: NDArray[Any], factors: NDArray[np.float64]) -> NDArray[Any]:
    """Blurs an array (W,H,D) along axes that become coarser by a factor f, with sd (f-1)/2 voxels, see `resample`."""
    for axis, factor in enumerate(factors):
        if factor > 1 + SAME_SPACING:
            array = gaussian_filter1d(array, (factor - 1) / 2, axis=axis, mode="nearest")
    return array
