"""Volumes as plain arrays on disk, decoded once for all runs to come and mapped into memory where they are cropped."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataloaders.cases import Case
from utils.checkpoint import write_whole
from utils.errors import UserError
from utils.run_folder import digest


@dataclass(frozen=True)
class Kept:
    """What the cache holds of a case: its image and label (W,H,D), pooled."""

    image: NDArray[np.float32]
    label: NDArray[np.uint8] | None
    shape: tuple[int, ...]
    """Of the case itself, before pooling."""
    checksum: str
    """Of the case itself: its image and, if it is labeled, its label."""


class DiskCache:
    """CASE.image.npy, CASE.label.npy and CASE.json below a folder.

    An entry counts while its source has the size and the time of change that it had; the label of a case that is not
    labeled is neither written nor read.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def find(self, case: Case) -> Kept | None:
        """The entry of a case, its arrays mapped from disk (writing to them changes nothing there); None if there is
        none that counts."""
        try:
            entry = json.loads(self._path(case, "json").read_text())
            if entry["source"] != _source(case) or (case.labeled and not entry["both"]):
                return None
            image = np.load(self._path(case, "image.npy"), mmap_mode="c")
            label = np.load(self._path(case, "label.npy"), mmap_mode="c") if case.labeled else None
            checksum = entry["both" if case.labeled else "image"]
            return Kept(image, label, tuple(entry["shape"]), checksum)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def add(self, case: Case, image: NDArray, label: NDArray | None, pool: Callable[[NDArray, bool], NDArray]) -> None:
        """Writes the entry of a case, image and label (W,H,D); `pool` makes of the image (False) and of the label
        (True) what is kept.

        Raises:
            UserError: the folder cannot be written to.
        """
        entry = {
            "source": _source(case),
            "shape": image.shape,
            "image": digest(image),
            "both": None if label is None else digest(image, label),
        }
        try:
            self._path(case, "json").parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path(case, "image.npy"), _npy(pool(image, False)))
            if label is not None:
                write_whole(self._path(case, "label.npy"), _npy(pool(label, True)))
            write_whole(self._path(case, "json"), json.dumps(entry).encode())  # last: what it tells of is there
        except OSError as e:
            raise UserError(
                f"the volumes cannot be kept in {self.folder} ({e}). Name another place with --cache-folder, or take "
                "--cache ram."
            ) from e

    def _path(self, case: Case, what: str) -> Path:
        return self.folder / f"{case.name}.{what}"


def _npy(array: NDArray) -> bytes:
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def _source(case: Case) -> list[int]:
    stat = case.path.stat()
    return [stat.st_size, stat.st_mtime_ns]
