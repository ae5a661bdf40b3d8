"""Perturbations of inputs and networks: noise, strong views, dropout passes, turns and flips.

All random numbers are torch's, so they are a function of (seed, iteration).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.devices import to_device


def noisy(image: Tensor, sd: float) -> Tensor:
    """image + Gaussian noise of standard deviation `sd`, the noise clipped to [-2 sd, 2 sd]; any shape."""
    return image + (sd * torch.randn_like(image)).clamp(-2 * sd, 2 * sd)


def strong_view(image: Tensor, strength: float) -> Tensor:
    """Strong intensity augmentation of crops (N,K,W,H,D), drawn for each channel of each item: contrast, blur, noise.

    With u the channel scaled to [0,1] and s the strength:

        gamma      u^g, g log-uniform in [exp(-s), exp(s)]
        contrast   a x + b, a log-uniform in [exp(-s), exp(s)], b uniform in [-s, s]
        blur       with probability 1/2 a Gaussian of standard deviation 0.5 to 1 voxels
        noise      Gaussian, standard deviation uniform in [0, s/2]

    b and the noise are in the units of the image: standard deviations of a scan, or with --normalize window its width.
    """
    if not strength or not len(image):
        return image
    shape = (*image.shape[:2], 1, 1, 1)

    spans = [(-strength, strength)] * 3 + [(0.5, 1.0), (0.0, 1.0), (0.0, strength / 2)]
    draws = torch.stack([torch.empty(shape).uniform_(*span) for span in spans])
    gamma, contrast, shift, sigma, coin, sd = to_device(draws.to(image.dtype), image.device)
    low, high = image.amin((2, 3, 4), keepdim=True), image.amax((2, 3, 4), keepdim=True)
    u = (image - low) / (high - low).clamp(min=torch.finfo(image.dtype).tiny)
    x = low + (high - low) * u.clamp(min=1e-6) ** gamma.exp()
    x = x * contrast.exp() + shift
    x = torch.where(coin < 0.5, blurred(x, sigma), x)
    return x + sd * torch.randn_like(x)


def blurred(image: Tensor, sigma: Tensor) -> Tensor:
    """Blurs each channel of (N,K,W,H,D) with a Gaussian kernel of 7 voxels along each axis; the edges are replicated.

    `sigma` (N,K,1,1,1) is the standard deviation for each channel of each item, in voxels.
    """
    offsets = torch.arange(-3, 4, dtype=image.dtype, device=image.device)
    kernel = torch.exp(-0.5 * (offsets / sigma.view(-1, 1)) ** 2)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)  # (N*K,7)
    x = image.flatten(0, 1)[None]  # all are channels of one item, so that each has its own kernel
    for axis in (2, 3, 4):
        sides, pads = [1, 1, 1], [0] * 6
        sides[axis - 2] = 7
        pads[2 * (4 - axis)] = pads[2 * (4 - axis) + 1] = 3
        x = F.conv3d(F.pad(x, pads, mode="replicate"), kernel.view(-1, 1, *sides), groups=x.shape[1])
    return x.view_as(image)


def adversarial(loss: Callable[[Tensor], Tensor], image: Tensor, *, xi: float, magnitude: float) -> Tensor:
    """The perturbation of image (N,K,W,H,D) that raises a loss most, by one power iteration (VAT, Miyato et al. 2018).

    Args:
        loss: perturbed image -> scalar.
        xi: length of the random step at which the gradient is taken, for each item.
        magnitude: length of the perturbation, the Euclidean norm over all voxels of an item.

    Returns:
        The perturbation, of the shape of image, without gradient.
    """
    step = (xi * unit_items(torch.rand_like(image) - 0.5)).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(image.detach() + step), step)
    return magnitude * unit_items(gradient)


def unit_items(x: Tensor) -> Tensor:
    """Each item of x (N,...) divided by its Euclidean norm; an item of zeros stays 0."""
    items = x.flatten(1)
    items = items / items.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)  # squares may underflow
    return F.normalize(items, dim=1).view_as(x)


def monte_carlo(
    network: nn.Module, image: Tensor, *, passes: int, noise: float, read: Callable[[Tensor], Any] | None = None
) -> Iterator[Any]:
    """Monte-Carlo dropout: stochastic passes over image (N,K,W,H,D), with dropout and new noise, without gradient.

    Two passes run at a time as a batch of 2N, as in the released code of UA-MT: all items of the first pass, then all
    items of the second. The last batch has N items if `passes` is odd. The network's modes are restored at the end.

    Args:
        noise: standard deviation of the input noise, as in `noisy`.
        read: noisy image -> result; the network itself by default.

    Yields:
        The result of `read` for each batch.
    """
    inactive = [m for m in network.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and not m.training]
    for dropout in inactive:
        dropout.train()  # batch norm keeps its mode: in evaluation mode it must not count these passes
    try:
        for first in range(0, passes, 2):
            with torch.no_grad():
                tiled = image.repeat(min(2, passes - first), 1, 1, 1, 1)
                result = (read or network)(noisy(tiled, noise))
            yield result
    finally:
        for dropout in inactive:
            dropout.eval()


@dataclass
class Transformation:
    """pi of TCSE, drawn for each item of (N,C,W,H,D): quarter turns in the x-y plane, a flip, and optionally a zoom."""

    turns: list[int]
    """Quarter turns of each item, 0 to 3."""
    flips: list[bool]
    """Whether each item is flipped along the first axis, after the turn."""
    zooms: list[float]
    """Zoom factor of each item in the plane, after the flip; 1: none."""

    @classmethod
    def draw(cls, shape: torch.Size, *, scale: float = 0.0) -> "Transformation":
        """Draws uniformly from the eight symmetries of a square, or four of a rectangle, and zooms from 1 -+ scale.

        Args:
            shape: (N,C,W,H,D) of the images.
            scale: largest relative change of size; 0: no zoom.
        """
        n, step = shape[0], 1 if shape[2] == shape[3] else 2
        turns = [step * int(i) for i in torch.randint(4 // step, (n,))]
        flips = [bool(i) for i in torch.randint(2, (n,))]
        return cls(turns, flips, [1 + scale * (2 * float(u) - 1) for u in torch.rand(n)])

    def __call__(self, x: Tensor) -> Tensor:
        """pi(x), x (N,C,W,H,D)."""
        items = [torch.rot90(item, k, (1, 2)) for item, k in zip(x, self.turns, strict=True)]
        items = [item.flip(1) if flip else item for item, flip in zip(items, self.flips, strict=True)]
        return self._zoom(torch.stack(items), self.zooms)

    def inverse(self, x: Tensor) -> Tensor:
        """pi^-1(x): exact for turns and flips; a zoom is inverted by the reciprocal zoom, which smooths slightly."""
        x = self._zoom(x, [1 / zoom for zoom in self.zooms])
        items = [item.flip(1) if flip else item for item, flip in zip(x, self.flips, strict=True)]
        return torch.stack([torch.rot90(item, -k, (1, 2)) for item, k in zip(items, self.turns, strict=True)])

    def kept(self, x: Tensor) -> Tensor:
        """1 for the voxels of x that stay inside the image under pi and its inverse, else 0; same shape as x."""
        return (self.inverse(self(torch.ones_like(x))) > 1 - 1e-4).to(x.dtype)

    @staticmethod
    def _zoom(x: Tensor, zooms: list[float]) -> Tensor:
        """Magnifies each item about its centre in the plane by linear interpolation, with 0 outside."""
        if all(zoom == 1 for zoom in zooms):
            return x
        theta = x.new_zeros(len(x), 3, 4)
        theta[:, 0, 0] = 1  # grid_sample orders axes from the last to the first; the last stays unchanged
        theta[:, 1, 1] = theta[:, 2, 2] = 1 / to_device(torch.tensor(zooms, dtype=x.dtype), x.device)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
