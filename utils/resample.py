"""Half resolution for machines without a GPU: pooled on the way in, interpolated on the way out."""

import torch
import torch.nn.functional as F
from torch import Tensor


def _pool(volume: Tensor, factor: int) -> Tensor:
    cells = volume[None, None].float()
    return F.avg_pool3d(cells, factor, ceil_mode=True, count_include_pad=False)[0, 0]


def downsample_image(image: Tensor, factor: int) -> Tensor:
    """(W,H,D) float -> mean of each factor^3 cell, (ceil(W/f), ...); cells cut by the edge average what they hold."""
    return image if factor == 1 else _pool(image, factor)


def downsample_label(label: Tensor, factor: int) -> Tensor:
    """(W,H,D) of 0..C -> uint8: object where half of a cell is, a tie counting as object, of its most frequent class,
    of equal ones the first."""
    if factor == 1:
        return label
    found = (_pool(label > 0, factor) >= 0.5).to(torch.uint8)
    classes = int(label.max())
    if classes > 1:
        shares = [_pool(label == c, factor) for c in range(1, classes + 1)]
        found *= 1 + torch.stack(shares).argmax(dim=0).to(torch.uint8)
    return found


def upsample_probability(p: Tensor, factor: int, shape: tuple[int, ...]) -> Tensor:
    """(C,w,h,d) on the coarse grid -> (C,*shape) trilinear, cell centres of both grids in the same place."""
    if factor == 1:
        return p
    size = [factor * s for s in p.shape[1:]]
    full = F.interpolate(p[None], size=size, mode="trilinear", align_corners=False)[0]
    return full[:, : shape[0], : shape[1], : shape[2]]
