"""Checkpoints: a save leaves the old one or the new one, never half of it; loading one never runs code."""

import errno
import io
import itertools
import os
import pickle
import shutil
import socket
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from utils.early_options import renamed
from utils.errors import UserError, warn
from utils.shared_weights import ENDING, PIECES, read_shared

FORMAT = 1
CONTENTS = ("options", "iteration", "seconds", "checksums", "processes", "method", "optimizer")
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
CHUNK = 2**20
AFTER_SPACE = "Free some space, then give the same command again with --resume auto."
BARE_WEIGHTS = (
    "Bare weights, as the released codes save them, do not name their method: test_la.py tests them with --method NAME."
)


def fsync(path: Path) -> None:
    """Makes a file, or a rename inside a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole(path: Path, advice: str = "Fix that, or choose another folder.") -> Iterator[Path]:
    """Context with the temporary name of a file, which gets its own name at the end if nothing fails.

    Readers see the old file or the new one. The folder is made. The ending is kept, as ITK chooses the format by it.

    Raises:
        UserError: the file cannot be written.
    """
    partial = path.with_name(f".{socket.gethostname()}-{os.getpid()}.partial.{path.name}")
    try:
        with _cannot_write(path, advice):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            fsync(partial)
            os.replace(partial, path)
            fsync(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink()


@contextmanager
def _cannot_write(path: Path, advice: str) -> Iterator[None]:
    """Context that turns the errors of writing a file into a UserError that names it."""
    try:
        yield
    except (OSError, RuntimeError) as e:  # h5py and ITK raise the second for a full disk
        reason = getattr(e, "strerror", None) or str(e).strip().rpartition("\n")[2]
        raise UserError(f"cannot write {path}: {reason}. {advice}") from e


def refuse_unwritable(folder: Path) -> None:
    """Raises UserError if a folder, which need not be there yet, takes no new file. It is left as it is."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    with _cannot_write(folder, "Choose another folder."):
        tempfile.TemporaryFile(dir=there).close()


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Writes a file as `whole` does."""
    with whole(path) as partial:
        partial.write_bytes(data)


def _reads_back(path: Path, data: memoryview) -> bool:
    """Whether the file holds these bytes."""
    with open(path, "rb") as f:
        if hasattr(os, "posix_fadvise"):  # ask the disk, not the memory that the bytes went through
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return all(f.read(CHUNK) == data[i : i + CHUNK] for i in range(0, len(data) + 1, CHUNK))


def save_checkpoint(folder: Path, state: dict[str, Any], name: str = LAST) -> Path:
    """Saves `state` (tensors and plain Python only) as folder/last.pt. The one before becomes folder/previous.pt.

    The new file is read back before it takes the name, and previous.pt changes only after that. So one of the two is
    whole at every moment, even if the old last.pt was damaged. Another `name` has no previous.pt.

    Raises:
        UserError: when the folder cannot be written (full, read-only, failing); what was there before is untouched.
    """
    path, before = folder / name, folder / f".{PREVIOUS}.partial"
    data = io.BytesIO()  # written directly to a full disk, torch.save hides the reason
    torch.save({"format": FORMAT, **state}, data)
    try:
        with whole(path, AFTER_SPACE) as partial:
            partial.write_bytes(data.getbuffer())
            fsync(partial)
            if not _reads_back(partial, data.getbuffer()):
                raise OSError(errno.EIO, "what was written reads back as something else")
            before.unlink(missing_ok=True)
            if name == LAST and path.exists():  # a second name for the old file
                try:
                    os.link(path, before)
                except OSError:  # a file system without hard links
                    shutil.copy(path, before)
        with _cannot_write(folder / PREVIOUS, AFTER_SPACE):
            if before.exists():
                os.replace(before, folder / PREVIOUS)
                fsync(folder)
    finally:
        with suppress(OSError):
            before.unlink()
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Loads a checkpoint onto the CPU.

    Args:
        path: a file of train_dtml.py; a run folder, whose newest whole checkpoint is taken; a folder of tools.share or
            a file in it.

    Returns:
        What was saved, with the present names of the options, the `file`, and the time of its last change in
        nanoseconds, `saved`.

    Raises:
        UserError: missing, cut short, damaged (CRC), not a checkpoint, of another format, holding more than tensors and
            plain Python, or not all of the pieces; the text says which.
    """
    if path.is_dir():
        files = [path / name for name in (LAST, PREVIOUS) if (path / name).exists()]
        if not files and next(path.glob(PIECES), None):
            return _checked(read_shared(path))
        if not files:
            raise UserError(f"{path} holds no checkpoint {LAST}. Give a run folder of train_dtml.py or a .pt file.")
        for candidate, older in itertools.pairwise(files):
            try:
                return load_checkpoint(candidate)
            except UserError as e:
                warn(f"{e} Using {older} instead.")
        path = files[-1]
    elif path.is_file() and path.suffix == ENDING:
        return _checked(read_shared(path.parent))
    state, saved = _read(path)
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"{path} is no checkpoint of this project: it has no format number. {BARE_WEIGHTS}")
    return _checked({**state, "file": str(path), "saved": saved})


def _checked(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's contents with the present names of the options.

    Raises:
        UserError: another format, or parts that are missing or of another kind.
    """
    path = state["file"]
    number = state.get("format")
    if type(number) is not int or number != FORMAT:
        raise UserError(
            f"{path} has checkpoint format {number}, this code reads {FORMAT}. "
            "Use the version of the code that wrote it."
        )
    missing = [name for name in CONTENTS if name not in state]
    if missing:
        raise UserError(f"{path} is damaged or incomplete (it lacks {', '.join(missing)}). Use an older one.")
    kinds: dict[str, Any] = {"options": dict, "iteration": int, "seconds": (int, float)}
    wrong = [name for name, kind in kinds.items() if not isinstance(state[name], kind)]
    for name in ("checksums", "images"):  # early checkpoints have no images
        values = state.get(name, {})
        if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
            wrong.append(name)
    if wrong or not isinstance(state["options"].get("method"), str):
        raise UserError(
            f"{path} is damaged or incomplete (invalid entries: {', '.join(wrong) or 'method'}). Use an older one."
        )
    return {**state, "options": renamed(state["options"])}


def unfinished(state: dict[str, Any]) -> str:
    """How far a checkpoint's run had come, if it was to go on; '' for the last checkpoint of a run and for best.pt."""
    done, iterations = state["iteration"], state["options"]["iterations"]
    best = state.get("saved_as", Path(state["file"]).name) == BEST  # the first of shared weights
    return "" if best or done >= iterations else f"{done} of {iterations} iterations"


def channels_of_state(state: dict[str, Any]) -> list[str]:
    """Names of the channels that a checkpoint was trained on; early ones state none and have one."""
    return state.get("channel_names") or [f"channel {i}" for i in range(state["options"].get("channels", 1))]


def classes_of_state(state: dict[str, Any]) -> dict[int, str]:
    """Class -> its name, of those that the training set of a checkpoint named."""
    return {int(c): name for c, name in state.get("class_names", {}).items()}


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Bare weights on the CPU: a state_dict as torch.save writes it, also in its format before torch 1.6.

    Raises:
        UserError: missing, cut short, damaged, a checkpoint of this project, or holding anything but named tensors.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder. Give the file of the weights.")
    state, _ = _read(path, older=True)
    if isinstance(state, dict) and "format" in state:
        raise UserError(f"{path} is a checkpoint of train_dtml.py, which knows its method. Leave out --method.")
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not state or not all(isinstance(weight, torch.Tensor) for weight in state.values()):
        what = f"a dict of {', '.join(map(str, list(state)[:4]))}" if isinstance(state, dict) else type(state).__name__
        raise UserError(
            f"{path} holds {what}, not bare weights. Save them with torch.save(network.state_dict(), FILE)."
        )
    return dict(state)


def _read(path: Path, *, older: bool = False) -> tuple[Any, int]:
    """The content of a file, on the CPU, and the time of its last change in nanoseconds. Never runs code from it.

    `older` also accepts the format that torch wrote before 1.6, which has no checksums.

    Raises:
        UserError: as in load_checkpoint.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist. Give a run folder of train_dtml.py or a .pt file.")
    try:
        saved = path.stat().st_mtime_ns
        if not older or zipfile.is_zipfile(path):
            _check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as e:
        raise UserError(
            f"{path} holds more than tensors and plain Python, so it was not loaded and nothing in it was run. "
            "Only open checkpoints written by train_dtml.py."
        ) from e
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}. Check the file and its permissions.") from e
    except zipfile.BadZipFile as e:
        raise UserError(f"{path} is incomplete or no checkpoint ({e}). Use an older one. {BARE_WEIGHTS}") from e
    except Exception as e:  # zipfile and torch raise many kinds of errors for damaged files
        what = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(f"{path} is incomplete or no checkpoint ({what}). Use an older one.") from e
    return state, saved


def _check_archive(path: Path) -> None:
    """Verifies the checksums of the archive in bounded memory, as torch itself loads flipped bits without an error.

    Raises:
        UserError: an entry that is damaged, or that would unpack to more than the file holds.
        zipfile.BadZipFile and others: not a zip archive.
    """
    with zipfile.ZipFile(path) as archive:
        entries, size = archive.infolist(), path.stat().st_size
        claimed = sum(entry.file_size for entry in entries)
        if claimed > size:  # torch does not compress
            raise UserError(
                f"{path} was not loaded: its {size} bytes claim to unpack to {claimed}. "
                "Only open checkpoints written by train_dtml.py."
            )
        # torch skips the data of an entry that is marked as a folder, and its tensor stays uninitialized.
        marked = (entry.filename for entry in entries if entry.external_attr)
        damaged = archive.testzip() or next(marked, None)
    if damaged is not None:
        raise UserError(f"{path} is damaged: the checksum or the entry of {damaged} is wrong. Use an older checkpoint.")


def fit_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Gives an optimizer its saved state. torch itself would fail, or compute wrongly, only at the next step.

    Raises:
        ValueError: if the state is not of this optimizer and its weights.
    """
    try:
        optimizer.load_state_dict(state)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise ValueError(f"the optimizer's state is of another kind: {e!r}") from e
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    for p in weights:
        entries = optimizer.state.get(p, {})
        if entries.keys() != optimizer.state.get(weights[0], {}).keys():
            raise ValueError("the optimizer's state is incomplete")
        if any(isinstance(x, torch.Tensor) and x.dim() and x.shape != p.shape for x in entries.values()):
            raise ValueError("the optimizer's state is of weights of another shape")
