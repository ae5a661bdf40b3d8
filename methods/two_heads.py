"""The base class of DTC and SASSNet: one V-Net that predicts a segmentation and a signed distance map."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.terms import dice_loss, hard_dice, probabilities, weighted_sum
from methods.base import Batch, Losses, Method, batch_norm_option, by_name, labeled_part, softmax_option
from utils.options import option


class TwoHeads(Method):
    """A V-Net with q = sigmoid(logits) and z = tanh(.); its supervised loss is Dice(q, Y) + beta mean (z - SDM(Y))^2.

    As in the released codes of both, the segmentation learns from Dice alone: they log a cross-entropy, but do not
    minimise it.
    """

    @dataclass
    class Options(Method.Options):
        softmax: bool = softmax_option()
        batch_norm: str = batch_norm_option()
        beta: float = option(0.3, "weight of the squared error of the signed distance map", minimum=0)

    options: Options
    outputs: tuple[str, ...] = ("seg",)
    multiclass = True

    def __init__(self, options: Options, *, iterations: int):
        super().__init__(options, iterations=iterations)
        o = options
        self.needs_sdm = o.beta > 0
        self.network = self.backbone(heads={"seg": self.seg_channels, "sdm": o.classes})

    def heads(self, outputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Outputs of the network -> q in [0,1] and z in [-1,1], each (N,C,W,H,D)."""
        return probabilities(outputs["seg"], self.options.classes), outputs["sdm"]

    def losses(
        self, q: Tensor, z: Tensor, batch: Batch, unsupervised: dict[str, Tensor], weight: float, **monitors: Tensor
    ) -> Losses:
        """Adds the supervised terms to the unsupervised one.

        Args:
            q, z: predictions of all items, (N,C,W,H,D).
            unsupervised: name -> scalar of the unsupervised term.
            weight: lambda(t), the weight of that term.
        """
        label = batch["label"]
        terms = {"seg": dice_loss(labeled_part(q, batch), label)}
        if self.needs_sdm:
            terms["sdm"] = F.mse_loss(labeled_part(z, batch), batch["sdm"])
        terms |= unsupervised
        factors = {"sdm": self.options.beta, **dict.fromkeys(unsupervised, weight)}
        monitors["dice/train_seg"] = hard_dice(labeled_part(q.detach(), batch), label)
        return Losses(weighted_sum(terms, factors), terms, {"lambda": weight}, monitors)

    def predict(self, image: Tensor, outputs: tuple[str, ...]) -> Tensor:
        return torch.cat([self.heads(self.network(image))[0] for _ in outputs], dim=1)

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        q, z = self.heads(self.network(image))
        return by_name(q=q, z=z)
