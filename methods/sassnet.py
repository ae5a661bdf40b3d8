"""SASSNet: Li, Zhang & He, Shape-aware Semi-supervised 3D Semantic Segmentation for Medical Images, MICCAI 2020.

One V-Net has two heads, q = sigmoid(.) and z = tanh(.). A critic D reads z and the image x. It learns to distinguish
labeled scans (class 1) from unlabeled ones (class 0):

    V-Net   min  Dice(q, Y) + beta mean (z - SDM(Y))^2  [labeled]  +  w(t) CE(D(z, x), 1)  [unlabeled]
    D       min  CE(D(z, x), 1)  [labeled]  +  CE(D(z, x), 0)  [unlabeled]      Adam, after each step of the V-Net

As in the released code, D runs in evaluation mode for the V-Net's loss. For the step of D, z is computed again by the
V-Net in evaluation mode. There w rises to 0.01 with 16 labeled scans and to 0.015 with 8.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from losses.ramps import RAMPS, ramp_up
from losses.terms import cross_entropy
from methods.adversary import Adversary, judged_output
from methods.base import TUNED_SEPARATE, Batch, Losses
from methods.two_heads import TwoHeads
from networks.critics import MapCritic
from utils.options import option


class SASSNet(TwoHeads):
    """Two heads of one V-Net, and a critic of the signed distance maps."""

    PRESETS = {"paper": {}, "authors": {"ramp": "steps", "augment": "mirror"}, "tuned": TUNED_SEPARATE}

    @dataclass
    class Options(TwoHeads.Options):
        adversarial_max: float = option(0.01, "largest w; the authors' is 0.015 with 8 labeled scans", minimum=0)
        ramp: str = option("gaussian", "how w rises", choices=RAMPS, only_if={"adversarial_max": bool})
        critic_lr: float = option(1e-4, "learning rate of the critic's Adam", minimum=0,
                                  only_if={"adversarial_max": bool})  # fmt: skip

    options: Options
    needs_unlabeled = True
    least_multiple = 16  # of the critic

    def __init__(self, options: Options, *, iterations: int):
        super().__init__(options, iterations=iterations)
        o = options
        critic = MapCritic(filters=4 * o.filters, classes=o.classes, channels=o.channels)
        self.adversary = Adversary(critic, lr=o.critic_lr)

    def forward(self, batch: Batch, iteration: int) -> Losses:
        o, image, labeled = self.options, batch["image"], len(batch["label"])
        q, z = self.heads(self.passes(self.network, image, labeled))
        verdict = self.adversary(z[labeled:], image[labeled:])
        adversarial = cross_entropy(verdict, torch.ones(len(verdict), dtype=torch.long, device=verdict.device))
        w = o.adversarial_max * ramp_up(iteration, self.iterations, o.ramp)
        taken_for_labeled = verdict.detach().softmax(dim=1)[:, 1].mean()
        return self.losses(q, z, batch, {"adversarial": adversarial}, w, **{"critic/fooled": taken_for_labeled})

    def after_step(self, batch: Batch, iteration: int) -> None:
        image, labeled = batch["image"], len(batch["label"])
        z = judged_output(self.network, image)["sdm"]
        origin = (torch.arange(len(image), device=image.device) < labeled).long()

        def loss(critic: nn.Module) -> Tensor:
            verdict = critic(z, image)
            return cross_entropy(verdict[:labeled], origin[:labeled]) + cross_entropy(
                verdict[labeled:], origin[labeled:]
            )

        self.adversary.step(loss, batch, iteration)
