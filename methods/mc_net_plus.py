"""MC-Net+: Wu et al., Mutual consistency learning for semi-supervised medical image segmentation, MedIA 2022.

One encoder has three decoders, which double their maps by transposed convolution, trilinear and nearest interpolation.
Decoder i predicts p_i. Sharpened, it is the soft pseudo-label s_i of the other two:

    s_i  =  p_i^(1/T) / (p_i^(1/T) + (1 - p_i)^(1/T)),  T = 0.1
    min   1/2 sum_i Dice(p_i, Y)  [labeled]  +  lambda(t) sum_{i != j} mean (p_i - s_j)^2  [all]
    lambda(t)  rises to 1 as a Gaussian ramp that ends after 40 % of the iterations

A pseudo-label is a target, so no gradient flows through s_j; the released code lets it flow through both (preset
`authors`). As released the supervised loss is Dice alone, and the decoder with transposed convolutions is tested.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from losses.ramps import ramp_up
from losses.terms import consistency_loss, dice_loss, hard_dice, probabilities, weighted_sum
from methods.base import (
    AGREES,
    TUNED_SEPARATE,
    Batch,
    Losses,
    Method,
    batch_norm_option,
    by_name,
    joined,
    labeled_part,
    ramp_end_option,
    ramp_option,
    softmax_option,
)
from networks.decoders import UPS, Decoders
from utils.errors import UserError
from utils.options import option


class MCNetPlus(Method):
    """An encoder with three decoders, each of which learns from labels and from the other two."""

    multiclass = True
    PRESETS = {
        "paper": {},
        "authors": {"softmax": True, "target_gradient": True, "ramp": "steps", "augment": "mirror", "lr_steps": []},
        "tuned": TUNED_SEPARATE,
    }  # fmt: skip

    @dataclass
    class Options(Method.Options):
        softmax: bool = softmax_option()
        batch_norm: str = batch_norm_option()
        temperature: float = option(0.1, "T of the sharpened pseudo-labels; 1: not sharpened", minimum=0.01,
                                    only_if=AGREES)  # fmt: skip
        target_gradient: bool = option(False, "let the gradient flow through the pseudo-labels too", only_if=AGREES)
        seg_weight: float = option(0.5, "weight of the Dice loss of each decoder", minimum=0)
        lambda_max: float = option(1.0, "largest weight of the consistency", minimum=0)
        ramp: str = ramp_option()
        ramp_end: float = ramp_end_option(0.4)

    options: Options
    outputs = ("seg", "trilinear", "nearest", "mean")

    def __init__(self, options: Options, *, iterations: int):
        super().__init__(options, iterations=iterations)
        o = options
        if o.temperature > 1:  # the gradient of p^(1/T) is infinite at 0
            raise UserError(f"--temperature {o.temperature:g} must be at most 1; 1 does not sharpen.")
        self.network = Decoders(self.backbone, heads={"seg": self.seg_channels}, filters=o.filters)

    def forward(self, batch: Batch, iteration: int) -> Losses:
        o, label = self.options, batch["label"]
        passes = [self.probabilities(x) for x in self.parts(batch["image"], len(label))]
        p = [joined(p_i) for p_i in zip(*passes, strict=True)]
        dice = torch.stack([dice_loss(labeled_part(p_i, batch), label) for p_i in p]).sum()
        terms = {"seg": dice, "consistency": self.consistency(p)}
        lambda_ = o.lambda_max * ramp_up(iteration, o.ramp_end * self.iterations, o.ramp)
        monitors = {
            "dice/train_seg": hard_dice(labeled_part(p[0].detach(), batch), label),
            "disagreement": disagreement([p_i.detach() for p_i in p]),
        }
        total = weighted_sum(terms, {"seg": o.seg_weight, "consistency": lambda_})
        return Losses(total, terms, {"lambda": lambda_}, monitors)

    def probabilities(self, image: Tensor) -> list[Tensor]:
        """image (N,K,W,H,D) -> p_i of each decoder, (N,C,W,H,D) in [0,1]."""
        return [probabilities(x["seg"], self.options.classes) for x in self.network(image)]

    def consistency(self, p: list[Tensor]) -> Tensor:
        """The sum over all ordered pairs of mean (p_i - s_j)^2, for p_i (N,C,W,H,D) in [0,1]."""
        o = self.options
        sharp = [sharpened(p_j if o.target_gradient else p_j.detach(), o.temperature) for p_j in p]
        pairs = [(p_i, s_j) for i, p_i in enumerate(p) for j, s_j in enumerate(sharp) if i != j]
        return torch.stack([consistency_loss(p_i, s_j) for p_i, s_j in pairs]).sum()

    def predict(self, image: Tensor, outputs: tuple[str, ...]) -> Tensor:
        if set(outputs) == {"seg"}:  # the other decoders need not run
            return torch.cat([probabilities(self.network.first(image)["seg"], self.options.classes)] * len(outputs), 1)
        p = self.probabilities(image)
        maps = dict(zip(self.outputs, [*p, torch.stack(p).mean(dim=0)], strict=True))
        return torch.cat([maps[name] for name in outputs], dim=1)

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        return by_name(**dict(zip(UPS, self.probabilities(image), strict=True)))


def disagreement(p: list[Tensor]) -> Tensor:
    """The mean over voxels of the standard deviation of the p_i, (N,C,W,H,D) each.

    On a CPU torch.std would take five times as long.
    """
    mean = torch.stack(p).mean(dim=0)
    return torch.stack([(p_i - mean).square() for p_i in p]).mean(dim=0).sqrt().mean()


def sharpened(p: Tensor, temperature: float) -> Tensor:
    """p^(1/T) / (p^(1/T) + (1 - p)^(1/T)) for p in [0,1] of any shape; the closer T is to 0, the closer to 0 or 1."""
    a, b = p ** (1 / temperature), (1 - p) ** (1 / temperature)
    return a / (a + b)
