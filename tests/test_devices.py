"""The memory that a step frees serves the next one."""

import ctypes
import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAM = """
import resource
import torch
from utils.devices import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.zeros(64 << 18)  # 64 MiB, 16384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
usual = faults()
keep_freed_memory()
for _ in range(4):  # until the heap is as large as it gets
    faults()
print(usual, faults())
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="a remedy for glibc's malloc"
)
def test_freed_memory_is_not_cleared_anew():
    """In a process of its own: the heap of this one has been through too much to say."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    usual, kept = map(int, done.stdout.split())
    assert kept < 1000 < usual
