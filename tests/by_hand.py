"""The losses of a segmentation, from their formulas in numpy and in double precision, to compare the code's with."""

import numpy as np
import torch

EPS = 1e-5


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
