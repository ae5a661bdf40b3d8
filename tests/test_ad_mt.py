"""AD-MT: its turns, its pseudo-labels against the formulas in numpy, its views, its teachers."""

import copy
from functools import partial

import by_hand
import numpy as np
import pytest
import torch

from losses import mixing
from losses.ramps import ramp_up
from methods import ad_mt
from methods.ad_mt import ADMT

make = partial(by_hand.make, "ad-mt", iterations=60)
batch = partial(by_hand.batch, unlabeled=3)


def stub(method: ADMT, count: int, classes: int) -> None:
    """Networks in closed form: each teacher gives drawn logits, the student a function of each voxel."""
    torch.manual_seed(5)
    channels = classes + 1 if classes > 1 else 1
    for teacher in method.ema.values():
        logits = 2 * torch.randn(count, channels, 16, 16, 16, dtype=torch.float64)
        teacher.forward = lambda image, logits=logits: {"seg": logits}
    method.student.forward = lambda image: {"seg": torch.cat([(3 + c) * (image + c).sin() for c in range(channels)], 1)}


def by_formula(q_1: np.ndarray, q_2: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pseudo-label and confidence, voxel by voxel."""
    K = q_1.shape[1]
    voxels = [x.transpose(0, 2, 3, 4, 1).reshape(-1, K) for x in (q_1, q_2, own)]
    labels, sure = [], []
    for a, b, s in zip(*voxels, strict=True):
        w_1, w_2 = (np.exp(sum(x * np.log2(x) for x in q)) for q in (a, b))
        q = (w_1 * a + w_2 * b) / (w_1 + w_2)
        y, c = q.argmax(), q.max()
        if a.argmax() != b.argmax() and s.argmax() != y and s.max() > c:
            y, c = s.argmax(), s.max()
        labels.append(y)
        sure.append(c)
    shape = (len(q_1), *q_1.shape[2:])
    return np.array(labels).reshape(shape), np.array(sure).reshape(shape)


def test_turns_alternate_are_short_and_are_a_function_of_the_seed():
    drawn = [make(iterations=2000).turns for _ in range(2)]
    assert torch.equal(*drawn) and drawn[0].shape == (2000,) and drawn[0][0] == 0
    changes = np.flatnonzero(np.diff(drawn[0].numpy()))
    lengths = np.diff(changes)
    assert set(lengths) == set(range(1, 20)) and lengths.mean() == pytest.approx(10, abs=1.5)
    assert make(iterations=6, period=1).turns.tolist() == [0, 1, 0, 1, 0, 1]
    torch.manual_seed(1)
    other = ADMT(ADMT.Options(filters=2), iterations=2000)
    assert not torch.equal(other.turns, drawn[0])
    other.load_state_dict(make(iterations=2000).state_dict())
    assert torch.equal(other.turns, drawn[0])  # a resumed run has them from its checkpoint
    longer = make(iterations=3000)
    longer.load_state_dict(other.state_dict())
    assert torch.equal(longer.turns[:2000], drawn[0]) and longer.turns[2000:].unique().numel() == 2


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("turn", [0, 1], ids=["the first teacher's turn", "the second's"])
def test_the_losses_are_the_formulas_of_the_docstring(turn, classes, monkeypatch):
    method, data = make(classes=classes, ramp_end=0.5), batch(classes=classes)
    stub(method, 3, classes)
    method.turns[:] = turn
    u, t = data["image"][2:], 15
    boxes = torch.stack([mixing.random_box((16, 16, 16), 0.7) for _ in range(3)])
    monkeypatch.setattr(ad_mt, "mixing_boxes", lambda image: boxes)
    monkeypatch.setattr(ad_mt, "strong_view", lambda image, strength: image.flip(2) * strength)
    result = method(data, t)
    networks = (method.ema.teacher_1, method.ema.teacher_2, method.student)
    q = [by_hand.distribution(network(u)["seg"]) for network in networks]
    assert 0.1 < (q[0].argmax(1) != q[1].argmax(1)).mean() < 0.9
    y, c = by_formula(*q)
    of_teachers, _ = by_formula(q[0], q[1], np.full_like(q[2], 1 / q[2].shape[1]))  # a student that is never surer
    assert 0.001 < (y != of_teachers).mean() < 0.5
    view = u.flip(2) * 0.5
    if turn == 1:
        m, order = boxes.numpy(), [2, 0, 1]
        y, c = np.where(m, y[order], y), np.where(m, c[order], c)
        view = torch.where(boxes[:, None], u[order], u)
    assert 0.05 < (c >= 0.8).mean() < 0.95
    strong, own = (by_hand.distribution(method.student(x)["seg"]) for x in (view, data["image"][:2]))
    seg, pseudo = by_hand.seg(own, data["label"].numpy()), by_hand.ce(strong, y, c >= 0.8)
    assert result.terms["seg"].item() == pytest.approx(seg, rel=1e-6)
    assert result.terms["pseudo"].item() == pytest.approx(pseudo, rel=1e-6)
    assert result.total.item() == pytest.approx(seg + 2 * ramp_up(t, 30) * pseudo, rel=1e-6)
    assert result.monitors["pseudo/sure"].item() == pytest.approx((c >= 0.8).mean(), rel=1e-6)


def test_one_teacher_follows_at_a_time_by_its_own_number_of_updates():
    method = make(iterations=30, period=4)
    name, expected, updates = "heads.seg.0.weight", [None, None], [0, 0]
    for t in range(30):
        method.student.state_dict()[name].add_(torch.randn((), dtype=torch.float64))
        before = copy.deepcopy(method.ema.state_dict())
        method.after_step(batch(), t)
        turn, own = int(method.turns[t]), method.student.state_dict()[name]
        a = min(1 - 1 / (updates[turn] + 1), 0.99)
        expected[turn] = own.clone() if a == 0 else a * expected[turn] + (1 - a) * own
        updates[turn] += 1
        after = method.ema.state_dict()
        torch.testing.assert_close(after[f"teacher_{turn + 1}.{name}"], expected[turn], rtol=1e-12, atol=1e-12)
        others = [key for key in after if not key.startswith(f"teacher_{turn + 1}.")]
        assert others and all(torch.equal(after[key], before[key]) for key in others)
    assert min(updates) > 5 and not any(module.training for module in method.train().ema.modules())
