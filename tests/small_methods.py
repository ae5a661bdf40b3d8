"""Methods with 2 filters, and batches of noisy half cubes for them."""

import torch

from losses.sdm import signed_distance_map
from methods import METHODS
from utils.options import fill

T = 60


def make(name, **options):
    """The method of the table with 2 filters, in training mode."""
    torch.manual_seed(0)
    kind = METHODS[name]
    return kind(fill(kind.Options, {"filters": 2, **options}), iterations=T).train()


def make_batch(labeled=2, unlabeled=2, side=16):
    """Noisy half cubes, the labeled ones first."""
    g = torch.Generator().manual_seed(1)
    label = torch.zeros(labeled + unlabeled, side, side, side, dtype=torch.uint8)
    label[:, side // 4 : side // 2] = 1
    image = label[:, None] + 0.3 * torch.randn(label[:, None].shape, generator=g)
    names = [f"case{i}" for i in range(len(label))]
    return {"image": image, "label": label[:labeled], "case": names}


def with_sdm(batch):
    """The batch with the signed distance maps of its labels."""
    maps = [torch.from_numpy(signed_distance_map(y.numpy())) for y in batch["label"]]
    return {**batch, "sdm": torch.stack(maps)[:, None]}
