"""On a GPU every tensor of a training step is on the GPU, the step reads none of them back, and with --deterministic a
GPU refuses none of its operations.

Torch's device 'meta' stands for the GPU: its tensors have no values, so reading one is an error, and they take the ways
of what is not on the CPU. Its matrix products and convolutions take a tensor of the CPU without a word, so that every
operation is looked at here.
"""

import pytest
import torch
import torch.nn.functional as F
from test_precision import CASES, make_batch, make_method
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from evaluation.sliding_window import sliding_slabs
from methods import METHODS, adversary
from methods.bcp import BCP
from utils.devices import to_device

aten = torch.ops.aten
REFUSED = {  # by a GPU under torch.use_deterministic_algorithms, as its documentation (2.13) names them
    "avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward",
    "adaptive_avg_pool3d_backward", "adaptive_max_pool2d_backward", "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward", "max_unpool2d", "max_unpool3d", "upsample_linear1d_backward",
    "upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "upsample_trilinear3d_backward",
    "reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward", "nll_loss_forward",
    "nll_loss_backward", "nll_loss2d_forward", "nll_loss2d_backward", "_ctc_loss_backward", "_embedding_bag_backward",
    "put_", "histc", "bincount", "median", "nanmedian", "grid_sampler_2d_backward", "grid_sampler_3d_backward",
    "cumsum", "cumsum_", "scatter_reduce", "scatter_reduce_",
}  # fmt: skip
MORE = {  # beside CASES: presets other than the first, and options that take other ways
    **{
        f"{m}, {preset}": (m, kind.PRESETS[preset])
        for m, kind in METHODS.items()
        for preset in list(kind.PRESETS)[1:]
        if preset != "tuned"
    },
    **{f"{m}, softmax": (m, {"softmax": True, "classes": 2}) for m in ("dtml", "unimatch", "ss-net", "ua-mt")},
    "tcse, zoomed": ("tcse", {"scale": 0.2}),
    "dk-uxnet, squares": ("dk-uxnet", {"contrast": "mse"}),
    "dtml, both losses": ("dtml", {"sdm_loss": "both"}),
    "double-unc, all blocks": ("double-unc", {"feature_blocks": "decoder"}),
}


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


@pytest.mark.parametrize("case", ALL := CASES | MORE)
def test_a_step_of_a_method_keeps_to_its_device_reads_nothing_back_and_can_be_repeated(case, monkeypatch):
    """Except the critics' own steps, which look at their loss, and the component filter of BCP."""
    monkeypatch.setattr(adversary, "check_finite", lambda *_: None)
    name, options = ALL[case]
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
    assert {"convolution", "convolution_backward"} <= device.seen and device.seen & REFUSED == set()


def test_the_names_of_what_a_gpu_refuses_are_torchs():
    assert [name for name in REFUSED if not hasattr(aten, name)] == []
    logits = torch.randn(2, 3, 4, 4, 4, requires_grad=True)
    with OneDevice() as device:
        F.cross_entropy(logits, torch.zeros(2, 4, 4, 4, dtype=torch.long)).backward()
    assert device.seen & REFUSED == {"nll_loss2d_forward", "nll_loss2d_backward"}


@pytest.mark.parametrize("weighting", ["uniform", "gaussian"])
def test_the_window_keeps_to_the_device_of_the_scan(weighting):
    with OneDevice() as device:
        image = torch.empty(2, 20, 12, 8, device="meta")
        slabs = [slab for _, slab in sliding_slabs(lambda x: x + 1, image, (8, 8, 8), (4, 4, 4), weighting=weighting)]
    assert device.mixed == set() and all(slab.is_meta for slab in slabs)
