"""The channels of a data set: their number, and their names in its dataset.json.

dataset.json names them in nnU-Net's form, {"channel_names": {"0": "T1", "1": "T2"}}, or in the Decathlon's, where the
key is "modality".
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py

from dataloaders.cases import case_file
from dataloaders.class_names import DATASET, read_dataset
from dataloaders.lists import lists_of
from utils.errors import UserError


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
