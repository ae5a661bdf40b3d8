"""Ways to double the sides of a map, and an encoder that several decoders share."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.backbone import Backbone
from networks.convolution import Conv3d
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
        layout = torch.channels_last_3d if x.is_contiguous(memory_format=torch.channels_last_3d) else None
        for axis in (axis for axis, stride in enumerate(self.stride, 2) if stride == 2):
            first, last = x.narrow(axis, 0, 1), x.narrow(axis, -1, 1)
            before = torch.cat([first, x.narrow(axis, 0, x.shape[axis] - 1)], dim=axis)
            after = torch.cat([x.narrow(axis, 1, x.shape[axis] - 1), last], dim=axis)
            pair = torch.stack([x.lerp(before, 0.25), x.lerp(after, 0.25)], dim=axis + 1)
            x = pair.flatten(axis, axis + 1)
        return x if layout is None else x.contiguous(memory_format=layout)


def upsampling(up: str, channels: int, stride: Stride = (2, 2, 2), *, bias: bool = True) -> nn.Module:
    """A layer (N,channels,W,H,D) -> (N,channels/2,2W,2H,2D); an axis with stride 1 keeps its side.

    Args:
        up: one of UPS. 'transposed' is a transposed convolution whose kernel is the stride; the others are followed by
            a 3x3x3 convolution.
        stride: 1 or 2 along x, y, z.
    """
    if up == "transposed":
        return nn.ConvTranspose3d(channels, channels // 2, stride, stride=stride, bias=bias)
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
