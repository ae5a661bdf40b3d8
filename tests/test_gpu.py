"""What only a GPU can show, and the benchmark that runs there first."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_set

import test_la
from benchmarks import gpu
from evaluation.sliding_window import sliding_window
from methods import METHODS
from tools import command_line
from utils.devices import seed_iteration
from utils.errors import UserError
from utils.options import Parser, fill

CPU = torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["supervised", "dtml", "mc-net-plus", "cps"])
def test_gradients_in_float64_are_those_of_the_cpu(method):
    torch.manual_seed(0)
    kind = METHODS[method]
    network = kind(fill(kind.Options, {"filters": 2}), iterations=10).double().train()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout3d):
            module.p = 0.0
    label = (torch.rand(2, 32, 32, 32) > 0.7).to(torch.uint8)
    batch = {"image": torch.randn(4, 1, 32, 32, 32, dtype=torch.float64), "label": label, "case": list("abcd")}
    gradients = []
    for device in ("cpu", "cuda"):
        network.to(device).zero_grad()
        moved = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in batch.items()}
        seed_iteration(0, 5)
        network(moved, 5).total.backward()
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in network.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-9)


@pytest.mark.gpu
def test_the_window_gives_the_probabilities_of_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.Conv3d(4, 1, 3, padding=1))
    volume = torch.randn(40, 36, 30)
    with torch.no_grad():
        cpu = sliding_window(network, volume, (16, 16, 16), (5, 5, 5))
        cuda = sliding_window(network.cuda(), volume.cuda(), (16, 16, 16), (5, 5, 5))
    torch.testing.assert_close(cuda, cpu, rtol=1e-4, atol=1e-5)


@pytest.fixture
def options(tmp_path):
    data = make_set(tmp_path / "set")
    return gpu.Options(out=str(tmp_path / "out"), data=str(data), methods=["supervised"], method="supervised",
                       device="cpu", iterations=2)  # fmt: skip


def test_the_parts_of_the_benchmark_on_a_cpu(options):
    speed = gpu.speed(options, CPU)["variants"]
    assert set(speed) == {"fp32", "bf16", "fp32, recompute", "bf16, channels-last"}
    assert speed["fp32"]["cosine_to_fp32"] == pytest.approx(1) == speed["fp32, recompute"]["cosine_to_fp32"]
    assert 0 < speed["bf16"]["cosine_to_fp32"] < 1 and speed["bf16"]["iterations_per_s"] > 0
    assert set(gpu.memory(options, CPU)["fits"]) == {"8", "11", "12", "16"}


def test_a_stopped_and_a_whole_training_are_compared(options, monkeypatch):
    monkeypatch.setitem(gpu.SIZE, "cpu", [*gpu.SIZE["cpu"], "--labeled", "4", "--threads", "1"])
    assert gpu.resume(options, CPU) == {"method": "supervised", "equal": True, "differing": []}
    monkeypatch.setattr(gpu, "load_checkpoint", lambda path: {"method": {"w": torch.tensor(hash(path))}})
    assert gpu.resume(options, CPU) == {"method": "supervised", "equal": False, "differing": ["w"]}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_command_of_the_list_is_one_that_its_program_takes(options, kind):
    """The first hour on a GPU must not end at a typing mistake."""
    from tools import reproduce, runs

    options.methods = list(METHODS)
    seen = set()
    for step in gpu.steps_of(options, torch.device(kind)):
        args = step.command[1:]
        program, flags = (args[1], args[2:]) if args[0] == "-m" else (args[0], args[1:])
        if program == "torch.distributed.run":
            at = flags.index("train_dtml.py")
            program, flags = flags[at], flags[at + 1 :]
        if program == "train_dtml.py":
            command_line.read_options(flags, "")
        elif program != "pytest":
            kinds = {"benchmarks.gpu": gpu.Options, "tools.reproduce": runs.Options, "test_la.py": test_la.Options}
            parser = Parser(prog=program)
            parser.add_dataclass(kinds[program])
            parser.parse([*flags, "1"] if program == "tools.reproduce" else flags)
        seen.add(program)
    assert reproduce and len(seen) == (5 if kind == "cuda" else 4), shlex.join(seen)


def test_a_gpu_measures_the_full_size_whatever_the_data():
    flags = ["--method", "dtml", *gpu.size_of("dtml", torch.device("cuda")), "--data", "data/phantom"]
    o, method, *_ = command_line.read_options(flags, "")
    assert (tuple(o.patch_size), method.filters, o.iterations) == ((112, 112, 80), 16, 6000)


def test_a_step_ends_with_the_benchmark(tmp_path, monkeypatch):
    """After Ctrl-C no training goes on alone on the GPU."""
    wait, came = subprocess.Popen.wait, []

    def interrupted(process, timeout=None):
        if not came:
            came.append(process.pid)
            raise KeyboardInterrupt
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    step = gpu.Step("endless", [sys.executable, "-c", "import time; time.sleep(600)"], gpu.last_line)
    with pytest.raises(KeyboardInterrupt):
        gpu.make(step, tmp_path, 1.0)
    with pytest.raises(ProcessLookupError):
        os.kill(came[0], 0)


def test_results_are_kept_and_failed_steps_run_again(options, tmp_path, monkeypatch, capsys):
    def step(name, code, read=lambda text: {"said": text.strip()}, minutes=1.0):
        return gpu.Step(name, [sys.executable, "-c", code], read, minutes)

    again = "import pathlib; p = pathlib.Path('flag'); p.exists() or (p.touch(), 1 / 0); print('second')"
    counted = "open('count', 'a').write('x'); print('once')"
    steps = [step("good", counted), step("again", again), step("slow", "import time; time.sleep(60)", minutes=0.02),
             step("odd", "print('{')", gpu.last_line)]  # fmt: skip
    monkeypatch.setattr(gpu, "steps_of", lambda o, device: steps)
    monkeypatch.chdir(tmp_path)
    args = ["--out", "out", "--device", "cpu"]
    with pytest.raises(UserError, match="again, slow, odd"):
        gpu.main(args)
    with pytest.raises(UserError, match=r": slow, odd\."):
        gpu.main(args)
    results = {name: json.loads(Path(f"out/{name}.json").read_text()) for name in ("good", "again", "slow", "odd")}
    assert results["good"]["said"] == "once" and Path("count").read_text() == "x"
    assert results["again"]["said"] == "second" and results["slow"]["error"] == "not done in time"
    assert "could not be read" in results["odd"]["error"]
    assert "| again |" in Path("out/report.md").read_text()
