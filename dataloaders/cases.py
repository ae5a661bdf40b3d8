"""Finding, reading and checking case files.

Layout of a data set, as in the left-atrium (LA) code bases:

    FOLDER/train.list, FOLDER/test.list          one case name per line; by default the published LA lists
    FOLDER/validation.list                       optional: labeled cases to choose a checkpoint on; LA has none
    FOLDER/2018LA_Seg_Training Set/CASE/mri_norm2.h5   or   FOLDER/CASE/mri_norm2.h5   or   FOLDER/CASE.h5

A case file holds `image` float (W,H,D), normalised, and `label` (W,H,D) of 0 and 1 (or 0..C), which is optional for an
unlabeled case. An image of K channels, such as T1 and T2, is (K,W,H,D). Optional attributes hold its geometry as in
ITK, in the LPS frame (mm to the patient's left, back and head): `spacing` of the voxels along the array's axes in mm;
`origin`, the position of the centre of voxel (0,0,0); `direction`, 9 cosines row by row, whose columns are the array's
axes, or `unnamed_direction` if its frame is not known. FOLDER/spacing.txt, three numbers, states the spacing of all
cases whose own file does not; else it is unknown.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from utils.channels import with_channels
from utils.distributed import RANK
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
LA_FOLDER = Path("data/la")
PHANTOM_FOLDER = Path("data/phantom")
LA_SUBFOLDER = "2018LA_Seg_Training Set"
FILE_NAME = "mri_norm2.h5"
MOST_CLASSES = 254
MOST_ALIKE = 3  # cases with the same error that have a line each
MOST_BYTES = 2**31  # of one image or label: 2048 slices of 512x512 in float32


Problem = tuple[str, str]
"""The name of a case, and what is wrong with it."""


class CaseError(Exception):
    """A case file cannot be used; the message continues a sentence that begins with its path."""


@dataclass(frozen=True)
class Case:
    """A scan: its name, its file, whether its label may be opened, the largest allowed label value C, and the number
    of channels that it must have, K, if there is one."""

    name: str
    path: Path
    labeled: bool
    classes: int = 1
    channels: int | None = None


def usual_folder(data: str = "") -> Path:
    """The folder of --data, or without one that of LA if it is there, else that of the phantom set."""
    return Path(data or (LA_FOLDER if LA_FOLDER.is_dir() else PHANTOM_FOLDER))


def case_file(folder: Path, name: str) -> Path | None:
    """Path of the case's file in any of the three layouts, or None."""
    paths = (folder / LA_SUBFOLDER / name / FILE_NAME, folder / name / FILE_NAME, folder / f"{name}.h5")
    try:
        return next((path for path in paths if path.is_file()), None)
    except OSError:  # not a valid file name
        return None


def labeled_case(folder: Path, name: str) -> Case:
    """A case of a data set with its label, of any number of classes.

    Raises:
        UserError: there is no such case.
    """
    path = case_file(folder, name)
    if path is None:
        raise UserError(f"{name} is not in {folder}. Name a case of its lists, or its own folder with --data.")
    return Case(name, path, labeled=True, classes=MOST_CLASSES)


@contextmanager
def named(case: Case, advice: str = "") -> Iterator[None]:
    """Context that turns a CaseError, or a prediction that is not finite, into a UserError with the case's name and
    file."""
    try:
        yield
    except (CaseError, FloatingPointError) as e:
        raise UserError(f"{case.name}: {case.path} {e}. {advice}".rstrip()) from e


def has_label(path: Path | None, *, unreadable: bool) -> bool:
    """Whether a case file has a label, of which no value is read.

    `unreadable` is the answer for a file that cannot be opened, whose error is raised where it is read.
    """
    try:
        with h5py.File(path, "r") as f:
            return "label" in f
    except Exception:  # as in read_case
        return unreadable


def find_cases(
    folder: Path, names: Sequence[str], *, labeled: bool, classes: int = 1, channels: int | None = None
) -> tuple[list[Case], list[Problem]]:
    """The cases that have a file, and a problem for each that has none."""
    cases, problems = [], []
    for name in names:
        path = case_file(folder, name)
        if path is None:
            problems.append((name, f"listed, but there is no {folder / name / FILE_NAME}"))
        else:
            cases.append(Case(name, path, labeled, classes, channels))
    return cases, problems


def read_case(case: Case) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
    """Reads image float32 (W,H,D), or (K,W,H,D) with several channels, and label uint8 (W,H,D).

    The label of an unlabeled case is None and never opened.

    Raises:
        CaseError: if the file is not h5 or truncated, lacks `image` or a required `label`, has another number of
            channels than `case` states, shapes that differ or are not 3D, intensities that are not finite or constant
            in a channel, or label values other than 0 to C.
    """
    try:
        with h5py.File(case.path, "r") as f:
            if "image" not in f:
                raise CaseError(f"has no dataset 'image', only {sorted(f)[:9]}")
            if case.labeled and "label" not in f:
                raise CaseError("is a labeled case without a dataset 'label'")
            header = _header(f, "image")
            if header.ndim not in (3, 4) or header.dtype.kind not in "fiu":
                raise CaseError(f"'image' must be three-dimensional numbers, not {header.shape} of {header.dtype}")
            if header.size == 0:
                raise CaseError("'image' is empty")
            refuse_channels(header.shape, case.channels)
            image, label = header[()], None
            if case.labeled:
                header = _header(f, "label")
                if header.shape != image.shape[-3:]:
                    raise CaseError(f"'label' has shape {header.shape} but 'image' {image.shape}")
                if header.dtype.kind not in "fiub":
                    raise CaseError(f"'label' must be numbers, not {header.dtype}")
                label = header[()]
    except CaseError:
        raise
    except Exception as e:  # h5py raises many kinds of errors for damaged files
        raise CaseError(f"is damaged or incomplete ({e})") from e
    image = image.astype(np.float32, copy=False)
    if not np.isfinite(image.sum(dtype=np.float64)):
        raise CaseError("'image' holds values that are not a number or infinite")
    for i, channel in enumerate(with_channels(image)):
        low, high = float(channel.min(initial=np.inf)), float(channel.max(initial=-np.inf))
        if low >= high:
            raise CaseError(f"{'channel ' + str(i) + ' of ' if image.ndim == 4 else ''}'image' is constant ({low:g})")
    if label is None:
        return image, None
    if label.dtype.kind in "bu" and label.max() <= case.classes:  # the usual case, 100 times faster than np.unique
        return image, label.astype(np.uint8, copy=False)
    values = np.unique(label)
    if not np.isin(values, range(case.classes + 1)).all():
        allowed = "0 and 1" if case.classes == 1 else f"0 to {case.classes}"
        hint = ""
        if 255 in values:
            hint = "; 255 marks the atrium in the challenge's own files, divide by 255"
        elif np.isin(values, range(255)).all():
            hint = f"; --classes {values[-1]:g} takes them all"
        raise CaseError(f"'label' holds {', '.join(f'{v:g}' for v in values[:6])} where only {allowed} may stand{hint}")
    return image, label.astype(np.uint8, copy=False)


def refuse_channels(shape: Sequence[int], channels: int | None, names: Sequence[str] = ()) -> None:
    """Raises CaseError for an image (W,H,D) or (K,W,H,D) whose number of channels is not the one that is needed.

    The message lists the names of several, if they are given.
    """
    there = shape[0] if len(shape) == 4 else 1
    if channels not in (None, there):
        listed = f" ({', '.join(names)})" if len(names) > 1 else ""
        needed = f"{channels}{listed} {'is' if channels == 1 else 'are'} needed"
        raise CaseError(f"has {there} channel{'s' * (there > 1)}, where {needed}")


def _header(f: h5py.File, name: str) -> h5py.Dataset:
    """The dataset of that name, without reading its values.

    Raises:
        CaseError: if it is a link, stored in another file, or larger than 2 GiB.
    """
    link = f.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise CaseError(
            f"'{name}' is a link to {getattr(link, 'filename', '')}{link.path}. Put the values there instead"
        )
    dataset = f[name]
    if not isinstance(dataset, h5py.Dataset):
        raise CaseError(f"'{name}' is no dataset")
    if dataset.is_virtual or dataset.external:
        raise CaseError(f"'{name}' takes its values from other files. Put them there instead")
    for what, shape in (("claims", dataset.shape or ()), ("is kept in pieces of", dataset.chunks or ())):
        size = math.prod(map(int, shape)) * dataset.dtype.itemsize
        if size > MOST_BYTES:
            raise CaseError(
                f"'{name}' {what} {shape}, {size / 2**30:.3g} GiB, where {MOST_BYTES / 2**30:g} is the most"
            )
    return dataset


def check_all(cases: Sequence[Case], check: Callable[[Case], object], earlier: Sequence[Problem]) -> None:
    """Calls `check`, which may raise CaseError, for every case and collects the errors, those of `earlier` too; shows
    progress on a terminal.

    Raises:
        UserError: naming all bad cases together.
    """
    problems = list(earlier)
    # One case at a time, so one volume in memory: two to four threads measured no faster.
    for case in tqdm(cases, "checking", leave=False, unit="scan", disable=RANK > 0 or None):
        try:
            check(case)
        except CaseError as e:
            problems.append((case.name, f"{case.path} {e}"))
    if problems:
        some = "1 case is" if len(problems) == 1 else f"{len(problems)} cases are"
        listing = "\n".join(f"  {line}" for line in together(problems))
        fix = "Give --classes as named below, fix" if "--classes" in listing else "Fix"
        raise UserError(f"{some} not usable. {fix} the files or take the names out of the lists:\n{listing}")


def together(problems: Iterable[Problem]) -> list[str]:
    """Lines "CASE: what is wrong", where more than three of the same become one with all their names."""
    lines: list[str] = []
    for text, same in by_problem(problems).items():
        each = [f"{name}: {own}" for name, own in same.items()]
        lines += each if len(same) <= MOST_ALIKE else [f"{len(same)} cases, {', '.join(same)}: {text}"]
    return lines


def by_problem(problems: Iterable[Problem]) -> dict[str, dict[str, str]]:
    """What is wrong, with CASE for the name in a path -> name -> the case's own text."""
    alike: dict[str, dict[str, str]] = {}
    for name, text in problems:
        alike.setdefault(re.sub(rf"(?<=/){re.escape(name)}(?=[/.])", "CASE", text), {})[name] = text
    return alike
