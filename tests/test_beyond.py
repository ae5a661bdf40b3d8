"""What DTML's paper does not have: schedules, intensities, distances of whole scans, pasted crops, moving averages."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt
from test_data import patches, volumes
from test_methods import make, make_batch

import settings
from dataloaders.augmentation import draw_augmentation, random_intensities, turn_and_flip
from dataloaders.cases import lists_of
from dataloaders.two_stream import Slot
from evaluation.sliding_window import FLIPS, mean_of_flips
from losses.ema import ema_decay
from losses.mixing import copy_paste, random_box
from losses.ramps import cosine_rate, grown
from losses.terms import dice_loss, sdm_to_mask, seg_loss
from methods import METHODS

T = 60  # iterations of `make`


# -- schedules --


def test_the_cosine_is_torch_s():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    for iteration in range(40):
        assert cosine_rate(iteration, 40, 0.3) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        scheduler.step()


def test_k_grows_by_the_same_factor_at_every_iteration():
    found = [grown(t, 50, 15, 1500) for t in range(51)]
    assert (found[0], found[25], found[50]) == pytest.approx((15, 150, 1500))
    assert np.ptp(np.diff(np.log(found))) < 1e-9


@pytest.mark.parametrize(("iteration", "k"), [(0, 15.0), (T // 2, 150.0)])
def test_the_loss_sees_the_k_of_its_iteration(iteration, k):
    method, batch = make("dtml", k=1500.0, k_start=15.0), make_batch()
    torch.manual_seed(3)
    found = method(batch, iteration).terms["mask"]
    torch.manual_seed(3)
    _, z = method.M_s(batch["image"]), method.M_d(batch["image"])["sdm"]
    assert found.item() == pytest.approx(dice_loss(sdm_to_mask(z, k)[:2], batch["label"]).item(), rel=1e-5)


@pytest.mark.parametrize("profile", ["full", "half", "short", "phantom"])
def test_the_preset_tuned_fits_every_profile(profile):
    """The phantom profile has steps of its own, which the cosine leaves out."""
    given = {"data": "set", "profile": profile, "preset": "tuned"}
    o, method_options = settings.settle(given, METHODS["dtml"])
    assert (o.lr_schedule, o.lr_steps, o.labeled_batch, method_options.k) == ("cosine", [], 4, 50)


# -- the consistency --


def networks_say(method, batch):
    """p and z of a forward pass that draws the same dropout."""
    torch.manual_seed(3)
    return method.M_s(batch["image"])["seg"].sigmoid(), method.M_d(batch["image"])["sdm"]


@pytest.mark.parametrize("kind", ["mask", "map", "sure"])
def test_the_consistency_is_what_its_name_says(kind):
    method, batch = make("dtml", k=3.0, consistency=kind), make_batch()
    method.M_s.heads["seg"][0].weight.data.mul_(20)  # so that some voxels are sure
    p, z = networks_say(method, batch)
    torch.manual_seed(3)
    found = method(batch, 30).terms["consistency"].item()
    p, z = p.double(), z.double()
    m = 1 / (1 + torch.exp(3 * z))
    if kind == "sure":
        voxels = [(a - b) ** 2 for a, b in zip(m.flatten(), p.flatten(), strict=True) if b > 0.9 or b < 0.1]
        assert 100 < len(voxels) < p.numel() - 100
        assert found == pytest.approx(sum(voxels).item() / len(voxels), rel=1e-4)
    else:
        other = m if kind == "mask" else (1 - z) / 2
        assert found == pytest.approx(((other - p) ** 2).mean().item(), rel=1e-5)


def test_the_consistency_on_the_map_reaches_a_saturated_m_d():
    """Where |z| is near 1, sigmoid(-1500 z) has no gradient left."""
    z = torch.tensor([0.9], dtype=torch.float64).atanh().requires_grad_()
    p = torch.tensor([0.8], dtype=torch.float64)
    for kind, alive in (("mask", False), ("map", True)):
        method = make("dtml", consistency=kind)
        (gradient,) = torch.autograd.grad(method.consistency(p, sdm_to_mask(z.tanh(), 1500.0), z.tanh()), z)
        assert (gradient.abs().item() > 1e-3) == alive


# -- crops --


def test_intensities_keep_the_order_of_the_voxels_and_stay_in_bounds():
    generator = np.random.default_rng(0)
    image = torch.randn(9, 8, 7)
    order = image.flatten().argsort()
    spans, shifts = [], []
    for _ in range(200):
        found = random_intensities(image, generator, 0.4)
        assert found.dtype == image.dtype and (found.flatten()[order].diff() >= -1e-6).all()
        spans.append(((found.max() - found.min()) / (image.max() - image.min())).item())
        a = spans[-1]
        shifts.append((found.min() - a * image.min()).item())
    assert math.exp(-0.4) - 1e-3 < min(spans) < 0.72 and 1.4 < max(spans) < math.exp(0.4) + 1e-3
    assert -0.4 - 1e-3 < min(shifts) < -0.35 and 0.35 < max(shifts) < 0.4 + 1e-3


def test_intensities_are_the_formula():
    gamma, contrast, shift = np.random.default_rng(5).uniform(-0.3, 0.3, 3)
    image = torch.randn(6, 5, 4, dtype=torch.float64)
    x = image.numpy()
    u = (x - x.min()) / (x.max() - x.min())
    expected = np.exp(contrast) * (x.min() + (x.max() - x.min()) * u ** np.exp(gamma)) + shift
    found = random_intensities(image, np.random.default_rng(5), 0.3)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


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
    assert torch.equal(usual.middle(1)["image"], other.middle(1)["image"])


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


def test_the_volumes_of_unlabeled_cases_have_no_distances(tiny_set):
    made = patches(tiny_set, sdm=True, sdm_of="scan")
    for case in range(len(lists_of(tiny_set)[0])):
        made[Slot(0, 0, case)]
    assert sorted(made._distances) == [0, 1, 2, 3] and volumes(tiny_set).cases[4].labeled is False


# -- pasted crops --


def test_a_box_is_two_thirds_of_each_side_or_the_rest():
    torch.manual_seed(0)
    counts, corners = set(), set()
    for _ in range(40):
        boxes = random_box(torch.Size((12, 9, 6)), 2)
        assert boxes.shape == (2, 12, 9, 6) and boxes.dtype == torch.bool
        inner = [box if box.sum() == 8 * 6 * 4 else ~box for box in boxes]
        assert torch.equal(*inner)  # one box for the batch
        places = inner[0].nonzero()
        assert (places.amax(0) - places.amin(0) + 1).tolist() == [8, 6, 4] and len(places) == 8 * 6 * 4
        counts |= {int(box.sum()) for box in boxes}
        corners.add(tuple(places.amin(0).tolist()))
    assert counts == {8 * 6 * 4, 12 * 9 * 6 - 8 * 6 * 4} and len(corners) > 15


@pytest.mark.parametrize(("labeled", "unlabeled"), [(2, 2), (4, 2), (1, 3)])
def test_pasted_crops_are_labeled_where_they_come_from(labeled, unlabeled):
    g = torch.Generator().manual_seed(0)
    n = labeled + unlabeled
    image = torch.rand(n, 1, 6, 6, 6, generator=g) + torch.arange(n).view(-1, 1, 1, 1, 1)  # its crop is its floor
    label = torch.full((labeled, 6, 6, 6), 7, dtype=torch.uint8)
    p = torch.rand(n, 1, 6, 6, 6, generator=g).requires_grad_()
    mixed, target = copy_paste(image, label, p)
    pairs = min(labeled, unlabeled)
    assert mixed.shape == (pairs, 1, 6, 6, 6) and target.shape == (pairs, 6, 6, 6) and not target.requires_grad
    for i in range(pairs):
        source = mixed[i, 0].floor().long()
        assert set(source.unique().tolist()) == {i, labeled + i}
        assert torch.equal(mixed[i, 0], torch.where(source == i, image[i, 0], image[labeled + i, 0]))
        expected = torch.where(source == i, torch.tensor(7), (p[labeled + i, 0] > 0.5).long())
        assert torch.equal(target[i].long(), expected)


def test_the_loss_of_pasted_crops_asks_both_networks_for_what_both_said():
    method, batch = make("dtml", k=3.0, mix=0.5), make_batch()
    torch.manual_seed(3)
    losses = method(batch, T // 2)
    torch.manual_seed(3)
    p, z = method.M_s(batch["image"])["seg"].sigmoid(), method.M_d(batch["image"])["sdm"]
    image, target = copy_paste(batch["image"], batch["label"], (p + torch.sigmoid(-3 * z)) / 2)
    logits, mask = method.M_s(image)["seg"], torch.sigmoid(-3 * method.M_d(image)["sdm"])
    expected = seg_loss(logits, target) + dice_loss(mask, target)
    assert losses.terms["mix"].item() == pytest.approx(expected.item(), rel=1e-5)
    more = losses.total - sum(losses.terms[name] for name in ("seg", "mask"))
    weights = losses.weights["lambda"] * losses.terms["consistency"] + 0.5 * math.exp(-5 / 4) * losses.terms["mix"]
    assert more.item() == pytest.approx(weights.item(), rel=1e-4)


# -- the test --


def test_the_averages_are_tested_and_no_loss_sees_them():
    method, batch = make("dtml", ema_decay=0.9), make_batch()
    plain = make("dtml")
    expected = {name: copy.deepcopy(getattr(method, name).state_dict()) for name in ("M_s", "M_d")}
    for iteration in range(3):
        torch.manual_seed(iteration)
        method(batch, iteration).total.backward()
        torch.manual_seed(iteration)
        plain(batch, iteration).total.backward()
        with torch.no_grad():
            for one, other in zip([*method.M_s.parameters(), *method.M_d.parameters()],
                                  [*plain.M_s.parameters(), *plain.M_d.parameters()], strict=True):  # fmt: skip
                assert torch.equal(one.grad, other.grad)
                for parameter in (one, other):
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
        method.after_step(batch, iteration)
        alpha = ema_decay(iteration, 0.9)
        for network, average in expected.items():
            for name, value in getattr(method, network).state_dict().items():
                average[name] = alpha * average[name] + (1 - alpha) * value if value.is_floating_point() else value
    for network, average in expected.items():
        for name, value in method.ema[network].state_dict().items():
            torch.testing.assert_close(value, average[name])
    assert not any(parameter.requires_grad for parameter in method.ema.parameters())

    method.eval()
    found = method.predict(batch["image"], method.outputs)
    assert method.outputs == ("seg", "sdm", "mean", "ema_seg", "ema_sdm", "ema_mean") != plain.outputs
    for prefix, networks in (("", method), ("ema_", method.ema)):
        p = networks.M_s(batch["image"])["seg"].sigmoid()
        m = torch.sigmoid(-1500 * networks.M_d(batch["image"])["sdm"])
        for name, wanted in {"seg": p, "sdm": m, "mean": (p + m) / 2}.items():
            place = method.outputs.index(prefix + name)
            torch.testing.assert_close(found[:, place : place + 1], wanted)
            torch.testing.assert_close(method.predict(batch["image"], (prefix + name,)), wanted)


@pytest.mark.parametrize("flips", FLIPS)
def test_the_mean_of_flips_undoes_every_flip(flips):
    """A prediction that flips with its input stays what it is; one that looks at places becomes symmetric."""
    x = torch.randn(2, 1, 6, 6, 3)
    torch.testing.assert_close(mean_of_flips(torch.sigmoid, x, flips), x.sigmoid())
    place = torch.arange(6.0).view(1, 1, 6, 1, 1).expand(2, 1, 6, 6, 3)
    found = mean_of_flips(lambda turned: place + 0 * turned, x, flips)
    group = {1: place, 4: torch.full_like(place, 2.5), 8: torch.full_like(place, 2.5)}
    torch.testing.assert_close(found, group[flips])
