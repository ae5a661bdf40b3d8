"""The scans that are to become a data set: where they lie, and in which of the layouts."""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dataloaders.channel_names import channel_names_in
from dataloaders.channels import by_number, in_order
from dataloaders.class_names import DATASET, names_in, read_dataset
from dataloaders.images import WRITTEN_AS, ending_of, scan_name
from utils.errors import UserError
from utils.text import counted, read_text, some

COLUMNS = ("label", "split", "name", "patient")
IMAGES_TS = ("unlabeled", "leave")
FOLDERS = ("images", "labels", "imagesTr", "labelsTr", "imagesTs", "labelsTs")
NOTES = (".json", ".txt", ".csv", ".tsv", ".md", ".xml", ".yaml", ".yml", ".log")  # of files that describe a scan
PACKED = re.compile(r"\.(tar|tar\.gz|tgz|zip)$")
LABEL_OF = re.compile(r"(.+)[-_. ](seg|segmentation|labels?|masks?|gt|roi|manual)", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """A scan to convert; `split` is 'train', 'test' or, where the source does not say, ''."""

    name: str
    image: Path
    label: Path | None
    split: str = ""
    more: tuple[Path, ...] = ()
    """The files of further channels."""
    patient: str = ""
    """Of a CSV's column; '' where the source does not say."""

    @property
    def images(self) -> tuple[Path, ...]:
        """The files of all channels; one file may hold several."""
        return (self.image, *self.more)


@dataclass(frozen=True)
class SourceSet:
    """What a source holds."""

    scans: list[Source]
    challenge: bool = False
    """Whether these are the folders of the 2018 atrial challenge."""
    unread: list[Path] = field(default_factory=list)
    """Files and folders next to scans or labels that are not read."""
    left_out: list[str] = field(default_factory=list)
    """Scans of imagesTs without label that are left out."""
    names: dict[int, str] = field(default_factory=dict)
    """Value of a label -> name of its class, from dataset.json."""
    channels: list[str] = field(default_factory=list)
    """Names of the channels, from dataset.json or a CSV; [] where the source states none."""
    absent: list[str] = field(default_factory=list)
    """Training scans, or their labels, that dataset.json lists and that are not there."""


def find_sources(source: Path, images_ts: str) -> SourceSet:
    """The scans in any of the layouts.

    Args:
        images_ts: what to do with the scans of imagesTs that have no label: 'unlabeled' trains on them, 'leave' leaves
            them out; '' is 'leave' where labelsTs has labels of others of them, else 'unlabeled'.

    Raises:
        UserError: no such folder or file, no layout that is known, labels without scan, a label that cannot be read,
            names that occur twice, scans that differ in the number of files, an `images_ts` without any such scan, a
            dataset.json with other content.
    """
    if source.is_file():
        if PACKED.search(source.name.lower()):
            raise UserError(f"--source {source} is an archive. Unpack it and give its folder.")
        if images_ts:
            raise UserError("--images-ts is given, but a CSV has no imagesTs. Leave it out.")
        scans, channels = read_manifest(source)
        return SourceSet(_distinct(scans, source), channels=channels)
    if not source.is_dir():
        raise UserError(f"--source {source} does not exist. Give a folder of scans or a CSV that lists them.")
    unread = _loose(source)
    scans = _in_case_folders(source, "lgemri", "laendo", unread)
    challenge, left_out = bool(scans), []
    if not challenge:
        scans = _in_two_folders(source / "images", source / "labels", unread)
        training, tested, others = _in_nnunet_folders(source, unread)
        take = images_ts or ("leave" if tested else "unlabeled")
        scans += training + tested + (others if take == "unlabeled" else [])
        left_out = [scan.name for scan in others if take == "leave"]
        if images_ts and not others:
            raise UserError(f"--images-ts is given, but {source} has no scans without label in imagesTs. Leave it out.")
        scans += _in_case_folders(source, "image", "label", unread)
    if not scans:
        there = f" Not read: {paths_text(unread, source)}." if unread else ""
        raise UserError(
            f"{source} holds no scans in a known layout: images/ and labels/, imagesTr/ and labelsTr/, "
            "NAME/image.nii.gz and NAME/label.nii.gz, or NAME/lgemri.nrrd. Arrange them so, or list them in a CSV, as "
            f"docs/recipes.md does for BraTS in one line. Make NIfTI files of DICOM first, as with dcm2niix.{there}"
        )
    dataset = read_dataset(source / DATASET)
    absent = _absent(dataset, scans, left_out)
    channels = channel_names_in(dataset, source / DATASET)
    files = len(scans[0].images)
    differ = [scan.name for scan in scans if len(scan.images) != files]
    if differ or 1 < files != (len(channels) or files):
        what = f"{scans[0].name} has {files} files of channels (_0000, ...)"
        other = f"{differ[0]} another number" if differ else f"{DATASET} names {len(channels)}, {', '.join(channels)}"
        raise UserError(f"{source}: {what}, and {other}. Every scan needs the same channels. Add what is missing.")
    names = names_in(dataset, source / DATASET)
    return SourceSet(_distinct(scans, source), challenge, unread, left_out, names, channels, absent)


def refuse_unlabeled(source_set: SourceSet, folder: Path) -> None:
    """Raises UserError if no scan has a label, with where one belongs and the files that were not read."""
    if not any(scan.label for scan in source_set.scans):
        unread = f" Not read: {paths_text(source_set.unread, folder)}." if source_set.unread else ""
        raise UserError(
            f"none of the {len(source_set.scans)} scans of {folder} has a label. A label has the name of its scan, in "
            f"labels/ next to images/ or in labelsTr/ next to imagesTr/; a CSV has a column label.{unread}"
        )


def refuse_labels_among(scans: Sequence[Path], advice: str) -> None:
    """Raises UserError, which ends with `advice`, for a file called NAME_seg, NAME_label or the like among the scans,
    next to a scan NAME, NAME_0000 or NAME_t1.
    """
    for path in scans:
        if match := LABEL_OF.fullmatch(scan_name(path)):
            of_case = re.compile(rf"{re.escape(match[1])}([-_. ].*)?")
            beside = [scan_name(other) for other in scans if other.parent == path.parent and other != path]
            if any(map(of_case.fullmatch, beside)):
                raise UserError(f"{path} looks like the label of {match[1]}, and stands among the scans. {advice}")


def paths_text(paths: Sequence[Path], folder: Path) -> str:
    """A few of the paths, from a folder, and how many more there are."""
    return some(f"{path.relative_to(folder)}{'/' if path.is_dir() else ''}" for path in paths)


# -- folders --


def _there(folder: Path) -> list[Path]:
    """The content of a folder, in order, without hidden files, such as macOS adds for each file of an archive."""
    return [p for p in sorted(folder.iterdir()) if not p.name.startswith(".")] if folder.is_dir() else []


def _is_scan(path: Path) -> bool:
    return ending_of(path) not in ("", ".h5")


def _scans_in(folder: Path) -> dict[str, Path]:
    """Name -> file of the scans in a folder."""
    files: dict[str, Path] = {}
    for path in filter(_is_scan, _there(folder)):
        if scan_name(path) in files:
            raise UserError(f"{files[scan_name(path)]} and {path} have one name. Keep one of them.")
        files[scan_name(path)] = path
    return files


def _unread_in(folder: Path) -> list[Path]:
    """The other files of a folder, without the voxels of a .mhd."""
    there = _there(folder)
    headers = {path.stem for path in there if path.suffix.lower() == ".mhd"}
    return [p for p in there if not _is_scan(p) and not (p.suffix.lower() in (".raw", ".zraw") and p.stem in headers)]


def _loose(source: Path) -> list[Path]:
    """Scans next to the folders of a layout, and folders of scans that belong to no layout."""
    cases = ({"image"}, {"lgemri"})
    return [
        path
        for path in _there(source)
        if (path.is_file() and _is_scan(path))
        or (
            path.is_dir()
            and path.name not in FOLDERS
            and any(map(_is_scan, _there(path)))
            and not any(name <= {scan_name(p) for p in _there(path) if _is_scan(p)} for name in cases)
        )
    ]


def _in_two_folders(images: Path, labels: Path, unread: list[Path], literal: bool = False) -> list[Source]:
    """The scans of two folders. Other files there are added to `unread`.

    Files NAME_0000, NAME_0001, ..., as nnU-Net has them, are the channels of the scan NAME, unless labels have such
    names too or `literal` is set.
    """
    scans, label_files = _scans_in(images), _scans_in(labels)
    others = _unread_in(images)
    unread += [*others, *_unread_in(labels)]
    more: dict[str, tuple[Path, ...]] = {}
    if not literal and not scans.keys() & label_files.keys():
        numbered = by_number(list(scans.values()))
        if sum(map(len, numbered.values())) == len(scans) and any(name.endswith("_0000") for name in scans):
            channels = {name: in_order(name, files, images) for (_, name), files in numbered.items()}
            scans = {name: files[0] for name, files in channels.items()}
            more = {name: files[1:] for name, files in channels.items()}
    _refuse_orphans([label_files[name] for name in label_files if name not in scans], images, others)
    refuse_labels_among(list(scans.values()), f"Move it to {labels} under that scan's name, or elsewhere.")
    _refuse_unread_labels(_unread_in(labels), {name: label_files.get(name) for name in scans})
    return [Source(name, path, label_files.get(name), more=more.get(name, ())) for name, path in scans.items()]


def _in_nnunet_folders(source: Path, unread: list[Path]) -> tuple[list[Source], list[Source], list[Source]]:
    """The scans of imagesTr, and those of imagesTs with and without label; the latter are training scans."""
    images, labels = source / "imagesTr", source / "labelsTr"
    literal = bool(_scans_in(images).keys() & _scans_in(labels).keys())
    training = _in_two_folders(images, labels, unread)
    more = _in_two_folders(source / "imagesTs", source / "labelsTs", unread, literal=literal)
    tested = [replace(scan, split="test") for scan in more if scan.label is not None]
    split = "train" if tested else ""
    others = [replace(scan, split=split) for scan in more if scan.label is None]
    return [replace(scan, split=split) for scan in training], tested, others


def _in_case_folders(source: Path, image: str, label: str, unread: list[Path]) -> list[Source]:
    folders = [folder for folder in _there(source) if folder.is_dir() and folder.name not in FOLDERS]
    inside = {folder.name: _scans_in(folder) for folder in folders}
    _refuse_orphans([scans[label] for scans in inside.values() if label in scans and image not in scans], source)
    for folder in folders:
        scans = inside[folder.name]
        others = [p for p in _unread_in(folder) if p.name.split(".")[0] in (image, label)]
        unread += others
        if image in scans:
            _refuse_unread_labels(others, {label: scans.get(label)})
            beside = [path for name, path in scans.items() if name not in (image, label)]
            unread += beside
            if beside and label not in scans:
                called = f"{label}{ending_of(beside[0])}"
                raise UserError(
                    f"{beside[0]} lies beside {scans[image].name}, which has no {called} and would be trained on "
                    f"without its label. If this is the label, rename it to {called}; else move it away."
                )
    return [Source(name, scans[image], scans.get(label)) for name, scans in inside.items() if image in scans]


def _refuse_orphans(labels: Sequence[Path], where: Path, unread: Sequence[Path] = ()) -> None:
    if labels:
        there = f" Not read there: {paths_text(unread, where)}." if unread else ""
        have = "has" if len(labels) == 1 else "have"
        scans, advice = _scans_in(where), "Add the scans or remove the labels."
        match = LABEL_OF.fullmatch(scan_name(labels[0]))
        if match and match[1] in scans:
            advice = f"A label has the name of its scan: rename {labels[0].name} to {match[1]}{ending_of(labels[0])}."
        raise UserError(f"{counted(len(labels), 'label')} {have} no scan in {where}: {some(labels)}. {advice}{there}")


def _refuse_unread_labels(unread: Sequence[Path], labels: dict[str, Path | None]) -> None:
    """Refuses a file of the `unread` ones among the labels that is called as a scan is, so that this scan's label would
    be missing, or another file. `labels` are by the name of the scan, None if it has none that can be read.
    """
    for path in unread:
        called = path.name.lower()
        for name, label in labels.items():
            same = called == name.lower() or called.startswith(f"{name.lower()}.")
            if same and not (label is not None and path.suffix.lower() in NOTES):
                raise UserError(
                    f"{path} looks like the label of {name}, and is no format that is read here: "
                    f"{', '.join(e for e in WRITTEN_AS if e != '.h5')}. Convert it to one of them, or move it away."
                )


# -- dataset.json, a CSV, and the split --


def _absent(dataset: dict[str, Any], scans: Sequence[Source], left_out: Sequence[str]) -> list[str]:
    """Names in the Decathlon's list of training scans whose scan or label is missing."""
    there = {scan.name: scan.label is not None for scan in scans} | dict.fromkeys(left_out, False)
    names, entries = [], dataset.get("training", [])
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("image"), str):
            name = scan_name(Path(entry["image"]))
            if not there.get(name, there.get(name.removesuffix("_0000"), False)):
                names.append(name)
    return names


def read_manifest(path: Path) -> tuple[list[Source], list[str]]:
    """The rows of a CSV with the column image, or several image_NAME, one for each channel, and, optionally, label,
    split, name and patient; and the names of the channels, if there are several.

    Raises:
        UserError: unreadable, other columns, an empty image, a split other than train and test.
    """
    try:
        reader = csv.DictReader(read_text(path).splitlines(), skipinitialspace=True)
        columns = [name.strip() for name in reader.fieldnames or ()]
        while columns and not columns[-1]:  # a spreadsheet may leave empty cells at the end
            columns.pop()
        reader.fieldnames = columns
        rows = [(reader.line_num, row) for row in reader]
    except (OSError, ValueError, csv.Error) as e:
        raise UserError(f"cannot read {path}: {e}. It must be a CSV with the column image.") from e
    images = [name for name in columns if name == "image" or name.startswith("image_")]
    unknown = [name for name in columns if name not in (*images, *COLUMNS)]
    twice = len({*columns}) < len(columns)
    if not images or (len(images) > 1 and "image" in images) or unknown or twice:
        raise UserError(
            f"{path} has the columns {', '.join(columns) or 'none'}. Use image and, if wanted, label, split, name, "
            "patient, each once, with commas between them; several channels are a column image_NAME each."
        )
    scans = []
    for line, row in rows:
        beyond = [cell for cell in row.pop(None, []) if cell.strip()]
        if beyond:
            raise UserError(
                f"{path}, line {line}: there is no column for {some(beyond)}. Quote names that hold a comma."
            )
        if not any((cell or "").strip() for cell in row.values()):
            continue
        values = {name: (row.get(name) or "").strip() for name in (*images, *COLUMNS)}
        empty = [name for name in images if not values[name]]
        if empty or values["split"] not in ("", "train", "test"):
            what = (
                f"the column {empty[0]} is empty, and an image is needed" if len(images) > 1 else "an image is needed"
            )
            raise UserError(f"{path}, line {line}: {what}, and the split must be train, test or nothing.")
        image, *more = (path.parent / values[name] for name in images)
        label = path.parent / values["label"] if values["label"] else None
        name = values["name"] or scan_name(image)
        scans.append(Source(name, image, label, values["split"], tuple(more), values["patient"]))
    return scans, [name.removeprefix("image_") for name in images] if len(images) > 1 else []


def _distinct(scans: list[Source], where: Path) -> list[Source]:
    twice = [name for name, count in Counter(scan.name for scan in scans).items() if count > 1]
    if twice or not scans:
        raise UserError(f"{where} names {some(twice) or 'no scan'}{' twice' if twice else ''}. Name each once.")
    for scan in scans:
        if not scan.name.isprintable() or Path(scan.name).name != scan.name or scan.name != scan.name.strip():
            raise UserError(f"{where} names {scan.name!r}, which is not a valid case name. Give it a plain name.")
    return scans
