"""Segments scans of any size and spacing with one or several checkpoints; no label is needed.

    python predict.py --checkpoint runs/mine/dtml-16-seed1337 scan.nii.gz -o predictions
    python predict.py --checkpoint RUN scans 'more/*.nii.gz' -o predictions --largest-component   folders, patterns
    python predict.py --checkpoint RUN patient1/T1 -o predictions --dicom-seg    the folder of a DICOM series
    python predict.py --checkpoint best_model.pth --method dtc scan.nii.gz -o out      weights of a released code
    python predict.py --checkpoint RUN1 RUN2 RUN3 scan.nrrd -o predictions --flips 8 --probabilities float32
    python predict.py --checkpoint RUN patient_0000.nii.gz patient_0001.nii.gz -o out     two channels

A scan is NIfTI (.nii, .nii.gz), NRRD, MetaImage, a DICOM series or an h5 case. Its axes are brought to the orientation
of the training cases. It is normalised to zero mean and unit variance over all its voxels, as `python -m tools.convert`
does it, and resampled to the spacing of the training cases, then scaled by --normalize of the training. It is predicted
in windows, and the result is brought back: the segmentation has the scan's own format, size, spacing, origin and
direction. A NIfTI has the scan's own header. An h5 case is taken as converted. Its segmentation and that of a DICOM
series, called as its folder, are NIfTI; --dicom-seg adds a DICOM Segmentation object of a series. The table on stdout,
and volumes.csv with the segmentations, give each class's volume. The channels of a scan, for a network that was trained
on several, are files NAME_0000, NAME_0001, ..., any files joined by commas, t1.nii.gz,t2.nii.gz, or one 4-D NIfTI.
"""

import dataclasses
import glob
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from dataloaders.cases import CaseError
from dataloaders.class_names import refuse_other_numbers
from dataloaders.images import INTERPOLATORS, ending_of, write_image, written_as
from dataloaders.normalization import normalization_of
from evaluation.sliding_window import (
    WEIGHTINGS,
    flips_option,
    half_a_patch,
    refuse_window,
    three_voxels,
    unlearned_flips,
)
from methods.released import RELEASED, load_trained
from networks.backbone import PRECISIONS, set_precision
from tools.dicom_seg import dicom_seg, require_highdicom
from tools.given_scans import DICOM_ENDINGS, Scan, given_scans
from tools.segment import Model, predict_scan
from tools.volumes import refuse_rows, volume_rows, volumes_table, write_volumes
from utils.checkpoint import channels_of_state, classes_of_state, refuse_unwritable, unfinished, write_whole
from utils.devices import enough_memory, precision_on, set_up
from utils.errors import UserError, run, warn
from utils.options import Parser, fill, flag_of, option
from utils.run_folder import has_checkpoint
from utils.shared_weights import PIECES
from utils.text import some


@dataclasses.dataclass
class Options:
    """Options of a prediction. None means: as the checkpoint was trained."""

    checkpoint: list[str] = option([], "run folders or .pt files of train_dtml.py, whose probabilities are averaged",
                                   group="what", type=str, nargs="+")  # fmt: skip
    method: str = option(
        "", "method of the bare weights of a released code (default: what a checkpoint of train_dtml.py states)",
        group="what", choices=list(RELEASED),
    )  # fmt: skip
    series: list[str] = option([], "DICOM series of a folder with several: UIDs, descriptions, all (default none)",
                               group="what", type=str, nargs="+")  # fmt: skip
    out: str = option("", "folder of the segmentations; -o is the same", group="what")
    output: str = option(
        "",
        "output of the method to take, of dtml: seg (M_s), sdm (M_d), mean (default the method's first)",
        group="what",
    )
    spacing: list[float] | None = option(
        None, "mm along the training cases' axes to predict at (default their median, or else the scan's own)",
        group="what", type=float, nargs=3, minimum=1e-3,
    )  # fmt: skip
    interpolation: str = option(
        "linear", "interpolation of the intensities", group="what", choices=[k for k in INTERPOLATORS if k != "nearest"]
    )
    flips: int = flips_option()
    patch_size: list[int] | None = three_voxels("voxels of a window along x, y, z (default that of training)")
    stride: list[int] | None = three_voxels(
        "step from window to window (default half the patch, so that each voxel is seen by eight windows)"
    )
    weighting: str = option("uniform", "how overlapping windows are averaged", group="window", choices=WEIGHTINGS)
    batch_size: int | None = option(
        None, "windows at a time (default 1, on a GPU 4)", group="window", type=int, minimum=1
    )
    largest_component: bool = option(False, "keep the largest 26-connected component of each class", group="results")
    probabilities: str = option("none", "also write the probabilities, NAME_probability; uint8 from 0 to 255",
                                group="results", choices=("none", "float32", "uint8"))  # fmt: skip
    dicom_seg: bool = option(False, "of a DICOM series also write NAME_seg.dcm, a DICOM-SEG; needs highdicom "
                             "(requirements-dicom.txt)", group="results")  # fmt: skip
    report: str = option("", "CSV with each class's volume in ml; rows of scans of other names stay (default "
                         "volumes.csv in --out)",
                         group="results")  # fmt: skip
    overwrite: bool = option(False, "replace results that are there, and their rows in --report", group="results")
    precision: str = option("fp32", "arithmetic of the convolutions; auto: bf16 if the device has it, else fp32",
                            choices=("auto", *PRECISIONS, "fp16"))  # fmt: skip
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    threads: int = option(0, "CPU threads; 0 leaves torch's choice", minimum=0)


def load_model(o: Options, device: torch.device) -> Model:
    """Loads the checkpoints and puts their methods on the device.

    Raises:
        UserError: checkpoints that cannot be loaded or averaged, an unknown --output.
    """
    states, methods, outputs = zip(*(load_trained(path, method=o.method) for path in o.checkpoint), strict=True)
    trained = [state["options"] for state in states]
    for state in states:
        if unfinished(state):
            warn(f"{state['file']} is not finished: {unfinished(state)}.")
    for text in filter(None, dict.fromkeys(unlearned_flips(o.flips, options) for options in trained)):
        warn(text)
    for name, usual in (("downsample", 1), ("classes", 1), ("channels", 1), ("normalize", "none"), ("window", None)):
        values = {str(options.get(name, usual)) for options in trained}
        if len(values) > 1:
            what = "the number of channels" if name == "channels" else flag_of(name)
            raise UserError(f"the checkpoints differ in {what}: {', '.join(sorted(values))}. Average like with like.")
    channels = [channels_of_state(state) for state in states]
    if any(names != channels[0] for names in channels) and len(channels[0]) > 1:
        shown = "; ".join(sorted({", ".join(names) for names in channels}))
        raise UserError(f"the checkpoints were trained on different channels: {shown}. Average like with like.")
    for state in states[1:]:
        refuse_other_numbers(classes_of_state(state), state["file"], classes_of_state(states[0]), states[0]["file"])
    sizes = {tuple(o.patch_size or options["patch_size"]) for options in trained}
    if len(sizes) > 1:
        raise UserError(f"the checkpoints were trained on patches of {sorted(sizes)}. Choose one by --patch-size.")
    spacings = {tuple(o.spacing or state.get("spacing") or ()) for state in states}
    if len(spacings) > 1:
        raise UserError("the checkpoints were trained on scans of different spacings. Choose one by --spacing.")
    (spacing,) = spacings
    if not spacing:
        warn("the checkpoint does not state the spacing it was trained on; scans keep theirs.")
    orientations = {state.get("orientation") for state in states}
    if len(orientations) > 1:
        shown = ", ".join(sorted(code or "unknown" for code in orientations))
        raise UserError(
            f"the checkpoints were trained on scans of different orientations: {shown}. Average like with like."
        )
    (orientation,) = orientations
    if orientation is None:
        warn("the checkpoint does not state where the axes of its training scans point; those of a scan are taken as "
             "they are stored.")  # fmt: skip
    for method, names, options in zip(methods, outputs, trained, strict=True):
        if o.output and o.output not in names:
            raise UserError(
                f"--output {o.output}: {options['method']} has no such output. Choose from {', '.join(names)}."
            )
        method.to(device).eval()
        set_precision(method, o.precision, training=False)
    taken = [o.output or names[0] for names in outputs]
    classes = trained[0].get("classes", 1)
    return Model(
        list(methods), taken, trained[0]["downsample"], normalization_of(trained[0]), sizes.pop(),
        spacing or None, orientation, classes, o.flips, channels[0],
        classes_of_state(states[0]),
    )  # fmt: skip


def sort_words(flags: dict[str, Any]) -> list[str]:
    """Takes the scans out of the flags, which stand among the checkpoints or the series if they follow these.

    Patterns of checkpoints are replaced by what they match.

    Args:
        flags: option -> value; `scans` is taken out, `checkpoint` and `series` keep what is no scan.

    Returns:
        Files, folders and patterns of scans.
    """
    words = flags.pop("scans", [])
    given = {word: [word] for word in flags.get("checkpoint", [])}
    given |= {word: sorted(glob.glob(word)) or [word] for word in given if not Path(word).exists()}
    scans = [w for w, paths in given.items() if any(map(may_be_scan, paths)) and not any(map(is_trained, paths))]
    if len(scans) < len(given):
        flags["checkpoint"] = [path for word, paths in given.items() if word not in scans for path in paths]
        words += scans
    words += [word for word in flags.get("series", []) if Path(word).exists() or glob.glob(word)]
    if "series" in flags:
        flags["series"] = [word for word in flags["series"] if word not in words]
    return words


def is_trained(word: str) -> bool:
    """Whether a word after --checkpoint is a run folder with a checkpoint, or a folder of shared weights."""
    return has_checkpoint(Path(word)) or next(Path(word).glob(PIECES), None) is not None


def may_be_scan(word: str) -> bool:
    """Whether a word after --checkpoint is a folder without a checkpoint, a file of a scan or a pattern."""
    path = Path(word)
    if path.is_dir():
        return not is_trained(word)
    return bool(ending_of(path)) or path.suffix.lower() in DICOM_ENDINGS or glob.has_magic(word)


def results_of(scan: Scan, o: Options, classes: int) -> list[Path]:
    """The files of a scan's prediction: the segmentation, the probability of each class, and the DICOM-SEG."""
    name, ending = scan.name, written_as(scan.files[0])
    numbers = [""] if classes == 1 else [f"_{number}" for number in range(1, classes + 1)]
    more = [] if o.probabilities == "none" else [f"{name}_probability{number}{ending}" for number in numbers]
    more += [f"{name}_seg.dcm"] if o.dicom_seg and scan.slices else []
    return [Path(o.out) / file for file in (name + ending, *more)]


def stale_results(scan: Scan, out: Path) -> list[Path]:
    """Probabilities and DICOM-SEG of an earlier prediction of this scan, whether or not this one writes them too."""
    files = rf"_probability(_\d+)?{re.escape(written_as(scan.files[0]))}" + (r"|_seg\.dcm" if scan.slices else "")
    name = re.compile(f"{re.escape(scan.name)}({files})")
    return [file for file in out.iterdir() if name.fullmatch(file.name)]


def refuse_scans(scans: list[Scan], o: Options, classes: int) -> None:
    """Raises UserError for scans whose results would have one name or replace a scan, for results that exist, and for
    --dicom-seg without a DICOM series or without its package."""
    if o.dicom_seg:
        if not any(scan.slices for scan in scans):
            raise UserError("--dicom-seg does nothing here: no DICOM series is given. Leave it out.")
        require_highdicom()
    out, paths = Path(o.out), [path for scan in scans for path in scan.files]
    files = {file: scan.name for scan in scans for file in results_of(scan, o, classes)}
    written = [file for scan in scans for file in results_of(scan, o, classes)]
    names = [name for name, count in Counter(scan.name for scan in scans).items() if count > 1]
    names = names or [files[file] for file, count in Counter(written).items() if count > 1]
    if names:
        which = ", ".join(str(scan.files[0]) for scan in scans if scan.name in names)
        raise UserError(
            f"two scans are called {', '.join(names)}, and so would be what is written: {which}. Predict them into "
            "folders of their own."
        )
    there = [str(file) for file in written if file.exists()]
    if there and not o.overwrite:
        raise UserError(f"{some(there)} exist{'s' * (len(there) == 1)} already. Choose another --out, or --overwrite.")
    if {file.resolve() for file in (*written, out)} & {path.resolve() for path in paths}:
        raise UserError(f"--out {o.out} is where the scans are: they would be replaced. Choose another folder.")


@enough_memory("Lower --batch-size or --patch-size.")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        description=__doc__,
        prog="predict.py",
        usage="predict.py --checkpoint RUN [RUN ...] SCAN [SCAN ...] -o DIR [options]",
    )
    parser.add_dataclass(Options)
    parser.add_argument("scans", nargs="*", metavar="SCAN", help="file, folder of scans or of a DICOM series, pattern")
    parser.add_argument("-o", dest="out", metavar="DIR", help="the same as --out")
    # A scan is recognized by its ending anywhere on the command line, also after the checkpoints.
    arguments = parser.expand(argv)
    named = [text for text in arguments if not text.startswith("-") and ending_of(Path(text))]
    flags = parser.parse([text for text in arguments if text not in named])
    words = [*named, *sort_words(flags)]
    o: Options = fill(Options, flags)
    for name in ("checkpoint", "out"):
        if not getattr(o, name):
            raise UserError(f"--{name} is missing. See --help.")
    lost = [word for word in o.checkpoint[1:] if not Path(word).exists()]
    if lost:
        raise UserError(f"there is no {', '.join(lost)}: neither a scan nor a further checkpoint.")
    device = set_up(o.device, o.threads)
    o.precision = precision_on(device, o.precision)

    model = load_model(o, device)
    stride = tuple(o.stride or half_a_patch(model.patch_size))
    for method in model.methods:
        refuse_window(model.patch_size, stride, method.side_multiples, o.flips)
    batch_size = o.batch_size or (4 if device.type == "cuda" else 1)
    window = {"patch_size": model.patch_size, "stride": stride, "weighting": o.weighting, "batch_size": batch_size}
    scans = given_scans(words, o.series, len(model.channels))
    refuse_scans(scans, o, model.classes)

    report = Path(o.report) if o.report else Path(o.out, "volumes.csv")
    refuse_rows(report, [] if o.overwrite else [scan.name for scan in scans])  # and a file of another kind
    for folder in (Path(o.out), report.parent):
        refuse_unwritable(folder)
    rows: list[dict[str, Any]] = []
    refused: list[str] = []
    written: set[Path] = set()
    for scan in scans:
        began, path = time.monotonic(), scan.files[0]
        try:
            result = predict_scan(
                model, scan, device, window, interpolation=o.interpolation, largest_component=o.largest_component,
                probabilities=o.probabilities,
            )  # fmt: skip
            label, geometry = result["label"], result["geometry"]
            seg = b""
            if o.dicom_seg and scan.slices:
                name = f"{type(model.methods[0]).__name__}, {model.outputs[0]}"
                seg = dicom_seg(label, geometry, scan.slices, classes=model.classes, names=model.names, method=name)
        except (CaseError, FloatingPointError) as e:  # the second of predictions that are not finite
            refused.append(f"{scan.shown} {e}" if len(scan.files) == 1 else f"{scan.name}: {e}")
            continue
        volumes = [label, *(result["probability"] or ())]
        files = results_of(scan, o, model.classes)
        for file, volume in zip(files, volumes, strict=not seg):
            write_image(file, volume, geometry, like=path)
        if seg:
            write_whole(files[-1], seg)
        written |= set(files)
        for file in stale_results(scan, Path(o.out)) if o.overwrite else []:
            if file not in written:
                file.unlink()
        rows += volume_rows(scan.name, label, geometry, model.names, model.classes)
        write_volumes(report, rows)
        print(f"{scan.shown}: {time.monotonic() - began:.1f} s", file=sys.stderr)

    if rows:
        print(volumes_table(rows))
        print(f"volumes: {report}", file=sys.stderr)
    if refused:
        listing = "\n".join(f"  {line}" for line in refused)
        rest = f", the others are in {o.out}" if rows else ""
        raise UserError(f"{len(refused)} of {len(scans)} scans were not predicted{rest}:\n{listing}")


if __name__ == "__main__":
    run(main)
