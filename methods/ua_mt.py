"""UA-MT: Yu et al., Uncertainty-aware Self-ensembling Model for Semi-supervised 3D Left Atrium Segmentation, 2019.

A mean teacher whose consistency is restricted to voxels where the teacher is certain. T stochastic passes of the
teacher give the mean probability pbar and its entropy U:

    U = - sum_c pbar_c ln pbar_c                                            in [0, ln 2]
    C = sum_v 1(U < H) (p - q)^2 / sum_v 1(U < H)
    H(t) = (3/4 + 1/4 exp(-5 (1 - t/T_max)^2)) ln 2                         from 0.5210 to ln 2

As in the published command, C is computed on unlabeled crops alone (`--consistency-on all` is closer to the paper's sum
over both). Two differences from the released code: the teacher starts as a copy of the student, not from weights of its
own (after one step both codes agree); its batch-norm statistics are the average of the student's, so that the teacher
can be tested too. With several classes U is the entropy of each class against all others, with a mask for each class.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from losses.perturbation import monte_carlo, noisy
from losses.ramps import ramp_up
from losses.terms import entropy, masked_mean, probabilities
from methods.base import AGREES, ITEMS, TUNED_SEPARATE, by_name
from methods.mean_teacher import MeanTeacher
from utils.options import option


class UAMT(MeanTeacher):
    """Mean teacher with the consistency masked by the teacher's uncertainty."""

    PRESETS = {
        "paper": {},
        "authors": {"softmax": True, "ramp": "steps", "augment": "mirror", "entropy_epsilon": 1e-6},
        "tuned": TUNED_SEPARATE,
    }

    @dataclass
    class Options(MeanTeacher.Options):
        consistency_on: str = option("unlabeled", "crops on which the consistency is computed", choices=ITEMS,
                                     only_if=AGREES)  # fmt: skip
        passes: int = option(8, "T, stochastic passes of the teacher for the uncertainty", minimum=1, only_if=AGREES)
        entropy_epsilon: float = option(
            0.0, "e of U = - sum_c pbar_c ln(pbar_c + e), 1e-6 as released; 0: none, pbar is kept 1e-6 from 0 and 1",
            minimum=0, only_if=AGREES,
        )  # fmt: skip

    options: Options

    def consistency(
        self, p: Tensor, image: Tensor, iteration: int, labeled: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        q = self.by_parts(self.teach, noisy(image, self.options.noise), labeled)
        uncertainty = self.by_parts(self.uncertainty, image, labeled)
        certain = (uncertainty < self.threshold(iteration)).to(p.dtype)
        return masked_mean((p - q).square(), certain), {"certain_share": certain.mean()}

    def uncertainty(self, image: Tensor) -> Tensor:
        """image (N,K,W,H,D) -> U (N,C,W,H,D) in [0, ln 2], the entropy of the mean of T passes."""
        passes = monte_carlo(self.teacher, image, passes=self.options.passes, noise=self.options.noise)
        p = [probabilities(x["seg"], self.options.classes).unflatten(0, (-1, len(image))) for x in passes]
        return entropy(torch.cat(p).mean(dim=0), self.options.entropy_epsilon)

    def threshold(self, iteration: int) -> float:
        """H(t), the uncertainty in [0, ln 2] below which a voxel counts."""
        return (0.75 + 0.25 * ramp_up(iteration, self.iterations)) * math.log(2)

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        return {**super().maps(image), **by_name(U=self.uncertainty(image))}
