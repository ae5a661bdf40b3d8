"""UniMatch: its losses from the formulas in numpy, its views, and what gets a gradient."""

from functools import partial

import by_hand
import numpy as np
import pytest
import torch

from methods.unimatch import LARGEST, SMALLEST, UniMatch, confidence
from networks.backbones import BACKBONES
from tools.command_line import combine
from utils.masks import label_maps

make = partial(by_hand.make, "unimatch")
batch = partial(by_hand.batch, unlabeled=3)


def p_by_hand(x, softmax):
    e = np.exp(x)
    return (e / e.sum(1, keepdims=True))[:, 1:] if softmax else e / (1 + e)


def dice_by_hand(p, y, a):
    """The mean over classes of the Dice loss weighted by a."""
    return np.mean([
        1 - (2 * (a * p[:, c] * (y == c + 1)).sum() + 1e-5) / ((a * (p[:, c] ** 2 + (y == c + 1))).sum() + 1e-5)
        for c in range(p.shape[1])
    ])  # fmt: skip


def ce_by_hand(p, y, a, softmax):
    hot = np.stack([y == c + 1 for c in range(p.shape[1])], axis=1)
    if softmax:
        chosen = np.where(hot.any(1), (hot * p).sum(1), 1 - p.sum(1))
        return -(a * np.log(chosen)).mean()
    return -(a[:, None] * np.where(hot, np.log(p), np.log(1 - p))).mean()


@pytest.mark.parametrize("pseudo_loss", ["ce", "dice"])
@pytest.mark.parametrize(("classes", "softmax"), [(1, False), (2, False), (2, True)])
def test_the_loss_is_the_formula_in_numpy(classes, softmax, pseudo_loss, monkeypatch):
    method = make(classes=classes, softmax=softmax, pseudo_loss=pseudo_loss, threshold=0.8, cutmix=1.0, strong=0.0)
    data, outputs, boxes = batch(classes), [], []
    read, box = method.network.read, method.box

    def note(features):  # logits that are sure of themselves in some voxels
        out = {"seg": 4 * read(features)["seg"] + 2 * torch.randn(len(features[-1]), 1, 16, 16, 16).double()}
        outputs.append(out["seg"].detach().numpy())
        return out

    monkeypatch.setattr(method.network, "read", note)
    monkeypatch.setattr(method, "box", lambda sides: boxes.append(box(sides)) or boxes[-1])
    result = method(data, 3)
    first, strong = outputs
    assert first.shape[0] == 2 + 3 + 3 and strong.shape[0] == 3 + 3 and len(boxes) == 6
    p, p_f, p_s = p_by_hand(first[:5], softmax), p_by_hand(first[5:], softmax), p_by_hand(strong, softmax)
    whole = np.concatenate([1 - p.sum(1, keepdims=True), p], axis=1)[2:]
    y = whole.argmax(1) if classes > 1 else (p[2:, 0] > 0.5).astype(int)
    a = (whole.max(1) >= 0.8).astype(float)
    assert 0.05 < a.mean() < 0.95
    mixed_y, mixed_a = [], []
    for view in range(2):
        inside = np.stack([boxes[3 * view + i].numpy() for i in range(3)])
        mixed_y.append(np.where(inside, y[[2, 0, 1]], y))
        mixed_a.append(np.where(inside, a[[2, 0, 1]], a))

    def H(p, y, a):
        return dice_by_hand(p, y, a) if pseudo_loss == "dice" else ce_by_hand(p, y, a, softmax)

    label, one = data["label"].numpy(), np.ones((2, 16, 16, 16))
    seg = 0.5 * (ce_by_hand(p[:2], label, one, softmax) + dice_by_hand(p[:2], label, one))
    features = H(p_f, y, a)
    views = [H(p_s[3 * i : 3 * i + 3], mixed_y[i], mixed_a[i]) for i in range(2)]
    expected = {"seg": seg, "features": features, "strong": sum(views) / 2}
    assert {name: x.item() for name, x in result.terms.items()} == pytest.approx(expected, rel=1e-10)
    total = seg + 0.5 * features + 0.25 * views[0] + 0.25 * views[1]
    assert result.total.item() == pytest.approx(total, rel=1e-10)


@pytest.mark.parametrize("profile", ["full", "hippocampus"])
def test_the_preset_authors_minimises_half_of_the_sum_at_the_usual_learning_rate(profile):
    """Half of the learning rate would not do the same with AdamW, as on the hippocampus."""
    chosen = {"method": "unimatch", "profile": profile, "data": "set"}
    usual, authors = (combine({**chosen, "preset": preset}, UniMatch)[0] for preset in ("paper", "authors"))
    names = ("optimizer", "lr", "weight_decay", "momentum", "lr_schedule", "lr_steps")
    assert [getattr(authors, name) for name in names] == [getattr(usual, name) for name in names]
    result = make(**UniMatch.PRESETS["authors"], threshold=0.0)(batch(), 3)
    seg, features, strong = (result.terms[name].item() for name in ("seg", "features", "strong"))
    assert result.total.item() == pytest.approx((seg + 0.5 * features + 0.5 * strong) / 2, rel=1e-12)


def test_confidence_is_that_of_the_label():
    p = torch.tensor([[0.1, 0.7], [0.2, 0.3], [0.02, 0.97]], dtype=torch.float64).view(3, 2, 1, 1, 1)
    assert label_maps(p).flatten().tolist() == [2, 0, 2]
    assert confidence(p).flatten().tolist() == pytest.approx([0.7, 0.5, 0.97])
    assert confidence(p[:, :1]).flatten().tolist() == pytest.approx([0.9, 0.8, 0.98])


def test_boxes_have_their_volume_and_their_frequency():
    method, sides = make(cutmix=0.5), (32, 32, 32)
    torch.manual_seed(2)
    volumes = torch.stack([method.box(sides).double().mean() for _ in range(400)])
    kept = volumes[volumes > 0]
    assert 160 < len(kept) < 240 and kept.max() <= LARGEST and kept.min() > 0.6 * SMALLEST  # sides are rounded down
    assert not make(cutmix=0.0).box(sides).any()


def test_pseudo_labels_get_no_gradient_and_unsure_voxels_count_nothing():
    data = batch()
    losses = make(threshold=1.0)(data, 3)
    assert losses.terms["features"] == losses.terms["strong"] == 0 == losses.monitors["pseudo/confident"]
    method = make(threshold=0.0, feature_weight=0.0, cutmix=0.0, strong=0.0)
    method.network.eval()  # no statistics of a batch, by which the labeled loss would read unlabeled crops too
    data["image"].requires_grad_(True)
    stop = method.network.register_forward_hook(lambda module, inputs, out: {"seg": out["seg"].detach()})
    losses = method(data, 3)  # the strong views alone go through `forward`: only the pseudo-labels read the others
    stop.remove()
    losses.total.backward()
    assert losses.terms["strong"] > 0 and data["image"].grad[:2].abs().sum() > 0 == data["image"].grad[2:].abs().sum()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_features_lose_whole_channels_of_every_map(backbone, monkeypatch):
    method, data, seen = make(backbone=backbone), batch(), []
    decode = method.network.decode
    monkeypatch.setattr(method.network, "decode", lambda maps: seen.append(maps) or decode(maps))
    method(data, 3)
    assert [len(x) for x in seen[0]] == [8] * 5 and [len(x) for x in seen[1]] == [6] * 5
    for x in seen[0]:
        clean, dropped = x[2:5].flatten(2), x[5:].flatten(2)
        lost = (dropped == 0).all(-1)
        torch.testing.assert_close(dropped, torch.where(lost[..., None], 0.0, 2 * clean))
    assert 0.3 < torch.cat([(x[5:].flatten(2) == 0).all(-1).flatten() for x in seen[0]]).double().mean() < 0.9
