"""The atoms of the losses. Probabilities and maps are (N,1,W,H,D) float, labels (N,W,H,D) of 0 and 1."""

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-5


def dice_loss(p: Tensor, label: Tensor) -> Tensor:
    """1 - (2 sum pY + e) / (sum p^2 + sum Y^2 + e), summed over batch and space together; in [0,1]."""
    y = label.unsqueeze(1).to(p.dtype)
    return 1 - (2 * (p * y).sum() + EPSILON) / ((p * p).sum() + y.sum() + EPSILON)


def seg_loss(logits: Tensor, label: Tensor) -> Tensor:
    """L_seg = 1/2 (cross-entropy + Dice) of p = sigmoid(logits)."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, label.unsqueeze(1).to(logits.dtype))
    return 0.5 * (cross_entropy + dice_loss(logits.sigmoid(), label))


def sdm_to_mask(z: Tensor, k: float) -> Tensor:
    """m = sigmoid(-k z): the smooth Heaviside of DTML's equation (2) with the sign its own maps need.

    z is negative inside, so the printed 1/(1+exp(-kz)) would give the background. At least float32 whatever the
    precision around it, because k = 1500 magnifies every rounding error of z.
    """
    with torch.autocast(z.device.type, enabled=False):
        return torch.sigmoid(-k * (z if z.dtype == torch.float64 else z.float()))


def foreground_logits(x: Tensor) -> Tensor:
    """(N,1,W,H,D) as it is; (N,2,W,H,D), background and foreground, to (N,1,W,H,D).

    The softmax of two channels is the sigmoid of their difference, so one formula serves both kinds of network.
    """
    return x[:, 1:] - x[:, :1] if x.shape[1] == 2 else x


def consistency_loss(m: Tensor, p: Tensor) -> Tensor:
    """C = mean (m - p)^2 over every voxel of every item, DTML's equation (4)."""
    return (m - p).square().mean()


def masked_mean(x: Tensor, weight: Tensor) -> Tensor:
    """Mean of x over the voxels with weight 1; 0 when there is none."""
    return (weight * x).sum() / weight.sum().clamp(min=1)


def entropy(p: Tensor) -> Tensor:
    """-p ln p - (1-p) ln(1-p) of each voxel, in [0, ln 2]; p is kept 1e-6 from 0 and 1, where the gradient is 0."""
    p = p.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log())


def weighted_sum(terms: dict[str, Tensor], factors: dict[str, float]) -> Tensor:
    """The terms, each times its factor, which is 1 where none is given."""
    return torch.stack([factors.get(name, 1.0) * term for name, term in terms.items()]).sum()


def live_share(m: Tensor) -> Tensor:
    """Share of the voxels with a usable gradient through m = sigmoid(.): those with 1e-3 < m < 1 - 1e-3."""
    return ((m > 1e-3) & (m < 1 - 1e-3)).float().mean()


def hard_dice(p: Tensor, label: Tensor) -> Tensor:
    """Dice coefficient of p > 0.5 against the label, over the whole batch; 1 when both are empty."""
    a, b = (p > 0.5).squeeze(1), label > 0
    total = a.sum() + b.sum()
    return torch.where(total > 0, 2 * (a & b).sum() / total.clamp(min=1), torch.ones_like(total, dtype=torch.float32))
