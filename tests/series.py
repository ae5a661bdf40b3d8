"""DICOM series as SimpleITK writes them."""

import locale
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scans import OBLIQUE, picture_of

SHAPE = (30, 28, 18)
UID = "1.2.826.0.1.3680043.2.1125"


@contextmanager
def locale_kept() -> Iterator[None]:
    """Restores the locale, which GDCM sets to C when it writes; other tests then read text files as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


@locale_kept()
def write_series(
    folder: Path, array: np.ndarray, uid: str = f"{UID}.1", place: Callable[[int], np.ndarray] | None = None,
    description: str = "T1", prefix: str = "IM", patient: str = "",
) -> Path:  # fmt: skip
    """A DICOM series, a file for each slice, by SimpleITK.

    Args:
        array: int16 (W,H,D), on the grid OBLIQUE.
        place: number of a slice -> its position in mm; None: where OBLIQUE has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    picture = picture_of(array, OBLIQUE)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    direction = picture.GetDirection()
    for z in range(array.shape[2]):
        page = picture[:, :, z]
        where = picture.TransformIndexToPhysicalPoint((0, 0, z)) if place is None else place(z)
        tags = {
            "0008|0060": "MR", "0008|103e": description, "0020|000e": uid, "0008|0018": f"{uid}.{z + 1}",
            "0020|000d": f"{UID}.9", "0020|0013": str(z), "0020|0032": "\\".join(f"{v:.10g}" for v in where),
            "0020|0037": "\\".join(f"{direction[i]:.10g}" for i in (0, 3, 6, 1, 4, 7)),
            "0010|0020": patient,
            "0020|0052": f"{UID}.8", "0018|0050": "9",  # the thickness of a slice is not the distance between slices
        }  # fmt: skip
        for tag, value in tags.items():
            page.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{prefix}{array.shape[2] - z:03d}.dcm"))  # names in the order from behind
        writer.Execute(page)
    return folder
