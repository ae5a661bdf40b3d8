"""DTML+, our extension of DTML: both networks learn from the pseudo-labels of their moving averages (EMA teachers).

M_s predicts p = sigmoid(logits), M_d predicts z = tanh(.) and m = sigmoid(-k z), as in DTML (methods/dtml.py). Their
moving averages predict p' and m' of an unlabeled crop u without further augmentation and without gradient:

    y'  =  1 where (p' + m')/2 > 1/2, else 0                  pseudo-label
    a   =  D where p' > 1/2 and m' > 1/2 agree, else 0        voxel weight, with D = Dice(p' > 1/2, m' > 1/2) of u

Each network then learns y' from its own strong view S(u), with random contrast, noise and blur:

    min over M_s   L_seg (x, Y)  + w(t) L_seg^a (S(u), y')
    min over M_d   L_mask(x, Y)  + w(t) L_mask^a(S(u), y')
    w(t)  =  0 before T_0, then rises to --pseudo-weight as a Gaussian ramp that ends at T_1

x, Y are labeled crops; the superscript a weights every voxel. Where the two averages disagree, at least one of them is
wrong, so the weight is 0. The default output is the mean of both averages. With C classes p and m have C channels,
and a label is the class of the largest value where that is above 1/2, else background (`sure_labels`). They agree where
both labels are the same class. D is a mean over the classes, of p'_c > 1/2 and the label by m'.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losses.ema import Averages, ema_decay
from losses.perturbation import strong_view
from losses.ramps import ramp_up
from losses.terms import dice_loss, dice_of_labels, probabilities, sdm_to_mask, seg_loss, weighted_sum
from methods.base import TUNED, UNLABELED, Batch, Losses, Method, batch_norm_option, softmax_option
from methods.dtml import probability_maps, task_maps, task_monitors
from utils.options import Condition, option

TRUST = ("all", "voxel", "both")
COUNTS: Condition = {"pseudo_weight": bool, **UNLABELED}
STARTS: Condition = {"start": lambda share: share < 1, **UNLABELED}
BOTH: Condition = {**COUNTS, **STARTS}


def sure_labels(p: Tensor) -> Tensor:
    """Foreground probabilities (N,C,W,H,D) in [0,1] -> uint8 (N,W,H,D): the largest's class if it is above 1/2, or 0.

    `utils.masks.label_maps` leaves the background what the classes leave of 1. Where two classes of a network that has
    not learned are at 0.35 each, that is foreground, and as a pseudo-label it teaches more of it.
    """
    largest, c = p.max(dim=1)
    return torch.where(largest > 0.5, c + 1, 0).to(torch.uint8)


class DTMLPlus(Method):
    """Two V-Nets, M_s with the head 'seg' and M_d with the head 'sdm', and the moving average of each."""

    multiclass = True
    PRESETS = {"tuned": TUNED}

    @dataclass
    class Options(Method.Options):
        softmax: bool = softmax_option()
        batch_norm: str = batch_norm_option()
        k: float = option(50.0, "steepness of m = sigmoid(-k z)", minimum=1e-6)
        ema_decay: float = option(0.99, "decay of the moving averages", minimum=0, maximum=1)
        pseudo_weight: float = option(0.5, "largest weight of the pseudo-label losses", minimum=0, only_if=STARTS)
        start: float = option(0.2, "share of the iterations before unlabeled crops count", minimum=0, maximum=1,
                              only_if=COUNTS)  # fmt: skip
        full: float = option(0.4, "share of the iterations after which w is largest; up to --start: at once",
                             minimum=0, maximum=1, only_if=BOTH)  # fmt: skip
        trust: str = option("both", "voxels of a pseudo-label to learn: all; voxel: where both tasks agree; both: "
                            "there, weighted by the Dice of the two tasks on the crop", choices=TRUST,
                            only_if=BOTH)  # fmt: skip
        strong: float = option(0.5, "strength of the contrast, noise and blur of the strong views", minimum=0,
                           only_if=UNLABELED)  # fmt: skip

    options: Options
    outputs = ("ema_mean", "ema_seg", "ema_sdm", "mean", "seg", "sdm")

    def __init__(self, options: Options, *, iterations: int):
        super().__init__(options, iterations=iterations)
        o = options
        self.M_s = self.backbone(heads={"seg": self.seg_channels})
        self.M_d = self.backbone(heads={"sdm": o.classes})
        self.ema = Averages(M_s=self.M_s, M_d=self.M_d)

    def forward(self, batch: Batch, iteration: int) -> Losses:
        o, label, L = self.options, batch["label"], len(batch["label"])
        labeled, unlabeled = batch["image"].tensor_split([L])
        logits = self.passes(self.M_s, torch.cat([labeled, strong_view(unlabeled, o.strong)]), L)["seg"]
        z = self.passes(self.M_d, torch.cat([labeled, strong_view(unlabeled, o.strong)]), L)["sdm"]
        p, m = probabilities(logits, o.classes), sdm_to_mask(z, o.k)
        weight = o.pseudo_weight * self.ramp(iteration) if len(unlabeled) else 0.0
        terms = {"seg": seg_loss(logits[:L], label, o.classes), "mask": dice_loss(m[:L], label)}
        monitors: dict[str, Tensor] = {}
        if weight:
            pseudo, a, monitors = self.pseudo_label(unlabeled)
            terms["pseudo_seg"] = seg_loss(logits[L:], pseudo, o.classes, a)
            terms["pseudo_mask"] = dice_loss(m[L:], pseudo, a)
        else:
            zero = logits.new_zeros(())
            terms |= {"pseudo_seg": zero, "pseudo_mask": zero}
            monitors = dict.fromkeys(("pseudo/foreground", "pseudo/agreement"), zero)
        total = weighted_sum(terms, {"pseudo_seg": weight, "pseudo_mask": weight})
        return Losses(total, terms, {"w": weight}, monitors | task_monitors(p, m, label))

    def ramp(self, iteration: int) -> float:
        """w(t) divided by its maximum, in [0,1]."""
        first, last = (share * self.iterations for share in (self.options.start, self.options.full))
        if iteration < first:
            return 0.0
        return 1.0 if iteration >= last else ramp_up(iteration - first, last - first)

    @torch.no_grad()
    def pseudo_label(self, image: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """image (N,K,W,H,D) -> pseudo-label y' (N,W,H,D) of 0..C, weight a (N,1,W,H,D) in [0,1], and monitors."""
        o = self.options
        p = probabilities(self.ema["M_s"](image)["seg"], o.classes)
        m = sdm_to_mask(self.ema["M_d"](image)["sdm"], o.k)
        pseudo, label_p, label_m = (sure_labels(q) for q in ((p + m) / 2, p, m))
        agree = (label_p == label_m)[:, None].to(p.dtype)
        dice = torch.stack([dice_of_labels(*pair, o.classes) for pair in zip(label_p, label_m, strict=True)])
        a = torch.ones_like(agree) if o.trust == "all" else agree
        if o.trust == "both":
            a = a * dice.view(-1, 1, 1, 1, 1)
        return pseudo, a, {"pseudo/foreground": (pseudo > 0).float().mean(), "pseudo/agreement": dice.mean()}

    def after_step(self, batch: Batch, iteration: int) -> None:
        self.ema.follow(ema_decay(iteration, self.options.ema_decay), M_s=self.M_s, M_d=self.M_d)

    def predict(self, image: Tensor, outputs: tuple[str, ...]) -> Tensor:
        o = self.options
        maps: dict[str, Tensor] = {}
        pairs: dict[str, Any] = {"": self, "ema_": self.ema}
        for prefix, networks in pairs.items():
            own = {name.removeprefix("ema_") for name in outputs if name.startswith("ema_") == bool(prefix)}
            predictions = probability_maps(networks.M_s, networks.M_d, image, own, o.classes, o.k)
            maps |= {prefix + name: value for name, value in predictions.items()}
        return torch.cat([maps[name] for name in outputs], dim=1)

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        return task_maps(self.M_s, self.M_d, image, self.options.classes, self.options.k)
