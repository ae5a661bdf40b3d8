"""Ways to double the sides of a map, and an encoder that several decoders share."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from networks.backbone import Backbone
from networks.convolution import Conv3d, ConvTranspose3d
from networks.heads import Stride

UPS = ("transposed", "trilinear", "nearest")
"""How a decoder doubles the sides of its maps."""


class Doubled(nn.Module):
    """Doubles maps (N,C,W,H,D) along the axes whose stride is 2, without weights: 'trilinear' or 'nearest'.

    The centre of each voxel lies between those of its eight parts, as align_corners=False of F.interpolate. On a GPU
    torch (2.13) refuses the gradient of its own trilinear interpolation under torch.use_deterministic_algorithms.
    """

    def __init__(self, mode: str, stride: Stride = (2, 2, 2)):
        super().__init__()
        self.mode, self.stride = mode, stride

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "nearest":
            return F.interpolate(x, scale_factor=self.stride, mode="nearest")
        last = x.is_contiguous(memory_format=torch.channels_last_3d)
        x = x.movedim(1, -1) if last else x  # the order in memory
        for axis in (axis for axis, stride in enumerate(self.stride, 1 if last else 2) if stride == 2):
            x = _DoubledLinearly.apply(x, axis)
        return x.movedim(-1, 1) if last else x


class _DoubledLinearly(torch.autograd.Function):
    """x (...,n,...) -> y (...,2n,...), along one axis of a map of any shape, as linear interpolation has it:

        y_2i = 3/4 x_i + 1/4 x_(i-1),    y_(2i+1) = 3/4 x_i + 1/4 x_(i+1)

    The first and the last element stand in for their missing neighbours. Autograd would add up many maps for the
    gradient; here it takes a few operations.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int) -> Tensor:
        ctx.axis, n = axis, x.shape[axis]
        before = torch.cat([x.narrow(axis, 0, 1), x.narrow(axis, 0, n - 1)], dim=axis)
        after = torch.cat([x.narrow(axis, 1, n - 1), x.narrow(axis, n - 1, 1)], dim=axis)
        return torch.stack([x.lerp(before, 0.25), x.lerp(after, 0.25)], dim=axis + 1).flatten(axis, axis + 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        axis, n = ctx.axis, grad.shape[ctx.axis] // 2
        even, odd = grad.unflatten(axis, (n, 2)).unbind(axis + 1)
        before = torch.cat([even.narrow(axis, 0, 1), odd.narrow(axis, 0, n - 1)], dim=axis)
        after = torch.cat([even.narrow(axis, 1, n - 1), odd.narrow(axis, n - 1, 1)], dim=axis)
        return (even + odd).lerp(before + after, 0.25), None


def upsampling(up: str, channels: int, stride: Stride = (2, 2, 2), *, bias: bool = True) -> nn.Module:
    """A layer (N,channels,W,H,D) -> (N,channels/2,2W,2H,2D); an axis with stride 1 keeps its side.

    Args:
        up: one of UPS. 'transposed' is a transposed convolution whose kernel is the stride; the others are followed by
            a 3x3x3 convolution.
        stride: 1 or 2 along x, y, z.
    """
    if up == "transposed":
        return ConvTranspose3d(channels, channels // 2, stride, bias=bias)
    return nn.Sequential(Doubled(up, stride), Conv3d(channels, channels // 2, 3, padding=1, bias=bias))


class Decoders(Backbone):
    """One encoder and several decoders, which differ in `up`, one of UPS for each; each has `heads` of its own, as
    those of Backbone.
    """

    def __init__(
        self, kind: Callable[..., Backbone], *, heads: dict[str, int], filters: int, ups: tuple[str, ...] = UPS
    ):
        super().__init__()
        self.first = kind(heads=heads, filters=filters, up=ups[0])
        self.others = nn.ModuleList([kind(heads=heads, filters=filters, up=up, encoder=False) for up in ups[1:]])
        self.heads = nn.ModuleDict()  # none beside those of the decoders
        self.halvings = self.first.halvings

    def encode(self, image: Tensor) -> list[Tensor]:
        return self.first.encode(image)

    def decode(self, encoded: list[Tensor]) -> list[Tensor]:
        """The maps of `encode` -> the last map of each decoder, (N,filters,W,H,D)."""
        return [network.decode(encoded)[-1] for network in (self.first, *self.others)]

    def forward(self, image: Tensor) -> list[dict[str, Tensor]]:  # type: ignore[override]
        """image (N,in_channels,W,H,D) -> for each decoder, head name -> (N,channels,W,H,D)."""
        maps = self.features(image)
        return [network.read([x]) for network, x in zip((self.first, *self.others), maps, strict=True)]
