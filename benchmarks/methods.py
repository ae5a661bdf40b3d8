"""Time, memory and parameters of one training iteration of every method, at the size of a profile.

    python -m benchmarks.methods --profile phantom --threads 1

prints a Markdown table. Every method runs in its own process, on a batch of noise with boxes as labels. The cost is
that of forward, backward, step and after_step, without data and log. The rounds visit all methods in turn, so that
other load on the machine affects all of them. The time is that of the fastest iteration in any round.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from methods import METHODS
from networks.vnet import parameter_count
from settings import OPTIMIZERS, PROFILES, read_options
from utils.devices import choose_device, keep_freed_memory, peak_memory_gib, seed_iteration, set_arithmetic
from utils.errors import run
from utils.options import Parser, fill, option


@dataclasses.dataclass
class Options:
    """Options of the benchmark."""

    profile: str = option("phantom", "scale of the run", choices=list(PROFILES))
    rounds: int = option(2, "times that each method is visited", minimum=1)
    iterations: int = option(3, "timed iterations in a round, after one that is not", minimum=1)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    threads: int = option(1, "CPU threads", minimum=1)
    one: str = option("", "time this method only, once, and print JSON")


class Workload:
    """A method at the size of a profile, with an optimiser and a batch of noise with boxes as labels.

    Args:
        name: the method.
        flags: flags of train_dtml.py, such as --profile half.
        device: where it is computed.
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
            self.batch["sdm"] = 1 - 2 * label.unsqueeze(1).float()
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
        """The time of an iteration: forward, backward, step and after_step."""
        began = time.perf_counter()
        self.gradients(iteration)
        self.optimizer.step()
        self.method.after_step(self.batch, iteration)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began


def measure(name: str, o: Options) -> dict[str, float]:
    """Measures one method: seconds of the fastest iteration, peak memory in GiB, trained and all parameters."""
    torch.set_num_threads(o.threads)
    device = choose_device(o.device)
    set_arithmetic(deterministic=False)
    keep_freed_memory()
    work = Workload(name, ["--profile", o.profile], device)
    times = [work.seconds(iteration) for iteration in range(1 + o.iterations)]
    return {
        "seconds": min(times[1:]),
        "memory": peak_memory_gib(device),
        "trained": parameter_count(work.method),
        "all": sum(p.numel() for p in work.method.parameters()),
    }


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, prog="python -m benchmarks.methods")
    parser.add_dataclass(Options)
    o: Options = fill(Options, parser.parse(argv))
    if o.one:
        print(json.dumps(measure(o.one, o)))
        return
    results: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for _ in range(o.rounds):
        for name, rounds in results.items():
            argv = [f"--{key}={value}" for key, value in {**dataclasses.asdict(o), "one": name}.items()]
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.methods", *argv], stdout=subprocess.PIPE, check=True
            )
            rounds.append(json.loads(done.stdout))
    reference = min(r["seconds"] for r in results["supervised"])
    print(
        "| method | iterations/s | time of an iteration, supervised = 1 | peak memory GiB | trained parameters | all |"
    )
    print("|---|---|---|---|---|---|")
    for name, rounds in results.items():
        seconds, memory = min(r["seconds"] for r in rounds), max(r["memory"] for r in rounds)
        counts = f"{rounds[0]['trained']:,} | {rounds[0]['all']:,}"
        print(f"| {name} | {1 / seconds:.2f} | {seconds / reference:.2f} | {memory:.2f} | {counts} |")


if __name__ == "__main__":
    run(main)
