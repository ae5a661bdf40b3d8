"""The convolution of the backbones."""

import torch
from torch import Tensor, nn


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
        bfloat16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        small = any(side < kernel for side, kernel in zip(x.shape[2:], self.kernel_size, strict=True))
        if not bfloat16 or not (small or self.groups > 1):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).bfloat16()
