"""One process, or several under torchrun, with the same code. torchrun's environment variables select which."""

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

RANK = int(os.environ.get("RANK", 0))
RANKS = int(os.environ.get("WORLD_SIZE", 1))
PATIENCE = timedelta(hours=1)
"""How long a process waits for the others. At the start, one of them may check a whole data set first."""
_LAST_WORK: list[Any] = []


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the processes of torchrun; does nothing for a single process.

    After an error NCCL is not left in order: it would wait for the others, which may wait for this process, and the
    error would not be seen for an hour. torchrun ends the others when this process ends.
    """
    if RANKS == 1:
        yield
        return
    where: dict[str, Any] = {}
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt != "0" and os.environ.get("GROUP_WORLD_SIZE") == "1":
        # On one machine torchrun starts killed processes again with the store they had, where the addresses of those
        # before still stand; with several machines it makes a new one.
        store, *_ = next(dist.rendezvous("env://", RANK, RANKS))
        where = {"store": dist.PrefixStore(f"attempt {attempt}", store), "rank": RANK, "world_size": RANKS}
    if device.type == "cuda":
        where["device_id"] = device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE, **where)
    try:
        yield
    except BaseException:
        if device.type != "cuda":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def replicate(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The module with gradients averaged over all processes; the module itself where there is one process."""
    if RANKS == 1:
        return module
    # Those of a convolution from one channel, whose two layouts differ in name only.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)


def any_rank(*flags: float, device: torch.device) -> list[float]:
    """The largest value of each flag over all processes, so that all stop or fail together."""
    if RANKS == 1:
        return list(flags)
    shared = torch.tensor(flags, dtype=torch.float64, device=device)
    _all_reduce(shared, dist.ReduceOp.MAX)
    return shared.tolist()


def stop_of_any_rank(number: int, *, ask: bool, device: torch.device) -> int:
    """The largest signal that a process received; 0 if none did. Without `ask` it is 0, as to ask makes a GPU wait."""
    if RANKS == 1:
        return number
    return int(any_rank(number, device=device)[0]) if ask else 0


def worst_of_ranks(flag: torch.Tensor) -> torch.Tensor:
    """The largest value of a flag over all processes, on its device, without waiting for it."""
    if RANKS > 1:
        _all_reduce(flag, dist.ReduceOp.MAX)
    return flag


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """The mean of the gradients over all processes, for networks that DistributedDataParallel does not see."""
    if RANKS == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    _all_reduce(flat, dist.ReduceOp.SUM)
    for gradient, mean in zip(gradients, (flat / RANKS).split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def broadcast_buffers(module: torch.nn.Module) -> None:
    """Gives every process the buffers of rank 0, such as running statistics. DistributedDataParallel does the same
    before its next forward pass in training."""
    if RANKS > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def gather_in_order(mine: list[Any], size: int) -> list[Any]:
    """Gathers groups of `size` items, of which a process has number rank, rank + RANKS, ...; all get all, in order."""
    if RANKS == 1:
        return mine
    theirs: list[list[Any]] = [[] for _ in range(RANKS)]
    dist.all_gather_object(theirs, mine)
    groups = [[items[i : i + size] for i in range(0, len(items), size)] for items in theirs]
    return [item for turn in zip_longest(*groups, fillvalue=[]) for group in turn for item in group]


def _all_reduce(shared: torch.Tensor, how: Any) -> None:
    work = dist.all_reduce(shared, how, async_op=True)
    work.wait()
    # Were gloo's thread the last to hold the tensor, it would wait for the interpreter's lock, which a model that
    # goes away holds while it waits for that thread.
    _LAST_WORK[:] = [work]


def wait_for_rank_0() -> None:
    """A barrier: the others see what rank 0 did before it."""
    if RANKS > 1:
        dist.barrier()
