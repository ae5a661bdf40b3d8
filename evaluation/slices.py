"""Pictures of a scan during training: a slice and its maps with contours, and surfaces of prediction and label."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.drawing import FONT, Axes, Figure, FigureCanvasAgg, withStroke
from evaluation.surfaces import rgb, surface

LABEL = "#00d0a0"
COLOURS = ("#ffb000", "#dc267f", "#648fff", "#fe6100", "#785ef0", "#5fd3f3")
"""Of classes 1, 2, ..., distinguishable with colour blindness."""
PREDICTION = COLOURS[0]
HEIGHT = 2.6  # of a panel, in inches
MOST_FACES = 6000  # of each class's surface in TensorBoard
LONGEST = 4  # sides of a panel as multiples of each other; a longer slice, as of one voxel along y, is stretched
LETTERS = 16  # of 8 points that an inch holds
OPPOSITE = dict(zip("RLAPSI", "LRPAIS", strict=True))
EDGES = {"left": (0.02, 0.5, "left", "center"), "right": (0.98, 0.5, "right", "center"),
         "top": (0.5, 0.98, "center", "top"), "bottom": (0.5, 0.02, "center", "bottom")}  # fmt: skip
"""Edge of a slice -> place of its letter in shares of the panel, and its alignment."""


def colour_of(c: int, alone: bool = False) -> str:
    """The colour of a class 1, 2, ...; with `alone` the colour of a single label."""
    return LABEL if alone else COLOURS[(c - 1) % len(COLOURS)]


def look_of(name: str, values: NDArray) -> dict[str, Any]:
    """imshow options of an image, grey from its 1st to its 99th percentile; of a map z in [-1,1], blue (inside) to red;
    or of another map in [0,1], grey."""
    if name.startswith("z"):
        return {"cmap": "coolwarm", "vmin": -1, "vmax": 1}
    low, high = np.percentile(values, (1, 99)) if name == "image" else (0, 1)
    return {"cmap": "gray", "vmin": low, "vmax": high}


def edge_letters(orientation: str | None) -> dict[str, str]:
    """The letter of the patient's side at each edge of a slice in x-y, with x to the right and y down, in an
    orientation of three letters, the directions of increasing x, y, z (None if unknown).

    Returns:
        left, right, top, bottom -> R, L, A, P, S or I; {} if unknown.
    """
    if orientation is None:
        return {}
    x, y = orientation[0], orientation[1]
    return {"left": OPPOSITE[x], "right": x, "top": OPPOSITE[y], "bottom": y}


def write_letters(axes: Axes, orientation: str | None) -> None:
    """Writes `edge_letters` into a panel that shows a slice."""
    for edge, letter in edge_letters(orientation).items():
        x, y, across, along = EDGES[edge]
        axes.text(x, y, letter, transform=axes.transAxes, ha=across, va=along, color="white", weight="bold", **FONT,
                  path_effects=[withStroke(linewidth=2, foreground="black")])  # fmt: skip


def fixed_slice(label: NDArray | None, depth: int) -> int:
    """The slice z with the most label voxels, or the middle one without label."""
    return depth // 2 if label is None or not label.any() else int((label > 0).sum(axis=(0, 1)).argmax())


def panel_ratio(a: float, b: float) -> float:
    """a / b, the sides of a panel that shows a slice of sides a and b: at most LONGEST, at least 1 / LONGEST."""
    return min(max(a / b, 1 / LONGEST), LONGEST)


def panels(
    image: NDArray,
    maps: dict[str, NDArray],
    contours: dict[str, tuple[NDArray, str]],
    title: str = "",
    orientation: str | None = None,
) -> NDArray[np.uint8]:
    """Draws one slice as a row of panels.

    Args:
        image: (W,H) intensities, shown from their 1st to their 99th percentile.
        maps: name -> (W,H); z, of any class, in blue (inside) to red over [-1,1], others in grey over [0,1].
        contours: name -> (label map (W,H), colour), drawn on every panel.
        orientation: three letters, for those at the edges of the image; None: unknown, no letters.

    Returns:
        Picture (height, width, 3).
    """
    w, h = image.shape
    width = (len(maps) + 1) * HEIGHT * panel_ratio(w, h) * 1.02
    key = ", ".join(f"{name} {'orange' if colour == PREDICTION else 'green'}" for name, (_, colour) in contours.items())
    lines = textwrap.wrap(f"{title}   contours: {key}", max(int(LETTERS * width), 1))
    above = 0.35 + 0.15 * len(lines)
    figure = Figure(figsize=(width, HEIGHT + above), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    for i, (name, values) in enumerate({"image": image, **maps}.items()):
        axes = figure.add_axes((i / (len(maps) + 1), 0, 0.98 / (len(maps) + 1), HEIGHT / (HEIGHT + above)))
        write_letters(axes, orientation if name == "image" else None)
        axes.imshow(values.T, interpolation="nearest", aspect="auto", **look_of(name, values))
        for classes, colour in contours.values():
            for mask in (classes == c for c in np.unique(classes) if c > 0):
                if min(mask.shape) > 1 and not mask.all():  # a line of voxels has no contour
                    axes.contour(mask.T.astype(float), [0.5], colors=[colour], linewidths=1.2)
        axes.set_axis_off()
        axes.set_title(name, fontsize=10, pad=3)
    figure.text(0.002, 1 - 0.045 / (HEIGHT + above), "\n".join(lines), fontsize=8, va="top")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def slice_picture(
    image: NDArray, maps: dict[str, NDArray], prediction: NDArray, label: NDArray | None, title: str,
    orientation: str | None = None,
) -> NDArray[np.uint8]:  # fmt: skip
    """Draws one slice of an image (W,H,D), its maps, prediction and optional label, all (W,H,D)."""
    z = fixed_slice(label, image.shape[-1])
    contours = {"prediction": (prediction[..., z], PREDICTION)}
    if label is not None:
        contours["label"] = (label[..., z], LABEL)
    shown = {name: values[..., z] for name, values in maps.items()}
    return panels(image[..., z], shown, contours, title, orientation=orientation)


def prediction_mesh(prediction: NDArray, label: NDArray, spacing: Sequence[float]) -> dict[str, NDArray]:
    """One mesh of the surfaces of a prediction and its label, next to each other along x.

    Args:
        prediction, label: label maps (W,H,D).
        spacing: mm along x, y, z.

    Returns:
        vertices (V,3) in mm, colours (V,3) uint8, faces (F,3). Without any surface the mesh is one triangle of area 0,
        because TensorBoard does not accept an empty mesh.
    """
    vertices, colours, faces = [np.zeros((1, 3))], [np.zeros((1, 3), np.uint8)], [np.zeros((1, 3), int)]
    several = max(int(label.max()), int(prediction.max())) > 1
    for volume, shift in ((prediction, 0.0), (label, 1.05 * label.shape[0] * spacing[0])):
        for c in range(1, int(volume.max()) + 1):
            mesh = surface(volume == c, spacing, MOST_FACES)
            paint = rgb(colour_of(c, alone=bool(shift) and not several))
            faces.append(mesh.faces + sum(map(len, vertices)))
            vertices.append(mesh.vertices + np.array([shift, 0, 0]))
            colours.append(np.tile(np.array(paint, np.uint8), (len(mesh.vertices), 1)))
    return {"vertices": np.concatenate(vertices).astype(np.float32), "colours": np.concatenate(colours),
            "faces": np.concatenate(faces).astype(np.int32)}  # fmt: skip
