"""Caches on disk: results of checking the case files, and their volumes as plain arrays."""

import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataloaders.cases import Case, CaseError, refuse_channels
from dataloaders.findings import Facts
from dataloaders.fingerprints import DIGITS
from dataloaders.normalization import NONE, Normalization, Scaling, scaled, scalings_of_case
from utils.checkpoint import write_whole
from utils.distributed import RANK
from utils.errors import UserError, warn
from utils.run_folder import digest


@dataclass(frozen=True)
class CacheEntry:
    """Cached knowledge about a case, available without opening its file."""

    checksum: str
    """Digest of the image and, if the case is labeled, of its label."""
    facts: Facts
    """What was seen of the case when it was read, without the label of an unlabeled one."""
    scalings: list[Scaling] | None = None
    """Scaling of each channel by --normalize, if the image is read crop by crop."""
    image: NDArray[np.float32] | None = None
    """(W,H,D) or (K,W,H,D), scaled and pooled; None if the cache holds no arrays."""
    label: NDArray[np.uint8] | None = None
    """(W,H,D), pooled; None if the cache holds no arrays or the case is unlabeled."""


class CaseCache:
    """Entries FOLDER/CASE-KEY.json for cases whose file was read and found valid, so that it need not be read again.

    With `pool`, a function: volume, whether it is a label -> array to keep, the volumes are there too, as
    CASE-KEY.image.npy and .label.npy, decoded once for all runs and memory-mapped. The label of an unlabeled case is
    neither written nor read.

    KEY is a hash of the path of the case's file, links resolved, relative to the folder. So sets that share a folder
    have separate entries, and a set that is moved with the folder keeps its entries. An entry is valid while the file
    has the inode, size and times of change that it had before it was read; the last of them (ctime) cannot be set by
    hand. An entry made without label is not valid for a labeled case, nor is one with more classes than now allowed or
    with another number of channels.

    Without a folder, or if the folder cannot be written, the entries last as long as this object; `pool` needs one.
    """

    def __init__(
        self,
        folder: Path | None,
        normalize: Normalization = NONE,
        pool: Callable[[NDArray, bool], NDArray] | None = None,
    ):
        self.folder, self.normalize, self.pool = folder, normalize, pool
        self._entries: dict[str, dict[str, Any]] = {}
        self._sources: dict[str, list[int]] = {}

    def find(self, case: Case) -> CacheEntry | None:
        """The valid entry of a case, or None."""
        try:
            source = _source(case)
            self._sources[case.name] = source
            entry = self._entries.get(case.name) or json.loads(self._path(case, "json").read_text(encoding="utf-8"))
            if entry["source"] != source or (case.labeled and not entry["both"]):
                return None
            if case.labeled and entry.get("classes", 1) > case.classes:
                return None
            refuse_channels(entry["shape"], case.channels)
            return self._entry_of(case, entry)
        except (OSError, EOFError, ValueError, KeyError, TypeError, CaseError):  # EOFError: an empty .npy
            return None

    def add(self, case: Case, image: NDArray, label: NDArray | None, facts: Facts) -> None:
        """Creates the entry of a case, whose label (W,H,D) is None if it is unlabeled, for which `find` has just
        returned None.

        Raises:
            UserError: if the folder cannot be written and was to hold the arrays.
            CaseError: if the image cannot be scaled.
        """
        scalings = scalings_of_case(case, image, self.normalize)
        entry = {
            "source": self._sources[case.name],
            "shape": image.shape,
            "fingerprint": facts.fingerprint,
            "seen": [facts.mean, facts.sd, facts.p1, facts.p99, facts.voxels, facts.others],
            "both": None if label is None else digest(image, label),
            "classes": 1 if label is None else max(int(label.max()), 1),
            "scaling": scalings,
        }
        if self.folder is not None:
            try:
                if self.pool:
                    write_whole(self._path(case, "image.npy"), _npy(self.pool(scaled(image, scalings), False)))
                    if label is not None:
                        write_whole(self._path(case, "label.npy"), _npy(self.pool(label, True)))
                write_whole(self._path(case, "json"), json.dumps(entry).encode())  # last: it refers to the others
            except UserError as e:
                if self.pool:
                    raise UserError(f"{e} --cache-folder names one, and --cache ram needs none.") from e
                self.folder = None
                if RANK == 0:
                    warn(f"{e} Until then every start checks all volumes anew. --cache-folder names another place.")
        self._entries[case.name] = entry

    def _path(self, case: Case, what: str) -> Path:
        if self.folder is None:
            raise FileNotFoundError
        place = os.path.relpath(case.path.resolve(), self.folder.resolve())
        return self.folder / f"{case.name}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}.{what}"

    def _entry_of(self, case: Case, entry: dict[str, Any]) -> CacheEntry:
        mark = entry["fingerprint"]
        checksum = entry["both"] if case.labeled else mark[:DIGITS]
        mean, sd, p1, p99, voxels, others = entry["seen"]
        kept = {int(c): n for c, n in voxels.items()} if case.labeled else None  # JSON has text for the classes
        shape = tuple(entry["shape"][-3:])
        facts = Facts(case, shape, None, mean, sd, p1, p99, kept, mark, others=tuple(map(tuple, others)))
        if self.pool:  # writing to these arrays does not change the files
            image = np.load(self._path(case, "image.npy"), mmap_mode="c")
            label = np.load(self._path(case, "label.npy"), mmap_mode="c") if case.labeled else None
            return CacheEntry(checksum, facts, None, image, label)
        scalings = None if self.normalize.kind == "none" else [Scaling(*values) for values in entry["scaling"]]
        return CacheEntry(checksum, facts, scalings)


def _npy(array: NDArray) -> bytes:
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def _source(case: Case) -> list[int]:
    """Inode, size and times of the case's file, of which a replaced or rewritten file changes at least one."""
    stat = case.path.stat()
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
