"""ASDNet: Nie et al., ASDNet: Attention Based Semi-supervised Deep Networks for Medical Image Segmentation, 2018.

Our interpretation, from the abstract and the authors' research code; the paper's weights could not be checked. A
V-Net S and a fully convolutional critic D, which gives each voxel the confidence M in [0,1] that the segmentation
there is a label:

    S   min   1/2 (mean a w CE + mean(a) Dice_a)  [labeled]  +  lambda_adv CE(D(p), 1)  [all]
              + lambda_semi mean_{v: M > T} CE(p, [p > 1/2])  [unlabeled, once D has learned something]
    D   min   CE(D(Y), 1) + CE(D(p), 0)  [labeled]              Adam, after each step of S

with the region attention w = (1 - M)^2, which looks where D is not convinced, the sample attention a = 1/2 + 12.5
(mean(1 - M) - 1/2)^2 of each crop, and Dice_a = 1 - 2 sum a p Y / sum a (p^2 + Y^2); no gradient through M, w, a. Ours:
w and a are divided by their means and so keep the balance of CE and Dice; T is not taken from validation scans; pseudo
labels count from 1/6 of the training on; D is the U-shape that its code meant. `--attention released`: as they are.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.terms import EPSILON, dice_loss, foreground_logits, hard_dice, masked_mean, weighted_sum
from methods.adversary import Adversary, judged_output
from methods.base import Batch, Losses, Method, labeled_part
from networks.backbones import BACKBONES
from networks.critics import ConfidenceNet
from utils.options import Condition, option

ATTENTION = ("relative", "released", "none")
PSEUDO: Condition = {"lambda_semi": bool, "semi_start": lambda share: share < 1, "threshold": lambda T: T < 1}
JUDGED: list[Condition] = [{"lambda_adv": bool}, {"attention": ATTENTION[:-1]}, PSEUDO]
cross_entropy = F.binary_cross_entropy_with_logits


class ASDNet(Method):
    """A V-Net and a critic of its segmentation, which directs attention and chooses pseudo labels."""

    @dataclass
    class Options(Method.Options):
        filters: int = option(16, "channels of the V-Net's first block; the critic has twice as many", minimum=1)
        softmax: bool = option(False, "two softmax channels in place of one sigmoid")
        attention: str = option("relative", "w and a, with mean 1 or as released, or neither", choices=ATTENTION)
        lambda_adv: float = option(0.05, "weight of convincing the critic", minimum=0)
        lambda_semi: float = option(0.1, "weight of the pseudo labels", minimum=0, only_if=PSEUDO)
        threshold: float = option(0.2, "T, confidence above which voxels count", minimum=0, maximum=1, only_if=PSEUDO)
        semi_start: float = option(1 / 6, "share of the training without them", minimum=0, maximum=1, only_if=PSEUDO)
        critic_lr: float = option(1e-4, "rate of the critic's Adam", minimum=0, only_if=JUDGED)
        critic_image: bool = option(False, "show the critic the image beside the segmentation", only_if=JUDGED)

    options: Options

    def __init__(self, options: Options, *, iterations: int):
        super().__init__(options, iterations=iterations)
        self.network = BACKBONES[options.backbone](heads={"seg": 2 if options.softmax else 1}, filters=options.filters)
        critic = ConfidenceNet(channels=2 + options.critic_image, filters=2 * options.filters)
        self.adversary = Adversary(critic, lr=options.critic_lr)

    @property
    def needs_unlabeled(self) -> bool:
        return True

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("seg",)

    def seen(self, p: Tensor, image: Tensor) -> Tensor:
        """What the critic sees: background and foreground, and the image if `critic_image`."""
        return torch.cat([1 - p, p, image] if self.options.critic_image else [1 - p, p], dim=1)

    def forward(self, batch: Batch, iteration: int) -> Losses:
        o, image, label, labeled = self.options, batch["image"], batch["label"], len(batch["label"])
        logits = foreground_logits(self.network(image)["seg"])
        p, y = logits.sigmoid(), label.unsqueeze(1).to(logits.dtype)
        opinion = foreground_logits(self.adversary(self.seen(p, image)))
        M, doubt = opinion.detach().sigmoid(), torch.sigmoid(-opinion[:labeled].detach())
        w, a = doubt.square(), 0.5 + 12.5 * (doubt.mean(dim=(1, 2, 3, 4), keepdim=True) - 0.5).square()
        if o.attention != "released":
            ones = torch.ones_like(w), torch.ones_like(a)
            w, a = ones if o.attention == "none" else (w / w.mean().clamp(min=EPSILON), a / a.mean())
        ce = (a * w * cross_entropy(logits[:labeled], y, reduction="none")).mean()
        terms = {
            "seg": 0.5 * (ce + a.mean() * dice_loss(p[:labeled], label, a)),
            "adversarial": cross_entropy(opinion, torch.ones_like(opinion)),
            "semi": masked_mean(F.softplus(-logits[labeled:].abs()), (M[labeled:] > o.threshold).to(p.dtype)),
        }
        semi = o.lambda_semi if iteration >= o.semi_start * self.iterations else 0.0
        monitors = {
            "dice/train_seg": hard_dice(labeled_part(p.detach(), batch), label),
            "critic/confidence": M.mean(),
            "pseudo_labels": (M[labeled:] > o.threshold).float().mean(),
        }
        factors = {"adversarial": o.lambda_adv, "semi": semi}
        return Losses(weighted_sum(terms, factors), terms, {"lambda_semi": semi}, monitors)

    def after_step(self, batch: Batch, iteration: int) -> None:
        image, y = labeled_part(batch["image"], batch), batch["label"].unsqueeze(1).to(batch["image"].dtype)
        p = foreground_logits(judged_output(self.network, image)["seg"]).sigmoid()

        def loss(critic: torch.nn.Module) -> Tensor:
            real, false = (foreground_logits(critic(self.seen(x, image))) for x in (y, p))
            return cross_entropy(real, torch.ones_like(real)) + cross_entropy(false, torch.zeros_like(false))

        self.adversary.step(loss, batch, iteration)

    def predict(self, image: Tensor, outputs: tuple[str, ...]) -> Tensor:
        return foreground_logits(self.network(image)["seg"]).sigmoid()

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        p = self.predict(image, self.outputs)
        M = foreground_logits(self.adversary(self.seen(p, image))).sigmoid()
        return {"p": p.squeeze(1), "M": M.squeeze(1)}
