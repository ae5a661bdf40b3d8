"""SS-Net: both terms from their formulas in numpy, the perturbation, the prototypes, and what gets a gradient."""

import math
from functools import partial

import by_hand
import numpy as np
import pytest
import torch

from losses.perturbation import adversarial, unit_items
from losses.terms import agreement_loss, soft_dice_loss
from methods import METHODS
from methods.ss_net import Separator, best
from networks.batch_norm import BatchNorm3d
from utils.devices import seed_iteration

make = partial(by_hand.make, "ss-net", iterations=100)
batch = by_hand.batch


def test_distances_are_their_formulas():
    torch.manual_seed(2)
    p, q = torch.rand(2, 3, 4, 5, 6, dtype=torch.float64), torch.rand(2, 3, 4, 5, 6, dtype=torch.float64)
    a, b = p.numpy(), q.numpy()
    dice = [1 - (2 * (x * y).sum() + 1e-5) / ((x**2).sum() + (y**2).sum() + 1e-5)
            for x, y in ((a[:, c], b[:, c]) for c in range(3))]  # fmt: skip
    assert soft_dice_loss(p, q).item() == pytest.approx(np.mean(dice), rel=1e-12)
    assert soft_dice_loss(p, p).abs() < 1e-12
    # The released distance of one class: Dice over both softmax channels, without squares.
    both, other = torch.cat([1 - p, p], 1)[:, [0, 3]], torch.cat([1 - q, q], 1)[:, [0, 3]]
    released = 1 - (2 * (both * other).sum() + 1e-8) / (both.sum() + other.sum() + 1e-8)
    assert agreement_loss(p[:, :1], q[:, :1]).item() == pytest.approx(released.item(), rel=1e-9)


def test_the_perturbation_has_its_length_and_the_direction_of_the_gradient():
    torch.manual_seed(3)
    x, a = torch.randn(3, 1, 4, 4, 4, dtype=torch.float64), torch.rand(3, 1, 4, 4, 4, dtype=torch.float64)
    torch.manual_seed(4)
    r = adversarial(lambda y: (a * (y - x) ** 2).sum(), x, xi=10.0, magnitude=7.0)
    torch.manual_seed(4)
    d = unit_items(torch.rand_like(x) - 0.5)
    torch.testing.assert_close(d.flatten(1).norm(dim=1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(r, 7 * unit_items(a * d))
    torch.testing.assert_close(r.flatten(1).norm(dim=1), torch.full((3,), 7.0, dtype=torch.float64))
    assert not r.requires_grad and unit_items(torch.zeros_like(x)).abs().max() == 0
    torch.testing.assert_close(unit_items(1e-30 * a * d), unit_items(a * d))  # whose squares are 0 in float32


def test_smoothness_changes_no_statistics_and_its_target_has_no_gradient():
    method, data = make(), batch()
    p = torch.rand(4, 1, 16, 16, 16, dtype=torch.float64)
    before = {name: x.clone() for name, x in method.named_buffers()}
    method.smoothness(data["image"], p, len(data["label"])).backward()
    assert all(torch.equal(x, before[name]) for name, x in method.named_buffers())
    assert all(w.grad is not None for w in method.network.parameters()) and BatchNorm3d.counts


def test_without_weight_for_the_unlabeled_crops_labels_alone_are_learned_in_one_pass():
    method, data, images = make(lambda_max=0.0), batch(), []
    features = method.network.features
    method.network.features = lambda image: images.append(image) or features(image)
    losses = method(data, 50)
    assert list(losses.terms) == ["seg"] and len(images) == 1
    torch.testing.assert_close(losses.total, losses.terms["seg"])


@pytest.mark.parametrize("batch_norm", ["joint", "separate"])
def test_without_a_perturbation_the_same_dropout_masks_leave_no_distance(batch_norm):
    """Own masks leave some, which has nothing to do with the crops' neighbourhood."""
    distances = {}
    for masks in ("same", "own"):
        torch.manual_seed(7)
        method = make(dropout=0.5, dropout_masks=masks, magnitude=0.0, batch_norm=batch_norm)
        distances[masks] = method(batch(), 50).terms["smoothness"].item()
    assert abs(distances["same"]) < 1e-9 and distances["own"] > 1e-4


def test_the_same_masks_are_new_in_each_iteration():
    method, data = make(dropout=0.5, dropout_masks="same"), batch()
    losses = set()
    for iteration in range(3):
        seed_iteration(7, iteration)
        losses.add(method(data, 50).terms["seg"].item())
    assert len(losses) == 3


def over_all_pairs(separator, maps, predicted, label, *, prototypes, largest, weighed):
    """L_sep of each class, pair by pair, and its number of prototypes; `predicted` and `label` of 0 to 2."""
    L = len(label)
    with torch.no_grad():
        h = separator.h(maps)
        z = separator.k(h)
    rows = {name: x.movedim(1, -1).numpy() for name, x in (("h", h), ("z", z))}
    losses, counts = [], []
    for i, c in enumerate(separator.classes):
        with torch.no_grad():
            score = separator.w[i](h[:L])[:, 0].numpy()
            w = torch.sigmoid(separator.w[i](z))[:, 0].numpy()
        correct = ((label == c) & (predicted[:L] == c)).numpy()
        order = np.argsort(score[correct])
        chosen = rows["h"][:L][correct][order[-prototypes:] if largest else order[:prototypes]]
        q = chosen / np.linalg.norm(chosen, axis=1, keepdims=True)
        v = np.ones(len(q))
        if weighed:
            with torch.no_grad():
                v = torch.sigmoid(separator.v[i](torch.from_numpy(q.T.copy())[None, :, :, None, None])).numpy().ravel()
        loss = 0.0
        for items, y in ((slice(0, L), label), (slice(L, None), predicted[L:])):
            mask = (y == c).numpy()
            features, attention = rows["z"][items][mask], w[items][mask]
            features = features / np.linalg.norm(features, axis=1, keepdims=True)
            pairs = (attention / attention.mean())[:, None] * (v / v.mean())[None] * (1 - features @ q.T)
            loss += pairs.mean()
        losses.append(loss)
        counts.append(len(chosen))
    return losses, counts


@pytest.mark.parametrize("prototypes", [5, 1000])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize(("classes", "weighed"), [((0, 1), True), ((1,), True), ((0, 1, 2), True), ((0, 1), False)])
def test_separation_is_the_sum_over_all_pairs_in_numpy(classes, weighed, largest, prototypes):
    torch.manual_seed(5)
    separator = Separator(3, classes=classes, prototype_attention=weighed).double().train()
    maps = torch.randn(3, 3, 4, 4, 4, dtype=torch.float64)
    label, predicted = torch.randint(0, 3, (2, 4, 4, 4)), torch.randint(0, 3, (3, 4, 4, 4))
    with torch.no_grad():
        result, counts = separator(maps, predicted, label, prototypes=prototypes, largest=largest)
    expected, numbers = over_all_pairs(
        separator, maps, predicted, label, prototypes=prototypes, largest=largest, weighed=weighed
    )
    assert result.tolist() == pytest.approx(expected, rel=1e-10)
    assert counts.tolist() == numbers and all(n == 5 if prototypes == 5 else 5 < n < 64 for n in numbers)


def test_the_preset_authors_gives_all_prototypes_the_same_weight():
    """The released code divides the attention of each prototype by itself; the background has no prototypes."""
    method, data, seen = make(**METHODS["ss-net"].PRESETS["authors"]), batch(), []
    method.network.heads["seg"][0].bias.data.zero_()  # so that both classes are found before any training
    method.separator.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs))
    result = method(data, 20)
    maps, predicted, label = (x.detach() for x in seen)
    (expected,), (number,) = over_all_pairs(
        method.separator, maps, predicted, label, prototypes=32, largest=False, weighed=False
    )
    assert number == 32 and result.terms["separation"].item() == pytest.approx(expected / 2, rel=1e-10)


def test_a_class_without_prototypes_or_voxels_costs_nothing_and_leaves_gradients():
    torch.manual_seed(6)
    separator, maps = Separator(2, classes=(0, 1, 2)).double().train(), torch.randn(2, 2, 4, 4, 4, dtype=torch.float64)
    label = torch.ones(1, 4, 4, 4, dtype=torch.uint8)
    predicted = torch.ones(2, 4, 4, 4, dtype=torch.uint8)
    predicted[0, 1:] = 0
    result, counts = separator(maps, predicted, label, prototypes=32, largest=True)
    assert result[[0, 2]].tolist() == [0, 0] and result[1] > 0 and counts.tolist() == [0, 16, 0]
    result.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in separator.parameters())
    features, is_one = best(torch.ones(1, 2, 4, 4, 4), torch.rand(1, 1, 4, 4, 4), label == 0, 5)
    assert features.abs().max() == 0 and not is_one.any()
    more, fewer = (separator(maps, predicted, label, prototypes=n, largest=True) for n in (1000, 16))
    assert torch.equal(more[0], fewer[0]) and torch.equal(more[1], fewer[1]), "more prototypes than voxels are all"


def test_prototypes_and_the_inputs_of_attention_get_no_gradient():
    """Only k(h) does: with the gradient of z stopped none reaches the feature maps."""
    torch.manual_seed(7)
    separator = Separator(2, classes=(0, 1)).double().train()
    maps = torch.randn(2, 2, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    label, predicted = torch.randint(0, 2, (1, 4, 4, 4)), torch.randint(0, 2, (2, 4, 4, 4))
    stop = separator.k.register_forward_hook(lambda module, inputs, z: z.detach())
    separator(maps, predicted, label, prototypes=8, largest=True)[0].sum().backward()
    assert maps.grad is None and all(p.grad is None for p in separator.h.parameters())
    assert all(p.grad is not None for p in (*separator.w.parameters(), *separator.v.parameters()))
    stop.remove()
    separator(maps, predicted, label, prototypes=8, largest=True)[0].sum().backward()
    assert maps.grad.abs().sum() > 0


@pytest.mark.parametrize("classes", [1, 2])
def test_the_total_is_the_sum_of_its_terms(classes):
    method, data = make(classes=classes), batch(classes)
    losses = method(data, 20)
    t, lambda_ = losses.terms, math.exp(-5 * 0.25)
    assert losses.weights["lambda"] == pytest.approx(lambda_)
    expected = t["seg"] + lambda_ * (t["smoothness"] + 0.1 * t["separation"])
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-12) and t["separation"] > 0
    alone = method({**data, "image": data["image"][:2]}, 20)  # labels alone: both terms of the labeled crops
    assert alone.total.isfinite() and alone.terms["smoothness"] > 0
