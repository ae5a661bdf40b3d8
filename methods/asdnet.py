"""ASDNet: Nie et al., ASDNet: Attention Based Semi-supervised Deep Networks for Medical Image Segmentation, 2018.

Our interpretation, from the abstract and the authors' research code; the paper's weights could not be checked. S is a
V-Net. D is a fully convolutional critic. It predicts for each voxel the confidence M in [0,1] that the segmentation
was drawn by hand:

    S   min   1/2 (mean a w CE + mean(a) Dice_a)  [labeled]  +  lambda_adv CE(D(p), 1)  [all]
              + lambda_semi mean_{v: M > T} CE(p, [p > 1/2])  [unlabeled, once D has learned something]
    D   min   CE(D(Y), 1) + CE(D(p), 0)  [labeled]              Adam, after each step of S, p in evaluation mode

The region attention w = (1 - M)^2 is large where D is not convinced. The sample attention of each crop is
a = 1/2 + 12.5 (mean(1 - M) - 1/2)^2, and Dice_a = 1 - 2 sum a p Y / sum a (p^2 + Y^2). No gradient flows through M, w
and a. Differences: w and a are divided by their means, which keeps the balance of CE and Dice (`--attention released`
leaves them undivided); T is not tuned on validation scans; pseudo-labels count after 1/6 of the training; D is a
U-shaped network, whose lower scales the released forward pass leaves unused (networks/critics.py).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.terms import EPSILON, dice_loss, foreground_logits, hard_dice, masked_mean, weighted_sum
from methods.adversary import Adversary, judged_output
from methods.base import TUNED_SEPARATE, Batch, Losses, Method, batch_norm_option, labeled_part, softmax_option
from networks.critics import ConfidenceNet
from utils.options import Condition, option

ATTENTION = ("relative", "released", "none")
PSEUDO: Condition = {"lambda_semi": bool, "semi_start": lambda share: share < 1, "threshold": lambda T: T < 1}
JUDGED: list[Condition] = [{"lambda_adv": bool}, {"attention": ATTENTION[:-1]}, PSEUDO]
cross_entropy = F.binary_cross_entropy_with_logits


class ASDNet(Method):
    """A V-Net and a critic of its segmentation, which directs attention and chooses pseudo labels."""

    PRESETS = {"paper": {}, "tuned": TUNED_SEPARATE}

    @dataclass
    class Options(Method.Options):
        filters: int = option(16, "channels of the V-Net's first block; the critic has twice as many", minimum=1)
        softmax: bool = softmax_option()
        batch_norm: str = batch_norm_option()
        attention: str = option("relative", "w and a, with mean 1 or as released, or neither", choices=ATTENTION)
        lambda_adv: float = option(0.05, "weight of convincing the critic", minimum=0)
        lambda_semi: float = option(0.1, "weight of the pseudo labels", minimum=0, only_if=PSEUDO)
        threshold: float = option(0.2, "T, confidence above which voxels count", minimum=0, maximum=1, only_if=PSEUDO)
        semi_start: float = option(1 / 6, "share of the training without them", minimum=0, maximum=1, only_if=PSEUDO)
        critic_lr: float = option(1e-4, "learning rate of the critic's Adam", minimum=0, only_if=JUDGED)
        critic_image: bool = option(False, "give the critic the image as well", only_if=JUDGED)

    options: Options
    needs_unlabeled = True
    least_multiple = 8  # of the critic
    outputs = ("seg",)

    def __init__(self, options: Options, *, iterations: int):
        super().__init__(options, iterations=iterations)
        self.network = self.backbone(heads={"seg": self.seg_channels})
        critic = ConfidenceNet(channels=2 + options.critic_image * options.channels, filters=2 * options.filters)
        self.adversary = Adversary(critic, lr=options.critic_lr)

    def critic_input(self, p: Tensor, image: Tensor) -> Tensor:
        """Input of the critic: p (N,1,W,H,D) and image (N,K,W,H,D) -> (N,2,W,H,D) of 1-p and p, (N,2+K,W,H,D)
        with the image if `critic_image`."""
        return torch.cat([1 - p, p, image] if self.options.critic_image else [1 - p, p], dim=1)

    def forward(self, batch: Batch, iteration: int) -> Losses:
        o, image, label, labeled = self.options, batch["image"], batch["label"], len(batch["label"])
        logits = foreground_logits(self.passes(self.network, image, labeled)["seg"])
        p, y = logits.sigmoid(), label.unsqueeze(1).to(logits.dtype)
        verdict = foreground_logits(self.adversary(self.critic_input(p, image)))
        M, doubt = verdict.detach().sigmoid(), torch.sigmoid(-verdict[:labeled].detach())
        w, a = doubt.square(), 0.5 + 12.5 * (doubt.mean(dim=(1, 2, 3, 4), keepdim=True) - 0.5).square()
        if o.attention != "released":
            ones = torch.ones_like(w), torch.ones_like(a)
            w, a = ones if o.attention == "none" else (w / w.mean().clamp(min=EPSILON), a / a.mean())
        ce = (a * w * cross_entropy(logits[:labeled], y, reduction="none")).mean()
        terms = {
            "seg": 0.5 * (ce + a.mean() * dice_loss(p[:labeled], label, a)),
            "adversarial": cross_entropy(verdict, torch.ones_like(verdict)),
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
            real, fake = (foreground_logits(critic(self.critic_input(x, image))) for x in (y, p))
            return cross_entropy(real, torch.ones_like(real)) + cross_entropy(fake, torch.zeros_like(fake))

        self.adversary.step(loss, batch, iteration)

    def predict(self, image: Tensor, outputs: tuple[str, ...]) -> Tensor:
        return foreground_logits(self.network(image)["seg"]).sigmoid()

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        p = self.predict(image, self.outputs)
        M = foreground_logits(self.adversary(self.critic_input(p, image))).sigmoid()
        return {"p": p.squeeze(1), "M": M.squeeze(1)}
