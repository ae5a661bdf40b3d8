"""Makes a data set of h5 cases from scans in NIfTI, NRRD or MetaImage.

    python -m tools.convert --source scans --out data/mine --spacing 1 1 1
    python -m tools.convert --source scans.csv --out data/mine --labels 1 3 --workers 4
    python -m tools.convert --source Pancreas-CT --out data/pancreas @data/recipes/pancreas/convert.txt
    python -m tools.convert --source "Training Set" --out data/la      the folders of the 2018 atrial challenge

What --source may be:

    FOLDER/images/NAME.nii.gz and FOLDER/labels/NAME.nii.gz       the same names; a scan without label is unlabeled
    FOLDER/imagesTr/NAME.nii.gz, labelsTr, imagesTs               of the Medical Segmentation Decathlon
    FOLDER/imagesTr/NAME_0000.nii.gz, labelsTr/NAME.nii.gz        of nnU-Net; imagesTs and labelsTs, if that is there,
                                                                  become the test cases
    FOLDER/NAME/image.nii.gz and FOLDER/NAME/label.nii.gz
    FOLDER/NAME/lgemri.nrrd and FOLDER/NAME/laendo.nrrd           the challenge's folders
    FILE.csv with the columns image and, if wanted, label, split (train, test), name, patient; paths are from the
                                                                  CSV's folder

Several channels of a scan, such as T1 and T2, are nnU-Net's NAME_0000.nii.gz, NAME_0001.nii.gz, ..., columns image_T1
and image_T2 of a CSV, or one 4-D NIfTI, as the Decathlon has them. They must lie on one grid, and each is normalised on
its own.

The axes of each scan are brought to RAS, those of the challenge's folders stay as the published LA set has them. It is
normalised to zero mean and unit variance over all its voxels, then resampled, then cropped. --out gets
NAME/mri_norm2.h5, train.list, the labeled cases first, test.list, with --validation-share also validation.list, and
dataset.json, which holds the classes' names and which cases were ever listed. What is there already is left alone, so
the same command goes on where it was stopped; what was made from another file or with other options is refused.

A set can grow: the lists keep their lines, whatever order they were brought to, and no case goes from one to the other.
New labeled cases are added behind the labeled ones that train.list begins with, new unlabeled ones at its end, new test
cases at the end of test.list, new validation cases at the end of validation.list.

Where patients have several scans, name them with --patient or the column patient: all scans of a patient then come to
one list, and --fold keeps them together.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import sys
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from dataloaders.cases import FILE_NAME, CaseError, case_file, together
from dataloaders.class_names import DATASET, class_names
from dataloaders.images import INTERPOLATORS, ending_of, read_label
from dataloaders.nifti import channels_in
from dataloaders.orientation import RAS
from tools.case_of_scan import CROPS, Job, Outcome, attributes_of, convert_case, differences
from tools.conversion_summary import remarks, summary
from tools.set_lists import SPLITS, PreviousLists, extended_lists, labeled_of, listed_in, read_previous, write_set
from tools.sources import IMAGES_TS, Source, SourceSet, find_sources, refuse_unlabeled
from tools.split import choose_split, patients_in
from utils.errors import UserError, ignore_stop_signals, run
from utils.options import option, read_flags
from utils.text import counted, some


def label_values(word: str) -> tuple[int, ...]:
    """The type of --labels: a value, or several joined by commas that become one class."""
    values = word.split(",")
    if not all(value.isdecimal() and int(value) for value in values):
        raise argparse.ArgumentTypeError(f"{word} is no value above 0, and no such values joined by commas, as 1,2,4")
    return tuple(map(int, values))


@dataclasses.dataclass
class Options:
    source: str = option("", "folder of the scans, or a CSV that lists them", group="what")
    out: str = option("", "folder of the data set", group="what")
    spacing: list[float] | None = option(
        None, "mm along the axes of RAS to resample to (default each scan's own)", type=float, nargs=3, minimum=1e-3
    )
    interpolation: str = option(
        "linear", "interpolation of the intensities", choices=[k for k in INTERPOLATORS if k != "nearest"]
    )
    labels: list[tuple[int, ...]] | None = option(
        None, "values of the labels that become 1, 2, ..., all others 0; values joined by commas, as 1,2, become one "
        "class (default as they are; 255 alone becomes 1)", type=label_values, nargs="+",
    )  # fmt: skip
    crop: str = option(
        "",
        "label: box of the label with a random margin at each side, 10 to 19 voxels along x and y, 5 to 9 along z, and "
        "at least 112 112 80 in all; label-xy: the same, all slices kept; foreground: box of the label and of what is "
        "brighter than Otsu's threshold; none. New patients have no label to crop around (default label-xy, as the LA "
        "set is published, for the challenge's folders, else none)",
        choices=CROPS,
    )
    crop_margin: int | None = option(
        None, "of --crop label and label-xy: margin in voxels at each side, after resampling, without the minimum size "
        "(default as --crop says)", type=int, minimum=0,
    )  # fmt: skip
    test_share: float | None = option(
        None, "share of the labeled cases for test.list (default what the source states, the published lists for the "
        "challenge's, else 0.2)", type=float, minimum=0, maximum=1,
    )  # fmt: skip
    validation_share: float = option(
        0.0, "share of the labeled cases for validation.list, on which train_dtml.py --validate-every chooses the best "
        "checkpoint; they are taken from those that would be trained on", minimum=0, maximum=1,
    )  # fmt: skip
    patient: str = option(
        "",
        "regular expression that the beginning of each scan's name matches, the patient in parentheses: '([^_]+)_' "
        "takes sub-01_day-1 and sub-01_day-2 for one (default every scan is a patient, or what a CSV states)",
    )
    images_ts: str = option(
        "",
        "scans of imagesTs that have no label: train on them without one, or leave them out (default leave where "
        "labelsTs has labels of others of them, else unlabeled)",
        choices=IMAGES_TS,
    )
    seed: int = option(
        1337, "of margins and of the choice of test and validation cases, with each case's name", minimum=0
    )
    workers: int = option(1, "processes; their number changes nothing in the files", minimum=1)


def keep(out: Path, before: PreviousLists, here: Container[str], settings: str) -> list[Outcome]:
    """Of the cases of the lists those that the source does not have: they stay as they are.

    Raises:
        UserError: they are not there either, or were made with other settings.
    """
    kept = []
    gone = [(name, which) for which in SPLITS for name in getattr(before, which) if name not in here]
    for name, split in gone:
        path = case_file(out, name)
        if path is None:
            raise UserError(
                f"{out / split}.list names {name}, which this command would not put there: neither the source nor "
                f"{out} has it. Take it out, move the list away, or choose another --out."
            )
        try:
            about = attributes_of(path)
        except CaseError as e:
            raise UserError(f"{e}, or take {name} out of {split}.list.") from e
        then = json.loads(about.get("settings", settings))  # cases that were not converted here state none
        differ = differences(then, json.loads(settings))
        if differ:
            raise UserError(
                f"{path}, which the source does not have, was made in another way ({'; '.join(differ.values())}). A "
                "set is made in one way: choose another --out."
            )
        kept.append(Outcome(name, "kept", values=tuple(map(int, about.get("values", ())))))
    return kept


def named(names_of_values: dict[int, str], labels: Sequence[tuple[int, ...]] | None, out: Path) -> dict[int, str]:
    """Class -> its name, from the names of the label values in the source and those that the set has already.

    Raises:
        UserError: the two differ, or voxels are to be ignored.
    """
    if labels is not None:
        classes = {
            c: " + ".join(names_of_values[value] for value in values)
            for c, values in enumerate(labels, 1)
            if names_of_values.keys() >= {*values}
        }
    elif "ignore" in names_of_values.values():
        raise UserError(
            f"{DATASET} names voxels to ignore, and every voxel is learned from here. Name the values that are "
            "classes by --labels; all others become background."
        )
    else:
        classes = {1: names_of_values[255]} if list(names_of_values) == [255] else names_of_values
    before = class_names(out)
    differ = [f"{c} is {before[c]} there, {classes[c]} now" for c in classes if before.get(c, classes[c]) != classes[c]]
    if differ:
        raise UserError(f"{out} has other classes: {'; '.join(differ)}. Choose another --out.")
    return dict(sorted((before | classes).items()))


def channels_of(source_set: SourceSet) -> tuple[str, ...]:
    """Names of the channels of every scan; their number is that of most scans: of a scan's files, or of the volumes in
    its 4-D NIfTI."""
    counts: Counter[int] = Counter()
    for scan in source_set.scans:
        several = len(scan.images) == 1 and ".nii" in ending_of(scan.image)
        with contextlib.suppress(CaseError):  # which the conversion reports
            counts[channels_in(scan.image) if several else len(scan.images)] += 1
    count, names = max(counts, key=lambda n: counts[n], default=1), source_set.channels
    if count > 1 and names and len(names) != count:
        raise UserError(
            f"{DATASET} names {len(names)} channels, {', '.join(names)}, and most scans have {count}. Fix the names."
        )
    return tuple(names) if len(names) == count else tuple(f"channel {i}" for i in range(count))


def refuse_absent(labels: Sequence[tuple[int, ...]], scans: Sequence[Source], kept: Sequence[Outcome]) -> None:
    """Raises UserError if one of the values of --labels is in no label; reads labels until each was seen."""
    there = {c for outcome in kept for c in outcome.values}
    missing = {value for c, values in enumerate(labels, 1) if c not in there for value in values}
    seen: set[int] = set()
    for scan in scans:
        if missing and scan.label is not None:
            with contextlib.suppress(CaseError):  # which the conversion reports
                seen |= {int(value) for value in np.unique(read_label(scan.label)[0]) if value}
                missing -= seen
    if missing:
        raise UserError(
            f"--labels {' '.join(map(str, sorted(missing)))}: no label holds that. They hold "
            f"{' '.join(map(str, sorted(seen))) or 'nothing but 0'}."
        )


def outcomes_of(jobs: Sequence[Job], workers: int) -> Iterator[Outcome]:
    """The outcome of each job, in order, computed by `workers` processes.

    Raises:
        UserError: one of them was killed.
    """
    if workers == 1 or not jobs:
        yield from map(convert_case, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_alone) as pool:
        try:
            yield from pool.map(convert_case, jobs)
        except BrokenProcessPool as e:
            raise UserError(
                "a process that converted scans was killed, as if memory ran out. Give fewer --workers; what is done "
                "is left alone."
            ) from e
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _alone() -> None:
    """A worker keeps to one core, and leaves Ctrl-C to the main process."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    ignore_stop_signals()


def main(argv: list[str] | None = None) -> None:
    o: Options = read_flags(Options, __doc__, "python -m tools.convert", argv)
    if not o.source or not o.out:
        raise UserError(f"--{'source' if not o.source else 'out'} is missing. See --help.")
    values = [value for group in o.labels or () for value in group]
    if len(set(values)) < len(values):
        raise UserError("--labels names a value twice. Name each once.")
    out = Path(o.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file. Give a folder.")
    if Path(o.source).is_dir() and out.resolve() == Path(o.source).resolve():
        raise UserError(
            f"--out {out} is the source, and the set would be written among your scans. Give another folder."
        )

    # what there is, and what it is to become
    source_set = find_sources(Path(o.source), o.images_ts)
    scans = source_set.scans
    before = read_previous(out, [scan.name for scan in scans])
    crop = o.crop or ("label-xy" if source_set.challenge else "none")
    spacing = None if o.spacing is None else tuple(o.spacing)
    if o.crop_margin is not None and crop not in ("label", "label-xy"):
        raise UserError(f"--crop-margin does nothing with --crop {crop}. Give --crop label with it, or leave it out.")
    labels = None if o.labels is None else tuple(o.labels)
    channels = channels_of(source_set)
    jobs = [
        Job(
            scan, out / scan.name / FILE_NAME, crop, spacing, o.interpolation,
            labels and tuple(group if len(group) > 1 else group[0] for group in labels), o.seed,
            orientation=None if source_set.challenge else RAS,  # the published LA files have the challenge's own axes
            channels=channels, margin=o.crop_margin,
        )
        for scan in scans
    ]  # fmt: skip
    if not before.labeled:
        refuse_unlabeled(source_set, Path(o.source))
    patients = patients_in(source_set, o.patient, out)
    kept = keep(out, before, {scan.name for scan in scans}, jobs[0].settings)
    choose = functools.partial(
        choose_split, scans, challenge=source_set.challenge, share=o.test_share, seed=o.seed,
        validation_share=o.validation_share, before=before, patients=patients,
    )  # fmt: skip
    train, test, validation = choose()
    listed = {*before.train, *before.test, *before.validation, *train, *test, *validation}
    unlisted = [scan.name for scan in scans if scan.name not in listed | before.taken_out]
    jobs = [job for job in jobs if job.scan.name in listed]
    without = [scan.name for scan in scans if scan.name in test and scan.label is None]
    if without:
        raise UserError(f"{some(without)} cannot be tested on without label. Add it, or make it a train case.")
    names = named(source_set.names, labels, out)
    if labels is not None:
        refuse_absent(labels, scans, kept)
    if source_set.left_out:
        print(
            f"left out: {counted(len(source_set.left_out), 'scan')} of imagesTs without label; predict.py is for "
            "those, or train on them with --images-ts unlabeled.",
            file=sys.stderr,
        )
    if unlisted:
        print(
            f"left out: {counted(len(unlisted), 'scan')} without label, of patients in test.list or validation.list.",
            file=sys.stderr,
        )

    # the cases, and the lists, which are of those that were not refused
    outcomes = list(tqdm(outcomes_of(jobs, o.workers), total=len(jobs), unit="scan", disable=None))
    refused = {outcome.name: outcome.why for outcome in outcomes if outcome.status == "refused"}
    if refused:
        listing = "\n".join(f"  {line}" for line in together(refused.items()))
        rest = f", the others are in {out}" if len(refused) < len(jobs) else ""
        refusal = f"{len(refused)} of {len(jobs)} scans refused{rest}:\n{listing}\n"
        refusal += "Mend each, or take it and its label out of the source, and give the same command again."
        try:
            train, test, validation = choose(unusable={*refused, *unlisted})
        except UserError as e:
            raise UserError(f"{refusal}\nWithout them no list is written: {e}") from e
    everything = [*before.train, *before.test, *before.validation, *train, *test, *validation]
    labeled = labeled_of(out, everything)
    lists = extended_lists(before, train, test, validation, labeled=labeled, listed=listed_in(out))
    now = read_previous(out)
    if any(getattr(now, split) != getattr(before, split) for split in SPLITS):
        raise UserError(
            f"the lists of {out} have changed meanwhile, as by another conversion into it. Give the same command "
            "again; what is done is left alone."
        )
    cases = {scan.name: scan.label is not None for scan in scans if scan.name in before.taken_out}
    cases |= {name: name in labeled for split in SPLITS for name in lists[split]}
    write_set(out, lists, cases, names, channels, patients)
    lines = summary([*outcomes, *kept], lists, labeled, names)
    if patients:
        counts = {split: len({patients.get(name, name) for name in lists[split]}) for split in SPLITS}
        lines.append("patients: " + ", ".join(f"{n} in {split}.list" for split, n in counts.items() if n))
    if len(channels) > 1:
        lines.append(f"channels: {', '.join(channels)}")
    elif len(source_set.channels) > 1:
        lines.append(f"the scans have one channel, and {DATASET} names {', '.join(source_set.channels)}")
    lines += remarks(source_set, lists, before, len(labeled), o.test_share, o.validation_share, Path(o.source))
    print("\n".join(lines))
    if refused:
        raise UserError(refusal)


if __name__ == "__main__":
    run(main)
