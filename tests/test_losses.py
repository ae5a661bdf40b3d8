"""Losses, ramps and rates against closed forms, tables and float64 gradients; signed distance maps against a slow and
obvious definition and scipy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt, gaussian_filter
from skimage.segmentation import find_boundaries

from losses.ramps import default_lr_steps, learning_rate, ramp_up
from losses.sdm import signed_distance_map
from losses.terms import cross_entropy, dice_loss, hard_dice, live_share, sdm_to_mask, seg_loss
from methods.dtml import DTML
from utils.vectors import unit


def test_dice_loss_by_hand_sums_over_the_whole_batch():
    p = torch.tensor([0.5, 1.0, 0.0, 0.25]).view(2, 1, 2, 1, 1)
    label = torch.tensor([1, 1, 0, 0], dtype=torch.uint8).view(2, 2, 1, 1)
    assert dice_loss(p, label).item() == pytest.approx(1 - (3 + 1e-5) / (1.3125 + 2 + 1e-5))


def test_seg_loss_is_half_cross_entropy_and_half_dice():
    logits, label = torch.randn(2, 1, 3, 4, 5), torch.randint(0, 2, (2, 3, 4, 5))
    p, y = logits.sigmoid(), label[:, None].float()
    cross_entropy = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    assert seg_loss(logits, label).item() == pytest.approx(
        (0.5 * (cross_entropy + dice_loss(p, label))).item(), rel=1e-5
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("shape", [(4, 2), (7, 5), (2, 2, 8, 6, 5), (3, 4, 5, 7, 3), (1, 255, 3, 2, 1)])
def test_cross_entropy_is_torchs_with_the_same_gradient(shape, layout):
    if len(shape) == 2:
        layout = torch.contiguous_format
    for dtype, tolerance in ((torch.float64, 2e-15), (torch.float32, 1e-6)):
        x = (10 * torch.randn(shape, dtype=dtype)).to(memory_format=layout)
        label = torch.randint(shape[1], (shape[0], *shape[2:]), dtype=torch.uint8)
        ours, torchs = (x.clone().requires_grad_() for _ in range(2))
        value, expected = cross_entropy(ours, label), F.cross_entropy(torchs, label.long())
        assert value.item() == pytest.approx(expected.item(), rel=tolerance)
        (0.3 * value).backward()
        (0.3 * expected).backward()
        assert torch.equal(ours.grad, torchs.grad)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_unit_is_torchs_normalisation_with_the_same_gradient(layout):
    x = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    x[0, :, 0], x[1, :, 1] = 0, 1e-14 * x[1, :, 1]  # no length, and less than the shortest
    ours, torchs = (x.clone().to(memory_format=layout).requires_grad_() for _ in range(2))
    a, b = unit(ours), F.normalize(torchs, dim=1)
    assert torch.allclose(a, b, rtol=1e-14, atol=0)
    g = torch.randn_like(x)
    a.backward(g)
    b.backward(g)
    assert torch.allclose(ours.grad, torchs.grad, rtol=1e-12, atol=1e-12)


def test_cross_entropy_of_what_cannot_be_is_finite_and_a_label_beyond_is_refused():
    x = torch.tensor([[1.0, -torch.inf, 2.0]], requires_grad=True)
    cross_entropy(x, torch.tensor([2])).backward()
    assert x.grad.isfinite().all() and x.grad[0, 1] == 0
    with pytest.raises(RuntimeError, match="num_classes"):
        cross_entropy(torch.randn(1, 3), torch.tensor([3]))


def test_mask_of_a_map_is_high_inside_where_the_map_is_negative():
    z = torch.tensor([-0.01, 0.0, 0.01])
    assert sdm_to_mask(z, 1500.0).tolist() == pytest.approx([1 / (1 + math.exp(-15)), 0.5, 1 / (1 + math.exp(15))])


def test_mask_is_computed_in_float32_under_autocast_and_for_half_inputs():
    z = torch.tensor([0.001], dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        m = sdm_to_mask(z, 1500.0)
    assert m.dtype == torch.float32
    assert m.item() == pytest.approx(1 / (1 + math.exp(1500 * z.float().item())), rel=1e-5)
    assert sdm_to_mask(z.double(), 1500.0).dtype == torch.float64


def test_live_share_counts_voxels_that_can_learn():
    m = torch.tensor([0.0, 1e-4, 0.002, 0.5, 0.998, 0.9999, 1.0, 0.5]).view(1, 1, 2, 2, 2)
    assert live_share(m).item() == 4 / 8


def test_hard_dice():
    p = torch.tensor([0.9, 0.9, 0.1, 0.5]).view(1, 1, 4, 1, 1)
    assert hard_dice(p, torch.tensor([1, 0, 0, 1]).view(1, 4, 1, 1)).item() == 0.5
    assert hard_dice(p * 0, torch.zeros(1, 4, 1, 1)).item() == 1


@pytest.mark.parametrize(
    ("iteration", "steps", "paper", "literal"),
    [(0, 0.0067, 0.00067, 0.00067), (1500, 0.0601, 0.0060, 0.0024), (3000, 0.2865, 0.0287, 0.0082),
     (4500, 0.7316, 0.0732, 0.0287), (5999, 0.9969, 0.1000, 0.0999)],
)  # fmt: skip
def test_ramp_table(iteration, steps, paper, literal):
    assert ramp_up(iteration, 6000, "steps") == pytest.approx(steps, abs=5e-5)
    assert 0.1 * ramp_up(iteration, 6000, "gaussian") == pytest.approx(paper, abs=5e-5)
    assert 0.1 * ramp_up(iteration, 6000, "literal") == pytest.approx(literal, abs=5e-5)


def test_steps_are_plateaus_of_150_iterations():
    values = [ramp_up(i, 6000, "steps") for i in range(6000)]
    assert len(set(values)) == 40 and all(len(set(values[i : i + 150])) == 1 for i in range(0, 6000, 150))


def test_ramps_never_leave_0_to_1_and_never_fall():
    for shape in ("gaussian", "steps", "literal"):
        values = [ramp_up(i, 50, shape) for i in range(-5, 60)]
        assert values == sorted(values) and values[0] > 0 and values[-1] == 1
    assert ramp_up(0, 0) == 1
    with pytest.raises(ValueError, match="linear"):
        ramp_up(0, 10, "linear")


@pytest.mark.parametrize(
    ("iteration", "lr"), [(0, 1e-2), (2499, 1e-2), (2500, 1e-3), (4999, 1e-3), (5000, 1e-4), (5999, 1e-4)]
)
def test_learning_rate_table(iteration, lr):
    assert default_lr_steps(6000) == [2500, 5000]
    assert learning_rate(iteration, 0.01, default_lr_steps(6000), 0.1) == pytest.approx(lr)


def batch64(unlabeled: int = 1) -> dict:
    torch.manual_seed(3)
    label = torch.randint(0, 2, (1, 16, 16, 16), dtype=torch.uint8)
    return {
        "image": torch.randn(1 + unlabeled, 1, 16, 16, 16, dtype=torch.float64),
        "label": label, "sdm": torch.randn(1, 1, 16, 16, 16, dtype=torch.float64).tanh(), "case": ["a", "b"],
    }  # fmt: skip


def gradients(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters()])


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("sdm_loss", ["mask", "dis", "both"])
def test_one_joint_backward_gives_the_gradients_of_problems_5_and_6(sdm_loss, times):
    """Each network's own problem, with the other one held fixed, in float64; k = 5 keeps the gradient of m alive."""
    options = DTML.Options(filters=2, k=5.0, lambda_max=0.7, sdm_loss=sdm_loss, dis_weight=0.3, consistency_times=times)
    method = DTML(options, iterations=10).double().eval()
    batch, iteration = batch64(), 6
    method(batch, iteration).total.backward()
    joint = {name: gradients(getattr(method, name)) for name in ("M_s", "M_d")}

    lambda_ = times * 0.7 * math.exp(-5 * (1 - 6 / 10) ** 2)
    y = batch["label"][:, None].double()
    logits, z = method.M_s(batch["image"])["seg"], method.M_d(batch["image"])["sdm"]
    p, m = logits.sigmoid(), 1 / (1 + (5 * z).exp())

    def dice(x):
        return 1 - (2 * (x * y).sum() + 1e-5) / ((x**2).sum() + (y**2).sum() + 1e-5)

    l_seg = 0.5 * (F.binary_cross_entropy(p[:1], y) + dice(p[:1]))
    l_dis = ((z[:1] - batch["sdm"]) ** 2).mean()
    l_sdm = {"mask": dice(m[:1]), "dis": l_dis, "both": dice(m[:1]) + 0.3 * l_dis}[sdm_loss]
    problem_5 = l_seg + lambda_ * ((m.detach() - p) ** 2).mean()
    problem_6 = l_sdm + lambda_ * ((m - p.detach()) ** 2).mean()
    method.zero_grad()
    (problem_5 + problem_6).backward()  # each reaches one network only
    for name, gradient in joint.items():
        own = gradients(getattr(method, name))
        assert own.norm() > 1e-6
        assert torch.allclose(gradient, own, rtol=1e-9, atol=1e-12)


def test_dtml_predicts_both_outputs_and_their_mean():
    method = DTML(DTML.Options(filters=2), iterations=10).eval()
    seg, sdm, mean = method.predict(torch.randn(2, 1, 16, 16, 16), method.outputs).unbind(1)
    assert torch.allclose(mean, (seg + sdm) / 2) and not torch.allclose(seg, sdm)
    assert torch.equal(method.predict(torch.ones(1, 1, 16, 16, 16), ("sdm", "seg")),
                       method.predict(torch.ones(1, 1, 16, 16, 16), ("seg", "sdm")).flip(1))  # fmt: skip


# -- signed distance maps --


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
