"""DTML: Zhang & Zhang, Dual-Task Mutual Learning for Semi-Supervised Medical Image Segmentation, 2021.

M_s predicts p = sigmoid(logits), M_d predicts z = tanh(.), turned into m = sigmoid(-k z). With C = mean (m - p)^2:

    eq. (5)   min over M_s   L_seg  + lambda(t) C
    eq. (6)   min over M_d   L_mask + lambda(t) C

L_seg does not depend on M_d and L_mask not on M_s, so the gradients of both problems together are those of the one
sum L_seg + L_mask + lambda C. The released code runs two backward passes that both reach both networks, and so
counts the consistency twice: `consistency_times` 2 in the preset `authors`. With C classes p, z and m have a channel
for each, Dice is the mean over them, and so is the consistency.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.base import Batch, Losses, Method, by_name, labeled_part
from networks.backbones import BACKBONES
from utils.losses import (
    consistency_loss,
    dice_loss,
    hard_dice,
    live_share,
    probabilities,
    sdm_to_mask,
    seg_loss,
    weighted_sum,
)
from utils.options import option
from utils.ramps import RAMPS, ramp_up

SDM_LOSSES = ("mask", "dis", "both")


class DTML(Method):
    """Two V-Nets, M_s with the head 'seg' and M_d with the head 'sdm', that learn from labels and from each other."""

    multiclass = True
    PRESETS = {
        "paper": {},
        "authors": {"lambda_max": 1.0, "ramp": "steps", "consistency_times": 2, "augment": "mirror"},
    }

    @dataclass
    class Options(Method.Options):
        filters: int = option(16, "channels of the first block of both V-Nets", minimum=1)
        softmax: bool = option(False, "p by a softmax over C+1 channels in place of C sigmoids")
        sdm_loss: str = option("mask", "supervised loss of M_d (Table 1)", choices=SDM_LOSSES)
        dis_weight: float = option(1.0, "weight of L_dis beside L_mask, with --sdm-loss both", minimum=0)
        k: float = option(1500.0, "steepness of m = sigmoid(-k z)", minimum=0)
        lambda_max: float = option(0.1, "largest weight of the consistency", minimum=0)
        ramp: str = option("gaussian", "how lambda rises; literal is the formula as printed", choices=RAMPS)
        consistency_times: int = option(
            1, "how often C counts; the released code's two backward passes make it 2", minimum=1
        )

    options: Options

    def __init__(self, options: Options, *, iterations: int):
        super().__init__(options, iterations=iterations)
        o = options
        self.M_s = BACKBONES[o.backbone](heads={"seg": o.classes + o.softmax}, filters=o.filters)
        self.M_d = BACKBONES[o.backbone](heads={"sdm": o.classes}, filters=o.filters)

    @property
    def needs_sdm(self) -> bool:
        return self.options.sdm_loss != "mask"

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("seg", "sdm", "mean")

    def forward(self, batch: Batch, iteration: int) -> Losses:
        o = self.options
        logits, z = self.M_s(batch["image"])["seg"], self.M_d(batch["image"])["sdm"]
        p, m = probabilities(logits, o.classes), sdm_to_mask(z, o.k)
        label = batch["label"]
        terms = {"seg": seg_loss(labeled_part(logits, batch), label, o.classes)}
        if o.sdm_loss in ("mask", "both"):
            terms["mask"] = dice_loss(labeled_part(m, batch), label)
        if o.sdm_loss in ("dis", "both"):
            terms["dis"] = F.mse_loss(labeled_part(z, batch), batch["sdm"])
        terms["consistency"] = consistency_loss(m, p)
        lambda_ = o.lambda_max * ramp_up(iteration, self.iterations, o.ramp)
        factors = {"consistency": lambda_ * o.consistency_times, "dis": o.dis_weight if o.sdm_loss == "both" else 1.0}
        with torch.no_grad():
            monitors = {
                "dice/train_seg": hard_dice(labeled_part(p, batch), label),
                "dice/train_sdm": hard_dice(labeled_part(m, batch), label),
                "live_gradient/sdm": live_share(m),
            }
        return Losses(weighted_sum(terms, factors), terms, {"lambda": lambda_}, monitors)

    def predict(self, image: Tensor, outputs: tuple[str, ...]) -> Tensor:
        found = {}
        if {"seg", "mean"} & set(outputs):
            found["seg"] = probabilities(self.M_s(image)["seg"], self.options.classes)
        if {"sdm", "mean"} & set(outputs):
            found["sdm"] = sdm_to_mask(self.M_d(image)["sdm"], self.options.k)
        if "mean" in outputs:
            found["mean"] = (found["seg"] + found["sdm"]) / 2
        return torch.cat([found[name] for name in outputs], dim=1)

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        z = self.M_d(image)["sdm"]
        p = probabilities(self.M_s(image)["seg"], self.options.classes)
        return by_name(p=p, m=sdm_to_mask(z, self.options.k), z=z)
