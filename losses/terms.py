"""Loss terms for one or several classes.

Probabilities and maps are (N,C,W,H,D) float, one channel per foreground class; labels are (N,W,H,D) of 0..C.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.masks import label_maps
from utils.vectors import unit

EPSILON = 1e-5


def by_class(p: Tensor, label: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields for each class its channel of p and its mask Y, both (N,1,W,H,D); Y is 1 where the label is the class."""
    for c in range(p.shape[1]):
        yield p[:, c : c + 1], (label == c + 1).unsqueeze(1).to(p.dtype)


def dice_loss(p: Tensor, label: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Dice loss 1 - (2 sum pY + e) / (sum p^2 + sum Y^2 + e) in [0,1], mean over classes; sums over batch and space.

    Args:
        p: (N,C,W,H,D) in [0,1].
        label: (N,W,H,D) of 0..C.
        weight: factor of each voxel in every sum; broadcasts to (N,1,W,H,D).
    """
    losses = [
        1 - (2 * (weight * p_c * y).sum() + EPSILON) / ((weight * (p_c * p_c + y)).sum() + EPSILON)
        for p_c, y in by_class(p, label)
    ]
    return torch.stack(losses).mean()


def seg_loss(logits: Tensor, label: Tensor, classes: int = 1, weight: Tensor | None = None) -> Tensor:
    """L_seg = 1/2 (cross-entropy + Dice loss) of p = probabilities(logits, classes).

    Args:
        logits: (N,C,W,H,D), or (N,C+1,W,H,D) for a softmax.
        label: (N,W,H,D) of 0..C.
        classes: C.
        weight: factor of each voxel, (N,1,W,H,D); the cross-entropy remains a mean over all voxels.
    """
    dice = dice_loss(probabilities(logits, classes), label, 1.0 if weight is None else weight)
    return 0.5 * (ce_loss(logits, label, classes, weight) + dice)


def ce_loss(logits: Tensor, label: Tensor, classes: int = 1, weight: Tensor | None = None) -> Tensor:
    """The cross-entropy of p = probabilities(logits, classes), a mean over all voxels; arguments as `seg_loss`.

    That of the softmax if there is one, else the binary one of each class, also a mean over classes.
    """
    if exclusive(logits, classes):
        return cross_entropy(logits, label, weight)
    x = foreground_logits(logits) if classes == 1 else logits
    y = torch.cat([y for _, y in by_class(x, label)], dim=1)
    return F.binary_cross_entropy_with_logits(x, y, weight)


def cross_entropy(logits: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy - mean w ln softmax(logits)[label] of logits (N,K) or (N,K,W,H,D), a label (N) or (N,W,H,D) of 0 to
    K-1 and a weight w (N,1) or (N,1,W,H,D), by default 1.

    The gradient equals that of F.cross_entropy bit for bit. This version uses only deterministic operations: on a GPU
    torch (2.13) refuses its own on maps under torch.use_deterministic_algorithms.

    Raises:
        RuntimeError: on a CPU for a label outside of 0 to K-1.
    """
    chosen = F.one_hot(label.long(), logits.shape[1]).movedim(-1, 1) == 1
    voxels = -torch.where(chosen, logits.log_softmax(dim=1), 0).sum(dim=1)
    return (voxels if weight is None else weight[:, 0] * voxels).mean()


def exclusive(logits: Tensor, classes: int) -> bool:
    """Whether logits (N,C+1,W,H,D) of several classes have a background channel, so that a softmax applies."""
    return classes > 1 and logits.shape[1] == classes + 1


def probabilities(logits: Tensor, classes: int = 1) -> Tensor:
    """logits -> foreground probabilities p (N,C,W,H,D) in [0,1].

    C channels go through a sigmoid, C+1 channels (background first) through a softmax, whose first channel is dropped.
    """
    if exclusive(logits, classes):
        return logits.softmax(dim=1)[:, 1:]
    return (foreground_logits(logits) if classes == 1 else logits).sigmoid()


def with_background(p: Tensor) -> Tensor:
    """Foreground probabilities p (N,C,W,H,D) -> (N,C+1,W,H,D), which sum to 1; the background is the first channel."""
    return torch.cat([1 - p.sum(dim=1, keepdim=True), p], dim=1)


def sdm_to_mask(z: Tensor, k: float) -> Tensor:
    """m = sigmoid(-k z) in [0,1], the smooth Heaviside of DTML's equation (2), for z in [-1,1] of any shape.

    The printed 1/(1+exp(-kz)) would give the background, because z is negative inside. The computation is in float32
    or float64 at any surrounding precision, because k = 1500 amplifies the rounding errors of z.
    """
    with torch.autocast("cpu" if z.is_meta else z.device.type, enabled=False):
        return torch.sigmoid(-k * (z if z.dtype == torch.float64 else z.float()))


def foreground_logits(x: Tensor) -> Tensor:
    """Logits (N,2,W,H,D) of background and foreground, or (N,1,W,H,D) -> foreground logits (N,1,W,H,D).

    The softmax over two channels equals the sigmoid of their difference. One channel is returned unchanged.
    """
    return x[:, 1:] - x[:, :1] if x.shape[1] == 2 else x


def consistency_loss(m: Tensor, p: Tensor) -> Tensor:
    """C = mean (m - p)^2 over all voxels of all items, DTML's equation (4)."""
    return (m - p).square().mean()


def soft_dice_loss(p: Tensor, q: Tensor) -> Tensor:
    """Dice loss 1 - (2 sum pq + e) / (sum p^2 + sum q^2 + e) of p and q (N,C,W,H,D), mean over classes; 0 if equal."""
    p, q = p.transpose(0, 1).flatten(1), q.transpose(0, 1).flatten(1)
    return (1 - (2 * (p * q).sum(dim=1) + EPSILON) / ((p * p + q * q).sum(dim=1) + EPSILON)).mean()


def agreement_loss(p: Tensor, q: Tensor) -> Tensor:
    """1 - mean (pq + (1-p)(1-q)) in [0,1]: even if p and q are equal it is above 0, unless they are 0 or 1."""
    return 1 - (p * q + (1 - p) * (1 - q)).mean()


def masked_mean(x: Tensor, weight: Tensor) -> Tensor:
    """Mean of x over the voxels with weight 1; 0 if there are none."""
    return (weight * x).sum() / weight.sum().clamp(min=1)


def weight_inside(mask: Tensor) -> Tensor:
    """mask of 0 and 1 -> the same divided by its mean; 0 if it is empty.

    With this weight a mean over all voxels is the mean over those inside the mask.
    """
    return mask / mask.mean().clamp(min=1 / mask.numel())


def entropy(p: Tensor, epsilon: float = 0.0) -> Tensor:
    """Entropy -p ln p - (1-p) ln(1-p) of each voxel, in [0, ln 2]; p is clamped to [1e-6, 1 - 1e-6].

    With an epsilon it is -p ln(p + epsilon) - (1-p) ln(1-p + epsilon), as in the released code of UA-MT, which can
    be as low as -epsilon.
    """
    if epsilon:
        return -(p * (p + epsilon).log() + (1 - p) * (1 - p + epsilon).log())
    p = p.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log())


def weighted_sum(terms: dict[str, Tensor], factors: dict[str, float]) -> Tensor:
    """Sum of the terms, each multiplied by its factor (1 by default)."""
    return torch.stack([factors.get(name, 1.0) * term for name, term in terms.items()]).sum()


def live_share(m: Tensor) -> Tensor:
    """Share of the voxels with 1e-3 < m < 1 - 1e-3, where the gradient through m = sigmoid(.) does not vanish."""
    return ((m > 1e-3) & (m < 1 - 1e-3)).float().mean()


def hard_dice(p: Tensor, label: Tensor) -> Tensor:
    """`dice_of_labels` of the prediction, `label_maps(p)`, and the label."""
    return dice_of_labels(label_maps(p), label, p.shape[1])


def dice_of_labels(a: Tensor, b: Tensor, classes: int) -> Tensor:
    """Dice coefficient in [0,1] of two labels (N,W,H,D) of 0..C over the whole batch, mean over the classes 1 to C.

    A class that is in neither counts as 1.
    """
    scores = []
    for c in range(1, classes + 1):
        in_a, in_b = a == c, b == c
        total = in_a.sum() + in_b.sum()
        scores.append(torch.where(total > 0, 2 * (in_a & in_b).sum() / total.clamp(min=1), 1.0))
    return torch.stack(scores).mean()


def dice_ce_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy + Dice loss of logits (N,K,W,H,D) and label (N,W,H,D) of 0 to K-1; K includes the background.

    The Dice loss is that of MONAI's DiceCELoss: per item and class, no squares in the denominator, then the mean.
    """
    p = logits.softmax(dim=1)
    y = one_hot(label, logits.shape[1]).to(p.dtype)
    overlap, total = (x.flatten(2).sum(dim=2) for x in (p * y, p + y))
    return cross_entropy(logits, label) + (1 - (2 * overlap + EPSILON) / (total + EPSILON)).mean()


def one_hot(label: Tensor, classes: int) -> Tensor:
    """label (N,W,H,D) -> (N,classes,W,H,D) of 0 and 1; labels above the last class count as the last class."""
    return F.one_hot(label.long().clamp(max=classes - 1), classes).movedim(-1, 1)


def query_loss(G: Tensor, Y: Tensor) -> Tensor:
    """L_qd = mean_v - sum_g Y_g ln G_g of shares G and Y (N,groups,...) that sum to 1 over g; G is clamped at 1e-6."""
    return -(Y * G.clamp(min=1e-6).log()).sum(dim=1).mean()


def nt_xent(a: Tensor, b: Tensor, *, temperature: float, over: str = "mean") -> Tensor:
    """Symmetric NT-Xent loss (Chen et al., SimCLR, 2020) of two views of the same B >= 2 crops.

    Item i of both views is the positive pair. The similarity of two crops is the cosine of their channels at each
    voxel, divided by the temperature.

    Args:
        a, b: the views, (B,C,W,H,D).
        temperature: above 0.
        over: 'mean' averages the similarity over the voxels. 'sum' adds it up and divides the loss by the number of
            voxels, which leaves almost no gradient.
    """
    voxels = a[0, 0].numel()
    a, b = (unit(x).flatten(1) for x in (a, b))
    scale = 1 / temperature / (voxels if over == "mean" else 1)
    self_pair = torch.eye(len(a), dtype=torch.bool, device=a.device)
    ab, aa, bb = (scale * x @ y.T for x, y in ((a, b), (a, a), (b, b)))
    positive = torch.arange(len(a), device=a.device)
    rows = [torch.cat([cross, same.masked_fill(self_pair, -torch.inf)], 1) for cross, same in ((ab, aa), (ab.T, bb))]
    loss = torch.stack([cross_entropy(row, positive) for row in rows]).mean()
    return loss if over == "mean" else loss / voxels
