"""TCSE: Li et al., Transformation-consistent Self-ensembling Model for Semi-supervised Medical Image Segmentation.

IEEE Transactions on Neural Networks and Learning Systems, 2020.

A mean teacher whose consistency compares student and teacher under a transformation pi of the image: quarter turns in
the plane and a flip, drawn anew for every crop (of crops that are not square there half turns alone):

    C = mean || pi(f(x)) - f'(pi(x + xi)) ||^2  =  mean || f(x) - pi^-1(f'(pi(x + xi))) ||^2

The second form is computed. Both are equal, because pi only permutes voxels. No gradient passes through pi. Our
interpretation, on labeled and unlabeled crops: the DTML and UA-MT papers report a V-Net without code, and in the
released 2D code the consistency has no gradient. `--scale` adds the zoom of the journal version.
"""

from dataclasses import dataclass

from torch import Tensor

from losses.perturbation import Transformation, noisy
from losses.terms import masked_mean
from methods.base import AGREES
from methods.mean_teacher import MeanTeacher
from utils.options import option


class TCSE(MeanTeacher):
    """Mean teacher whose target is computed on the turned and flipped image."""

    @dataclass
    class Options(MeanTeacher.Options):
        scale: float = option(0.0, "also zoom in the plane by up to this share, such as 0.2", minimum=0, maximum=0.5,
                              only_if=AGREES)  # fmt: skip

    options: Options

    def consistency(
        self, p: Tensor, image: Tensor, iteration: int, labeled: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        pi = Transformation.draw(image.shape, scale=self.options.scale)
        q = pi.inverse(self.by_parts(self.teach, pi(noisy(image, self.options.noise)), labeled))
        return masked_mean((p - q).square(), pi.kept(p)), {}
