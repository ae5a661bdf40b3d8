"""One page about a tested run: its table, every scan's figures, the worst and the best scan to look through.

    python -m tools.report_page runs/la/dtml-16-seed1337/test            of what test_la.py has written there
    python test_la.py --checkpoint runs/la/dtml-16-seed1337 --report     the same, right after the test

Writes report.html into the test folder. It holds everything itself, so it opens offline and can be sent around.
"""

import base64
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.measure import approximate_polygon, find_contours

from dataloaders.cases import MOST_CLASSES, Case, CaseError, case_file, read_case, read_geometry
from evaluation.figures import colour_of, window_of
from evaluation.metrics import (
    EMPTIES,
    METRICS,
    PENALISED,
    distance_text,
    distances_of,
    empties,
    mean_and_sd,
    overlap_text,
)
from evaluation.predictions import COUNTS, read_prediction, read_scores
from evaluation.slices import COLOURS, LABEL, fixed_slice
from evaluation.surfaces import Camera, camera_around, render, surface
from utils.checkpoint import write_whole
from utils.errors import UserError, run
from utils.options import Parser, fill, option
from utils.run_folder import MANIFEST, read_json

TEMPLATE = Path(__file__).with_name("report_page.html")
NAMES = {"dice": "Dice %", "jaccard": "Jaccard %", "asd": "ASD voxel", "hd95": "95HD voxel", "asd_mm": "ASD mm",
         "hd95_mm": "95HD mm", "voxels": "voxels", "label_voxels": "of the label"}  # fmt: skip
MOST_BYTES = 2_500_000  # of one scan's slices: two of them and the rest stay below 10 MB
SIDES = (512, 384, 288, 216, 160, 120)  # pixels of the longer side of a slice; the first that keeps to MOST_BYTES
FACES = 8000
VIEW, MARGIN = (160.0, 30.0), 0.92
DEFINITIONS = (
    "<b>Dice</b> 2|P ∩ Y| / (|P| + |Y|) and <b>Jaccard</b> |P ∩ Y| / |P or Y| of prediction P and label Y.",
    "<b>ASD</b>: mean distance from the border of the prediction to the border of the label, in that direction only, "
    "as medpy's asd and as the papers of this field report it. It does not see what the prediction misses far away.",
    "<b>95HD</b>: the 95th percentile of the distances from each border to the other, both directions pooled.",
    "Both in voxels, as the papers print them, and in mm by the spacing of the scan.",
    "Where the prediction or the label alone is <b>empty</b>, Dice and Jaccard are 0 and there is no distance: in the "
    "means the volume's diagonal stands for it. In brackets: how many scans have a distance, and their mean alone. "
    "Where both are empty nothing is measured; such a scan is in no mean. The last columns count all three.",
    "<b>largest</b>: scored on the largest 26-connected component of the prediction alone; <b>all</b>: as predicted.",
)


@dataclasses.dataclass
class Options:
    """Where things are."""

    data: str = option("", "folder of the data set (default the one that the test read)")


def write_report(test: Path, data: str = "") -> Path:
    """Writes test/report.html from cases.csv, test.json, the predictions, and manifest.json of the run.

    Raises:
        UserError: no such test, or a scan or prediction to be shown that cannot be read.
    """
    rows = read_scores(test)
    tested = read_json(test / "test.json")
    run_folder = Path(tested.get("checkpoint", test.parent))
    trained = read_json((run_folder if run_folder.is_dir() else run_folder.parent) / MANIFEST)
    options = trained.get("options", {})
    output, component = rows[0]["output"], tested.get("saved", "largest")
    cases = []
    if component != "none":
        folder = Path(data or tested.get("data", ""))
        cases = [
            ShownCase(test, folder, name, output, component, rows) for name in worst_and_best(rows, output, component)
        ]
    about = [str(options[name]) for name in ("method", "preset") if name in options]
    about += [f"{options['labeled']} labeled scans"] if "labeled" in options else []
    about += [f"seed {options['seed']}"] if "seed" in options else []
    about += [f"iteration {tested['iteration']}"] if "iteration" in tested else []
    about += [f"{len({row['case'] for row in rows})} test scans of {tested.get('data', 'unknown data')}"]
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"Test of {(run_folder if run_folder.is_dir() else run_folder.parent).resolve().name}"),
        subtitle=escape(", ".join(about)),
        prediction_colour=COLOURS[0],
        label_colour=LABEL,
        results=results_table(rows),
        bars=bars(rows),
        viewers=viewers(cases, output, component),
        every=every_table(rows),
        provenance=provenance(tested, trained),
        definitions="<ul>" + "".join(f"<li>{line}</li>" for line in DEFINITIONS) + "</ul>",
        data=json.dumps([case.data for case in cases]).replace("<", "\\u003c"),
    )
    path = test / "report.html"
    write_whole(path, page.encode())
    return path


# -- tables --


def keys_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The columns that tell rows of one scan apart: output, component, and what else stands before the metrics."""
    names = list(rows[0])
    return [name for name in names[: names.index("dice")] if name not in ("case", "shape")]


def groups(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """Output, component, ... -> the rows of all scans."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in keys_of(rows)), []).append(row)
    return found


def shown(name: str, value: float) -> str:
    """A figure as the page prints it; a dash for what does not exist."""
    if name in COUNTS:
        return f"{value:.0f}"
    return f"{100 * value if name in ('dice', 'jaccard') else value:.2f}" if math.isfinite(value) else "-"


def metrics_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The columns of figures, without the counts and the penalised distances."""
    names = list(rows[0])
    return [name for name in names[names.index("dice") :] if name not in COUNTS and not name.endswith(PENALISED)]


def html_table(header: Iterable[str], lines: Iterable[Sequence[str]], words: int, **attributes: str) -> str:
    """A table whose first `words` columns are text; every cell is escaped."""
    kind = ['class="word"' if i < words else "" for i in range(99)]
    head = "".join(f'<th scope="col" {k}>{escape(cell)}</th>' for k, cell in zip(kind, header, strict=False))
    body = "\n".join(
        "<tr>" + "".join(f"<td {k}>{escape(cell)}</td>" for k, cell in zip(kind, line, strict=False)) + "</tr>"
        for line in lines
    )
    more = "".join(f' {name}="{escape(value)}"' for name, value in attributes.items())
    return f"<table{more}><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def results_table(rows: Sequence[dict[str, Any]]) -> str:
    """Mean ± SD over the scans, of every output and filter."""
    names, keys, lines = metrics_of(rows), keys_of(rows), []
    for key, chosen in groups(rows).items():
        cells = [
            overlap_text(chosen, name) if name in METRICS[:2] else distance_text([distances_of(chosen, name)])
            for name in names
        ]
        lines.append([*key, str(len(chosen)), *cells, *map(str, empties(chosen))])
    header = [*keys, "scans", *(NAMES.get(name, name) for name in names), *EMPTIES]
    return html_table(header, lines, len(keys), id="means")


def every_table(rows: Sequence[dict[str, Any]]) -> str:
    """All of cases.csv."""
    keys, names = ["case", *keys_of(rows)], [*metrics_of(rows), *COUNTS]
    lines = [[*(row[key] for key in keys), *(shown(name, row[name]) for name in names)] for row in rows]
    return html_table([*keys, *(NAMES.get(name, name) for name in names)], lines, len(keys), id="cases")


def bars(rows: Sequence[dict[str, Any]]) -> str:
    """For each output and filter the scans by their Dice, with bars of Dice and of 95HD."""
    choices, tables = [], []
    largest = max((distance for row in rows for distance in distances_of([row], "hd95").scores), default=1) or 1
    means_first = sorted(groups(rows).items(), key=lambda group: group[0][-1] != "mean")  # of several classes
    for i, (key, chosen) in enumerate(means_first):
        name = escape(", ".join(key))
        choices.append(f'<option value="{i}">{name}</option>')
        lines = []
        for row in sorted(chosen, key=lambda row: (math.isnan(row["dice"]), row["dice"])):
            tip = ", ".join(f"{NAMES.get(m, m)} {shown(m, row[m])}" for m in metrics_of(rows))
            cells = "".join(
                f'<td class="bar"><i style="width:{100 * share:.1f}%"></i></td><td>{shown(metric, row[metric])}</td>'
                for metric, share in (("dice", np.nan_to_num(row["dice"])), ("hd95", hd95_share(row, largest)))
            )
            lines.append(
                f'<tr title="{escape(tip)}"><th scope="row" class="word">{escape(row["case"])}</th>{cells}</tr>'
            )
        tables.append(
            f'<div class="perkey" data-key="{i}"{" hidden" if i else ""}><table class="bars">'
            f'<caption class="soft">{name}: every scan, the lowest Dice first</caption><thead><tr>'
            '<th scope="col" class="word">scan</th><th scope="col" colspan="2">Dice %</th>'
            '<th scope="col" colspan="2">95HD voxel</th></tr></thead><tbody>\n'
            + "\n".join(lines)
            + "\n</tbody></table></div>"
        )
    select = f'<p><label>Output and filter <select id="choice">{"".join(choices)}</select></label></p>'
    return f'<h2 id="scans">Scan by scan</h2>{select}<div class="scroll">{"".join(tables)}</div>'


def hd95_share(row: dict[str, Any], largest: float) -> float:
    """The length of a scan's bar of 95HD, as a share: 1 where a mask alone is empty without a known penalty, 0 where
    both are."""
    scores = distances_of([row], "hd95").scores
    return scores[0] / largest if scores else float(not math.isnan(row["dice"]))


# -- scans to look through --


def worst_and_best(rows: Sequence[dict[str, Any]], output: str, component: str) -> list[str]:
    """The scans with the lowest and the highest Dice (mean of the classes), or the only one."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if (row["output"], row["component"]) == (output, component):
            found.setdefault(row["case"], []).append(row["dice"])
    means = {name: mean_and_sd(dices)[0] for name, dices in found.items()}
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
        told = metrics_of(rows) if len(chosen) == 1 else ["dice", "hd95"]  # two figures for each of several classes
        lines = [", ".join(f"{NAMES.get(m, m)} {shown(m, row[m])}" for m in told) for row in chosen]
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
        found = []
        for c in range(1, self.classes + 1):
            one = surface(volume == c, self.spacing, FACES)
            if len(one.faces):
                found.append((one, self.colour(which, c)))
        parts = [
            {
                "colour": [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)],
                "vertices": packed(np.round(32767 * (one.vertices - camera.centre) / self.radius).astype("<i2")),
                "normals": packed(np.round(127 * one.normals).astype("i1")),
                "faces": packed(one.faces.astype("<u2")),
            }
            for one, colour in found
        ]
        still = io.BytesIO()
        Image.fromarray(render(found, camera, 300)).save(still, "PNG", optimize=True)
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
    found: list[bytes] = []
    for side in SIDES:
        side = min(side, 2 * max(image.shape[:2]))
        size = (max(round(side * w / max(w, h)), 1), max(round(side * h / max(w, h)), 1))
        found = []
        for z in range(image.shape[-1]):
            data = io.BytesIO()
            Image.fromarray(grey[..., z].T).resize(size, Image.Resampling.BICUBIC).save(data, "JPEG", quality=80)
            found.append(data.getvalue())
        if sum(map(len, found)) <= MOST_BYTES:
            break
    return [base64.b64encode(one).decode() for one in found]


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


def provenance(tested: dict[str, Any], trained: dict[str, Any]) -> str:
    """What test.json and manifest.json state, without the checksums of the volumes."""

    def entries(values: dict[str, Any]) -> str:
        lines = []
        for name, value in values.items():
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            lines.append(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>")
        return f"<dl>{''.join(lines)}</dl>"

    options = trained.get("options", {})
    rest = {k: v for k, v in trained.items() if k not in ("options", "checksums")}
    parts = {"The test": tested, "The training": rest, "Its options": options}
    return "".join(
        f"<details{' open' if name == 'The test' else ''}><summary>{name}</summary>{entries(values)}</details>"
        for name, values in parts.items()
        if values
    )


def main(argv: list[str] | None = None) -> None:
    """Writes the page of one test folder."""
    parser = Parser(description=__doc__, prog="python -m tools.report_page")
    parser.add_argument("test", help="folder that test_la.py wrote, RUN/test")
    parser.add_dataclass(Options)
    given = parser.parse(argv)
    o: Options = fill(Options, given)
    print(write_report(Path(given["test"]), o.data))


if __name__ == "__main__":
    run(main)
