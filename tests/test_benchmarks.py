"""The benchmarks run, their forms agree and their tables are whole; at a size of seconds."""

import os
from pathlib import Path

import pytest
import small_methods
import torch
from conftest import TINY, make_set
from torch.utils.flop_counter import FlopCounterMode

import settings
import train_dtml
from benchmarks import data, memory, metrics, precision, roofline, scale, sdm, step, window
from benchmarks import methods as bench
from benchmarks.timing import labeled_cases, side_by_side, table
from methods import METHODS
from networks.batch_norm import BatchNorm3d
from tools import command_line
from utils.errors import UserError


@pytest.mark.parametrize("name", ["dtml", "ua-mt", "sassnet"])
def test_a_method_is_timed(name, monkeypatch):
    tiny = {"patch_size": [16, 16, 16], "filters": 2, "iterations": 9}
    monkeypatch.setitem(settings.PROFILES, "phantom", tiny)
    result = bench.measure(name, bench.Options(profile="phantom", iterations=1, device="cpu"))
    assert result["seconds"] > 0 and 0.1 < result["memory"] < 100
    assert 0 < result["trained"] <= result["all"]
    options = command_line.read_options(["--method", name, "--profile", "phantom"])[1]
    parts = dict(METHODS[name](options, iterations=9).named_children())
    assert (result["trained"] < result["all"]) == bool({"teacher", "ema", "adversary"} & set(parts))


def test_times_ratios_and_peaks_of_forms_side_by_side(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: clock[0])

    def takes(seconds):
        clock[0] += seconds

    forms = {"slow": lambda: takes(0.02), "fast": lambda: takes(0.005), "large": lambda: bytearray(5 << 20)}
    results = side_by_side({name: forms[name] for name in ("slow", "fast")}, rounds=3)
    assert results["slow"].ratio == 1 and results["fast"].ratio == pytest.approx(4)
    assert results["slow"].seconds == pytest.approx(0.02) and results["fast"].peak_mib < 1
    monkeypatch.undo()
    assert 5 <= side_by_side(forms, rounds=1)["large"].peak_mib < 6


def test_the_memory_of_a_step_at_full_size_is_counted_and_recomputing_takes_less():
    """Full size has 7.66 times the voxels of half size, and maps of twice as many channels."""
    (full, crops), (less, _) = (memory.gib_of_step("dtml", "full", 1, recompute=again) for again in (False, True))
    half, same = memory.gib_of_step("dtml", "half", 1, recompute=False)
    assert crops == same == 4 and 0.3 * full < less < 0.7 * full
    assert full / half == pytest.approx(2 * 112 * 112 * 80 / (64 * 64 * 32), rel=0.25)
    assert memory.card_for(1.3 * full) == 11 and memory.card_for(200) == "-"
    assert table(["a", "b"], [["x", 0.12345], [1, 2345.0]]) == "| a | b |\n|---|---|\n| x | 0.123 |\n| 1 | 2340 |"


def test_costs_at_a_profile_of_several_classes_leave_out_methods_of_one(monkeypatch, tmp_path):
    monkeypatch.setitem(settings.PROFILES, "hippocampus", {"patch_size": [16, 16, 16], "filters": 2, "classes": 2})
    monkeypatch.setattr(bench, "METHODS", {name: METHODS[name] for name in ("supervised", "asdnet", "dtc")})
    out = tmp_path / "cost.csv"
    bench.main(["--profile", "hippocampus", "--rounds", "1", "--iterations", "1", "--out", str(out)])
    assert [line.split(",")[0] for line in out.read_text().splitlines()[1:]] == ["supervised", "dtc"]
    workload = bench.Workload("dtc", ["--profile", "hippocampus"], torch.device("cpu"))
    assert workload.batch["sdm"].shape == (2, 2, 16, 16, 16)


@pytest.fixture
def small_scans(monkeypatch):
    """No data set, and phantoms of a smaller size in its place."""
    monkeypatch.setattr("benchmarks.timing.LA_FOLDER", Path("nowhere"))
    monkeypatch.setattr("benchmarks.timing.LA_SHAPE", (112, 112, 64))


def test_cases_without_a_label_are_left_out_and_too_few_are_a_user_s_mistake(tmp_path):
    folder = make_set(tmp_path / "set", labeled=3)
    assert [case.name for case in labeled_cases(folder)] == ["case00", "case01", "case02"]
    assert [case.name for case in labeled_cases(folder, 2)] == ["case00", "case01"]
    with pytest.raises(UserError, match="names 3 cases with a label; 8 are needed"):
        labeled_cases(folder, 8)


PARTS = {  # module: words, rows of its tables, the heads of further tables among them
    data: (["--data", "set", "--patch-size", "16", "12", "8", "--samples", "6"], 4 + 6),
    sdm: (["--scans", "1", "--patch-size", "64", "64", "32"], 3),
    metrics: (["--scans", "1", "--side", "24"], 8),
    precision: (["--checkpoints", "run/last.pt", "--data", "set", "--seeds", "1", "--profile", "phantom"], 12),
    step: (["--data", "set", "--patch-size", "16", "16", "16", "--filters", "2"], 3 + 4),
    roofline: (
        ["--patch-size", "16", "16", "16", "--filters", "2", "--side", "64", "--mebibytes", "1"],
        2 + (2 + 28) + (2 + 8),
    ),
    window: (["--checkpoint", "run", "--data", "set", "--scans", "2", "--overlaps", "0.5", "--threads", "1"], 5 + 6),
}


@pytest.mark.parametrize("part", PARTS)
def test_the_tables_of_single_parts(part, small_scans, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(make_set(tmp_path / "set", labeled=8).parent)
    if part is precision:
        monkeypatch.setitem(settings.PROFILES, "phantom", {"patch_size": [16, 16, 16], "filters": 2})
    if part in (precision, window):
        scaled = ["--normalize", "scan"] if part is window else []
        train_dtml.main(["--data", "set", "--runs", ".", "--name", "run", *TINY, "--iterations", "1", *scaled])
        capsys.readouterr()
    args, rows = PARTS[part]
    seen, real = [], window.predict_scan
    monkeypatch.setattr(window, "predict_scan", lambda m, image, *a, **k: seen.append(image) or real(m, image, *a, **k))
    part.main(args if part is precision else [*args, "--rounds", "1"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + rows and min(line.count("|") for line in lines) > 3
    assert not any("NO" in line for line in lines)
    if part is window:
        assert [round(float(x.mean()), 3) for x in seen] == [0.0] * 8  # two scans in four ways, scaled as in training


TWO_CORES = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores to pin to"
)


def test_the_projection_by_hand():
    """1 GB between 8 GPUs at 100 GB/s: 17.5 ms, of which the half of a step of 20 ms hides 10."""
    o = scale.Options(step_ms=[20.0], bandwidth=[100.0])
    assert scale.projection(o, 10**9, 0.5).splitlines()[-1] == "| 20 | 100 | 17.5 | 53.3 | 72.7 |"
    assert scale.projection(o, 10**8, 0.5).splitlines()[-1].endswith("| 100 |")


@TWO_CORES
def test_what_cannot_be_pinned_or_shared_out_is_a_user_s_mistake():
    with pytest.raises(UserError, match="--processes 4000 need as many cores"):
        scale.main(["--processes", "4000"])
    with pytest.raises(UserError, match="multiple of 4"):
        scale.main(["--batch-size", "6"])


def test_the_operations_of_a_step_are_those_that_torch_counts():
    method = small_methods.make("supervised")
    batch = small_methods.make_batch(labeled=2, unlabeled=0)
    counter = FlopCounterMode(display=False)
    with counter:
        method(batch, 0).total.backward()
    counted = counter.get_flop_counts()["Global"]
    layers, parts = roofline.timed(lambda: method(batch, 0).total.backward(), rounds=2)
    forward, backward = layers[roofline.FORWARD], layers[roofline.BACKWARD]
    assert forward.keys() == backward.keys() and len(forward) == 14
    assert sum(count * layer.flops() for layer, (count, _) in forward.items()) == counted[torch.ops.aten.convolution]
    sums = {of: sum(count * layer.products * layer.flops() for layer, (count, _) in backward.items()
                    if layer.transposed == of) for of in (False, True)}  # fmt: skip
    assert sums[False] == counted[torch.ops.aten.convolution_backward]
    head = 2 * batch["image"].numel() * method.options.filters  # its gradients are matrix products, too
    assert sums[True] == counted[torch.ops.aten.mm] - 2 * head
    assert sum(value for part, value in parts.items() if part != "step") == pytest.approx(parts["step"])
    assert min(parts.values()) > 0


def test_the_operations_of_our_own_batch_norm_count_as_its_own():
    x = torch.randn(2, 4, 8, 8, 8).to(memory_format=torch.channels_last_3d).requires_grad_()
    norm = BatchNorm3d(4).train()
    with roofline.Timed() as kept:
        norm(x).backward(torch.ones_like(x))
    assert kept.seconds["_Normalise.forward"] > 0 and kept.seconds["_Normalise.backward"] > 0
    assert not kept.seconds.keys() & {"addcmul", "addcmul_", "rsqrt"}
