"""DK-UXNet: the network against its published sizes, the properties of k-means layers, and its losses by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from losses.terms import dice_ce_loss, nt_xent, one_hot, query_loss
from methods import METHODS
from networks.backbones import BACKBONES
from networks.kmax import KMaXDecoder, KMeansLayer, QueryNet, group_sums, hard_assignment
from networks.uxnet import Depthwise, UXBlock, UXNet
from networks.vnet import parameter_count
from utils.errors import UserError
from utils.options import fill

T = 100
SMALL = {"filters": 4, "query_channels": 16, "groups": [4, 4], "levels": [8, 4]}


def make(preset="repaired", **options):
    torch.manual_seed(0)
    kind = METHODS["dk-uxnet"]
    return kind(fill(kind.Options, kind.PRESETS[preset], SMALL, options), iterations=T).train()


def make_batch(labeled=2, n=4, shape=(32, 32, 16), seed=0):
    """Noisy balls of different sizes and places."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij")).float()
    centre = torch.tensor(shape).view(1, 3, 1, 1, 1) / 2 + 6 * torch.rand(n, 3, 1, 1, 1, generator=generator) - 3
    label = (((grid - centre) ** 2).sum(dim=1) < (5 + 2 * torch.rand(n, 1, 1, 1, generator=generator)) ** 2).to(
        torch.uint8
    )
    image = 2 * label[:, None].float() + 0.3 * torch.randn(n, 1, *shape, generator=generator)
    return {"image": image, "label": label[:labeled], "case": [str(i) for i in range(n)]}


def open_gates(network):
    """Gives the norms that start at 0 a weight, without which much of a layer is switched off."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight.abs().max() == 0:
            nn.init.uniform_(module.weight, 0.5, 1.0)
    return network


# -- UX-Net --


@pytest.mark.parametrize(("kernel", "bias", "of_image"), [(7, True, True), (5, False, True), (7, True, False)])
def test_the_gradients_of_a_depthwise_convolution_are_those_of_torch(kernel, bias, of_image):
    torch.manual_seed(0)
    ours = Depthwise(3, kernel, bias=bias).double()
    theirs = nn.Conv3d(3, 3, kernel, padding=kernel // 2, groups=3, bias=bias).double()
    theirs.load_state_dict(ours.state_dict())
    for shape in ((9, 8, 7), (2, 1, 3)):
        x = torch.randn(2, 3, *shape, dtype=torch.float64)
        inputs = [x.clone().requires_grad_(of_image) for _ in range(2)]
        y, expected = ours(inputs[0]), theirs(inputs[1])
        assert torch.allclose(y, expected, rtol=1e-12)
        g = torch.randn_like(y)
        for out, conv, x in ((y, ours, inputs[0]), (expected, theirs, inputs[1])):
            conv.zero_grad()
            out.backward(g)
            assert (x.grad is not None) == of_image
        pairs = [*zip(ours.parameters(), theirs.parameters(), strict=True), *[inputs] * of_image]
        assert all(torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-12) for a, b in pairs)


def test_parameters_of_ux_net_are_the_published_ones():
    network = UXNet(heads={"seg": 2})
    encoder = (network.stem, network.down, network.stages, network.norms)
    assert sum(map(parameter_count, encoder)) == 1_311_936 and parameter_count(network.stem) == 16_608
    assert [parameter_count(m) for m in network.skips] == [63_552, 377_856, 1_511_424, 6_045_696]
    assert parameter_count(network.bottom) == 24_182_784
    assert [parameter_count(m) for m in network.up] == [14_598_144, 3_649_536, 912_384, 228_096]
    assert parameter_count(network.last) == 124_416 and parameter_count(network.heads) == 98
    assert parameter_count(network) == 53_005_922
    assert parameter_count(UXNet(heads={})) == 52_881_408


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbones_agree_in_the_shapes_of_their_maps(backbone):
    network = BACKBONES[backbone](heads={"seg": 2, "sdm": 1}, filters=2)
    maps = network.features(torch.randn(2, 1, 32, 16, 48))
    assert [tuple(m.shape) for m in maps] == [(2, 2 * s, 32 // s, 16 // s, 48 // s) for s in (16, 8, 4, 2, 1)]
    out = network(torch.randn(2, 1, 32, 16, 48))
    assert out["seg"].shape == (2, 2, 32, 16, 48) and out["sdm"].abs().max() <= 1
    with pytest.raises(ValueError, match="multiple of 16"):
        network(torch.zeros(1, 1, 16, 24, 16))


def test_a_ux_block_begins_as_the_identity_and_is_its_equation():
    block = UXBlock(3)
    x = torch.randn(2, 3, 8, 8, 8)
    torch.testing.assert_close(block(x), x, atol=1e-4, rtol=0)
    nn.init.ones_(block.gamma)
    y = F.conv3d(x, block.depthwise.weight, block.depthwise.bias, padding=3, groups=3)
    y = (y - y.mean(dim=1, keepdim=True)) / (y.var(dim=1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    out = x.clone()
    for c in range(3):  # each channel alone: 1 -> 4 -> 1
        wide = [
            F.gelu(block.expand.weight[4 * c + j].item() * y[:, c] + block.expand.bias[4 * c + j]) for j in range(4)
        ]
        out[:, c] += block.shrink.bias[c] + sum(w * block.shrink.weight[c, j].item() for j, w in enumerate(wide))
    torch.testing.assert_close(block(x), out, atol=1e-5, rtol=1e-4)


# -- the k-means decoder --


def decoder(queries=6, levels=(8, 4), **more):
    torch.manual_seed(0)
    options = {"filters": 4, "classes": 2, "query_channels": 16, "momentum": 0.1} | more
    return KMaXDecoder(queries=queries, levels=levels, **options)


def maps_of(shape=(32, 32, 16), n=2, filters=4):
    return [torch.randn(n, filters * s, *(side // s for side in shape)) for s in (16, 8, 4, 2, 1)]


def test_parameters_of_the_decoder_are_the_published_ones():
    network = QueryNet(UXNet, filters=48, kmax=True, queries=128, query_channels=256, levels=(8, 8, 4, 4),
                       momentum=0.01, train_levels=True)  # fmt: skip
    kmax = network.kmax
    assert [parameter_count(x) for x in kmax.layers] == [1_714_066, 1_714_066, 1_664_914, 1_664_914]
    assert parameter_count(kmax.layers[0].predictor) == 164_738
    assert parameter_count(kmax.predictor) == 85_074 and parameter_count(kmax.mask) == 66_048
    assert parameter_count(kmax.classify) == 2_113_856 and kmax.queries.numel() == 32_768
    assert parameter_count(kmax) == 9_055_706 and parameter_count(network) == 61_937_114


@pytest.mark.parametrize("shape", [(32, 32, 16), (16, 48, 32), (16, 16, 16)])
def test_every_voxel_is_shared_out_among_the_queries(shape):
    result = decoder()(maps_of(shape))
    assert result.logits.shape == (2, 2, *shape) and result.assignment.shape == (2, 6, *shape)
    torch.testing.assert_close(result.assignment.sum(dim=1), torch.ones(2, *shape))
    assert [tuple(M.shape) for M in result.levels] == [(2, 6, *(side // s for side in shape)) for s in (8, 4)]
    G = group_sums(result.assignment, (1, 2, 3))
    torch.testing.assert_close(G[:, 2], result.assignment[:, 3:].sum(dim=1))
    torch.testing.assert_close(G.mean(dim=(0, 2, 3, 4)), torch.tensor([1, 2, 3]) / 6, atol=0.03, rtol=0)


def test_the_assignment_is_a_hard_partition_without_gradient():
    M = torch.randn(3, 5, 40, requires_grad=True)
    A = hard_assignment(M)
    assert not A.requires_grad and set(A.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(A.sum(dim=1), torch.ones(3, 40)) and torch.equal(A.argmax(dim=1), M.argmax(dim=1))
    U = torch.randn(3, 7, 40)
    torch.testing.assert_close((U @ A.transpose(1, 2)).sum(dim=2), U.sum(dim=2))
    assert torch.equal(hard_assignment(torch.zeros(1, 3, 2)), torch.tensor([[[1.0, 1], [0, 0], [0, 0]]]))  # ties


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_is_equivariant_to_the_order_of_the_queries(training):
    torch.manual_seed(0)
    layer = open_gates(KMeansLayer(8, 16, 0.1, 0.1)).double()
    X, Q, order = torch.randn(2, 8, 4, 4, 4).double(), torch.randn(2, 16, 5).double(), torch.randperm(5)
    for _ in range(40):
        layer(X, Q)  # until the running statistics are those of this input
    layer.train(training)
    (one, M), (two, M2) = copy.deepcopy(layer)(X, Q), copy.deepcopy(layer)(X, Q[:, :, order])
    torch.testing.assert_close(two, one[:, :, order])
    torch.testing.assert_close(M2, M[:, order])
    assert not torch.allclose(one, F.gelu(F.gelu(Q)))  # the gates are open
    assert len(M.argmax(dim=1).unique()) > 1  # and there is more than one cluster


def test_the_k_means_step_is_its_equation():
    """With self-attention and feed-forward closed: Q + proj(BN(sum of the values of each query's voxels))."""
    torch.manual_seed(0)
    layer = KMeansLayer(8, 16, 0.1, 0.1).double()
    nn.init.ones_(layer.update[1].weight)
    X, Q = torch.randn(2, 8, 4, 4, 4).double(), torch.randn(2, 16, 5).double()
    result, M = layer(X, Q)
    x = F.gelu(layer.pixel(F.gelu(X.flatten(2))))
    U, owner = layer.value(x), M.flatten(2).argmax(dim=1)
    sums = torch.zeros(2, 16, 5).double()
    for b in range(2):
        for u in range(64):
            sums[b, :, owner[b, u]] += U[b, :, u]
    mean, var = sums.mean(dim=(0, 2), keepdim=True), sums.var(dim=(0, 2), keepdim=True, unbiased=False)
    Q = Q + layer.update((sums - mean) / (var + 1e-3).sqrt())
    torch.testing.assert_close(result, F.gelu(F.gelu(Q)))


def test_attention_is_over_the_other_queries():
    torch.manual_seed(0)
    layer, z = KMeansLayer(8, 16, 0.1, 0.1).double(), torch.randn(2, 16, 5).double()
    result = layer.attention(z)
    q, k, v = layer.qkv(z).split([8, 8, 16], dim=1)
    similarity = torch.stack([q[:, h : h + 1].transpose(1, 2) @ k[:, h : h + 1] for h in range(8)], dim=1)
    mean, var = (f(similarity) for f in (lambda s: s.mean((0, 2, 3), True), lambda s: s.var((0, 2, 3), False, True)))
    weight = ((similarity - mean) / (var + 1e-3).sqrt()).softmax(dim=3)
    for h in range(8):
        by_hand = torch.einsum("bnm,bcm->bcn", weight[:, h], v[:, 2 * h : 2 * h + 2])
        torch.testing.assert_close(result[:, 2 * h : 2 * h + 2], by_hand)


# -- losses --


def test_dice_ce_is_the_mean_over_items_and_classes():
    torch.manual_seed(0)
    logits, label = torch.randn(3, 2, 4, 5, 6).double(), torch.randint(2, (3, 4, 5, 6), dtype=torch.uint8)
    ce, dice = [], []
    for i in range(3):
        p = logits[i].exp() / logits[i].exp().sum(dim=0)
        for k in range(2):
            y = (label[i] == k).double()
            ce.append(-(y * p[k].log()).sum() / 120)
            dice.append(1 - (2 * (p[k] * y).sum() + 1e-5) / (p[k].sum() + y.sum() + 1e-5))
    assert dice_ce_loss(logits, label).item() == pytest.approx(sum(ce).item() / 3 + sum(dice).item() / 6, rel=1e-9)
    perfect = 40.0 * (2 * one_hot(label, 2).double() - 1)
    assert dice_ce_loss(perfect, label).item() == pytest.approx(0, abs=1e-6)


def test_the_query_loss_is_zero_at_the_label_and_the_groups_share_when_even():
    Y = one_hot(torch.randint(2, (2, 4, 4, 4)), 3).float()
    assert query_loss(Y, Y).item() == 0
    P = torch.full((2, 128, 4, 4, 4), 1 / 128)
    G = group_sums(P, (16, 4, 108))
    shares = torch.tensor([16, 4, 108]) / 128
    by_hand = -(Y.mean(dim=(0, 2, 3, 4)) * shares.log()).sum()
    assert query_loss(G, Y).item() == pytest.approx(by_hand.item(), rel=1e-5)
    none = torch.zeros_like(Y).requires_grad_()
    loss = query_loss(none, Y)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-6), rel=1e-5) and torch.isfinite(none.grad).all()


def loop_nt_xent(a, b, tau):
    """NT-Xent written out, of unit vectors at every voxel."""
    unit = [x / x.norm(dim=1, keepdim=True) for x in (a, b)]
    V = a[0, 0].numel()

    def s(x, y):
        return math.exp((x * y).sum().item() / V / tau)

    total = 0.0
    for one, other in (unit, unit[::-1]):
        for i in range(len(a)):
            rows = sum(s(one[i], other[j]) for j in range(len(a)))
            rows += sum(s(one[i], one[j]) for j in range(len(a)) if j != i)
            total -= math.log(s(one[i], other[i]) / rows)
    return total / 2 / len(a)


def test_nt_xent_is_its_definition():
    torch.manual_seed(0)
    a, b = torch.rand(3, 2, 4, 4, 4).double(), torch.rand(3, 2, 4, 4, 4).double()
    assert nt_xent(a, b, temperature=0.5).item() == pytest.approx(loop_nt_xent(a, b, 0.5), rel=1e-9)
    torch.testing.assert_close(nt_xent(a, b, temperature=0.3), nt_xent(b, a, temperature=0.3))
    scale = torch.rand(3, 1, 4, 4, 4).double() + 0.5  # any positive factor of a voxel
    torch.testing.assert_close(nt_xent(scale * a, b, temperature=0.5), nt_xent(a, b, temperature=0.5))


def test_contrast_of_a_single_crop_is_refused():
    batch = make_batch(labeled=1, n=1)
    with pytest.raises(UserError, match="--batch-size"):
        make()(batch, 0)
    assert make(contrast="mse")(batch, 0).terms.keys() >= {"segc", "qdc"}
    assert make(consistency_terms="none")(batch, 0).total.isfinite()


def test_the_total_is_the_weighted_sum_of_its_terms():
    method, batch = make(qd_weight=0.3, deep_weight=0.7, lambda_max=0.2), make_batch()
    losses = method(batch, T // 2)
    weight = {"seg": 1, "qd": 0.3, "deep": 0.7, "segc": losses.weights["lambda"], "qdc": losses.weights["lambda"]}
    assert losses.terms.keys() == weight.keys()
    assert losses.weights["lambda"] == pytest.approx(0.2 * math.exp(-5 * 0.25))
    total = sum(weight[name] * value for name, value in losses.terms.items())
    torch.testing.assert_close(losses.total, total)


def test_deep_supervision_is_the_query_loss_of_each_layer_at_its_own_size():
    method, batch = make(noise_variance=0.0), make_batch()
    view = method.networks[0](torch.cat([batch["image"], batch["image"]])).split(4)[1]
    label = batch["label"]
    by_hand = []
    for M, stride in zip(view.levels, (8, 4), strict=True):
        P = M[:2].softmax(dim=1)
        share = F.avg_pool3d(label[:, None].float(), stride)
        G = P[:, 4:].sum(dim=1, keepdim=True)
        by_hand.append(-(share * G.log() + (1 - share) * (1 - G).log()).mean())
    result = method.supervised(view, label)["deep"]
    torch.testing.assert_close(result, torch.stack(by_hand).mean())
    assert "deep" not in make(deep_weight=0.0)(batch, 0).terms


# -- views and outputs --


def test_one_network_sees_both_views_at_once_or_two_see_one_each():
    batch = make_batch()
    for share in (True, False):
        method, seen = make(share_weights=share), []
        for i, network in enumerate(method.networks):
            network.register_forward_pre_hook(lambda _, args, i=i, seen=seen: seen.append((i, args[0].clone())))
        method(batch, 0)
        if share:
            ((_, both),) = seen
            strong, weak = both.split(4)
        else:
            assert [i for i, _ in seen] == [1, 0]
            (_, strong), (_, weak) = seen
        assert torch.equal(weak, batch["image"])
        sd = (strong - weak).std(dim=(1, 2, 3, 4))
        assert (sd > 0).all() and (sd <= 1.05).all() and len(sd.unique()) == 4
    one, two = parameter_count(make()), parameter_count(make(share_weights=False))
    assert two == 2 * one


def test_independent_crops_carry_their_own_labels():
    method, batch = make(crops="independent", noise_variance=0.0), make_batch()
    assert method.needs_other_crop and not make().needs_other_crop
    other = make_batch(seed=5)
    swapped = {"image": other["image"], "label": other["label"], "case": batch["case"]}
    one = method.eval()({**batch, "other_image": other["image"], "other_label": other["label"]}, 0)
    two = method({**swapped, "other_image": batch["image"], "other_label": batch["label"]}, 0)
    torch.testing.assert_close(one.total, two.total)
