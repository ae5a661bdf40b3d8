"""Choosing a device and making its arithmetic repeatable."""

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from utils.errors import UserError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


def choose_device(name: str) -> torch.device:
    """'auto' is the GPU of this process if there is one, else the CPU; also 'cpu', 'cuda', 'cuda:1'.

    Raises:
        UserError: an unknown name, or a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise UserError(f"--device {name} is no device. Use auto, cpu, cuda or cuda:N.") from e
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if index >= count:
            raise UserError(f"--device {name} asks for GPU {index}, but there are {count} here. Use --device cpu.")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"--device {name} is not supported. Use auto, cpu, cuda or cuda:N.")
    return device


def set_arithmetic(*, deterministic: bool) -> None:
    """float32 means float32: cuDNN would use tf32 by itself, and sigmoid(-1500 z) magnifies its rounding."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def refuse_precision(precision: str, device: torch.device) -> None:
    """Raises UserError for a --precision that the device has no arithmetic for."""
    if precision == "tf32" and device.type != "cuda":
        raise UserError("--precision tf32 is arithmetic of GPUs, and this is a CPU. Leave it out.")


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed for what comes next, where it would give large blocks back to the system each time.

    A training step frees and asks for the same activations over and over, and clearing new pages for them is a tenth to
    a fifth of its time on a CPU. Elsewhere than on Linux with glibc nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(parameter, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**28)


@contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Memory that does not suffice, of the GPU or of the computer, is told in words, with what to do.

    Raises:
        UserError: in place of what torch or Python raise then.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as e:  # torch has no class of its own for the computer's memory
        where = "GPU's memory" if isinstance(e, torch.OutOfMemoryError) else "memory"
        if isinstance(e, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(e):
            raise UserError(
                f"the {where} does not suffice ({(str(e) or 'none left').splitlines()[0]}). {advice}"
            ) from e
        raise


def seed_iteration(seed: int, iteration: int, rank: int = 0) -> None:
    """Seeds torch from (seed, iteration, rank), so that dropout and noise have no history to save."""
    torch.manual_seed(int(np.random.SeedSequence([seed, iteration, rank]).generate_state(1, np.uint64)[0] >> 1))


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held so far: of the GPU if it computes there, else resident; in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
