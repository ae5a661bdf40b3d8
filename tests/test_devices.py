"""The memory that a step frees serves the next one."""

import ctypes
import resource
import sys

import pytest
import torch

from utils.devices import keep_freed_memory


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="a remedy for glibc's malloc"
)
def test_freed_memory_is_not_cleared_anew():
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            torch.zeros(64 << 18)  # 64 MiB, 16384 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    keep_freed_memory()
    faults()
    assert faults() < 1000
