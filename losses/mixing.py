"""Copy-paste of labeled and unlabeled crops, after Bai et al., Bidirectional Copy-Paste for Semi-Supervised Medical
Image Segmentation, CVPR 2023: a box of one crop is pasted into the other, and so are their labels."""

import torch
from torch import Tensor

from utils.masks import label_map

SIDE = 2 / 3  # of the box, in sides of the crop


def copy_paste(image: Tensor, label: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of a labeled and an unlabeled crop, as many as there are, each made into one crop with one label.

    Args:
        image: (N,1,w,h,d), the L labeled crops first.
        label: (L,w,h,d) of 0..C.
        p: (N,C,w,h,d) foreground probabilities, of whose unlabeled items the likeliest class of each voxel is taken as
            label; no gradient goes through it.

    Returns:
        image (pairs,1,w,h,d) and label (pairs,w,h,d), of the labeled crop where `random_box` is true.
    """
    pairs = min(len(label), len(p) - len(label))
    others = slice(len(label), len(label) + pairs)
    pseudo = torch.stack([label_map(item) for item in p[others].detach()])
    box = random_box(label.shape[1:], pairs).to(label.device)
    return torch.where(box[:, None], image[:pairs], image[others]), torch.where(box, label[:pairs], pseudo)


def random_box(shape: torch.Size, pairs: int) -> Tensor:
    """(pairs,w,h,d) bool: the inside of a box of two thirds of each side, or by a coin for each pair its outside."""
    sides = [max(round(SIDE * side), 1) for side in shape]
    starts = [int(torch.randint(side - s + 1, ())) for side, s in zip(shape, sides, strict=True)]
    box = torch.zeros(shape, dtype=torch.bool)
    box[tuple(slice(a, a + s) for a, s in zip(starts, sides, strict=True))] = True
    return box ^ (torch.rand(pairs, 1, 1, 1) < 0.5)
