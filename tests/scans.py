"""Scans in files, for the tests of own data: noisy bright balls on oblique, anisotropic grids, and folders of them."""

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from dataloaders.images import Geometry, to_physical
from tools import convert

# Turned about all three axes and mirrored along the second: z, y, x angles of 0.5, -0.3 and 0.2 rad.
_cz, _sz, _cy, _sy, _cx, _sx = np.cos(0.5), np.sin(0.5), np.cos(-0.3), np.sin(-0.3), np.cos(0.2), np.sin(0.2)
_TURNED = (
    np.array([[_cz, -_sz, 0], [_sz, _cz, 0], [0, 0, 1]])
    @ np.array([[_cy, 0, _sy], [0, 1, 0], [-_sy, 0, _cy]])
    @ np.array([[1, 0, 0], [0, _cx, -_sx], [0, _sx, _cx]])
    @ np.diag([1.0, -1.0, 1.0])
)
OBLIQUE: Geometry = {
    "spacing": (0.8, 1.0, 1.7),
    "origin": (-31.5, 12.25, 103.75),
    "direction": tuple(map(float, _TURNED.ravel())),
}


def picture_of(array: np.ndarray, geometry: Geometry) -> sitk.Image:
    """What SimpleITK itself makes of an array (W,H,D), to write files by other code than that which is tested."""
    picture = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    picture.SetSpacing(geometry["spacing"])
    picture.SetOrigin(geometry["origin"])
    picture.SetDirection(geometry["direction"])
    return picture


def write(path: Path, array: np.ndarray, geometry: Geometry = OBLIQUE) -> Path:
    """A file of any format that SimpleITK writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(picture_of(array, geometry), str(path))
    return path


def turned(array: np.ndarray, geometry: Geometry, orientation: str = "RAS") -> tuple[np.ndarray, Geometry]:
    """An array and its geometry with axes along the patient's, by SimpleITK's own code."""
    picture = sitk.DICOMOrient(picture_of(array, geometry), orientation)
    result = {"spacing": picture.GetSpacing(), "origin": picture.GetOrigin(), "direction": picture.GetDirection()}
    return sitk.GetArrayFromImage(picture).transpose(2, 1, 0), result


def ball(shape: tuple[int, int, int], geometry: Geometry, centre: np.ndarray, radius: float) -> np.ndarray:
    """uint8 (W,H,D), 1 within `radius` mm of a place in mm."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return (np.linalg.norm(to_physical(geometry, index) - centre, axis=-1) < radius).astype(np.uint8)


def make_scans(
    folder: Path, labeled: int = 4, unlabeled: int = 2, shape=(30, 28, 18), ending=".nii.gz"
) -> list[np.ndarray]:
    """images/ and labels/ with scans of a bright ball; returns the balls' places in mm."""
    places = []
    for i in range(labeled + unlabeled):
        rng = np.random.default_rng(i)
        geometry = {**OBLIQUE, "origin": tuple(rng.uniform(-50, 50, 3))}
        places.append(to_physical(geometry, np.array(shape) / 2 + rng.uniform(-3, 3, 3)))
        label = ball(shape, geometry, places[-1], 7.0)
        image = 300 + 100.0 * label + 10 * rng.standard_normal(shape)
        write(folder / "images" / f"patient{i}{ending}", image.astype(np.float32), geometry)
        if i < labeled:
            write(folder / "labels" / f"patient{i}{ending}", label, geometry)
    return places


def converted(source: Path, out: Path, *args: str) -> Path:
    """The data set that tools.convert makes of the scans, in `out`."""
    convert.main(["--source", str(source), "--out", str(out), *args])
    return out


# -- the Decathlon's and nnU-Net's layouts --

SHAPE = (30, 28, 18)
CENTRE = to_physical(OBLIQUE, (15, 14, 9))
DECATHLON = {"name": "Ball", "labels": {"0": "background", "1": "Anterior", "2": "Posterior"}}
NNUNET = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "Anterior": 1, "Posterior": 2},
    "file_ending": ".nii.gz",
}


def add(folder: Path, name: str, *, seed: int, label: bool = True, ending: str = "", split: str = "Tr") -> None:
    """A scan of imagesTr and, if it has one, its label of 0, 1 and 2, in labelsTr."""
    rng = np.random.default_rng(seed)
    inner, outer = (ball(SHAPE, OBLIQUE, CENTRE + rng.uniform(-3, 3, 3), r) for r in (5, 8))
    image = 300 + 100.0 * inner + 10 * rng.standard_normal(SHAPE)
    write(folder / f"images{split}" / f"{name}{ending}.nii.gz", image.astype(np.float32))
    if label:
        write(folder / f"labels{split}" / f"{name}.nii.gz", inner + outer)


def decathlon(folder: Path, labeled: int = 6, unlabeled: int = 2, ending: str = "", about: dict | None = None) -> Path:
    """The layout of the Decathlon's tars, with the files that macOS put into them."""
    for i in range(labeled):
        add(folder, f"ball_{i:03d}", seed=i, ending=ending)
    for i in range(labeled, labeled + unlabeled):
        add(folder, f"ball_{i:03d}", seed=i, ending=ending, label=False, split="Ts")
    for path in list(folder.rglob("*.nii.gz")):
        path.with_name(f"._{path.name}").write_bytes(b"Mac OS X")
    (folder / "._dataset.json").write_bytes(b"Mac OS X")
    (folder / "dataset.json").write_text(json.dumps(about or DECATHLON))
    return folder


def names(*numbers: int) -> list[str]:
    return [f"ball_{i:03d}" for i in numbers]
