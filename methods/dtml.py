"""DTML: Zhang & Zhang, Dual-Task Mutual Learning for Semi-Supervised Medical Image Segmentation, 2021.

M_s predicts p = sigmoid(logits), M_d predicts z = tanh(.), turned into m = sigmoid(-k z). With C = mean (m - p)^2:

    eq. (5)   min over M_s   L_seg  + lambda(t) C
    eq. (6)   min over M_d   L_mask + lambda(t) C

L_seg does not depend on M_d and L_mask not on M_s, so the gradients of both problems together are those of the one
sum L_seg + L_mask + lambda C. The released code runs two backward passes that both reach both networks, and so
counts the consistency twice: `consistency_times` 2 in the preset `authors`. With C classes p, z and m have a channel
for each, Dice is the mean over them, and so is the consistency.

What the paper does not have, each an option that is off by default, is measured in docs/findings.md: k that grows, a
consistency on z itself or where p is sure, pasted crops with the pseudo-label of both networks (losses/mixing.py), and
for the test the moving averages of both networks. The preset `tuned` holds what helped.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.ema import ema_decay, ema_update, make_teacher
from losses.mixing import copy_paste
from losses.ramps import RAMPS, grown, ramp_up
from losses.terms import (
    consistency_loss,
    dice_loss,
    hard_dice,
    live_share,
    masked_mean,
    probabilities,
    sdm_to_mask,
    seg_loss,
    weighted_sum,
)
from methods.base import Batch, Losses, Method, by_name, labeled_part
from networks.backbones import BACKBONES
from utils.options import Condition, option

SDM_LOSSES = ("mask", "dis", "both")
CONSISTENCIES = ("mask", "map", "sure")
SURE = 0.9  # of p or 1 - p
MASK, AGREES, MIXES = {"sdm_loss": ("mask", "both")}, {"lambda_max": bool}, {"mix": bool}
SURER: Condition = {"consistency": ("mask", "sure"), **AGREES}


class DTML(Method):
    """Two V-Nets, M_s with the head 'seg' and M_d with the head 'sdm', that learn from labels and from each other."""

    multiclass = True
    PRESETS = {
        "paper": {},
        "authors": {"lambda_max": 1.0, "ramp": "steps", "consistency_times": 2, "augment": "mirror"},
        "tuned": {"k": 50.0, "lr_schedule": "cosine", "batch_size": 6, "labeled_batch": 4, "intensity": 0.3},
    }

    @dataclass
    class Options(Method.Options):
        filters: int = option(16, "channels of the first block of both V-Nets", minimum=1)
        softmax: bool = option(False, "p by a softmax over C+1 channels in place of C sigmoids")
        sdm_loss: str = option("mask", "supervised loss of M_d (Table 1)", choices=SDM_LOSSES)
        dis_weight: float = option(1.0, "weight of L_dis beside L_mask", minimum=0, only_if={"sdm_loss": ("both",)})
        k: float = option(1500.0, "steepness of m = sigmoid(-k z)", minimum=1e-6)
        k_start: float = option(0.0, "k at the first iteration, from where it grows to --k; 0: --k always", minimum=0,
                                only_if=[MASK, SURER, MIXES])  # fmt: skip
        lambda_max: float = option(0.1, "largest weight of the consistency", minimum=0)
        ramp: str = option("gaussian", "how lambda rises; literal: as printed", choices=RAMPS, only_if=[AGREES, MIXES])
        consistency_times: int = option(1, "how often C counts; 2 in the released code", minimum=1, only_if=AGREES)
        consistency: str = option("mask", "p agrees with m, with (1-z)/2, or with m only where p is sure",
                                  choices=CONSISTENCIES, only_if=AGREES)  # fmt: skip
        mix: float = option(0.0, "largest weight of the loss of pasted crops; 0: none", minimum=0)
        ema_decay: float = option(0.0, "alpha of averages to test; 0: no average", minimum=0, maximum=1)

    options: Options

    def __init__(self, options: Options, *, iterations: int):
        super().__init__(options, iterations=iterations)
        o = options
        self.M_s = BACKBONES[o.backbone](heads={"seg": o.classes + o.softmax}, filters=o.filters)
        self.M_d = BACKBONES[o.backbone](heads={"sdm": o.classes}, filters=o.filters)
        if o.ema_decay:
            self.ema = nn.ModuleDict({"M_s": make_teacher(self.M_s), "M_d": make_teacher(self.M_d)})

    @property
    def needs_sdm(self) -> bool:
        return self.options.sdm_loss == "dis" or (self.options.sdm_loss == "both" and self.options.dis_weight > 0)

    @property
    def needs_unlabeled(self) -> bool:
        return self.options.mix > 0

    @property
    def outputs(self) -> tuple[str, ...]:
        own = ("seg", "sdm", "mean")
        return own + tuple(f"ema_{name}" for name in own) if self.options.ema_decay else own

    def forward(self, batch: Batch, iteration: int) -> Losses:
        o = self.options
        logits, z = self.M_s(batch["image"])["seg"], self.M_d(batch["image"])["sdm"]
        k = grown(iteration, self.iterations, o.k_start, o.k) if o.k_start else o.k
        p, m = probabilities(logits, o.classes), sdm_to_mask(z, k)
        label = batch["label"]
        terms = {"seg": seg_loss(labeled_part(logits, batch), label, o.classes)}
        if o.sdm_loss in ("mask", "both"):
            terms["mask"] = dice_loss(labeled_part(m, batch), label)
        if self.needs_sdm:
            terms["dis"] = F.mse_loss(labeled_part(z, batch), batch["sdm"])
        terms["consistency"] = self.consistency(p, m, z)
        ramp = ramp_up(iteration, self.iterations, o.ramp)
        lambda_ = o.lambda_max * ramp
        factors = {"consistency": lambda_ * o.consistency_times, "dis": o.dis_weight if o.sdm_loss == "both" else 1.0}
        weights = {"lambda": lambda_}
        if o.mix:
            terms["mix"] = self.mix_loss(batch, p, m, k)
            weights["lambda_mix"] = factors["mix"] = o.mix * ramp
        with torch.no_grad():
            monitors = {
                "dice/train_seg": hard_dice(labeled_part(p, batch), label),
                "dice/train_sdm": hard_dice(labeled_part(m, batch), label),
                "live_gradient/sdm": live_share(m),
            }
        return Losses(weighted_sum(terms, factors), terms, weights, monitors)

    def consistency(self, p: Tensor, m: Tensor, z: Tensor) -> Tensor:
        """C, of the kind that --consistency names."""
        if self.options.consistency == "sure":
            return masked_mean((m - p).square(), ((p - 0.5).abs() > SURE - 0.5).to(p.dtype))
        return consistency_loss(m if self.options.consistency == "mask" else (1 - z) / 2, p)

    def mix_loss(self, batch: Batch, p: Tensor, m: Tensor, k: float) -> Tensor:
        """L_seg + L_mask of labeled and unlabeled crops pasted into one another; the label of an unlabeled one is what
        M_s and M_d say together."""
        image, target = copy_paste(batch["image"], batch["label"], (p + m) / 2)
        logits, mask = self.M_s(image)["seg"], sdm_to_mask(self.M_d(image)["sdm"], k)
        return seg_loss(logits, target, self.options.classes) + dice_loss(mask, target)

    def after_step(self, batch: Batch, iteration: int) -> None:
        if self.options.ema_decay:
            for name, network in {"M_s": self.M_s, "M_d": self.M_d}.items():
                ema_update(self.ema[name], network, ema_decay(iteration, self.options.ema_decay))

    def predict(self, image: Tensor, outputs: tuple[str, ...]) -> Tensor:
        found = {}
        both: dict[str, Any] = {"": self, **({"ema_": self.ema} if self.options.ema_decay else {})}
        for prefix, networks in both.items():
            wanted = {name.removeprefix(prefix) for name in outputs if name.startswith("ema_") == bool(prefix)}
            if wanted & {"seg", "mean"}:
                found[f"{prefix}seg"] = probabilities(networks.M_s(image)["seg"], self.options.classes)
            if wanted & {"sdm", "mean"}:
                found[f"{prefix}sdm"] = sdm_to_mask(networks.M_d(image)["sdm"], self.options.k)
            if "mean" in wanted:
                found[f"{prefix}mean"] = (found[f"{prefix}seg"] + found[f"{prefix}sdm"]) / 2
        return torch.cat([found[name] for name in outputs], dim=1)

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        z = self.M_d(image)["sdm"]
        p = probabilities(self.M_s(image)["seg"], self.options.classes)
        return by_name(p=p, m=sdm_to_mask(z, self.options.k), z=z)
