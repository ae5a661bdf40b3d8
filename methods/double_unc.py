"""DoubleUnc: Wang et al., Double-Uncertainty Weighted Method for Semi-supervised Learning, MICCAI 2020.

Our interpretation: no code was released and only the abstract could be read. The teacher makes T stochastic passes. The
target q is the mean of its predictions. The feature uncertainty U_f is the entropy over the C_l channels of its decoder
maps F^l. The segmentation uncertainty U_s is the entropy of the student's p, so it is learned. Both lie in [0,1]:

    U_s = - sum_c p_c ln p_c / ln 2
    U_f = mean_l ( - sum_c cbar_c ln cbar_c / ln C_l )          cbar = mean_t softmax_c(F_t^l)
    C = mean_v exp(-U_f) exp(-U_s) (p - q)^2  +  gamma mean_v U_s

`--no-learnable` computes U_s of the teacher's q: it then has no gradient, and the second term is left out.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.perturbation import monte_carlo
from losses.terms import entropy, probabilities
from methods.base import AGREES, by_name, joined
from methods.mean_teacher import MeanTeacher
from utils.options import option

BLOCKS = {"decoder": slice(1, None), "bottom": slice(0, 1), "none": slice(0, 0)}


class DoubleUnc(MeanTeacher):
    """Mean teacher with every voxel's penalty weighted by a segmentation and a feature uncertainty."""

    @dataclass
    class Options(MeanTeacher.Options):
        filters: int = option(16, "channels of the first block of both V-Nets", minimum=2)
        passes: int = option(8, "T, stochastic passes of the teacher", minimum=2, only_if=AGREES)
        learnable: bool = option(True, "U_s of the student, with gradient and the term gamma mean U_s", only_if=AGREES)
        gamma: float = option(1.0, "weight of mean U_s within C", minimum=0, only_if={"learnable": bool, **AGREES})
        feature_blocks: str = option("decoder", "blocks whose maps F enter U_f; none: no U_f", choices=list(BLOCKS),
                                     only_if=AGREES)  # fmt: skip

    options: Options

    def consistency(
        self, p: Tensor, image: Tensor, iteration: int, labeled: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        o = self.options
        q, U_f = map(joined, zip(*map(self.bayesian_teacher, self.parts(image, labeled)), strict=True))
        U_s = entropy(p if o.learnable else q) / math.log(2)
        C = ((-U_f - U_s).exp() * (p - q).square()).mean()
        if o.learnable:
            C = C + o.gamma * U_s.mean()
        return C, {"uncertainty/segmentation": U_s.detach().mean(), "uncertainty/feature": U_f.mean()}

    def bayesian_teacher(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (N,K,W,H,D) -> q (N,C,W,H,D) and U_f (N,1,W,H,D), both in [0,1], from T stochastic passes."""
        o = self.options

        def read(x: Tensor) -> list[Tensor]:
            maps = self.teacher.features(x)
            p = probabilities(self.teacher.read(maps)["seg"], o.classes)
            shares = [F_t.softmax(dim=1) for F_t in maps[BLOCKS[o.feature_blocks]]]
            return [y.unflatten(0, (-1, len(image))).sum(dim=0) for y in (p, *shares)]

        passes = monte_carlo(self.teacher, image, passes=o.passes, noise=o.noise, read=read)
        q, *cbar = (torch.stack(sums).sum(dim=0) / o.passes for sums in zip(*passes, strict=True))
        U_l = [-torch.xlogy(c, c).sum(dim=1, keepdim=True) / math.log(c.shape[1]) for c in cbar]
        full_size = [F.interpolate(U, size=image.shape[2:], mode="trilinear") for U in U_l]
        U_f = torch.stack(full_size).mean(dim=0).clamp(0, 1) if full_size else torch.zeros_like(q[:, :1])
        return q, U_f

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        p = self.predict(image, ("seg",))
        U_s, U_f = entropy(p) / math.log(2), self.bayesian_teacher(image)[1]
        return {**super().maps(image), **by_name(U_s=U_s, U_f=U_f)}
