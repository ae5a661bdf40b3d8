"""Which device is taken, and that the memory that a step frees serves the next one."""

import errno
import os
import re
import subprocess
from contextlib import suppress

import pytest
import torch
from conftest import TINY

import train_dtml
from utils import devices, distributed
from utils.devices import choose_device, enough_memory, nvidia_card, precision_on
from utils.errors import UserError

# -- a card that torch does not reach --


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of ours: `machine(lists=..., files=...)` sets what nvidia-smi does there and which files there are."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices, "CARDS", (str(tmp_path / "dev" / "nvidia[0-9]*"),))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin{os.pathsep}/usr/bin")

    def build(program="", files=()):
        (tmp_path / "dev").mkdir(exist_ok=True)
        for name in files:
            (tmp_path / "dev" / name).touch()
        if program:
            (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{program}\n")
            (tmp_path / "nvidia-smi").chmod(0o755)

    return build


CARD = "echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'"
WITHOUT = {
    "nothing": {},
    "only the control device": {"files": ["nvidiactl", "nvidia-uvm"]},
    "the program without a driver": {"program": "echo 'NVIDIA-SMI could not communicate'; exit 9"},
    "a driver without a card": {"program": "echo 'No devices were found'"},
}
WITH = {
    "a device": {"files": ["nvidia0", "nvidiactl"]},
    "another device": {"files": ["nvidia3"]},
    "nvidia-smi lists one": {"program": CARD},
}


@pytest.mark.parametrize("kind", WITHOUT)
def test_without_a_card_the_cpu_is_taken(kind, machine):
    machine(**WITHOUT[kind])
    assert nvidia_card() == "" and choose_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("built_for", [None, "13.0"])
@pytest.mark.parametrize("kind", WITH)
def test_a_card_that_torch_does_not_reach_is_not_passed_over(kind, built_for, machine, monkeypatch, tiny_set, tmp_path):
    machine(**WITH[kind])

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nMore.")

    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.cuda, "init", init)
    why = "built without CUDA" if built_for is None else r"system is too old \(found version 11040\)\. Look"
    with pytest.raises(UserError, match=rf"NVIDIA card \(.*nvidia.*{why}.*--device cpu"):
        train_dtml.main(["--data", str(tiny_set), *TINY, "--runs", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("value", ["", " ", "-1", "NoDevFiles"])
def test_a_card_that_is_hidden_on_purpose_is_left_alone(value, machine, monkeypatch):
    machine(files=["nvidia0"], program=CARD)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert choose_device("auto") == torch.device("cpu")


def test_a_driver_that_hangs_counts_as_a_card(machine, monkeypatch):
    machine(program="exec sleep 60")
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **more: run(*args, **{**more, "timeout": 0.5}))
    with pytest.raises(UserError, match=r"nvidia-smi does not answer\), but torch"):
        choose_device("auto")


def test_without_any_gpu_the_reason_is_given_to_those_who_ask_for_one(machine, monkeypatch):
    machine(files=["nvidia0"])
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match=r"--device cuda: .* this torch is built without CUDA.* --device cpu"):
        choose_device("cuda")


@pytest.mark.parametrize(
    "error", ["CUDA-capable device(s) is/are busy or unavailable", "no kernel image is available for execution"]
)
def test_a_card_that_computes_nothing_is_told_of_before_the_data_are_read(error, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError(f"CUDA error: {error}\nCUDA kernel errors might be asynchronously reported.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", fail if "busy" in error else lambda device: None)
    monkeypatch.setattr(torch, "ones", fail)
    with pytest.raises(UserError, match=rf"cuda:0 does not compute: CUDA error: {re.escape(error)}\. nvidia-smi"):
        choose_device("auto")


# -- an old card, several processes --


@pytest.mark.parametrize(("capability", "refused"), [((7, 5), True), ((8, 0), False), ((9, 0), False)])
def test_tf32_and_bf16_are_refused_on_cards_that_have_neither(capability, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    for precision in ("tf32", "bf16"):
        if refused:
            with pytest.raises(UserError, match=rf"--precision {precision} needs .* 8.0 or newer; Tesla T4 has 7.5"):
                precision_on(torch.device("cuda", 0), precision)
        else:
            assert precision_on(torch.device("cuda", 0), precision) == precision
    assert precision_on(torch.device("cuda", 0), "fp32") == "fp32"
    assert precision_on(torch.device("cuda", 0), "fp16") == "fp16"
    assert precision_on(torch.device("cuda", 0), "auto") == ("fp32" if refused else "bf16")


@pytest.mark.parametrize("native", ["", "avx512_bf16", "amx_bf16"])
def test_auto_is_bf16_on_the_cpus_that_compute_in_it(native, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, native: True}, raising=False)
    assert precision_on(torch.device("cpu"), "auto") == ("bf16" if native else "fp32")
    assert precision_on(torch.device("cpu"), "bf16") == "bf16"


def test_one_gpu_for_several_processes_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"--device cuda:7 asks for GPU 7, .* 2 here\. Choose from cuda:0 to cuda:1"):
        choose_device("cuda:7")
    monkeypatch.setattr(devices, "RANKS", 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(UserError, match=r"process 3 .* has no GPU: there are 2\. Give torchrun --nproc-per-node 2\."):
        choose_device("auto")
    with pytest.raises(UserError, match=r"--device cuda:1 would put all 4 processes on one GPU\. Use --device cuda"):
        choose_device("cuda:1")


@pytest.mark.parametrize(("kind", "fails", "left"), [("cpu", False, 1), ("cpu", True, 1), ("cuda", False, 1),
                                                     ("cuda", True, 0)])  # fmt: skip
def test_after_an_error_a_gpu_s_process_does_not_wait_for_those_that_wait_for_it(kind, fails, left, monkeypatch):
    seen = []
    monkeypatch.setattr(distributed, "RANKS", 2)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, **_: seen.append(backend))
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: seen.append("left"))
    with suppress(UserError), distributed.process_group(torch.device(kind)):
        if fails:
            raise UserError("the GPU's memory does not suffice")
    assert seen == [{"cpu": "gloo", "cuda": "nccl"}[kind], *["left"] * left]


# -- memory that does not suffice --


OURS, GPU_S = "the memory does not suffice", "the GPU's memory does not suffice"
NO_MEMORY = [
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory: 4 GB"), OURS),
    (RuntimeError("std::bad_alloc"), rf"{OURS} \(std::bad_alloc"),
    (MemoryError(), OURS),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), OURS),
    (
        RuntimeError(
            "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
            "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
        ),
        rf"{OURS} \(RuntimeError: \[enforce fail\] DefaultCPUAllocator: can't allocate memory",
    ),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB."), GPU_S),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), GPU_S),
    (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a tensor."), GPU_S),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), GPU_S),
    (RuntimeError("FIND was unable to find an engine to execute this computation"), GPU_S),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported later"), GPU_S),
    (RuntimeError("NCCL Error 1: unhandled cuda error, Cuda failure 2 'out of memory'"), GPU_S),
]
OTHER_ERRORS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (size mismatch)"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    OSError(errno.EIO, "out of memory"),
]


def failing(error: Exception):
    """A function that fails so, wrapped as the scripts are."""

    @enough_memory("Lower --batch-size.")
    def fail() -> None:
        raise error

    return fail


def test_memory_that_does_not_suffice_is_said_in_words_and_nothing_else_is_called_so():
    for error, text in NO_MEMORY:
        with pytest.raises(UserError, match=f"{text}.* Lower --batch-size"):
            failing(error)()
    for error in OTHER_ERRORS:
        with pytest.raises(type(error), match=str(error)[:9]):
            failing(error)()
