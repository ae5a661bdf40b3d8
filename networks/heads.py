"""The heads of a backbone, those of its features, and the check of the sides of its input."""

from torch import Tensor, nn

from networks.batch_norm import BatchNorm3d

STRIDE = 16  # four halvings: every side of a patch must be a multiple of this
DROPOUT = 0.5
ACTIVATIONS = {"seg": nn.Identity, "sdm": nn.Tanh}


def make_heads(heads: dict[str, int], channels_in: int) -> nn.ModuleDict:
    """Creates the heads: 1x1x1 convolutions. 'seg' returns logits, 'sdm' tanh values in [-1,1].

    Args:
        heads: head name -> output channels.
        channels_in: channels of the map that the heads read.

    Raises:
        ValueError: for an unknown head name.
    """
    unknown = set(heads) - set(ACTIVATIONS)
    if unknown:
        raise ValueError(f"heads must be named from {sorted(ACTIVATIONS)}, not {sorted(heads)}")
    modules = {name: nn.Sequential(nn.Conv3d(channels_in, n, 1), ACTIVATIONS[name]()) for name, n in heads.items()}
    return nn.ModuleDict(modules)


def projection(channels_in: int, channels: int) -> nn.Sequential:
    """Two 1x1x1 convolutions with batch norm and ReLU between: (N,channels_in,W,H,D) -> (N,channels,W,H,D)."""
    return nn.Sequential(
        nn.Conv3d(channels_in, channels, 1),
        BatchNorm3d(channels),
        nn.ReLU(inplace=True),
        nn.Conv3d(channels, channels, 1),
    )


def attention(channels: int) -> nn.Sequential:
    """The same to one channel, with a leaky ReLU: (N,channels,W,H,D) -> logits (N,1,W,H,D)."""
    return nn.Sequential(
        nn.Conv3d(channels, channels, 1),
        BatchNorm3d(channels),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv3d(channels, 1, 1),
    )


def refuse_sides(image: Tensor) -> None:
    """Checks the sides of image (N,C,W,H,D).

    Raises:
        ValueError: if a side is not a multiple of 16.
    """
    if any(side % STRIDE for side in image.shape[2:]):
        raise ValueError(f"every side must be a multiple of {STRIDE}, not {tuple(image.shape[2:])}")
