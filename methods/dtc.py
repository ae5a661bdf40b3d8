"""DTC: Luo et al., Semi-supervised Medical Image Segmentation through Dual-task Consistency, AAAI 2021.

One V-Net has two heads, q = sigmoid(.) and z = tanh(.). A consistency loss makes the two tasks agree:

    min   Dice(q, Y) + beta mean (z - SDM(Y))^2  [labeled]  +  lambda(t) mean (m - q)^2  [all],   m = sigmoid(-k z)

Gradient flows through both m and q. lambda rises to 1, as in the released code, where the flag
that sets 0.1 has no effect.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from losses.ramps import ramp_up
from losses.terms import consistency_loss, live_share, sdm_to_mask
from methods.base import TUNED_SEPARATE, Batch, Losses, by_name, ramp_end_option, ramp_option
from methods.two_heads import TwoHeads
from utils.options import option


class DTC(TwoHeads):
    """A V-Net whose two heads are trained to agree on every crop."""

    PRESETS = {"paper": {}, "authors": {"ramp": "steps", "augment": "mirror"}, "tuned": TUNED_SEPARATE}

    @dataclass
    class Options(TwoHeads.Options):
        k: float = option(1500.0, "steepness of m = sigmoid(-k z)", minimum=1e-6)
        lambda_max: float = option(1.0, "largest weight of the consistency", minimum=0)
        ramp: str = ramp_option()
        ramp_end: float = ramp_end_option(1.0)

    options: Options
    outputs = ("seg", "sdm")

    def forward(self, batch: Batch, iteration: int) -> Losses:
        o = self.options
        q, z = self.heads(self.passes(self.network, batch["image"], len(batch["label"])))
        m = sdm_to_mask(z, o.k)
        lambda_ = o.lambda_max * ramp_up(iteration, o.ramp_end * self.iterations, o.ramp)
        monitors = {"live_share/sdm": live_share(m.detach())}
        return self.losses(q, z, batch, {"consistency": consistency_loss(m, q)}, lambda_, **monitors)

    def predict(self, image: Tensor, outputs: tuple[str, ...]) -> Tensor:
        q, z = self.heads(self.network(image))
        predictions = {"seg": q, "sdm": sdm_to_mask(z, self.options.k)}
        return torch.cat([predictions[name] for name in outputs], dim=1)

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        q, z = self.heads(self.network(image))
        return by_name(q=q, z=z, m=sdm_to_mask(z, self.options.k))
