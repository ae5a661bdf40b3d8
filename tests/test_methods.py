"""What each method promises, on tiny cubes: which network learns from what, and the numbers of its paper."""

import copy
import math
import re

import pytest
import torch
from conftest import ROOT

from losses.ema import ema_decay, ema_update, make_teacher
from losses.perturbation import Transformation, noisy
from losses.sdm import signed_distance_map
from losses.terms import entropy, masked_mean
from methods import METHODS, restore
from methods.ua_mt import UAMT
from networks.critics import MapCritic
from networks.vnet import VNet, parameter_count
from utils.options import fill

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


def with_sdm(batch):
    """The batch with the signed distance maps of its labels."""
    maps = [torch.from_numpy(signed_distance_map(y.numpy())) for y in batch["label"]]
    return {**batch, "sdm": torch.stack(maps)[:, None]}


@pytest.mark.parametrize("name", METHODS)
def test_a_longer_training_takes_the_weights_of_a_shorter_one(name):
    """As --resume RUN --iterations N does."""
    short = make(name)
    options = {**vars(short.options), "method": name, "iterations": 2 * T}
    longer = restore({"file": "last.pt", "options": options, "method": short.state_dict()})
    assert longer.iterations == 2 * T
    for key, weight in short.state_dict().items():
        assert not isinstance(weight, torch.Tensor) or torch.equal(weight, longer.state_dict()[key]), key


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


# -- DTC and SASSNet --


def test_dtc_s_total_is_its_equation():
    method, batch = make("dtc", k=7.0).eval(), with_sdm(make_batch())
    losses = method(batch, 30)
    q, z = (x.detach().double() for x in method.heads(batch["image"]))
    y = batch["label"][:, None].double()
    dice = 1 - (2 * (q[:2] * y).sum() + 1e-5) / ((q[:2] ** 2).sum() + (y**2).sum() + 1e-5)
    distance = ((z[:2] - batch["sdm"]) ** 2).mean()
    consistency = ((1 / (1 + torch.exp(7 * z)) - q) ** 2).mean()
    expected = dice + 0.3 * distance + math.exp(-5 * 0.25) * consistency
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_sassnet_s_critic_has_the_published_size_and_takes_any_patch():
    assert parameter_count(MapCritic()) == 11_020_290
    critic = MapCritic(filters=4)
    for shape in ((16, 16, 16), (48, 48, 32), (112, 112, 80)):
        assert critic(torch.zeros(1, 1, *shape), torch.zeros(1, 1, *shape)).shape == (1, 2)


@pytest.mark.parametrize("name", ["sassnet", "asdnet"])
def test_the_critic_s_step_moves_the_critic_alone(name):
    method, batch = make(name), with_sdm(make_batch())
    method(batch, 3).total.backward()
    assert all(p.grad is None and not p.requires_grad for p in method.adversary.parameters())
    assert all(p.grad is not None for p in method.network.parameters())
    before = copy.deepcopy(method.state_dict())
    method.after_step(batch, 3)
    after = method.state_dict()
    moved = {k for k, v in before.items() if isinstance(v, torch.Tensor) and not torch.equal(v, after[k])}
    assert moved and all(k.startswith("adversary.critic.") for k in moved)
    weights = {k for k, _ in method.named_parameters() if k.startswith("adversary")}
    assert weights <= moved, weights - moved  # every weight of the critic, deep ones too
    assert method.network.training and not method.adversary.critic.training
    assert all(p.grad is None for p in method.adversary.parameters())


def test_sassnet_s_critic_weighs_both_kinds_of_crops_alike_whatever_their_numbers(monkeypatch):
    """A critic that always gives the same two logits is best, with a gradient of 0, at even odds."""
    method, batch = make("sassnet"), with_sdm(make_batch(labeled=4, unlabeled=2))
    logits = torch.zeros(1, 2, requires_grad=True)
    monkeypatch.setattr(
        method.adversary, "step", lambda loss, *_: loss(lambda z, image: logits.expand(len(z), 2)).backward()
    )
    method.after_step(batch, 3)
    assert logits.grad is not None and logits.grad.abs().max() < 1e-7


# -- ASDNet --


@pytest.mark.parametrize("attention", ["relative", "released", "none"])
def test_asdnet_s_total_is_its_equation(attention):
    method, batch = make("asdnet", threshold=0.45, attention=attention).eval(), make_batch()
    losses = method(batch, T // 2)
    with torch.no_grad():
        x = method.network(batch["image"])["seg"].double()
        p = 1 / (1 + torch.exp(-x))
        scores = method.adversary(torch.cat([1 - p, p], dim=1).float()).double()
    M = scores.softmax(dim=1)[:, 1:]
    y = batch["label"][:, None].double()
    total = -0.05 * scores.log_softmax(dim=1)[:, 1].mean()
    w = {i: (1 - M[i]) ** 2 for i in range(2)}
    a = {i: 1 + 12.5 * ((1 - M[i]).mean() - 0.5) ** 2 - 0.5 for i in range(2)}
    if attention == "relative":
        w_mean, a_mean = (w[0].mean() + w[1].mean()) / 2, (a[0] + a[1]) / 2
        w, a = ({i: x[i] / mean for i in x} for x, mean in ((w, w_mean), (a, a_mean)))
    if attention == "none":
        w, a = {0: 1, 1: 1}, {0: 1, 1: 1}
    ce = overlap = size = 0
    for i in range(2):
        ce += a[i] * (w[i] * -(y[i] * p[i].log() + (1 - y[i]) * (1 - p[i]).log())).mean() / 2
        overlap, size = overlap + a[i] * (p[i] * y[i]).sum(), size + a[i] * ((p[i] ** 2).sum() + y[i].sum())
    total += 0.5 * (ce + (a[0] + a[1]) / 2 * (1 - (2 * overlap + 1e-5) / (size + 1e-5)))
    own = torch.maximum(p[2:], 1 - p[2:])
    chosen = M[2:] > 0.45
    assert 0 < chosen.double().mean() < 1
    total += 0.1 * -own[chosen].log().mean()
    assert losses.total.item() == pytest.approx(total.item(), rel=1e-4)


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
        found, _ = method.consistency(p, image, 3)
        assert found.item() == pytest.approx(expected, rel=1e-5)
        slope = 2 * -0.6 * math.exp(-0.4 - h[0.9 if not learnable else 0.3])
        if learnable:  # dU_s/dp = ln((1-p)/p) / ln 2
            d = math.log(0.7 / 0.3) / math.log(2)
            slope += d * (0.5 - math.exp(-0.4 - h[0.3]) * 0.36)
        (g,) = torch.autograd.grad(found, p)
        assert g.sum().item() == pytest.approx(slope, rel=1e-4)


# -- every method --

UNSUPERVISED = {
    "dtml": ["consistency"],
    "dtml-plus": ["pseudo_seg+pseudo_mask"],  # each moves one network
    "mean-teacher": ["consistency"],
    "ua-mt": ["consistency"],
    "tcse": ["consistency"],
    "double-unc": ["consistency"],
    "dtc": ["consistency"],
    "sassnet": ["adversarial"],
    "asdnet": ["adversarial", "semi"],
    "dk-uxnet": ["segc", "qdc"],
    "cps": ["pseudo"],
    "bcp": ["pseudo_seg"],
    "ad-mt": ["pseudo"],
    "mc-net-plus": ["consistency"],
    "unimatch": ["features", "strong"],
    "ss-net": ["smoothness+separation"],  # the second moves the separator too
}
LEARNERS = ("M_s", "M_d", "student", "network", "networks", "separator")
# A V-Net with two heads may have one that the term does not read: SASSNet's critic sees the map alone. The assignment
# of DK-UXNet's layers is hard, and its query distribution does not read the classes.
UNREAD = re.compile(r"heads\.|layers\.\d\.predictor\.|classify\.")


def test_every_method_that_uses_unlabeled_scans_is_in_the_table():
    assert set(UNSUPERVISED) == {name for name, kind in METHODS.items() if kind.uses_unlabeled}


@pytest.mark.parametrize(("name", "term"), [(name, term) for name, terms in UNSUPERVISED.items() for term in terms])
def test_the_unsupervised_term_moves_the_student_and_nothing_else(name, term):
    # k and the threshold low enough that tiny untrained networks are not saturated, as in the first iterations.
    low = {key: {"threshold": 0.0} for key in ("asdnet", "ad-mt", "unimatch")}
    options = {"dtml": {"k": 10.0}, "dtc": {"k": 10.0}, **low}.get(name, {})
    method, batch = make(name, **options), with_sdm(make_batch())
    if name == "ua-mt":
        method.threshold = lambda iteration: 1.0
    batch["image"].requires_grad_(True)
    losses = method(batch, T - 1)
    torch.stack([losses.terms[one] for one in term.split("+")]).sum().backward()
    for child, network in method.named_children():
        learns = child in LEARNERS
        body = [p for key, p in network.named_parameters() if not UNREAD.search(key)]
        assert all((p.grad is not None) == learns for p in body), child
        assert sum(p.grad.abs().sum() for p in body if p.grad is not None) > 0 or not learns, child
    assert batch["image"].grad[2:].abs().sum() > 0, "the unlabeled crops do not reach the term"


@pytest.mark.parametrize("name", METHODS)
def test_the_teacher_and_the_critic_are_not_the_optimisers(name):
    for child, network in make(name).named_children():
        trained = {p.requires_grad for p in network.parameters()}
        assert trained == {child in LEARNERS} and (child in LEARNERS or child in ("teacher", "ema", "adversary"))


TAGS = set(re.findall(r"`([a-z_]+(?:/[a-z_]+)?)`", (ROOT / "docs" / "curves.md").read_text(encoding="utf-8")))
FORMS = [*((name, {}) for name in METHODS), ("dtml", {"sdm_loss": "both"}), ("supervised", {"head": "sdm"})]


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_every_trained_weight_has_a_gradient_and_every_output_is_a_probability(name, options):
    """And docs/curves.md names every curve."""
    method, batch = make(name, **options), with_sdm(make_batch() if METHODS[name].uses_unlabeled else make_batch(4, 0))
    losses = method(batch, T - 1)
    losses.total.backward()
    assert {*losses.weights, *losses.monitors, *(f"loss/{term}" for term in losses.terms)} <= TAGS
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    method.after_step(batch, T - 1)
    method.eval()
    with torch.no_grad():
        p = method.predict(batch["image"], method.outputs)
        maps = method.maps(batch["image"])
    assert p.shape == (4, len(method.outputs), 16, 16, 16) and p.min() >= 0 and p.max() <= 1
    assert all(v.shape == (4, 16, 16, 16) for v in maps.values())
    for i, output in enumerate(method.outputs):
        with torch.no_grad():
            torch.testing.assert_close(method.predict(batch["image"], (output,))[:, 0], p[:, i])
