"""Figures of scans for a paper: a network's maps of some scans, and several runs next to the label."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evaluation.drawing import FONT, WIDTH, Axes, Figure, FigureCanvasAgg, Patch, withStroke
from evaluation.slices import colour_of, look_of, panel_ratio, write_letters
from evaluation.surfaces import camera_around, render, surface
from utils.masks import box_of

TITLES = {"image": "image", "label": "label Y", "z": "map z", "m": "mask m", "p": "output p", "q": "output q"}
SURFACE_PIXELS, SURFACE_FACES = 480, 40000


@dataclass
class MapsRow:
    """A row of `draw_maps`: a scan's image (W,H), label (W,H) or None, maps name -> (W,H), and spacing in mm.

    orientation: three letters; None: unknown.
    """

    name: str
    image: NDArray
    label: NDArray | None
    maps: dict[str, NDArray]
    spacing: Sequence[float]
    orientation: str | None = None


@dataclass
class ComparedCase:
    """Two rows of `draw_comparison`: image and label (W,H,D) of a scan, the slice z to show, and the spacing in mm.

    predictions: name of a run -> label map (W,H,D) and a line of text, such as the Dice.
    orientation: three letters; None: unknown.
    """

    name: str
    image: NDArray
    label: NDArray
    z: int
    predictions: dict[str, tuple[NDArray[Any], str]]
    spacing: Sequence[float]
    orientation: str | None = None


def around(mask: NDArray, share: float = 0.35) -> tuple[slice, slice]:
    """A square region around a mask (W,H), with a margin of `share` of the longer side of its box at each side; the
    whole slice if the mask is empty.
    """
    if not mask.any():
        return slice(0, mask.shape[0]), slice(0, mask.shape[1])
    box = box_of(mask)
    side = int((1 + 2 * share) * max(extent.stop - extent.start for extent in box))
    starts = [(extent.start + extent.stop - side) // 2 for extent in box]
    starts = [max(min(start, length - side), 0) for start, length in zip(starts, mask.shape, strict=True)]
    x, y = (slice(start, min(start + side, length)) for start, length in zip(starts, mask.shape, strict=True))
    return x, y


def show_slice(axes: Axes, values: NDArray, spacing: Sequence[float], **look: Any) -> None:
    """Draws values (W,H) in mm, with x to the right and y down. One that is too long for a panel is stretched to it."""
    w, h = (side * step for side, step in zip(values.shape, spacing, strict=False))
    axes.imshow(values.T, extent=(0, w, h, 0), interpolation="nearest", **look)
    axes.set_aspect("equal" if panel_ratio(h, w) == h / w else "auto")
    axes.set_axis_off()


def show_contours(axes: Axes, classes: NDArray, spacing: Sequence[float], *, is_label: bool, several: bool) -> None:
    """Draws the contour of every class of a label map (W,H).

    Predictions have solid contours in the colour of the class. The label has solid contours in its own colour, or
    dashed ones in the colours of the classes if there are several.
    """
    x, y = ((np.arange(side) + 0.5) * step for side, step in zip(classes.shape, spacing, strict=False))
    style = ("dashed" if several else "solid", 0.9) if is_label else ("solid", 1.2)
    for c in range(1, int(classes.max()) + 1):
        mask = classes == c
        if min(mask.shape) > 1 and mask.any() and not mask.all():  # a line of voxels has no contour
            axes.contour(x, y, mask.T.astype(float), [0.5], colors=[colour_of(c, is_label and not several)],
                         linestyles=style[0], linewidths=style[1])  # fmt: skip


def draw_maps(rows: Sequence[MapsRow], classes: str = "") -> Figure:
    """Figure 2 of the paper: a row per scan with its image, label and maps.

    The map z is shown from -1 (blue, inside) to 1 (red), other maps in grey from 0 to 1. Below stands what the numbers
    of several `classes` mean, if it is known.
    """
    names = ["image", *(["label"] if rows[0].label is not None else []), *rows[0].maps]
    most = max(int(row.label.max()) for row in rows if row.label is not None) if "label" in names else 1
    first_sdm = next((name for name in rows[0].maps if name.startswith("z")), None)
    side = WIDTH / len(names)
    shapes = [np.array(row.image.shape) * row.spacing[:2] for row in rows]
    heights = [side * panel_ratio(h, w) for w, h in shapes]
    page = Page(sum(heights) + 0.6)
    for i, (row, height) in enumerate(zip(rows, heights, strict=True)):
        page.next_row(height, row.name)
        for j, name in enumerate(names):
            axes = page.panel(j, len(names))
            values = row.image if name == "image" else row.label if name == "label" else row.maps[name]
            assert values is not None
            look = look_of(name, values)
            if name == "label":
                look["vmax"] = max(most, 1)  # one grey for a class in all rows
            write_letters(axes, row.orientation if name == "image" else None)
            show_slice(axes, values, row.spacing, **look)
            if i == 0:
                axes.set_title(TITLES.get(name, name), pad=3, **FONT)
            if row is rows[-1] and name == first_sdm:
                bar = page.figure.colorbar(axes.images[0], cax=page.below(axes), orientation="horizontal")
                bar.set_ticks([-1, 0, 1], labels=["-1 inside", "0", "1 outside"], fontsize=6)
                bar.ax.tick_params(length=2)
    page.figure.text(0.5, 0, classes, ha="center", va="bottom", fontsize=6.5, family=FONT["family"])
    return page.figure


class Page:
    """A figure filled row by row from the top; panels have one width and the height of their row, in inches."""

    def __init__(self, height: float):
        self.figure = Figure(figsize=(WIDTH, height))
        self.top, self.height = height - 0.2, 0.0

    def next_row(self, height: float, name: str = "") -> None:
        """Begins a row; its name is drawn vertically at the left."""
        self.top, self.height = self.top - self.height, height
        y = (self.top - height / 2) / self.figure.get_figheight()
        self.figure.text(0.002, y, name, rotation=90, fontsize=min(6.0, 90 * height / max(len(name), 1)), va="center",
                         family=FONT["family"])  # fmt: skip

    def panel(self, column: int, columns: int) -> Axes:
        """The axes of one column of the current row."""
        whole = self.figure.get_figheight()
        box = (0.02 + 0.98 * column / columns, (self.top - self.height) / whole, 0.97 / columns)
        axes = self.figure.add_axes((*box, (self.height - 0.03) / whole))
        axes.set_axis_off()
        return axes

    def below(self, axes: Axes) -> Axes:
        """Axes for a colour bar under a panel."""
        box, whole = axes.get_position(), self.figure.get_figheight()
        return self.figure.add_axes((box.x0 + 0.1 * box.width, box.y0 - 0.14 / whole, 0.8 * box.width, 0.06 / whole))


def draw_comparison(
    cases: Sequence[ComparedCase], azimuth: float, elevation: float, names: Mapping[int, str] = MappingProxyType({})
) -> Figure:
    """Figure 3 of the paper: for each scan a row of slices with contours and a row of surfaces.

    There is a column per run and one for the label. All surfaces of a row have the same camera.

    Args:
        cases: the scans, all with the same runs.
        azimuth, elevation: direction of the camera in degrees, see `Camera`.
        names: class -> its name, for a key of the colours of several classes.
    """
    columns = [*cases[0].predictions, "label"]
    several = any(int(case.label.max()) > 1 for case in cases)
    side = 0.98 * WIDTH / len(columns)
    pictures = [_surfaces(case, azimuth, elevation, several) for case in cases]
    crops = [around(np.any([v[..., case.z] > 0 for v in _volumes(case)], axis=0), 0.15) for case in cases]
    heights = []
    for case, (x, y), (first, *_) in zip(cases, crops, pictures, strict=True):
        w, h = (step * (extent.stop - extent.start) for extent, step in zip((x, y), case.spacing, strict=False))
        heights.append((side * panel_ratio(h, w), side * first.shape[0] / first.shape[1] + 0.08))
    page = Page(sum(map(sum, heights)) + 0.4)
    for case, (x, y), surfaces, (high, low) in zip(cases, crops, pictures, heights, strict=True):
        page.next_row(high, case.name)
        for j, name in enumerate(columns):
            axes = page.panel(j, len(columns))
            show_slice(axes, case.image[x, y, case.z], case.spacing, **look_of("image", case.image[..., case.z]))
            show_contours(axes, case.label[x, y, case.z], case.spacing, is_label=True, several=several)
            write_letters(axes, case.orientation if j == 0 else None)
            if name in case.predictions:
                mask, text = case.predictions[name]
                show_contours(axes, mask[x, y, case.z], case.spacing, is_label=False, several=several)
                axes.text(0.03, 0.03, text, transform=axes.transAxes, color="white", **{**FONT, "size": 6},
                          path_effects=[withStroke(linewidth=1.5, foreground="black")])  # fmt: skip
            if case is cases[0]:
                axes.set_title(name, pad=3, **FONT)
        page.next_row(low)
        for j, picture in enumerate(surfaces):
            page.panel(j, len(columns)).imshow(picture, interpolation="antialiased")
    key = "dashed: label; solid: prediction; a colour for each class" if several else "green: label; orange: prediction"
    page.figure.text(0.5, 0, key, ha="center", va="bottom", fontsize=6.5, family=FONT["family"])
    if several and names:
        patches = [Patch(color=colour_of(c), label=name) for c, name in names.items()]
        page.figure.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, fontsize=6.5,
                           frameon=False)  # fmt: skip
    return page.figure


def _volumes(case: ComparedCase) -> list[NDArray]:
    """The predictions of all runs, then the label."""
    return [*(mask for mask, _ in case.predictions.values()), case.label]


def _surfaces(case: ComparedCase, azimuth: float, elevation: float, several: bool) -> list[NDArray]:
    """Pictures of the surfaces of every run and of the label, cropped to the same rows."""
    camera = camera_around(_volumes(case), case.spacing, azimuth, elevation)
    pictures = []
    for volume in _volumes(case):
        alone, classes = volume is case.label and not several, range(1, int(volume.max()) + 1)
        surfaces = [(surface(volume == c, case.spacing, SURFACE_FACES), colour_of(c, alone)) for c in classes]
        pictures.append(render(surfaces, camera, SURFACE_PIXELS))
    rows = np.flatnonzero(np.any([picture[..., 3] > 0 for picture in pictures], axis=(0, 2)))
    low, high = (max(rows[0] - 8, 0), rows[-1] + 9) if rows.size else (0, SURFACE_PIXELS)
    return [picture[low:high] for picture in pictures]


def as_png(figure: Figure, dpi: int, *, palette: bool) -> bytes:
    """A PNG cropped to the content of the figure; with `palette` in 256 colours, about a third of the bytes."""
    data = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(data, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.03)
    if palette:
        picture = Image.open(data).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
        data = io.BytesIO()
        picture.save(data, "PNG", optimize=True)
    return data.getvalue()
