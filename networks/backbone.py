"""What the backbones share: five maps, heads that read the last of them, and how both are computed."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.checkpoint import checkpoint

from networks.batch_norm import BatchNorm3d
from networks.heads import DROPOUT, make_heads, refuse_sides

PRECISIONS = ("fp32", "tf32", "bf16")
"""Those to train in; to test in there is fp16 too."""
STEEPEST = 50.0  # k of m = sigmoid(-k z) up to which a network with a head 'sdm' is trained in tf32 or bf16
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Backbone(nn.Module):
    """An encoder-decoder whose five maps, from stride 16 to 1, have 16, 8, 4, 2 and 1 times `filters` channels.

    Args:
        heads: head name -> output channels. 'seg' returns logits, 'sdm' returns tanh values in [-1,1]
            (a map that is negative inside the object). All heads are 1x1x1 convolutions of the last map, computed in
            float32 at least; without any the network is for its `features` alone.
        filters: channels of the last map.
        dropout: channel dropout with p = 0.5 after the deepest and after the last map, in training mode only.

    Raises:
        ValueError: for an unknown head name, or in `features` for a side that is not a multiple of 16.
    """

    precision = "fp32"
    """Of the convolutions in `features`: fp32, tf32, bf16 or, without a gradient, fp16."""
    recompute = False
    """Whether training keeps only the blocks' inputs and computes what lies between again on the way back."""

    def add_heads(self, heads: dict[str, int], filters: int, *, dropout: bool) -> None:
        """Last of all, so that weights are drawn in the order of the layers."""
        self.dropout = nn.Dropout3d(DROPOUT if dropout else 0.0)
        self.heads = make_heads(heads, filters)

    def maps(self, image: Tensor) -> list[Tensor]:
        """What `features` returns, in the precision of the surroundings."""
        raise NotImplementedError

    def features(self, image: Tensor) -> list[Tensor]:
        """image (N,in_channels,W,H,D) -> the maps after the bottom and the four decoder blocks, last one full size."""
        refuse_sides(image)
        if self.precision in HALVES:
            with torch.autocast(image.device.type, HALVES[self.precision]):
                return [x.float() for x in self.maps(image)]
        return there_and_back(self.maps, image, allow_tf32=self.precision == "tf32")

    def outputs(self, x: Tensor) -> list[Tensor]:
        """What each head makes of the last map."""
        x = self.dropout(x)
        return [head(x) for head in self.heads.values()]

    def read(self, features: list[Tensor]) -> dict[str, Tensor]:
        """The maps of `features` -> head name -> (N,channels,W,H,D)."""
        found = there_and_back(self.outputs, features[-1], allow_tf32=False)
        return dict(zip(self.heads, found, strict=True))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """image (N,in_channels,W,H,D) -> head name -> (N,channels,W,H,D)."""
        return self.read(self.features(image))

    def run(self, block: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """A block of `maps`, kept or computed again as `recompute` says."""
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return block(*inputs)
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), recomputing()))


def set_precision(method: nn.Module, precision: str, *, training: bool) -> bool:
    """Set the precision of every backbone in a method. Returns whether any backbone has it then.

    In training a network with a head 'sdm' stays in float32 if k > STEEPEST, or if its method has no k. The gradient of
    m = sigmoid(-k z) is in the voxels where |z| is a few 1/k. At k = 1500 tf32 and bf16 move z by more than that, so
    the gradient would be that of other voxels (benchmarks/README.md, "Precision"). Testing needs no gradient.
    """
    networks = [network for network in method.modules() if isinstance(network, Backbone)]
    steep = training and getattr(method.options, "k", math.inf) > STEEPEST
    for network in networks:
        network.precision = "fp32" if steep and "sdm" in network.heads else precision
    return any(network.precision == precision for network in networks)


def set_recompute(method: nn.Module, recompute: bool) -> None:
    """Sets it for every backbone in a method."""
    for network in method.modules():
        if isinstance(network, Backbone):
            network.recompute = recompute


def compile_networks(method: nn.Module) -> None:
    """Has torch.compile make one program of the maps of every backbone in a method, at the first call."""
    for network in method.modules():
        if isinstance(network, Backbone):
            network.maps = torch.compile(network.maps)  # type: ignore[method-assign]


@contextmanager
def tf32(allow: bool) -> Iterator[None]:
    """Whether a GPU's convolutions may round their inputs to ten bits, inside."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allow
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def there_and_back(part: Callable[[Tensor], list[Tensor]], x: Tensor, *, allow_tf32: bool) -> list[Tensor]:
    """part(x), it and its gradients computed with tf32 or without; what surrounds them keeps what it has.

    Where the surroundings have the same there is nothing to do. Else each step of the way back sets the flag when it
    begins and puts back what it found when it ends: no gradient arrives at the image, so that nothing would tell when
    the way back of a whole network has ended.
    """
    if torch.backends.cudnn.allow_tf32 == allow_tf32:
        return part(x)
    with tf32(allow_tf32):
        found = part(x)
    for step in steps_back(found, x):
        hold_tf32(step, allow_tf32)
    return found


def hold_tf32(step: Node, allow: bool) -> None:
    """Whether a GPU's convolutions may round in a step of the way back; after it they may what they could before."""
    before: list[bool] = []

    def begin(*_: Any) -> None:
        before.append(torch.backends.cudnn.allow_tf32)
        torch.backends.cudnn.allow_tf32 = allow

    def end(*_: Any) -> None:
        torch.backends.cudnn.allow_tf32 = before.pop()

    step.register_prehook(begin)
    step.register_hook(end)


def steps_back(found: list[Tensor], x: Tensor) -> list[Node]:
    """The steps of autograd from what was made of x back to x and to the weights, without these."""
    steps: list[Node] = []
    seen = {x.grad_fn}
    waiting = [y.grad_fn for y in found]
    while waiting:
        step = waiting.pop()
        if step is not None and step not in seen:
            seen.add(step)
            before = [node for node, _ in step.next_functions]
            waiting += before
            if before:  # a weight has none, and would keep what is hooked to it
                steps.append(step)
    return steps


@contextmanager
def recomputing() -> Iterator[None]:
    """Batch norm leaves its running statistics alone: they have counted this batch."""
    BatchNorm3d.counts = False
    try:
        yield
    finally:
        BatchNorm3d.counts = True
