"""Random crops, quarter turns and flips, small rotations and scaling, and changes of the intensities.

Rotation, scaling, low resolution and the bias field are torch's functions, blur is scipy's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation
from torch import Tensor

AUGMENTATIONS = ("d4", "mirror", "flip", "none")
AXES = ("x", "y", "z")
PIECE = 2**14  # voxels; torch shares out 2**15 and more
FLIPPED = ((), (0,), (0, 1), (1,))  # axes to flip for 0..3 quarter turns, after the transpose of odd turns


@dataclass(frozen=True)
class Strengths:
    """How far the random changes of a crop go at most; 0: none. Each is drawn uniformly up to its strength."""

    random_scale: float = 0.0
    """The content becomes exp(-s) to exp(s) times as large, log-uniform."""
    random_rotation: float = 0.0
    """Degrees to either side, about each of the axes."""
    random_bias: float = 0.0
    """Largest logarithm of the factor of a smooth field."""
    random_blur: float = 0.0
    """Standard deviation of a Gaussian, in voxels."""
    random_resolution: float = 0.0
    """Voxels become 1 to 1 + s times as long."""
    random_noise: float = 0.0
    """Standard deviation of the noise, in the unit of the normalised image."""


UNCHANGED = Strengths()


@dataclass(frozen=True)
class Draw:
    """The random parameters of one crop: the box to take, its rotation and scale, its quarter turns and its flips."""

    start: tuple[int, int, int]
    """First voxel of the box in the volume, which is padded to at least the size of the box."""
    size: tuple[int, int, int]
    """Size of the box in voxels before turning; after it the crop has the size of the patch."""
    turns: int
    """Quarter turns from x to y, 0 to 3."""
    flips: tuple[int, ...]
    """The axes to flip after turning."""
    angles: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Degrees by which the content is rotated about x, then y, then z, in mm."""
    scale: float = 1.0
    """Factor by which the content is enlarged."""

    @property
    def warped(self) -> bool:
        """Whether voxels of the crop lie between those of the volume."""
        return self.scale != 1 or any(self.angles)


def draw_augmentation(
    generator: np.random.Generator,
    shape: Sequence[int],
    patch_size: Sequence[int],
    kind: str = "d4",
    flip_axes: Sequence[str] = AXES,
) -> Draw:
    """Draws the parameters of a crop from a volume of this shape; all offsets are equally likely.

    d4      all eight turns and reflections of the square, as described in the DTML paper
    mirror  a turn, then always a flip: only the four reflections, as in the released codes
    flip    no turns; along each of `flip_axes` a flip with probability 1/2
    none    no turns and flips
    """
    turns, axis, coin = (int(generator.integers(n)) for n in (4, 2, 2))
    flips: tuple[int, ...] = (axis,) if kind == "mirror" or coin else ()
    if kind in ("flip", "none"):
        turns, flips = 0, ()
    x, y, z = patch_size
    size = (y, x, z) if turns % 2 else (x, y, z)
    start = tuple(int(generator.integers(max(side - s, 0) + 1)) for side, s in zip(shape, size, strict=True))
    if kind == "flip":
        flips = tuple(axis for axis, name in enumerate(AXES) if generator.integers(2) and name in flip_axes)
    return Draw(start, size, turns, flips)  # type: ignore[arg-type]


def draw_warp(generator: np.random.Generator, strengths: Strengths) -> dict[str, Any]:
    """Draws `angles` and `scale` of a Draw; neither strength changes what is drawn for the other."""
    *angles, size = generator.uniform(-1, 1, 4).tolist()
    return {
        "angles": tuple(strengths.random_rotation * angle for angle in angles),
        "scale": float(np.exp(strengths.random_scale * size)),
    }


def turn_and_flip(volume: Tensor, draw: Draw) -> Tensor:
    """Box (...,w,h,d) -> patch: torch.rot90 in x-y, then the flips, with at most one copy.

    Turning the cropped box gives the same patch as turning the whole volume before cropping, and is much cheaper.
    """
    turned = volume.transpose(-3, -2) if draw.turns % 2 else volume
    axes = [axis - 3 for axis in range(3) if (axis in FLIPPED[draw.turns]) != (axis in draw.flips)]
    return turned.flip(axes) if axes else turned


# -- rotation and scaling --


@dataclass(frozen=True)
class Warp:
    """Where the voxels of a rotated and scaled box lie in a volume: at centre + matrix (i - middle of the box).

    The box is read at once at its new places, from the volume and not from a crop, so that no corner is missing.
    """

    centre: NDArray[np.float64]
    """Centre of the box, in voxels of the volume."""
    matrix: NDArray[np.float64]
    """(3,3)"""
    size: tuple[int, int, int]
    """Voxels of the box."""

    @classmethod
    def of(cls, draw: Draw, shape: Sequence[int], spacing: Sequence[float]) -> "Warp":
        """The warp of a box of a volume of this shape, with voxels of this size in mm."""
        before = [max(s - side, 0) // 2 for s, side in zip(draw.size, shape, strict=True)]  # as padding() has it
        centre = np.subtract(draw.start, before) + (np.array(draw.size) - 1) / 2
        turned = Rotation.from_euler("xyz", draw.angles, degrees=True).as_matrix()
        matrix = np.diag(1 / np.array(spacing)) @ turned.T @ np.diag(spacing) / draw.scale
        return cls(centre, matrix, draw.size)

    def box(self, shape: Sequence[int]) -> tuple[slice, slice, slice]:
        """The part of a volume of this shape that is needed."""
        reach = np.abs(self.matrix) @ ((np.array(self.size) - 1) / 2)
        low = np.maximum(np.floor(self.centre - reach), 0).astype(int)
        high = np.minimum(np.ceil(self.centre + reach) + 1, shape).astype(int)
        return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))  # type: ignore[return-value]

    def __call__(self, part: Tensor, box: Sequence[slice], mode: str) -> Tensor:
        """The voxels (...,w,h,d) of the warped box from `part` (...,W,H,D) float, the volume within `box`; 0 outside,
        as in padding. `mode` is 'bilinear' (linear along all three axes) or 'nearest'.
        """
        sides = np.array(part.shape[-3:])
        theta = np.empty((3, 4))  # of coordinates that go from -1 to 1, over the box and over the part
        theta[:, :3] = self.matrix * self.size / sides[:, None]
        theta[:, 3] = (2 * (self.centre - [s.start for s in box]) + 1) / sides - 1
        theta[:, :3] = theta[::-1, 2::-1]  # torch names the last axis first
        theta[:, 3] = theta[::-1, 3]
        volume = part.reshape(1, -1, *part.shape[-3:])
        grid = F.affine_grid(torch.from_numpy(theta).to(volume)[None], [1, 1, *self.size], align_corners=False)
        return F.grid_sample(volume, grid, mode=mode, align_corners=False).view(*part.shape[:-3], *self.size)


# -- intensities --


def random_intensities(image: Tensor, generator: np.random.Generator, strength: float) -> Tensor:
    """Intensity augmentation of one channel (w,h,d) of any range: gamma, then contrast and brightness.

    With u the image scaled to [0,1] and independent random g, a, b:

        image'  =  a (low + (high - low) u^g) + b       g, a in [exp(-strength), exp(strength)], log-uniform
                                                        b in [-strength, strength]

    b is in the units of the image: standard deviations of a scan, or with --normalize window its width.
    """
    gamma, contrast, shift = generator.uniform(-strength, strength, 3).tolist()
    low, high = image.aminmax()
    u = (image - low) / (high - low).clamp(min=torch.finfo(image.dtype).tiny)
    return float(np.exp(contrast)) * (low + (high - low) * power(u, float(np.exp(gamma)))) + shift


def power(u: Tensor, exponent: float) -> Tensor:
    """u^exponent of a tensor of any shape, the same to the last bit for any number of threads.

    On a CPU torch computes the voxels left over at the end of each thread's share by another function than the others.
    A data worker has one thread and the main process several, so a crop would depend on who makes it. Pieces of this
    size are not shared out.
    """
    if u.device.type != "cpu":
        return u**exponent
    return torch.cat([piece**exponent for piece in u.flatten().split(PIECE)]).view_as(u)


def degraded(image: Tensor, generator: np.random.Generator, strengths: Strengths) -> Tensor:
    """Bias field, blur, low resolution and noise, in this order, of one channel (w,h,d).

    No strength changes what is drawn for another.
    """
    bias, sigma, coarser, sd = generator.uniform(size=4).tolist()
    points = generator.uniform(-1, 1, (4, 4, 4))
    seed = int(generator.integers(2**63))
    if strengths.random_bias:
        image = with_bias_field(image, points, bias * strengths.random_bias)
    if strengths.random_blur:
        blurred = gaussian_filter(image.cpu().numpy(), sigma * strengths.random_blur, mode="nearest")
        image = torch.from_numpy(blurred).to(image.device)
    if strengths.random_resolution:
        image = at_resolution(image, 1 + coarser * strengths.random_resolution)
    if strengths.random_noise:
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
        image = image + sd * strengths.random_noise * noise.to(image.device)
    return image


def with_bias_field(image: Tensor, points: NDArray[np.float64], strength: float) -> Tensor:
    """The image (w,h,d) above its lowest value times a smooth field, as that of an MR coil.

    The field is exp(b). b is a polynomial of degree 3 along each axis of the crop, and `strength` its largest |b|.
    `points` (4,4,4) are its values at the corners and its control points between them (Bernstein's form).
    """

    def bernstein(n: int) -> NDArray[np.float64]:
        t = np.linspace(0, 1, n)
        return np.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])

    x, y, z = map(bernstein, image.shape)
    planes = torch.from_numpy(np.einsum("ijk,ix,jy->kxy", points, x, y)).to(image)
    b = sum(plane[:, :, None] * along for plane, along in zip(planes, torch.from_numpy(z).to(image), strict=True))
    assert isinstance(b, Tensor)
    low = image.min()
    return low + (image - low) * (b * (strength / b.abs().max())).exp()


def at_resolution(image: Tensor, factor: float) -> Tensor:
    """The image (w,h,d) averaged over voxels `factor` times as long and interpolated linearly to its own again."""
    sides = [max(round(side / factor), 1) for side in image.shape]
    coarse = F.interpolate(image[None, None], size=sides, mode="area")
    return F.interpolate(coarse, size=image.shape, mode="trilinear", align_corners=False)[0, 0]
