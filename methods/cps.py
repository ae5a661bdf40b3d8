"""CPS: Chen et al., Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision, CVPR 2021, for volumes.

Two networks f_1 and f_2 of the same form, with different initial weights, see the same crops x. Each learns the hard
label that the other one gives them. With p_i = f_i(x), and y_i the class of each voxel by p_i, without gradient:

    min over f_1, f_2   L_seg(p_1, Y) + L_seg(p_2, Y)  +  w (L_cps[labeled] + L_cps[unlabeled])
    L_cps  =  mean CE(p_1, y_2) + mean CE(p_2, y_1)

Y is the label of the labeled crops and CE the cross-entropy. The weight w is constant. Two released codes differ:

    authors   L_cps is one mean over all crops, half of this sum in a batch with as many labeled crops as others
    ssl4mis   L_cps[unlabeled] alone, with a w that rises to 0.1 at the end of the run

The first network is the default output, as in the authors' code. With several classes p is a softmax over C+1 channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from losses.ramps import ramp_up
from losses.terms import ce_loss, dice_of_labels, hard_dice, probabilities, seg_loss, weighted_sum
from methods.base import (
    ITEMS,
    TUNED_SEPARATE,
    UNLABELED,
    Batch,
    Losses,
    Method,
    batch_norm_option,
    by_name,
    labeled_part,
)
from utils.masks import label_maps
from utils.options import Condition, option

COUNTS: Condition = {"pseudo_weight": bool}
THERE: list[Condition] = [{"pseudo_on": ("all",)}, UNLABELED]  # crops with pseudo-labels
SSL4MIS = {"pseudo_on": "unlabeled", "pseudo_weight": 0.1, "ramp_end": 1.0}


class CPS(Method):
    """Two V-Nets that learn from labels and from each other's hard pseudo-labels."""

    multiclass = True
    PRESETS = {
        "paper": {},
        "authors": {"pseudo_weight": 0.75, "batch_norm": "separate"},
        "ssl4mis": {**SSL4MIS, "augment": "mirror"},
        "tuned": {**TUNED_SEPARATE, **SSL4MIS},  # without pretrained weights, a constant w teaches the first mistakes
    }

    @dataclass
    class Options(Method.Options):
        batch_norm: str = batch_norm_option()
        pseudo_weight: float = option(1.5, "w, largest weight of the pseudo-labels", minimum=0, only_if=THERE)
        pseudo_on: str = option("all", "crops with pseudo-labels", choices=ITEMS, only_if=COUNTS)
        ramp_end: float = option(0.0, "share of the iterations after which w is largest, a Gaussian ramp; 0: at once",
                                 minimum=0, maximum=1, only_if=[{**COUNTS, **crops} for crops in THERE])  # fmt: skip

    options: Options
    outputs = ("seg", "seg_2", "mean")

    def __init__(self, options: Options, *, iterations: int):
        super().__init__(options, iterations=iterations)
        heads = {"seg": self.seg_channels}
        self.networks = nn.ModuleList(self.backbone(heads=heads) for _ in range(2))

    def forward(self, batch: Batch, iteration: int) -> Losses:
        o, image, label = self.options, batch["image"], batch["label"]
        logits = [self.passes(network, image, len(label))["seg"] for network in self.networks]
        p = [probabilities(x.detach(), o.classes) for x in logits]
        pseudo = [label_maps(q) for q in p]
        parts = [slice(len(label), None)] if len(image) > len(label) else []
        parts += [slice(len(label))] if o.pseudo_on == "all" else []
        crossed = [
            ce_loss(logits[i][part], pseudo[1 - i][part], o.classes) for part in parts for i in (0, 1)
        ] or [image.new_zeros(())]  # fmt: skip
        terms = {
            "seg": torch.stack([seg_loss(labeled_part(x, batch), label, o.classes) for x in logits]).sum(),
            "pseudo": torch.stack(crossed).sum(),
        }
        weight = o.pseudo_weight * ramp_up(iteration, o.ramp_end * self.iterations) if parts else 0.0
        learned = pseudo[0][0 if o.pseudo_on == "all" else len(label) :]
        monitors = {
            "dice/train_seg": hard_dice(labeled_part(p[0], batch), label),
            "pseudo/foreground": (learned > 0).float().mean() if len(learned) else image.new_zeros(()),
            "pseudo/agreement": dice_of_labels(pseudo[0], pseudo[1], o.classes),
        }
        return Losses(weighted_sum(terms, {"pseudo": weight}), terms, {"w": weight}, monitors)

    def predict(self, image: Tensor, outputs: tuple[str, ...]) -> Tensor:
        numbers = {"seg": (0,), "seg_2": (1,), "mean": (0, 1)}
        needed = sorted({i for name in outputs for i in numbers[name]})
        p = {i: probabilities(self.networks[i](image)["seg"], self.options.classes) for i in needed}
        return torch.cat([torch.stack([p[i] for i in numbers[name]]).mean(dim=0) for name in outputs], dim=1)

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        p, p_2 = self.predict(image, ("seg", "seg_2")).chunk(2, dim=1)
        return by_name(p=p, p_2=p_2)
