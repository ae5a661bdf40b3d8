"""Two processes under torchrun: equal replicas, different batches, one run folder, and they stop together."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, csv_rows, flat, load, make_validated_set, method_words

import test_la
from methods import METHODS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package"),
]

N = 6
FLAGS = [*TINY, "--batch-size", "2", "--iterations", str(N), "--log-every", "1", "--device", "cpu"]

OTHERS = [method for method in METHODS if method != "dtml"]
CRITICS = ["sassnet", "asdnet"]
MORE = {"ua-mt": ["--passes", "2"], "double-unc": ["--passes", "2"], "tcse": ["--scale", "0.2"]}

# Runs several trainings in a row, and saves what each process had after each of them; and a test. In the last training
# a process is killed, whereupon torchrun starts both again, which then make this training alone.
DRIVER = """
import json, os, signal, time
from pathlib import Path
import torch
import test_la, train_dtml
from methods import METHODS, adversary
from utils.distributed import RANK
from utils.errors import Diverged, Stopped

place, join = Path(__file__).parent, torch.distributed.init_process_group
runs, again = json.loads((place / "runs.json").read_text()), os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
assert again == (place / "killed").exists()
own = {method: (kind.forward, kind.after_step) for method, kind in METHODS.items()}
average = adversary.average_gradients
for name, how, method, flags in runs[-1:] if again else runs:
    seen, known, critic = [], {}, []

    def spied(self, batch, iteration):
        seen.append((batch["case"], batch["image"].clone()))
        losses = own[method][0](self, batch, iteration)
        if how == "diverge on rank 1" and RANK == 1 and iteration == 3:
            # The gradients stay finite, so rank 0 cannot tell by itself.
            losses.terms["seg"] = losses.terms["seg"] + float("inf")
            losses.total = losses.total + float("inf")
        return losses

    def averaged(parameters):
        parameters = list(parameters)
        before = [p.grad.clone() for p in parameters]
        average(parameters)
        critic.append((before, [p.grad.clone() for p in parameters]))

    def after_step(self, batch, iteration):
        own[method][1](self, batch, iteration)
        known["method"] = self
        if how == "SIGTERM to rank 1" and RANK == 1 and iteration == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        if how == "SIGKILL to rank 1" and RANK == 1 and iteration == 3 and not again:
            (place / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def meet(backend, timeout):  # torchrun's own meeting point serves a single training
        join(backend, timeout=timeout, init_method=f"file://{place}/{name}.store", rank=RANK, world_size=2)

    METHODS[method].forward, METHODS[method].after_step = spied, after_step
    torch.distributed.init_process_group = join if how == "SIGKILL to rank 1" else meet
    adversary.average_gradients = averaged
    if how in ("test", "SIGKILL to rank 1"):
        (test_la if how == "test" else train_dtml).main(flags)
        continue
    end = "done"
    try:
        train_dtml.main(flags)
    except (Diverged, Stopped) as e:
        end = f"{type(e).__name__}: {e}"
    weights = {name: p.detach() for name, p in known["method"].named_parameters()}
    adam = known["method"].state_dict().get("adversary._extra_state")
    last = {"seen": seen, "weights": weights, "adam": adam, "critic": critic, "end": end}
    torch.save(last, place / f"{name}{RANK}.pt")
    while not (place / f"{name}{1 - RANK}.pt").exists():
        time.sleep(0.01)
"""


def torchrun(*args, cwd):
    """Starts a program in two processes, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, args)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "PYTHONFAULTHANDLER": "1"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_of(process):
    """Waits for torchrun and for everything it started, which shares its stderr -> exit code, stderr."""
    try:
        _, err = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGABRT)  # faulthandler then prints where each thread is
        pytest.fail(f"the processes did not end:\n{process.communicate(timeout=60)[1]}")
    return process.returncode, err


def flags_of(data, runs, name):
    return ["--data", str(data), *FLAGS, "--runs", str(runs), "--name", name]


def differing(a, b):
    assert list(a) == list(b)
    return [name for name in a if a[name].numpy().tobytes() != b[name].numpy().tobytes()]


@pytest.fixture(scope="module")
def ranks(data, tmp_path_factory):
    """name, rank -> what the process had at the end of that run; and the folder of the runs."""
    place = tmp_path_factory.mktemp("ranks")
    shutil.copytree(data, place / "three")
    shutil.copytree(data / "case09", place / "three" / "more")
    (place / "three" / "test.list").write_text("case08\ncase09\nmore\n")
    runs = [
        ["whole", "", "dtml", flags_of(data, place / "runs", "whole")],
        ["diverged", "diverge on rank 1", "dtml", [*flags_of(data, place / "runs", "diverged"), "--save-every", "1"]],
        ["stopped", "SIGTERM to rank 1", "dtml", [*flags_of(data, place / "runs", "stopped"), "--workers", "1"]],
        ["resumed", "", "dtml", ["--resume", str(place / "runs" / "stopped")]],
        ["validated", "", "dtml", [*flags_of(make_validated_set(place / "set"), place / "runs", "validated"),
                                   "--validate-every", "2"]],
        *([m, "", m, [*flags_of(data, place / "runs", m), "--iterations", "2", *method_words(m), *MORE.get(m, [])]]
          for m in OTHERS),
        ["tested", "test", "dtml", [*words_of_test(place / "runs"), "--out", str(place / "runs" / "tested")]],
        ["killed", "SIGKILL to rank 1", "dtml",
         [*flags_of(data, place / "runs", "killed"), "--save-every", "2", "--resume", "auto"]],
    ]  # fmt: skip
    (place / "driver.py").write_text(DRIVER)
    (place / "runs.json").write_text(json.dumps(runs))
    code, err = end_of(torchrun("--max-restarts", "1", "driver.py", cwd=place))
    assert code == 0, err
    (place / "stderr").write_text(err)
    return {(name, rank): load(place / f"{name}{rank}.pt") for name, *_ in runs[:-2] for rank in (0, 1)}, place / "runs"


def words_of_test(runs):
    """The words that test the first run on a set of three scans, which lies beside the folder of the runs."""
    data = ["--data", str(runs.parent / "three"), "--stride", "8", "8", "8", "--device", "cpu", "--threads", "1"]
    return ["--checkpoint", str(runs / "whole"), *data]


def test_replicas_are_identical_to_the_last_bit(ranks):
    result, runs = ranks
    for name in ("whole", "diverged", "stopped", "resumed"):
        assert differing(result[name, 0]["weights"], result[name, 1]["weights"]) == []
    saved = load(runs / "whole" / "last.pt")
    weights = result["whole", 0]["weights"]
    assert differing({name: saved["method"][name] for name in weights}, weights) == []
    assert saved["iteration"] == N


@pytest.mark.parametrize("method", OTHERS)
def test_replicas_of_every_method_are_identical_to_the_last_bit(method, ranks):
    """Teachers and critics too, whose weights no optimiser of the loop moves."""
    result, runs = ranks
    a, b = (result[method, rank] for rank in (0, 1))
    assert a["end"] == b["end"] == "done" and len(a["seen"]) == 2
    assert all(not torch.equal(x, y) for (_, x), (_, y) in zip(a["seen"], b["seen"], strict=True))
    assert differing(a["weights"], b["weights"]) == []
    saved = load(runs / method / "last.pt")["method"]
    assert differing({name: saved[name] for name in a["weights"]}, a["weights"]) == []
    assert (a["adam"] is not None) == (method in CRITICS)
    assert flat(a["adam"]) == flat(b["adam"]) == flat(saved.get("adversary._extra_state"))


@pytest.mark.parametrize("method", CRITICS)
def test_the_critic_s_gradient_is_the_mean_of_both_processes(method, ranks):
    result, _ = ranks
    steps = list(zip(result[method, 0]["critic"], result[method, 1]["critic"], strict=True))
    assert len(steps) == 2
    for (own, mean), (other, same_mean) in steps:
        assert all(torch.equal(x, y) for x, y in zip(mean, same_mean, strict=True))
        assert not all(torch.equal(x, y) for x, y in zip(own, other, strict=True))
        for x, y, z in zip(own, other, mean, strict=True):
            expected = (x.double() + y.double()) / 2
            torch.testing.assert_close(z.double(), expected, rtol=1e-6, atol=1e-7 * expected.abs().max().item())
    assert max(g.abs().max() for g in steps[0][0][1]) > 0


def test_each_process_has_its_own_batches(ranks):
    result, _ = ranks
    a, b = (result["whole", rank]["seen"] for rank in (0, 1))
    assert len(a) == len(b) == N
    assert all(not torch.equal(x, y) for _, x in a for _, y in b)
    # 4 labeled cases, one in each batch, two batches at a time: every two iterations see each of them once.
    labeled = [cases[0] for pair in zip(a, b, strict=True) for cases, _ in pair]
    for i in range(0, 2 * N, 4):
        assert sorted(labeled[i : i + 4]) == [f"case{n:02d}" for n in range(4)]


def test_all_stop_when_the_loss_of_one_is_not_finite(ranks):
    result, runs = ranks
    ends = [result["diverged", rank]["end"] for rank in (0, 1)]
    assert ends[0].startswith("Diverged: at iteration 3 a loss of another process")
    assert ends[1].startswith("Diverged: at iteration 3 the loss seg")
    # The batch is kept by the process whose loss it was.
    kept = load(runs / "diverged" / "diverged-rank1.pt")
    assert kept["batch"]["case"] == result["diverged", 1]["seen"][3][0] and kept["iteration"] == 3
    assert torch.equal(kept["batch"]["image"], result["diverged", 1]["seen"][3][1])
    assert not (runs / "diverged" / "diverged-rank0.pt").exists()
    saved = load(runs / "diverged" / "last.pt")
    weights = result["diverged", 0]["weights"]
    assert saved["iteration"] == 3
    assert differing({name: saved["method"][name] for name in weights}, weights) == []


def test_all_stop_when_one_is_signalled_and_go_on_as_if_nothing_had_been(ranks):
    result, runs = ranks
    assert all(result["stopped", rank]["end"].startswith("Stopped: saved") for rank in (0, 1))
    assert [len(result["stopped", rank]["seen"]) for rank in (0, 1)] == [4, 4]
    for rank in (0, 1):
        assert differing(result["resumed", rank]["weights"], result["whole", rank]["weights"]) == []
        halves = result["stopped", rank]["seen"] + result["resumed", rank]["seen"]
        assert [cases for cases, _ in halves] == [cases for cases, _ in result["whole", rank]["seen"]]
    a, b = (load(runs / name / "last.pt") for name in ("stopped", "whole"))
    assert differing(a["method"], b["method"]) == []
    for x, y in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert differing(x, y) == []
    assert (runs / "stopped" / "scalars.csv").read_text() == (runs / "whole" / "scalars.csv").read_text()


def test_48_a_killed_process_is_started_again_by_torchrun_and_ends_as_if_nothing_had_been(ranks):
    _, runs = ranks
    assert (runs.parent / "killed").exists()
    assert (runs.parent / "stderr").read_text().count(f"done: {N} iterations") == 4  # of this run and three others
    manifest = json.loads((runs / "killed" / "manifest.json").read_text())
    assert [part["iteration"] for part in manifest["resumed"]] == [2]
    a, b = (load(runs / name / "last.pt") for name in ("killed", "whole"))
    assert differing(a["method"], b["method"]) == [] and flat(a["optimizer"]) == flat(b["optimizer"])
    assert (runs / "killed" / "scalars.csv").read_text() == (runs / "whole" / "scalars.csv").read_text()


def test_the_scans_of_a_validation_are_shared_out_and_scored_with_the_weights_that_are_saved(ranks, tmp_path):
    """Three scans, of which one process has two; each process has running statistics of its own in training."""
    result, runs = ranks
    for rank in (0, 1):
        assert differing(result["validated", rank]["weights"], result["whole", rank]["weights"]) == []
    last, whole, best = (load(runs / name) for name in ("validated/last.pt", "whole/last.pt", "validated/best.pt"))
    assert flat(last["method"]) == flat(whole["method"]) and flat(last["optimizer"]) == flat(whole["optimizer"])
    args = ["--checkpoint", str(runs / "validated" / "best.pt"), "--scans", "validation", "--stride", "8", "8", "8"]
    test_la.main([*args, "--out", str(tmp_path), "--threads", "1", "--device", "cpu"])
    rows = [row for row in csv_rows(tmp_path / "cases.csv") if (row["output"], row["component"]) == ("seg", "all")]
    assert len(rows) == 3
    assert sum(float(row["dice"]) for row in rows) / 3 == pytest.approx(best["best"]["dice"], abs=2e-6)


def test_the_test_script_shares_out_its_scans(ranks, tmp_path):
    """One process has a scan more than the other."""
    _, runs = ranks
    test_la.main([*words_of_test(runs), "--out", str(tmp_path)])
    for name in ("cases.csv", "table.md"):
        assert (runs / "tested" / name).read_text() == (tmp_path / name).read_text()
    one, two = ({path.relative_to(out) for path in out.rglob("*.nii.gz")} for out in (tmp_path, runs / "tested"))
    assert one == two and len(two) == 3 * 3 and (runs.parent / "stderr").read_text().count("per case:") == 1
