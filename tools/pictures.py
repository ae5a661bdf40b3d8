"""Draws figures for a paper from run folders: the DTML paper's Figures 2 and 3, curves, differences, labels, scale.

    python -m tools.pictures figure2 runs/la/dtml-16-seed1337             image, label, z, m and p of three scans
    python -m tools.pictures figure3 runs/la/supervised-16-seed1337 runs/la/dtml-16-seed1337:seg --titles V-Net DTML
    python -m tools.pictures curves results/half/dtml-16-seed1337 results/half/dtml-authors-16-seed1337
    python -m tools.pictures differences results/half/supervised-16-seed1337 results/half/dtml-16-seed1337:seg
    python -m tools.pictures labels 'results/half/plus-alone-[0-9]*:ema_mean' 'results/half/plus-[0-9]*:ema_mean'
    python -m tools.pictures labels results/half --table methods
    python -m tools.pictures scale 'results/half/supervised-tuned-8-seed*' 'results/half/supervised-normalized-8-seed*'

figure2 runs the network around the slice; figure3 reads what test_la.py predicted, of the first output or of
RUN:OUTPUT; curves reads scalars.csv; differences shows the Dice of each scan (cases.csv) above the first run's, a
quoted 'RUN-seed*' being each scan's mean over all runs that match; labels shows the Dice of runs against their number
of labeled scans, with a line through the means of each pattern, or of each row of a table of tools.reproduce; scale
shows the Dice of each scan against the SD of its intensities, a panel for each pair of runs, without and with
--normalize scan. The SDs are read from scales.csv next to the records; where there is none, it is written from the
volumes of --data. Slices of a case that states its direction are turned as radiologists look at them, an axial one with
the patient's right on the left and the front at the top; letters at their edges name the sides, R L A P S I. Others
have x to the right and y down.
"""

import csv
import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataloaders.cases import Case, labeled_case, named, read_case
from dataloaders.class_names import named_classes
from dataloaders.geometry import read_geometry
from dataloaders.lists import lists_of
from dataloaders.normalization import normalization_of, normalized_case
from dataloaders.orientation import viewing_turn
from evaluation.drawing import Figure
from evaluation.figures import ComparedCase, MapsRow, around, as_png, draw_comparison, draw_maps
from evaluation.graphs import draw_curves, draw_differences, draw_labels, draw_scale
from evaluation.metrics import mean_and_sd
from evaluation.predictions import read_prediction, read_scores, test_of
from evaluation.rows import mean_over, read_runs, split_output
from evaluation.scores import by_dice, class_dices
from evaluation.slices import fixed_slice
from evaluation.sliding_window import sliding_window
from evaluation.statistics import compare
from methods import restore
from tools.by_labels import dice_by_labels
from utils.channels import with_channels
from utils.checkpoint import classes_of_state, load_checkpoint, write_whole
from utils.errors import UserError, run
from utils.options import option, read_flags
from utils.resample import downsample_image, upsample_probability
from utils.run_folder import MANIFEST, SCALARS, read_json

SCALES = "scales.csv"
FIGURES = ("figure2", "figure3", "curves", "differences", "labels", "scale")
PANELS = (
    ("Dice in training", ("dice/train_seg", "dice/train_sdm")),
    ("loss", ("loss/seg", "loss/mask", "loss/consistency", "loss/pseudo", "loss/pseudo_seg", "loss/pseudo_mask")),
    ("weight", ("lambda", "w")),
    ("live voxels of m", ("live_gradient/sdm", "live_share/sdm")),
)


@dataclasses.dataclass
class Options:
    """What to draw."""

    figure: str = option("", "what to draw", word="FIGURE", choices=FIGURES)
    runs: list[str] = option([], "run folders; in figure3 RUN:OUTPUT names an output", word="RUN", type=str, nargs="+")
    cases: list[str] = option(
        [], "scans, a row each (default the first three of test.list; figure3 those with the lowest, the median and "
        "the highest Dice of the first run)", type=str, nargs="+",
    )  # fmt: skip
    slice: int | None = option(None, "z slice (default the one with most label)", type=int, minimum=0)
    titles: list[str] = option([], "names of the runs or panels (default method and labels)", type=str, nargs="+")
    table: str = option(
        "", "labels: draw the recorded rows of this table of tools.reproduce; RUN is then results/PROFILE"
    )
    data: str = option("", "folder of the data set (default that of the run)")
    view: list[float] = option([160.0, 30.0], "of the surfaces: degrees around z, and from above", type=float, nargs=2)
    out: str = option("", "PNG to write (default FIGURE.png)")
    overwrite: bool = option(False, "replace a file that is there")
    dpi: int = option(300, "pixels per inch of a page 7 inches wide", minimum=30, maximum=1200)
    palette: bool = option(False, "256 colours: about a third of the bytes, for a web page")


def read_scan(case: Case, z: int | None) -> tuple[NDArray[np.float32], NDArray[np.uint8], tuple[float, ...], int]:
    """image (W,H,D) or (K,W,H,D), label (W,H,D), spacing in mm and the z slice to show.

    Raises:
        UserError: a case that cannot be used, or a slice that it does not have.
    """
    with named(case):
        image, label = read_case(case)
        spacing = read_geometry(case)["spacing"]
    assert label is not None
    z = fixed_slice(label, label.shape[-1]) if z is None else z
    if z >= label.shape[-1]:
        raise UserError(f"--slice {z}: {case.name} has the slices 0 to {label.shape[-1] - 1}.")
    return image, label, spacing, z


def figure2(paths: Sequence[str], o: Options) -> Figure:
    """Image, label and the method's maps of one slice of each scan."""
    if len(paths) > 1:
        raise UserError("figure2 is of one run. Give one, or draw figure3.")
    state = load_checkpoint(Path(paths[0]))
    method = restore(state).eval()
    trained = state["options"]
    folder = Path(o.data or trained["data"])
    rows = []
    for name in o.cases or lists_of(folder)[1][:3]:
        case = labeled_case(folder, name)
        image, label, spacing, z = read_scan(case, o.slice)
        turn, orientation = viewing_turn(case)
        x, y = around(turn(label)[..., z] > 0)
        with named(case):
            scaled = normalized_case(case, image, normalization_of(trained))
            maps = maps_of_slice(method, scaled, z, trained["patch_size"], trained["downsample"])
        shown = {key: turn(maps[key][..., None])[x, y, 0] for key in sorted(maps, key="pqmz".find, reverse=True)}
        spacing = turn.geometry({"spacing": spacing}, image.shape)["spacing"]
        image = turn(with_channels(image)[0])[x, y, z]
        rows.append(MapsRow(name, image, turn(label)[x, y, z], shown, spacing, orientation))
    names = classes_of_state(state) if method.options.classes > 1 else {}
    return draw_maps(rows, f"classes: {named_classes(names)}" if names else "")


def maps_of_slice(
    method: Any, image: NDArray, z: int, patch_size: Sequence[int], downsample: int
) -> dict[str, NDArray[np.float32]]:
    """The method's maps of the slice z, name -> (W,H), from windows that have it in their middle.

    The image is (W,H,D) or (K,W,H,D).
    """
    depth = patch_size[2] * downsample
    start = min(max(z - depth // 2, 0), max(image.shape[-1] - depth, 0)) // downsample * downsample
    slab = torch.from_numpy(image[..., start : start + depth].copy())
    names: list[str] = []

    def predict(patches: torch.Tensor) -> torch.Tensor:
        maps = method.maps(patches)
        names[:] = maps
        return torch.stack(list(maps.values()), dim=1)

    stride = (max(patch_size[0] // 3, 1), max(patch_size[1] // 3, 1), patch_size[2])
    maps = sliding_window(predict, downsample_image(slab, downsample), patch_size, stride, weighting="gaussian")
    full = upsample_probability(maps, downsample, tuple(slab.shape[-3:]))[..., z - start].numpy()
    return dict(zip(names, full, strict=True))


def figure3(paths: Sequence[str], o: Options) -> Figure:
    """Contours and surfaces of the predictions of several runs, and of the label."""
    split = [split_output(where) for where in paths]
    tests = [test_of(path) for path, _ in split]
    scores = [read_scores(test) for test in tests]
    outputs = [output or rows[0]["output"] for (_, output), rows in zip(split, scores, strict=True)]
    for test, rows, output in zip(tests, scores, outputs, strict=True):
        outputs_there = list(dict.fromkeys(row["output"] for row in rows))
        if output not in outputs_there:
            raise UserError(
                f"{test} has no output {output}, only {', '.join(outputs_there)}. Name one of them after the colon."
            )
    titles = o.titles or [name_of(path) for path, _ in split]
    if len(set(titles)) < len(titles):
        titles = [f"{title} ({output})" for title, output in zip(titles, outputs, strict=True)]
    if len(set(titles)) != len(paths):
        raise UserError(f"--titles must give {len(paths)} different names, one for each run.")
    about = read_json(tests[0] / "test.json")
    folder = Path(o.data or about.get("data", ""))
    compared = []
    for name in o.cases or typical(scores[0], outputs[0]):
        case = labeled_case(folder, name)
        image, label, spacing, z = read_scan(case, o.slice)
        turn, orientation = viewing_turn(case)
        predictions = {}
        for test, output, title in zip(tests, outputs, titles, strict=True):
            mask = read_prediction(test, output, name)
            if mask.shape != label.shape:
                raise UserError(f"the prediction of {name} in {test} has {mask.shape} voxels, the scan {label.shape}.")
            predictions[title] = (turn(mask), dice_text(mask, label))
        spacing = turn.geometry({"spacing": spacing}, label.shape)["spacing"]
        shown = turn(with_channels(image)[0]), turn(label)
        compared.append(ComparedCase(name, *shown, z, predictions, spacing, orientation))
    azimuth, elevation = o.view
    class_names = {int(c): name for c, name in about.get("class_names", {}).items()}
    return draw_comparison(compared, azimuth, elevation, class_names)


def dice_text(prediction: NDArray, label: NDArray) -> str:
    """The Dice of two label maps (W,H,D), the mean over the classes in either; nothing if both are empty."""
    classes = int(max(prediction.max(), label.max()))
    mean, _ = mean_and_sd(class_dices(prediction, label, classes))
    return "" if math.isnan(mean) else f"Dice {100 * mean:.1f}"


def typical(rows: Sequence[dict[str, Any]], output: str) -> list[str]:
    """The cases with the lowest, the median and the highest Dice of an output, unfiltered."""
    dices = by_dice(rows, output, "all")
    names = [name for name, dice in dices.items() if not math.isnan(dice)] or list(dices)  # no Dice of empty masks
    return list(dict.fromkeys(names[i] for i in (0, len(names) // 2, -1)))


def name_of(folder: Path) -> str:
    """A run's method and labels, or else the name of its folder."""
    options = read_json(folder / MANIFEST).get("options", {})
    return f"{options['method']}, {options['labeled']} labels" if "labeled" in options else folder.name


def curves(paths: Sequence[str], o: Options) -> Figure:
    """What scalars.csv of each run holds."""
    if o.titles and len(o.titles) != len(paths):
        raise UserError(f"--titles must give {len(paths)} names, one for each run.")
    names = o.titles or [Path(os.path.abspath(where)).name for where in paths]
    names = [name if names.count(name) == 1 else where for name, where in zip(names, paths, strict=True)]
    if len(set(names)) < len(names):
        raise UserError("curves are drawn of different runs. Give each once, or --titles.")
    runs = {}
    for name, where in zip(names, paths, strict=True):
        path = Path(where) / SCALARS
        try:
            with open(path, newline="", encoding="utf-8") as f:
                header, *rows = [*csv.reader(f)] or [[]]
            if not rows:
                raise ValueError("it has no rows yet")
            runs[name] = dict(zip(header, np.array(rows, float).T, strict=True))
        except (OSError, ValueError) as e:
            raise UserError(f"cannot read {path}: {e}. Give run folders of train_dtml.py.") from e
    logged = {tag for scalars in runs.values() for tag in scalars}
    return draw_curves(runs, [(title, tags) for title, tags in PANELS if logged & set(tags)])


def differences(paths: Sequence[str], o: Options) -> Figure:
    """Dice of each scan in every further run above that in the first, and the mean with its 95 % interval."""
    if len(paths) < 2:
        raise UserError("differences needs two runs or more: the first is compared with each of the others.")
    if o.titles and len(o.titles) != len(paths):
        raise UserError(f"--titles must give {len(paths)} names, one for each run.")
    titles = o.titles or [Path(where).name for where in paths]
    reference, *others = (read_runs(where, "dice", "all") for where in paths)
    usual, entries = mean_over(reference), []
    over: dict[str, None] = {}  # an ordered set
    for title, other in zip(titles[1:], others, strict=True):
        c, values = compare(reference, other, most=1), mean_over(other)
        scans = [100 * (values[case] - usual[case]) for case in usual]
        over["none: too few scans" if math.isnan(c.low) else c.over] = None
        entries.append((title, scans, (100 * c.difference, 100 * c.low, 100 * c.high)))
    sources = " / ".join(over)
    return draw_differences(entries, f"Dice % above {titles[0]}: each scan, the mean, its 95 % interval ({sources})")


def labels(paths: Sequence[str], o: Options) -> Figure:
    """Dice of each run against its number of labeled scans."""
    return draw_labels(dice_by_labels(paths, o.titles, o.table))


def scale(paths: Sequence[str], o: Options) -> Figure:
    """Dice of each scan against the SD of its intensities, without and with normalization."""
    if len(paths) % 2:
        raise UserError("scale needs pairs of runs: one without and one with --normalize scan, and so on.")
    rows = [mean_over(read_runs(where, "dice", "all")) for where in paths]
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    titles = o.titles or [Path(where).name for where in paths[::2]]
    if len(set(titles)) != len(pairs):
        raise UserError(f"--titles must give {len(pairs)} different names, one for each pair of runs.")
    sd = scales(Path(paths[0]).parent / SCALES, Path(o.data) if o.data else None)
    if any(row.keys() != rows[0].keys() or row.keys() - sd.keys() for row in rows):
        raise UserError(f"the runs are not of the same scans, or {SCALES} lacks some. Remove it, and give --data.")
    panels = {
        title: [(sd[case], 100 * plain[case], 100 * scaled[case]) for case in plain]
        for title, (plain, scaled) in zip(titles, pairs, strict=True)
    }
    return draw_scale(panels, ("as published", "--normalize scan"))


def scales(path: Path, data: Path | None) -> dict[str, float]:
    """Scan -> SD of its intensities over all voxels, from a CSV, which is first written if it is not there.

    Raises:
        UserError: it is not there and no data set is given, or a case that cannot be used.
    """
    if not path.exists():
        if data is None:
            raise UserError(f"there is no {path}. Give --data, from whose scans it is written.")
        train, test = lists_of(data)
        cases = [dataclasses.replace(labeled_case(data, name), labeled=False) for name in (*train, *test)]
        lines = ["case,sd\n"]
        for case in cases:
            with named(case):
                lines.append(f"{case.name},{read_case(case)[0].std(dtype=np.float64):.4f}\n")
        write_whole(path, "".join(lines).encode())
    with open(path, newline="", encoding="utf-8") as f:
        return {row["case"]: float(row["sd"]) for row in csv.DictReader(f)}


def main(argv: list[str] | None = None) -> None:
    o: Options = read_flags(Options, __doc__, "python -m tools.pictures", argv)
    out = Path(o.out or f"{o.figure}.png")
    if out.exists() and not o.overwrite:
        raise UserError(f"{out} exists already. Choose another --out, or replace it with --overwrite.")
    drawn = (figure2, figure3, curves, differences, labels, scale)
    draw = dict(zip(FIGURES, drawn, strict=True))[o.figure]
    write_whole(out, as_png(draw(o.runs, o), o.dpi, palette=o.palette))
    print(out)


if __name__ == "__main__":
    run(main)
