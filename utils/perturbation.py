"""What a teacher's input or network is perturbed with. All draws are torch's, so (seed, iteration) fixes them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def noisy(image: Tensor, sd: float) -> Tensor:
    """The image plus Gaussian noise of this standard deviation, clipped at two of them."""
    return image + (sd * torch.randn_like(image)).clamp(-2 * sd, 2 * sd)


def strong_view(image: Tensor, strength: float) -> Tensor:
    """A crop as a quite other scanner might show it: each item of (N,1,W,H,D) with its own contrast, noise and blur.

    With u the item stretched to [0,1], each drawn on its own:

        gamma      u^g, g log-uniform in exp(-+strength)
        contrast   times exp(-+strength), plus -+strength (in the image's units: standard deviations of a scan)
        blur       for every second item a Gaussian of 0.5 to 1 voxels
        noise      Gaussian, standard deviation uniform in 0..strength/2
    """
    if not strength or not len(image):
        return image
    shape = (len(image), 1, 1, 1, 1)

    def draw(low: float, high: float) -> Tensor:
        return torch.empty(shape).uniform_(low, high).to(image)

    low, high = image.amin((1, 2, 3, 4), keepdim=True), image.amax((1, 2, 3, 4), keepdim=True)
    u = (image - low) / (high - low).clamp(min=torch.finfo(image.dtype).tiny)
    x = low + (high - low) * u ** draw(-strength, strength).exp()
    x = x * draw(-strength, strength).exp() + draw(-strength, strength)
    sigma, coin = draw(0.5, 1.0), draw(0.0, 1.0) < 0.5
    x = torch.where(coin, blurred(x, sigma), x)
    return x + draw(0.0, strength / 2) * torch.randn_like(x)


def blurred(image: Tensor, sigma: Tensor) -> Tensor:
    """Each item of (N,1,W,H,D) convolved with a Gaussian of its own sigma (N,1,1,1,1), in voxels, cut at 3 voxels; the
    edge is repeated."""
    offsets = torch.arange(-3, 4).to(image)
    kernel = torch.exp(-0.5 * (offsets / sigma.view(-1, 1)) ** 2)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)  # (N,7)
    x = image.transpose(0, 1)  # the items as channels, each with its own kernel
    for axis in (2, 3, 4):
        sides, pads = [1, 1, 1], [0] * 6
        sides[axis - 2] = 7
        pads[2 * (4 - axis)] = pads[2 * (4 - axis) + 1] = 3
        x = F.conv3d(F.pad(x, pads, mode="replicate"), kernel.view(-1, 1, *sides), groups=len(image))
    return x.transpose(0, 1)


def monte_carlo(
    network: nn.Module, image: Tensor, *, passes: int, noise: float, read: Callable[[Tensor], Any] | None = None
) -> Iterator[Any]:
    """Stochastic passes over image (N,1,W,H,D): dropout on, fresh noise in each, no gradient, no trace in the network.

    Yields what `read` (default: the network itself) makes of two passes at a time, as the released code of UA-MT
    runs them: a batch of 2N, first all items of the one pass, then those of the other; N at the end if `passes` is odd.
    """
    sleeping = [m for m in network.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and not m.training]
    for dropout in sleeping:
        dropout.train()  # batch norm stays as it is: in evaluation mode it must not count these passes
    try:
        for first in range(0, passes, 2):
            with torch.no_grad():
                tiled = image.repeat(min(2, passes - first), 1, 1, 1, 1)
                found = (read or network)(noisy(tiled, noise))
            yield found
    finally:
        for dropout in sleeping:
            dropout.eval()


@dataclass
class Transformation:
    """pi of TCSE, one draw for each item of (N,C,W,H,D): a quarter turn in the plane, a flip, and maybe a zoom."""

    turns: list[int]
    """Quarter turns, 0 to 3."""
    flips: list[bool]
    """Along the first axis, after the turn."""
    zooms: list[float]
    """In the plane, after the flip; 1: none."""

    @classmethod
    def draw(cls, shape: torch.Size, *, scale: float = 0.0) -> "Transformation":
        """Uniform over the eight symmetries of the square, or four of a rectangle; zooms uniform in 1 -+ scale."""
        n, step = shape[0], 1 if shape[2] == shape[3] else 2
        turns = [step * int(i) for i in torch.randint(4 // step, (n,))]
        flips = [bool(i) for i in torch.randint(2, (n,))]
        return cls(turns, flips, [1 + scale * (2 * float(u) - 1) for u in torch.rand(n)])

    def __call__(self, x: Tensor) -> Tensor:
        """pi(x)."""
        found = [torch.rot90(item, k, (1, 2)) for item, k in zip(x, self.turns, strict=True)]
        found = [item.flip(1) if flip else item for item, flip in zip(found, self.flips, strict=True)]
        return self._zoom(torch.stack(found), self.zooms)

    def inverse(self, x: Tensor) -> Tensor:
        """pi^-1(x): exact for turns and flips; a zoom is undone by the opposite zoom, which smooths a little."""
        x = self._zoom(x, [1 / zoom for zoom in self.zooms])
        found = [item.flip(1) if flip else item for item, flip in zip(x, self.flips, strict=True)]
        return torch.stack([torch.rot90(item, -k, (1, 2)) for item, k in zip(found, self.turns, strict=True)])

    def kept(self, x: Tensor) -> Tensor:
        """1 for the voxels of x that pi and its inverse both leave inside the field, else 0."""
        return (self.inverse(self(torch.ones_like(x))) > 1 - 1e-4).to(x.dtype)

    @staticmethod
    def _zoom(x: Tensor, zooms: list[float]) -> Tensor:
        """Each item magnified about its centre in the plane, linear between voxels, 0 outside."""
        if all(zoom == 1 for zoom in zooms):
            return x
        theta = x.new_zeros(len(x), 3, 4)
        theta[:, 0, 0] = 1  # grid_sample names the last axis first: it is the one that stays
        theta[:, 1, 1] = theta[:, 2, 2] = 1 / x.new_tensor(zooms)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
