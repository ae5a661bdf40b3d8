"""Files whose headers have given fields, whatever they say: NIfTI by nibabel, MetaImage and NRRD byte by byte."""

import gzip
from pathlib import Path

import nibabel
import numpy as np
from scans import OBLIQUE

SHAPE = (7, 6, 5)
RNG = np.random.default_rng(0)
ARRAY = RNG.integers(0, 200, SHAPE).astype(np.int16)
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])
AFFINE = FLIP @ np.vstack(
    [np.column_stack([np.reshape(OBLIQUE["direction"], (3, 3)) * OBLIQUE["spacing"], OBLIQUE["origin"]]), [0, 0, 0, 1]]
)


def nifti(path: Path, affine=AFFINE, array=ARRAY, kind=nibabel.Nifti1Image, **header) -> Path:
    """By nibabel, both forms as the affine has them, and then header fields as given, by the names of the standard."""
    image = kind(array, affine)
    image.header.set_sform(affine, 1)
    image.header.set_qform(affine, 1)
    return with_header(image, path, **header)


def with_header(image, path: Path, **fields) -> Path:
    """Saves it and writes header fields into the file itself, so that nothing mends them on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as f:
        data = f.read()
    header = type(image.header)(data[: image.header.sizeof_hdr], check=False)
    for name, value in fields.items():
        header[name] = value
    with opened(path, "wb") as f:
        f.write(header.binaryblock + data[image.header.sizeof_hdr :])
    return path


def turned_by(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def rows(affine: np.ndarray) -> dict:
    return {f"srow_{axis}": affine[i] for i, axis in enumerate("xyz")}


def meta(path: Path, **fields: str) -> Path:
    """A MetaImage of bytes whose header has these fields."""
    whole = {"TransformMatrix": "1 0 0 0 1 0 0 0 1", "Offset": "0 0 0", "ElementSpacing": "0.8 1 1.7", **fields}
    lines = ["ObjectType = Image", "NDims = 3", "BinaryData = True", "BinaryDataByteOrderMSB = False"]
    lines += [f"{name} = {value}" for name, value in whole.items() if value]
    lines += ["DimSize = 7 6 5", "ElementType = MET_SHORT", "ElementDataFile = LOCAL", ""]
    path.write_bytes("\n".join(lines).encode() + ARRAY.tobytes(order="F"))
    return path


def nrrd(path: Path, *lines: str) -> Path:
    head = ["NRRD0005", "type: short", "dimension: 3", "sizes: 7 6 5", "endian: little", "encoding: raw", *lines, "",
            ""]  # fmt: skip
    path.write_bytes("\n".join(head).encode() + ARRAY.tobytes(order="F"))
    return path
