"""The cost table times every method; at a size of seconds."""

import pytest

import train_dtml
from benchmarks import methods as bench
from methods import METHODS


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_timed(name, monkeypatch):
    tiny = {"patch_size": [32, 32, 32], "filters": 2, "query_channels": 16, "iterations": 9}
    monkeypatch.setitem(train_dtml.PROFILES, "phantom", tiny)
    found = bench.measure(name, bench.Options(iterations=1, device="cpu"))
    assert found["seconds"] > 0 and 0.1 < found["memory"] < 100
    assert 0 < found["trained"] <= found["all"]
    assert (found["trained"] < found["all"]) == (
        name not in ("dtml", "supervised", "dtc", "dk-uxnet")
    )  # teachers and critics
