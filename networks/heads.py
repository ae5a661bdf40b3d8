"""The heads of a backbone, its strides, and the check of the sides of its input."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.batch_norm import BatchNorm3d
from utils.text import xyz_text

HALVINGS = (4, 4, 4)
"""How often a backbone halves x, y and z in its four steps, unless told otherwise."""
DROPOUT = 0.5
"""Share of the channels that a backbone drops in training, as in the released V-Net."""
Stride = tuple[int, int, int]
ACTIVATIONS = {"seg": nn.Identity, "sdm": nn.Tanh}


class Pointwise(nn.Conv3d):
    """A 1x1x1 convolution, computed as a matrix product.

    On one CPU thread it is several times as fast as torch's, and the gradient of its weights is more accurate. Maps in
    channels_last_3d are multiplied crop by crop, as torch's product of many matrices is slow with such long ones.
    """

    def __init__(self, channels_in: int, channels: int):
        super().__init__(channels_in, channels, 1)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """x (N,in,W,H,D), and factors (N,in,1,1,1) of its channels, such as those of dropout -> (N,out,W,H,D)."""
        assert self.bias is not None
        weights = self.weight.flatten(1).expand(len(x), -1, -1)
        weights = weights if kept is None else weights * kept.view(len(x), 1, -1)
        if x.is_contiguous(memory_format=torch.channels_last_3d):
            crops = zip(x.movedim(1, -1), weights, strict=True)
            return torch.stack([F.linear(crop, weight, self.bias) for crop, weight in crops]).movedim(-1, 1)
        y = torch.bmm(x.flatten(2).mT, weights.mT.contiguous()) + self.bias
        return y.mT.unflatten(2, x.shape[2:])


class Head(nn.Sequential):
    """A 1x1x1 convolution and its activation: (N,in,W,H,D) and the factors of `Pointwise` -> (N,out,W,H,D)."""

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        convolution, activation = self
        return activation(convolution(x, kept))


def make_heads(heads: dict[str, int], channels_in: int) -> nn.ModuleDict:
    """Creates the heads, from head name -> output channels: 1x1x1 convolutions. 'seg' returns logits, 'sdm' tanh values
    in [-1,1].

    Raises:
        ValueError: for an unknown head name.
    """
    unknown = set(heads) - set(ACTIVATIONS)
    if unknown:
        raise ValueError(f"heads must be named from {sorted(ACTIVATIONS)}, not {sorted(heads)}")
    modules = {name: Head(Pointwise(channels_in, n), ACTIVATIONS[name]()) for name, n in heads.items()}
    return nn.ModuleDict(modules)


def projection(channels_in: int, channels: int) -> nn.Sequential:
    """Two 1x1x1 convolutions with batch norm and ReLU between: (N,channels_in,W,H,D) -> (N,channels,W,H,D)."""
    return nn.Sequential(
        Pointwise(channels_in, channels),
        BatchNorm3d(channels),
        nn.ReLU(inplace=True),
        Pointwise(channels, channels),
    )


def attention(channels: int) -> nn.Sequential:
    """The same to one channel, with a leaky ReLU: (N,channels,W,H,D) -> logits (N,1,W,H,D)."""
    return nn.Sequential(
        Pointwise(channels, channels),
        BatchNorm3d(channels),
        nn.LeakyReLU(0.2, inplace=True),
        Pointwise(channels, 1),
    )


def strides_of(halvings: Sequence[int]) -> list[Stride]:
    """Strides along x, y, z of each step of the encoder. An axis halved fewer times is left alone by the first steps.

    Args:
        halvings: how often x, y and z are halved, 0 to 4; the most is 4.

    Raises:
        ValueError: for other numbers.
    """
    steps = max(HALVINGS)
    if len(halvings) != 3 or min(halvings) < 0 or max(halvings) != steps:
        raise ValueError(f"halvings must be three numbers from 0 to {steps}, the largest {steps}, not {list(halvings)}")
    x, y, z = (np.where(np.arange(steps) + n >= steps, 2, 1).tolist() for n in halvings)
    return list(zip(x, y, z, strict=True))


def side_multiples(halvings: Sequence[int]) -> tuple[int, ...]:
    """The sides of an image along x, y, z must be multiples of these numbers of voxels."""
    return tuple(2**n for n in halvings)


def refuse_sides(image: Tensor, halvings: Sequence[int]) -> None:
    """Checks the sides of image (N,C,W,H,D).

    Raises:
        ValueError: if a side is not a multiple of 2 to the power of its halvings.
    """
    multiples = side_multiples(halvings)
    if any(side % multiple for side, multiple in zip(image.shape[2:], multiples, strict=True)):
        raise ValueError(f"every side must be a multiple of {xyz_text(multiples)}, not {tuple(image.shape[2:])}")
