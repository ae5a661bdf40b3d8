"""3D UX-Net: Lee et al., 3D UX-Net: A Large Kernel Volumetric ConvNet, ICLR 2023, as DK-UXNet uses it.

A ConvNeXt encoder with depthwise 7x7x7 kernels, and a decoder of residual 3x3x3 blocks with concatenated skips.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.backbone import Backbone
from networks.convolution import Conv3d
from networks.decoders import upsampling
from networks.heads import DROPOUT, HALVINGS, Stride, strides_of

LAYER_SCALE = 1e-6  # initial gamma of a UX block, which starts close to the identity
EXPANSION = 4


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of every voxel of (N,C,W,H,D)."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Depthwise(Conv3d):
    """A depthwise convolution with an odd kernel; the size stays the same."""

    def __init__(self, channels: int, kernel: int, *, bias: bool = True):
        super().__init__(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.device.type != "cpu":
            return super()._conv_forward(input, weight, bias)
        return _DepthwiseOnCPU.apply(input, weight, bias)


class _DepthwiseOnCPU(torch.autograd.Function):
    """x (N,C,W,H,D), weight (C,1,k,k,k), bias (C,) or None -> the convolution, with zeros around x.

    Its gradient to x is a depthwise convolution as well, with the mirrored kernel. Computed as one it takes a fifth to
    a twentieth of the time that torch 2.13 takes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv3d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        to_x, *others = ctx.needs_input_grad
        grad = grad.contiguous(memory_format=torch.channels_last_3d)
        padding, channels = weight.shape[-1] // 2, len(weight)
        grad_x = F.conv3d(grad, weight.flip(2, 3, 4), padding=padding, groups=channels) if to_x else None
        _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, x, weight, [channels], [1] * 3, [padding] * 3, [1] * 3, False, [0] * 3, channels, [False, *others]
        )
        return grad_x, grad_weight, grad_bias


class InstanceNorm(nn.Module):
    """InstanceNorm without parameters or running statistics; a map of one voxel becomes 0."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.instance_norm(x) if x[0, 0].numel() > 1 else x - x.mean(dim=(2, 3, 4), keepdim=True)
        # The next convolution on a CPU needs this order: a copy there would be kept next to y for the backward pass.
        return y.contiguous(memory_format=torch.channels_last_3d) if y.device.type == "cpu" else y


class UXBlock(nn.Module):
    """x + gamma f(x): f is a depthwise 7x7x7 convolution, channel norm, and 1 -> 4 -> 1 channels with GELU between.

    As in the released code the two 1x1x1 convolutions are depthwise too: only the norm mixes channels.
    """

    def __init__(self, channels: int):
        super().__init__()
        wide = EXPANSION * channels
        self.depthwise = Depthwise(channels, 7)
        self.norm = ChannelNorm(channels)
        self.expand = Conv3d(channels, wide, 1, groups=channels)
        self.shrink = Conv3d(wide, channels, 1, groups=channels)
        self.gamma = nn.Parameter(torch.full((channels,), LAYER_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma.view(-1, 1, 1, 1) * self.shrink(F.gelu(self.expand(self.norm(self.depthwise(x)))))


class Residual(nn.Module):
    """Two 3x3x3 convolutions with instance norm, and a shortcut (a 1x1x1 convolution if the channels change)."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.block = nn.Sequential(
            Conv3d(channels_in, channels_out, 3, padding=1, bias=False),
            InstanceNorm(),
            nn.LeakyReLU(0.01, inplace=True),
            Conv3d(channels_out, channels_out, 3, padding=1, bias=False),
            InstanceNorm(),
        )
        self.shortcut: nn.Module = nn.Identity()
        if channels_in != channels_out:
            self.shortcut = nn.Sequential(Conv3d(channels_in, channels_out, 1, bias=False), InstanceNorm())

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.block(x) + self.shortcut(x), 0.01)


class UpResidual(nn.Module):
    """Doubles the sides, halves the channels, and concatenates the skip of the same shape before a residual block."""

    def __init__(self, channels: int, up: str, stride: Stride):
        super().__init__()
        self.up = upsampling(up, channels, stride, bias=False)
        self.block = Residual(channels, channels // 2)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.block(torch.cat([self.up(x), skip], dim=1))


class UXNet(Backbone):
    """Encoder-decoder of five scales.

    53,005,922 parameters with 48 filters and one head of two channels, 52,881,408 of them in `features`. The forward
    pass of a crop of 112x112x80 voxels takes 1,309 GFLOP. The published network has 48 filters and no dropout.
    """

    def __init__(
        self, *, heads: dict[str, int], in_channels: int = 1, filters: int = 48, dropout: float = DROPOUT,
        up: str = "transposed", encoder: bool = True, halvings: Sequence[int] = HALVINGS,
    ):  # fmt: skip
        super().__init__()
        f, strides, self.halvings = filters, strides_of(halvings), tuple(halvings)
        if encoder:
            self.stem = nn.Sequential(Conv3d(in_channels, f, 7, stride=strides[0], padding=3), ChannelNorm(f))
            self.down = nn.ModuleList(
                nn.Sequential(ChannelNorm(c), Conv3d(c, 2 * c, s, stride=s))
                for c, s in zip((f, 2 * f, 4 * f), strides[1:], strict=True)
            )
            self.stages = nn.ModuleList([nn.Sequential(UXBlock(c), UXBlock(c)) for c in (f, 2 * f, 4 * f, 8 * f)])
            self.norms = nn.ModuleList([ChannelNorm(c) for c in (f, 2 * f, 4 * f, 8 * f)])
            self.skips = nn.ModuleList(
                [Residual(in_channels, f), Residual(f, 2 * f), Residual(2 * f, 4 * f), Residual(4 * f, 8 * f)]
            )
            self.bottom = Residual(8 * f, 16 * f)
        wide = (16 * f, 8 * f, 4 * f, 2 * f)
        self.up = nn.ModuleList([UpResidual(c, up, s) for c, s in zip(wide, reversed(strides), strict=True)])
        self.last = Residual(f, f) if heads else nn.Identity()
        self.add_heads(heads, f, dropout=dropout)

    def encode(self, image: Tensor) -> list[Tensor]:
        x, maps = self.run(self.stem, image), [image]
        for i, (stage, norm) in enumerate(zip(self.stages, self.norms, strict=True)):
            x = self.run(stage, x if i == 0 else self.down[i - 1](x))
            maps.append(norm(x))
        skips = [self.run(block, x) for block, x in zip(self.skips, maps[:-1], strict=True)]
        return [*skips, self.run(self.bottom, maps[-1])]

    def decode(self, encoded: list[Tensor]) -> list[Tensor]:
        *skips, bottom = encoded
        features, x = [bottom], self.dropout(bottom)
        for up in self.up:
            x = self.run(up, x, skips.pop())
            features.append(x)
        return features

    def outputs(self, x: Tensor) -> list[Tensor]:
        return super().outputs(self.last(x))
