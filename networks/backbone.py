"""What the backbones share: five maps, heads that read the last of them, and how both are computed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from networks.batch_norm import BatchNorm3d
from networks.heads import DROPOUT, make_heads, refuse_sides

PRECISIONS = ("fp32", "tf32", "bf16")
"""Those to train in; to test in there is fp16 too."""
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
        return there_and_back(self, self.maps, image, allow_tf32=self.precision == "tf32")

    def outputs(self, x: Tensor) -> list[Tensor]:
        """What each head makes of the last map."""
        x = self.dropout(x)
        return [head(x) for head in self.heads.values()]

    def read(self, features: list[Tensor]) -> dict[str, Tensor]:
        """The maps of `features` -> head name -> (N,channels,W,H,D)."""
        found = there_and_back(self, self.outputs, features[-1], allow_tf32=False)
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
    """Sets that of every backbone in a method; whether it is then that of any.

    In training a network with a head 'sdm' stays in float32: m = sigmoid(-1500 z) has its gradient where |z| < 0.005,
    and what tf32 or bf16 round in the trunk moves z by more, so that it would be the gradient of other voxels. Without
    a gradient only voxels at the very border feel it.
    """
    found = [network for network in method.modules() if isinstance(network, Backbone)]
    for network in found:
        network.precision = "fp32" if training and "sdm" in network.heads else precision
    return any(network.precision == precision for network in found)


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


def there_and_back(
    network: nn.Module, part: Callable[[Tensor], list[Tensor]], x: Tensor, *, allow_tf32: bool
) -> list[Tensor]:
    """part(x), it and its gradients computed with tf32 or without; what surrounds them keeps what it has.

    Where the surroundings have the same there is nothing to do.
    """
    if torch.backends.cudnn.allow_tf32 == allow_tf32:
        return part(x)
    if torch.is_grad_enabled():
        weights = [p for p in network.parameters() if p.requires_grad]
        return list(_ThereAndBack.apply(allow_tf32, part, x, *weights))
    with tf32(allow_tf32):
        return part(x)


class _ThereAndBack(torch.autograd.Function):
    """A part of a network as one step of autograd: its backward is that of a graph of its own, within one flag.

    A flag set by a hook on the way back would stay for what comes after it: no gradient arrives at the image, so that
    nothing tells when a network's backward has ended.
    """

    @staticmethod
    def forward(ctx: Any, allow_tf32: bool, part: Callable[..., list[Tensor]], x: Tensor, *weights: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        x = x.detach().requires_grad_(x.requires_grad)
        with torch.enable_grad(), tf32(allow_tf32):
            found = part(x)
        ctx.allow_tf32, ctx.weights = allow_tf32, weights
        ctx.save_for_backward(x, *found)  # with the graph that they hang on, until torch lets go of this step
        return tuple(y.detach() for y in found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        x, *found = ctx.saved_tensors
        ends = [(y, grad) for y, grad in zip(found, grads, strict=True) if grad is not None]
        leaves = [x, *ctx.weights] if x.requires_grad else ctx.weights
        with tf32(ctx.allow_tf32):
            of = torch.autograd.grad(
                [y for y, _ in ends], leaves, [grad for _, grad in ends], retain_graph=True, allow_unused=True
            )
        return None, None, *(of if x.requires_grad else (None, *of))


@contextmanager
def recomputing() -> Iterator[None]:
    """Batch norm leaves its running statistics alone: they have counted this batch."""
    BatchNorm3d.counts = False
    try:
        yield
    finally:
        BatchNorm3d.counts = True
