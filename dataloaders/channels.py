"""The channels of a scan: from several files or a 4-D NIfTI, and their names in dataset.json.

dataset.json names them in nnU-Net's form, {"channel_names": {"0": "T1", "1": "T2"}}, or in the Decathlon's, where the
key is "modality".
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from dataloaders.cases import CaseError, case_file, lists_of
from dataloaders.class_names import DATASET, read_dataset
from dataloaders.geometry import DEFAULT_GEOMETRY
from dataloaders.images import Geometry, ending_of, normalise, read_image, same_grid, scan_name
from utils.channels import with_channels
from utils.errors import UserError
from utils.text import some

NUMBERED = re.compile(r"(.+)_(\d{4})")
"""nnU-Net's name of one channel's file, without its ending: NAME_0000, NAME_0001, ..."""


def channel_names_in(content: dict[str, Any], path: Path) -> list[str]:
    """Names of the channels from the content of the dataset.json at `path`; [] if it states none.

    Raises:
        UserError: for keys that are not 0, 1, ... in full, or names that are no text.
    """
    key = next((key for key in ("channel_names", "modality") if key in content), None)
    if key is None:
        return []
    names = content[key]
    numbers = [str(i) for i in range(len(names))] if isinstance(names, dict) else []
    if not numbers or sorted(names) != sorted(numbers) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f'{path} has {key} that are not {{"0": "T1", "1": "T2"}}: {json.dumps(names)[:80]}. Fix it.')
    return ["".join(c for c in " ".join(names[i].split()) if c.isprintable()) or f"channel {i}" for i in numbers]


def channel_names(folder: Path, channels: int) -> list[str]:
    """Names of the K channels of a data set; `channel 0`, `channel 1`, ... where its dataset.json states none.

    Raises:
        UserError: if dataset.json names another number of channels, more than one, or cannot be read.
    """
    names = channel_names_in(read_dataset(folder / DATASET), folder / DATASET)
    if len(names) > 1 and len(names) != channels:
        raise UserError(
            f"{folder / DATASET} names {len(names)} channels ({', '.join(names)}), and the cases have {channels}. Fix "
            "the names, or convert the cases again."
        )
    return names if len(names) == channels else [f"channel {i}" for i in range(channels)]


def refuse_other_channels(folder: Path, trained: Sequence[str]) -> None:
    """Checks that a set has the channels that a network was trained on, in their order.

    Raises:
        UserError: if both name several channels, and not the same.
    """
    names = channel_names(folder, len(trained))
    unnamed = [f"channel {i}" for i in range(len(trained))]
    if len(trained) > 1 and names != list(trained) and unnamed not in (names, list(trained)):
        raise UserError(
            f"the channels of {folder} are {', '.join(names)}, and the network was trained on {', '.join(trained)}. "
            "Give it these, in this order."
        )


def channels_of_set(folder: Path) -> int:
    """K of the first training case that can be opened; 1 if there is none, which is reported elsewhere."""
    with suppress(UserError):
        for name in lists_of(folder)[0]:
            with suppress(Exception), h5py.File(case_file(folder, name), "r") as f:  # as in read_case
                shape = f["image"].shape
                return shape[0] if len(shape) == 4 else 1
    return 1


def read_channels(paths: Sequence[Path]) -> tuple[NDArray[np.float32], Geometry]:
    """Reads a scan from one file, or from a file for each channel: image (W,H,D) or (K,W,H,D), and its geometry.

    Raises:
        CaseError: as `read_image`, for several files with the path in front; if two files differ in shape or geometry,
            or one of several has channels of its own.
    """
    if len(paths) == 1:
        return read_image(paths[0])
    channels: list[NDArray[np.float32]] = []
    first: Geometry = {}
    for path in paths:
        try:
            image, geometry = read_image(path)
        except CaseError as e:
            raise CaseError(f"{path} {e}") from e
        if image.ndim != 3:
            raise CaseError(f"{path} has {len(image)} channels, where a file for each channel has one")
        if ending_of(path) == ".h5":  # whose intensities are scaled already, unlike those of the other files
            raise CaseError(
                f"{path} is an h5 case, which holds all channels of a scan. Give that, or the scan's own files"
            )
        first = first or geometry
        if channels and not same_grid(
            channels[0].shape, {**DEFAULT_GEOMETRY, **first}, image.shape, {**DEFAULT_GEOMETRY, **geometry}
        ):
            ours, theirs = described(channels[0].shape, first), described(image.shape, geometry)
            raise CaseError(
                f"{path} lies on another grid than {paths[0]}: {theirs} where that has {ours}. The channels of a scan "
                "must have the same voxels. Resample one onto the other"
            )
        channels.append(image)
    return np.stack(channels), first


def normalise_channels(image: NDArray[np.float32]) -> tuple[NDArray[np.float32], list[tuple[float, float]]]:
    """`normalise` of each channel of (W,H,D) or (K,W,H,D); the scaled image, and each channel's mean and sd before.

    Raises:
        CaseError: for a channel that is constant.
    """
    parts = [normalise(channel) for channel in with_channels(image)]
    scaled = parts[0][0] if image.ndim == 3 else np.stack([channel for channel, *_ in parts])
    return scaled, [(mean, sd) for _, mean, sd in parts]


def described(shape: Sequence[int], geometry: Geometry) -> str:
    """A grid in words: voxels, and what a file states of spacing, origin and direction."""
    parts = [f"{key} {' '.join(f'{v:g}' for v in values)}" for key, values in geometry.items()]
    return ", ".join([f"{tuple(shape)} voxels", *parts])


def refuse_number(image: NDArray, names: Sequence[str]) -> None:
    """Raises CaseError for an image that does not have the channels of these names."""
    there = len(image) if image.ndim == 4 else 1
    if there != len(names):
        listed = f" ({', '.join(names)})" if len(names) > 1 else ""
        raise CaseError(
            f"has {there} channel{'s' * (there > 1)}, where {len(names)}{listed} {'is' if len(names) == 1 else 'are'} "
            "needed"
        )


def by_number(files: Sequence[Path]) -> dict[tuple[Path, str], dict[int, Path]]:
    """Files called NAME_0000, NAME_0001, ... -> folder and NAME -> number -> file. Other files are left out."""
    scans: dict[tuple[Path, str], dict[int, Path]] = {}
    for file in files:
        if match := NUMBERED.fullmatch(scan_name(file)):
            scans.setdefault((file.parent, match[1]), {})[int(match[2])] = file
    return scans


def in_order(name: str, files: dict[int, Path], where: Path | str) -> tuple[Path, ...]:
    """The files of a scan's channels 0, 1, ...

    Raises:
        UserError: if numbers are missing between them.
    """
    missing = [f"{name}_{i:04}" for i in range(max(files)) if i not in files]
    if missing:
        raise UserError(
            f"{where} has no {some(missing)}, and {files[max(files)].name} is there. A scan needs all of its "
            "channels. Add what is missing."
        )
    return tuple(files[i] for i in sorted(files))
