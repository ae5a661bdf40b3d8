"""DTML: Zhang & Zhang, Dual-Task Mutual Learning for Semi-Supervised Medical Image Segmentation, 2021.

M_s predicts p = sigmoid(logits). M_d predicts z = tanh(.), which m = sigmoid(-k z) turns into a mask (eq. (2)). With
the consistency C = mean (m - p)^2 (eq. (4)):

    eq. (5)   min over M_s   L_seg  + lambda(t) C
    eq. (6)   min over M_d   L_mask + lambda(t) C

L_seg does not depend on M_d, and L_mask does not depend on M_s. One backward pass through the sum
L_seg + L_mask + lambda C therefore gives the gradients of both problems. The released code runs two backward passes,
both through both networks, and so counts the consistency twice: `consistency_times` 2 in the preset `authors`. With
several classes p, z and m have a channel for each, p by a softmax; Dice and the consistency are means over them.

Three options go beyond the paper: C on the unlabeled crops alone, a ramp that ends before the training does, and a
smaller k. C needs no stop-gradient: the gradient for M_s treats m as a constant, and that for M_d treats p as one.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.ramps import ramp_up
from losses.terms import (
    consistency_loss,
    dice_loss,
    hard_dice,
    live_share,
    probabilities,
    sdm_to_mask,
    seg_loss,
    weighted_sum,
)
from methods.base import (
    AGREES,
    ITEMS,
    TUNED_SEPARATE,
    Batch,
    Losses,
    Method,
    batch_norm_option,
    by_name,
    labeled_part,
    ramp_end_option,
    ramp_option,
    softmax_option,
)
from utils.options import option

SDM_LOSSES = ("mask", "dis", "both")


class DTML(Method):
    """Two V-Nets, M_s with the head 'seg' and M_d with the head 'sdm', which learn from labels and from each other."""

    multiclass = True
    PRESETS = {
        "paper": {},
        "authors": {"lambda_max": 1.0, "ramp": "steps", "consistency_times": 2, "augment": "mirror"},
        "tuned": {**TUNED_SEPARATE, "k": 50.0},
    }  # fmt: skip

    @dataclass
    class Options(Method.Options):
        softmax: bool = softmax_option()
        batch_norm: str = batch_norm_option()
        sdm_loss: str = option("mask", "supervised loss of M_d (Table 1)", choices=SDM_LOSSES)
        dis_weight: float = option(1.0, "weight of L_dis, next to L_mask", minimum=0, only_if={"sdm_loss": ("both",)})
        k: float = option(1500.0, "steepness of m = sigmoid(-k z)", minimum=1e-6)
        lambda_max: float = option(0.1, "largest weight of the consistency", minimum=0)
        ramp: str = ramp_option()
        ramp_end: float = ramp_end_option(1.0)
        consistency_times: int = option(1, "factor of C; 2 in the released code", minimum=1, only_if=AGREES)
        consistency_on: str = option("all", "crops on which the consistency is computed", choices=ITEMS, only_if=AGREES)

    options: Options
    outputs = ("seg", "sdm", "mean")

    def __init__(self, options: Options, *, iterations: int):
        super().__init__(options, iterations=iterations)
        o = options
        self.needs_sdm = o.sdm_loss == "dis" or (o.sdm_loss == "both" and o.dis_weight > 0)
        self.needs_unlabeled = o.consistency_on == "unlabeled"
        self.M_s = self.backbone(heads={"seg": self.seg_channels})
        self.M_d = self.backbone(heads={"sdm": o.classes})

    def forward(self, batch: Batch, iteration: int) -> Losses:
        o = self.options
        image, label = batch["image"], batch["label"]
        logits = self.passes(self.M_s, image, len(label))["seg"]
        z = self.passes(self.M_d, image, len(label))["sdm"]
        p, m = probabilities(logits, o.classes), sdm_to_mask(z, o.k)
        terms = {"seg": seg_loss(labeled_part(logits, batch), label, o.classes)}
        if o.sdm_loss in ("mask", "both"):
            terms["mask"] = dice_loss(labeled_part(m, batch), label)
        if self.needs_sdm:
            terms["dis"] = F.mse_loss(labeled_part(z, batch), batch["sdm"])
        first = len(label) if o.consistency_on == "unlabeled" else 0
        terms["consistency"] = consistency_loss(m[first:], p[first:])
        lambda_ = o.lambda_max * ramp_up(iteration, o.ramp_end * self.iterations, o.ramp)
        factors = {"consistency": lambda_ * o.consistency_times, "dis": o.dis_weight if o.sdm_loss == "both" else 1.0}
        total = weighted_sum(terms, factors)  # L_seg + L_mask + lambda C: equations (5) and (6) at once
        return Losses(total, terms, {"lambda": lambda_}, task_monitors(p, m, label))

    def predict(self, image: Tensor, outputs: tuple[str, ...]) -> Tensor:
        maps = probability_maps(self.M_s, self.M_d, image, outputs, self.options.classes, self.options.k)
        return torch.cat([maps[name] for name in outputs], dim=1)

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        return task_maps(self.M_s, self.M_d, image, self.options.classes, self.options.k)


@torch.no_grad()
def task_monitors(p: Tensor, m: Tensor, label: Tensor) -> dict[str, Tensor]:
    """For the log: Dice of p and of m (N,C,W,H,D) on the labeled crops, which are the first, and m's live gradient."""
    return {
        "dice/train_seg": hard_dice(p[: len(label)], label),
        "dice/train_sdm": hard_dice(m[: len(label)], label),
        "live_gradient/sdm": live_share(m),
    }


def task_maps(M_s: nn.Module, M_d: nn.Module, image: Tensor, classes: int, k: float) -> dict[str, Tensor]:
    """`Method.maps` of the two networks: p, m and z."""
    z = M_d(image)["sdm"]
    return by_name(p=probabilities(M_s(image)["seg"], classes), m=sdm_to_mask(z, k), z=z)


def probability_maps(
    M_s: nn.Module, M_d: nn.Module, image: Tensor, outputs: Collection[str], classes: int, k: float
) -> dict[str, Tensor]:
    """Foreground probabilities of the outputs that `outputs` names, each (N,C,W,H,D) in [0,1].

    Args:
        M_s, M_d: networks with the heads seg and sdm; each runs only if an output needs it.
        image: (N,K,W,H,D).
        outputs: seg is p of M_s, sdm is m of M_d, mean is (p + m)/2, which also returns the other two.
    """
    maps = {}
    if {"seg", "mean"} & set(outputs):
        maps["seg"] = probabilities(M_s(image)["seg"], classes)
    if {"sdm", "mean"} & set(outputs):
        maps["sdm"] = sdm_to_mask(M_d(image)["sdm"], k)
    if "mean" in outputs:
        maps["mean"] = (maps["seg"] + maps["sdm"]) / 2
    return maps
