"""One scan is known by its image, however that was turned, scaled or rounded, and no two scans are taken for one."""

import itertools

import numpy as np
import pytest
from scipy import ndimage

from dataloaders.fingerprints import alike, fingerprint, groups
from utils.run_folder import digest


def scan(seed: int, shape=(24, 21, 17)) -> np.ndarray:
    """A bright box in the same place of every scan, and noise."""
    image = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    image[5:18, 4:15, 3:12] += 5
    return image


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(alike(fingerprint(a), [fingerprint(b)])[0])


CHANGES = {
    "equal": lambda x: x.copy(),
    "float16": lambda x: x.astype(np.float16).astype(np.float32),
    "256 steps": lambda x: np.rint((x - x.min()) / np.ptp(x) * 255).astype(np.float32),
    "units": lambda x: 37 * x + 1000,
    "inverted": lambda x: -x,
    "normalised again": lambda x: (x - x.mean()) / x.std(),
    "clipped": lambda x: x.clip(*np.percentile(x, (0.5, 99.5))),
    "one voxel": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 1234, np.float32(1e6), x),
    "a corner": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 0, np.float32(-1e6), x),
    "a little noise": lambda x: x + 0.02 * np.random.default_rng(9).standard_normal(x.shape).astype(np.float32),
}


@pytest.mark.parametrize(
    ("how", "shape"), [(how, ((24, 21, 17), (9, 16, 5), (160, 3, 40))[i % 3]) for i, how in enumerate(CHANGES)]
)
def test_a_changed_image_is_of_the_same_scan(how, shape):
    image = scan(1, shape) if min(shape) > 12 else np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    assert same(image, CHANGES[how](image)) and same(CHANGES[how](image), image)


def test_all_48_directions_of_an_image_are_of_one_scan():
    image, other = scan(1), scan(2)
    for axes in itertools.permutations(range(3)):
        for flipped in itertools.product((False, True), repeat=3):
            turned = np.flip(image.transpose(axes), [a for a in range(3) if flipped[a]])
            assert same(image, turned) and not same(other, turned)


def test_other_scans_are_not_taken_for_one_however_alike_their_objects():
    marks = [fingerprint(scan(seed)) for seed in range(60)]
    assert groups(marks) == []
    noisy = scan(1) + 2 * np.random.default_rng(3).standard_normal((24, 21, 17)).astype(np.float32)
    assert not same(scan(1), noisy)


def test_scans_with_the_same_outline_are_not_taken_for_one():
    """Bodies in air with the same skin and other noise, in few voxels, so that a fifth of the grid is at an edge."""
    x, y = np.meshgrid(np.linspace(-1, 1, 48), np.linspace(-1, 1, 44), indexing="ij")
    body = ndimage.gaussian_filter(1000.0 * (x**2 + y**2 < 0.85)[..., None] * np.ones(14), 0.5)
    noise = [15 * np.random.default_rng(seed).standard_normal(body.shape) for seed in range(8)]
    assert groups([fingerprint((body + one).astype(np.float32)) for one in noise]) == []


def test_images_without_noise_are_known_by_their_values_alone():
    box, other = np.zeros((30, 30, 30), np.float32), np.zeros((30, 30, 30), np.float32)
    box[10:20, 10:20, 10:20] = other[10:20, 10:20, 11:20] = 1
    assert same(box, box.copy()) and not same(box, other) and fingerprint(box)[:16] == digest(box)
    constant = np.ones((8, 8, 8), np.float32)
    assert not same(constant, 2 * constant) and same(constant, constant)


def test_groups_are_of_all_that_belong_together():
    a, b, c = scan(1), scan(2), scan(3)
    images = [a, b, 2 * a, c, b[::-1], a.transpose(2, 0, 1)]
    assert groups([fingerprint(x) for x in images]) == [[0, 2, 5], [1, 4]]
    assert groups([]) == [] and alike(fingerprint(a), []).tolist() == []


def test_what_is_no_fingerprint_is_like_none():
    mark = fingerprint(scan(1))
    assert alike(mark, ["", "nonsense" * 200, mark[:30], mark[:16], mark]).tolist() == [False, False, True, True, True]
