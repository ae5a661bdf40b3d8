"""Choosing a device and making its arithmetic repeatable."""

import ctypes
import errno
import glob
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from utils.distributed import RANKS
from utils.errors import UserError

CARDS = ("/dev/nvidia[0-9]*", "/proc/driver/nvidia/gpus/*")  # of NVIDIA's driver on Linux
HIDDEN = ("", "-1", "none", "void", "nodevfiles")  # values by which people and schedulers hide all cards
NO_MEMORY = re.compile(  # messages of torch, its libraries and the system, as they have no error class of their own
    "out of memory|alloc_?failed|allocation_?failed|MemoryAllocation|can('t|not) allocate memory|not enough memory|"
    "bad_alloc|unable to find an engine|CUDNN_STATUS_NOT_SUPPORTED",
    re.IGNORECASE,
)
OF_GPU = re.compile("cuda|cudnn|cublas|cusolver|cufft|cusparse|nccl|\\bhip\\b|engine", re.IGNORECASE)
GIB = 2**30
MOST_THREADS = 1024  # of far more the system refuses to start some, and libraries fail in their own ways
SINCE_AMPERE = (8, 0)  # compute capability of the first cards with tf32 and bf16
BF16_OF_CPUS = ("avx512_bf16", "amx_bf16")  # as torch.cpu.get_capabilities names them
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_memory_gib() -> float:
    """Memory of this computer."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def choose_device(name: str) -> torch.device:
    """'auto' is the GPU of this process if there is one, else the CPU; also 'cpu', 'cuda', 'cuda:1'.

    Raises:
        UserError: an unknown name, a GPU that is not there or computes nothing, or with 'auto' one that torch does not
            reach.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        card = nvidia_card() if name == "cpu" else ""
        if card:
            raise UserError(
                f"this computer has an NVIDIA card ({card}), but torch {torch.__version__} does not reach it: "
                f"{why_no_cuda()} Fix that, or give --device cpu to compute on the CPU."
            )
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise UserError(f"--device {name} is no device. Use auto, cpu, cuda or cuda:N.") from e
    if device.type == "cuda":
        if device.index is not None and RANKS > 1:
            raise UserError(
                f"--device {name} would put all {RANKS} processes on one GPU. Use --device cuda: each takes its own."
            )
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if index >= count:
            if count and RANKS > 1:
                raise UserError(f"process {index} of this computer has no GPU: there are {count}. Give torchrun "
                                f"--nproc-per-node {count}.")  # fmt: skip
            if not count:
                raise UserError(f"--device {name}: torch reaches no GPU here: {why_no_cuda()} Or use --device cpu.")
            raise UserError(f"--device {name} asks for GPU {index}, but there are {count} here. Choose from cuda:0 to "
                            f"cuda:{count - 1}.")  # fmt: skip
        device = torch.device("cuda", index)
        try:
            torch.cuda.set_device(device)
            torch.ones(1, device=device).add_(1).tolist()
        except RuntimeError as e:  # full, in use by one program alone, or too old for this torch
            raise UserError(
                f"{device} does not compute: {str(e).splitlines()[0]}. nvidia-smi shows who uses it. If it is an old "
                "card, install a torch that is built for it, see pytorch.org. Or choose another --device."
            ) from e
    elif device.type != "cpu":
        raise UserError(f"--device {name} is not supported. Use auto, cpu, cuda or cuda:N.")
    return device


def why_device(name: str, device: torch.device) -> str:
    """The device that `choose_device` chose for a name, and why, as a part of a line."""
    if device.type == "cuda":
        shown = f"{device}, {torch.cuda.get_device_name(device)}"
    else:
        threads = torch.get_num_threads()
        shown = f"cpu, {threads} thread{'s' if threads > 1 else ''}"
    why = f"--device {name}" if name != "auto" else "a GPU is there" if device.type == "cuda" else "torch sees no GPU"
    return f"{shown} ({why})"


def nvidia_card() -> str:
    """The file or program that shows an NVIDIA card; '' if there is none, or if the environment hides it.

    A driver that does not answer at all counts as one that knows a card.
    """
    if any(os.environ.get(name, "all").strip().lower() in HIDDEN for name in
           ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")):  # fmt: skip
        return ""
    cards = sorted(path for pattern in CARDS for path in glob.glob(pattern))
    if cards:
        return cards[0]
    program = shutil.which("nvidia-smi")
    try:
        listing = program and subprocess.run([program, "-L"], capture_output=True, timeout=20, check=True).stdout
    except subprocess.TimeoutExpired:
        return f"{program} does not answer"
    except (OSError, subprocess.CalledProcessError):  # the program alone, without a driver
        return ""
    return f"by {program}" if listing and b"GPU" in listing else ""


def why_no_cuda() -> str:
    """Why torch sees no GPU, and what to do, as sentences."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA. Install the build for your driver's CUDA, see pytorch.org."
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as e:
        why = (str(e) or type(e).__name__).splitlines()[0].rstrip(".") + "."
    else:
        why = "it counts no device."
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    limit = "" if visible is None else f" CUDA_VISIBLE_DEVICES is {visible}."
    return f"{why}{limit} Look at nvidia-smi; a container needs its GPUs given (docker run --gpus all)."


def set_arithmetic(*, deterministic: bool) -> None:
    """float32 means float32: cuDNN would use tf32 by itself, and sigmoid(-1500 z) magnifies its rounding."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def precision_on(device: torch.device, precision: str) -> str:
    """What a --precision is on a device: itself, or for 'auto' bf16 if the device computes it natively, else fp32.

    Cards since Ampere and CPUs with AVX512-BF16 or AMX do. Other CPUs emulate bf16 and gain nothing.

    Raises:
        UserError: for one that the device has no arithmetic for. Older cards take tf32 and bf16 too, but compute in
            fp32 then, or slower than that.
    """
    on_gpu = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if on_gpu else (0, 0)
    if precision == "auto":
        of_cpu: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # early torch does not tell
        native = capability >= SINCE_AMPERE if on_gpu else any(of_cpu.get(name) for name in BF16_OF_CPUS)
        return "bf16" if native else "fp32"
    if precision == "tf32" and not on_gpu:
        raise UserError("--precision tf32 is arithmetic of GPUs, and this is a CPU. Leave it out.")
    if precision in ("tf32", "bf16") and on_gpu and capability < SINCE_AMPERE:
        raise UserError(
            f"--precision {precision} needs a card of compute capability {'.'.join(map(str, SINCE_AMPERE))} or "
            f"newer; {torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}. Leave it out."
        )
    return precision


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


def set_up(device: str, threads: int = 0, *, deterministic: bool = False) -> torch.device:
    """Sets threads (0: torch's choice), arithmetic and memory of this process, and returns the device of --device.

    Raises:
        UserError: more threads than MOST_THREADS, or as `choose_device`.
    """
    if threads > MOST_THREADS:
        raise UserError(f"--threads {threads} is more than {MOST_THREADS}. This computer has {cores()} cores.")
    if threads:
        torch.set_num_threads(threads)
    chosen = choose_device(device)
    set_arithmetic(deterministic=deterministic)
    keep_freed_memory()
    return chosen


def lack_of_memory(e: Exception) -> str:
    """The line of an error that tells of a lack of memory; '' if the error is another one."""
    lines = str(e).splitlines() or ["none left"]
    said = [line.strip() for line in lines if NO_MEMORY.search(line)]  # a data worker's error begins otherwise
    by_kind = isinstance(e, (torch.OutOfMemoryError, MemoryError)) or getattr(e, "errno", None) == errno.ENOMEM
    if by_kind or (said and isinstance(e, RuntimeError)):
        return said[-1] if said else lines[0]
    return ""


@contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Turns a lack of memory, of the GPU or of the computer, into a UserError that says what to do.

    Raises:
        UserError: in place of what torch or Python raise then.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as e:
        text = lack_of_memory(e)
        if not text:
            raise
        where = "GPU's memory" if isinstance(e, torch.OutOfMemoryError) or OF_GPU.search(text) else "memory"
        raise UserError(f"the {where} does not suffice ({text}). {advice}") from e


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device. The host waits neither for the copy to a GPU nor for what the GPU has still to compute.

    For that the memory must be pinned. torch keeps it until the copy is done.
    """
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def seed_iteration(seed: int, iteration: int, rank: int = 0) -> None:
    """Seeds torch from (seed, iteration, rank), so that dropout and noise have no history to save."""
    state = int(np.random.SeedSequence([seed, iteration, rank]).generate_state(1, np.uint64)[0])
    torch.manual_seed(state >> 1)  # a Python int: numpy 1 has no uint64 >> int


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held so far: of the GPU if it computes there, else resident; in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = GIB if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
