"""Reading a DICOM series, a folder of files with one slice each, as one scan.

Intensities are those after the files' own rescaling, such as Hounsfield units. The geometry is that of the slices'
positions and orientations (attributes 0020,0032 and 0020,0037): the thickness of a slice and the distance between
slices that a header also states are not used, as they may be wrong.
"""

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from dataloaders.cases import MOST_BYTES, CaseError
from dataloaders.geometry import Geometry, refuse_direction
from utils.errors import UserError
from utils.text import some

POSITION, ORIENTATION, PIXEL_SPACING = "0020|0032", "0020|0037", "0028|0030"
MODALITY, DESCRIPTION, PATIENT, PHOTOMETRIC = "0008|0060", "0008|103e", "0010|0020", "0028|0004"
CHARACTERS = "0008|0005"
STATED = (MODALITY, DESCRIPTION, PATIENT)  # of a series
ENCODINGS = {
    13: "shift_jis", 100: "latin-1", 101: "iso8859_2", 109: "iso8859_3", 110: "iso8859_4", 126: "iso8859_7",
    127: "iso8859_6", 138: "iso8859_8", 144: "iso8859_5", 148: "iso8859_9", 166: "tis_620", 192: "utf-8",
    203: "iso8859_15",
}  # fmt: skip
"""Number of a set of characters in DICOM, as in ISO_IR 100 -> Python's name of it."""
UNEVEN = 0.01
"""Largest difference of a step between slices from their median, as a share of it."""
SAME_ANGLE = 1e-3
"""Largest difference of a slice's direction cosines from those of the first slice."""
COMPRESSED = tuple(b"\xe0\x7f\x10\0" + kind + b"\0\0\xff\xff\xff\xff" for kind in (b"OB", b"OW"))
"""What compressed voxels begin with: attribute (7FE0,0010) of a length that is not stated."""
END = b"\xfe\xff\xdd\xe0\0\0\0\0"  # of compressed voxels
IMPLICIT, BIG_ENDIAN, DEFLATED = b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.1.99"
SYNTAX, ROWS, VOXELS = (0x0002, 0x0010), (0x0028, 0x0010), (0x7FE0, 0x0010)
ITEMS, ENDS = 0xFFFE, ((0xFFFE, 0xE00D), (0xFFFE, 0xE0DD))  # the group of items, and what ends one or a sequence
LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
"""Kinds of value whose length has 32 bits."""
NOT_STATED = 2**32 - 1  # a length that is not stated


@dataclass(frozen=True)
class Series:
    """A series of a folder: its files in the order of the slices' positions, and what its header calls it."""

    uid: str
    files: tuple[str, ...]
    modality: str
    description: str
    patient: str
    """The patient's ID."""

    def __str__(self) -> str:
        named = ", ".join(text for text in (self.modality, self.description) if text)
        return f"{self.uid}  {len(self.files)} slices{', ' if named else ''}{named}"


def series_in(folder: Path) -> list[Series]:
    """The series of images in the files of a folder, the one with most slices first. Subfolders are not looked at.

    Raises:
        UserError: for a file with compressed voxels that is cut short, and for one that cannot be sorted into a series.
    """
    files_there = [path for path in sorted(folder.iterdir()) if path.is_file() and is_dicom(path)]
    cut = [path.name for path in files_there if _is_cut(path.read_bytes())]
    if cut:  # GDCM would read it without end, and fill the memory
        raise UserError(f"{folder} holds files that are cut short: {some(cut)}. Copy them again, or move them away.")
    try:
        uids = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    except RuntimeError as e:  # some RT doses; GDCM does not say which file it is
        wrong = some(path.name for path in files_there if not _has_header(path))
        raise UserError(f"{folder} holds DICOM that is no series of slices: {wrong}. Move it away.") from e
    found = []
    for uid in uids:
        files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)
        try:
            header = _header(files[0])
        except RuntimeError:  # a report or contours, without voxels
            continue
        found.append(Series(uid, tuple(files), *(_text(header, tag) for tag in STATED)))
    return sorted(found, key=lambda series: (-len(series.files), series.uid))


def is_dicom(path: Path) -> bool:
    with open(path, "rb") as f:
        return f.read(132)[128:] == b"DICM"


def _is_cut(content: bytes) -> bool:
    """Whether compressed voxels begin in the content of a file and do not end."""
    begin = max(map(content.rfind, COMPRESSED))
    return begin >= 0 and content.find(END, begin) < 0


def is_damaged(content: bytes) -> bool:
    """Whether the content of a file is no DICOM, ends within an element, or has rows and no voxels.

    A deflated file, in which no element can be seen, counts as whole.
    """
    at = 132 if content[128:132] == b"DICM" else 0
    if content[at : at + 2] not in (b"\2\0", b"\x08\0"):  # the group of the first element
        return True
    depth, order, syntax, found = 0, "<", b"", set()
    while at < len(content):
        if syntax == BIG_ENDIAN and content[at : at + 2] != b"\2\0":  # the elements of group 2 come first
            order = ">"
        if syntax == DEFLATED and content[at : at + 2] != b"\2\0":
            return False
        kind = content[at + 4 : at + 6]
        try:
            tag = struct.unpack_from(f"{order}HH", content, at)
            stated = kind.isupper() and tag[0] != ITEMS and (tag[0] == 2 or syntax != IMPLICIT)
            form, place = ("I", 4) if not stated else ("I", 8) if kind in LONG else ("H", 6)
            (length,) = struct.unpack_from(f"{order}{form}", content, at + place)
        except struct.error:
            return True
        at += place + struct.calcsize(form)
        if tag == SYNTAX:
            syntax = content[at : at + length].rstrip(b"\0 ")
        if depth == 0:
            found.add(tag)
        if length == NOT_STATED:
            depth += 1
        elif tag in ENDS:
            depth -= 1
        else:
            at += length
    return at > len(content) or depth > 0 or (ROWS in found and VOXELS not in found)


def _has_header(path: Path) -> bool:
    try:
        _header(str(path))
    except RuntimeError:
        return False
    return True


def _header(file: str) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(file)
    reader.ReadImageInformation()
    return reader


def _text(header: sitk.ImageFileReader, tag: str) -> str:
    text = header.GetMetaData(tag) if header.HasMetaDataKey(tag) else ""
    if tag != CHARACTERS:
        text = _decoded(text.encode("utf-8", "surrogateescape"), _text(header, CHARACTERS))
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _decoded(text: bytes, characters: str) -> str:
    """Text in the set that (0008,0005) names, in UTF-8 if it names none, and in Latin-1 if it is not valid so."""
    number = re.search(r"IR (\d+)", characters)
    encoding = ENCODINGS.get(int(number[1]), "utf-8") if number else "utf-8"
    try:
        return text.decode(encoding)
    except UnicodeDecodeError:
        return text.decode("latin-1")


def _numbers(header: sitk.ImageFileReader, tag: str, count: int, what: str) -> NDArray[np.float64]:
    try:
        values = np.array([float(word) for word in header.GetMetaData(tag).split("\\")])
    except (RuntimeError, ValueError):
        values = np.array([])
    if len(values) != count or not np.isfinite(values).all():
        raise CaseError(
            f"holds a slice that does not state its {what} ({tag.replace('|', ',')}), {header.GetFileName()}. A file "
            "of several slices is not read: convert it to NIfTI, with dcm2niix for instance"
        )
    return values


def read_series(files: Sequence[str]) -> tuple[NDArray[np.float32], Geometry]:
    """Reads the slices of one series as float32 (W,H,D), and their geometry.

    Args:
        files: one for each slice, in the order of their positions.

    Raises:
        CaseError: continuing a sentence that begins with the folder: files that are damaged or no slices of numbers;
            one slice alone; positions that are missing, doubled or unevenly spaced, so that a slice may be missing;
            slices in several directions or of several sizes; inverted intensities; a tilted gantry; more than 2 GiB in
            float32.
    """
    try:
        headers = [_header(file) for file in files]
    except RuntimeError as e:
        raise CaseError(f"holds a file that cannot be read ({str(e).splitlines()[-1]})") from e
    if any(header.GetNumberOfComponents() != 1 for header in headers):
        raise CaseError("holds a picture in colours, where one number must stand for a voxel. Choose another series")
    if any(_text(header, PHOTOMETRIC) == "MONOCHROME1" for header in headers):
        raise CaseError(
            "has slices that are MONOCHROME1 (0028,0004), whose intensities some programs invert, and others do not. "
            "Convert it to NIfTI as the training scans were"
        )
    positions = np.stack([_numbers(header, POSITION, 3, "position") for header in headers])
    cosines = np.stack([_numbers(header, ORIENTATION, 6, "orientation") for header in headers])
    pixels = np.stack([_numbers(header, PIXEL_SPACING, 2, "size of a pixel") for header in headers])
    between = pixels[0]
    sizes = {header.GetSize() for header in headers}
    if len(sizes) > 1:
        raise CaseError(
            f"holds slices of several sizes: {', '.join(map(str, sorted(sizes)))}. Move those of other sizes away"
        )
    (size,) = sizes
    if len(files) < 2 or size[2] != 1:
        raise CaseError("holds one file alone, and a scan has a file for each slice. Convert it to NIfTI")
    if 4 * size[0] * size[1] * len(files) > MOST_BYTES:
        raise CaseError(f"claims {size[0]}x{size[1]}x{len(files)} voxels, more than {MOST_BYTES / 2**30:g} GiB")
    if between.min() <= 0 or np.abs(pixels / between - 1).max() > UNEVEN:
        shown = ", ".join(f"{a:g} x {b:g}" for a, b in np.unique(pixels, axis=0)[:4])
        raise CaseError(f"has pixels of {shown} mm, where one size above 0 must stand (0028,0030)")
    if np.abs(cosines - cosines[0]).max() > SAME_ANGLE:
        other = Path(files[int(np.abs(cosines - cosines[0]).max(axis=1).argmax())]).name
        raise CaseError(
            f"holds slices in several directions, as a localizer has them, {Path(files[0]).name} and {other} among "
            "them. Move those of other directions away"
        )
    steps = np.diff(positions, axis=0)
    usual, lengths = np.median(steps, axis=0), np.linalg.norm(steps, axis=1)
    along = np.sort(positions @ np.cross(cosines[0, :3], cosines[0, 3:]))  # doubled ones are not in order in `files`
    if np.diff(along).min() <= UNEVEN * np.linalg.norm(usual):
        raise CaseError(
            "holds several slices at one place, as a series over time or with several echoes has them. Move all but "
            "one at each place away"
        )
    away = np.linalg.norm(steps - usual, axis=1)
    if away.max() > UNEVEN * np.linalg.norm(usual):
        i = int(away.argmax())
        raise CaseError(
            f"has slices that are not evenly spaced: {lengths[i]:g} mm after slice {i + 1} of {len(files)}, "
            f"{np.linalg.norm(usual):g} mm elsewhere. A slice may be missing: export the series again"
        )
    mean = steps.mean(axis=0)  # less rounded than one step
    length = float(np.linalg.norm(mean))
    axes = np.stack([cosines[0, :3], cosines[0, 3:], mean / length], axis=1)
    refuse_direction(axes.ravel().tolist())
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames(list(files))
    reader.SetOutputPixelType(sitk.sitkFloat32)  # each slice has a scale of its own, which need not be whole numbers
    try:
        voxels = sitk.GetArrayFromImage(reader.Execute())  # (D,H,W)
    except RuntimeError as e:
        raise CaseError(f"is damaged or incomplete ({str(e).splitlines()[-1]})") from e
    if not np.isfinite(voxels.sum(dtype=np.float64)):
        raise CaseError("holds intensities that are not a number or infinite")
    geometry = {
        "spacing": (float(between[1]), float(between[0]), length),  # the header has that of the rows first
        "origin": tuple(map(float, positions[0])),
        "direction": tuple(map(float, axes.ravel())),
    }
    return np.ascontiguousarray(voxels.transpose(2, 1, 0)), geometry
