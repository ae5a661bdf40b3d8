"""The scans that a command line names: files, patterns, folders of scans, and folders of a DICOM series."""

import glob
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from dataloaders.cases import CaseError
from dataloaders.channels import NUMBERED, by_number, in_order
from dataloaders.dicom import Series, is_damaged, is_dicom, series_in
from dataloaders.images import WRITTEN_AS, ending_of, scan_name
from dataloaders.nifti import channels_in
from tools.sources import refuse_labels_among
from utils.errors import UserError
from utils.text import refuse_bytes, some

DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
UID = re.compile(r"[0-9.]+")


@dataclass(frozen=True)
class Scan:
    """A scan to predict."""

    name: str
    files: tuple[Path, ...]
    """One file, or one for each channel; of a DICOM series its folder."""
    slices: tuple[str, ...] = ()
    """The files of a DICOM series, in the order of the slices."""

    @property
    def shown(self) -> str:
        """Where it is, in a message; of a DICOM series with its name, if that is not the folder's."""
        named = f" ({self.name})" if self.slices and self.name != self.files[0].name else ""
        return f"{self.files[0]}{named}"


def given_scans(words: Sequence[str], series: Sequence[str], channels: int) -> list[Scan]:
    """The scans, in the order of the words and of the names in a folder.

    For a network that takes several channels, files NAME_0000, NAME_0001, ... in any order are one scan NAME. Scans of
    one name in folders of different names get the folder's name in front.

    Args:
        words: files; folders of scans or of a DICOM series; patterns of these; files of channels, joined by commas.
        channels: K, that the network takes.
        series: the words of --series, of which each must fit a series in one of the folders.

    Raises:
        UserError: for what is missing or no scan; a folder without scans, or with several series of which none is
            named; a word that fits none. All of them are named together. Channels that are missing in a scan; a
            label among the scans.
    """
    scans: list[Scan] = []
    problems: list[str] = []
    seen: set[str] = set()
    for word in words:
        if "," in word and not Path(word).exists():
            try:
                files = tuple(file_of(Path(part)).files[0] for part in word.split(","))
                scans.append(Scan(unnumbered(scan_name(files[0])), files))
            except UserError as e:
                problems.append(str(e))
            continue
        paths = sorted(map(Path, glob.glob(word))) if glob.has_magic(word) and not Path(word).exists() else [Path(word)]
        scanned = [path for path in paths if path.is_dir() or ending_of(path)] if len(paths) > 1 else paths
        if not scanned:
            problems.append(f"nothing matches {word}.")
        for path in scanned:
            try:
                scans += scans_in(path, series, seen) if path.is_dir() else [file_of(path)]
            except UserError as e:
                problems.append(str(e))
    problems += [f"--series {word} is in none of the folders." for word in series if word not in seen and not problems]
    if problems:
        raise UserError("\n".join(problems))
    if not scans:
        raise UserError(f"no scan is given. Give files that end in {', '.join(WRITTEN_AS)}, or folders.")
    refuse_labels_among(
        [file for scan in scans for file in scan.files], "Move it away, or give the scans alone: a pattern, or each."
    )
    if channels > 1:
        scans = grouped(scans)
    elif all(scan.name.endswith("_0000") for scan in scans):  # of the only channel
        scans = [replace(scan, name=unnumbered(scan.name)) for scan in scans]
    return told_apart(scans)


def told_apart(scans: Sequence[Scan]) -> list[Scan]:
    """The same, with the folder's name in front of a name that several have, if that tells all of these apart."""
    alike: dict[str, list[Path]] = {}
    for scan in scans:
        alike.setdefault(scan.name, []).append(scan.files[0].absolute().parent)
    apart = {name for name, folders in alike.items() if 1 < len(folders) == len({folder.name for folder in folders})}
    return [
        replace(scan, name=f"{scan.files[0].absolute().parent.name}_{scan.name}") if scan.name in apart else scan
        for scan in scans
    ]


def unnumbered(name: str) -> str:
    """NAME of NAME_0000, and any other name as it is."""
    match = NUMBERED.fullmatch(name)
    return match[1] if match else name


def grouped(scans: Sequence[Scan]) -> list[Scan]:
    """The same with the files NAME_0000, NAME_0001, ... of a folder as one scan NAME, where the first of them stands.

    An h5 case and a 4-D NIfTI hold all channels of their scan, whatever their names.

    Raises:
        UserError: if numbers are missing between those of a scan.
    """
    alone = [scan for scan in scans if len(scan.files) == 1 and not scan.slices and not _is_whole(scan.files[0])]
    numbered = by_number([scan.files[0] for scan in alone])
    groups: dict[tuple[Path, str], Scan] = {}
    for scan in scans:
        first = scan.files[0]
        key = (first.parent, unnumbered(scan.name)) if scan in alone else (first, scan.name)
        if key in numbered and key not in groups:
            groups[key] = Scan(key[1], in_order(key[1], numbered[key], "what is given"))
        elif key not in numbered:
            groups[(first, scan.name)] = scan
    return list(groups.values())


def _is_whole(path: Path) -> bool:
    """Whether a file is an h5 case or a 4-D NIfTI. One that cannot be read is not; its error is raised later."""
    if ".nii" in ending_of(path) and NUMBERED.fullmatch(scan_name(path)):
        with suppress(CaseError):
            return channels_in(path) > 1
    return ending_of(path) == ".h5"


def file_of(path: Path) -> Scan:
    """The scan of a file.

    Raises:
        UserError: it is missing, no format that is read, or its name is no text in this locale.
    """
    refuse_bytes(str(path))
    if path.suffix.lower() in DICOM_ENDINGS and path.is_file():
        raise UserError(f"{path} is one slice of a DICOM series. Give its folder, {path.parent}.")
    if not path.exists():
        raise UserError(f"there is no {path}. Give files that end in {', '.join(WRITTEN_AS)}, or folders.")
    if not ending_of(path):
        raise UserError(f"{path} is no scan: files end in {', '.join(WRITTEN_AS)}, and a DICOM series is a folder.")
    return Scan(scan_name(path), (path,))


def scans_in(folder: Path, chosen: Sequence[str], seen: set[str]) -> list[Scan]:
    """The scans in a folder, not in its subfolders: its files in the order of their names, or its DICOM series.

    Args:
        folder: the folder. Hidden files are left alone, other files that are not read are named on stderr.
        chosen: the words of --series.
        seen: gets those of them that fit a series here.

    Raises:
        UserError: no scan; scans and DICOM together; several series of which not one is chosen; a damaged
            DICOM file; a name that is no text in this locale.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    scans = [path for path in files if ending_of(path)]
    dicom = [path for path in files if path.suffix.lower() in DICOM_ENDINGS]
    for path in scans or files:
        refuse_bytes(str(path))
    if scans and dicom:
        raise UserError(f"{folder} holds both {scans[0].name} and {dicom[0].name}. Put DICOM into a folder of its own.")
    if scans:
        others = [path.name for path in files if not ending_of(path) and path.suffix.lower() not in (".raw", ".zraw")]
        if others:
            print(f"not read in {folder}: {some(others)}", file=sys.stderr)
        return [Scan(scan_name(path), (path,)) for path in scans]
    series = series_in(folder) if files else []
    if not series:
        inner = sorted(path.name for path in folder.iterdir() if path.is_dir())
        where = f" Its subfolders are not looked into: give '{folder}/*' for them." if inner else ""
        raise UserError(f"{folder} holds no file that ends in {', '.join(WRITTEN_AS)}, and no DICOM series.{where}")
    taken = chosen_series(folder, series, chosen)
    unread = {*files} - {Path(file) for some_series in series for file in some_series.files}
    slices = [path for path in unread if path.suffix.lower() in DICOM_ENDINGS or is_dicom(path)]
    damaged = [path.name for path in slices if is_damaged(path.read_bytes())]
    if damaged:  # GDCM leaves them out without a word, as it does with reports
        raise UserError(
            f"{folder} holds files that are cut short or no DICOM: {some(sorted(damaged))}. Copy them again, or move "
            "them away."
        )
    if unread:
        names = some(sorted(path.name for path in unread))
        print(f"not read in {folder}: {names}. If one of them is a slice, it is damaged.", file=sys.stderr)
    seen |= {word for word in chosen for one in taken if fits(word, one)}
    # An absolute path, as that of `.` has no name to give to the prediction.
    folder = folder if folder.name else folder.resolve()
    if len(taken) == 1:
        return [Scan(folder.name, (folder,), taken[0].files)]
    words = [re.sub(r"[^\w.-]+", "_", one.description) for one in series]
    clear = all(words) and len({word.casefold() for word in words}) == len(words)
    ends = {one.uid: word if clear else one.uid for one, word in zip(series, words, strict=True)}
    return [Scan(f"{folder.name}_{ends[one.uid]}", (folder,), one.files) for one in taken]


def fits(word: str, one: Series) -> bool:
    """Whether a word of --series is the UID or the description of a series, or `all`."""
    return word in (one.uid, "all") or word.casefold() == one.description.casefold()


def chosen_series(folder: Path, series: Sequence[Series], chosen: Sequence[str]) -> list[Series]:
    """The series to take of those in a folder: the ones that a word of --series fits.

    Without such a word, and if only UIDs are chosen, as of other folders, the only series.

    Raises:
        UserError: listing them, if there is none to take.
    """
    taken = [one for one in series if any(fits(word, one) for word in chosen)]
    if taken or (len(series) == 1 and all(UID.fullmatch(word) for word in chosen)):
        return taken or list(series)
    several = len({one.patient for one in series}) > 1
    listing = "\n".join(f"  {one}" + (f", patient {one.patient}" if several else "") for one in series)
    unfit = f", and --series {some(chosen)} fits none of them" if chosen else ""
    raise UserError(
        f"{folder} holds {len(series)} DICOM series{unfit}. Choose with --series: UIDs, descriptions, or all:\n"
        f"{listing}"
    )
