"""Supervised V-Net: the bounds of Table 3, and M_s alone or M_d alone of Table 2 (Zhang & Zhang 2021).

head seg    L_seg = 1/2 (cross-entropy + Dice) of p = sigmoid(logits)          V-Net, M_s only
head sdm    L_mask = Dice of m = sigmoid(-k z), z = tanh(.)                    M_d only
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Batch, Losses, Method, labeled_part
from networks.backbones import BACKBONES
from utils.losses import dice_loss, foreground_logits, hard_dice, live_share, sdm_to_mask, seg_loss
from utils.options import option


class Supervised(Method):
    """One V-Net with one head, from labeled scans only; a batch holds labeled crops alone."""

    uses_unlabeled = False

    @dataclass
    class Options(Method.Options):
        filters: int = option(16, "channels of the V-Net's first block", minimum=1)
        head: str = option("seg", "seg: V-Net or M_s alone; sdm: M_d alone", choices=("seg", "sdm"))
        softmax: bool = option(False, "two softmax channels in place of one sigmoid, as the V-Net rows of UA-MT")
        k: float = option(1500.0, "steepness of m = sigmoid(-k z), for the head sdm", minimum=0)

    options: Options

    def __init__(self, options: Options, *, iterations: int):
        super().__init__(options, iterations=iterations)
        channels = 2 if options.head == "seg" and options.softmax else 1
        self.network = BACKBONES[options.backbone](heads={options.head: channels}, filters=options.filters)

    @property
    def outputs(self) -> tuple[str, ...]:
        return (self.options.head,)

    def _logits(self, image: Tensor) -> Tensor:
        return foreground_logits(self.network(image)["seg"])

    def forward(self, batch: Batch, iteration: int) -> Losses:
        label = batch["label"]
        if self.options.head == "seg":
            logits = labeled_part(self._logits(batch["image"]), batch)
            terms, p = {"seg": seg_loss(logits, label)}, logits.sigmoid()
        else:
            p = sdm_to_mask(labeled_part(self.network(batch["image"])["sdm"], batch), self.options.k)
            terms = {"mask": dice_loss(p, label)}
        with torch.no_grad():
            monitors = {f"dice/train_{self.options.head}": hard_dice(p, label)}
            if self.options.head == "sdm":
                monitors["live_gradient/sdm"] = live_share(p)
        (total,) = terms.values()
        return Losses(total, terms, {}, monitors)

    def predict(self, image: Tensor, outputs: tuple[str, ...]) -> Tensor:
        if self.options.head == "seg":
            return self._logits(image).sigmoid()
        return sdm_to_mask(self.network(image)["sdm"], self.options.k)

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        if self.options.head == "seg":
            return {"p": self._logits(image).sigmoid().squeeze(1)}
        z = self.network(image)["sdm"]
        return {"m": sdm_to_mask(z, self.options.k).squeeze(1), "z": z.squeeze(1)}
