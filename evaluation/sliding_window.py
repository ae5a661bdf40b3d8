"""Sliding-window prediction of a whole scan."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from utils.channels import with_channels
from utils.errors import UserError
from utils.options import option
from utils.resample import downsample_image, pad, padding, upsample_probability
from utils.text import xyz_text

STRIDE = (18, 18, 4)  # stride of the papers, on the full grid
WEIGHTINGS = ("uniform", "gaussian")
MIRRORED: list[tuple[int, tuple[int, ...]]] = [(0, ()), (0, (2,)), (0, (3,)), (0, (2, 3))]
FLIPS = {1: MIRRORED[:1], 4: MIRRORED, 8: MIRRORED + [(1, axes) for _, axes in MIRRORED]}
"""Number of transformations -> quarter turns from x to y, then axes of (N,K,W,H,D) to flip."""


def flips_option() -> Any:
    """The --flips flag: the number of flips and turns for `mean_of_flips`."""
    return option(1, "test-time augmentation: average over 4 flips, or over 8 flips and 90-degree rotations, in the "
                  "x-y plane; 1: none", group="window", choices=list(FLIPS))  # fmt: skip


def unlearned_flips(flips: int, trained: Mapping[str, Any]) -> str:
    """A warning if `mean_of_flips` shows a network what its training, by its options, did not; '' if not. Early options
    state no `augment` but d4.
    """
    augment, axes = trained.get("augment", "d4"), trained.get("flip_axes", ["x", "y", "z"])
    learned = {"d4": 8, "mirror": 1, "flip": 4 if {"x", "y"} <= {*axes} else 1, "none": 1}[augment]
    if flips <= learned:
        return ""
    what = "turns without a flip" if augment == "mirror" else "quarter turns" if learned == 4 else "flips along x and y"
    how = f"--augment {augment}" + (f" --flip-axes {' '.join(axes)}" if augment == "flip" else "")
    return (
        f"--flips {flips} averages over {what}, which the network was not trained on ({how}). Leave it out, "
        "above all if classes differ by their side."
    )


def mean_of_flips(predict: Callable[[Tensor], Tensor], patches: Tensor, flips: int) -> Tensor:
    """Test-time augmentation: the mean of the predictions over flips and turns, each transformed back.

    Args:
        predict: (N,K,w,h,d) -> (N,C,w,h,d).
        flips: a key of FLIPS; 1 is the plain prediction.

    Returns:
        (N,C,w,h,d).
    """
    if flips == 1:
        return predict(patches)
    predictions = []
    for turns, axes in FLIPS[flips]:
        turned = patches.rot90(turns, (2, 3)).flip(axes)
        predictions.append(predict(turned).float().flip(axes).rot90(-turns, (2, 3)))
    return torch.stack(predictions).mean(0)


def three_voxels(help: str) -> Any:
    """A flag for three numbers of voxels along x, y, z; default None, whose meaning `help` states."""
    return option(None, help, group="window", type=int, nargs=3, minimum=1)


def window_starts(side: int, patch: int, stride: int) -> list[int]:
    """First voxel of each window along one axis; the last window ends at the end of the volume (side >= patch).

    Raises:
        ValueError: for a stride outside of 1..patch.
    """
    if not 0 < stride <= patch:
        raise ValueError(f"a stride must lie between 1 and the patch's side {patch}, not {stride}")
    count = math.ceil((side - patch) / stride) + 1
    return [min(i * stride, side - patch) for i in range(count)]


def windows(shape: Sequence[int], patch_size: Sequence[int], stride: Sequence[int]) -> list[tuple[int, int, int]]:
    """First voxels (x,y,z) of all windows of a volume, after padding to at least one patch."""
    axes = [window_starts(max(s, p), p, d) for s, p, d in zip(shape, patch_size, stride, strict=True)]
    return list(itertools.product(*axes))  # type: ignore[arg-type]


def refuse_window(
    patch_size: Sequence[int], stride: Sequence[int], multiples: Sequence[int], flips: int = 1
) -> None:  # fmt: skip
    """Checks patch size, stride and flips.

    Raises:
        UserError: for sides that are not multiples of `multiples`, or a stride that skips voxels, or for turns
            in x-y after which the sides are not such multiples.
    """
    if any(side % multiple or side <= 0 for side, multiple in zip(patch_size, multiples, strict=True)):
        raise UserError(f"--patch-size {tuple(patch_size)} must be multiples of {xyz_text(multiples)}.")
    turned = FLIPS[flips][-1][0] % 2
    if turned and (patch_size[0] % multiples[1] or patch_size[1] % multiples[0]):
        raise UserError(
            f"--flips {flips} turns windows of {tuple(patch_size)}, whose sides must then be multiples of "
            f"{multiples[1]} {multiples[0]} along x and y. Give --flips 4."
        )
    if not all(0 < step <= side for step, side in zip(stride, patch_size, strict=True)):
        raise UserError(
            f"--stride {tuple(stride)} must lie between 1 and the patch size {tuple(patch_size)}, or voxels are "
            "skipped."
        )


def gaussian_weights(patch_size: Sequence[int]) -> Tensor:
    """Weights (w,h,d): a Gaussian with a standard deviation of 1/8 of each side, at least 1e-3 of its maximum."""
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
    """Mean of the predictions of all windows at every voxel.

    Args:
        predict: (N,K,w,h,d) -> (N,C,w,h,d).
        image: (W,H,D) or (K,W,H,D), on the device of the prediction. Sides shorter than the patch are padded with
            zeros.
        patch_size, stride: voxels along x, y, z; the papers use 112 112 80 and 18 18 4.
        batch_size: windows per call of `predict`.
        weighting: 'uniform' as in the papers, or 'gaussian' with larger weights in the middle of a window.

    Returns:
        (C,W,H,D) float32 on the CPU: of a large scan with several classes a GPU may have no room for it.

    Raises:
        FloatingPointError: for predictions that are not finite, which would be background. The message continues a
            sentence that begins with the scan.
    """
    slabs = sliding_slabs(predict, image, patch_size, stride, batch_size=batch_size, weighting=weighting)
    whole = None
    for start, slab in slabs:
        if whole is None:
            whole = torch.empty(len(slab), *image.shape[-3:])
        whole[:, start : start + slab.shape[1]] = slab
    assert whole is not None  # there is at least one window
    if not math.isfinite(whole.sum(dtype=torch.float64)):
        raise FloatingPointError(
            "gets probabilities that are not a number or infinite. Leave out --precision fp16, which ends at 65504, if "
            "it is given. Else the weights or the intensities are damaged"
        )
    return whole


def sliding_slabs(
    predict: Callable[[Tensor], Tensor],
    image: Tensor,
    patch_size: Sequence[int],
    stride: Sequence[int],
    *,
    batch_size: int = 4,
    weighting: str = "uniform",
) -> Iterator[tuple[int, Tensor]]:
    """`sliding_window` in slabs along x, each yielded as soon as it is complete; keeps one patch along x in memory.

    Yields:
        The first x of the slab, and (C,w,H,D) float32 on the image's device.
    """
    margins = padding(image.shape[-3:], patch_size)
    volume = with_channels(pad(image, margins))
    sides = volume.shape[1:]
    corners = windows(sides, patch_size, stride)
    weights = gaussian_weights(patch_size) if weighting == "gaussian" else torch.ones(*patch_size)
    weights = weights.to(volume.device)
    inner = [slice(before, side - after) for (before, after), side in zip(margins, sides, strict=True)]
    width = patch_size[0]
    begin = 0  # x of the first voxel of the two sums, which are as wide as a window
    total, weight_sum = None, volume.new_zeros((width, *sides[1:]), dtype=torch.float32)
    for i in range(0, len(corners), batch_size):
        boxes = [
            tuple(slice(c, c + p) for c, p in zip(corner, patch_size, strict=True))
            for corner in corners[i : i + batch_size]
        ]
        with torch.no_grad():
            maps = predict(torch.stack([volume[(..., *box)] for box in boxes])).float()
        if total is None:
            total = maps.new_zeros(maps.shape[1], *weight_sum.shape)
        for (x, *yz), values in zip(boxes, maps, strict=True):
            done = x.start - begin
            if done:  # windows are sorted by x
                yield begin, (total[:, :done] / weight_sum[:done])[:, :, *inner[1:]]
                total, weight_sum = _shifted(total, done, 1), _shifted(weight_sum, done, 0)
                begin = x.start
            total[:, :, *yz] += values * weights
            weight_sum[:, *yz] += weights
    assert total is not None  # there is at least one window
    left = slice(inner[0].start, inner[0].stop - begin)
    yield begin, (total / weight_sum)[:, left, *inner[1:]]


def _shifted(total: Tensor, by: int, axis: int) -> Tensor:
    """Shifts values towards 0 by `by` along an axis and fills with zeros; the shape stays the same."""
    kept = total.narrow(axis, by, total.shape[axis] - by)
    return torch.cat([kept, torch.zeros_like(total.narrow(axis, 0, by))], axis)


def usual_stride(patch_size: Sequence[int], downsample: int) -> list[int]:
    """The papers' stride divided by `downsample`, at most the size of the window."""
    return [min(max(step // downsample, 1), side) for step, side in zip(STRIDE, patch_size, strict=True)]


def half_a_patch(patch_size: Sequence[int]) -> list[int]:
    """The stride with which each voxel away from the edge is seen by eight windows."""
    return [math.ceil(side / 2) for side in patch_size]


def predict_scan(
    method: Any, image: Tensor, outputs: tuple[str, ...], *, downsample: int, flips: int = 1, **window: Any
) -> Tensor:
    """Foreground probabilities of a scan on its own grid.

    Args:
        method: a method in evaluation mode, on the device of the image.
        image: (W,H,D) or (K,W,H,D), normalised.
        downsample: pooling factor before the prediction.
        window: further arguments of `sliding_window`.

    Returns:
        (len(outputs)*C,W,H,D) in [0,1], on the CPU.

    Raises:
        FloatingPointError: as `sliding_window`.
    """

    def predict(patches: Tensor) -> Tensor:
        return mean_of_flips(lambda turned: method.predict(turned, outputs), patches, flips)

    p = sliding_window(predict, downsample_image(image, downsample), **window)
    return upsample_probability(p, downsample, tuple(image.shape[-3:]))
