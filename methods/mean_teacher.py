"""Mean teacher: Tarvainen & Valpola, Mean teachers are better role models, NeurIPS 2017, for segmentation.

A student f learns from labels and from a consistency with its teacher f'. The teacher is the exponential moving average
of the student, and its input has noise xi. With p = f(x) and q = f'(x + xi), both with dropout:

    min over f   L_seg + lambda(t) C        C = mean (p - q)^2
    f'  <-  alpha f' + (1 - alpha) f        alpha = min(1 - 1/(t+1), 0.99)

No gradient reaches the teacher. UA-MT, TCSE and DoubleUnc are subclasses with another C.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from losses.ema import ema_decay, ema_update, make_teacher
from losses.perturbation import noisy
from losses.ramps import ramp_up
from losses.terms import consistency_loss, hard_dice, probabilities, seg_loss, weighted_sum
from methods.base import (
    AGREES,
    ITEMS,
    TUNED_SEPARATE,
    Batch,
    Losses,
    Method,
    batch_norm_option,
    by_name,
    labeled_part,
    ramp_end_option,
    ramp_option,
    seg_outputs,
    softmax_option,
)
from utils.options import option


class MeanTeacher(Method):
    """A V-Net that learns from labels and from its moving average."""

    multiclass = True
    PRESETS = {"paper": {}, "tuned": TUNED_SEPARATE}

    @dataclass
    class Options(Method.Options):
        softmax: bool = softmax_option()
        batch_norm: str = batch_norm_option()
        consistency_on: str = option("all", "crops on which the consistency is computed", choices=ITEMS,
                                     only_if=AGREES)  # fmt: skip
        lambda_max: float = option(0.1, "largest weight of the consistency", minimum=0)
        ramp: str = ramp_option()
        ramp_end: float = ramp_end_option(1.0)
        ema_decay: float = option(0.99, "alpha, decay of the teacher's moving average; 0: no average", minimum=0,
                                  maximum=1)  # fmt: skip
        noise: float = option(0.1, "standard deviation of the teacher's input noise, clipped at two of them", minimum=0,
                              only_if=AGREES)  # fmt: skip

    options: Options
    outputs = ("seg", "teacher")

    def __init__(self, options: Options, *, iterations: int):
        super().__init__(options, iterations=iterations)
        self.needs_unlabeled = options.consistency_on == "unlabeled" and options.lambda_max > 0
        self.student = self.backbone(heads={"seg": self.seg_channels})
        self.teacher = make_teacher(self.student)

    def forward(self, batch: Batch, iteration: int) -> Losses:
        o, image, label = self.options, batch["image"], batch["label"]
        logits = self.passes(self.student, image, len(label))["seg"]
        p = probabilities(logits, o.classes)
        first = len(label) if o.consistency_on == "unlabeled" else 0
        monitors: dict[str, Tensor] = {}
        consistency = logits.new_zeros(())
        if len(image) > first:  # else lambda is 0: labeled crops alone
            consistency, monitors = self.consistency(p[first:], image[first:], iteration, len(label) - first)
        terms = {"seg": seg_loss(labeled_part(logits, batch), label, o.classes), "consistency": consistency}
        lambda_ = o.lambda_max * ramp_up(iteration, o.ramp_end * self.iterations, o.ramp)
        monitors["dice/train_seg"] = hard_dice(labeled_part(p.detach(), batch), label)
        return Losses(weighted_sum(terms, {"consistency": lambda_}), terms, {"lambda": lambda_}, monitors)

    def consistency(
        self, p: Tensor, image: Tensor, iteration: int, labeled: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The consistency C between the student's p (N,C,W,H,D) and the teacher on image (N,K,W,H,D), and monitors.

        The first `labeled` crops have a label: the teacher's batch norm keeps them apart as the student's does.
        """
        return consistency_loss(p, self.by_parts(self.teach, noisy(image, self.options.noise), labeled)), {}

    @torch.no_grad()
    def teach(self, image: Tensor) -> Tensor:
        """image (N,K,W,H,D) -> probabilities of the teacher (N,C,W,H,D), without noise and without gradient."""
        return probabilities(self.teacher(image)["seg"], self.options.classes)

    def after_step(self, batch: Batch, iteration: int) -> None:
        ema_update(self.teacher, self.student, ema_decay(iteration, self.options.ema_decay))

    def predict(self, image: Tensor, outputs: tuple[str, ...]) -> Tensor:
        networks = {"seg": self.student, "teacher": self.teacher}
        return seg_outputs(networks, image, outputs, self.options.classes)

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        p, q = self.predict(image, self.outputs).chunk(2, dim=1)
        return by_name(p=p, teacher=q)
