"""One run folder, one training: the lock says which process of which computer is at it."""

import contextlib
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from utils.errors import UserError

LOCK = ".lock"


def _birth(pid: int) -> str:
    """When the process began, in ticks since the computer did; '' where the system does not say, or it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _me() -> dict[str, Any]:
    # A requeued job keeps its number, maybe on another computer; the one before it is gone by then.
    job = os.environ.get("SLURM_JOB_ID", "")
    return {"pid": os.getpid(), "born": _birth(os.getpid()), "host": socket.gethostname(), "job": job}


def _is_stale(owner: dict[str, Any]) -> bool:
    """Whether a lock's owner has surely ended."""
    me = _me()
    if owner["job"] and owner["job"] == me["job"] and owner["pid"] != me["pid"]:
        return True
    if owner["host"] != me["host"]:
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        pass
    return owner["born"] != _birth(owner["pid"])  # the number was given to another process


def _owner(text: str) -> dict[str, Any] | None:
    """Who wrote the lock; None if nobody did, or it was cut off while it was written."""
    try:
        found = json.loads(text)
        pid = int(found["pid"])
        words = {key: str(found[key]) for key in ("born", "host", "job")}
        return {"pid": pid, **words} if 0 < pid < 2**31 else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _refusal(folder: Path, owner: dict[str, Any]) -> UserError:
    return UserError(
        f"process {owner['pid']} on {owner['host']} is at the run {folder}. Wait for it or choose another --name; if "
        f"it is surely gone, delete {folder / LOCK}."
    )


def refuse_locked(folder: Path) -> None:
    """Raises UserError if a process that lives, or one of another computer, trains in the folder; writes nothing."""
    with contextlib.suppress(OSError):  # none, or one that `run_lock` will complain of
        owner = _owner((folder / LOCK).read_text(encoding="utf-8", errors="replace"))
        if owner is not None and not _is_stale(owner):
            raise _refusal(folder, owner)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[IO[str]]:
    """The lock file, open; nobody else looks at it meanwhile, where the file system can do that."""
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
    """Holds the lock of a run folder; takes over that of a process which was killed, with what it left half-written.

    Raises:
        UserError: another process holds it.
    """
    with _alone(folder / LOCK) as f:
        owner = _owner(f.read())
        if owner is not None and not _is_stale(owner):
            raise _refusal(folder, owner)
        if owner is not None:
            print(f"warning: process {owner['pid']} ended in {folder} without a word; going on.", file=sys.stderr)
        f.truncate(0)
        f.write(json.dumps(_me()))
    for leftover in folder.glob(".*.partial"):
        leftover.unlink(missing_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError), _alone(folder / LOCK) as f:  # a broken disk must not hide another error
            if _owner(f.read()) == _me():
                (folder / LOCK).unlink()
