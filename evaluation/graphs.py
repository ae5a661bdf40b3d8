"""Graphs for a paper: training curves, differences between runs, and Dice versus labeled scans or intensities."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from evaluation.drawing import FONT, WIDTH, Axes, Figure

CURVE_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")  # Okabe and Ito's
CURVES = dict(zip(("seg", "sdm", "consistency"), CURVE_COLOURS, strict=False))  # the last part of a tag
CURVES |= {"mask": CURVES["sdm"], "dis": CURVES["sdm"], "lambda": CURVES["consistency"]}
ASIDE: Any = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}  # a legend of many lines


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


def plain(axes: Axes, *edges: str, size: int = 7) -> None:
    """Small numbers, and no line at the top, at the right and at further edges."""
    axes.tick_params(labelsize=size)
    axes.spines[["top", "right", *edges]].set_visible(False)


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
            panel = axes[row, column]
            for tag, colour in ((tag, colour) for tag, colour in colours_of(tags).items() if tag in scalars):
                steps, values = scalars["iteration"], scalars[tag]
                width = max(len(values) // 60, 1)
                smooth = np.convolve(values, np.ones(width) / width, "valid")
                panel.plot(steps, values, color=colour, alpha=0.2, linewidth=0.6)
                panel.plot(steps[width // 2 :][: len(smooth)], smooth, color=colour, linewidth=1.2, label=tag)
            plain(panel, size=6)
            if title.startswith("live"):  # from a hundredth to 0
                panel.set_yscale("symlog", linthresh=1e-5)
                panel.set_yticks([0, 1e-4, 1e-2], labels=["0", "0.0001", "0.01"])
    for row, (title, tags) in enumerate(panels):
        axes[row, 0].set_ylabel(title, fontsize=7)
        lines = {line.get_label(): line for panel in axes[row] for line in panel.lines}
        drawn = {tag: lines[tag] for tag in tags if tag in lines}
        axes[row, -1].legend(drawn.values(), drawn, fontsize=6, frameon=False, **ASIDE)
    return figure


def draw_differences(rows: Sequence[tuple[str, Sequence[float], tuple[float, float, float]]], title: str) -> Figure:
    """Draws differences: for each row the scans as dots, their mean, and its interval as a bar.

    The bar is blue if the interval is above 0, orange if it is below 0, and grey if it contains 0.

    Args:
        rows: name, differences of the scans, and (mean, low, high).
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
    plain(axes, "left")
    return figure


def draw_labels(lines: Mapping[str, Mapping[int, Sequence[float]]]) -> Figure:
    """Dice versus the number of labeled scans: each run as a dot, a line through the means, bars of one SD over runs.

    Lines with the same number of labeled scans stand side by side around it.

    Args:
        lines: name -> number of labeled scans -> Dice of each run in percent. A bar is drawn from three runs on.
    """
    many = len(lines) > 4
    figure = Figure(figsize=(WIDTH if many else WIDTH / 2, 3.1), layout="constrained")
    axes = figure.add_subplot()
    numbers = sorted({n for points in lines.values() for n in points})
    there = {n: [name for name, points in lines.items() if n in points] for n in numbers}
    step = min(0.04, 0.5 / max(map(len, there.values())))
    for i, (name, points) in enumerate(lines.items()):
        colour, marker = CURVE_COLOURS[i % len(CURVE_COLOURS)], "os^v"[i // len(CURVE_COLOURS) % 4]
        at = [n * (1 + step * (there[n].index(name) - (len(there[n]) - 1) / 2)) for n in sorted(points)]
        dices = [points[n] for n in sorted(points)]
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
    plain(axes)
    axes.legend(fontsize=7, frameon=False, **(ASIDE if many else {}))
    return figure


def draw_scale(panels: Mapping[str, Sequence[tuple[float, float, float]]], names: Sequence[str]) -> Figure:
    """Dice versus the SD of a scan's intensities, with rank correlations.

    Args:
        panels: title -> for each scan its SD, its Dice without and its Dice with normalisation, joined by a line.
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
        plain(panel)
        panel.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    axes[0].set_ylabel("Dice of the scan, %", **FONT)
    return figure
