"""Reading NIfTI files, checking their headers for contradictions, and writing results with the header of a scan.

A header states the size of its voxels in pixdim. It states their positions in up to two forms, sform and qform, each
with a code; code 0 means that the form is not used. The sform is used if its code is above 0, otherwise the qform, as
in nibabel, FSL and most viewers.
"""

import gzip
import math
import sys
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.quaternions import quat2mat
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from dataloaders.cases import MOST_BYTES, CaseError
from dataloaders.geometry import Geometry, complete_geometry, refuse_direction
from dataloaders.orientation import TO_RAS

CHUNK = 2**20
DAMAGED = (HeaderDataError, WrapStructError, OSError, EOFError, zlib.error)  # what a damaged file raises
LENGTHS = 0.01  # largest relative difference of voxel lengths within a header
ROUNDING = 1e-5  # relative rounding error of 32-bit numbers
PLACES = 0.1  # largest distance of the two forms, in voxels
SOME = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))  # corners that determine the position of a box
Header = Nifti1Header | Nifti2Header


def read_nifti(path: Path, *, several: bool = False) -> tuple[NDArray[Any], Geometry]:
    """Reads the voxels (W,H,D), scaled by the header's slope and intercept, and the geometry that the file states.

    The K volumes of a 4-D file are (K,W,H,D); it is refused unless `several` are allowed.
    A file without sform and qform states only the spacing. If both forms exist and differ, a line on stderr says so.

    Raises:
        CaseError: if the file is truncated or damaged, does not hold three-dimensional numbers, or needs more than
            2 GiB in float32; if voxel lengths are not above 0, contradict each other or are not in mm; if the axes are
            not at right angles, or the scaling is not finite.
    """
    try:
        with _opened(path) as f:
            header = _read_header(f)
            shape, dtype = _shape(header, several), header.get_data_dtype().newbyteorder(header.endianness)
            geometry = _geometry(path, header, shape[:3])
            array = _voxels(f, header, math.prod(shape) * dtype.itemsize).view(dtype)
    except DAMAGED as e:
        raise CaseError(f"is damaged or incomplete ({e})") from e
    array = array.reshape(shape, order="F")
    array = np.moveaxis(array, -1, 0) if array.ndim == 4 else array
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    scaled = slope != 0 and math.isfinite(slope)  # else there is no scaling, as nibabel, FSL and ITK have it
    if scaled and not math.isfinite(inter):
        raise CaseError(f"has a scl_slope of {slope:g} and a scl_inter of {inter:g}. Fix its header")
    if scaled and (slope, inter) != (1, 0):
        with np.errstate(over="ignore", invalid="ignore"):  # values that are not finite are refused later
            array = (array.astype(np.float64) * slope + inter).astype(np.float32)
    return array, geometry


def channels_in(path: Path) -> int:
    """The number of volumes that the header of a 4-D NIfTI states; 1 of any other.

    Raises:
        CaseError: for a file that cannot be read, or a header that is not valid.
    """
    try:
        with _opened(path) as f:
            shape = _shape(_read_header(f), several=True)
    except DAMAGED as e:
        raise CaseError(f"is damaged or incomplete ({e})") from e
    return shape[3] if len(shape) == 4 else 1


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def _read_header(f: IO[bytes]) -> Header:
    """Reads the header of a NIfTI-1 or NIfTI-2 file in either byte order."""
    block = f.read(348)
    kind: type[Header] = Nifti2Header if block[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else Nifti1Header
    block += f.read(kind.template_dtype.itemsize - 348)
    if len(block) < kind.template_dtype.itemsize:
        raise CaseError(f"is cut short: {len(block)} bytes, fewer than a header has")
    header = kind(block, check=False)
    if bytes(header["magic"])[:3] in (b"ni1", b"ni2"):
        raise CaseError("is the header of a pair of files, .hdr and .img. Save the scan as one .nii file")
    if bytes(header["magic"])[:3] not in (b"n+1", b"n+2"):
        raise CaseError("is damaged or incomplete (its header is not that of a NIfTI)")
    return header


def _shape(header: Header, several: bool) -> tuple[int, ...]:
    """The three sides in voxels, and the channels if there are several, after checks of dimensions, type and size."""
    shape = tuple(map(int, header["dim"][1 : 1 + min(max(int(header["dim"][0]), 0), 7)]))
    try:
        dtype = header.get_data_dtype()
    except KeyError as e:
        raise CaseError(f"has voxels of a kind that the standard does not know, datatype {e}") from e
    if len(shape) == 5 and shape[3] == 1 and shape[4] > 1:
        kind = {"f": "float", "i": "integer", "u": "unsigned integer"}.get(dtype.kind, dtype.name)
        raise CaseError(f"has voxels of vector of {8 * dtype.itemsize}-bit {kind}, where one number must stand")
    kept = 4 if several and len(shape) > 3 and shape[3] > 1 and shape[2] > 1 else 3
    if len(shape) < 3 or any(side > 1 for side in shape[kept:]):
        raise CaseError(f"has {len(shape)} dimensions, {shape}, where a scan has three")
    if min(shape[:3]) < 1:
        raise CaseError(f"has {shape[:3]} voxels, and so none")
    if dtype.kind not in "iuf":
        raise CaseError(f"has voxels of {header.get_value_label('datatype')}, where one number must stand")
    if 4 * math.prod(shape[:kept]) > MOST_BYTES:
        raise CaseError(f"claims {shape[:kept]} voxels, more than {MOST_BYTES / 2**30:g} GiB in float32")
    return shape[:kept]


def _voxels(f: IO[bytes], header: Header, size: int) -> NDArray[np.uint8]:
    """The bytes of the voxels. The file is read to its end, where a compressed file has its checksum."""
    position = len(header.binaryblock)
    begin = float(header["vox_offset"]) or header.single_vox_offset
    if not position <= begin <= MOST_BYTES:
        raise CaseError(f"has voxels that begin at byte {begin:g}, where they cannot")
    offset = int(begin)
    data = np.empty(size, np.uint8)
    while position < offset + size + CHUNK and (
        piece := f.read(min(CHUNK, offset - position) if position < offset else CHUNK)
    ):
        if position >= offset:
            part = data[position - offset :][: len(piece)]
            part[:] = np.frombuffer(piece, np.uint8, len(part))
        position += len(piece)
    if position < offset + size:
        raise CaseError(f"is cut short: {position} bytes where its header states {offset + size}")
    return data


def _geometry(path: Path, header: Header, shape: tuple[int, ...]) -> Geometry:
    """The geometry that the header states, in ITK's frame.

    Raises:
        CaseError: if the header contradicts itself or is not valid.
    """
    unit = {1: "metres", 3: "microns"}.get(int(header["xyzt_units"]) & 7)
    if unit:
        raise CaseError(f"states its lengths in {unit}, which programs read in different ways. Write them in mm")
    pixdim = header["pixdim"][1:4].astype(float)
    if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
        raise CaseError(f"has voxels of {_by(pixdim)} mm (pixdim), which must be above 0. Fix its header")
    forms: dict[str, NDArray[np.float64]] = {}  # three rows of each that is used, RAS
    if int(header["sform_code"]) > 0:
        forms["sform"] = np.array([header[f"srow_{axis}"] for axis in "xyz"], float)
    if int(header["qform_code"]) > 0:
        forms["qform"] = _qform(header)
    if not forms:
        return {"spacing": tuple(map(float, pixdim))}
    for name, matrix in forms.items():
        if not np.isfinite(matrix).all():
            raise CaseError(f"has a {name} that is not all numbers. Fix its header")
        lengths = np.linalg.norm(matrix[:, :3], axis=0)
        if np.abs(lengths / pixdim - 1).max() > LENGTHS:
            raise CaseError(
                f"contradicts itself: its {name} makes voxels of {_by(lengths)} mm, its pixdim"
                f"{' and qform' if 'qform' in forms else ''} of {_by(pixdim)} mm. Fix the one that is wrong"
            )
    name, matrix = next(iter(forms.items()))
    lengths = np.linalg.norm(matrix[:, :3], axis=0)
    spacing = pixdim if np.allclose(lengths, pixdim, rtol=ROUNDING, atol=0) else lengths
    direction = tuple(map(float, (TO_RAS @ matrix[:, :3] / lengths).ravel() + 0.0))  # no -0.0
    refuse_direction(direction)
    if len(forms) == 2:
        _warn_if_forms_differ(path, header, forms, shape, pixdim)
    origin = tuple(map(float, TO_RAS @ matrix[:, 3] + 0.0))
    return {"spacing": tuple(map(float, spacing)), "origin": origin, "direction": direction}


def _qform(header: Header) -> NDArray[np.float64]:
    """The three rows of the qform, RAS, from quaternion, qfac, pixdim and offset."""
    b, c, d = (float(header[f"quatern_{name}"]) for name in "bcd")
    rest = 1 - (b * b + c * c + d * d)
    if not rest > -LENGTHS:  # also true for NaN
        raise CaseError(f"has a qform whose quaternion, {b:g} {c:g} {d:g}, is longer than 1. Fix its header")
    axes = quat2mat([0.0 if rest < 1e-7 else math.sqrt(rest), b, c, d])  # as the NIfTI library of the standard does
    axes[:, 2] *= -1 if header["pixdim"][0] < 0 else 1  # qfac
    offset = [float(header[f"qoffset_{axis}"]) for axis in "xyz"]
    return np.column_stack([axes * header["pixdim"][1:4].astype(float), offset])


def _warn_if_forms_differ(
    path: Path, header: Header, forms: dict[str, NDArray], shape: tuple[int, ...], pixdim: NDArray
) -> None:
    """Prints a line to stderr if the two forms place a corner of the scan differently."""
    corners = np.column_stack([np.array(SOME) * (np.array(shape) - 1), np.ones(4)])
    apart = np.linalg.norm(corners @ (forms["sform"] - forms["qform"]).T, axis=1).max()
    if apart > PLACES * pixdim.min():
        code = int(header["sform_code"])
        hint = "" if code == 1 else ", though viewers built on ITK take the qform of such a file"
        print(
            f"{path}: its sform and its qform lie up to {apart:.3g} mm apart. The sform (code {code}) counts{hint}.",
            file=sys.stderr,
        )


def _by(lengths: NDArray) -> str:
    return " x ".join(f"{mm:g}" for mm in lengths)


def write_nifti(path: Path, array: NDArray[Any], geometry: Geometry, like: Path | None = None) -> None:
    """Writes an array (W,H,D); compressed if the path ends in .gz.

    Args:
        geometry: written as sform and qform if there is no `like`.
        like: a NIfTI on the same grid whose header is kept: forms, codes, pixdim, units and description. Scaling,
            display range, intent and extensions are left out, since they describe its own values.

    Raises:
        OSError: if the file cannot be written, or `like` cannot be read.
        CaseError: if `like` is no NIfTI.
    """
    if like is None:
        header = _header_of(geometry, array.shape)
    else:
        with _opened(like) as f:
            header = _read_header(f).as_byteswapped("<")
    header.set_data_dtype(array.dtype)
    header["dim"] = [3, *array.shape, 1, 1, 1, 1]
    header["vox_offset"] = header.single_vox_offset
    header["scl_slope"], header["scl_inter"] = 1, 0
    for name in ("cal_max", "cal_min", "intent_code", "intent_p1", "intent_p2", "intent_p3"):
        header[name] = 0
    header["intent_name"] = b""
    with open(path, "wb") as file:
        packed = (
            gzip.GzipFile("", "wb", compresslevel=4, fileobj=file, mtime=0) if path.suffix.lower() == ".gz" else file
        )
        packed.write(header.binaryblock + bytes(header.single_vox_offset - len(header.binaryblock)))
        for z in range(array.shape[2]):
            packed.write(np.asarray(array[..., z], array.dtype.newbyteorder("<")).tobytes(order="F"))
        if packed is not file:
            packed.close()


def _header_of(geometry: Geometry, shape: tuple[int, ...]) -> Header:
    """A header for a grid of this geometry; missing values are those of `complete_geometry`."""
    g = complete_geometry(geometry)
    affine = np.eye(4)
    affine[:3, :3] = TO_RAS @ (np.reshape(g["direction"], (3, 3)) * g["spacing"])
    affine[:3, 3] = TO_RAS @ g["origin"]
    header = (Nifti1Header if max(shape) < 2**15 else Nifti2Header)(endianness="<")
    header.set_sform(affine, 1)
    header.set_qform(affine, 1)
    header["pixdim"][1:4] = g["spacing"]
    header.set_xyzt_units("mm")
    return header
