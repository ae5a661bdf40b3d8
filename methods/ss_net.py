"""SS-Net: Wu et al., Exploring smoothness and class-separation for semi-supervised medical image segmentation, 2022.

A network f predicts p = f(x). Two terms use all crops, labeled or not. The first makes p smooth around each crop. The
perturbation r has the length eps; its direction changes p most, as found by one power iteration (VAT, Miyato et al.):

    d      a random direction of length 1,     g = gradient of D(f(x'), p) with respect to x' at x' = x + xi d
    L_smo  =  D(f(x + r), p),                  r = eps g / |g|,  xi = eps = 10,  D = 1 - 2 sum pq / (sum p^2 + sum q^2)

The second draws the features of each class together. h maps the last feature map to 32 channels, and k maps h again.
P_c are the N = 32 features h of class c with the highest attention, of voxels of labeled crops that f classifies
correctly. Z_c are the features k(h) of all voxels of class c, by the label, or by f in unlabeled crops:

    L_sep  =  1/(C+1) sum_c mean over z in Z_c, q in P_c of w(z) v(q) (1 - cos(z, q))

w and v are attentions that are learned for each class, divided by their mean. With a weight for each term:

    min   Dice(p, Y)  [labeled]  +  lambda(t) (L_smo [all] + 0.1 (L_sep [labeled] + L_sep [unlabeled]))

No gradient reaches p in D, P_c and the inputs of w. The sum over all pairs is 1 minus the product of two weighted
means, as w and v have mean 1. As released, the supervised loss is Dice alone, and lambda rises to 1 as a Gaussian
ramp that ends after 40 % of the iterations. Preset `authors`: D is 1 minus the mean of pq + (1-p)(1-q), P_c has the
lowest attention, there are no prototypes of the background, and v is 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.perturbation import adversarial
from losses.ramps import ramp_up
from losses.terms import agreement_loss, dice_loss, hard_dice, probabilities, soft_dice_loss, weighted_sum
from methods.base import (
    AGREES,
    TUNED_SEPARATE,
    Batch,
    Losses,
    Method,
    batch_norm_option,
    joined,
    labeled_part,
    ramp_end_option,
    ramp_option,
    softmax_option,
)
from networks.backbone import uncounted
from networks.heads import attention, projection
from utils.masks import label_maps
from utils.options import Condition, option

DISTANCES = {"dice": soft_dice_loss, "agreement": agreement_loss}
MASKS, RANKS = ("same", "own"), ("highest", "lowest")
FEATURES = 32  # channels of h and k
SEPARATES: Condition = {**AGREES, "separation": bool}
PERTURBS: Condition = {**AGREES, "magnitude": bool}


class SSNet(Method):
    """A network that learns from labels, from its own output near each crop, and from prototypes of each class."""

    multiclass = True
    PRESETS = {
        "paper": {},
        "authors": {
            "softmax": True, "distance": "agreement", "rank": "lowest", "background": False,
            "prototype_attention": False, "ramp": "steps", "augment": "mirror",
        },
        "tuned": TUNED_SEPARATE,
    }  # fmt: skip

    @dataclass
    class Options(Method.Options):
        softmax: bool = softmax_option()
        batch_norm: str = batch_norm_option()
        distance: str = option("dice", "D of two predictions; agreement: as released", choices=list(DISTANCES),
                               only_if=AGREES)  # fmt: skip
        dropout_masks: str = option("own", "of the two predictions in D: the same, or own ones for each, as released",
                                    choices=MASKS, only_if={**AGREES, "dropout": bool})  # fmt: skip
        magnitude: float = option(10.0, "eps, length of the perturbation of a crop", minimum=0, only_if=AGREES)
        xi: float = option(10.0, "length of the step whose gradient gives its direction", minimum=0, only_if=PERTURBS)
        separation: float = option(0.1, "weight of L_sep relative to L_smo", minimum=0, only_if=AGREES)
        prototypes: int = option(32, "N, prototypes of each class", minimum=2, only_if=SEPARATES)
        rank: str = option("highest", "attention of the features that become prototypes", choices=RANKS,
                           only_if=SEPARATES)  # fmt: skip
        background: bool = option(True, "prototypes of the background too", only_if=SEPARATES)
        prototype_attention: bool = option(True, "v, learned weights of the prototypes; without, all count the same",
                                           only_if=SEPARATES)  # fmt: skip
        lambda_max: float = option(1.0, "largest weight of the two terms", minimum=0)
        ramp: str = ramp_option()
        ramp_end: float = ramp_end_option(0.4)

    options: Options
    outputs = ("seg",)

    def __init__(self, options: Options, *, iterations: int):
        super().__init__(options, iterations=iterations)
        o = options
        self.network = self.backbone(heads={"seg": self.seg_channels})
        self.separator = None
        if o.lambda_max and o.separation:
            classes = range(0 if o.background else 1, o.classes + 1)
            self.separator = Separator(o.filters, classes=classes, prototype_attention=o.prototype_attention)

    def forward(self, batch: Batch, iteration: int) -> Losses:
        o, image, label, L = self.options, batch["image"], batch["label"], len(batch["label"])
        self.begin_draws()
        passes = [(f[-1], self.network.read(f)["seg"]) for f in map(self.network.features, self.parts(image, L))]
        maps, logits = (joined(x) for x in zip(*passes, strict=True))
        p = probabilities(logits, o.classes)
        terms = {"seg": dice_loss(p[:L], label)}
        if o.lambda_max:
            terms["smoothness"] = self.smoothness(image, p.detach(), L)
        monitors = {"dice/train_seg": hard_dice(labeled_part(p.detach(), batch), label)}
        if self.separator is not None:
            losses, numbers = self.separator(
                maps, label_maps(p.detach()), label, prototypes=o.prototypes, largest=o.rank == "highest",
                apart=o.batch_norm == "separate",
            )  # fmt: skip
            terms["separation"] = losses.sum() / (o.classes + 1)
            monitors["prototypes"] = numbers.mean()
        lambda_ = o.lambda_max * ramp_up(iteration, o.ramp_end * self.iterations, o.ramp)
        total = weighted_sum(terms, {"smoothness": lambda_, "separation": o.separation * lambda_})
        return Losses(total, terms, {"lambda": lambda_}, monitors)

    def smoothness(self, image: Tensor, p: Tensor, labeled: int) -> Tensor:
        """L_smo of image (N,K,W,H,D) and its prediction p (N,C,W,H,D), which gets no gradient."""
        o, distance = self.options, DISTANCES[self.options.distance]

        def loss(x: Tensor) -> Tensor:
            self.begin_draws()
            return distance(probabilities(self.passes(self.network, x, labeled)["seg"], o.classes), p)

        with uncounted():  # these crops are not of the data
            return loss(image + adversarial(loss, image, xi=o.xi, magnitude=o.magnitude))

    def begin_draws(self) -> None:
        """With `--dropout-masks same` begins the random draws of this iteration again, by its seed (`seed_iteration`).

        The next pass then has the dropout masks of the first.
        """
        if self.options.dropout_masks == "same":
            torch.manual_seed(torch.initial_seed())

    def predict(self, image: Tensor, outputs: tuple[str, ...]) -> Tensor:
        return probabilities(self.network(image)["seg"], self.options.classes)


class Separator(nn.Module):
    """L_sep: the features of each class approach the prototypes of this class. `classes` are the labels that have some;
    without `prototype_attention` v is 1.
    """

    def __init__(self, channels: int, *, classes: Sequence[int], prototype_attention: bool = True):
        super().__init__()
        self.classes = classes
        self.h, self.k = projection(channels, FEATURES), projection(FEATURES, FEATURES)
        self.w = nn.ModuleList([attention(FEATURES) for _ in classes])
        self.v = nn.ModuleList([attention(FEATURES) for _ in classes if prototype_attention])

    def forward(
        self, maps: Tensor, predicted: Tensor, label: Tensor, *, prototypes: int, largest: bool, apart: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The loss of each class, labeled plus unlabeled crops, and its number of prototypes; both (len(classes),).

        A class without prototypes or without voxels has the loss 0.

        Args:
            maps: feature maps of all crops (N,channels,W,H,D).
            predicted: their predicted labels (N,W,H,D).
            label: labels of the first L crops (L,W,H,D).
            prototypes: N, at least 2.
            largest: whether the features with the highest attention become prototypes, or those with the lowest.
            apart: whether the labeled crops go through each batch norm by themselves.
        """
        L = len(label)

        def each(network: nn.Module, x: Tensor) -> Tensor:
            return joined([network(part) for part in (x.tensor_split([L]) if apart and len(x) > L else [x])])

        h = each(self.h, maps)
        z = each(self.k, h)
        h, labels = h[:L].detach(), torch.cat([label, predicted[L:].to(label.dtype)])
        length = z.norm(dim=1, keepdim=True).clamp(min=1e-12)
        losses, counts = [], []
        for c, w, v in zip(self.classes, self.w, self.v or [None] * len(self.w), strict=True):
            with torch.no_grad():
                score = w(h)
            chosen, found = best(h, score if largest else -score, (label == c) & (predicted[:L] == c), prototypes)
            q = weighted_mean(chosen, (found_alone(v, chosen, found).sigmoid() if v else 1.0) * found.to(h.dtype))
            weight = each(w, z.detach()).sigmoid() * (labels == c)[:, None]
            for part in (slice(L), slice(L, None)):
                mean = weighted_mean(z[part], weight[part], length[part])
                losses.append((weight[part].sum() > 0) * found.any() * (1 - mean @ q))
            counts.append(found.sum())
        return torch.stack(losses).view(-1, 2).sum(dim=1), torch.stack(counts).float()


def best(h: Tensor, score: Tensor, mask: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The features with the highest scores inside of a mask, divided by their length.

    Args:
        h: features (L,channels,W,H,D).
        score: (L,1,W,H,D).
        mask: (L,W,H,D) of bool.

    Returns:
        Features (1,channels,number,1,1), 0 where the mask has no more, and whether each is one, (1,1,number,1,1). There
        are fewer than `number` if the crops have fewer voxels.
    """
    scores, places = score.flatten().masked_fill(~mask.flatten(), -torch.inf).topk(min(number, mask.numel()))
    found = (scores > -torch.inf).view(1, 1, -1, 1, 1)
    features = F.normalize(h.transpose(0, 1).flatten(1)[:, places], dim=0)[None, :, :, None, None]
    return torch.where(found, features, 0), found


def found_alone(v: nn.Module, chosen: Tensor, found: Tensor) -> Tensor:
    """v of the prototypes (1,channels,n,1,1), with the mean and variance of batch norm over the `found` ones alone.

    How many there are stays on the device.
    """
    first, norm, *rest = v.children()
    assert isinstance(norm, nn.BatchNorm3d)
    x, n = first(chosen), found.sum().clamp(min=1)
    x = x - (x * found).sum(dim=2, keepdim=True) / n
    variance = (x * found).square().sum(dim=2, keepdim=True) / n
    x = x * (variance + norm.eps).rsqrt() * norm.weight.view(1, -1, 1, 1, 1) + norm.bias.view(1, -1, 1, 1, 1)
    for layer in rest:
        x = layer(x)
    return x


def weighted_mean(x: Tensor, weight: Tensor, length: Tensor | float = 1.0) -> Tensor:
    """Mean over items and voxels of x / length, x (N,C,W,H,D), with weights >= 0 -> (C,); 0 if all weights are 0.

    Weight and length are (N,1,W,H,D).
    """
    total = weight.sum().clamp(min=torch.finfo(x.dtype).tiny)
    return torch.einsum("ncv,nv->c", x.flatten(2), (weight / length).flatten(1)) / total
