"""The convolutions of the backbones, which on a CPU have a faster gradient than torch's."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Conv3d(nn.Conv3d):
    """nn.Conv3d, which on a CPU brings its input to channels-last order: the gradient is up to four times as fast.

    With bfloat16 on a CPU it computes in float32 what bfloat16 makes slower or wrong. The gradient of a depthwise
    convolution is five times as slow. A map with a side smaller than the kernel meets a bug of oneDNN 3.12 (torch
    2.13). Parts of the gradients of weight and bias are then uninitialised memory for kernel 3 with a first side of 2,
    kernel 5 with sides up to 4, and kernel 7 with sides up to 6. The output itself is uninitialised for one channel and
    a first side of 1. Some shapes write out of bounds. CPUs with and without AVX512-BF16 are affected, in both layouts.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last_3d)
        bfloat16 = in_bfloat16()
        small = any(side < kernel for side, kernel in zip(x.shape[2:], self.kernel_size, strict=True))
        if not bfloat16 or not (small or self.groups > 1):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).bfloat16()


class ConvTranspose3d(nn.ConvTranspose3d):
    """nn.ConvTranspose3d whose kernel is its stride: (N,C,W,H,D) -> (N,O,sW,tH,uD). Its gradient on a CPU is faster.

    Each voxel of the input then has voxels of the output of its own, so that the gradients are matrix products. In
    float32 that of the weights is also nearer to float64.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: tuple[int, int, int], *, bias: bool = True):
        super().__init__(channels_in, channels_out, stride, stride=stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if x.device.type != "cpu":
            return super().forward(x)
        weight, bias = self.weight, self.bias
        if in_bfloat16():
            x, weight, bias = x.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16()
        return _Transposed.apply(x, weight, bias)


class _Transposed(torch.autograd.Function):
    """x (N,C,W,H,D), weight (C,O,s,t,u), bias (O) or None, all of one dtype -> (N,O,sW,tH,uD)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv_transpose3d(x, weight, bias, stride=weight.shape[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        (N, C, W, H, D), (out, s, t, u) = x.shape, weight.shape[1:]
        # a row for each voxel of x, with the s*t*u voxels of the output that it makes
        g = grad.permute(0, 2, 3, 4, 1).reshape(N, W, s, H, t, D, u, out)
        g = g.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, s * t * u * out)
        rows, matrix = x.permute(0, 2, 3, 4, 1).reshape(-1, C), weight.permute(0, 2, 3, 4, 1).reshape(C, -1)
        grad_x = (g @ matrix.mT).view(N, W, H, D, C).permute(0, 4, 1, 2, 3)
        grad_weight = (rows.mT @ g).view(C, s, t, u, out).permute(0, 4, 1, 2, 3)
        return grad_x, grad_weight, g.view(-1, out).sum(dim=0) if ctx.needs_input_grad[2] else None


def in_bfloat16() -> bool:
    """Whether autocast computes convolutions on a CPU in bfloat16."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
