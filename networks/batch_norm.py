"""Batch norm that is exact in channels_last_3d, the memory layout in which convolutions on a CPU are fastest."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import UserError

CHUNK = 1024
"""Voxels that are summed in float32 before the sums are added in float64."""
BLOCK = 2**20
"""Numbers of a map on which all operations of a pass are done before those of the next block."""
ROW = 256
"""Numbers in a row of a block, unless a voxel has more."""


class BatchNorm3d(nn.BatchNorm3d):
    """nn.BatchNorm3d that in training on a CPU is as exact in the layout channels_last_3d as for contiguous maps.

    In this layout torch 2.13 adds up all voxels one after the other. With 4 x 112x112x80 voxels the mean loses half of
    its digits, and M_d multiplies the error by k = 1500. Maps are (N,C,W,H,D).

    Raises:
        UserError: in training for a single voxel, which has no variance.
    """

    counts: ClassVar[bool] = True
    """Whether training updates the running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        last = x.is_contiguous(memory_format=torch.channels_last_3d)
        ours = self.training and last and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
        count = x.numel() // x.shape[1]
        if self.training and count < 2:
            raise UserError("batch norm needs more than one voxel, and one crop has one in the deepest map. Raise "
                            "--patch-size or --batch-size. With --batch-norm separate there must be two labeled crops "
                            "(see --labeled-batch) and two unlabeled ones.")  # fmt: skip
        if not ours:
            return super().forward(x) if self.counts or not self.training else self._uncounted(x)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        y, mean, var = _Normalise.apply(x, self.weight, self.bias, self.eps)
        if self.counts:
            self.num_batches_tracked.add_(1)
            # By .data, as torch's own batch norm does not note the change either: a pass in another layout may have
            # saved both for its gradient, which makes no use of them.
            self.running_mean.data.lerp_(mean, self.momentum)
            self.running_var.data.lerp_(var * (count / (count - 1)), self.momentum)
        return y

    def _uncounted(self, x: Tensor) -> Tensor:
        """torch's batch norm with copies of the running statistics, which thus stay unchanged."""
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        copies = self.running_mean.clone(), self.running_var.clone()
        return F.batch_norm(x, *copies, self.weight, self.bias, training=True, momentum=self.momentum, eps=self.eps)


class _Normalise(torch.autograd.Function):
    """x, weight, bias, eps -> y, and the mean and variance of each channel, both without gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        y, xs = torch.empty_like(x), blocks(x)
        mean = channel_mean(xs, x)
        var = channel_mean((d.mul_(d) for d in centred(xs, mean)), x)
        invstd = (var + eps).rsqrt()
        shift, scale = (side_by_side(v, xs) for v in (bias, weight * invstd))
        for d in centred(xs, mean, out=blocks(y)):
            torch.addcmul(shift, d, scale, out=d)
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, invstd = ctx.saved_tensors
        grad_x, xs, gs = torch.empty_like(x), blocks(x), blocks(grad.contiguous(memory_format=torch.channels_last_3d))
        grad_bias = channel_mean(gs, x)
        grad_weight = channel_mean((d.mul_(g) for d, g in zip(centred(xs, mean), gs, strict=True)), x) * invstd
        scale = weight * invstd
        a, b, c = (side_by_side(v, xs) for v in (-scale * grad_bias, -scale * invstd * grad_weight, scale))
        for d, g in zip(centred(xs, mean, out=blocks(grad_x)), gs, strict=True):
            torch.addcmul(a, d, b, out=d).addcmul_(g, c)
        count = x.numel() // x.shape[1]
        return grad_x, grad_weight * count, grad_bias * count, None


def blocks(x: Tensor) -> tuple[Tensor, ...]:
    """A map (N,C,W,H,D) in channels_last_3d -> views (n,r*C) of its voxels, in order, r of them in a row.

    A block stays in the cache from one operation to the next. Operations with a value for each channel are slow on rows
    of a few numbers.
    """
    C, count = x.shape[1], x.numel() // x.shape[1]
    together = math.gcd(count, CHUNK, max(ROW // C, 1))
    voxels = max(BLOCK // (CHUNK * C), 1) * CHUNK
    return x.permute(0, 2, 3, 4, 1).view(-1, together * C).split(voxels // together)


def side_by_side(v: Tensor, xs: Sequence[Tensor]) -> Tensor:
    """A value for each channel (C) -> (r*C), as a row of the blocks has them."""
    return v.repeat(xs[0].shape[1] // len(v))


def centred(xs: Sequence[Tensor], mean: Tensor, out: Sequence[Tensor] = ()) -> Iterator[Tensor]:
    """The blocks less the mean of each channel, in those of `out`, or one after the other in the same memory."""
    mean = side_by_side(mean, xs)
    for x, d in zip(xs, out or repeat(torch.empty_like(xs[0])), strict=False):
        yield torch.sub(x, mean, out=d[: len(x)])


def channel_mean(parts: Iterable[Tensor], x: Tensor) -> Tensor:
    """The mean (C) over a map of the shape of x, of which the parts are the blocks.

    Sums are float32 within a chunk of voxels, float64 over chunks.
    """
    C, sums = x.shape[1], []
    for part in parts:
        voxels = part.view(-1, C)
        whole = len(voxels) - len(voxels) % CHUNK
        if whole:
            sums.append(voxels[:whole].view(-1, CHUNK, C).sum(dim=1))
        if whole < len(voxels):
            sums.append(voxels[None, whole:].sum(dim=1))
    return (torch.cat(sums).sum(dim=0, dtype=torch.float64) * C / x.numel()).to(x.dtype)
