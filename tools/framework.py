"""Draws the framework of DTML, docs/framework.png: two V-Nets, their outputs on a phantom, and the three losses.

python -m tools.framework [FILE]
"""

import dataclasses
import io
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from scipy.ndimage import gaussian_filter

from dataloaders.phantom import phantom
from losses.sdm import signed_distance_map
from utils.checkpoint import write_whole
from utils.errors import run
from utils.options import option, read_flags

BLUE, ORANGE, PURPLE, GREEN, INK = "#2f6db3", "#d9762b", "#7a4fa3", "#2e8b57", "#2b2b2b"
SIDE = 1.9  # of a thumbnail
TOP, MIDDLE, BOTTOM = 5.55, 3.5, 1.45


@dataclasses.dataclass
class Options:
    """What to write."""

    file: str = option("docs/framework.png", "PNG to write", word="FILE", nargs="?")


def slices() -> dict[str, np.ndarray]:
    """x, p, z, m and Y of a slice of a phantom, and x of another; p and z are made from the label, not by a network."""
    (image, label), (other, _) = (phantom(2021, index, (80, 80, 44)) for index in (3, 5))
    y, depth = label[..., 22].astype(float), 22
    wobble = gaussian_filter(np.random.default_rng(0).standard_normal(y.shape), 4)
    p = gaussian_filter(y + 0.9 * wobble, 1.6).clip(0, 1)
    z = np.tanh(6 * gaussian_filter(signed_distance_map(label)[..., depth].astype(float), 0.8) + 0.8 * wobble)
    pictures = {"x": image[..., depth], "u": other[..., depth], "Y": y, "p": p, "z": z, "m": 1 / (1 + np.exp(60 * z))}
    return {name: values.T for name, values in pictures.items()}


def thumbnail(ax: Axes, values: np.ndarray, x: float, y: float, edge: str = INK, cmap: str = "gray") -> None:
    """A picture centred at (x, y)."""
    box = (x - SIDE / 2, x + SIDE / 2, y - SIDE / 2, y + SIDE / 2)
    low, high = (-1, 1) if cmap == "coolwarm" else np.percentile(values, (1, 99.5)) if values.min() < 0 else (0, 1)
    ax.imshow(values, extent=box, cmap=cmap, vmin=low, vmax=high, interpolation="bilinear", zorder=3, aspect="auto")
    ax.add_patch(Rectangle((box[0], box[2]), SIDE, SIDE, fill=False, edgecolor=edge, linewidth=1.6, zorder=4))


def text(ax: Axes, x: float, y: float, content: str, size: float = 15, colour: str = INK, **more: Any) -> None:
    """Centred text."""
    ax.text(x, y, content, fontsize=size, color=colour, **{"ha": "center", "va": "center", "zorder": 6, **more})


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK, **more: Any) -> None:
    """From start to end."""
    style = {"arrowstyle": "-|>", "mutation_scale": 16, "linewidth": 1.7, "shrinkA": 0, "shrinkB": 0, **more}
    ax.add_patch(FancyArrowPatch(start, end, color=colour, zorder=2, **style))


def network(ax: Axes, x: float, y: float, name: str, colour: str) -> None:
    """A V-Net, narrow in the middle."""
    outline = [(-1.1, 0.85), (0, 0.4), (1.1, 0.85), (1.1, -0.85), (0, -0.4), (-1.1, -0.85)]
    corners = [(x + dx, y + dy) for dx, dy in outline]
    ax.add_patch(Polygon(corners, facecolor=colour, edgecolor=colour, joinstyle="round", linewidth=4, zorder=3))
    text(ax, x, y, name, 25, "white")


def loss(ax: Axes, x: float, y: float, width: float, formula: str, domain: str, colour: str) -> None:
    """A box with a loss and where it counts."""
    style = FancyBboxPatch(
        (x - width / 2, y - 0.55), width, 1.1, "round,pad=0.04,rounding_size=0.18", facecolor="white",
        edgecolor=colour, linewidth=2, zorder=5,
    )  # fmt: skip
    ax.add_patch(style)
    text(ax, x, y + 0.16, formula, 20, colour)
    text(ax, x, y - 0.31, domain, 14, INK)


def draw() -> plt.Figure:
    """The figure."""
    with plt.rc_context({"mathtext.fontset": "cm", "font.family": "DejaVu Sans"}):
        figure = plt.figure(figsize=(16, 7))
        ax = figure.add_axes((0, 0, 1, 1), xlim=(0, 16), ylim=(0, 7))
        ax.axis("off")
        seen = slices()
        thumbnail(ax, seen["x"], 1.35, MIDDLE + 1.1, GREEN)
        thumbnail(ax, seen["u"], 1.35, MIDDLE - 1.1)
        text(ax, 1.35, MIDDLE + 2.3, "$x$, labeled", 17, GREEN)
        text(ax, 1.35, MIDDLE - 2.3, "$x$, unlabeled", 17)
        for y, name, colour in ((TOP, "$M_s$", BLUE), (BOTTOM, "$M_d$", ORANGE)):
            arrow(ax, (2.45, MIDDLE), (3.0, y), colour, connectionstyle="angle3,angleA=90,angleB=0", shrinkA=4)
            network(ax, 4.2, y, name, colour)
        text(ax, 4.2, TOP + 1.12, "segmentation", 16, BLUE)
        text(ax, 4.2, BOTTOM - 1.12, "signed distance map", 16, ORANGE)

        thumbnail(ax, seen["p"], 9.6, TOP, BLUE)
        thumbnail(ax, seen["z"], 6.9, BOTTOM, ORANGE, "coolwarm")
        thumbnail(ax, seen["m"], 9.6, BOTTOM, ORANGE)
        arrow(ax, (5.35, TOP), (8.6, TOP), BLUE)
        arrow(ax, (5.35, BOTTOM), (5.9, BOTTOM), ORANGE)
        arrow(ax, (7.9, BOTTOM), (8.6, BOTTOM), ORANGE)
        text(ax, 6.9, BOTTOM - 1.22, "$z$", 21, ORANGE)
        text(ax, 9.6, BOTTOM - 1.22, r"$m=\sigma(-kz)$", 19, ORANGE)
        text(ax, 9.6, TOP + 1.17, "$p$", 21, BLUE)

        for y in (TOP - SIDE / 2, BOTTOM + SIDE / 2):
            arrow(ax, (9.6, MIDDLE), (9.6, y), PURPLE, arrowstyle="<|-|>")
        loss(ax, 9.6, MIDDLE, 4.9, r"$\lambda(t)\,C,\quad C=\mathrm{mean}\,(m-p)^2$", "all crops", PURPLE)
        for y, formula, colour in ((TOP, "$L_{seg}(p,Y)$", BLUE), (BOTTOM, "$L_{mask}(m,Y)$", ORANGE)):
            arrow(ax, (10.6, y), (11.45, y), colour)
            loss(ax, 12.6, y, 2.3, formula, "labeled crops", colour)
            arrow(ax, (14.55, MIDDLE + (1.0 if y > MIDDLE else -1.0)), (13.78, y), GREEN,
                  connectionstyle="angle3,angleA=90,angleB=0")  # fmt: skip
        thumbnail(ax, seen["Y"], 14.55, MIDDLE, GREEN)
        text(ax, 15.75, MIDDLE, "$Y$", 21, GREEN)
        text(ax, 12.6, TOP + 1.17, r"$M_s$ minimizes $L_{seg}+\lambda C$", 16, BLUE)
        text(ax, 12.6, BOTTOM - 1.2, r"$M_d$ minimizes $L_{mask}+\lambda C$", 16, ORANGE)
        return figure


def main(argv: list[str] | None = None) -> None:
    o: Options = read_flags(Options, __doc__, "python -m tools.framework", argv)
    data = io.BytesIO()
    draw().savefig(data, format="png", dpi=100, facecolor="white")
    write_whole(Path(o.file), data.getvalue())
    print(o.file)


if __name__ == "__main__":
    run(main)
