"""Checkpoints: either the old one or the new one, never half; loading one never runs code."""

import io
import itertools
import os
import pickle
import shutil
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError

FORMAT = 1
CONTENTS = ("options", "iteration", "seconds", "checksums", "processes", "method", "optimizer")
LAST, PREVIOUS = "last.pt", "previous.pt"


def fsync_folder(folder: Path) -> None:
    """Makes a rename inside the folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name beside it, then renames: readers see the old one or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    fsync_folder(path.parent)


def save_checkpoint(folder: Path, state: dict[str, Any]) -> Path:
    """Saves `state` (tensors and plain Python only) as folder/last.pt; the one before stays as folder/previous.pt.

    Raises:
        UserError: when the folder cannot be written (full or read-only); what was there before is untouched.
    """
    last, partial, link = folder / LAST, folder / f".{LAST}.partial", folder / f".{PREVIOUS}.partial"
    data = io.BytesIO()  # torch.save straight to a full disk hides the reason
    torch.save({"format": FORMAT, **state}, data)
    try:
        with open(partial, "wb") as f:
            f.write(data.getbuffer())
            f.flush()
            os.fsync(f.fileno())
        if last.exists():
            # A second name for the old file, so that at every moment some whole file is called last.pt.
            link.unlink(missing_ok=True)
            try:
                os.link(last, link)
            except OSError:  # a file system without hard links
                shutil.copy(last, link)
            os.replace(link, folder / PREVIOUS)
        os.replace(partial, last)
        fsync_folder(folder)
    except OSError as e:
        raise UserError(f"cannot save {last}: {e.strerror or e}. Free some space, then --resume {folder}.") from e
    finally:
        partial.unlink(missing_ok=True)
        link.unlink(missing_ok=True)
    return last


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Loads a checkpoint file, or the newest whole one of a run folder, onto the CPU; `file` in it tells which.

    Raises:
        UserError: missing, cut short, damaged (CRC), not a checkpoint, of another format, or holding more than
            tensors and plain Python; the text says which.
    """
    if path.is_dir():
        found = [path / name for name in (LAST, PREVIOUS) if (path / name).exists()]
        if not found:
            raise UserError(f"{path} holds no checkpoint {LAST}. Give a run folder of train_dtml.py or a .pt file.")
        for candidate, older in itertools.pairwise(found):
            try:
                return load_checkpoint(candidate)
            except UserError as e:
                print(f"warning: {e} Using {older} instead.", file=sys.stderr)
        path = found[-1]
    if not path.is_file():
        raise UserError(f"{path} does not exist. Give a run folder of train_dtml.py or a .pt file.")
    try:
        with zipfile.ZipFile(path) as archive:
            # torch itself loads flipped bits without a word, and skips the data of an entry marked as a folder.
            marked = (entry.filename for entry in archive.infolist() if entry.external_attr)
            damaged = archive.testzip() or next(marked, None)
        if damaged is not None:
            raise UserError(
                f"{path} is damaged: the checksum or the entry of {damaged} is wrong. Use an older checkpoint."
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise UserError(
            f"{path} holds more than tensors and plain Python, so it was not loaded and nothing in it was run. "
            "Only open checkpoints written by train_dtml.py."
        ) from e
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, KeyError, zlib.error) as e:
        what = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(f"{path} is incomplete or no checkpoint ({what}). Use an older one.") from e
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}. Check the file and its permissions.") from e
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"{path} is no checkpoint of this project: it has no format number. Give one of train_dtml.py.")
    if state["format"] != FORMAT:
        raise UserError(
            f"{path} has checkpoint format {state['format']}, this code reads {FORMAT}. "
            "Use the version of the code that wrote it."
        )
    missing = [name for name in CONTENTS if name not in state]
    if missing:
        raise UserError(f"{path} is no whole checkpoint: it lacks {', '.join(missing)}. Use an older one.")
    return {**state, "file": str(path)}


def fit_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Gives an optimiser its saved state; torch itself would fail, or go wrong, only at the next step.

    Raises:
        ValueError: if the state is not of this optimiser and its weights.
    """
    try:
        optimizer.load_state_dict(state)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise ValueError(f"the optimiser's state is of another kind: {e!r}") from e
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    for p in weights:
        found = optimizer.state.get(p, {})
        if found.keys() != optimizer.state.get(weights[0], {}).keys():
            raise ValueError("the optimiser's state is incomplete")
        if any(isinstance(x, torch.Tensor) and x.dim() and x.shape != p.shape for x in found.values()):
            raise ValueError("the optimiser's state is of weights of another shape")
