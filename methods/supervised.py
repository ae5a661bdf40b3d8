"""Supervised V-Net: the bounds of Table 3, and M_s alone or M_d alone of Table 2 (Zhang & Zhang 2021).

head seg    L_seg = 1/2 (cross-entropy + Dice) of p = sigmoid(logits)          V-Net, M_s only
head sdm    L_mask = Dice of m = sigmoid(-k z), z = tanh(.)                    M_d only
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from losses.terms import dice_loss, hard_dice, live_share, probabilities, sdm_to_mask, seg_loss
from methods.base import Batch, Losses, Method, by_name, labeled_part, softmax_option
from utils.options import option


class Supervised(Method):
    """One V-Net with one head, trained on labeled scans only; a batch holds labeled crops only."""

    uses_unlabeled = False
    multiclass = True

    @dataclass
    class Options(Method.Options):
        head: str = option("seg", "seg: V-Net or M_s alone; sdm: M_d alone", choices=("seg", "sdm"))
        softmax: bool = softmax_option(only_if={"head": ("seg",)})
        k: float = option(1500.0, "steepness of m = sigmoid(-k z), for the head sdm", minimum=1e-6,
                          only_if={"head": ("sdm",)})  # fmt: skip

    options: Options

    def __init__(self, options: Options, *, iterations: int):
        super().__init__(options, iterations=iterations)
        o = options
        self.network = self.backbone(heads={o.head: self.seg_channels if o.head == "seg" else o.classes})
        self.outputs = (o.head,)

    def forward(self, batch: Batch, iteration: int) -> Losses:
        o, label = self.options, batch["label"]
        output = labeled_part(self.network(batch["image"])[o.head], batch)
        p = self._probabilities(output)
        terms = {"seg": seg_loss(output, label, o.classes)} if o.head == "seg" else {"mask": dice_loss(p, label)}
        with torch.no_grad():
            monitors = {f"dice/train_{o.head}": hard_dice(p, label)}
            if o.head == "sdm":
                monitors["live_gradient/sdm"] = live_share(p)
        (total,) = terms.values()
        return Losses(total, terms, {}, monitors)

    def predict(self, image: Tensor, outputs: tuple[str, ...]) -> Tensor:
        return self._probabilities(self.network(image)[self.options.head])

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        output = self.network(image)[self.options.head]
        p = self._probabilities(output)
        return by_name(p=p) if self.options.head == "seg" else by_name(m=p, z=output)

    def _probabilities(self, output: Tensor) -> Tensor:
        """Output of the head, logits or z -> p or m (N,C,W,H,D) in [0,1]."""
        o = self.options
        return probabilities(output, o.classes) if o.head == "seg" else sdm_to_mask(output, o.k)
