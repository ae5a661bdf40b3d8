"""--augment flip and --random-...: crops against closed forms and scipy, and runs with all of them, resumed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, make_set, trained_in_three_ways, write_case
from scipy.ndimage import affine_transform

from dataloaders.augmentation import Strengths, degraded, draw_augmentation, draw_warp
from dataloaders.cases import Case
from dataloaders.two_stream import Patches, Slot
from dataloaders.volumes import Volumes
from evaluation.sliding_window import unlearned_flips
from losses.sdm import signed_distance_map

SHAPE, PATCH, SPACING = (40, 36, 24), (16, 12, 8), (1.0, 1.5, 2.5)
ALL = {"random_scale": 0.2, "random_rotation": 15.0, "random_bias": 0.3, "random_blur": 1.0, "random_resolution": 1.0,
       "random_noise": 0.2}  # fmt: skip


def volumes_of(folder: Path, image: np.ndarray, label: np.ndarray | None = None, spacing=SPACING) -> Volumes:
    """One labeled case."""
    label = np.zeros(image.shape[-3:], np.uint8) if label is None else label
    write_case(folder / "a.h5", image.astype(np.float32), label, spacing=spacing)
    return Volumes(
        [Case("a", folder / "a.h5", True, classes=max(int(label.max()), 1), channels=image[..., 0, 0, 0].size)]
    )


def patches(volumes: Volumes, strengths: dict | None = None, **more) -> Patches:
    options = {"patch_size": PATCH, "augment": "none", "seed": 5, "sdm": False, **more}
    return Patches(volumes, strengths=Strengths(**strengths or {}), **options)


def places(crops: Patches, slot: Slot) -> np.ndarray:
    """(3,w,h,d), where each voxel of a crop lies in the volume, in voxels, by the definition: what is turned by R and
    enlarged by f about the centre came, in mm, from R^-1 x / f."""
    (draw,), _ = crops.draws(slot)
    a, b, c = np.radians(draw.angles)
    rx = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    ry = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    rz = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    half = (np.array(draw.size) - 1) / 2
    offsets = np.stack(np.meshgrid(*map(np.arange, draw.size), indexing="ij"), -1) - half
    mm = np.linalg.inv(rz @ ry @ rx) @ (offsets * SPACING)[..., None] / draw.scale
    return np.moveaxis(mm[..., 0] / SPACING + half + draw.start, -1, 0)


# -- rotation and scaling --


@pytest.mark.parametrize("strengths", [{"random_rotation": 30.0}, {"random_scale": 0.5},
                                       {"random_rotation": 180.0, "random_scale": 0.3}])  # fmt: skip
def test_a_ramp_is_read_where_the_turned_and_scaled_voxels_lie(strengths, tmp_path):
    """Linear interpolation of a ramp is exact; both channels are read at the same places."""
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij")).astype(float)
    ramps = np.array([[1.0, -2.0, 3.0], [0.5, 0.7, -0.2]])
    crops = patches(volumes_of(tmp_path, 100 + np.tensordot(ramps, grid, 1)), strengths)
    seen = 0
    for step in range(8):
        slot = Slot(step, 0, 0)
        x = places(crops, slot)
        inside = ((x > 0) & (x < np.array(SHAPE).reshape(3, 1, 1, 1) - 1)).all(0)
        beyond = ((x < -1) | (x > np.array(SHAPE).reshape(3, 1, 1, 1))).any(0)
        result = crops[slot]["image"].numpy()
        np.testing.assert_allclose(result[:, inside], (100 + np.tensordot(ramps, x, 1))[:, inside], atol=2e-3)
        assert (result[:, beyond] == 0).all()
        seen += inside.sum()
    assert seen > 4 * np.prod(PATCH)


def test_a_crop_of_noise_is_that_of_scipy(tmp_path):
    """Also at the border, in a box that is larger than the scan, and turned and flipped afterwards."""
    rng = np.random.default_rng(0)
    image, label = rng.standard_normal(SHAPE), (rng.random(SHAPE) < 0.3).astype(np.uint8)
    for size in (PATCH, (16, 48, 32)):
        crops = patches(volumes_of(tmp_path, image, label), {"random_rotation": 40.0, "random_scale": 0.3},
                        patch_size=size, augment="d4")  # fmt: skip
        for step in range(5):
            slot = Slot(step, 0, 0)
            (draw,), _ = crops.draws(slot)
            before = [(s - side) // 2 if s > side else 0 for s, side in zip(draw.size, SHAPE, strict=True)]
            x = places(crops, slot) - np.reshape(before, (3, 1, 1, 1))
            corner, ends = x[:, 0, 0, 0], (x[:, -1, 0, 0], x[:, 0, -1, 0], x[:, 0, 0, -1])
            matrix = np.stack([(end - corner) / (n - 1) for end, n in zip(ends, draw.size, strict=True)], 1)
            expected = affine_transform(image, matrix, corner, draw.size, order=1, mode="grid-constant")
            expected = np.rot90(expected, draw.turns)
            expected = np.flip(expected, draw.flips)
            np.testing.assert_allclose(crops[slot]["image"][0].numpy(), expected, atol=2e-4)
            nearest = affine_transform(label, matrix, corner, draw.size, order=0, mode="grid-constant")
            nearest = np.flip(np.rot90(nearest, draw.turns), draw.flips)
            assert (crops[slot]["label"].numpy() == nearest).mean() > 0.999  # but for halves


def test_the_label_follows_the_image_and_the_distances_the_label(tmp_path):
    """And stays of whole numbers: a class 2 within a class 1 touches the background nowhere."""
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"))
    radius = np.linalg.norm((grid - np.reshape(SHAPE, (3, 1, 1, 1)) / 2) * np.reshape(SPACING, (3, 1, 1, 1)), axis=0)
    label = (radius < 16).astype(np.uint8) + (radius < 8)
    crops = patches(volumes_of(tmp_path, label.astype(float), label.astype(np.uint8)), ALL | {"random_noise": 0.0,
                    "random_bias": 0.0, "random_blur": 0.0, "random_resolution": 0.0}, sdm=True)  # fmt: skip
    for step in range(6):
        item = crops[Slot(step, 0, 0)]
        result = item["label"]
        assert result.dtype == torch.uint8 and set(result.unique().tolist()) <= {0, 1, 2}
        assert ((item["image"][0] - result).abs() <= 0.75).float().mean() > 0.98
        for c, sdm in enumerate(item["sdm"], 1):
            np.testing.assert_array_equal(sdm.numpy(), signed_distance_map(result.numpy() == c))


def test_content_turns_from_x_to_y_and_grows_with_the_scale(tmp_path, monkeypatch):
    """A ball 9 mm from the middle along x lies along y after 90 degrees about z, in mm, not in voxels."""
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"))
    middle = (np.reshape(SHAPE, (3, 1, 1, 1)) - 1) / 2
    mm = (grid - middle) * np.reshape(SPACING, (3, 1, 1, 1))
    label = (np.linalg.norm(mm - np.reshape([9, 0, 0], (3, 1, 1, 1)), axis=0) < 6).astype(np.uint8)
    crops = patches(volumes_of(tmp_path, label * 1.0, label), {"random_rotation": 1.0}, patch_size=SHAPE)
    for chosen, place, size in (
        ({"angles": (0.0, 0.0, 90.0), "scale": 1.0}, (0, 9, 0), 1.0),
        ({"angles": (0.0, -90.0, 0.0), "scale": 1.0}, (0, 0, 9), 1.0),
        ({"angles": (0.0, 0.0, 0.0), "scale": 1.25}, (9 * 1.25, 0, 0), 1.25**3),
    ):
        monkeypatch.setattr("dataloaders.two_stream.draw_warp", lambda *_, chosen=chosen: chosen)
        result = crops[Slot(0, 0, 0)]["label"].numpy()
        np.testing.assert_allclose(mm[:, result > 0].mean(axis=1), place, atol=0.4)
        assert result.sum() / label.sum() == pytest.approx(size, rel=0.15)  # coarse voxels


def test_places_are_drawn_up_to_their_strengths_and_apart():
    def drawn(**strengths):
        return [draw_warp(np.random.default_rng(i), Strengths(**strengths)) for i in range(2000)]

    both, scales = drawn(random_scale=0.3, random_rotation=20.0), drawn(random_scale=0.3)
    angles, logs = np.array([d["angles"] for d in both]), np.log([d["scale"] for d in both])
    assert [d["scale"] for d in both] == [d["scale"] for d in scales] and not any(any(d["angles"]) for d in scales)
    for values, most in ((angles, 20.0), (logs, 0.3)):
        assert np.abs(values).max() <= most and np.allclose(values.std(axis=0), most / np.sqrt(3), rtol=0.05)
        assert np.allclose(values.mean(axis=0), 0, atol=0.05 * most)


# -- intensities --


def change(image: np.ndarray, seed: int = 0, **strengths) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return degraded(torch.from_numpy(image.astype(np.float32)), generator, Strengths(**strengths)).numpy()


def amount(i: int, seed: int = 0) -> float:
    """What is drawn in [0,1] for bias, blur, resolution, noise."""
    return float(np.random.default_rng(seed).uniform(size=4)[i])


def test_noise_has_the_drawn_standard_deviation_and_is_white():
    zero, sds = np.zeros((32, 32, 32)), []
    for seed in range(20):
        noise = change(zero, seed, random_noise=0.5)
        assert noise.std() == pytest.approx(0.5 * amount(3, seed), rel=0.02)
        assert abs(noise.mean()) < 4 * noise.std() / np.sqrt(noise.size)
        assert abs(np.corrcoef(noise[1:].ravel(), noise[:-1].ravel())[0, 1]) < 0.025
        sds.append(noise.std())
    assert max(sds) < 0.5 and np.ptp(sds) > 0.25


def test_blur_damps_a_wave_as_a_gaussian_does():
    x = np.arange(64)
    wave = np.sin(2 * np.pi * x / 16)[:, None, None] * np.ones((64, 8, 8))
    for seed in range(4):
        sigma = 2 * amount(1, seed)
        expected = np.exp(-2 * (np.pi * sigma / 16) ** 2)
        result = change(wave, seed, random_blur=2.0)[16:48]
        np.testing.assert_allclose(result, expected * wave[16:48], atol=5e-3)  # a sampled Gaussian


def test_the_bias_field_is_a_polynomial_within_its_strength():
    image = np.ones((20, 18, 16))
    image[3, 4, 5] = 0  # the lowest intensity, which stays
    for seed in range(4):
        result = change(image, seed, random_bias=0.4)
        assert result[3, 4, 5] == 0
        result[3, 4, 5] = np.nan
        b = np.log(result.astype(float))
        assert np.nanmax(np.abs(b)) == pytest.approx(0.4 * amount(0, seed), rel=1e-4) and np.nanstd(b) > 0.003
        for axis in range(3):
            fourth = np.diff(b, n=4, axis=axis)
            assert np.nanmax(np.abs(fourth)) < 2e-5 and np.nanmax(np.abs(np.diff(b, axis=axis))) > 5e-4


def test_low_resolution_leaves_what_coarse_voxels_hold():
    """Of white noise the power above the coarse grid's Nyquist frequency goes, and a slow wave stays."""
    noise = np.random.default_rng(0).standard_normal((48, 48, 48))
    seed = next(seed for seed in range(99) if amount(2, seed) > 0.97)
    result = change(noise, seed, random_resolution=3.0)  # voxels nearly 4 times as long
    power, before = (np.abs(np.fft.fftn(x)) ** 2 for x in (result, noise))
    f = np.abs(np.stack(np.meshgrid(*[np.fft.fftfreq(48)] * 3, indexing="ij"))).max(axis=0)
    assert power[f > 1 / 8].sum() < 0.02 * before[f > 1 / 8].sum()
    assert power[f < 1 / 48].sum() > 0.9 * before[f < 1 / 48].sum()
    wave = np.cos(2 * np.pi * (np.arange(48) + 0.5) / 48)[:, None, None] * np.ones((48, 12, 12))
    np.testing.assert_allclose(change(wave, seed, random_resolution=3.0), wave, atol=0.14)
    flat = np.full((9, 7, 5), 3.25)
    np.testing.assert_allclose(change(flat, seed, random_resolution=9.0), flat, rtol=1e-6)


def test_each_change_is_drawn_for_itself_and_for_each_channel_and_crop(tmp_path):
    """A strength moves nothing that another draws; boxes, turns and --intensity stay as without them."""
    image = np.random.default_rng(0).standard_normal((2, *SHAPE))
    usual = patches(volumes_of(tmp_path, image), augment="d4", intensity=0.3, other=True)
    one = patches(usual.volumes, {"random_noise": 0.2}, augment="d4", intensity=0.3, other=True)
    two = patches(usual.volumes, {"random_noise": 0.2, "random_bias": 1e-6}, augment="d4", intensity=0.3, other=True)
    for slot in (Slot(0, 0, 0), Slot(3, 2, 0)):
        a, b, c = usual[slot], one[slot], two[slot]
        assert usual.draws(slot)[0] == one.draws(slot)[0] and torch.equal(one[slot]["image"], b["image"])
        noises = torch.cat([b[name] - a[name] for name in ("image", "other_image")]).flatten(1)
        assert (torch.corrcoef(noises) - torch.eye(4)).abs().max() < 0.1 and noises.std(1).unique().numel() == 4
        torch.testing.assert_close(b["image"], c["image"], atol=1e-4, rtol=0)
    assert torch.equal(one.centre_crop(0)["image"], usual.centre_crop(0)["image"])


# -- flips along chosen axes --


@pytest.mark.parametrize(("axes", "expected"), [("xyz", (0, 1, 2)), ("z", (2,)), ("zy", (1, 2))])
def test_flips_are_along_the_chosen_axes_half_of_the_time(axes, expected):
    draws = [draw_augmentation(np.random.default_rng(i), (9, 9, 9), (8, 6, 4), "flip", list(axes)) for i in range(800)]
    assert {(d.turns, d.size) for d in draws} == {(0, (8, 6, 4))}
    shares = [np.mean([axis in d.flips for d in draws]) for axis in range(3)]
    assert [share > 0 for share in shares] == [axis in expected for axis in range(3)]
    assert all(abs(shares[axis] - 0.5) < 4 * 0.5 / np.sqrt(800) for axis in expected)
    assert len({d.flips for d in draws}) == 2 ** len(expected)


def test_flips_of_a_prediction_that_were_not_trained_on_are_named():
    flip = {"augment": "flip", "flip_axes": ["x", "y", "z"]}
    for trained, most in (({}, 8), ({"augment": "mirror"}, 1), ({"augment": "none"}, 1), (flip, 4),
                          (flip | {"flip_axes": ["y", "z"]}, 1)):  # fmt: skip
        for flips in (1, 4, 8):
            warning = unlearned_flips(flips, trained)
            assert bool(warning) == (flips > most)
            assert not warning or (f"--flips {flips}" in warning and f"--augment {trained['augment']}" in warning)
    assert "--flip-axes y z" in unlearned_flips(4, flip | {"flip_axes": ["y", "z"]})


# -- runs --


def test_a_run_with_all_of_them_is_equal_in_every_cache_with_workers_and_when_resumed(tmp_path):
    data = make_set(tmp_path / "set", train=4, labeled=2)
    flags = [word for name, value in ALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    flags += ["--augment", "flip", "--flip-axes", "y", "--object-share", "0.5"]
    argv = ["--data", str(data), *TINY, "--labeled", "2", "--device", "cpu", "--method", "bcp", "--batch-size", "4"]
    trained_in_three_ways(tmp_path, [*argv, *flags])
