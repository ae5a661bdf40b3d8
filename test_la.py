"""Tests a checkpoint on the scans of test.list: sliding window, metrics per case, table, predictions.

    python test_la.py --checkpoint runs/la/dtml-16-seed1337
    torchrun --nproc-per-node 4 test_la.py --checkpoint RUN      the scans distributed over four GPUs
    python test_la.py --checkpoint RUN/best.pt                   the checkpoint with the best Dice in validation
    python test_la.py --checkpoint RUN --scans held-out          on training scans that the run did not use
    python test_la.py --checkpoint RUN --scans validation        of a run with --fold: on the scans of its fold
    python test_la.py --checkpoint best_model.pth --method dtc   bare weights, as the released codes save them
    python test_la.py --checkpoint best_model_seg.pth --sdm-weights best_model_dis.pth --method dtml

A checkpoint states its method, data and patch size, so no other flag is needed. Bare weights have no options: they are
tested as in the papers, on data/la, with windows of 112x112x80 voxels. Every output of the method is scored with and
without the largest-component filter, always on the scan's own grid. A scan that the checkpoint was trained on is
refused, also under another name, turned, scaled or rounded.
"""

import dataclasses
import math
import sys
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from dataloaders.cases import Case, named, read_case
from dataloaders.channel_names import refuse_other_channels
from dataloaders.class_names import class_names, named_classes, refuse_other_numbers
from dataloaders.geometry import known_spacing, read_geometry
from dataloaders.images import write_image
from dataloaders.normalization import normalization_of, normalized_case
from dataloaders.unseen import is_other_set, open_cases, other_grid
from evaluation.metrics import COMPONENTS, MORE
from evaluation.predictions import new_test, replace_test
from evaluation.scores import as_csv, caption_of, class_scores, table, with_class_names
from evaluation.sliding_window import (
    WEIGHTINGS,
    flips_option,
    predict_scan,
    refuse_window,
    three_voxels,
    unlearned_flips,
    usual_stride,
    windows,
)
from methods.released import RELEASED, load_trained
from networks.backbone import PRECISIONS, set_precision
from tools.tested_scans import SCANS, chosen_cases
from utils.checkpoint import LAST, channels_of_state, classes_of_state, unfinished, write_whole
from utils.devices import enough_memory, precision_on, set_up
from utils.distributed import RANK, RANKS, gather_in_order, process_group
from utils.errors import UserError, run, warn
from utils.masks import label_map, largest_components
from utils.options import option, read_flags
from utils.run_folder import make_manifest, write_json
from utils.shared_weights import ENDING
from utils.text import some


@dataclasses.dataclass
class Options:
    """Options of a test; None: as in the training."""

    checkpoint: str = option("", "run folder or .pt file of train_dtml.py; bare weights with --method", group="what")
    method: str = option(
        "", "method of the bare weights of a released code (default: what a checkpoint of train_dtml.py states)",
        group="what", choices=list(RELEASED),
    )  # fmt: skip
    sdm_weights: str = option("", "bare weights of M_d, with --method dtml (default: M_s alone)", group="what")
    data: str = option("", "folder of the data set (default that of the training)", group="what")
    scans: str = option("test", "the scans of test.list; of validation.list, or of the run's --fold; or those of "
                        "train.list that the training left unused", group="what", choices=SCANS)  # fmt: skip
    cases: list[str] = option([], "names of the scans to test (default all)", group="what", type=str, nargs="+")
    output: list[str] = option([], "which outputs of the method to score, of dtml: seg (M_s), sdm (M_d), mean "
                               "(default all)", group="what", type=str, nargs="+")  # fmt: skip
    nsd_tolerance: float | None = option(
        None, "also score the normalised surface Dice (NSD) at this tolerance in mm (default no NSD)",
        group="what", type=float, minimum=0,
    )  # fmt: skip
    metrics: list[str] = option([], "score these too: assd, the average symmetric surface distance; rve, the relative "
                                "volume error (default neither)", group="what", type=str, choices=MORE,
                                nargs="+")  # fmt: skip
    patch_size: list[int] | None = three_voxels("voxels of a window along x, y, z (default that of training)")
    stride: list[int] | None = three_voxels("step from window to window (default 18 18 4, divided by --downsample)")
    weighting: str = option("uniform", "how overlapping windows are averaged", group="window", choices=WEIGHTINGS)
    flips: int = flips_option()
    batch_size: int = option(4, "windows at a time", group="window", minimum=1)
    out: str = option(
        "",
        "folder of the results (default RUN/SCANS; of another file than last.pt a folder next to it, named after both; "
        "with --cases, or --data of another set, one of their own)",
    )
    save: str = option("largest", "predictions to write as NIfTI", choices=(*COMPONENTS, "none"))
    precision: str = option("fp32", "arithmetic of the convolutions; auto: bf16 if the device has it, else fp32",
                            choices=("auto", *PRECISIONS, "fp16"))  # fmt: skip
    report: bool = option(False, "write report.html too: every figure, and every scan to look through")
    workers: int = option(2, "threads that score scans while the next is predicted", minimum=1)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    threads: int = option(0, "CPU threads; 0 leaves torch's choice", minimum=0)


def score_scan(
    case: Case, maps: dict[str, NDArray[np.uint8]], label: NDArray, predictions: Path, o: Options
) -> list[dict[str, Any]]:
    """Scores the predictions of a case and saves them.

    Args:
        maps: output -> predicted label map (W,H,D).
        label: (W,H,D).
        predictions: folder for those of --save.

    Returns:
        The case's rows of cases.csv.
    """
    rows: list[dict[str, Any]] = []
    geometry, spacing = read_geometry(case), known_spacing(case)
    for output, prediction in maps.items():
        variants = {"all": prediction, "largest": largest_components(prediction, case.classes)}
        for component, variant in variants.items():
            if component == "all" or not np.array_equal(variant, prediction):
                scores = class_scores(variant, label, case.classes, spacing, o.nsd_tolerance, o.metrics)
            shape = "x".join(map(str, label.shape))
            keys = {"case": case.name, "shape": shape, "output": output, "component": component}
            rows += [{**keys, **score} for score in scores]
        if o.save != "none":
            write_image(predictions / output / f"{case.name}.nii.gz", variants[o.save], geometry)
    return rows


def refuse_unknown_spacing(cases: Sequence[Case], folder: Path, tolerance: float) -> None:
    """Raises UserError for cases whose spacing is not known, as a tolerance is in mm."""
    unknown = [case.name for case in cases if known_spacing(case) is None]
    if unknown:
        raise UserError(
            f"--nsd-tolerance {tolerance:g} is in mm, and the spacing of {some(unknown)} is not known. Write "
            f"it into {folder}/spacing.txt, the mm along x, y and z, or leave --nsd-tolerance out."
        )


@enough_memory("Lower --batch-size or --patch-size.")
def main(argv: list[str] | None = None) -> None:
    o: Options = read_flags(Options, __doc__, "test_la.py", argv)
    device = set_up(o.device, o.threads)

    # what to test
    if o.method and o.scans != "test":
        raise UserError(f"--scans {o.scans}: bare weights do not state which scans they were trained on. Leave it out.")
    state, method, available = load_trained(o.checkpoint, method=o.method, sdm_weights=o.sdm_weights)
    path, trained = Path(o.checkpoint or o.sdm_weights), state["options"]
    method.to(device).eval()
    o.precision = precision_on(device, o.precision)
    set_precision(method, o.precision, training=False)
    outputs = tuple(dict.fromkeys(o.output)) or available
    unknown = [name for name in outputs if name not in available]
    if unknown:
        raise UserError(
            f"--output {' '.join(unknown)}: {state['file']} has no such output. Choose from {', '.join(available)}."
        )
    downsample, classes = trained["downsample"], method.options.classes
    normalize = normalization_of(trained)
    patch_size = tuple(o.patch_size or trained["patch_size"])
    stride = tuple(o.stride or usual_stride(patch_size, downsample))
    refuse_window(patch_size, stride, method.side_multiples, o.flips)
    if unfinished(state) and RANK == 0:
        warn(f"{path} is not finished: {unfinished(state)}.")
    if RANK == 0 and (warning := unlearned_flips(o.flips, trained)):
        warn(warning)
    folder, seen = Path(o.data or trained["data"]), state["checksums"]  # empty for bare weights
    tested = chosen_cases(folder, o.scans, o.cases, state)
    cases, shapes = open_cases(
        folder, tested, classes, seen, state.get("images", {}), method.options.channels, normalize
    )
    refuse_other_channels(folder, channels_of_state(state))
    stated = {c: name for c, name in class_names(folder).items() if c <= classes}
    refuse_other_numbers(stated, folder, classes_of_state(state), path)
    names = {str(c): name for c, name in sorted((classes_of_state(state) | stated).items())}
    if RANK == 0 and (warning := other_grid(cases, state)):
        warn(f"{folder} {warning}")
    if o.nsd_tolerance is not None:
        refuse_unknown_spacing(cases, folder, o.nsd_tolerance)
    count = sum(len(windows([-(-side // downsample) for side in shape], patch_size, stride)) for shape in shapes)
    other = path.is_file() and path.name != LAST and path.suffix != ENDING  # best.pt, previous.pt, released weights
    usual_out = (path if path.is_dir() else path.parent) / o.scans
    usual_out = path.with_name(f"{path.stem}-{o.scans}") if other else usual_out
    usual_out = usual_out.with_name(f"{usual_out.name}-cases") if o.cases else usual_out  # next to the test of all
    if o.data and seen and is_other_set(folder, seen, state.get("images", {})):
        usual_out = usual_out.with_name(f"{usual_out.name}-{folder.resolve().name}")
    out = Path(o.out) if o.out else usual_out

    # predict, and score earlier scans meanwhile
    rows: list[dict[str, Any]] = []
    waiting: deque[Future[list[dict[str, Any]]]] = deque()

    def collect(most: int) -> None:
        """Collects results until at most so many are pending."""
        while len(waiting) > most:
            scores = waiting.popleft().result()
            rows.extend(scores)
            if not sys.stderr.isatty():
                dices = {row["output"]: 100 * row["dice"] for row in scores if row["component"] == "all"}
                # of several classes the mean, which is last
                text = "  ".join(f"{name} {dice:.2f}" for name, dice in dices.items())
                print(f"{scores[0]['case']}  Dice %  {text}", file=sys.stderr)

    mine = cases[RANK::RANKS]
    with (
        process_group(device),
        new_test(out) as new,
        ThreadPoolExecutor(1) as reader,
        ThreadPoolExecutor(o.workers) as scorers,
    ):
        upcoming = reader.submit(read_case, mine[0]) if mine else None
        for i, case in enumerate(tqdm(mine, unit="scan", disable=RANK > 0 or None)):
            assert upcoming is not None
            with named(case, "It was whole when the test began."):
                image, label = upcoming.result()
                image = normalized_case(case, image, normalize)
            upcoming = reader.submit(read_case, mine[i + 1]) if i + 1 < len(mine) else None
            assert label is not None
            with named(case):
                p = predict_scan(
                    method, torch.from_numpy(image).to(device), outputs, downsample=downsample,
                    patch_size=patch_size, stride=stride, weighting=o.weighting, batch_size=o.batch_size, flips=o.flips,
                )  # fmt: skip
            maps = {name: label_map(part).numpy() for name, part in zip(outputs, p.split(classes), strict=True)}
            waiting.append(scorers.submit(score_scan, case, maps, label, new / "predictions", o))
            collect(2 * o.workers)
        collect(0)
        rows = gather_in_order(rows, len(COMPONENTS) * len(outputs) * (classes + (classes > 1)))
        if RANK > 0:
            return

        # results
        means = f"{caption_of(o.nsd_tolerance, o.metrics)}\n{table(with_class_names(rows, names))}"
        write_whole(new / "cases.csv", as_csv(rows).encode())
        write_whole(new / "table.md", means.encode())
        settings = {"patch_size": patch_size, "stride": stride, "windows": count, "weighting": o.weighting,
                    "flips": o.flips, "precision": o.precision, "scans": o.scans,
                    **({"cases": tested} if o.cases else {})}  # fmt: skip
        about = {"checkpoint": str(path), "iteration": state["iteration"], "downsample": downsample,
                "normalize": normalize.kind, "data": str(folder), "saved": o.save}  # fmt: skip
        optional = {"window": normalize.window, "class_names": names, "nsd_tolerance_mm": o.nsd_tolerance,
                    "metrics": o.metrics, "method": o.method, "released": state.get("released"),
                    "saved_as": state.get("saved_as")}  # fmt: skip
        about |= {name: value for name, value in optional.items() if value or value == 0}  # a tolerance
        write_json(new / "test.json", make_manifest(device, **settings, **about))
        replace_test(out)
    report = None
    if o.report:
        from tools.report_page import write_report  # here, as its figures take a second of every start

        report = write_report(out, str(folder))
    size, step = ("x".join(map(str, v)) for v in (patch_size, stride))
    print(f"{folder}: {len(cases)} {o.scans} scans, {count} windows of {size}, stride {step}.\n")
    print(means)
    if names and classes == 1:  # of several the table has the names
        print(f"Class: {named_classes(names)}.\n")
    if all(math.isnan(row["asd_mm"]) for row in rows) and not all(math.isnan(row["asd"]) for row in rows):
        print(f"No distance in mm: the files of {folder} do not state their spacing.\n")
    print(f"per case: {out / 'cases.csv'}", file=sys.stderr)
    if report:
        print(f"report: {report}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
