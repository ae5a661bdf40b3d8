"""DTML+: ours. The two networks of DTML, which learn on unlabeled crops what both of their averages say together.

M_s predicts p = sigmoid(logits), M_d predicts z = tanh(.) and m = sigmoid(-k z), as in DTML (methods/dtml.py). Their
moving averages predict p' and m' of an unlabeled crop u as the loader gives it, without gradient:

    y'  =  1 where (p' + m')/2 > 1/2, else 0          the pseudo-label
    a   =  D where p' > 1/2 and m' > 1/2 agree, else 0        how far it is trusted; D = Dice(p' > 1/2, m' > 1/2) of u

Each network then learns y' from a strong view S(u) of its own, with random contrast, noise and blur:

    min over M_s   L_seg (x, Y)  + w(t) L_seg^a (S(u), y')
    min over M_d   L_mask(x, Y)  + w(t) L_mask^a(S(u), y')
    w(t)  =  0 before T_0, then rises to --pseudo-weight as a Gaussian ramp that ends at T_1

where x, Y are labeled crops and the superscript a weighs every voxel. Segmentation and distance are two ways to the
same answer, so where their averages disagree one of them is wrong, and nothing is learned there. What is tested first
is the mean of both averages. With several classes p and m have a channel for each.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from methods.base import Batch, Losses, Method, by_name, labeled_part
from networks.backbones import BACKBONES
from utils.ema import ema_decay, ema_update, make_teacher
from utils.losses import (
    dice_loss,
    hard_dice,
    live_share,
    probabilities,
    sdm_to_mask,
    seg_loss,
    weighted_sum,
)
from utils.masks import label_map
from utils.options import option
from utils.perturbation import strong_view
from utils.ramps import ramp_up

TRUST = ("all", "voxel", "both")


class DTMLPlus(Method):
    """Two V-Nets, M_s with the head 'seg' and M_d with the head 'sdm', and the moving average of each."""

    multiclass = True
    PRESETS = {
        "tuned": {
            "lr_schedule": "cosine", "batch_size": 6, "labeled_batch": 4, "intensity": 0.3, "normalize": "scan"
        },
    }  # fmt: skip

    @dataclass
    class Options(Method.Options):
        filters: int = option(16, "channels of the first block of both V-Nets", minimum=1)
        k: float = option(50.0, "steepness of m = sigmoid(-k z)", minimum=0)
        ema_decay: float = option(0.99, "how much of the averages stays at each step", minimum=0, maximum=1)
        pseudo_weight: float = option(0.5, "largest weight of the loss of unlabeled crops", minimum=0)
        start: float = option(0.2, "share of the iterations before unlabeled crops count", minimum=0, maximum=1)
        full: float = option(0.4, "share of the iterations after which they count fully", minimum=0, maximum=1)
        trust: str = option("both", "voxels of a pseudo-label to learn: all; where both tasks agree (voxel); there, "
                            "weighted by their Dice on the crop (both)", choices=TRUST)  # fmt: skip
        strong: float = option(0.5, "strength of the contrast, noise and blur of the strong views", minimum=0)

    options: Options

    def __init__(self, options: Options, *, iterations: int):
        super().__init__(options, iterations=iterations)
        o = options
        self.M_s = BACKBONES[o.backbone](heads={"seg": o.classes}, filters=o.filters)
        self.M_d = BACKBONES[o.backbone](heads={"sdm": o.classes}, filters=o.filters)
        self.ema = nn.ModuleDict({"M_s": make_teacher(self.M_s), "M_d": make_teacher(self.M_d)})
        self.ema.eval()

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("ema_mean", "ema_seg", "ema_sdm", "mean", "seg", "sdm")

    def train(self, mode: bool = True) -> "DTMLPlus":
        """The averages stay in evaluation mode, with the averaged statistics of their batch norm."""
        super().train(mode)
        self.ema.eval()
        return self

    def forward(self, batch: Batch, iteration: int) -> Losses:
        o, label, L = self.options, batch["label"], len(batch["label"])
        labeled, unlabeled = batch["image"].tensor_split([L])
        # Both kinds of crops in one pass, so that batch norm sees them together from the first iteration.
        logits = self.M_s(torch.cat([labeled, strong_view(unlabeled, o.strong)]))["seg"]
        z = self.M_d(torch.cat([labeled, strong_view(unlabeled, o.strong)]))["sdm"]
        p, m = probabilities(logits, o.classes), sdm_to_mask(z, o.k)
        weight = o.pseudo_weight * self.ramp(iteration)
        terms = {"seg": seg_loss(logits[:L], label, o.classes), "mask": dice_loss(m[:L], label)}
        monitors: dict[str, Tensor] = {}
        if weight and len(unlabeled):
            pseudo, a, monitors = self.pseudo_label(unlabeled)
            terms["pseudo_seg"] = seg_loss(logits[L:], pseudo, o.classes, a)
            terms["pseudo_mask"] = dice_loss(m[L:], pseudo, a)
        else:
            zero = logits.new_zeros(())
            terms |= {"pseudo_seg": zero, "pseudo_mask": zero}
            monitors = dict.fromkeys(("pseudo/foreground", "pseudo/agreement"), zero)
        with torch.no_grad():
            monitors |= {
                "dice/train_seg": hard_dice(labeled_part(p, batch), label),
                "dice/train_sdm": hard_dice(labeled_part(m, batch), label),
                "live_gradient/sdm": live_share(m),
            }
        total = weighted_sum(terms, {"pseudo_seg": weight, "pseudo_mask": weight})
        return Losses(total, terms, {"w": weight}, monitors)

    def ramp(self, iteration: int) -> float:
        """w(t) over its largest value, in [0,1]."""
        first, last = (share * self.iterations for share in (self.options.start, self.options.full))
        if iteration < first:
            return 0.0
        return 1.0 if iteration >= last else ramp_up(int(iteration - first), int(last - first))

    @torch.no_grad()
    def pseudo_label(self, image: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """image (N,1,W,H,D) -> y' (N,W,H,D) of 0..C, a (N,1,W,H,D) in [0,1], and what is worth watching."""
        o = self.options
        p = probabilities(self.ema["M_s"](image)["seg"], o.classes)
        m = sdm_to_mask(self.ema["M_d"](image)["sdm"], o.k)
        pseudo, of_p, of_m = (torch.stack([label_map(x) for x in q]) for q in ((p + m) / 2, p, m))
        agree = (of_p == of_m)[:, None].to(p.dtype)
        dice = torch.stack([hard_dice(q[None], y[None]) for q, y in zip(p, of_m, strict=True)])
        a = torch.ones_like(agree) if o.trust == "all" else agree
        if o.trust == "both":
            a = a * dice.view(-1, 1, 1, 1, 1)
        return pseudo, a, {"pseudo/foreground": (pseudo > 0).float().mean(), "pseudo/agreement": dice.mean()}

    def after_step(self, batch: Batch, iteration: int) -> None:
        for name, network in {"M_s": self.M_s, "M_d": self.M_d}.items():
            ema_update(self.ema[name], network, ema_decay(iteration, self.options.ema_decay))

    def predict(self, image: Tensor, outputs: tuple[str, ...]) -> Tensor:
        found = {}
        both: dict[str, Any] = {"": self, "ema_": self.ema}
        for prefix, networks in both.items():
            wanted = {name.removeprefix("ema_") for name in outputs if name.startswith("ema_") == bool(prefix)}
            if wanted & {"seg", "mean"}:
                found[f"{prefix}seg"] = probabilities(networks.M_s(image)["seg"], self.options.classes)
            if wanted & {"sdm", "mean"}:
                found[f"{prefix}sdm"] = sdm_to_mask(networks.M_d(image)["sdm"], self.options.k)
            if "mean" in wanted:
                found[f"{prefix}mean"] = (found[f"{prefix}seg"] + found[f"{prefix}sdm"]) / 2
        return torch.cat([found[name] for name in outputs], dim=1)

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        z = self.M_d(image)["sdm"]
        return by_name(p=probabilities(self.M_s(image)["seg"], self.options.classes),
                       m=sdm_to_mask(z, self.options.k), z=z)  # fmt: skip
