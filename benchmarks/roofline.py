"""How near each convolution of a V-Net's training step comes to what this computer can do (its roofline).

    python -m benchmarks.roofline --threads 1                                   at full size, in fp32 and bf16
    python -m benchmarks.roofline --patch-size 64 64 32 --filters 8 --threads 1     as in the profile half

The roofline (Williams, Waterman & Patterson 2009) is the lower one of two limits: the rate of the arithmetic, and what
the memory delivers if every input is read once and every output written once. The first table has both limits, as
measured here. That of the arithmetic is the rate of a large matrix product, or of a convolution whose maps stay in the
cache if that is faster. The second table has the convolutions of one step, timed within the step: `of roofline` is the
time at the roofline divided by the time taken. The third has where the step's time goes, and how long its convolutions
would take at the roofline.
"""

import dataclasses
import inspect
import math
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer

from benchmarks.timing import table
from methods import METHODS
from networks.backbone import set_precision
from networks.batch_norm import _Normalise
from networks.convolution import _Transposed
from utils.devices import keep_freed_memory
from utils.errors import run
from utils.options import fill, option, read_flags

FORWARD, BACKWARD = "convolution", "convolution_backward"
PARTS = {
    "convolutions, forward": (FORWARD,),
    "convolutions, backward": (BACKWARD,),
    "batch norm, forward": ("_Normalise.forward", "native_batch_norm"),
    "batch norm, backward": ("_Normalise.backward", "native_batch_norm_backward"),
    "ReLU": ("relu", "relu_", "threshold_backward"),
}
"""Part of a step -> the names of its operations. In bf16 batch norm is torch's own."""
OURS = {
    _Normalise.forward.__code__: "_Normalise.forward",
    _Normalise.backward.__code__: "_Normalise.backward",
    inspect.unwrap(_Transposed.backward).__code__: BACKWARD,
}
"""Code -> the name under which all its operations count."""
WARM = 3
"""Steps before those that are timed; they still ask the system for memory."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass
class Options:
    """Options of the benchmark."""

    patch_size: list[int] = option([112, 112, 80], "voxels of a crop along x, y, z", nargs=3, minimum=16)
    filters: int = option(16, "channels of the first block", minimum=1)
    batch_size: int = option(4, "crops", minimum=1)
    rounds: int = option(3, "timed steps of each precision", minimum=1)
    side: int = option(2048, "side of the matrices whose product gives the peak rate", minimum=1)
    mebibytes: int = option(256, "size of the array whose copy gives the memory's rate", minimum=1)
    threads: int = option(1, "CPU threads", minimum=1)


class Layer(NamedTuple):
    """A convolution of the step; layers of the same shapes count as one."""

    image: tuple[int, ...]
    """Shape of its input (N,K,W,H,D)."""
    kernel: tuple[int, ...]
    """Shape of its weight."""

    @property
    def transposed(self) -> bool:
        """Whether it doubles the sides. Of a transposed convolution the weight has the input's channels first."""
        return self.kernel[0] == self.image[1] != self.kernel[1]

    @property
    def output(self) -> tuple[int, ...]:
        """Shape of its output: kernels of 2 halve or double the sides, odd ones keep them."""
        sides, channels = self.image[2:], self.kernel[self.transposed]
        if self.kernel[2] == 2:
            sides = tuple(2 * side if self.transposed else side // 2 for side in sides)
        return (self.image[0], channels, *sides)

    @property
    def products(self) -> int:
        """Computations of the forward one's size in the backward pass; the first layer's image needs no gradient."""
        return 1 if self.image[1] == 1 else 2

    def flops(self) -> int:
        """Floating-point operations of the forward pass, a multiplication and an addition for each weight and voxel."""
        voxels = math.prod((self.image if self.transposed else self.output)[2:])
        return 2 * self.image[0] * voxels * math.prod(self.kernel)

    def numbers(self) -> int:
        """Numbers that the forward pass reads or writes, each once."""
        return math.prod(self.image) + math.prod(self.kernel) + math.prod(self.output)

    def best(self, precision: str, peak: float, memory: float) -> float:
        """Seconds of the forward pass at the roofline: `peak` in FLOP/s, `memory` in bytes/s."""
        return max(self.flops() / peak, self.numbers() * DTYPES[precision].itemsize / memory)


def peak_rate(side: int, dtype: torch.dtype) -> float:
    """FLOP/s of the product of two square matrices, or of a convolution of 64 channels if that is faster."""
    a, b = torch.randn(2, side, side).to(dtype)
    layer = Layer((1, 64, 28, 28, 20), (64, 64, 3, 3, 3))
    x, w = (torch.randn(shape).to(dtype, memory_format=torch.channels_last_3d) for shape in layer)
    return max(2 * side**3 / seconds_of(lambda: a @ b), layer.flops() / seconds_of(lambda: F.conv3d(x, w, padding=1)))


def memory_rate(mebibytes: int) -> float:
    """Bytes/s of a copy, which reads and writes each byte."""
    a = torch.ones(mebibytes * 2**18)
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / seconds_of(lambda: b.copy_(a))


def seconds_of(call: Callable[[], Any]) -> float:
    """Median seconds of a call."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange().median


class Timed(TorchDispatchMode):
    """Times each of torch's operations on a CPU, forward and backward.

    torch's profiler is of no use here. It keeps small pieces of memory between the maps, so that each step asks the
    system for new pages, and clearing these takes as long as the operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        """Name of an operation -> seconds of all its calls."""
        self.layers: dict[str, dict[Layer, tuple[int, float]]] = {FORWARD: {}, BACKWARD: {}}
        """Pass -> layer -> operations, and their seconds."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        began = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        seconds = time.perf_counter() - began
        name, frame = func.overloadpacket.__name__, inspect.currentframe()
        while frame is not None and frame.f_code not in OURS:
            frame = frame.f_back
        if frame is not None:
            name = OURS[frame.f_code]
        self.seconds[name] += seconds
        if name in self.layers and frame is None:
            at = 1 if name == BACKWARD else 0  # the backward pass begins with the gradient of the output
            self.add(name, args[at], args[at + 1], seconds)
        elif name in self.layers and frame is not None and "weight" in frame.f_locals:  # not while it unpacks these
            self.add(name, frame.f_locals["x"], frame.f_locals["weight"], seconds)
        return out

    def add(self, name: str, image: Tensor, kernel: Tensor, seconds: float) -> None:
        """Notes an operation of a layer."""
        layer = Layer(tuple(image.shape), tuple(kernel.shape))
        count, before = self.layers[name].get(layer, (0, 0.0))
        self.layers[name][layer] = count + 1, before + seconds


def timed(step: Callable[[], Any], rounds: int) -> tuple[dict[str, dict[Layer, list[float]]], dict[str, float]]:
    """Runs a step several times -> pass -> layer -> calls in a step and seconds of each; part -> seconds of a step."""
    with Timed():
        for _ in range(WARM):
            step()
    with Timed() as kept:
        began = time.perf_counter()
        for _ in range(rounds):
            step()
        whole = (time.perf_counter() - began) / rounds
    calls = {layer: count for layer, (count, _) in kept.layers[FORWARD].items()}
    layers = {
        name: {layer: [calls[layer] / rounds, seconds / calls[layer]] for layer, (_, seconds) in of.items()}
        for name, of in kept.layers.items()
    }
    parts = {part: sum(kept.seconds[name] for name in names) / rounds for part, names in PARTS.items()}
    return layers, parts | {"all else": whole - sum(parts.values()), "step": whole}


def layer_rows(precision: str, layers: dict[str, dict[Layer, list[float]]], peak: float, memory: float) -> list[list]:
    """A row for each layer: rates in GFLOP/s, and their shares of the roofline."""
    rows = []
    for layer, (count, forward) in layers[FORWARD].items():
        _, backward = layers[BACKWARD][layer]
        best = layer.best(precision, peak, memory)
        rows.append([
            precision, f"{layer.image[1]} to {layer.output[1]}, kernel {layer.kernel[2]}",
            "x".join(map(str, layer.image[2:])), round(count), layer.flops() / 1e9,
            layer.flops() / forward / 1e9, f"{best / forward:.0%}",
            layer.products * layer.flops() / backward / 1e9, f"{layer.products * best / backward:.0%}",
        ])  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> None:
    o: Options = read_flags(Options, __doc__, "python -m benchmarks.roofline", argv)
    torch.set_num_threads(o.threads)
    keep_freed_memory()
    peaks = {precision: peak_rate(o.side, dtype) for precision, dtype in DTYPES.items()}
    memory = memory_rate(o.mebibytes)
    limits: list[list[Any]] = [
        ["arithmetic, GFLOP/s", *(peak / 1e9 for peak in peaks.values())],
        ["memory, GB/s", *[memory / 1e9] * len(DTYPES)],
    ]
    print(table(["limit", *DTYPES], limits))
    kind = METHODS["supervised"]
    method = kind(fill(kind.Options, {"filters": o.filters}), iterations=1).train()
    shape = (o.batch_size, *o.patch_size)
    batch = {"image": torch.randn(shape)[:, None], "label": torch.randint(0, 2, shape, dtype=torch.uint8)}

    def step() -> None:
        method.zero_grad()
        total: Tensor = method(batch, 0).total
        total.backward()

    rows, times, floors = [], {}, {}
    for precision in DTYPES:
        set_precision(method, precision, training=True)
        layers, times[precision] = timed(step, o.rounds)
        limits_of = peaks[precision], memory
        rows += layer_rows(precision, layers, *limits_of)
        floors[precision] = sum(
            count * (1 + layer.products) * layer.best(precision, *limits_of)
            for layer, (count, _) in layers[FORWARD].items()
        )
    head = ["precision", "channels", "input", "calls", "GFLOP", "forward GFLOP/s", "of roofline", "backward GFLOP/s",
            "of roofline"]  # fmt: skip
    print("\n" + table(head, rows))
    both = times["fp32"], times["bf16"]
    shares = [
        [part, *(cell for of in both for cell in (of[part], f"{of[part] / of['step']:.0%}"))] for part in times["fp32"]
    ]
    shares.append(
        [
            "convolutions at the roofline",
            *(c for p in DTYPES for c in (floors[p], f"{floors[p] / times[p]['step']:.0%}")),
        ]
    )
    print("\n" + table(["part", "fp32 s", "share", "bf16 s", "share"], shares))


if __name__ == "__main__":
    run(main)
