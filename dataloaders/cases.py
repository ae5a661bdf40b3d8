"""Where cases lie, what a case file must hold, and reading it.

Layout of a data set, that of the left-atrium (LA) code bases:

    FOLDER/train.list, FOLDER/test.list          one case name a line; without them the published LA lists are used
    FOLDER/2018LA_Seg_Training Set/CASE/mri_norm2.h5   or   FOLDER/CASE/mri_norm2.h5   or   FOLDER/CASE.h5

A case file holds `image` float (W,H,D), normalised, and `label` (W,H,D) of 0 and 1 (or 0..C), which an unlabeled case
may lack. Its geometry is ITK's, in the LPS frame (mm to the patient's left, back and head), in optional attributes:
`spacing` of the voxels along the array's axes in mm, `origin` the place of the middle of voxel (0,0,0), `direction` 9
cosines row by row, whose columns are the array's axes. FOLDER/spacing.txt, three numbers, states the spacing of all
cases whose own file does not. Nothing else is guessed: a case that neither states has no spacing in mm.
"""

import functools
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from utils.distributed import RANK
from utils.errors import UserError
from utils.text import read_text

ROOT = Path(__file__).resolve().parent.parent
LA_FOLDER = Path("data/la")
PHANTOM_FOLDER = Path("data/phantom")
LA_SPLITS = ROOT / "data" / "splits" / "la"
LA_SUBFOLDER = "2018LA_Seg_Training Set"
LA_SPACING = (0.625, 0.625, 0.625)  # mm, of the cases that the published lists name
SPACING_FILE = "spacing.txt"
FILE_NAME = "mri_norm2.h5"
MOST_CLASSES = 254
MOST_BYTES = 2**31  # of one image or label: 2048 slices of 512x512 in float32
SQUARE = 1e-3  # what unit vectors at right angles may lack: a voxel in a thousand

Geometry = dict[str, tuple[float, ...]]
"""spacing (3), origin (3) and direction (9), or those of them that a file states."""
UNTOLD: Geometry = {
    "spacing": (1.0, 1.0, 1.0),
    "origin": (0.0, 0.0, 0.0),
    "direction": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
}
"""What stands for what a file does not state, where a picture or a file must have something."""


class CaseError(Exception):
    """What is wrong with one case file."""


@dataclass(frozen=True)
class Case:
    """A scan: its name, its file, whether training may open its label, and the largest value C that may stand there."""

    name: str
    path: Path
    labeled: bool
    classes: int = 1


def read_list(path: Path) -> list[str]:
    """Names of a .list file, one a line; blank lines and surrounding white space are ignored.

    Raises:
        UserError: missing, unreadable, empty, or naming a case twice or a path outside the data set.
    """
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read the list {path}: {e}. It must be a text file with one case name a line.") from e
    names = [Path(line).as_posix() for line in lines if line]  # ./A and A/ are A
    if not names:
        raise UserError(f"the list {path} names no case. Write one case name a line.")
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise UserError(f"the list {path} names {', '.join(twice)} more than once. Keep each case once.")
    unnamable = [name for name in names if not name.isprintable()]
    if unnamable:
        raise UserError(f"the list {path} holds {unnamable[0]!r}, which no case can be called. Write one name a line.")
    outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise UserError(f"the list {path} leads out of the data set: {', '.join(outside)}. Use plain case names.")
    return names


def lists_of(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the training and of the test cases, from the folder's own lists or else the published LA lists.

    Raises:
        UserError: a missing folder, one list of two, bad lists, or cases in both.
    """
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise UserError(f"the data folder {folder} {what}. See data/README.md for where LA comes from and the layout.")
    own = [(folder / f"{split}.list").exists() for split in ("train", "test")]
    if any(own) and not all(own):
        raise UserError(f"{folder} has only one of train.list and test.list. Put both there, or neither to use LA's.")
    where = folder if all(own) else LA_SPLITS
    train, test = read_list(where / "train.list"), read_list(where / "test.list")
    both = sorted(set(train) & set(test))
    if both:
        raise UserError(
            f"train.list and test.list of {where} both name {', '.join(both)}. A test case must never be trained on."
        )
    return train, test


def case_file(folder: Path, name: str) -> Path | None:
    """The case's file in any of the three layouts, or None."""
    options = (folder / LA_SUBFOLDER / name / FILE_NAME, folder / name / FILE_NAME, folder / f"{name}.h5")
    try:
        return next((path for path in options if path.is_file()), None)
    except OSError:  # no file can have such a name
        return None


def find_cases(folder: Path, names: Sequence[str], *, labeled: bool, classes: int = 1) -> tuple[list[Case], list[str]]:
    """The cases that have a file, and a line for each that has none."""
    cases, problems = [], []
    for name in names:
        path = case_file(folder, name)
        if path is None:
            problems.append(f"{name}: listed, but there is no {folder / name / FILE_NAME}")
        else:
            cases.append(Case(name, path, labeled, classes))
    return cases, problems


def read_case(case: Case) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
    """image float32 (W,H,D) and label uint8 (W,H,D), which is None and never opened for an unlabeled case.

    Raises:
        CaseError: not h5, cut short, no `image`, no `label` where one is needed, shapes that differ or are not 3D,
            not-a-number or infinite or constant intensities, label values other than 0 to C.
    """
    try:
        with h5py.File(case.path, "r") as f:
            if "image" not in f:
                raise CaseError(f"has no dataset 'image', only {sorted(f)[:9]}")
            if case.labeled and "label" not in f:
                raise CaseError("is a labeled case without a dataset 'label'")
            header = _header(f, "image")
            if header.ndim != 3 or header.dtype.kind not in "fiu":
                raise CaseError(f"'image' must be three-dimensional numbers, not {header.shape} of {header.dtype}")
            if header.size == 0:
                raise CaseError("'image' is empty")
            image, label = header[()], None
            if case.labeled:
                header = _header(f, "label")
                if header.shape != image.shape:
                    raise CaseError(f"'label' has shape {header.shape} but 'image' {image.shape}")
                if header.dtype.kind not in "fiub":
                    raise CaseError(f"'label' must be numbers, not {header.dtype}")
                label = header[()]
    except CaseError:
        raise
    except Exception as e:  # what h5py raises for a file that is cut, or made to fool it, has no end
        raise CaseError(f"is no whole h5 file ({e})") from e
    image = image.astype(np.float32, copy=False)
    low, high = float(image.min(initial=np.inf)), float(image.max(initial=-np.inf))
    if not np.isfinite(image.sum(dtype=np.float64)):
        raise CaseError("'image' holds values that are not a number or infinite")
    if low >= high:
        raise CaseError(f"'image' is constant ({low:g})")
    if label is None:
        return image, None
    if label.dtype.kind in "bu" and label.max() <= case.classes:  # the usual case, in a hundredth of the time
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


def _header(f: h5py.File, name: str) -> h5py.Dataset:
    """The dataset of that name, none of its values read yet.

    Raises:
        CaseError: it lies elsewhere, in another file or behind a link, or claims to be larger than any scan.
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


def told_geometry(case: Case) -> Geometry:
    """Of spacing, origin and direction those that are known: the file's attributes, or the spacing its set declares.

    A set declares it by its spacing.txt, or by naming its cases as the published LA lists do: 0.625 mm.

    Raises:
        CaseError: attributes that are not as many finite numbers, a spacing that is not above 0, a direction that is no
            rotation or mirrored one, a spacing.txt that holds anything but three lengths.
    """
    try:
        with h5py.File(case.path, "r") as f:
            found = {name: np.ravel(f.attrs[name]) for name in UNTOLD if name in f.attrs}
    except Exception as e:  # as in read_case
        raise CaseError(f"has attributes that cannot be read ({e})") from e
    for name, values in found.items():
        count = len(UNTOLD[name])
        if values.dtype.kind not in "fiu" or len(values) != count or not np.isfinite(values).all():
            raise CaseError(f"has the attribute {name} {values.tolist()} where {count} finite numbers must stand")
    told = {name: tuple(map(float, values)) for name, values in found.items()}
    if min(told.get("spacing", (1.0,))) <= 0:
        raise CaseError(f"has the spacing {list(told['spacing'])}, which must be above 0 mm")
    if "direction" in told:
        refuse_direction(told["direction"])
    spacing = told.get("spacing") or _declared_spacing(case) or (LA_SPACING if published(case) else None)
    return {**told, "spacing": spacing} if spacing else told


def refuse_direction(direction: Sequence[float]) -> None:
    """Raises CaseError unless the columns of the 9 cosines are unit vectors at right angles."""
    axes = np.reshape(direction, (3, 3))
    if not np.isfinite(axes).all():
        raise CaseError(f"has a direction of {axes.ravel().tolist()}, which are not 9 numbers. Fix its header")
    lengths = np.linalg.norm(axes, axis=0)
    if np.abs(lengths - 1).max() > SQUARE:
        shown = ", ".join(f"{length:g}" for length in lengths)
        raise CaseError(
            f"has a direction whose columns are no unit vectors but {shown} long, so that the size of its voxels is "
            "not certain. Fix its header"
        )
    cosines = axes.T @ axes - np.eye(3)
    i, j = np.unravel_index(np.abs(cosines).argmax(), (3, 3))
    if abs(cosines[i, j]) > SQUARE:
        angle = math.degrees(math.acos(np.clip(cosines[i, j], -1, 1)))
        raise CaseError(
            f"has axes that are not at right angles: {'xyz'[min(i, j)]} and {'xyz'[max(i, j)]} are at {angle:.4g} "
            "degrees, as with a tilted gantry. Resample it onto a grid of right angles"
        )


def _declared_spacing(case: Case) -> tuple[float, ...] | None:
    """What the spacing.txt of the case's set states, if there is one."""
    levels = len(Path(case.name).parts) - (case.path.name != FILE_NAME)
    folder = case.path.parents[levels] if levels < len(case.path.parents) else case.path.parent
    file = (folder.parent if folder.name == LA_SUBFOLDER else folder) / SPACING_FILE
    try:
        words = read_text(file).split()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise CaseError(f"belongs to a set whose {file} cannot be read ({e})") from e
    try:
        x, y, z = map(float, words)
    except ValueError:
        x = y = z = math.nan
    if not all(0 < mm < math.inf for mm in (x, y, z)):
        raise CaseError(
            f"belongs to a set whose {file} holds {' '.join(words)[:60]!r}, where the mm along x, y and z must stand"
        )
    return x, y, z


def published(case: Case) -> bool:
    """Whether it is called as one of the published LA scans are, by 20 letters and digits that nothing else has."""
    return case.name in _la_names()


@functools.cache
def _la_names() -> frozenset[str]:
    return frozenset(name for split in ("train", "test") for name in read_list(LA_SPLITS / f"{split}.list"))


def read_geometry(case: Case) -> Geometry:
    """`told_geometry`, and what it lacks from UNTOLD: for what needs some geometry, as a NIfTI of the case does."""
    return {**UNTOLD, **told_geometry(case)}


def known_spacing(case: Case) -> tuple[float, ...] | None:
    """mm along x, y, z, where the case's file or its set states it; else None."""
    try:
        return told_geometry(case).get("spacing")
    except CaseError:
        return None


def check_all(cases: Sequence[Case], check: Callable[[Case], object], known: Sequence[str]) -> None:
    """Calls `check` once for every case, which may raise CaseError; shows progress on a terminal.

    Raises:
        UserError: naming all bad cases at once, the `known` ones included.
    """
    problems = list(known)
    quiet = RANK > 0 or not sys.stderr.isatty()
    # One at a time, and so one volume in memory: two to four threads were measured to be no faster.
    for case in tqdm(cases, "checking", leave=False, unit="scan", disable=quiet):
        try:
            check(case)
        except CaseError as e:
            problems.append(f"{case.name}: {case.path} {e}")
    if problems:
        some = "1 case is" if len(problems) == 1 else f"{len(problems)} cases are"
        listing = "\n".join(f"  {line}" for line in problems)
        raise UserError(f"{some} not usable. Fix the files or take the names out of the lists:\n{listing}")
