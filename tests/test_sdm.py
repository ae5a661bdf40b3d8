"""The signed distance map: vectors, corner cases, and a brute-force definition."""

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt, gaussian_filter
from skimage.segmentation import find_boundaries

from losses.sdm import signed_distance_map


def by_definition(mask: np.ndarray) -> np.ndarray:
    """Distance of every voxel to every voxel of the other side: slow and obvious."""
    voxels = np.argwhere(np.ones_like(mask)).astype(float)
    inside = mask.ravel() > 0
    distances = np.linalg.norm(voxels[:, None] - voxels[None], axis=-1)
    d_out = np.where(inside, 0, distances[:, inside].min(1))
    d_in = np.where(inside, distances[:, ~inside].min(1), 0)
    sdm = d_out / d_out.max() - d_in / d_in.max()
    sdm[find_boundaries(mask > 0, mode="inner", connectivity=1).ravel()] = 0
    return sdm.reshape(mask.shape)


def test_one_dimension_by_hand():
    mask = np.zeros(10)
    mask[3:8] = 1
    expected = [1, 2 / 3, 1 / 3, 0, -2 / 3, -1, -2 / 3, 0, 1 / 3, 2 / 3]
    assert signed_distance_map(mask).tolist() == pytest.approx(expected)


def test_empty_is_1_and_full_is_minus_1():
    assert (signed_distance_map(np.zeros((4, 5, 6))) == 1).all()
    assert (signed_distance_map(np.ones((4, 5, 6))) == -1).all()


def test_a_single_voxel_is_boundary_alone():
    mask = np.zeros((5, 5, 5))
    mask[2, 2, 2] = 1
    sdm = signed_distance_map(mask)
    assert sdm[2, 2, 2] == 0 and np.isfinite(sdm).all() and sdm.min() == 0 and sdm.max() == 1


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_definition_on_random_blobs(seed):
    rng = np.random.default_rng(seed)
    mask = np.zeros((9, 8, 7), np.uint8)
    a, b, c = rng.integers(0, 5, 3)
    mask[a : a + 4, b : b + 4, c : c + 4] = rng.random(mask[a : a + 4, b : b + 4, c : c + 4].shape) < 0.9
    sdm = signed_distance_map(mask)
    assert sdm.dtype == np.float32
    assert np.allclose(sdm, by_definition(mask), atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_equals_scipy_at_the_size_of_a_crop(seed):
    rng = np.random.default_rng(seed)
    mask = np.zeros((112, 112, 80), np.uint8)
    mask[20:90, :70, 30:60] = gaussian_filter(rng.standard_normal((70, 70, 30)), 4) > 0
    d_out, d_in = distance_transform_edt(mask == 0), distance_transform_edt(mask)
    expected = d_out / d_out.max() - np.where(d_in == 1, 0, d_in / d_in.max())
    assert np.allclose(signed_distance_map(mask), expected, atol=1e-6)
    turned = np.rot90(mask).copy()
    assert np.array_equal(signed_distance_map(np.rot90(mask)), signed_distance_map(turned))  # a view as well
