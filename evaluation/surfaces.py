"""Surfaces of masks: triangle meshes for TensorBoard and the report, and shaded pictures of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import marching_cubes

from utils.masks import box_of

SMOOTHING = 1.0  # voxels: removes the steps of a mask, and 2 % of the volume of a ball of radius 14
LIGHT = np.array([-0.45, 0.55, 0.71])  # direction: right, up, towards the viewer


@dataclass(frozen=True)
class Surface:
    """Triangles of a closed surface, counter-clockwise seen from outside.

    vertices (V,3) float32 in mm along x, y, z, relative to the centre of voxel (0,0,0); faces (F,3) int32 indices of
    vertices; normals (V,3) float32, outward, of length 1.
    """

    vertices: NDArray[np.float32]
    faces: NDArray[np.int32]
    normals: NDArray[np.float32]


def surface(mask: NDArray, spacing: Sequence[float] = (1, 1, 1), most_faces: int | None = None) -> Surface:
    """The slightly smoothed surface of a mask; empty for an empty mask.

    Args:
        mask: (W,H,D).
        spacing: mm along x, y, z.
        most_faces: largest number of triangles, reached by a coarser grid; None: no limit.
    """
    if not mask.any():
        return Surface(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32), np.zeros((0, 3), np.float32))
    box = box_of(mask)
    margin = 6  # the smoothed mask is almost 0 beyond it, so the surface is also closed at the edge of the scan
    inside = np.pad(mask[box].astype(np.float32), margin)
    voxel, steps = np.asarray(spacing, float), np.ones(3)
    while True:
        vertices, faces = _march(inside, steps)
        if most_faces is None or len(faces) <= most_faces:
            break
        edge = (steps * voxel).min() * max(np.sqrt(len(faces) / most_faces), 1.1)
        steps = np.maximum(steps, edge / voxel)
    vertices = (vertices - margin + [side.start for side in box]) * voxel
    return Surface(vertices.astype(np.float32), faces.astype(np.int32), _normals(vertices, faces))


def _march(inside: NDArray, steps: NDArray) -> tuple[NDArray, NDArray]:
    """Vertices in voxels and faces of a mask of 0 and 1, smoothed and sampled at every `steps`-th voxel (3,)."""
    field = ndimage.gaussian_filter(inside, np.hypot(SMOOTHING, np.where(steps > 1, 0.3 * steps, 0)))
    if (steps > 1).any():
        shape = tuple(np.ceil(np.array(field.shape) / steps).astype(int) + 1)
        field = ndimage.affine_transform(field, steps, output_shape=shape, order=1)
    level = min(0.5, 0.5 * float(field.max()))  # the maximum of a smoothed small mask is below 0.5
    vertices, faces, _, _ = marching_cubes(field, level)
    return vertices * steps, faces[:, ::-1]  # scikit-image's faces point inwards


def _normals(vertices: NDArray, faces: NDArray) -> NDArray[np.float32]:
    """Unit normals of the vertices: mean over the adjacent triangles, weighted by their area."""
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    normals = np.zeros_like(vertices, dtype=float)
    for i in range(3):
        np.add.at(normals, faces[:, i], np.cross(b - a, c - a))
    return (normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)).astype(np.float32)


@dataclass(frozen=True)
class Camera:
    """An orthographic camera (without perspective, so that sizes can be compared).

    centre (3,): point in the middle of the picture, in mm; width: mm from edge to edge; azimuth: degrees around z, 0
    looking along y, 90 against x; elevation: degrees, 90 looking down along z.
    """

    centre: tuple[float, float, float]
    width: float
    azimuth: float = 0.0
    elevation: float = 0.0

    @property
    def axes(self) -> NDArray[np.float64]:
        """(3,3): unit vectors to the right, up and towards the viewer, one per row."""
        a, e = np.deg2rad([self.azimuth, self.elevation])
        right = np.array([np.cos(a), np.sin(a), 0])
        viewer = np.array([np.sin(a) * np.cos(e), -np.cos(a) * np.cos(e), np.sin(e)])
        return np.stack([right, np.cross(viewer, right), viewer])


def camera_around(masks: Sequence[NDArray], spacing: Sequence[float], azimuth: float, elevation: float) -> Camera:
    """The camera whose picture just contains the common box of several masks (W,H,D) of one scan."""
    everything = np.any([mask > 0 for mask in masks], axis=0)
    box = box_of(everything, 2) if everything.any() else tuple(slice(0, side) for side in everything.shape)
    ends = [(np.array([side.start, side.stop]) - 0.5) * voxel for side, voxel in zip(box, spacing, strict=True)]
    corners = np.stack(np.meshgrid(*ends, indexing="ij"), axis=-1).reshape(8, 3)
    x, y, z = corners.mean(axis=0)
    seen = np.ptp(corners @ Camera((x, y, z), 1, azimuth, elevation).axes.T, axis=0)
    return Camera((x, y, z), float(seen[:2].max()), azimuth, elevation)


def rgb(colour: str) -> list[int]:
    """#rrggbb -> red, green and blue, 0 to 255."""
    return list(bytes.fromhex(colour[1:]))


def render(surfaces: Sequence[tuple[Surface, str]], camera: Camera, size: int) -> NDArray[np.uint8]:
    """Renders surfaces without a graphics library.

    Every triangle is sampled more densely than the pixels, and each pixel keeps the sample nearest to the viewer. This
    is exact, unlike sorting whole triangles. Edges are smoothed by rendering at twice the size.

    Args:
        surfaces: surfaces and their colours '#rrggbb'.
        size: pixels of a side.

    Returns:
        (size,size,4) RGBA, transparent outside of the surfaces.
    """
    pixels = 2 * size
    depth = np.full(pixels * pixels, -np.inf, np.float32)
    colour = np.zeros((pixels * pixels, 4), np.float32)
    for mesh, hexadecimal in surfaces:
        paint = np.array(rgb(hexadecimal)) / 255
        points = ((mesh.vertices - camera.centre) @ camera.axes.T * pixels / camera.width)[mesh.faces]  # (F,3,3)
        normals = (mesh.normals @ camera.axes.T)[mesh.faces]
        (ax, ay), (bx, by), (cx, cy) = (points[:, i, :2].T for i in range(3))
        facing = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax) > 0
        points, normals = points[facing].astype(np.float32), normals[facing].astype(np.float32)
        if len(points) == 0:
            continue
        weights = _lattice(np.linalg.norm(points - np.roll(points, 1, axis=1), axis=2).max())
        x, y, near = np.einsum("sc,fcd->dfs", weights, points, optimize=True).reshape(3, -1)
        column, row = (np.floor(v + pixels / 2).astype(int) for v in (x, -y))
        inside = np.flatnonzero((column >= 0) & (column < pixels) & (row >= 0) & (row < pixels))
        sample = inside[np.argsort(near[inside])]
        winner = np.full(pixels * pixels, -1)
        winner[row[sample] * pixels + column[sample]] = sample  # samples are sorted, so the nearest is written last
        place = np.flatnonzero(winner >= 0)
        place = place[near[winner[place]] > depth[place]]
        face, point = np.divmod(winner[place], len(weights))
        depth[place], colour[place, 3] = near[winner[place]], 1
        colour[place, :3] = _shade(np.einsum("nc,ncd->nd", weights[point], normals[face]), paint)
    picture = colour.reshape(size, 2, size, 2, 4).mean((1, 3))
    picture[..., :3] /= np.maximum(picture[..., 3:], 1e-6)
    return np.round(255 * picture.clip(0, 1)).astype(np.uint8)


def _lattice(longest: float) -> NDArray[np.float32]:
    """Barycentric weights (S,3) of points under a pixel apart in a triangle with edges of up to `longest` pixels."""
    n = int(np.ceil(1.5 * longest)) + 1
    i, j = (index.ravel() for index in np.mgrid[0 : n + 1, 0 : n + 1])
    return (np.stack([i, j, n - i - j], axis=1)[i + j <= n] / n).astype(np.float32)


def _shade(normals: NDArray, paint: NDArray) -> NDArray:
    """Colour (N,3) of each point from its normal (N,3): ambient light, light from the upper left, and a faint gloss."""
    normals = normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-6)
    light, half = LIGHT / np.linalg.norm(LIGHT), LIGHT / np.linalg.norm(LIGHT) + (0, 0, 1)
    towards, gloss = (np.maximum(normals @ v, 0)[:, None] for v in (light, half / np.linalg.norm(half)))
    return (paint * (0.32 + 0.15 * normals[:, 2:] + 0.55 * towards) + 0.15 * gloss**30).clip(0, 1)
