"""Figures for a paper: a network's maps of some scans, several runs next to the label, curves, and Dice by scan."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import stats

from evaluation.drawing import Axes, Figure, FigureCanvasAgg, withStroke
from evaluation.slices import COLOURS, LABEL, fixed_slice
from evaluation.surfaces import Camera, camera_around, render, surface
from utils.masks import box_of

WIDTH = 7.0  # of a page, in inches
FONT: dict[str, Any] = {"family": "DejaVu Sans", "size": 8}
TITLES = {"image": "image", "label": "label Y", "z": "map z", "m": "mask m", "p": "output p", "q": "output q"}
CURVE_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")  # Okabe and Ito's
CURVES = dict(zip(("seg", "sdm", "consistency"), CURVE_COLOURS, strict=False))  # the last part of a tag
CURVES |= {"mask": CURVES["sdm"], "dis": CURVES["sdm"], "lambda": CURVES["consistency"]}
ASIDE: Any = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}  # a legend of many lines
SURFACE_PIXELS, SURFACE_FACES = 480, 40000


@dataclass
class MapsRow:
    """A row of `draw_maps`: a scan's image (W,H), label (W,H) or None, maps name -> (W,H), and spacing in mm."""

    name: str
    image: NDArray
    label: NDArray | None
    maps: dict[str, NDArray]
    spacing: Sequence[float]


@dataclass
class ComparedCase:
    """Two rows of `draw_comparison`: image and label (W,H,D) of a scan, the slice z to show, and the spacing in mm.

    predictions: name of a run -> label map (W,H,D) and a line of text, such as the Dice.
    """

    name: str
    image: NDArray
    label: NDArray
    z: int
    predictions: dict[str, tuple[NDArray[Any], str]]
    spacing: Sequence[float]


def slice_of(label: NDArray | None, depth: int, z: int | None) -> int:
    """The slice to show: z, or by default the one with the most label voxels."""
    return fixed_slice(None if label is None else label > 0, depth) if z is None else z


def around(mask: NDArray, share: float = 0.35) -> tuple[slice, slice]:
    """A square region around a mask (W,H); the whole slice if the mask is empty.

    Args:
        mask: (W,H).
        share: margin on each side, relative to the longer side of the mask's box.
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
    """Draws values (W,H) in mm, with x to the right and y down, the usual view in radiology."""
    w, h = (side * step for side, step in zip(values.shape, spacing, strict=False))
    axes.imshow(values.T, extent=(0, w, h, 0), interpolation="nearest", **look)
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
        if mask.any() and not mask.all():
            axes.contour(x, y, mask.T.astype(float), [0.5], colors=[colour_of(c, is_label and not several)],
                         linestyles=style[0], linewidths=style[1])  # fmt: skip


def colour_of(c: int, alone: bool = False) -> str:
    """The colour of a class 1, 2, ...; with `alone` the colour of a single label."""
    return LABEL if alone else COLOURS[(c - 1) % len(COLOURS)]


def window_of(image: NDArray) -> dict[str, Any]:
    """imshow options: grey from the 1st to the 99th percentile of the image."""
    low, high = np.percentile(image, (1, 99))
    return {"cmap": "gray", "vmin": low, "vmax": high}


def draw_maps(rows: Sequence[MapsRow]) -> Figure:
    """Figure 2 of the paper: a row per scan with its image, label and maps.

    The map z is shown from -1 (blue, inside) to 1 (red), other maps in grey from 0 to 1.
    """
    names = ["image", *(["label"] if rows[0].label is not None else []), *rows[0].maps]
    side = WIDTH / len(names)
    shapes = [np.array(row.image.shape) * row.spacing[:2] for row in rows]
    heights = [side * h / w for w, h in shapes]
    page = Page(sum(heights) + 0.6)
    for i, (row, height) in enumerate(zip(rows, heights, strict=True)):
        page.next_row(height, row.name)
        for j, name in enumerate(names):
            axes = page.panel(j, len(names))
            values = row.image if name == "image" else row.label if name == "label" else row.maps[name]
            assert values is not None
            look: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1}
            if name == "image":
                look = window_of(row.image)
            elif name == "label":
                look["vmax"] = max(int(values.max()), 1)
            elif name == "z":
                look = {"cmap": "coolwarm", "vmin": -1, "vmax": 1}
            show_slice(axes, values, row.spacing, **look)
            if i == 0:
                axes.set_title(TITLES.get(name, name), pad=3, **FONT)
            if name == "z" and row is rows[-1]:
                bar = page.figure.colorbar(axes.images[0], cax=page.below(axes), orientation="horizontal")
                bar.set_ticks([-1, 0, 1], labels=["-1 inside", "0", "1 outside"], fontsize=6)
                bar.ax.tick_params(length=2)
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


def draw_comparison(cases: Sequence[ComparedCase], azimuth: float, elevation: float) -> Figure:
    """Figure 3 of the paper: for each scan a row of slices with contours and a row of surfaces.

    There is a column per run and one for the label. All surfaces of a row have the same camera.

    Args:
        cases: the scans, all with the same runs.
        azimuth, elevation: direction of the camera in degrees, see `Camera`.
    """
    names = [*cases[0].predictions, "label"]
    several = any(int(case.label.max()) > 1 for case in cases)
    side = 0.98 * WIDTH / len(names)
    pictures = [_surfaces(case, azimuth, elevation, several) for case in cases]
    crops = [around(np.any([v[..., case.z] > 0 for v in _volumes(case)], axis=0), 0.15) for case in cases]
    heights = []
    for case, (x, y), (first, *_) in zip(cases, crops, pictures, strict=True):
        w, h = (step * (extent.stop - extent.start) for extent, step in zip((x, y), case.spacing, strict=False))
        heights.append((side * h / w, side * first.shape[0] / first.shape[1] + 0.08))
    page = Page(sum(map(sum, heights)) + 0.4)
    for case, (x, y), surfaces, (high, low) in zip(cases, crops, pictures, heights, strict=True):
        page.next_row(high, case.name)
        for j, name in enumerate(names):
            axes = page.panel(j, len(names))
            show_slice(axes, case.image[x, y, case.z], case.spacing, **window_of(case.image[..., case.z]))
            show_contours(axes, case.label[x, y, case.z], case.spacing, is_label=True, several=several)
            if name in case.predictions:
                mask, text = case.predictions[name]
                show_contours(axes, mask[x, y, case.z], case.spacing, is_label=False, several=several)
                axes.text(0.03, 0.03, text, transform=axes.transAxes, color="white", **{**FONT, "size": 6},
                          path_effects=[withStroke(linewidth=1.5, foreground="black")])  # fmt: skip
            if case is cases[0]:
                axes.set_title(name, pad=3, **FONT)
        page.next_row(low)
        for j, picture in enumerate(surfaces):
            page.panel(j, len(names)).imshow(picture, interpolation="antialiased")
    key = "dashed: label; solid: prediction; a colour for each class" if several else "green: label; orange: prediction"
    page.figure.text(0.5, 0, key, ha="center", va="bottom", fontsize=6.5, family=FONT["family"])
    return page.figure


def _volumes(case: ComparedCase) -> list[NDArray]:
    """The predictions of all runs, then the label."""
    return [*(mask for mask, _ in case.predictions.values()), case.label]


def _surfaces(case: ComparedCase, azimuth: float, elevation: float, several: bool) -> list[NDArray]:
    """Pictures of the surfaces of every run and of the label, cropped to the same rows."""
    camera = camera_around(_volumes(case), case.spacing, azimuth, elevation)
    pictures = [
        draw_surface(volume, case.spacing, camera, is_label=volume is case.label and not several)
        for volume in _volumes(case)
    ]
    rows = np.flatnonzero(np.any([picture[..., 3] > 0 for picture in pictures], axis=(0, 2)))
    low, high = (max(rows[0] - 8, 0), rows[-1] + 9) if rows.size else (0, SURFACE_PIXELS)
    return [picture[low:high] for picture in pictures]


def draw_surface(volume: NDArray, spacing: Sequence[float], camera: Camera, *, is_label: bool) -> NDArray[np.uint8]:
    """A picture (480,480,4) of the surfaces of all classes of a label map (W,H,D), each in its colour."""
    classes = range(1, int(volume.max()) + 1)
    surfaces = [(surface(volume == c, spacing, SURFACE_FACES), colour_of(c, is_label)) for c in classes]
    return render(surfaces, camera, SURFACE_PIXELS)


def colours_of(tags: Sequence[str]) -> dict[str, str]:
    """Tag -> colour for the tags of one panel.

    Tags of M_s, of M_d and of both have the same colour in all panels. Two tags of a panel have different colours as
    long as there are enough.
    """
    colours: dict[str, str] = {}
    for tag in tags:
        usual = CURVES.get(tag.rpartition("/")[2].removeprefix("train_"), "")
        candidates = (usual, *CURVE_COLOURS[3:], *CURVE_COLOURS[:3])
        unused = [colour for colour in candidates if colour and colour not in colours.values()]
        colours[tag] = unused[0] if unused else CURVE_COLOURS[len(colours) % len(CURVE_COLOURS)]
    return colours


def draw_curves(runs: dict[str, dict[str, NDArray]], panels: Sequence[tuple[str, Sequence[str]]]) -> Figure:
    """Training curves of several runs side by side.

    Args:
        runs: name -> column of scalars.csv -> values; each run is a column of panels.
        panels: for each row of panels its title and the tags drawn in it.
    """
    figure = Figure(figsize=(WIDTH, 1.25 * len(panels) + 0.4), layout="constrained")
    axes = figure.subplots(len(panels), len(runs), sharex="col", sharey="row", squeeze=False)
    for column, (name, scalars) in enumerate(runs.items()):
        axes[0, column].set_title(textwrap.fill(name, 88 // len(runs)), **FONT)
        axes[-1, column].set_xlabel("iteration", fontsize=7)
        for row, (title, tags) in enumerate(panels):
            for tag, colour in colours_of(tags).items():
                if tag not in scalars:
                    continue
                steps, values = scalars["iteration"], scalars[tag]
                width = max(len(values) // 60, 1)
                smooth = np.convolve(values, np.ones(width) / width, "valid")
                axes[row, column].plot(steps, values, color=colour, alpha=0.2, linewidth=0.6)
                axes[row, column].plot(
                    steps[width // 2 :][: len(smooth)], smooth, color=colour, linewidth=1.2, label=tag
                )
            axes[row, column].tick_params(labelsize=6)
            axes[row, column].spines[["top", "right"]].set_visible(False)
            if title.startswith("live"):  # from a hundredth to 0
                axes[row, column].set_yscale("symlog", linthresh=1e-5)
                axes[row, column].set_yticks([0, 1e-4, 1e-2], labels=["0", "0.0001", "0.01"])
    for row, (title, tags) in enumerate(panels):
        axes[row, 0].set_ylabel(title, fontsize=7)
        lines = {line.get_label(): line for panel in axes[row] for line in panel.lines}
        drawn = {tag: lines[tag] for tag in tags if tag in lines}
        axes[row, -1].legend(
            drawn.values(), drawn, fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5)
        )
    return figure


def draw_differences(rows: Sequence[tuple[str, Sequence[float], tuple[float, float, float]]], title: str) -> Figure:
    """Draws differences: for each row the scans as dots, their mean, and its interval as a bar.

    The bar is blue if the interval is above 0, orange if it is below 0, and grey if it contains 0.

    Args:
        rows: name, differences of the scans, and (mean, low, high).
        title: label of the x axis.
    """
    figure = Figure(figsize=(WIDTH, 0.7 + 0.27 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for y, (_, scans, (mean, low, high)) in enumerate(rows):
        colour = "#0072b2" if low > 0 else "#d55e00" if high < 0 else "0.25"
        axes.scatter(scans, [y] * len(scans), s=9, color="0.7", linewidths=0)
        axes.plot([low, high], [y, y], color=colour, linewidth=2.5, solid_capstyle="butt")
        axes.scatter([mean], [y], s=28, color=colour, zorder=3)
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows], **FONT)
    axes.invert_yaxis()
    axes.set_xlabel(title, **FONT)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def draw_labels(lines: Mapping[str, Mapping[int, Sequence[float]]]) -> Figure:
    """Dice versus the number of labeled scans: each run as a dot, a line through the means, bars of one SD over runs.

    Args:
        lines: name -> number of labeled scans -> Dice of each run in percent. A bar is drawn from three runs on.
    """
    many = len(lines) > 4
    figure = Figure(figsize=(WIDTH if many else WIDTH / 2, 3.1), layout="constrained")
    axes = figure.add_subplot()
    numbers = sorted({n for points in lines.values() for n in points})
    step = min(0.04, 0.5 / len(lines))
    for i, (name, points) in enumerate(lines.items()):
        colour, aside = CURVE_COLOURS[i % len(CURVE_COLOURS)], 1 + step * (i - (len(lines) - 1) / 2)
        marker = "os^v"[i // len(CURVE_COLOURS) % 4]
        at, dices = [n * aside for n in sorted(points)], [points[n] for n in sorted(points)]
        axes.plot(at, [np.mean(dice) for dice in dices], "-", marker=marker, markersize=4, color=colour, label=name)
        for x, dice in zip(at, dices, strict=True):
            axes.scatter([x] * len(dice), dice, s=9, color=colour, alpha=0.5, linewidths=0)
            if len(dice) > 2:
                axes.errorbar(x, np.mean(dice), np.std(dice, ddof=1), color=colour, capsize=2, linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks(numbers, [str(n) for n in numbers], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("labeled scans", **FONT)
    axes.set_ylabel("Dice %, mean over the scans", **FONT)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, **(ASIDE if many else {}))
    return figure


def draw_scale(panels: Mapping[str, Sequence[tuple[float, float, float]]], names: Sequence[str]) -> Figure:
    """Dice versus the SD of a scan's intensities, with rank correlations.

    Args:
        panels: title -> for each scan its SD, its Dice without and its Dice with normalisation, joined by a line.
        names: names of the two kinds of Dice.
    """
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, (title, scans) in zip(axes, panels.items(), strict=True):
        sd, *dices = np.array(scans).T
        panel.vlines(sd, *dices, color="0.75", linewidth=0.8, zorder=0)
        for dice, name, colour in zip(dices, names, ("#d55e00", "#0072b2"), strict=True):
            label = f"{name} (rank correlation {stats.spearmanr(sd, dice).statistic:+.2f})"
            panel.scatter(sd, dice, s=14, color=colour, linewidths=0, label=label)
        panel.set_title(title, **FONT)
        panel.set_xlabel("SD of the scan's intensities, as published (no unit)", **FONT)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    axes[0].set_ylabel("Dice of the scan, %", **FONT)
    return figure


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
