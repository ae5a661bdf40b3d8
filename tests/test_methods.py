"""What each method promises, on tiny cubes: which network learns from what, and the numbers of its paper."""

import copy
import math

import pytest
import torch

from methods import METHODS
from methods.ua_mt import UAMT
from networks.vnet import VNet
from utils.ema import ema_decay, ema_update, make_teacher
from utils.losses import entropy, masked_mean
from utils.options import fill
from utils.perturbation import monte_carlo, noisy

T = 60


def make(name, **options):
    """The method of the table with 2 filters, in training mode."""
    torch.manual_seed(0)
    kind = METHODS[name]
    return kind(fill(kind.Options, {"filters": 2, **options}), iterations=T).train()


def make_batch(labeled=2, unlabeled=2, side=16):
    """Noisy half cubes, the labeled ones first."""
    g = torch.Generator().manual_seed(1)
    label = torch.zeros(labeled + unlabeled, side, side, side, dtype=torch.uint8)
    label[:, side // 4 : side // 2] = 1
    image = label[:, None] + 0.3 * torch.randn(label[:, None].shape, generator=g)
    names = [f"case{i}" for i in range(len(label))]
    return {"image": image, "label": label[:labeled], "case": names}


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
    x = torch.zeros(1, 1, 40, 40, 40)
    d = noisy(x, 0.1)
    assert d.abs().max() <= 0.2 and d.mean().abs() < 1e-3
    # A normal variable clipped at two standard deviations has variance 0.92079 of its own.
    assert d.var().item() == pytest.approx(0.01 * 0.92079, rel=0.02)
    assert torch.equal(noisy(x + 3, 0.0), x + 3)


@pytest.mark.parametrize("passes", [1, 4, 5])
def test_stochastic_passes_are_as_many_as_asked_and_differ(passes):
    network = make_teacher(VNet(heads={"seg": 1}, filters=2)).eval()
    image = torch.randn(3, 1, 16, 16, 16)
    found = [x["seg"].unflatten(0, (-1, 3)) for x in monte_carlo(network, image, passes=passes, noise=0.1)]
    every = torch.cat(found)
    assert every.shape[:2] == (passes, 3) and not every.requires_grad
    assert all(not torch.equal(every[i], every[j]) for i in range(passes) for j in range(i))
    assert not network.training and torch.is_grad_enabled()


# -- UA-MT --


def test_entropy_is_that_of_a_coin():
    p = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    coin = [-sum(q * math.log(q) for q in (x, 1 - x) if q) for x in p.tolist()]
    torch.testing.assert_close(entropy(p), torch.tensor(coin, dtype=torch.float64), atol=2e-5, rtol=0)
    assert entropy(torch.rand(10000)).min() >= 0 and entropy(torch.rand(10000)).max() <= math.log(2) + 1e-7


def test_the_threshold_of_ua_mt_rises_from_its_first_value_to_ln_2():
    method = UAMT(UAMT.Options(filters=2), iterations=6000)
    found = [method.threshold(t) for t in (0, 1500, 3000, 4500, 5999)]
    assert found == pytest.approx([0.5210, 0.5303, 0.5695, 0.6466, 0.6931], abs=5e-5)
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
    found, monitors = method.consistency(p, batch["image"][2:], 10)
    assert found.item() == pytest.approx(0.04) and monitors["certain_share"].item() == 0.5
    uncertain[:] = math.log(2)
    assert method.consistency(p, batch["image"][2:], 10)[0] == 0
    assert masked_mean(p, torch.zeros_like(p)) == 0


def test_the_mean_teachers_target_has_no_gradient():
    for name in ("mean-teacher", "ua-mt"):
        method, batch = make(name, lambda_max=1.0), make_batch()
        before = copy.deepcopy(method.teacher.state_dict())
        losses = method(batch, T - 1)
        losses.terms["consistency"].backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.student.heads.parameters()), name
        assert all(p.grad is None for p in method.teacher.parameters())
        floats = [k for k, v in before.items() if v.is_floating_point()]
        assert all(torch.equal(before[k], method.teacher.state_dict()[k]) for k in floats)
