"""The folder of one run: its options, its manifest, the curves as text, and the checkpoints."""

import contextlib
import csv
import errno
import hashlib
import io
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.checkpoint import LAST, PREVIOUS, write_whole
from utils.devices import cores
from utils.errors import UserError
from utils.run_lock import LOCK

OPTIONS, MANIFEST, SCALARS = "options.txt", "manifest.json", "scalars.csv"
MOVED_ASIDE = re.compile(r"\.\d{8}-\d{6}(\.\d+)?(?=/|$)")  # what --fresh adds to the name of an old run folder
MEASURED = ("wall_s", "iterations_per_s", "peak_memory_gib", "time_shares", "best")  # of a finished run
PACKAGES = ("torch", "numpy", "h5py", "scipy", "medpy", "scikit-image", "tensorboard")


def refuse_existing(folder: Path, *, resume: bool = False) -> None:
    """Raises UserError if there is something in the folder already: a run is never overwritten.

    `resume`: whether --resume auto looked for a run there and found none.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, where the run's folder should be. Choose another --name or --runs.")
    if folder.exists() and any(folder.iterdir()):
        state = "holds files, but no run to go on with" if resume else "exists already"
        go_on = "" if resume else "--resume auto to go on with it, "
        raise UserError(
            f"the run folder {folder} {state}. Use {go_on}--fresh to move it aside and start again, or --name for "
            "another one."
        )


def make_run_folder(folder: Path, *, fresh: bool) -> None:
    """Makes the folder if it is not there; `fresh` first moves an old one aside, nothing is ever deleted.

    Raises:
        UserError: if it cannot be made.
    """
    try:
        if fresh and folder.exists():
            name = f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}"
            names = [name, *(f"{name}.{n}" for n in range(1, 1000))]
            os.replace(folder, next(path for path in map(folder.with_name, names) if not path.exists()))
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot make the run folder {folder}: {e.strerror}. Choose another --runs folder.") from e


@contextlib.contextmanager
def named_disk_errors(folder: Path) -> Iterator[None]:
    """Turns errors of a full, read-only or broken disk into a UserError.

    Raises:
        UserError: in place of an OSError of that kind.
    """
    try:
        yield
    except OSError as e:
        of_ours = e.filename is not None and Path(os.fsdecode(e.filename)).is_relative_to(folder)
        if not of_ours and e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise UserError(
            f"cannot write to {e.filename or folder}: {e.strerror or e}. Fix that, then give the same command again "
            "with --resume auto."
        ) from e


def refuse_changed(folder: Path, state: dict[str, Any] | None) -> None:
    """Raises UserError if the checkpoint to go on from has changed, or appeared meanwhile."""
    try:
        if has_checkpoint(folder) if state is None else Path(state["file"]).stat().st_mtime_ns != state["saved"]:
            raise UserError(f"another process trained in {folder} while this one started. Start again.")
    except FileNotFoundError as e:
        raise UserError(f"{e.filename} is gone, which was there a moment ago. Start again.") from e


def was_begun(folder: Path) -> bool:
    """Whether a run began there, even if it ended before it could write more than its lock or its log."""
    return any((folder / name).exists() for name in (MANIFEST, OPTIONS, "log.txt", LOCK))


def has_checkpoint(folder: Path) -> bool:
    """Whether a run was ever saved there."""
    return any((folder / name).exists() for name in (LAST, PREVIOUS))


def git(*arguments: str) -> str | None:
    """What a git command says in this repository; None if it fails."""
    try:
        here = Path(__file__).resolve().parent
        result = subprocess.run(["git", *arguments], cwd=here, capture_output=True, encoding="utf-8", check=True)
        return result.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def processor() -> str:
    """The processor's name as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def version_of(package: str) -> str:
    """The installed version; of torch with its build, such as 2.13.0+cu130, which a wheel's metadata may leave out.

    Raises:
        importlib.metadata.PackageNotFoundError: it is not installed.
    """
    return str(torch.__version__) if package == "torch" else metadata.version(package)


def make_manifest(device: torch.device, **more: Any) -> dict[str, Any]:
    """Command, commit, versions and hardware of a run, as plain JSON values."""
    return {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        **more,
    }


def start_manifest(folder: Path, start: int, manifest: dict[str, Any]) -> dict[str, Any]:
    """Writes manifest.json of a run that begins at iteration `start`, and returns it.

    A resumed run keeps its first manifest and adds when, where and how it went on. What was measured at the end of a
    run that goes further is left out until its new end.
    """
    path = folder / MANIFEST
    before = read_json(path) if start else {}  # a damaged one is written anew
    if before:
        began = {key: value for key, value in before.items() if key not in MEASURED}
        again = {key: manifest[key] for key in ("command", "started", "commit", "device", "threads", "precision")}
        further = {"extended": manifest["extended"]} if "extended" in manifest else {}
        manifest = {**began, "resumed": [*began.get("resumed", []), {"iteration": start, **again}], **further}
    write_json(path, manifest)
    return manifest


def write_json(path: Path, value: Any) -> None:
    """Writes a value of plain Python as indented JSON, whole or not at all."""
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file of a run folder; nothing where there is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def digest(*arrays: Any) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the arrays' bytes."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array).data)  # no copy of a volume that lies in order
    return sha.hexdigest()[:16]


class Scalars:
    """scalars.csv: the curves as text, a row for every logged iteration. A resumed run drops rows from `start` on.

    A curve that begins later gets a column of its own then; a row without a value has nan there.
    """

    def __init__(self, folder: Path, start: int):
        self.path = folder / SCALARS
        self.names: list[str] = []
        if self.path.exists():
            self.names, *rows = self._read()
            self._write([row for row in rows if row and int(row[0]) < start])

    def _read(self) -> list[list[str]]:
        with open(self.path, newline="", encoding="utf-8") as f:
            return list(csv.reader(f)) or [[]]

    def _write(self, rows: list[list[str]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.names, *rows] if self.names else [])
        write_whole(self.path, text.getvalue().encode())

    def add(self, iteration: int, values: dict[str, float]) -> None:
        new = [name for name in values if name not in self.names]
        if self.names and new:
            _, *rows = self._read()
            self.names += new
            self._write([row + ["nan"] * len(new) for row in rows])
        with open(self.path, "a", newline="", encoding="utf-8") as f:
            writer = csv.writer(f, lineterminator="\n")
            if not self.names:
                self.names = ["iteration", *values]
                writer.writerow(self.names)
            writer.writerow([iteration, *(f"{values.get(name, math.nan):.6g}" for name in self.names[1:])])
