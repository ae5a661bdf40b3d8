"""The channels of a scan, from several files or a 4-D NIfTI."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataloaders.cases import CaseError
from dataloaders.geometry import complete_geometry
from dataloaders.images import Geometry, ending_of, read_image, same_grid, scan_name, z_score
from utils.channels import with_channels
from utils.errors import UserError
from utils.text import some

NUMBERED = re.compile(r"(.+)_(\d{4})")
"""nnU-Net's name of one channel's file, without its ending: NAME_0000, NAME_0001, ..."""


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
            channels[0].shape, complete_geometry(first), image.shape, complete_geometry(geometry)
        ):
            ours, theirs = described(channels[0].shape, first), described(image.shape, geometry)
            raise CaseError(
                f"{path} lies on another grid than {paths[0]}: {theirs} where that has {ours}. The channels of a scan "
                "must have the same voxels. Resample one onto the other"
            )
        channels.append(image)
    return np.stack(channels), first


def z_score_channels(image: NDArray[np.float32]) -> tuple[NDArray[np.float32], list[tuple[float, float]]]:
    """`z_score` of each channel of (W,H,D) or (K,W,H,D); the scaled image, and each channel's mean and sd before.

    Raises:
        CaseError: for a channel that is constant.
    """
    parts = []
    for i, channel in enumerate(with_channels(image)):
        try:
            parts.append(z_score(channel))
        except CaseError as e:
            raise CaseError(f"{e} in channel {i}" if image.ndim == 4 else str(e)) from e
    scaled = parts[0][0] if image.ndim == 3 else np.stack([channel for channel, *_ in parts])
    return scaled, [(mean, sd) for _, mean, sd in parts]


def described(shape: Sequence[int], geometry: Geometry) -> str:
    """A grid in words: voxels, and what a file states of spacing, origin and direction."""
    parts = [f"{key} {' '.join(f'{v:g}' for v in values)}" for key, values in geometry.items()]
    return ", ".join([f"{tuple(shape)} voxels", *parts])


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
