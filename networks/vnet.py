"""The V-Net of UA-MT, SASSNet, DTC and DTML, with named heads.

Differences from Milletari et al. (2016): blocks have no residual, and long skips are sums, not concatenations.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from networks.backbone import Backbone
from networks.batch_norm import BatchNorm3d
from networks.convolution import Conv3d
from networks.decoders import upsampling
from networks.heads import DROPOUT, HALVINGS, Stride, strides_of


class Convs(nn.Sequential):
    """`count` times [Conv3d 3x3x3 -> BatchNorm3d -> ReLU]: (N,in,W,H,D) -> (N,out,W,H,D)."""

    def __init__(self, count: int, channels_in: int, channels_out: int):
        layers: list[nn.Module] = []
        for i in range(count):
            layers += [
                Conv3d(channels_in if i == 0 else channels_out, channels_out, 3, padding=1),
                BatchNorm3d(channels_out),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)


class Down(nn.Sequential):
    """Conv3d whose kernel is its stride -> BatchNorm3d -> ReLU: halves the sides and doubles the channels."""

    def __init__(self, channels: int, stride: Stride):
        convolution = Conv3d(channels, 2 * channels, stride, stride=stride)
        super().__init__(convolution, BatchNorm3d(2 * channels), nn.ReLU(inplace=True))


class Up(nn.Sequential):
    """Upsampling -> BatchNorm3d -> ReLU: doubles the sides and halves the channels."""

    def __init__(self, channels: int, up: str, stride: Stride):
        super().__init__(upsampling(up, channels, stride), BatchNorm3d(channels // 2), nn.ReLU(inplace=True))


class VNet(Backbone):
    """Encoder-decoder of five scales; 9,448,849 parameters with 16 filters and one head of one channel."""

    cpu_layout = torch.channels_last_3d
    """Memory layout of the maps on a CPU; convolutions need not reorder them in this one."""

    def __init__(
        self, *, heads: dict[str, int], in_channels: int = 1, filters: int = 16, dropout: float = DROPOUT,
        up: str = "transposed", encoder: bool = True, halvings: Sequence[int] = HALVINGS,
    ):  # fmt: skip
        super().__init__()
        f, strides, self.halvings = filters, strides_of(halvings), tuple(halvings)
        if encoder:
            self.encoder = nn.ModuleList(
                [Convs(1, in_channels, f), Convs(2, 2 * f, 2 * f), Convs(3, 4 * f, 4 * f), Convs(3, 8 * f, 8 * f)]
            )
            self.down = nn.ModuleList([Down(c, s) for c, s in zip((f, 2 * f, 4 * f, 8 * f), strides, strict=True)])
            self.bottom = Convs(3, 16 * f, 16 * f)
        wide = (16 * f, 8 * f, 4 * f, 2 * f)
        self.up = nn.ModuleList([Up(c, up, s) for c, s in zip(wide, reversed(strides), strict=True)])
        self.decoder = nn.ModuleList(
            [Convs(3, 8 * f, 8 * f), Convs(3, 4 * f, 4 * f), Convs(2, 2 * f, 2 * f), Convs(1, f, f)]
        )
        self.add_heads(heads, f, dropout=dropout)

    def encode(self, image: Tensor) -> list[Tensor]:
        if image.device.type == "cpu":
            image = image.to(memory_format=self.cpu_layout)  # all maps keep this layout, unless N = 1
        x, skips = image, []
        for block, down in zip(self.encoder, self.down, strict=True):
            x = self.run(block, x)
            skips.append(x)
            x = self.run(down, x)
        return [*skips, self.run(self.bottom, x)]

    def decode(self, encoded: list[Tensor]) -> list[Tensor]:
        *skips, bottom = encoded
        maps, x = [bottom], self.dropout(bottom)
        for up, block in zip(self.up, self.decoder, strict=True):
            x = self.run(block, self.run(up, x) + skips.pop())
            maps.append(x)
        return maps


def parameter_count(module: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
