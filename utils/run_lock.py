"""Locks: one process at a time works on a run, or writes a test.

The package filelock does not replace this module: its locks name no owner that another computer or a requeued job could
check where flock does not reach across a network file system, and a child process cannot keep one of them.
"""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from utils.errors import UserError, warn

LOCK = ".lock"


def _birth(pid: int) -> str:
    """When the process began, in ticks since the computer's start; '' if that is unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _me() -> dict[str, Any]:
    # A requeued job keeps its number, perhaps on another computer. The process before it has ended by then.
    job = os.environ.get("SLURM_JOB_ID", "")
    return {"pid": os.getpid(), "born": _birth(os.getpid()), "host": socket.gethostname(), "job": job}


def _is_stale(owner: dict[str, Any]) -> bool:
    """Whether a lock's owner has certainly ended."""
    me = _me()
    if owner["host"] != me["host"]:
        return bool(owner["job"]) and owner["job"] == me["job"]
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        pass
    return owner["born"] != _birth(owner["pid"])  # the number was given to another process


def _owner(text: str) -> dict[str, Any] | None:
    """The owner that a lock file names; None if it is empty or was cut off while it was written."""
    try:
        owner = json.loads(text)
        pid = int(owner["pid"])
        rest = {key: str(owner[key]) for key in ("born", "host", "job")}
        return {"pid": pid, **rest} if 0 < pid < 2**31 else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _ended_owner(folder: Path, text: str) -> dict[str, Any] | None:
    """`_owner`. Raises UserError unless it has certainly ended."""
    owner = _owner(text)
    if owner is not None and not _is_stale(owner):
        raise UserError(
            f"process {owner['pid']} on {owner['host']} is training in {folder}. Wait for it or choose another "
            f"--name; if it is surely gone, delete {folder / LOCK}."
        )
    return owner


def refuse_locked(folder: Path) -> None:
    """Raises UserError if a living process, or one of another computer, trains in the folder. Writes nothing."""
    with contextlib.suppress(OSError):  # no lock file, or one that `run_lock` reports
        _ended_owner(folder, (folder / LOCK).read_text(encoding="utf-8", errors="replace"))


@contextlib.contextmanager
def inherited_lock(path: Path) -> Iterator[IO[str] | None]:
    """Holds a lock file, which stays in place; yields None if another process holds it.

    A child that inherits the file's descriptor holds the lock too, also after this process was killed.
    """
    with open(path, "a", encoding="utf-8") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
        else:
            yield f


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[IO[str]]:
    """The lock file, open. Others wait meanwhile, where the file system supports flock."""
    while True:
        with open(path, "a+", encoding="utf-8", errors="replace") as f:
            with contextlib.suppress(OSError):
                fcntl.flock(f, fcntl.LOCK_EX)
            try:
                removed = path.stat().st_ino != os.fstat(f.fileno()).st_ino
            except FileNotFoundError:
                removed = True
            if removed:  # by its owner, while we waited
                continue
            f.seek(0)
            yield f
            return


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds the lock of a run folder. Takes over that of a killed process and deletes its half-written files.

    Raises:
        UserError: another process holds it.
    """
    with _alone(folder / LOCK) as f:
        owner = _ended_owner(folder, f.read())
        if owner is not None:
            warn(f"process {owner['pid']} was killed while it trained in {folder}. Its lock is taken over.")
        f.truncate(0)
        f.write(json.dumps(_me()))
    for leftover in folder.glob(".*.partial*"):
        leftover.unlink(missing_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError), _alone(folder / LOCK) as f:  # a broken disk must not hide another error
            if _owner(f.read()) == _me():
                (folder / LOCK).unlink()


@contextlib.contextmanager
def folder_lock(folder: Path, who: str) -> Iterator[None]:
    """Makes a folder and holds it, without a file; it is deleted at the end if it is still empty.

    Where the file system has no locks of folders, nothing is held.

    Raises:
        UserError: another process, called `who`, holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as e:
        raise UserError(f"cannot write {folder}: {e.strerror}. Fix that, or choose another folder.") from e
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f"{who} is writing to {folder}. Wait for it, or choose another folder.") from e
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            folder.rmdir()
