"""Sliding-window prediction of a whole scan."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHTINGS = ("uniform", "gaussian")


def window_starts(side: int, patch: int, stride: int) -> list[int]:
    """First voxel of each window along one axis; the last window ends flush with the volume (side >= patch)."""
    if not 0 < stride <= patch:
        raise ValueError(f"a stride must lie between 1 and the patch's side {patch}, not {stride}")
    count = math.ceil((side - patch) / stride) + 1
    return [min(i * stride, side - patch) for i in range(count)]


def padding(shape: Sequence[int], patch_size: Sequence[int]) -> list[tuple[int, int]]:
    """Zeros before and after each axis that make a volume at least as large as the patch, the smaller half first."""
    missing = [max(p - s, 0) for s, p in zip(shape, patch_size, strict=True)]
    return [(m // 2, m - m // 2) for m in missing]


def pad(volume: Tensor, margins: Sequence[tuple[int, int]]) -> Tensor:
    """(..., W,H,D) with zeros added as `padding` says."""
    return F.pad(volume, [m for pair in reversed(margins) for m in pair]) if any(map(any, margins)) else volume


def windows(shape: Sequence[int], patch_size: Sequence[int], stride: Sequence[int]) -> list[tuple[int, int, int]]:
    """Corners (x,y,z) of all windows of a volume, after padding to at least one patch."""
    axes = [window_starts(max(s, p), p, d) for s, p, d in zip(shape, patch_size, stride, strict=True)]
    return list(itertools.product(*axes))  # type: ignore[arg-type]


def gaussian_weights(patch_size: Sequence[int]) -> Tensor:
    """(w,h,d) weights exp(-r^2/2) with a standard deviation of an eighth of each side, at least 1e-3 of the peak."""
    axes = [torch.exp(-0.5 * ((torch.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in patch_size]
    weights = axes[0][:, None, None] * axes[1][None, :, None] * axes[2][None, None, :]
    return weights.clamp(min=1e-3)


@torch.no_grad()
def sliding_window(
    predict: Callable[[Tensor], Tensor],
    image: Tensor,
    patch_size: Sequence[int],
    stride: Sequence[int],
    *,
    batch_size: int = 4,
    weighting: str = "uniform",
) -> Tensor:
    """Mean of the windows' predictions at every voxel.

    Args:
        predict: (N,1,w,h,d) -> (N,C,w,h,d).
        image: (W,H,D), on the device the prediction runs on. A side below the patch's is padded with zeros.
        patch_size, stride: voxels along x, y, z; the papers use 112 112 80 and 18 18 4.
        weighting: 'uniform' as the papers, or 'gaussian', which trusts a window's middle more.

    Returns:
        (C,W,H,D) float32 on the image's device.
    """
    margins = padding(image.shape, patch_size)
    volume = pad(image, margins)
    corners = windows(volume.shape, patch_size, stride)
    weights = gaussian_weights(patch_size) if weighting == "gaussian" else torch.ones(*patch_size)
    weights = weights.to(volume.device)
    total, weight_sum = None, torch.zeros_like(volume, dtype=torch.float32)
    for i in range(0, len(corners), batch_size):
        boxes = [
            tuple(slice(c, c + p) for c, p in zip(corner, patch_size, strict=True))
            for corner in corners[i : i + batch_size]
        ]
        maps = predict(torch.stack([volume[box] for box in boxes])[:, None]).float()
        if total is None:
            total = maps.new_zeros(maps.shape[1], *volume.shape)
        for box, values in zip(boxes, maps, strict=True):
            total[:, *box] += values * weights
            weight_sum[box] += weights
    assert total is not None  # there is at least one window
    inner = [slice(before, side - after) for (before, after), side in zip(margins, volume.shape, strict=True)]
    return (total / weight_sum)[:, *inner]
