"""Teachers: the moving average, noise, and the consistency of UA-MT, TCSE and DoubleUnc by hand."""

import math

import pytest
import torch
from small_methods import make, make_batch

from losses.ema import ema_decay, ema_update, make_teacher
from losses.perturbation import Transformation, noisy
from losses.terms import entropy, masked_mean
from methods import METHODS
from methods.ua_mt import UAMT
from networks.vnet import VNet
from utils.options import fill

# -- the moving average --


def test_the_average_of_a_constant_student_is_that_student_with_its_batch_norm_statistics():
    student = VNet(heads={"seg": 1}, filters=2).train()
    teacher = make_teacher(VNet(heads={"seg": 1}, filters=2)).train()
    student(torch.randn(2, 1, 16, 16, 16))  # moves the running statistics
    for iteration in range(2):
        teacher(5 + torch.randn(2, 1, 16, 16, 16))  # the teacher's own forwards leave no trace
        ema_update(teacher, student, ema_decay(iteration, 0.99))
        wanted = student.state_dict()
        assert any(name.endswith("running_var") for name in wanted)
        for name, value in teacher.state_dict().items():
            assert torch.equal(value, wanted[name]), name


def test_the_average_is_the_recursion_of_the_paper():
    teacher, student = (torch.nn.BatchNorm3d(1).double() for _ in range(2))
    expected = 0.0
    for iteration in range(300):
        alpha = min(1 - 1 / (iteration + 1), 0.99)
        value = math.sin(iteration)
        student.weight.data.fill_(value)
        student.running_mean.fill_(2 * value)
        ema_update(teacher, student, ema_decay(iteration, 0.99))
        expected = alpha * expected + (1 - alpha) * value
        assert teacher.weight.item() == pytest.approx(expected, abs=1e-12)
        assert teacher.running_mean.item() == pytest.approx(2 * expected, abs=1e-12)
    assert [ema_decay(t, 0.99) for t in (0, 1, 98, 99, 100, 5999)] == pytest.approx([0, 0.5, 98 / 99, 0.99, 0.99, 0.99])


# -- noise and stochastic passes --


def test_noise_has_its_spread_and_is_clipped_at_two():
    torch.manual_seed(0)
    x = torch.zeros(1, 1, 40, 40, 40)
    d = noisy(x, 0.1)
    assert d.abs().max() <= 0.2 and d.mean().abs() < 1e-3
    # A normal variable clipped at two standard deviations has variance 0.92079 of its own.
    assert d.var().item() == pytest.approx(0.01 * 0.92079, rel=0.02)
    assert torch.equal(noisy(x + 3, 0.0), x + 3)


# -- UA-MT --


def test_entropy_is_that_of_a_coin():
    p = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    coin = [-sum(q * math.log(q) for q in (x, 1 - x) if q) for x in p.tolist()]
    torch.testing.assert_close(entropy(p), torch.tensor(coin, dtype=torch.float64), atol=2e-5, rtol=0)
    shifted = [-sum(q * math.log(q + 1e-3) for q in (x, 1 - x)) for x in p.tolist()]
    torch.testing.assert_close(entropy(p, 1e-3), torch.tensor(shifted, dtype=torch.float64), atol=1e-15, rtol=0)
    assert entropy(torch.rand(10000)).min() >= 0 and entropy(torch.rand(10000)).max() <= math.log(2) + 1e-7


def test_the_threshold_of_ua_mt_rises_from_its_first_value_to_ln_2():
    method = UAMT(UAMT.Options(filters=2), iterations=6000)
    result = [method.threshold(t) for t in (0, 1500, 3000, 4500, 5999)]
    assert result == pytest.approx([0.5210, 0.5303, 0.5695, 0.6466, 0.6931], abs=5e-5)
    assert method.threshold(6000) == pytest.approx(math.log(2), abs=1e-12)


def test_ua_mt_counts_certain_voxels_alone(monkeypatch):
    method, batch = make("ua-mt"), make_batch()
    p = torch.full((2, 1, 16, 16, 16), 0.8)
    q = torch.full_like(p, 0.5)
    q[0], p[1] = 0.6, 0.1
    uncertain = torch.zeros_like(p)
    uncertain[1] = math.log(2)
    monkeypatch.setattr(method, "teach", lambda image: q)
    monkeypatch.setattr(method, "uncertainty", lambda image: uncertain)
    result, monitors = method.consistency(p, batch["image"][2:], 10)
    assert result.item() == pytest.approx(0.04) and monitors["certain_share"].item() == 0.5
    uncertain[:] = math.log(2)
    assert method.consistency(p, batch["image"][2:], 10)[0] == 0
    assert masked_mean(p, torch.zeros_like(p)) == 0


def test_the_preset_authors_of_ua_mt_is_the_released_loss():
    """In float64, of the logits that student and teacher gave: two channels, mean over both, p log(p + 1e-6)."""
    kind = METHODS["ua-mt"]
    torch.manual_seed(0)
    method = kind(fill(kind.Options, {"filters": 2}, kind.PRESETS["authors"]), iterations=6000).double().train()
    method.student.heads["seg"][0].weight.data *= 40  # some voxels are certain, some are not
    ema_update(method.teacher, method.student, 0)
    batch, seen = make_batch(), {"student": [], "teacher": []}
    batch["image"] = batch["image"].double()
    for name, outputs in seen.items():
        getattr(method, name).register_forward_hook(lambda m, x, y, outputs=outputs: outputs.append(y["seg"]))

    def released(threshold):
        (logits,), (target, *passes) = seen["student"], seen["teacher"]
        assert len(passes) == 4 and all(len(two) == 4 for two in passes)
        mean = sum(two.softmax(dim=1).view(2, 2, 2, 16, 16, 16).sum(dim=0) for two in passes) / 8
        U = -(mean * torch.log(mean + 1e-6)).sum(dim=1, keepdim=True)
        mask = U.lt(threshold).double()
        distance = (logits[2:].softmax(dim=1) - target.softmax(dim=1)) ** 2
        consistency = (mask * distance).sum() / (2 * mask.sum() + 1e-16)
        p, y = logits[:2].softmax(dim=1)[:, 1], batch["label"].double()
        dice = 1 - (2 * (p * y).sum() + 1e-5) / ((p * p).sum() + (y * y).sum() + 1e-5)
        supervised = 0.5 * (torch.nn.functional.cross_entropy(logits[:2], batch["label"].long()) + dice)
        weight = 0.1 * math.exp(-5 * (1 - (3123 // 150) / 40) ** 2)
        return supervised + weight * consistency, U, mask

    usual = (0.75 + 0.25 * math.exp(-5 * (1 - 3123 / 6000) ** 2)) * math.log(2)
    assert method.threshold(3123) == pytest.approx(usual, rel=1e-14)
    torch.manual_seed(3)
    losses = method(batch, 3123)
    wanted, _, mask = released(usual)
    assert 0.1 < mask.mean() < 0.9 and losses.monitors["certain_share"].item() == mask.mean().item()
    assert losses.total.item() == pytest.approx(wanted.item(), rel=2e-15)
    weights = list(method.student.parameters())
    ours, theirs = (
        torch.cat([g.flatten() for g in torch.autograd.grad(x, weights, retain_graph=True)])
        for x in (losses.total, wanted)
    )
    assert (ours - theirs).norm() < 1e-12 * theirs.norm()


# -- TCSE --


def test_the_transformation_inverts_exactly():
    x = torch.randn(12, 2, 16, 16, 8)
    for seed in range(5):
        torch.manual_seed(seed)
        pi = Transformation.draw(x.shape)
        assert torch.equal(pi.inverse(pi(x)), x) and torch.equal(pi(pi.inverse(x)), x)
        assert torch.equal(pi.kept(x), torch.ones_like(x))


def test_the_transformation_is_one_of_the_eight_symmetries_of_the_square_or_four_of_a_rectangle():
    square = torch.arange(4.0).view(1, 1, 2, 2, 1)
    x = square.expand(400, 1, 2, 2, 1)
    orbit = {tuple(y.flatten().tolist()) for y in Transformation.draw(x.shape)(x)}
    turned = [torch.rot90(t, k, (0, 1)) for t in (square[0, 0], square[0, 0].transpose(0, 1)) for k in range(4)]
    assert orbit == {tuple(t.flatten().tolist()) for t in turned} and len(orbit) == 8
    x = torch.arange(6.0).view(1, 1, 3, 2, 1).expand(400, 1, 3, 2, 1)
    pi = Transformation.draw(x.shape)
    assert pi(x).shape == x.shape and len({tuple(y.flatten().tolist()) for y in pi(x)}) == 4
    assert torch.equal(pi.inverse(pi(x)), x)


def test_a_zoom_magnifies_about_the_centre_and_knows_what_left_the_field():
    axis = torch.arange(32.0) - 15.5
    x = (axis.view(32, 1, 1) + 2 * axis.view(1, 32, 1)).expand(1, 1, 32, 32, 4)
    pi = Transformation([0], [False], [1.25])
    inner = (..., slice(4, 28), slice(4, 28), slice(None))
    torch.testing.assert_close(pi(x)[inner], (x / 1.25)[inner], atol=1e-4, rtol=0)  # linear maps stay linear
    kept = pi.kept(x)
    assert kept[..., 16, 16, :].min() == 1 and kept[..., 0, :, :].max() == 0
    assert 0.56 < kept.mean() < 0.64  # (1 / 1.25)^2 = 0.64, less the voxels on the rim
    torch.testing.assert_close((pi.inverse(pi(x)) * kept)[inner], (x * kept)[inner], atol=1e-4, rtol=0)
    shrink = Transformation([0], [False], [0.8])
    assert shrink.kept(x)[..., 2:-2, 2:-2, :].min() == 1


@pytest.mark.parametrize("scale", [0.0, 0.2])
def test_tcse_is_zero_when_the_teacher_moves_with_its_image(scale, monkeypatch):
    method = make("tcse", scale=scale, noise=0.0)
    ramp = torch.linspace(0.1, 0.9, 16).view(1, 1, 16, 1, 1).expand(4, 1, 16, 16, 16)
    monkeypatch.setattr(method, "teach", lambda image: image)  # equivariant: what it says moves with what it sees
    for seed in range(4):
        torch.manual_seed(seed)
        assert method.consistency(ramp, ramp, 3)[0] < 1e-9
        assert method.consistency(1 - ramp, ramp, 3)[0] > 0.05


# -- DoubleUnc --


def test_the_feature_uncertainty_is_the_entropy_of_the_mean_channel_shares(monkeypatch):
    method = make("double-unc", filters=4, passes=2)
    certain, even = torch.zeros(2, 4, 16, 16, 16), torch.zeros(2, 4, 16, 16, 16)
    certain[:, 0] = 100.0
    passes = [certain, even]
    monkeypatch.setattr(method.teacher, "features", lambda x: [even[:0]] + [torch.cat(passes)] * 4)
    monkeypatch.setattr(method.teacher, "read", lambda maps: {"seg": torch.zeros(4, 1, 16, 16, 16)})
    q, U_f = method.bayesian_teacher(torch.zeros(2, 1, 16, 16, 16))
    shares = [0.625, 0.125, 0.125, 0.125]  # mean of (1,0,0,0) and (1/4,1/4,1/4,1/4)
    expected = -sum(c * math.log(c) for c in shares) / math.log(4)
    torch.testing.assert_close(U_f, torch.full_like(U_f, expected))
    assert torch.equal(q, torch.full_like(q, 0.5))


def test_double_unc_s_consistency_is_its_equation(monkeypatch):
    image = torch.zeros(2, 1, 16, 16, 16)
    q, U_f = torch.full_like(image, 0.9), torch.full_like(image, 0.4)
    h = {x: -(x * math.log(x) + (1 - x) * math.log(1 - x)) / math.log(2) for x in (0.3, 0.9)}
    for learnable, expected in (
        (True, math.exp(-0.4 - h[0.3]) * 0.36 + 0.5 * h[0.3]),
        (False, math.exp(-0.4 - h[0.9]) * 0.36),
    ):
        method = make("double-unc", learnable=learnable, gamma=0.5)
        monkeypatch.setattr(method, "bayesian_teacher", lambda x: (q, U_f))
        p = torch.full_like(image, 0.3, requires_grad=True)
        result, _ = method.consistency(p, image, 3)
        assert result.item() == pytest.approx(expected, rel=1e-5)
        slope = 2 * -0.6 * math.exp(-0.4 - h[0.9 if not learnable else 0.3])
        if learnable:  # dU_s/dp = ln((1-p)/p) / ln 2
            d = math.log(0.7 / 0.3) / math.log(2)
            slope += d * (0.5 - math.exp(-0.4 - h[0.3]) * 0.36)
        (g,) = torch.autograd.grad(result, p)
        assert g.sum().item() == pytest.approx(slope, rel=1e-4)
