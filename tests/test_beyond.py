"""What DTML's paper does not have: schedules, crops that agree, intensity augmentation, distances of whole scans."""

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt
from small_methods import make, make_batch
from test_data import patches

from dataloaders.augmentation import draw_augmentation, power, random_intensities, turn_and_flip
from dataloaders.two_stream import Slot
from evaluation.sliding_window import FLIPS, mean_of_flips
from losses.ramps import cosine_rate

# -- schedules --


def test_the_cosine_is_torch_s():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    for iteration in range(40):
        assert cosine_rate(iteration, 40, 0.3) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        scheduler.step()


# -- the consistency --


@pytest.mark.parametrize(("crops", "first"), [("all", 0), ("unlabeled", 2)])
def test_the_consistency_is_over_the_crops_that_its_option_names(crops, first):
    method, batch = make("dtml", k=3.0, consistency_on=crops), make_batch()
    torch.manual_seed(3)  # the same dropout
    p, z = method.M_s(batch["image"])["seg"].sigmoid(), method.M_d(batch["image"])["sdm"]
    torch.manual_seed(3)
    result = method(batch, 30).terms["consistency"].item()
    m = 1 / (1 + torch.exp(3 * z.double()))
    assert len(p) == 4 and result == pytest.approx((m - p.double())[first:].square().mean().item(), rel=1e-5)
    assert method.needs_unlabeled == (first > 0)


# -- crops --


def test_intensities_are_the_formula():
    gamma, contrast, shift = np.random.default_rng(5).uniform(-0.3, 0.3, 3)
    image = torch.randn(6, 5, 4, dtype=torch.float64)
    x = image.numpy()
    u = (x - x.min()) / (x.max() - x.min())
    expected = np.exp(contrast) * (x.min() + (x.max() - x.min()) * u ** np.exp(gamma)) + shift
    result = random_intensities(image, np.random.default_rng(5), 0.3)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-12)


def test_intensities_are_the_same_for_any_number_of_threads():
    """A data worker has one thread. Sides whose shares leave no voxels over give what torch gives."""
    images = [torch.randn(sides, generator=torch.Generator().manual_seed(0)) for sides in ((61, 53, 47), (64, 64, 32))]
    threads = torch.get_num_threads()
    try:
        for image in (*images, images[0].transpose(0, 1)):
            results = []
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                results.append(random_intensities(image, np.random.default_rng(5), 0.3))
            assert all(torch.equal(result, results[0]) for result in results)
        torch.set_num_threads(2)
        u = (images[1] - images[1].min()) / (images[1].max() - images[1].min())
        assert torch.equal(power(u, 1.27), u**1.27)
    finally:
        torch.set_num_threads(threads)


def test_a_crop_of_one_value_stays_finite():
    assert torch.isfinite(random_intensities(torch.zeros(4, 4, 4), np.random.default_rng(0), 1.0)).all()


def test_intensities_change_the_image_alone_and_differ_between_crops(tiny_set):
    usual, other = patches(tiny_set, other=True), patches(tiny_set, other=True, intensity=0.3)
    contrasts = []  # highest and lowest stay so, and the gamma moves neither
    for slot in (Slot(3, 0, 1), Slot(3, 1, 1), Slot(4, 0, 1)):
        a, b, again = usual[slot], other[slot], other[slot]
        assert torch.equal(a["label"], b["label"]) and torch.equal(a["other_label"], b["other_label"])
        for name in ("image", "other_image"):
            assert not torch.equal(a[name], b[name]) and torch.equal(b[name], again[name])
            contrasts.append(float(np.ptp(b[name].numpy()) / np.ptp(a[name].numpy())))
    assert np.diff(np.sort(contrasts)).min() > 1e-3
    assert torch.equal(usual.centre_crop(1)["image"], other.centre_crop(1)["image"])


@pytest.mark.parametrize("downsample", [1, 2])
def test_distances_of_the_scan_are_cut_where_the_crop_is(tiny_set, downsample):
    """Against scipy, on the whole label; a crop larger than the scan is outside as far as can be there."""
    size = (16, 12, 32) if downsample == 1 else (8, 8, 16)
    made = patches(tiny_set, size, sdm=True, sdm_of="scan", downsample=downsample)
    for case in range(4):
        whole = tuple(slice(0, side) for side in made.volumes.shapes[case])
        label = made.volumes.read(case, whole)[1].numpy() > 0
        out, inside = distance_transform_edt(~label), distance_transform_edt(label)
        expected = out / out.max() - np.where(inside == 1, 0, inside / inside.max())
        depth = label.shape[2]
        before = (size[2] - depth) // 2
        padded = np.ones((*label.shape[:2], size[2]))
        padded[:, :, before : before + depth] = expected
        for step in range(6):
            draw = draw_augmentation(np.random.default_rng([5, 1, step, 0]), made.volumes.shapes[case], size, "d4")
            box = tuple(slice(a, a + s) for a, s in zip(draw.start[:2], draw.size[:2], strict=True))
            cut = turn_and_flip(torch.from_numpy(padded[box]), draw)
            np.testing.assert_allclose(made[Slot(step, 0, case)]["sdm"][0].numpy(), cut.numpy(), atol=1e-6)
    assert "sdm" not in made[Slot(0, 2, 6)]


# -- the test --


@pytest.mark.parametrize("flips", FLIPS)
def test_the_mean_of_flips_undoes_every_flip(flips):
    """A prediction that flips with its input stays what it is; one that looks at places becomes symmetric."""
    x = torch.randn(2, 1, 6, 6, 3)
    torch.testing.assert_close(mean_of_flips(torch.sigmoid, x, flips), x.sigmoid())
    place = torch.arange(6.0).view(1, 1, 6, 1, 1).expand(2, 1, 6, 6, 3)
    result = mean_of_flips(lambda turned: place + 0 * turned, x, flips)
    group = {1: place, 4: torch.full_like(place, 2.5), 8: torch.full_like(place, 2.5)}
    torch.testing.assert_close(result, group[flips])
