"""The convolution of the backbones."""

import torch
from torch import Tensor, nn


class Conv3d(nn.Conv3d):
    """nn.Conv3d, which in bfloat16 on a CPU computes in float32 where a side of the map is below the kernel's.

    Such maps are tiny, and oneDNN (3.12, of torch 2.13) does not compute them: for a kernel 3 and a first side of 2,
    for 5 and sides up to 4, for 7 and sides up to 6, parts of the gradients of weight and bias are what the memory
    held before, a map of one channel and a first side of 1 comes out so itself, and some shapes write where they must
    not. CPUs with and without AVX512-BF16 have it, in both layouts; float32 is right.
    """

    def forward(self, x: Tensor) -> Tensor:
        bfloat16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        if not bfloat16 or all(side >= kernel for side, kernel in zip(x.shape[2:], self.kernel_size, strict=True)):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).bfloat16()
