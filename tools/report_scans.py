"""The scans to look through on a report page: slices with contours, and surfaces to turn."""

import base64
import dataclasses
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.measure import approximate_polygon, find_contours

from dataloaders.cases import MOST_CLASSES, Case, CaseError, case_file, read_case
from dataloaders.geometry import read_geometry
from evaluation.figures import colour_of, window_of
from evaluation.metrics import mean_and_sd
from evaluation.predictions import read_prediction
from evaluation.slices import fixed_slice
from evaluation.surfaces import Camera, camera_around, render, surface
from tools.report_tables import NAMES, metrics_of, shown
from utils.channels import with_channels
from utils.errors import UserError

MOST_BYTES = 2_500_000  # of one scan's slices: two of them and the rest stay below 10 MB
SIDES = (512, 384, 288, 216, 160, 120)  # pixels of the longer side of a slice; the first that keeps to MOST_BYTES
FACES = 8000
VIEW, MARGIN = (160.0, 30.0), 0.92


def worst_and_best(rows: Sequence[dict[str, Any]], output: str, component: str) -> list[str]:
    """The scans with the lowest and the highest Dice (mean of the classes), or the only one."""
    dices_of: dict[str, list[float]] = {}
    for row in rows:
        if (row["output"], row["component"]) == (output, component):
            dices_of.setdefault(row["case"], []).append(row["dice"])
    means = {name: mean_and_sd(dices)[0] for name, dices in dices_of.items()}
    names = sorted(means, key=lambda name: (math.isnan(means[name]), means[name]))
    measured = [name for name in names if not math.isnan(means[name])] or names
    return list(dict.fromkeys([measured[0], measured[-1]])) if names else []


class ShownCase:
    """A scan of the page: `data` is what the page's script needs; the rest is for its first appearance.

    Raises:
        UserError: the scan or its prediction cannot be read, or they do not fit.
    """

    def __init__(
        self, test: Path, folder: Path, name: str, output: str, component: str, rows: Sequence[dict[str, Any]]
    ):
        path = case_file(folder, name)
        if path is None:
            raise UserError(f"{name} is not in {folder}. Name the folder of the data set with --data.")
        try:
            case = Case(name, path, labeled=True, classes=MOST_CLASSES)
            image, label = read_case(case)
            image = with_channels(image)[0]  # the page shows the first channel
            self.spacing = read_geometry(case)["spacing"]
        except CaseError as e:
            raise UserError(f"{name}: {path} {e}") from e
        assert label is not None
        prediction = read_prediction(test, output, name)
        if prediction.shape != image.shape:
            raise UserError(
                f"the prediction of {name} has {prediction.shape} voxels, the scan {image.shape}. Test again."
            )
        self.name, self.shape = name, image.shape
        chosen = [row for row in rows if (row["case"], row["output"], row["component"]) == (name, output, component)]
        figures = metrics_of(rows) if len(chosen) == 1 else ["dice", "hd95"]  # two figures for each of several classes
        lines = [", ".join(f"{NAMES.get(m, m)} {shown(m, row[m])}" for m in figures) for row in chosen]
        names = [f"{row['class']}: " if "class" in row else "" for row in chosen]
        self.line = "; ".join(name + line for name, line in zip(names, lines, strict=True))
        self.z = fixed_slice(label > 0, image.shape[-1])
        self.classes = max(int(label.max()), int(prediction.max()), 1)
        volumes = {"prediction": prediction, "label": label}
        camera = camera_around(list(volumes.values()), self.spacing, *VIEW)
        camera = dataclasses.replace(camera, width=MARGIN * camera.width)
        far = np.maximum(camera.centre, np.array(image.shape) * self.spacing - camera.centre)
        self.radius = float(np.linalg.norm(far)) + 1  # of a ball around the centre that holds the whole scan
        self.stills, surfaces = {}, []
        for which, volume in volumes.items():
            still, parts = self._surface(which, volume, camera)
            self.stills[which] = still
            surfaces.append(parts)
        self.data = {
            "name": name,
            "slices": jpeg_slices(image, self.spacing),
            "contours": {which: self._contours(volume) for which, volume in volumes.items()},
            "axes": camera.axes.tolist(),
            "zoom": 2 * self.radius / camera.width,
            "surfaces": surfaces,
        }

    def colour(self, which: str, c: int) -> str:
        """Of a class in the prediction or in the label."""
        return colour_of(c, alone=which == "label" and self.classes == 1)

    def _contours(self, volume: NDArray) -> list[list[str]]:
        """For each class and each slice the d of an SVG path, in voxels."""
        depth = range(volume.shape[-1])
        return [[outline(volume[..., z] == c) for z in depth] for c in range(1, self.classes + 1)]

    def _surface(self, which: str, volume: NDArray, camera: Camera) -> tuple[str, list[dict[str, Any]]]:
        """A still picture as a data URI, and triangles in units of the radius around the camera's centre."""
        surfaces = []
        for c in range(1, self.classes + 1):
            one = surface(volume == c, self.spacing, FACES)
            if len(one.faces):
                surfaces.append((one, self.colour(which, c)))
        parts = [
            {
                "colour": [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)],
                "vertices": packed(np.round(32767 * (one.vertices - camera.centre) / self.radius).astype("<i2")),
                "normals": packed(np.round(127 * one.normals).astype("i1")),
                "faces": packed(one.faces.astype("<u2")),
            }
            for one, colour in surfaces
        ]
        still = io.BytesIO()
        Image.fromarray(render(surfaces, camera, 300)).save(still, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(still.getvalue()).decode(), parts


def packed(array: NDArray) -> str:
    """The bytes of an array as base64."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def outline(mask: NDArray) -> str:
    """The d of an SVG path around the voxels of (W,H), to a third of a voxel; empty of an empty mask."""
    if not mask.any():
        return ""
    lines = [approximate_polygon(line - 0.5, 0.3) for line in find_contours(np.pad(mask, 1).astype(float), 0.5)]
    return "".join("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in line[:-1]) + "Z" for line in lines)


def jpeg_slices(image: NDArray, spacing: Sequence[float]) -> list[str]:
    """Every z slice of (W,H,D) as base64 of a JPEG, smaller where a scan would take more than MOST_BYTES."""
    window = window_of(image)
    grey = (255 * (image - window["vmin"]) / max(window["vmax"] - window["vmin"], 1e-6)).clip(0, 255).astype(np.uint8)
    w, h = (length * step for length, step in zip(image.shape[:2], spacing[:2], strict=True))
    files: list[bytes] = []
    for side in SIDES:
        side = min(side, 2 * max(image.shape[:2]))
        size = (max(round(side * w / max(w, h)), 1), max(round(side * h / max(w, h)), 1))
        files = []
        for z in range(image.shape[-1]):
            data = io.BytesIO()
            Image.fromarray(grey[..., z].T).resize(size, Image.Resampling.BICUBIC).save(data, "JPEG", quality=80)
            files.append(data.getvalue())
        if sum(map(len, files)) <= MOST_BYTES:
            break
    return [base64.b64encode(one).decode() for one in files]


def viewers(cases: Sequence[ShownCase], output: str, component: str) -> str:
    """The worst and the best scan: slices with contours, and surfaces."""
    if not cases:
        return "<h2>Scans</h2><p>The test saved no predictions (--save none), so there are none to show.</p>"
    titles = ["The only scan"] if len(cases) == 1 else ["Lowest Dice", "Highest Dice"]
    boxes = [viewer(case, title) for case, title in zip(cases, titles, strict=True)]
    return (
        f'<h2 id="look">Worst and best scan</h2><p class="soft">By the Dice of {escape(output)}, '
        f"{escape(component)}; slices as radiologists look at them, x to the right and y down.</p>" + "".join(boxes)
    )


def viewer(case: ShownCase, title: str) -> str:
    """One scan: what is there before the script runs, and without it."""
    name, z, (w, h, depth) = escape(case.name), case.z, case.shape
    ratio = f"{w * case.spacing[0]:.4g}/{h * case.spacing[1]:.4g}"
    dashed = ' stroke-dasharray="5 3"' if case.classes > 1 else ""
    paths = "".join(
        f'<path data-set="{which}" data-class="{c - 1}" stroke="{case.colour(which, c)}"'
        f'{dashed if which == "label" else ""} d="{case.data["contours"][which][c - 1][z]}"/>'
        for which in ("label", "prediction")
        for c in range(1, case.classes + 1)
    )
    ticks = "".join(
        f'<label><input type="checkbox" value="{which}" checked> <span class="chip" style="background:'
        f'{case.colour(which, 1)}"></span>{which}{" (dashed)" if dashed and which == "label" else ""}</label>'
        for which in ("prediction", "label")
    )
    stages = "".join(
        f'<figure><div class="stage"><img src="{case.stills[which]}" alt="Surface of the {which} of {name}"></div>'
        f"<figcaption>{which}</figcaption></figure>"
        for which in ("prediction", "label")
    )
    return f"""<section class="case"><h3>{title}: {name}</h3><p class="soft">{escape(case.line)}</p><div class="views">
<div><div class="slice" tabindex="0" aria-label="Slices of {name}: arrow keys move" style="aspect-ratio:{ratio}">
<img src="data:image/jpeg;base64,{case.data["slices"][z]}" alt="Slice {z} of {name}">
<svg viewBox="0 0 {w} {h}" preserveAspectRatio="none" aria-hidden="true">{paths}</svg></div>
<div class="controls"><input type="range" min="0" max="{depth - 1}" value="{z}" aria-label="Slice of {name}">
<output>slice {z} of {depth - 1}</output>{ticks}</div></div>
<div><div class="surfaces">{stages}</div><p class="soft hint">Drag to turn, or the arrow keys.</p></div></div></section>
"""
