"""The heads of a backbone, and the sides that it takes."""

from torch import Tensor, nn

STRIDE = 16  # four halvings: every side of a patch must be a multiple of this
DROPOUT = 0.5
ACTIVATIONS = {"seg": nn.Identity, "sdm": nn.Tanh}


def make_heads(heads: dict[str, int], channels_in: int) -> nn.ModuleDict:
    """Head name -> 1x1x1 convolution to so many channels. 'seg' gives logits, 'sdm' tanh values in [-1,1].

    Raises:
        ValueError: for an unknown name.
    """
    unknown = set(heads) - set(ACTIVATIONS)
    if unknown:
        raise ValueError(f"heads must be named from {sorted(ACTIVATIONS)}, not {sorted(heads)}")
    found = {name: nn.Sequential(nn.Conv3d(channels_in, n, 1), ACTIVATIONS[name]()) for name, n in heads.items()}
    return nn.ModuleDict(found)


def refuse_sides(image: Tensor) -> None:
    """Raises a ValueError if a side of (N,C,W,H,D) is not a multiple of 16."""
    if any(side % STRIDE for side in image.shape[2:]):
        raise ValueError(f"every side must be a multiple of {STRIDE}, not {tuple(image.shape[2:])}")
