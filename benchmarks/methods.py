"""Time, memory and parameters of one training iteration of every method, at the size of a profile.

    python -m benchmarks.methods --profile half --out results/half/cost.csv

prints a Markdown table and writes the costs, which `tools.reproduce` reads. All methods have the preset `tuned`, so a
batch holds 4 labeled crops, and 2 unlabeled ones (BCP: 4) where they are used. Every method runs in its own process, on
a batch of noise with boxes as labels, in the middle of its training, when all its terms count. The time is that of
forward, backward, step and after_step, without data and log. With one thread on a CPU it is the processor's time, to
which other programs add little; else the clock's. A round visits all methods in turn. The cost is the time divided by
that of the V-Net in the same round, as the median over the rounds; its range stands behind it.
"""

import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from methods import METHODS
from networks.vnet import parameter_count
from settings import OPTIMIZERS, PROFILES
from tools.command_line import read_options
from utils.checkpoint import write_whole
from utils.devices import peak_memory_gib, seed_iteration, set_up
from utils.errors import run
from utils.options import option, read_flags
from utils.text import csv_table, markdown_table


@dataclasses.dataclass
class Options:
    """Options of the benchmark."""

    profile: str = option("half", "scale of the run", choices=list(PROFILES))
    rounds: int = option(3, "times that each method is visited", minimum=1)
    iterations: int = option(3, "timed iterations in a round, after one that is not", minimum=1)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    threads: int = option(1, "CPU threads", minimum=1)
    out: str = option("", "CSV to write after each round: method, cost, its lowest and highest of a round")


class Workload:
    """A method at the size of the flags of train_dtml.py, such as --profile half, with an optimizer and a batch of
    noise with boxes as labels.
    """

    def __init__(self, name: str, flags: Sequence[str], device: torch.device):
        options, method_options, *_ = read_options(["--method", name, *flags])
        torch.manual_seed(0)
        self.device = device
        self.method = METHODS[name](method_options, iterations=options.iterations).to(device).train()
        labeled = options.labeled_batch or options.batch_size // (2 if self.method.uses_unlabeled else 1)
        label = torch.zeros(labeled, *options.patch_size, dtype=torch.uint8, device=device)
        label[(slice(None), *(slice(side // 6, -(side // 6)) for side in options.patch_size))] = 1
        image = torch.randn(options.batch_size, 1, *options.patch_size, device=device)
        self.batch: dict[str, Any] = {"image": image, "label": label, "case": ["noise"] * options.batch_size}
        if self.method.needs_sdm:
            self.batch["sdm"] = (1 - 2 * label.unsqueeze(1).float()).repeat(1, method_options.classes, 1, 1, 1)
        self.optimizer = OPTIMIZERS[options.optimizer](
            [p for p in self.method.parameters() if p.requires_grad], options
        )

    def gradients(self, iteration: int) -> None:
        """Forward and backward."""
        seed_iteration(0, iteration)
        losses = self.method(self.batch, iteration)
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()

    def seconds(self, iteration: int) -> float:
        """The time of an iteration: forward, backward, step and after_step. With one CPU thread the processor's."""
        clock = time.process_time if self.device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
        began = clock()
        self.gradients(iteration)
        self.optimizer.step()
        self.method.after_step(self.batch, iteration)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return clock() - began


def measure(name: str, o: Options) -> dict[str, float]:
    """Measures one method: median seconds of an iteration, peak memory in GiB, trained and all parameters."""
    device = set_up(o.device, o.threads)
    work = Workload(name, ["--profile", o.profile, "--preset", "tuned"], device)
    middle = work.method.iterations // 2
    times = [work.seconds(iteration) for iteration in range(middle, middle + 1 + o.iterations)]
    return {
        "seconds": statistics.median(times[1:]),
        "memory": peak_memory_gib(device),
        "trained": parameter_count(work.method),
        "all": sum(p.numel() for p in work.method.parameters()),
    }


def main(argv: list[str] | None = None) -> None:
    o: Options = read_flags(Options, __doc__, "python -m benchmarks.methods", argv)
    several = PROFILES[o.profile].get("classes", 1) > 1
    measured = [name for name, method in METHODS.items() if method.multiclass or not several]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in measured}
    costs: dict[str, list[float]] = {}
    for _ in range(o.rounds):
        for name, rounds in results.items():
            with multiprocessing.get_context("fork").Pool(1) as pool:  # a process of its own, for its peak memory
                rounds.append(pool.apply(measure, (name, o)))
        for name, rounds in results.items():
            costs.setdefault(name, []).append(rounds[-1]["seconds"] / results["supervised"][-1]["seconds"])
        if o.out:
            write_whole(Path(o.out), as_csv(costs).encode())
    rows = []
    for name, rounds in results.items():
        seconds, memory = statistics.median(r["seconds"] for r in rounds), max(r["memory"] for r in rounds)
        cells = [name, f"{statistics.median(costs[name]):.2f}", f"{min(costs[name]):.2f} to {max(costs[name]):.2f}"]
        cells += [f"{seconds:.2f}", f"{memory:.2f}", f"{rounds[0]['trained']:,}", f"{rounds[0]['all']:,}"]
        rows.append(cells)
    head = ["method", "cost, V-Net = 1", "in single rounds", "s an iteration", "peak memory GiB", "trained parameters"]
    print(markdown_table([*head, "all"], rows))


def as_csv(costs: Mapping[str, Sequence[float]]) -> str:
    """Method -> its cost in each round, as CSV: method, median, lowest, highest."""
    figures: dict[str, Any] = {"cost": statistics.median, "lowest": min, "highest": max}
    return csv_table([{"method": name, **{k: f"{of(values):.3f}" for k, of in figures.items()}}
                      for name, values in costs.items()])  # fmt: skip


if __name__ == "__main__":
    run(main)
