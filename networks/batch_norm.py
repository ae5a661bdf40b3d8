"""Batch norm that is exact in channels_last_3d, the memory layout in which convolutions on a CPU are fastest."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import UserError

CHUNK = 1024
"""Voxels that are summed in float32 before the sums are added in float64."""


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
        y = torch.empty_like(x)
        voxels, d = rows(x), rows(y)
        mean = chunked_mean(voxels)
        torch.sub(voxels, mean, out=d)
        var = chunked_mean(d, d)
        invstd = (var + eps).rsqrt()
        torch.addcmul(bias, d, weight * invstd, out=d)
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, invstd = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        g, d = rows(grad.contiguous(memory_format=torch.channels_last_3d)), rows(grad_x)
        torch.sub(rows(x), mean, out=d)
        grad_bias, grad_weight = chunked_mean(g), chunked_mean(g, d) * invstd
        scale = weight * invstd
        torch.addcmul(-scale * grad_bias, d, -scale * invstd * grad_weight, out=d)
        d.addcmul_(g, scale)
        return grad_x, grad_weight * len(d), grad_bias * len(d), None


def rows(x: Tensor) -> Tensor:
    """A map (N,C,W,H,D) in channels_last_3d -> a view (N*W*H*D, C)."""
    return x.permute(0, 2, 3, 4, 1).view(-1, x.shape[1])


def chunked_mean(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Mean over the rows of a (M,C), or of a times b; sums are float32 within a chunk of rows, float64 over chunks."""
    M, C = a.shape
    if b is not None and C <= 16:  # a matrix product needs no memory for a * b
        sums = [(u.mT @ v).diagonal(dim1=1, dim2=2) for u, v in zip(chunks(a), chunks(b), strict=True)]
    else:
        sums = [u.sum(dim=1) for u in chunks(a if b is None else a * b)]
    return (torch.cat(sums).sum(dim=0, dtype=torch.float64) / M).to(a.dtype)


def chunks(x: Tensor) -> tuple[Tensor, Tensor]:
    """(M,C) -> the complete chunks (n,CHUNK,C) and the remaining rows (1,m,C)."""
    whole = len(x) - len(x) % CHUNK
    return x[:whole].view(-1, CHUNK, x.shape[1]), x[None, whole:]
