"""The losses of a segmentation, from their formulas in numpy and in double precision, to compare the code's with; and
small methods and batches to compare them on."""

from typing import Any

import numpy as np
import torch

from methods import METHODS
from utils.options import fill

EPS = 1e-5


def make(name: str, iterations: int = 10, **options: Any) -> Any:
    """The method with 2 filters, in training mode."""
    torch.manual_seed(0)
    kind = METHODS[name]
    return kind(fill(kind.Options, {"filters": 2, **options}), iterations=iterations).double().train()


def batch(classes: int = 1, labeled: int = 2, unlabeled: int = 2) -> dict[str, Any]:
    """Crops of noise, the labeled ones first."""
    torch.manual_seed(1)
    image = torch.randn(labeled + unlabeled, 1, 16, 16, 16, dtype=torch.float64)
    label = torch.randint(0, classes + 1, (labeled, 16, 16, 16)).to(torch.uint8)
    return {"image": image, "label": label, "case": ["x"] * (labeled + unlabeled)}


def distribution(logits: torch.Tensor) -> np.ndarray:
    """Logits of one channel (a sigmoid) or of several (a softmax) -> probabilities of all classes (N,C+1,...)."""
    x = logits.detach().double().numpy()
    if x.shape[1] == 1:
        p = 1 / (1 + np.exp(-x))
        return np.concatenate([1 - p, p], axis=1)
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def ce(q: np.ndarray, label: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Mean of -ln q[label] over the voxels of the mask (N,W,H,D); 0 if it is empty."""
    voxels = -np.log(np.take_along_axis(q, np.asarray(label)[:, None].astype(int), axis=1))[:, 0]
    chosen = voxels if mask is None else voxels[mask]
    return chosen.mean() if chosen.size else 0.0


def dice(q: np.ndarray, label: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Dice loss with squares, mean over the foreground classes, sums over the voxels of the mask."""
    a, losses = 1.0 if mask is None else mask, []
    for c in range(1, q.shape[1]):
        p, y = q[:, c], np.asarray(label) == c
        losses.append(1 - (2 * (a * p * y).sum() + EPS) / ((a * (p**2 + y)).sum() + EPS))
    return float(np.mean(losses))


def seg(q: np.ndarray, label: np.ndarray, mask: np.ndarray | None = None) -> float:
    """L_seg = 1/2 (cross-entropy + Dice loss)."""
    return 0.5 * (ce(q, label, mask) + dice(q, label, mask))
