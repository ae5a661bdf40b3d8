"""Training in several processes on the cores of one machine, compared with one process on one core.

    python -m benchmarks.scale

Every process has its own core and one thread. Three forms take turns in one run: process 0 alone with the whole batch,
while the others sleep; all processes, each with a whole batch (weak scaling); all processes, with shares of one batch
(strong scaling). A step is that of train_dtml.py, with crops from memory. The gain on GPUs is calculated, not measured.
"""

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import cast

import torch
import torch.distributed as dist
import torch.distributed.run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from benchmarks.timing import table
from dataloaders.cases import usual_folder
from dataloaders.training import training_cases
from dataloaders.two_stream import Patches, TwoStreamBatchSampler, make_loader
from dataloaders.volumes import Volumes
from methods import check_finite
from methods.dtml import DTML
from networks.heads import HALVINGS, side_multiples
from settings import OPTIMIZERS
from tools.command_line import read_options
from utils import distributed
from utils.clock import Clock
from utils.devices import seed_iteration, set_arithmetic
from utils.distributed import RANK, RANKS, any_rank, process_group, replicate, wait_for_rank_0
from utils.errors import Stopped, UserError, run
from utils.options import option, read_flags
from utils.run_folder import digest

CPU = torch.device("cpu")
PARENT = os.getppid()


@dataclasses.dataclass
class Options:
    """Options of the benchmark, and of the projection to GPUs."""

    data: str = option("", "folder of the data set (default data/la, else the phantom set)")
    processes: int = option(2, "processes, each on its own core", minimum=2)
    batch_size: int = option(4, "crops in a whole batch", minimum=4)
    patch_size: list[int] = option([48, 48, 32], "voxels of a crop along x, y, z", nargs=3, minimum=16)
    filters: int = option(16, "channels of the first block", minimum=1)
    rounds: int = option(5, "timed blocks of each form, after an untimed one", minimum=1)
    steps: int = option(3, "steps in a block", minimum=1)
    gpus: int = option(8, "GPUs of the projection", group="projection", minimum=2)
    step_ms: list[float] = option(
        [80.0, 42.0, 25.0], "times of a step on one GPU", group="projection", nargs="+", minimum=0.001
    )
    bandwidth: list[float] = option(
        [20.0, 200.0], "bus bandwidths between GPUs, GB/s", group="projection", nargs="+", minimum=0.001
    )


def cores() -> list[int]:
    """The numbers of the cores that this program may use.

    Raises:
        UserError: if the system cannot pin a process to a core.
    """
    if not hasattr(os, "sched_getaffinity"):
        raise UserError("processes cannot be pinned to cores on this system. Run benchmarks.scale on Linux.")
    return sorted(os.sched_getaffinity(0))


def launch(args: list[str], processes: int) -> None:
    """Runs this module with these arguments in several processes, which end with this one.

    Raises:
        Stopped: after a signal.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    flags = ["--standalone", "--nproc-per-node", str(processes), "-m", "benchmarks.scale"]
    try:
        torchrun.main([*flags, *args])
    except SignalException as e:
        raise Stopped(e.sigval, "the processes are ended; nothing was kept") from e
    except ChildFailedError as e:  # the process has printed the reason
        sys.exit(max(failure.exitcode for failure in e.failures.values()))


@contextmanager
def alone() -> Iterator[None]:
    """Context in which the code runs as a single process, without waiting for other processes."""
    distributed.RANKS = 1
    try:
        yield
    finally:
        distributed.RANKS = RANKS


def waited() -> float:
    """Seconds that this thread was ready to run while another program used its core."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


class Form:
    """Training steps of one form, with its own data loader, `batch_size` crops in a step of each process."""

    def __init__(
        self, o: Options, method: DTML, optimizer: torch.optim.Optimizer, model: torch.nn.Module, batch_size: int, *,
        volumes: Volumes, ranks: int,
    ):  # fmt: skip
        self.method, self.optimizer, self.model = method, optimizer, model
        self.crops, self.ranks, self.clock = ranks * batch_size, ranks, Clock(CPU)
        self.takes_part = ranks > RANK
        patches = Patches(volumes, patch_size=o.patch_size, augment="d4", seed=0, sdm=False)
        sampler = TwoStreamBatchSampler(
            o.batch_size, o.batch_size, batch_size=batch_size, labeled_batch=batch_size // 2, seed=0, start=0,
            iterations=(1 + o.rounds) * o.steps, rank=RANK, ranks=ranks,
        )  # fmt: skip
        self.batches = enumerate(make_loader(patches, sampler, workers=0))

    def step(self) -> None:
        """One iteration of train_dtml.py's loop."""
        clock = self.clock
        iteration, batch = next(self.batches)
        seed_iteration(0, iteration, RANK)
        clock.lap("data")
        losses = self.model(batch, iteration)
        clock.lap("forward")
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        clock.lap("backward")
        check_finite(losses, self.method, batch, iteration)
        self.optimizer.step()
        self.method.after_step(batch, iteration)
        clock.lap("step")

    def block(self, steps: int) -> tuple[float, float]:
        """Runs so many steps.

        Returns:
            Seconds of all steps, and the share of the time in which a process waited for its core.

        Raises:
            Stopped: if the program that started this process was killed.
        """
        if os.getppid() != PARENT:
            raise Stopped(signal.SIGTERM, "the program that started this process is gone")
        wait_for_rank_0()
        began, waited_before = time.perf_counter(), waited()
        self.clock.lap("between")
        with nullcontext() if self.ranks > 1 else alone():
            for _ in range(steps if self.takes_part else 0):
                self.step()
        mine = [time.perf_counter() - began, waited() - waited_before] if self.takes_part else [0.0, 0.0]
        seconds, waiting = any_rank(*mine, device=CPU)
        return seconds, waiting / seconds


def on_all_ranks_equal(hexadecimal: str) -> bool:
    """Whether a hexadecimal string, with a multiple of 4 digits, is the same in all processes."""
    # any_rank, not all_gather_object: gloo's thread may keep the last tensor of that; see utils/distributed.py.
    parts = [int(hexadecimal[i : i + 4], 16) for i in range(0, len(hexadecimal), 4)]
    largest = any_rank(*parts, *(-part for part in parts), device=CPU)
    return all(a == -b for a, b in zip(largest[: len(parts)], largest[len(parts) :], strict=True))


def projection(o: Options, size: int, backward: float) -> str:
    """A table of the cost of a ring all-reduce of `size` bytes; `backward` is the backward pass's share of a step."""
    rows = []
    for bandwidth in o.bandwidth:
        reduce_ms = 2 * (o.gpus - 1) / o.gpus * size / bandwidth / 1e6
        for step in o.step_ms:
            overlapped = step + max(reduce_ms - backward * step, 0.0)
            rows.append([step, bandwidth, reduce_ms, 100 * step / (step + reduce_ms), 100 * step / overlapped])
    head = [
        "ms a step on one GPU",
        "GB/s",
        "ms an all-reduce",
        "% efficiency, no overlap",
        "% efficiency, full overlap",
    ]
    return table(head, rows)


def measure(o: Options) -> None:
    """Runs the benchmark in each process; process 0 prints the results."""
    os.sched_setaffinity(0, {cores()[RANK]})  # before gloo starts its threads, which inherit it
    torch.set_num_threads(1)
    set_arithmetic(deterministic=False)
    cases, problems, _ = training_cases(
        usual_folder(o.data), labeled=o.batch_size,
        unlabeled=o.batch_size, batch_size=o.batch_size, labeled_batch=None, patch_size=o.patch_size,
        multiples=side_multiples(HALVINGS),
    )  # fmt: skip
    volumes = Volumes(cases, cache="ram", problems=problems)
    options, method_options, *_ = read_options(["--method", "dtml", "--filters", str(o.filters)])
    iterations = (1 + o.rounds) * o.steps

    def make() -> tuple[DTML, torch.optim.Optimizer]:
        torch.manual_seed(0)
        method = DTML(cast(DTML.Options, method_options), iterations=iterations).train()
        return method, OPTIMIZERS[options.optimizer](list(method.parameters()), options)

    with process_group(CPU):
        single, (method, optimizer) = make(), make()
        model = replicate(method, CPU)
        share = o.batch_size // RANKS
        forms = {
            f"1 process, {o.batch_size} crops": Form(o, *single, single[0], o.batch_size, volumes=volumes, ranks=1),
            f"{RANKS} processes, {o.batch_size} crops each (weak)":
                Form(o, method, optimizer, model, o.batch_size, volumes=volumes, ranks=RANKS),
            f"{RANKS} processes, {share} crops each (strong)":
                Form(o, method, optimizer, model, share, volumes=volumes, ranks=RANKS),
        }  # fmt: skip
        rates: dict[str, list[float]] = {name: [] for name in forms}
        waits: dict[str, list[float]] = {name: [] for name in forms}
        flat = torch.zeros(sum(p.numel() for p in method.parameters()))
        reduces = []
        names = list(forms)
        for i in range(-1, o.rounds):  # the first round is not timed
            for name in names[i % len(names) :] + names[: i % len(names)]:
                seconds, waiting = forms[name].block(o.steps)
                if i >= 0:
                    rates[name].append(o.steps * forms[name].crops / seconds)
                    waits[name].append(waiting)
            wait_for_rank_0()
            began = time.perf_counter()
            dist.all_reduce(flat)
            reduces += [1000 * (time.perf_counter() - began)] if i >= 0 else []
        equal = on_all_ranks_equal(digest(*(p.detach().numpy() for p in method.parameters())))

    if RANK:
        return
    size = "x".join(map(str, o.patch_size))
    print(f"Two V-Nets of {o.filters} filters, crops of {size}, a core and a thread for each process, gloo.")
    print(f"Medians of {o.rounds} rounds of {o.steps} steps.\n")
    rows = []
    for name, form in forms.items():
        ratio = median(a / b for a, b in zip(rates[name], rates[names[0]], strict=True))
        rows.append([name, median(rates[name]), ratio, 100 * ratio / form.ranks, 100 * median(waits[name])])
    print(table(["form", "crops/s", "times one process", "% efficiency", "% of the time without its core"], rows))
    weak_ms = 1000 * forms[names[1]].crops / median(rates[names[1]])
    print()
    print(table(
        ["MB an all-reduce (parameters x 4 bytes)", "ms alone", "% of a weak step", "replicas equal bit for bit"],
        [[4 * flat.numel() / 1e6, median(reduces), 100 * median(reduces) / weak_ms,
          "yes" if equal else "NO"]],
    ))  # fmt: skip
    shares = {name: share for name, share in forms[names[0]].clock.all_shares().items() if name != "between"}
    backward = shares["backward"] / sum(shares.values())
    print(
        f"\nA projection, not a measurement: {o.gpus} GPUs, a ring that moves 2 x {o.gpus - 1} / {o.gpus} of the bytes."
    )
    print(f"Full overlap hides it behind the backward pass, {100 * backward:.0f} % of a step as measured here.\n")
    print(projection(o, 4 * flat.numel(), backward))


def main(argv: list[str] | None = None) -> None:
    o: Options = read_flags(Options, __doc__, "python -m benchmarks.scale", argv)
    if "RANK" in os.environ:
        measure(o)
        return
    if o.processes > len(cores()):
        raise UserError(f"--processes {o.processes} need as many cores, but there are {len(cores())}. Ask for fewer.")
    if o.batch_size % (2 * o.processes):
        raise UserError(
            f"--batch-size {o.batch_size} cannot be shared out: each of {o.processes} processes needs as many labeled "
            f"as unlabeled crops. Take a multiple of {2 * o.processes}."
        )
    launch(sys.argv[1:] if argv is None else argv, o.processes)


if __name__ == "__main__":
    run(main)
