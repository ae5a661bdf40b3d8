"""The sliding window: counts, identity and plus-one predictors, weighting, half resolution."""

import math

import pytest
import torch

from evaluation.sliding_window import gaussian_weights, sliding_slabs, sliding_window, window_starts, windows
from utils.resample import downsample_image, downsample_label, padding, upsample_probability

PATCH, STRIDE = (112, 112, 80), (18, 18, 4)
# Test cases of LA have these sizes; 1128 windows in all.


def test_starts_by_hand_and_the_last_window_is_flush():
    assert window_starts(20, 8, 5) == [0, 5, 10, 12]
    assert window_starts(18, 8, 5) == [0, 5, 10]
    assert window_starts(8, 8, 5) == [0]
    assert window_starts(9, 8, 5) == [0, 1]


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_a_stride_that_skips_voxels_is_refused(stride):
    with pytest.raises(ValueError, match="stride"):
        window_starts(20, 8, stride)


@pytest.mark.parametrize("shape", [(20, 17, 9), (8, 8, 8), (5, 30, 3), (9, 8, 16)])
@pytest.mark.parametrize(
    ("stride", "weighting"), [((8, 8, 8), "uniform"), ((3, 5, 2), "gaussian"), ((1, 4, 7), "gaussian")]
)
def test_a_predictor_that_adds_one_gives_the_volume_plus_one(shape, stride, weighting):
    volume = torch.randn(*shape)
    out = sliding_window(
        lambda x: torch.cat([x + 1, -x], 1), volume, (8, 8, 8), stride, batch_size=3, weighting=weighting
    )
    assert out.shape == (2, *shape)
    assert torch.allclose(out[0], volume + 1, atol=1e-5) and torch.allclose(out[1], -volume, atol=1e-5)


def windows_by_hand(predict, volume, patch, stride, batch_size, weights):
    """Two sums as large as the volume, and every window added to them: no slabs."""
    total, weight_sum = torch.zeros(2, *volume.shape), torch.zeros(volume.shape)
    corners = windows(volume.shape, patch, stride)
    for i in range(0, len(corners), batch_size):
        boxes = [
            tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True)) for corner in corners[i : i + batch_size]
        ]
        for box, p in zip(boxes, predict(torch.stack([volume[box] for box in boxes])[:, None]), strict=True):
            total[:, *box] += p * weights
            weight_sum[box] += weights
    return total / weight_sum


@pytest.mark.parametrize(("weighting", "batch_size"), [("uniform", 50), ("gaussian", 3)])
@pytest.mark.parametrize(
    ("shape", "stride"), [((20, 17, 12), (3, 5, 2)), ((33, 8, 9), (8, 8, 8)), ((8, 30, 9), (4, 4, 4))]
)
@torch.no_grad()
def test_slabs_are_bit_for_bit_the_whole_and_come_as_soon_as_they_are_done(shape, stride, batch_size, weighting):
    volume, network, patch = torch.randn(*shape), torch.nn.Conv3d(1, 2, 3, padding=1), (8, 8, 8)
    weights = gaussian_weights(patch) if weighting == "gaussian" else torch.ones(*patch)
    args = {"batch_size": batch_size, "weighting": weighting}
    expected = windows_by_hand(network, volume, patch, stride, batch_size, weights)
    slabs = list(sliding_slabs(network, volume, patch, stride, **args))
    assert torch.equal(torch.cat([slab for _, slab in slabs], 1), expected)
    assert torch.equal(sliding_window(network, volume, patch, stride, **args), expected)
    starts = window_starts(shape[0], patch[0], stride[0])
    assert [start for start, _ in slabs] == starts and all(slab.shape[1] <= patch[0] for _, slab in slabs)


def test_a_volume_smaller_than_the_patch_is_one_slab_without_its_padding():
    volume = torch.randn(5, 30, 3)
    slabs = list(sliding_slabs(lambda x: x + 1, volume, (8, 8, 8), (4, 4, 4)))
    assert [start for start, _ in slabs] == [0] and torch.allclose(slabs[0][1][0], volume + 1, atol=1e-5)


class OnGPU(torch.Tensor):
    """Stands for a tensor on a GPU."""


def test_the_probabilities_of_a_whole_scan_are_not_on_the_gpu():
    seen, volume = [], torch.randn(20, 9, 8).as_subclass(OnGPU)
    out = sliding_window(lambda x: seen.append(type(x)) or x, volume, (8, 8, 8), (4, 4, 4))
    assert {*seen} == {OnGPU} and type(out) is torch.Tensor
    assert torch.allclose(out[0], volume.as_subclass(torch.Tensor), atol=1e-5)


def test_padding_is_zero_and_its_smaller_half_comes_first():
    assert padding((5, 8, 9), (8, 8, 8)) == [(1, 2), (0, 0), (0, 0)]
    seen = []
    sliding_window(lambda x: seen.append(x) or x, torch.ones(5, 8, 8), (8, 8, 8), (8, 8, 8))
    assert seen[0][0, 0, :, 0, 0].tolist() == [0, 1, 1, 1, 1, 1, 0, 0]


def test_gaussian_weights_are_symmetric_and_highest_in_the_middle():
    weights = gaussian_weights((8, 6, 4))
    assert torch.allclose(weights, weights.flip(0, 1, 2))
    assert weights.max() == weights[3, 2, 1] and weights.min() >= 1e-3
    r2 = (0.5**2 - 2.5**2) / 1**2  # an SD of 8/8 voxels along x: 2.5 and 0.5 voxels from the middle
    assert weights[1, 2, 1] / weights[3, 2, 1] == pytest.approx(math.exp(r2 / 2))
    assert gaussian_weights((8, 8, 8))[0, 0, 0] == pytest.approx(1e-3)


def test_half_resolution_pools_cells_and_averages_what_an_edge_cell_holds():
    image = torch.arange(3 * 2 * 2.0).view(3, 2, 2)
    half = downsample_image(image, 2)
    assert half.flatten().tolist() == [image[:2].mean().item(), image[2:].mean().item()]
    thin = torch.arange(4 * 2 * 1.0).view(4, 2, 1)  # thinner than a cell
    assert downsample_image(thin, 2).flatten().tolist() == [thin[:2].mean().item(), thin[2:].mean().item()]
    assert upsample_probability(downsample_image(thin, 4)[None], 4, (4, 2, 1))[0].tolist() == [[[3.5]] * 2] * 4
    label = torch.zeros(4, 2, 2, dtype=torch.uint8)
    label[0], label[2, 0, 0] = 1, 1
    assert downsample_label(label, 2).flatten().tolist() == [1, 0]  # 4 of 8 is a tie and counts, 1 of 8 does not
    assert downsample_image(image, 1) is image
