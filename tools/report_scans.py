"""The scans to look through on a report page: slices with contours, and surfaces to turn."""

import base64
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.measure import approximate_polygon, find_contours

from dataloaders.cases import labeled_case, named, read_case
from dataloaders.geometry import read_geometry
from dataloaders.orientation import viewing_turn
from evaluation.predictions import read_prediction
from evaluation.slices import EDGES, OPPOSITE, colour_of, edge_letters, fixed_slice, look_of
from evaluation.surfaces import Camera, Surface, camera_around, render, rgb, surface
from tools.report_tables import NAMES, metrics_of, text_of
from utils.channels import with_channels
from utils.errors import UserError

MOST_BYTES = 2_500_000  # of one scan's slices
ALL_BYTES = 10_000_000  # of the slices of all scans: with 20 of LA a page has 17 MB
SIDES = (512, 384, 288, 216, 160, 120, 90)  # pixels of the longer side of a slice; the first that keeps to the bytes
SAMPLED = 8  # every so many slices are encoded to choose among them
FACES = 4000
VIEW, MARGIN = (160.0, 30.0), 0.92


def shown_first(dices: Mapping[str, float]) -> list[int]:
    """The places of the scans with the lowest and the highest Dice among those of `by_dice`, or of the only one."""
    measured = sum(not math.isnan(dice) for dice in dices.values()) or len(dices)
    return list(dict.fromkeys([0, measured - 1])) if dices else []


class ShownCase:
    """A scan of the page: `data` is what the page's script needs; the rest is for its first appearance.

    Args:
        most_bytes: of its slices.
        still: whether pictures of its surfaces are drawn, for those that the page shows at first.
        class_names: class, as text -> its name.

    Raises:
        UserError: the scan or its prediction cannot be read, or they do not fit.
    """

    def __init__(
        self, test: Path, folder: Path, name: str, output: str, component: str, rows: Sequence[dict[str, Any]], *,
        most_bytes: int = MOST_BYTES, still: bool = True, class_names: Mapping[str, str] = MappingProxyType({}),
    ):  # fmt: skip
        case = labeled_case(folder, name)
        with named(case):
            image, label = read_case(case)
            geometry = read_geometry(case)
        image = with_channels(image)[0]  # the page shows the first channel
        assert label is not None
        prediction = read_prediction(test, output, name)
        if prediction.shape != image.shape:
            raise UserError(
                f"the prediction of {name} has {prediction.shape} voxels, the scan {image.shape}. Test again."
            )
        turn, orientation = viewing_turn(case)
        self.spacing = turn.geometry(geometry, image.shape)["spacing"]
        image, label, prediction = turn(image), turn(label), turn(prediction)
        self.name, self.shape = name, image.shape
        chosen = [row for row in rows if (row["case"], row["output"], row["component"]) == (name, output, component)]
        figures = metrics_of(rows) if len(chosen) == 1 else ["dice", "hd95"]  # two figures for each of several classes
        lines = [", ".join(f"{NAMES.get(m, m)} {text_of(m, row[m])}" for m in figures) for row in chosen]
        names = [f"{class_names.get(row['class'], row['class'])}: " if "class" in row else "" for row in chosen]
        self.line = "; ".join(name + line for name, line in zip(names, lines, strict=True))
        self.z = fixed_slice(label > 0, image.shape[-1])
        self.classes = max(int(label.max()), int(prediction.max()), 1)
        volumes = {"prediction": prediction, "label": label}
        camera = camera_around(list(volumes.values()), self.spacing, *VIEW)
        camera = dataclasses.replace(camera, width=MARGIN * camera.width)
        far = np.maximum(camera.centre, np.array(image.shape) * self.spacing - camera.centre)
        self.radius = float(np.linalg.norm(far)) + 1  # of a ball around the centre that holds the whole scan
        surfaces = {which: self._surfaces(which, volume) for which, volume in volumes.items()}
        self.stills = {which: still_of(parts, camera) for which, parts in surfaces.items()} if still else {}
        self.letters = edge_letters(orientation)
        self.data = {
            "name": name,
            "line": self.line,
            "z": self.z,
            "size": image.shape[:2],
            "ratio": f"{image.shape[0] * self.spacing[0]:.4g}/{image.shape[1] * self.spacing[1]:.4g}",
            "letters": self.letters,
            "ends": [OPPOSITE[orientation[2]], orientation[2]] if orientation else [],
            "slices": jpeg_slices(image, self.spacing, most_bytes),
            "contours": {which: self._contours(volume) for which, volume in volumes.items()},
            "colours": {which: [self.colour(which, c) for c in range(1, self.classes + 1)] for which in volumes},
            "axes": camera.axes.tolist(),
            "zoom": 2 * self.radius / camera.width,
            "surfaces": [self._packed(parts, camera) for parts in surfaces.values()],
        }

    def colour(self, which: str, c: int) -> str:
        """Of a class in the prediction or in the label."""
        return colour_of(c, alone=which == "label" and self.classes == 1)

    def _contours(self, volume: NDArray) -> list[list[str]]:
        """For each class and each slice the d of an SVG path, in voxels."""
        depth = range(volume.shape[-1])
        return [[outline(volume[..., z] == c) for z in depth] for c in range(1, self.classes + 1)]

    def _surfaces(self, which: str, volume: NDArray) -> list[tuple[Surface, str]]:
        """The surface of every class that is there, and its colour."""
        classes = range(1, self.classes + 1)
        surfaces = [(surface(volume == c, self.spacing, FACES), self.colour(which, c)) for c in classes]
        return [(one, colour) for one, colour in surfaces if len(one.faces)]

    def _packed(self, surfaces: Sequence[tuple[Surface, str]], camera: Camera) -> list[dict[str, Any]]:
        """Triangles in units of the radius around the camera's centre."""
        return [
            {
                "colour": [part / 255 for part in rgb(colour)],
                "vertices": packed(np.round(32767 * (one.vertices - camera.centre) / self.radius).astype("<i2")),
                "normals": packed(np.round(127 * one.normals).astype("i1")),
                "faces": packed(one.faces.astype("<u2")),
            }
            for one, colour in surfaces
        ]


def still_of(surfaces: Sequence[tuple[Surface, str]], camera: Camera) -> str:
    """A picture of surfaces as a data URI."""
    still = io.BytesIO()
    Image.fromarray(render(surfaces, camera, 300)).save(still, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(still.getvalue()).decode()


def packed(array: NDArray) -> str:
    """The bytes of an array as base64."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def outline(mask: NDArray) -> str:
    """The d of an SVG path around the voxels of (W,H), to a third of a voxel; empty of an empty mask."""
    if not mask.any():
        return ""
    lines = [approximate_polygon(line - 0.5, 0.3) for line in find_contours(np.pad(mask, 1).astype(float), 0.5)]
    return "".join("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in line[:-1]) + "Z" for line in lines)


def jpeg_slices(image: NDArray, spacing: Sequence[float], most_bytes: int) -> list[str]:
    """Every z slice of (W,H,D) as base64 of a JPEG, in so many pixels that all take about `most_bytes` at most."""
    low, high = (look_of("image", image)[end] for end in ("vmin", "vmax"))
    grey = (255 * (image - low) / max(high - low, 1e-6)).clip(0, 255).astype(np.uint8)
    w, h = (length * step for length, step in zip(image.shape[:2], spacing[:2], strict=True))

    def jpegs(side: int, slices: range) -> list[bytes]:
        side = min(side, 2 * max(image.shape[:2]))
        size = (max(round(side * w / max(w, h)), 1), max(round(side * h / max(w, h)), 1))
        files = []
        for z in slices:
            data = io.BytesIO()
            Image.fromarray(grey[..., z].T).resize(size, Image.Resampling.BICUBIC).save(data, "JPEG", quality=80)
            files.append(data.getvalue())
        return files

    depth = image.shape[-1]
    some = range(0, depth, SAMPLED)
    few_enough = most_bytes * len(some) / depth
    side = next((side for side in SIDES if sum(map(len, jpegs(side, some))) <= few_enough), SIDES[-1])
    return [base64.b64encode(one).decode() for one in jpegs(side, range(depth))]


def viewers(cases: Sequence[ShownCase], dices: Mapping[str, float], output: str, component: str) -> str:
    """Boxes that show one scan each: slices with contours, and surfaces. At first those of `shown_first`. The cases are
    in the order of `dices`.
    """
    if not cases:
        return "<h2>Scans</h2><p>The test saved no predictions (--save none), so there are none to show.</p>"
    boxes = [viewer(cases[place], choice(dices, place)) for place in shown_first(dices)]
    known = any(case.letters for case in cases)
    seen = (
        "Slices are turned as radiologists look at them; letters at the edges name the patient's sides"
        if known
        else "Slices have x to the right and y down"
    )
    return (
        f'<h2 id="look">Scans</h2><p class="soft">From the lowest to the highest Dice of {escape(output)}, '
        f"{escape(component)}. {seen}.</p>" + "".join(boxes)
    )


def choice(dices: Mapping[str, float], place: int) -> str:
    """A list of all scans to choose from, with one chosen."""
    options = [
        f"<option{' selected' if i == place else ''} value={i}>{escape(name)}, Dice {text_of('dice', dice)}</option>"
        for i, (name, dice) in enumerate(dices.items())
    ]
    return f'<select aria-label="Scan" autocomplete="off">{"".join(options)}</select>'


def viewer(case: ShownCase, choice: str) -> str:
    """One scan: what is there before the script runs, and without it."""
    name, z, (w, h, depth) = escape(case.name), case.z, case.shape
    ratio, ends = case.data["ratio"], case.data["ends"] or ["", ""]
    letters = "".join(f'<b class="edge {edge}">{case.letters.get(edge, "")}</b>' for edge in EDGES)
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
    return f"""<section class="case"><h3>{choice}</h3><p class="soft line">{escape(case.line)}</p><div class="views">
<div><div class="slice" tabindex="0" aria-label="Slices of {name}: arrow keys move" style="aspect-ratio:{ratio}">
<img src="data:image/jpeg;base64,{case.data["slices"][z]}" alt="Slice {z} of {name}">
<svg viewBox="0 0 {w} {h}" preserveAspectRatio="none" aria-hidden="true">{paths}</svg>{letters}</div>
<div class="controls"><b class="end">{ends[0]}</b><input type="range" min="0" max="{depth - 1}" value="{z}"
aria-label="Slice of {name}"><b class="end">{ends[1]}</b><output>slice {z} of {depth - 1}</output>{ticks}</div></div>
<div><div class="surfaces">{stages}</div><p class="soft hint">Drag to turn, or the arrow keys.</p></div></div></section>
"""
