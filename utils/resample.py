"""Volumes on another grid: half resolution for machines without a GPU, pooled on the way in and interpolated on the way
out, and zeros around a volume that is smaller than a patch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _pool(volume: Tensor, factor: int) -> Tensor:
    cells = volume.reshape(1, -1, *volume.shape[-3:]).float()
    cell = [min(factor, side) for side in volume.shape[-3:]]  # of a volume thinner than a cell all there is
    pooled = F.avg_pool3d(cells, cell, ceil_mode=True, count_include_pad=False)[0]
    return pooled.reshape(*volume.shape[:-3], *pooled.shape[1:])


def downsample_image(image: Tensor, factor: int) -> Tensor:
    """(...,W,H,D) float -> mean of each factor^3 cell, (...,ceil(W/f), ...); cells at the edge average fewer voxels."""
    return image if factor == 1 else _pool(image, factor)


def downsample_label(label: Tensor, factor: int) -> Tensor:
    """(W,H,D) of 0..C -> uint8. A cell is object if at least half of its voxels are. It gets their most frequent
    class, and of equally frequent ones the first."""
    if factor == 1:
        return label
    small = (_pool(label > 0, factor) >= 0.5).to(torch.uint8)
    classes = int(label.max())
    if classes > 1:
        shares = [_pool(label == c, factor) for c in range(1, classes + 1)]
        small *= 1 + torch.stack(shares).argmax(dim=0).to(torch.uint8)
    return small


def upsample_probability(p: Tensor, factor: int, shape: tuple[int, ...]) -> Tensor:
    """(C,w,h,d) on the coarse grid -> (C,*shape) trilinear, cell centres of both grids in the same place."""
    if factor == 1:
        return p
    size = [factor * s for s in p.shape[1:]]
    full = F.interpolate(p[None], size=size, mode="trilinear", align_corners=False)[0]
    return full[:, : shape[0], : shape[1], : shape[2]]


def padding(shape: Sequence[int], patch_size: Sequence[int]) -> list[tuple[int, int]]:
    """Zeros before and after each axis that make a volume at least as large as the patch, the smaller half first."""
    missing = [max(p - s, 0) for s, p in zip(shape, patch_size, strict=True)]
    return [(m // 2, m - m // 2) for m in missing]


def pad(volume: Tensor, margins: Sequence[tuple[int, int]]) -> Tensor:
    """(..., W,H,D) with zeros added as `padding` says."""
    return F.pad(volume, [m for pair in reversed(margins) for m in pair]) if any(map(any, margins)) else volume
