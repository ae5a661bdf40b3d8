"""On a GPU every tensor of a training step is on the GPU, and the step reads none of them back.

Torch's device 'meta' stands for the GPU: its tensors have no values, so reading one is an error, and they take the ways
of what is not on the CPU. Its matrix products and convolutions take a tensor of the CPU without a word, so that every
operation is looked at here.
"""

import pytest
import torch
from test_precision import CASES, OTHERS, PRESETS, make_batch, make_method
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from evaluation.sliding_window import sliding_slabs
from methods import adversary
from methods.bcp import BCP
from utils.devices import to_device

aten = torch.ops.aten
MORE = ("tcse, zoomed", "bcp, authors", "ad-mt, authors", "ss-net, authors", "dk-uxnet, released")


class OneDevice(TorchDispatchMode):
    """Notes the operations that mix devices, and the copies for which a GPU's host waits."""

    NORMS = {aten.native_batch_norm.default: 0, aten.native_batch_norm_backward.default: 1}

    def __init__(self):
        super().__init__()
        self.mixed, self.waits, self.seen = set(), [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        if len({x.device for x in given if x.dim()}) > 1:
            self.mixed.add(name)
        self.seen.add(name)
        if function in self.NORMS and args[0].is_meta:  # torch's own takes a hundred times as long
            x = args[self.NORMS[function]]
            return torch.empty_like(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
        result = function(*args, **kwargs)
        if name == "_to_copy" and given[0].device != result.device and not kwargs.get("non_blocking"):
            self.waits.append(tuple(result.shape))
        return result


def test_what_goes_to_a_gpu_is_pinned_so_that_the_host_need_not_wait(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: calls.append("pinned") or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, non_blocking: calls.append((device.type, non_blocking)))
    for kind in ("cuda", "cpu"):
        to_device(torch.ones(2), torch.device(kind))
    to_device(torch.empty(2, device="meta"), torch.device("cuda"))  # one that is not on the CPU
    assert calls == ["pinned", ("cuda", True), ("cpu", True), ("cuda", True)]


def on_meta(batch):
    return {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in batch.items()}


@pytest.mark.parametrize("case", [*CASES, *MORE])
def test_a_step_of_a_method_keeps_to_its_device_and_reads_nothing_back(case, monkeypatch):
    """Except the critics' own steps, which look at their loss, and the component filter of BCP."""
    monkeypatch.setattr(adversary, "check_finite", lambda *_: None)
    name, options = (CASES | PRESETS | OTHERS)[case]
    method = make_method(name, **options)
    if isinstance(method, BCP):
        method.options.largest_component = False
    batch = on_meta(make_batch(method))
    method.to("meta")
    with OneDevice() as device:
        method(batch, 1).total.backward()
        method.after_step(batch, 1)
        with torch.no_grad():
            method.predict(batch["image"], method.outputs)
            method.maps(batch["image"])
    assert device.mixed == set() and device.waits == []
    assert {"convolution", "convolution_backward"} <= device.seen


@pytest.mark.parametrize("weighting", ["uniform", "gaussian"])
def test_the_window_keeps_to_the_device_of_the_scan(weighting):
    with OneDevice() as device:
        image = torch.empty(2, 20, 12, 8, device="meta")
        slabs = [slab for _, slab in sliding_slabs(lambda x: x + 1, image, (8, 8, 8), (4, 4, 4), weighting=weighting)]
    assert device.mixed == set() and all(slab.is_meta for slab in slabs)
