"""The scans that are to become a data set: where they lie, in which of the layouts, and which are tested on."""

import csv
import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dataloaders.cases import LA_SPLITS, read_list
from dataloaders.images import ending_of, scan_name
from utils.errors import UserError
from utils.text import read_text

TEST_SHARE = 0.2
COLUMNS = ("image", "label", "split", "name")
NNUNET = {"imagesTr": ("labelsTr", "train"), "imagesTs": ("labelsTs", "test")}


@dataclass(frozen=True)
class Source:
    """A scan to convert; `split` is 'train', 'test' or, where the source does not tell, ''."""

    name: str
    image: Path
    label: Path | None
    split: str = ""


def find_sources(source: Path) -> tuple[list[Source], bool]:
    """The scans in any of the layouts, and whether they are the challenge's.

    Raises:
        UserError: no such folder or file, no layout that is known, labels without scan, names that occur twice.
    """
    if source.is_file():
        return _distinct(read_manifest(source), source), False
    if not source.is_dir():
        raise UserError(f"--source {source} does not exist. Give a folder of scans or a CSV that lists them.")
    challenge = _in_case_folders(source, "lgemri", "laendo")
    if challenge:
        return _distinct(challenge, source), True
    found = _in_two_folders(source / "images", source / "labels", "")
    for images, (labels, split) in NNUNET.items():
        more = _in_two_folders(source / images, source / labels, split)
        without = [scan.name for scan in more if split == "test" and scan.label is None]
        if without:
            print(
                f"left out: {len(without)} scans of {images} without label; predict.py is for those.", file=sys.stderr
            )
        found += [scan for scan in more if scan.name not in without]
    found += _in_case_folders(source, "image", "label")
    if not found:
        raise UserError(
            f"{source} holds no scans in a known layout: images/ and labels/, imagesTr/ and labelsTr/, "
            "NAME/image.nii.gz and NAME/label.nii.gz, or NAME/lgemri.nrrd. Arrange them so, or list them in a CSV; see "
            "--help."
        )
    return _distinct(found, source), False


def _scans_in(folder: Path) -> dict[str, Path]:
    """Name -> file of the scans in a folder; hidden files are none."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if ending_of(path) not in ("", ".h5") and not path.name.startswith("."):
            if scan_name(path) in found:
                raise UserError(f"{found[scan_name(path)]} and {path} have one name. Keep one of them.")
            found[scan_name(path)] = path
    return found


def _in_two_folders(images: Path, labels: Path, split: str) -> list[Source]:
    scans, known = _scans_in(images), _scans_in(labels)
    if any(name.endswith("_0001") for name in scans) and any(name.endswith("_0000") for name in scans):
        raise UserError(
            f"{images} holds scans of several channels (_0001), and one is read here. Keep the _0000 alone."
        )
    if scans and all(name.endswith("_0000") for name in scans):
        scans = {name.removesuffix("_0000"): path for name, path in scans.items()}
    _refuse_orphans([known[name] for name in known if name not in scans], images)
    return [Source(name, path, known.get(name), split) for name, path in scans.items()]


def _in_case_folders(source: Path, image: str, label: str) -> list[Source]:
    inside = {folder.name: _scans_in(folder) for folder in sorted(source.iterdir()) if folder.is_dir()}
    _refuse_orphans([scans[label] for scans in inside.values() if label in scans and image not in scans], source)
    return [Source(name, scans[image], scans.get(label)) for name, scans in inside.items() if image in scans]


def _refuse_orphans(labels: Sequence[Path], where: Path) -> None:
    if labels:
        shown = ", ".join(map(str, labels[:5]))
        raise UserError(f"{len(labels)} labels have no scan in {where}: {shown}. Add the scans or remove the labels.")


def read_manifest(path: Path) -> list[Source]:
    """The rows of a CSV with the column image and, optionally, label, split and name.

    Raises:
        UserError: unreadable, other columns, an empty image, a split other than train and test.
    """
    try:
        rows = list(csv.DictReader(read_text(path).splitlines(), skipinitialspace=True))
    except (OSError, ValueError, csv.Error) as e:
        raise UserError(f"cannot read {path}: {e}. It must be a CSV with the column image.") from e
    columns = [name for name in (rows[0] if rows else ()) if name is not None]
    unknown = [name for name in columns if name not in COLUMNS]
    if "image" not in columns or unknown or any(None in row for row in rows):
        raise UserError(
            f"{path} has the columns {', '.join(columns) or 'none'}. Use image and, if wanted, label, split, name."
        )
    found = []
    for line, row in enumerate(rows, 2):
        values = {name: (row.get(name) or "").strip() for name in COLUMNS}
        if not values["image"] or values["split"] not in ("", "train", "test"):
            raise UserError(f"{path}, line {line}: an image is needed, and the split must be train, test or nothing.")
        image = path.parent / values["image"]
        label = path.parent / values["label"] if values["label"] else None
        found.append(Source(values["name"] or scan_name(image), image, label, values["split"]))
    return found


def _distinct(found: list[Source], where: Path) -> list[Source]:
    twice = [name for name, count in Counter(scan.name for scan in found).items() if count > 1]
    if twice or not found:
        raise UserError(
            f"{where} names {', '.join(twice[:5]) or 'no scan'}{' twice' if twice else ''}. Name each once."
        )
    for scan in found:
        if not scan.name.isprintable() or Path(scan.name).name != scan.name or scan.name != scan.name.strip():
            raise UserError(f"{where} names {scan.name!r}, which no case can be called. Give it a plain name.")
    return found


def choose_split(
    scans: Sequence[Source], *, challenge: bool, share: float | None, seed: int
) -> tuple[list[str], list[str]]:
    """Names for train.list, the labeled ones first, and for test.list.

    Raises:
        UserError: a --test-share beside a source that tells its split, or too few labeled cases.
    """
    order = [scan.name for scan in scans]
    labeled = {scan.name for scan in scans if scan.label is not None}
    if any(scan.split for scan in scans):
        if share is not None:
            raise UserError("--test-share is given, but the source tells what to test on. Leave one of them out.")
        test = {scan.name for scan in scans if scan.split == "test"}
    else:
        published = [read_list(LA_SPLITS / f"{split}.list") for split in ("train", "test")]
        if challenge and share is None and set(order) <= {name for names in published for name in names}:
            order = [name for names in published for name in names if name in set(order)]
            test = set(order) & set(published[1])
        else:
            ranked = sorted(labeled, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
            count = round((TEST_SHARE if share is None else share) * len(ranked))
            test = set(ranked[: min(max(count, 1), len(ranked) - 1)])
    if not test or not labeled - test:
        raise UserError(
            f"{len(labeled - test)} labeled cases to train on and {len(test)} to test on: at least one of each is "
            "needed. Add labeled scans, or change the split."
        )
    train = sorted((name for name in order if name not in test), key=lambda name: name not in labeled)
    return train, [name for name in order if name in test]
