"""The convolution of the backbones."""

import torch
from torch import Tensor, nn


class Conv3d(nn.Conv3d):
    """nn.Conv3d; with bfloat16 on a CPU it computes in float32 where a side of the map is smaller than the kernel.

    This works around a bug of oneDNN 3.12 (torch 2.13) on such small maps. Parts of the gradients of weight and bias
    are uninitialised memory for kernel 3 with a first side of 2, kernel 5 with sides up to 4, and kernel 7 with sides
    up to 6. The output itself is uninitialised for one channel and a first side of 1. Some shapes write out of bounds.
    CPUs with and without AVX512-BF16 are affected, in both layouts; float32 is correct.
    """

    def forward(self, x: Tensor) -> Tensor:
        bfloat16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        if not bfloat16 or all(side >= kernel for side, kernel in zip(x.shape[2:], self.kernel_size, strict=True)):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).bfloat16()
