"""The atoms of the losses, for one class or several.

Probabilities and maps are (N,C,W,H,D) float, a channel for each class but the background; labels (N,W,H,D) of 0..C.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-5


def by_class(p: Tensor, label: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(N,1,W,H,D) of p and of Y, 1 where the label is this class and else 0, for each class."""
    for c in range(p.shape[1]):
        yield p[:, c : c + 1], (label == c + 1).unsqueeze(1).to(p.dtype)


def dice_loss(p: Tensor, label: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """1 - (2 sum pY + e) / (sum p^2 + sum Y^2 + e), summed over batch and space together; in [0,1]. Mean over classes.

    `weight`, of any shape that spreads over one class of p, counts in every sum.
    """
    found = [
        1 - (2 * (weight * p_c * y).sum() + EPSILON) / ((weight * (p_c * p_c + y)).sum() + EPSILON)
        for p_c, y in by_class(p, label)
    ]
    return torch.stack(found).mean()


def seg_loss(logits: Tensor, label: Tensor, classes: int = 1, weight: Tensor | None = None) -> Tensor:
    """L_seg = 1/2 (cross-entropy + Dice) of p = probabilities(logits, classes); with a `weight` (N,1,W,H,D) in [0,1]
    each voxel counts as much in both, the cross-entropy being the mean over all voxels."""
    p = probabilities(logits, classes)
    if weight is not None:
        x = foreground_logits(logits) if classes == 1 else logits
        y = torch.cat([y for _, y in by_class(x, label)], dim=1)
        cross_entropy = (weight * F.binary_cross_entropy_with_logits(x, y, reduction="none")).mean()
        return 0.5 * (cross_entropy + dice_loss(p, label, weight))
    if exclusive(logits, classes):
        return 0.5 * (cross_entropy(logits, label) + dice_loss(p, label))
    x = foreground_logits(logits) if classes == 1 else logits
    y = torch.cat([y for _, y in by_class(x, label)], dim=1)
    return 0.5 * (F.binary_cross_entropy_with_logits(x, y) + dice_loss(p, label))


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """- mean ln softmax(logits)[label]: logits (N,K) and label (N), or (N,K,W,H,D) and (N,W,H,D), of 0 to K-1.

    F.cross_entropy with the same gradient bit for bit, but of operations alone that a GPU repeats exactly: those of
    torch's own (2.13) on maps it refuses under torch.use_deterministic_algorithms.

    Raises:
        RuntimeError: on a CPU for a label outside of 0 to K-1.
    """
    chosen = F.one_hot(label.long(), logits.shape[1]).movedim(-1, 1) == 1
    return -torch.where(chosen, logits.log_softmax(dim=1), 0).sum(dim=1).mean()


def exclusive(logits: Tensor, classes: int) -> bool:
    """Whether the logits of several classes hold one of the background too, and so go through a softmax."""
    return classes > 1 and logits.shape[1] == classes + 1


def probabilities(logits: Tensor, classes: int = 1) -> Tensor:
    """Foreground probabilities p (N,C,W,H,D) in [0,1]: the sigmoids of C channels, or of C+1, the background's first,
    the softmax without the background's."""
    if exclusive(logits, classes):
        return logits.softmax(dim=1)[:, 1:]
    return (foreground_logits(logits) if classes == 1 else logits).sigmoid()


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


def entropy(p: Tensor, epsilon: float = 0.0) -> Tensor:
    """-p ln p - (1-p) ln(1-p) of each voxel, in [0, ln 2]; p is kept 1e-6 from 0 and 1, where the gradient is 0.

    With an epsilon -p ln(p + epsilon) - (1-p) ln(1-p + epsilon), down to -epsilon, as the released code of UA-MT.
    """
    if epsilon:
        return -(p * (p + epsilon).log() + (1 - p) * (1 - p + epsilon).log())
    p = p.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log())


def weighted_sum(terms: dict[str, Tensor], factors: dict[str, float]) -> Tensor:
    """The terms, each times its factor, which is 1 where none is given."""
    return torch.stack([factors.get(name, 1.0) * term for name, term in terms.items()]).sum()


def live_share(m: Tensor) -> Tensor:
    """Share of the voxels with a usable gradient through m = sigmoid(.): those with 1e-3 < m < 1 - 1e-3."""
    return ((m > 1e-3) & (m < 1 - 1e-3)).float().mean()


def hard_dice(p: Tensor, label: Tensor) -> Tensor:
    """Dice coefficient of p > 0.5 against the label, over the whole batch; 1 when both are empty. Mean over classes."""
    found = []
    for p_c, y in by_class(p, label):
        a, b = p_c > 0.5, y > 0
        total = a.sum() + b.sum()
        found.append(
            torch.where(total > 0, 2 * (a & b).sum() / total.clamp(min=1), torch.ones_like(total, dtype=torch.float32))
        )
    return torch.stack(found).mean()


def dice_ce_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy + Dice of logits (N,K,W,H,D), K classes with the background, labels (N,W,H,D) below K.

    Dice as MONAI's DiceCELoss: of each item and class alone, denominators not squared, then the mean.
    """
    p = logits.softmax(dim=1)
    y = one_hot(label, logits.shape[1]).to(p.dtype)
    overlap, total = (x.flatten(2).sum(dim=2) for x in (p * y, p + y))
    return cross_entropy(logits, label) + (1 - (2 * overlap + EPSILON) / (total + EPSILON)).mean()


def one_hot(label: Tensor, classes: int) -> Tensor:
    """(N,W,H,D) -> (N,classes,W,H,D) of 0 and 1; labels above the last class are merged into it."""
    return F.one_hot(label.long().clamp(max=classes - 1), classes).movedim(-1, 1)


def query_loss(G: Tensor, Y: Tensor) -> Tensor:
    """L_qd = mean over voxels of - sum_g Y_g ln G_g; shares G and Y (N,groups,...) sum to 1, G is kept above 1e-6."""
    return -(Y * G.clamp(min=1e-6).log()).sum(dim=1).mean()


def nt_xent(a: Tensor, b: Tensor, *, temperature: float, over: str = "mean") -> Tensor:
    """Symmetric NT-Xent of two views a, b (B,C,W,H,D) of the same B >= 2 crops: item i of both is the positive pair.

    The similarity of two crops is the cosine of their channels at a voxel, over the temperature: its `mean` over the
    voxels; or its `sum`, the loss then divided by the number of voxels, which leaves next to no gradient.
    """
    voxels = a[0, 0].numel()
    a, b = (F.normalize(x, dim=1).flatten(1) for x in (a, b))
    scale = 1 / temperature / (voxels if over == "mean" else 1)
    self_pair = torch.eye(len(a), dtype=torch.bool, device=a.device)
    ab, aa, bb = (scale * x @ y.T for x, y in ((a, b), (a, a), (b, b)))
    positive = torch.arange(len(a), device=a.device)
    rows = [torch.cat([cross, same.masked_fill(self_pair, -torch.inf)], 1) for cross, same in ((ab, aa), (ab.T, bb))]
    loss = torch.stack([cross_entropy(row, positive) for row in rows]).mean()
    return loss if over == "mean" else loss / voxels
