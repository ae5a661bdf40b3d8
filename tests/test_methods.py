"""What each method promises, on tiny cubes: which network learns from what, and the numbers of its paper."""

import copy
import dataclasses
import math
import re

import pytest
import torch
from conftest import ROOT
from small_methods import T, make, make_batch, with_sdm

from methods import METHODS, restore
from networks.critics import MapCritic
from networks.vnet import parameter_count


@pytest.mark.parametrize("name", METHODS)
def test_a_longer_training_takes_the_weights_of_a_shorter_one(name):
    """As --resume RUN --iterations N does."""
    short = make(name)
    options = {**vars(short.options), "method": name, "iterations": 2 * T}
    longer = restore({"file": "last.pt", "options": options, "method": short.state_dict()})
    assert longer.iterations == 2 * T
    for key, weight in short.state_dict().items():
        assert not isinstance(weight, torch.Tensor) or torch.equal(weight, longer.state_dict()[key]), key


NOT_THERE = {  # of a batch without unlabeled crops, with options that leave none of these terms
    "cps": ({"pseudo_on": "unlabeled"}, {"pseudo"}),
    "dtml-plus": ({}, {"pseudo_seg", "pseudo_mask"}),
    "bcp": ({}, {"pseudo_seg"}),
    "ad-mt": ({}, {"pseudo"}),
    "unimatch": ({}, {"features", "strong"}),
    "dk-uxnet": ({"consistency_terms": "none", "query_channels": 16, "groups": [3, 2], "levels": [8, 4]}, set()),
}


@pytest.mark.parametrize("name", NOT_THERE)
def test_the_log_has_no_weight_above_0_of_terms_that_are_not_there(name):
    options, constant = NOT_THERE[name]
    losses = make(name, **options)(make_batch(labeled=4, unlabeled=0), T - 1)
    assert {key for key, term in losses.terms.items() if not term.requires_grad} == constant
    assert all(losses.terms[key] == 0 for key in constant)
    assert set(losses.weights.values()) <= {0.0}
    assert losses.total.item() == pytest.approx(
        sum({"qd": 0.1, "deep": 0.1}.get(key, 1) * term.item() for key, term in losses.terms.items()), rel=1e-6
    )


WITH_RAMP_END = [name for name, kind in METHODS.items()
                 if {"lambda_max", "ramp_end"} <= {f.name for f in dataclasses.fields(kind.Options)}]  # fmt: skip


@pytest.mark.parametrize("name", WITH_RAMP_END)
def test_lambda_is_a_gaussian_ramp_that_ends_at_the_share_of_the_iterations(name):
    method, batch = make(name, ramp_end=0.5, lambda_max=0.7), with_sdm(make_batch())
    expected = {0: 0.7 * math.exp(-5), T // 4: 0.7 * math.exp(-5 / 4), T // 2: 0.7, T - 1: 0.7}
    assert {t: method(batch, t).weights["lambda"] for t in expected} == pytest.approx(expected)
    assert make(name, ramp_end=0.0, lambda_max=0.7)(batch, 0).weights["lambda"] == 0.7  # at once


@pytest.mark.parametrize("name", ["ua-mt", "mean-teacher"])
def test_without_weight_the_mean_teachers_need_no_unlabeled_crops(name):
    """The control on labels alone: the loss is L_seg, whatever crops the consistency is on."""
    method, batch = make(name, lambda_max=0.0, consistency_on="unlabeled"), make_batch(unlabeled=0)
    losses = method(batch, T // 2)
    assert not method.needs_unlabeled and losses.total.item() == losses.terms["seg"].item() > 0


# -- DTC and SASSNet --


def test_dtc_s_total_is_its_equation():
    method, batch = make("dtc", k=7.0).eval(), with_sdm(make_batch())
    losses = method(batch, 30)
    q, z = (x.detach().double() for x in method.heads(method.network(batch["image"])))
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
    """And docs/curves.md names every curve. A pass there and back moves no weight, a teacher's neither, so that a loss
    that is not finite can still be refused."""
    method, batch = make(name, **options), with_sdm(make_batch() if METHODS[name].uses_unlabeled else make_batch(4, 0))
    for p in method.parameters():
        p.data *= 1 + 0.01 * p.requires_grad  # away from its average
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    losses = method(batch, T - 1)
    losses.total.backward()
    assert all(torch.equal(before[name], p) for name, p in method.named_parameters())
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
