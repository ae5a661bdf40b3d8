"""What has to be known of a GPU before long runs, in one command.

    python -m benchmarks.gpu --minutes 60 --out runs/gpu

The steps run in the order of their worth: the tests that need a GPU; time, memory and gradients of every method in
every precision; stop and resume of every method, bit for bit; memory limits of smaller cards; caches; a training and
its test; several processes, one of them killed; then full-size rows of tools.reproduce until the time is over. Every
step is a process of its own. Its result is OUT/STEP.json, its output OUT/STEP.log, and OUT/report.md shows all results
so far. The same command goes on where it was stopped, and repeats steps that failed. On a CPU the steps have a tiny
size, which shows only that they work.
"""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from benchmarks.gpu_report import report
from benchmarks.methods import Workload
from methods import METHODS
from networks.backbone import Backbone, compile_networks, set_precision, set_recompute
from train_dtml import main as train
from utils.checkpoint import LAST, load_checkpoint, write_whole
from utils.devices import lack_of_memory, peak_memory_gib, set_up
from utils.errors import Stopped, UserError, run
from utils.options import option, read_flags
from utils.run_folder import MANIFEST

CARDS_GIB = (8, 11, 12, 16)  # memory of common cards
CONTEXT_GIB = 0.6  # about what CUDA and its libraries take of it
VARIANTS = {  # name: precision, flags of `measure`
    "fp32": ("fp32", ""), "tf32": ("tf32", ""), "bf16": ("bf16", ""), "fp32, recompute": ("fp32", "recompute"),
    "bf16, channels-last": ("bf16", "channels-last"), "bf16, compile": ("bf16", "compile"),
}  # fmt: skip
COMPILED = ("supervised", "dtml", "dtml-plus")  # compiling takes minutes, so not for every method
SIZE = {
    "cpu": ["--profile", "phantom", "--patch-size", "16", "16", "16", "--filters", "2"],
    "cuda": ["--profile", "full"],
}
QUERIES = {"cpu": ["--query-channels", "16", "--groups", "3", "2", "--levels", "8", "4"], "cuda": []}  # of dk-uxnet
SAVES_S = 60  # time to save for a step that is ended
ROWS = ("supervised-normalized-16", "plus-16", "supervised-16", "dtml-16", "plus-8", "supervised-normalized-80")


@dataclasses.dataclass
class Options:
    """Options of the benchmark."""

    minutes: float = option(60.0, "time for everything", minimum=0)
    out: str = option("runs/gpu", "folder of the results")
    data: str = option("", "folder of the data set (default data/la, else the phantom set)")
    methods: list[str] = option(list(METHODS), "only these methods", type=str, nargs="+", choices=list(METHODS))
    steps: list[str] = option([], "only steps whose names begin so, for example speed-dtml", type=str, nargs="+")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    iterations: int = option(20, "iterations of a method in each precision", minimum=2)
    part: str = option(
        "", "run this part of one step alone and print JSON", choices=["speed", "resume", "memory", "killed"]
    )
    method: str = option("dtml", "the method of --part", choices=list(METHODS))


@dataclasses.dataclass
class Step:
    """A command and how its result is read."""

    name: str
    command: list[str]
    read: Callable[[str], dict[str, Any]]
    """Output of the command -> result."""
    minutes: float = 10.0
    """Time after which it is stopped."""


def last_line(output: str) -> dict[str, Any]:
    """The JSON in the last line of an output."""
    return json.loads(output.strip().splitlines()[-1])


def size_of(method: str, device: torch.device) -> list[str]:
    """The flags of a run of this method: of full size on a GPU, tiny on a CPU."""
    return SIZE[device.type] + (QUERIES[device.type] if method == "dk-uxnet" else [])


# the parts that are computed here


def speed(o: Options, device: torch.device) -> dict[str, Any]:
    """Iterations per second, peak memory and the gradient's cosine to fp32, for each of VARIANTS of one method."""
    results, reference = {}, None
    for name, (precision, flag) in VARIANTS.items():
        if device.type == "cpu" and (precision == "tf32" or flag == "compile"):
            continue
        if flag == "compile" and o.method not in COMPILED:
            continue
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        try:
            results[name], reference = measure(o, device, precision, flag, reference)
        except (RuntimeError, MemoryError) as e:
            if not lack_of_memory(e):
                raise
            results[name] = {"error": "out of memory"}
    return {"method": o.method, "variants": results}


def measure(
    o: Options, device: torch.device, precision: str, flag: str, reference: torch.Tensor | None
) -> tuple[dict[str, Any], torch.Tensor]:
    """One variant of `speed` -> its result, and the gradient that later ones are compared with."""
    work = Workload(o.method, size_of(o.method, device), device)
    reached = set_precision(work.method, precision, training=True)
    set_recompute(work.method, flag == "recompute")
    if flag == "channels-last":
        for network in (module for module in work.method.modules() if isinstance(module, Backbone)):
            for p in (p for p in network.parameters() if p.dim() == 5):
                p.data = p.data.contiguous(memory_format=torch.channels_last_3d)
        work.batch["image"] = work.batch["image"].contiguous(memory_format=torch.channels_last_3d)
    if flag == "compile":
        compile_networks(work.method)
    work.gradients(0)
    gradient = torch.cat([p.grad.flatten() for p in work.method.parameters() if p.grad is not None]).float()
    reference = gradient if reference is None else reference
    cosine = nn.functional.cosine_similarity(gradient.double(), reference.double(), dim=0).item()
    times = [work.seconds(iteration) for iteration in range(o.iterations)]
    return {
        "iterations_per_s": 1 / median(times[len(times) // 4 :]),
        "peak_gib": peak_memory_gib(device),
        "cosine_to_fp32": cosine,
        "in_this_precision": reached,
        "size": f"{'x'.join(map(str, work.batch['image'].shape[2:]))}, {work.method.options.filters} filters",
    }, reference


def resume(o: Options, device: torch.device) -> dict[str, Any]:
    """Whether 4 and 4 iterations with a stop between them end where 8 do, bit for bit, with --deterministic."""
    flags = ["--method", o.method, *size_of(o.method, device), *data_of(o), "--device", str(device), "--runs", o.out,
             "--deterministic", "--iterations", "8", "--picture-every", "0"]  # fmt: skip
    train([*flags, "--name", f"{o.method}-whole", "--fresh"])
    stopped_after(4, [*flags, "--name", f"{o.method}-halves", "--fresh"])
    train([*flags, "--name", f"{o.method}-halves", "--resume", "auto"])
    ends = [load_checkpoint(Path(o.out, f"{o.method}-{name}", LAST))["method"] for name in ("whole", "halves")]
    differing = [key for key, x in ends[0].items() if isinstance(x, torch.Tensor) and not torch.equal(x, ends[1][key])]
    return {"method": o.method, "equal": not differing, "differing": differing[:5]}


def stopped_after(iterations: int, flags: list[str]) -> None:
    """Trains, and sends itself SIGTERM after so many iterations."""
    kind = METHODS[flags[1]]
    after_step = kind.after_step

    def stop(self: Any, batch: Any, iteration: int) -> None:
        after_step(self, batch, iteration)
        if iteration + 1 == iterations:
            os.kill(os.getpid(), signal.SIGTERM)

    with patch.object(kind, "after_step", stop), suppress(Stopped):
        train(flags)


def killed(o: Options, device: torch.device) -> dict[str, Any]:
    """A training by torchrun whose last process is killed after the first checkpoint; torchrun starts all again."""
    out = Path(o.out, "killed")
    shutil.rmtree(out, ignore_errors=True)
    process = subprocess.Popen(processes(o, device, "killed"))
    while not (out / LAST).exists() and process.poll() is None:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    if process.wait() != 0:
        raise UserError(f"torchrun did not go on after a killed process: exit code {process.returncode}.")
    return of_training(out)


def memory(o: Options, device: torch.device) -> dict[str, Any]:
    """Whether two iterations fit into the memory of smaller cards: plainly, and with --recompute."""

    def fits(recompute: bool) -> bool:
        try:
            work = Workload(o.method, size_of(o.method, device), device)
            set_recompute(work.method, recompute)
            return work.seconds(0) + work.seconds(1) > 0
        except (RuntimeError, MemoryError) as e:
            if not lack_of_memory(e):
                raise
            return False

    gpu = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory / 2**30 if gpu else max(CARDS_GIB)
    cards: dict[str, dict[str, bool]] = {}
    for card in (card for card in CARDS_GIB if card <= total):
        cards[str(card)] = {}
        for name, recompute in {"plain": False, "recompute": True}.items():
            if gpu:
                torch.cuda.empty_cache()
                torch.cuda.set_per_process_memory_fraction((card - CONTEXT_GIB) / total, device)
            cards[str(card)][name] = fits(recompute)
    return {"method": o.method, "fits": cards}


PARTS = {"speed": speed, "resume": resume, "memory": memory, "killed": killed}


# the list


def data_of(o: Options) -> list[str]:
    """The flags of the data set."""
    return ["--data", o.data] if o.data else []


def steps_of(o: Options, device: torch.device) -> Iterator[Step]:
    """The steps in their order."""
    out, gpu = Path(o.out), device.type == "cuda"
    python = [sys.executable, "-m"]
    own = [*python, "benchmarks.gpu", "--out", str(out / "runs"), "--device", str(device), *data_of(o),
           "--iterations", str(o.iterations)]  # fmt: skip
    script = [sys.executable, "train_dtml.py"]
    flags = [*SIZE[device.type], *data_of(o), "--runs", str(out / "runs"), "--fresh", "--picture-every", "0"]

    yield Step("tests", [*python, "pytest", "-q", "-m", "gpu", "tests"], lambda text: {"said": text.splitlines()[-1]})
    for part, method in itertools.product(("speed", "resume", "memory"), o.methods):
        yield Step(f"{part}-{method}", [*own, "--part", part, "--method", method], last_line)
    for cache, workers in (("device", 0), ("ram", 0), ("ram", 4), ("disk", 4)) if gpu else (("ram", 0), ("disk", 1)):
        name = f"cache-{cache}-{workers}"
        loss = ["--sdm-loss", "both"]  # distance maps are made with the crops
        yield Step(name, [*script, *flags, *loss, "--name", name, "--cache", cache, "--workers", str(workers),
                          "--iterations", "60" if gpu else "3", "--device", str(device)],
                   partial(of_training, out / "runs" / name))  # fmt: skip
    yield Step("train", [*script, *flags, "--name", "train", "--iterations", "200" if gpu else "2", "--device",
                         str(device)], partial(of_training, out / "runs" / "train"))  # fmt: skip
    yield Step("test", [sys.executable, "test_la.py", "--checkpoint", str(out / "runs" / "train"), *data_of(o),
                        "--device", str(device)], lambda text: {})  # fmt: skip
    yield Step("processes", processes(o, device, "processes"), partial(of_training, out / "runs" / "processes"))
    yield Step("killed", [*own, "--part", "killed"], last_line)
    if gpu:
        yield Step("rows", [*python, "tools.reproduce", "--profile", "full", "--missing", "--rows", *ROWS, "--seeds",
                            "1337", *data_of(o), "--device", str(device), "--runs", str(out / "rows"), "--results",
                            str(out / "results"), "--budget"], lambda text: {}, minutes=float("inf"))  # fmt: skip


def processes(o: Options, device: torch.device, name: str) -> list[str]:
    """The command of a training in as many processes as there are GPUs, two on a CPU."""
    gpu = device.type == "cuda"
    runs = o.out if o.part else str(Path(o.out, "runs"))
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1", "--nproc-per-node",
        str(torch.cuda.device_count() if gpu else 2), "train_dtml.py", *SIZE[device.type], *data_of(o), "--runs", runs,
        "--name", name, "--resume", "auto", "--save-every", "5", "--picture-every", "0",
        "--iterations", "60" if gpu else "30", "--device", device.type,
    ]  # fmt: skip


def of_training(folder: Path, output: str = "") -> dict[str, Any]:
    """What the manifest of a finished training says of time and memory."""
    manifest = json.loads((folder / MANIFEST).read_text())
    return {key: manifest[key] for key in ("iterations_per_s", "peak_memory_gib", "time_shares")}


def make(step: Step, out: Path, minutes: float) -> dict[str, Any]:
    """Runs a step, for at most so many minutes -> its result, with `error` if it failed, `seconds` always.

    Whatever ends this program ends the step too.
    """
    command = [*step.command, f"{minutes:.1f}"] if step.name == "rows" else step.command
    began = time.monotonic()
    with open(out / f"{step.name}.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        code: int | None = None
        try:
            code = process.wait(60 * (minutes + 2 if step.name == "rows" else min(minutes, step.minutes)))
        except subprocess.TimeoutExpired:
            pass
        finally:
            if code is None:
                os.killpg(process.pid, signal.SIGTERM)  # a training saves
                with suppress(subprocess.TimeoutExpired):
                    process.wait(SAVES_S)
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    result: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1), "command": " ".join(command)}
    if code != 0:
        return result | {"error": "not done in time" if code is None else f"exit code {code}"}
    try:
        return result | step.read((out / f"{step.name}.log").read_text())
    except (ValueError, LookupError, OSError) as e:
        return result | {"error": f"its output could not be read: {e}"}


def main(argv: list[str] | None = None) -> None:
    o: Options = read_flags(Options, __doc__, "python -m benchmarks.gpu", argv)
    device, out = set_up(o.device, deterministic=o.part == "resume"), Path(o.out)
    if o.part:
        print(json.dumps(PARTS[o.part](o, device)))
        return
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * o.minutes
    results: dict[str, dict[str, Any]] = {}
    for step in steps_of(o, device):
        file = out / f"{step.name}.json"
        if o.steps and not step.name.startswith(tuple(o.steps)):
            continue
        earlier = json.loads(file.read_text()) if file.exists() else {"error": "not run"}
        left = (end - time.monotonic()) / 60
        if "error" in earlier and left > 0:
            earlier = make(step, out, left)
            write_whole(file, json.dumps(earlier, indent=1).encode())
            print(f"{step.name}: {earlier.get('error', 'done')}, {earlier['seconds']} s", flush=True)
        results[step.name] = {"seconds": 0.0} | earlier
        write_whole(out / "report.md", report(results, device).encode())
    print(f"report: {out / 'report.md'}")
    failed = [name for name, result in results.items() if "error" in result]
    if failed:
        raise UserError(f"these steps failed or had no time: {', '.join(failed)}. Their logs are in {out}.")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    run(main)
