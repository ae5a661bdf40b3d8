"""UniMatch: Yang et al., Revisiting weak-to-strong consistency in semi-supervised semantic segmentation, CVPR 2023.

A network f predicts an unlabeled crop u: p = f(u), without gradient. Its most probable class y is the pseudo-label of
three other views of u, in the voxels where that class is probable:

    a    =  1 where the probability of y is at least T = 0.95, else 0
    p_f  =  decoder(dropout(encoder(u)))     every map of the encoder loses half of its channels
    p_i  =  f(S_i),  i = 1, 2                strong views with random contrast, noise and blur

In half of the strong views another unlabeled crop u' of the batch fills a box b_i (CutMix), in crop and labels alike:

    S_i  =  S(u') inside b_i, S(u) elsewhere,    y_i = y' inside b_i, y elsewhere,    a_i = a' inside b_i, a elsewhere
    min over f   L_seg(f(x), Y)  +  1/2 H(p_f, y, a)  +  1/4 (H(p_1, y_1, a_1) + H(p_2, y_2, a_2))

x, Y are labeled crops. H is the cross-entropy, weighted by a in every voxel. In the released code for medical images it
is the Dice loss with these weights (`--pseudo-loss dice`). Paper and code minimise half of this sum (`--halve`), which
for SGD is half of the learning rate.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.mixing import paste_next, random_box
from losses.perturbation import strong_view
from losses.terms import ce_loss, dice_loss, hard_dice, probabilities, seg_loss, weighted_sum, with_background
from methods.base import (
    TUNED_SEPARATE,
    UNLABELED,
    Batch,
    Losses,
    Method,
    batch_norm_option,
    joined,
    labeled_part,
    softmax_option,
)
from utils.devices import to_device
from utils.masks import label_maps
from utils.options import Condition, option

PSEUDO_LOSSES = ("ce", "dice")
SMALLEST, LARGEST = 0.02, 0.4  # share of the voxels of a crop inside the box
STRONG: Condition = {"strong_weight": bool, **UNLABELED}
FEATURE: Condition = {"feature_weight": bool, **UNLABELED}


class UniMatch(Method):
    """A network that learns its own confident labels from three harder views of the same crops."""

    multiclass = True
    PRESETS = {
        "paper": {},
        "authors": {"softmax": True, "pseudo_loss": "dice", "halve": True},
        "tuned": {**TUNED_SEPARATE, "pseudo_loss": "dice"},
    }

    @dataclass
    class Options(Method.Options):
        softmax: bool = softmax_option()
        batch_norm: str = batch_norm_option()
        threshold: float = option(0.95, "T, probability from which a pseudo-label counts", minimum=0, maximum=1,
                                  only_if=[STRONG, FEATURE])  # fmt: skip
        pseudo_loss: str = option("ce", "H: cross-entropy, or Dice as in the released code for medical images",
                                  choices=PSEUDO_LOSSES, only_if=[STRONG, FEATURE])  # fmt: skip
        feature_weight: float = option(0.5, "weight of the view with dropped features", minimum=0, only_if=UNLABELED)
        feature_dropout: float = option(0.5, "share of the channels that this view loses", minimum=0, maximum=1,
                                        only_if=FEATURE)  # fmt: skip
        strong_weight: float = option(0.5, "weight of both strong views together", minimum=0, only_if=UNLABELED)
        strong: float = option(0.5, "strength of the contrast, noise and blur of the strong views", minimum=0,
                               only_if=STRONG)  # fmt: skip
        cutmix: float = option(0.5, "share of the strong views into which another unlabeled crop is pasted", minimum=0,
                               maximum=1, only_if=STRONG)  # fmt: skip
        halve: bool = option(False, "minimise half of the sum, as paper and released code")

    options: Options
    outputs = ("seg",)

    def __init__(self, options: Options, *, iterations: int):
        super().__init__(options, iterations=iterations)
        self.network = self.backbone(heads={"seg": self.seg_channels})

    def forward(self, batch: Batch, iteration: int) -> Losses:
        o, image, label, L = self.options, batch["image"], batch["label"], len(batch["label"])
        unlabeled = image[L:]
        use_features, use_strong = (len(unlabeled) > 0 and weight > 0 for weight in (o.feature_weight, o.strong_weight))

        def with_dropped(x: Tensor) -> Tensor:
            return torch.cat([x, F.dropout3d(x[-len(unlabeled) :], o.feature_dropout)])

        # As released, one pass for the crops as they are and the dropped features, and one for the strong views.
        *labeled, rest = self.parts(image, L)
        features = self.network.features(rest, with_dropped if use_features else None)
        outputs = [*(self.network(x)["seg"] for x in labeled), self.network.read(features)["seg"]]
        logits, dropped = joined(outputs).tensor_split([len(image)])
        p = probabilities(logits.detach(), o.classes)
        pseudo, a = label_maps(p)[L:], (confidence(p)[L:] >= o.threshold).to(p.dtype)
        zero = logits.new_zeros(())
        terms = {"seg": seg_loss(logits[:L], label, o.classes), "features": zero, "strong": zero}
        if use_features:
            terms["features"] = self.pseudo_loss(dropped, pseudo, a)
        if use_strong:
            views, labels, weights = zip(*(self.mixed(unlabeled, pseudo, a) for _ in range(2)), strict=True)
            strong = self.network(torch.cat(views))["seg"].chunk(2)
            losses = [self.pseudo_loss(*view) for view in zip(strong, labels, weights, strict=True)]
            terms["strong"] = torch.stack(losses).mean()
        monitors = {
            "dice/train_seg": hard_dice(labeled_part(p, batch), label),
            "pseudo/foreground": (pseudo > 0).float().mean() if len(unlabeled) else zero,
            "pseudo/confident": a.mean() if len(unlabeled) else zero,
        }
        total = weighted_sum(terms, {"features": o.feature_weight, "strong": o.strong_weight})
        return Losses(total / 2 if o.halve else total, terms, {}, monitors)

    def mixed(self, image: Tensor, pseudo: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A strong view of each unlabeled crop (N,K,W,H,D), with a box of the next one in some, and its labels and
        weights, mixed in the same way from the pseudo-labels (N,W,H,D) and the weights a (N,1,W,H,D).
        """
        boxes = to_device(torch.stack([self.box(image.shape[2:]) for _ in image]), image.device)
        S, y, weight = (paste_next(x, boxes) for x in (strong_view(image, self.options.strong), pseudo, a))
        return S, y, weight

    def box(self, sides: torch.Size) -> Tensor:
        """Mask (W,H,D) of bool, a box of 2 to 40 % of the voxels or none; its sides are equal shares of the crop's."""
        coin, volume = torch.rand(2).tolist()
        share = (SMALLEST + (LARGEST - SMALLEST) * volume) ** (1 / 3)
        return random_box(sides, share if coin < self.options.cutmix else 0.0)

    def pseudo_loss(self, logits: Tensor, pseudo: Tensor, a: Tensor) -> Tensor:
        """H of logits (N,C or C+1,W,H,D), pseudo-labels (N,W,H,D) and weights (N,1,W,H,D)."""
        o = self.options
        if o.pseudo_loss == "dice":
            return dice_loss(probabilities(logits, o.classes), pseudo, a)
        return ce_loss(logits, pseudo, o.classes, a)

    def predict(self, image: Tensor, outputs: tuple[str, ...]) -> Tensor:
        return probabilities(self.network(image)["seg"], self.options.classes)


def confidence(p: Tensor) -> Tensor:
    """Foreground probabilities p (N,C,W,H,D) -> that of the most probable class (N,1,W,H,D), background included."""
    return with_background(p).amax(dim=1, keepdim=True)
