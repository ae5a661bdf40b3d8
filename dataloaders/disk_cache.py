"""What was found out about a case, kept next to the data: that its file is sound, and its volumes as plain arrays."""

import dataclasses
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataloaders.cases import Case
from dataloaders.likeness import DIGITS
from dataloaders.normalization import Scaling, normalized, scaling_of
from utils.checkpoint import write_whole
from utils.distributed import RANK
from utils.errors import UserError
from utils.run_folder import digest


@dataclass(frozen=True)
class Kept:
    """What is known of a case without opening its file."""

    shape: tuple[int, ...]
    """Of the case itself, before pooling."""
    checksum: str
    """Of the case itself: its image and, if it is labeled, its label."""
    fingerprint: str
    """Of its image, see dataloaders/likeness.py."""
    scaling: Scaling | None = None
    """What --normalize does to the image, if that is read crop by crop."""
    image: NDArray[np.float32] | None = None
    """(W,H,D), scaled and pooled, if the cache holds arrays."""
    label: NDArray[np.uint8] | None = None
    """(W,H,D), pooled, if it does and the case is labeled."""


class Checks:
    """CASE-KEY.json below a folder: a case whose file was read, found sound and need not be decoded again to know it.

    KEY stands for the place of the case's file, links followed, seen from the folder: sets that share a folder do not
    meet in it, and a set that is moved together with the folder keeps its entries. An entry counts while that file has
    the inode, the size and the times of change that it had before it was read, of which the last (ctime) cannot be set
    by hand; that of a case without label does not count once the case is labeled, nor one with more classes than now
    are asked for.

    Without a folder, or where it cannot be written, the entries last as long as this object.
    """

    def __init__(self, folder: Path | None, normalize: str = "none"):
        self.folder, self.normalize = folder, normalize
        self._entries: dict[str, dict[str, Any]] = {}
        self._sources: dict[str, list[int]] = {}

    def find(self, case: Case) -> Kept | None:
        """The entry of a case; None if there is none that counts."""
        try:
            source = _source(case)
            self._sources[case.name] = source
            entry = self._entries.get(case.name) or json.loads(self._path(case, "json").read_text(encoding="utf-8"))
            if entry["source"] != source or (case.labeled and not entry["both"]):
                return None
            if case.labeled and entry.get("classes", 1) > case.classes:
                return None
            return self._kept(case, entry)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def add(self, case: Case, image: NDArray, label: NDArray | None, fingerprint: str) -> None:
        """Makes the entry of a case that `find` has just not found, from its image and label (W,H,D).

        Raises:
            UserError: the folder cannot be written to, and the arrays were to be kept there.
        """
        entry = {
            "source": self._sources[case.name],
            "shape": image.shape,
            "fingerprint": fingerprint,
            "both": None if label is None else digest(image, label),
            "classes": 1 if label is None else max(int(label.max()), 1),
            "scaling": scaling_of(image, self.normalize),
        }
        if self.folder is not None:
            try:
                self._path(case, "json").parent.mkdir(parents=True, exist_ok=True)
                self._write(case, image, label)
                write_whole(self._path(case, "json"), json.dumps(entry).encode())  # last: what it tells of is there
            except OSError as e:
                self._refused(e)
        self._entries[case.name] = entry

    def _path(self, case: Case, what: str) -> Path:
        if self.folder is None:
            raise FileNotFoundError
        place = os.path.relpath(case.path.resolve(), self.folder.resolve())
        return self.folder / f"{case.name}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}.{what}"

    def _kept(self, case: Case, entry: dict[str, Any]) -> Kept:
        scaling = None if self.normalize == "none" else Scaling(*entry["scaling"])
        mark = entry["fingerprint"]
        return Kept(tuple(entry["shape"]), entry["both"] if case.labeled else mark[:DIGITS], mark, scaling)

    def _write(self, case: Case, image: NDArray, label: NDArray | None) -> None:
        """Writes what the entry needs besides itself."""

    def _refused(self, e: OSError) -> None:
        folder, self.folder = self.folder, None
        if folder is not None and RANK == 0:
            print(
                f"warning: {folder} cannot be written to ({e.strerror or e}), so every start checks all volumes "
                "anew. Name another place with --cache-folder.",
                file=sys.stderr,
            )


class DiskCache(Checks):
    """CASE-KEY.image.npy and .label.npy too: the volumes, decoded once for all runs to come and mapped into memory.

    The label of a case that is not labeled is neither written nor read. `pool` makes of an image (False) and of a
    label (True) what is kept.
    """

    def __init__(self, folder: Path, pool: Callable[[NDArray, bool], NDArray], normalize: str = "none"):
        super().__init__(folder, normalize)
        self.pool = pool

    def _kept(self, case: Case, entry: dict[str, Any]) -> Kept:
        """With its arrays mapped from disk; writing to them changes nothing there."""
        image = np.load(self._path(case, "image.npy"), mmap_mode="c")
        label = np.load(self._path(case, "label.npy"), mmap_mode="c") if case.labeled else None
        found = super()._kept(case, entry)
        return dataclasses.replace(found, scaling=None, image=image, label=label)

    def _write(self, case: Case, image: NDArray, label: NDArray | None) -> None:
        write_whole(self._path(case, "image.npy"), _npy(self.pool(normalized(image, self.normalize), False)))
        if label is not None:
            write_whole(self._path(case, "label.npy"), _npy(self.pool(label, True)))

    def _refused(self, e: OSError) -> None:
        raise UserError(
            f"the volumes cannot be kept in {self.folder} ({e}). Name another place with --cache-folder, or take "
            "--cache ram."
        ) from e


def _npy(array: NDArray) -> bytes:
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def _source(case: Case) -> list[int]:
    """What a file that took the place of another one, or new content in the same file, changes."""
    stat = case.path.stat()
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
