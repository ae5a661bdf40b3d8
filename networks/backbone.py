"""The base class of the backbones: five feature maps, heads on the last one, and their precision and memory use."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.checkpoint import checkpoint

from networks.batch_norm import BatchNorm3d
from networks.heads import HALVINGS, make_heads, refuse_sides
from utils.errors import UserError

PRECISIONS = ("fp32", "tf32", "bf16")
"""Precisions for training; testing can use fp16 too."""
STEEPEST = 50.0  # largest k of m = sigmoid(-k z) for which a network with a head 'sdm' is trained in tf32 or bf16
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Change = Callable[[Tensor], Tensor]
"""A map of the encoder (N,channels,w,h,d) -> the map that is decoded in its place."""


class Backbone(nn.Module):
    """An encoder-decoder whose five maps, from the bottom up, have 16, 8, 4, 2 and 1 times `filters` channels.

    The encoder halves the sides in four steps. With fewer `halvings` an axis is left alone by the first steps, as the
    thick slices of an anisotropic scan need.

    Args:
        heads: head name -> output channels. 'seg' returns logits. 'sdm' returns tanh values in [-1,1], negative inside
            the object. Heads are 1x1x1 convolutions of the last map, computed in at least float32. A network without
            heads is used for its `features`.
        in_channels: channels of the image.
        filters: channels of the last map.
        dropout: p of the channel dropout after the deepest and after the last map, in training mode only.
        up: how the decoder doubles the sides, one of `networks.decoders.UPS`.
        encoder: False leaves the encoder out; the network then has `decode` alone.
        halvings: how often x, y and z are halved.

    Raises:
        ValueError: for an unknown head name, or in `features` for a side that is not a multiple of 2^halvings.
    """

    precision = "fp32"
    """Precision of the convolutions in `features`: fp32, tf32, bf16 or, without gradient, fp16."""
    recompute = False
    """Whether training keeps only the inputs of the blocks and recomputes their activations in the backward pass."""
    halvings: Sequence[int] = HALVINGS
    """How often x, y and z are halved."""

    def add_heads(self, heads: dict[str, int], filters: int, *, dropout: float) -> None:
        """Adds `heads` and `dropout`; call it last in `__init__`, so that weights are drawn in the order of the layers.

        Raises:
            ValueError: for an unknown head name.
        """
        self.dropout = nn.Dropout3d(dropout)
        self.heads = make_heads(heads, filters)

    def encode(self, image: Tensor) -> list[Tensor]:
        """image (N,in_channels,W,H,D) -> the encoder's five maps, the skips from full size on and then the bottom."""
        raise NotImplementedError

    def decode(self, encoded: list[Tensor]) -> list[Tensor]:
        """The maps of `encode` -> the maps that `features` returns."""
        raise NotImplementedError

    def maps(self, image: Tensor, change: Change | None = None) -> list[Tensor]:
        """image (N,in_channels,W,H,D) -> the maps that `features` returns, in the surrounding precision."""
        encoded = self.encode(image)
        return self.decode(encoded if change is None else [change(x) for x in encoded])

    def features(self, image: Tensor, change: Change | None = None) -> list[Tensor]:
        """image (N,in_channels,W,H,D) -> the maps after the bottom and the four decoder blocks, the last at full size.

        Args:
            image: every side must be a multiple of 2^halvings, by default of 16.
            change: applied to each of the encoder's five maps before they are decoded; it may change their number N.

        Raises:
            ValueError: for a side that is not.
        """
        refuse_sides(image, self.halvings)
        maps = self.maps if change is None else partial(self.maps, change=change)
        if self.precision in HALVES:
            with torch.autocast(image.device.type, HALVES[self.precision]):
                return [x.float() for x in maps(image)]
        return with_tf32(maps, image, allow_tf32=self.precision == "tf32")

    def outputs(self, x: Tensor) -> list[Tensor]:
        """The last map (N,filters,W,H,D) -> the output of each head, (N,channels,W,H,D)."""
        kept = self.dropout(x.new_ones(*x.shape[:2], 1, 1, 1))  # in the heads' weights it costs nothing
        return [head(x, kept) for head in self.heads.values()]

    def read(self, features: list[Tensor]) -> dict[str, Tensor]:
        """The maps of `features` -> head name -> (N,channels,W,H,D)."""
        outputs = with_tf32(self.outputs, features[-1], allow_tf32=False)
        return dict(zip(self.heads, outputs, strict=True))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """image (N,in_channels,W,H,D) -> head name -> (N,channels,W,H,D)."""
        return self.read(self.features(image))

    def run(self, block: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Returns block(*inputs); with `recompute` its activations are recomputed in the backward pass."""
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return block(*inputs)
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), uncounted()))


def set_precision(method: nn.Module, precision: str, *, training: bool) -> bool:
    """Sets the precision, one of PRECISIONS or fp16 for testing, of every backbone in a method, a module with
    `options`.

    In training a network with a head 'sdm' stays in float32 if k > STEEPEST, or if its method has no k. The gradient of
    m = sigmoid(-k z) is in the voxels where |z| is a few 1/k. At k = 1500 tf32 and bf16 move z by more than that, so
    the gradient would be that of other voxels (benchmarks/README.md, "Precision"). Testing needs no gradient.

    Returns:
        Whether at least one backbone now has this precision.
    """
    networks = [network for network in method.modules() if isinstance(network, Backbone)]
    steep = training and getattr(method.options, "k", math.inf) > STEEPEST
    for network in networks:
        network.precision = "fp32" if steep and "sdm" in network.heads else precision
    return any(network.precision == precision for network in networks)


def precision_of(method: nn.Module) -> str:
    """What `set_precision` set, for a log: 'bf16', or 'bf16 and fp32' where some networks stay in float32."""
    networks = [network for network in method.modules() if isinstance(network, Backbone)]
    return " and ".join(dict.fromkeys(network.precision for network in networks))


def set_recompute(method: nn.Module, recompute: bool) -> None:
    """Sets `recompute` of every backbone in a method."""
    for network in method.modules():
        if isinstance(network, Backbone):
            network.recompute = recompute


def compile_networks(method: nn.Module) -> None:
    """Compiles `maps` of every backbone in a method with torch.compile; compilation starts at the first call.

    Raises:
        UserError: at that call, where torch cannot compile, for want of a C compiler or on an old GPU.
    """
    for network in method.modules():
        if isinstance(network, Backbone):
            network.maps = compiled(network.maps)  # type: ignore[method-assign]


def compiled(maps: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """One function for `compile_networks`."""
    fast = torch.compile(maps)

    def run(*inputs: Any, **options: Any) -> list[Tensor]:
        try:
            return fast(*inputs, **options)
        except torch._dynamo.exc.TorchDynamoException as e:
            why = " ".join(str(e).splitlines()[:2]).strip()
            raise UserError(f"--compile does not work here ({why}). Leave it out.") from e

    return run


@contextmanager
def tf32(allow: bool) -> Iterator[None]:
    """Context in which a GPU's convolutions may, or may not, round their inputs to TF32 (10 bits)."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allow
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def with_tf32(part: Callable[[Tensor], list[Tensor]], x: Tensor, *, allow_tf32: bool) -> list[Tensor]:
    """Returns part(x) for x of any shape, with the forward and the backward pass of a GPU's convolutions computed with
    TF32, which rounds their inputs, or without.

    If the global flag differs, each node of the backward pass sets it and restores it afterwards. One hook for the
    whole backward pass is not possible: no gradient arrives at the image, so no hook would run at its end.
    """
    if torch.backends.cudnn.allow_tf32 == allow_tf32:
        return part(x)
    with tf32(allow_tf32):
        outputs = part(x)
    for node in backward_nodes(outputs, x):
        hold_tf32(node, allow_tf32)
    return outputs


def hold_tf32(node: Node, allow: bool) -> None:
    """Sets the TF32 flag while a node of the backward pass runs, and restores it afterwards."""
    before: list[bool] = []

    def begin(*_: Any) -> None:
        before.append(torch.backends.cudnn.allow_tf32)
        torch.backends.cudnn.allow_tf32 = allow

    def end(*_: Any) -> None:
        torch.backends.cudnn.allow_tf32 = before.pop()

    node.register_prehook(begin)
    node.register_hook(end)


def backward_nodes(outputs: list[Tensor], x: Tensor) -> list[Node]:
    """The autograd nodes between `outputs` and their input x, without those of the weights."""
    nodes: list[Node] = []
    seen = {x.grad_fn}
    waiting = [y.grad_fn for y in outputs]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            next_nodes = [next_node for next_node, _ in node.next_functions]
            waiting += next_nodes
            if next_nodes:  # the node of a weight has none; a hook on it would stay for ever
                nodes.append(node)
    return nodes


@contextmanager
def uncounted() -> Iterator[None]:
    """Context in which batch norm does not update its running statistics, as when a batch is computed again."""
    before = BatchNorm3d.counts
    BatchNorm3d.counts = False
    try:
        yield
    finally:
        BatchNorm3d.counts = before
