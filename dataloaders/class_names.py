"""Class names from dataset.json, the format of the Medical Segmentation Decathlon and nnU-Net."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.text import read_text

DATASET = "dataset.json"


def read_dataset(path: Path) -> dict[str, Any]:
    """Content of a dataset.json; an empty dict if the file is missing.

    Raises:
        UserError: if the file cannot be read or does not hold a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"cannot read {path}: {e}. Fix it or move it away.") from e
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object, as the Decathlon's and nnU-Net's do. Fix it or move it away.")
    return content


def class_names(folder: Path) -> dict[int, str]:
    """Label value -> class name, from the folder's dataset.json, without the background.

    Two forms are read: {"0": "background", "1": "liver"} and {"background": 0, "liver": 1}. Regions of several values,
    as nnU-Net allows, are skipped.

    Raises:
        UserError: if dataset.json cannot be read or has other content.
    """
    return names_in(read_dataset(folder / DATASET), folder / DATASET)


def names_in(content: dict[str, Any], path: Path) -> dict[int, str]:
    """`class_names` from the content of the dataset.json at `path`."""
    labels = content.get("labels", {})
    names: dict[int, str] = {}
    for key, value in labels.items() if isinstance(labels, dict) else [("", None)]:
        if isinstance(value, list) and len(value) > 1 and all(type(v) is int for v in value):
            continue
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if key.isdecimal() and isinstance(value, str):
            number, name = int(key), value
        elif type(value) is int or (isinstance(value, str) and value.isdecimal()):
            number, name = int(value), key
        else:
            raise UserError(
                f'{path} has labels that are neither {{"1": "liver"}} nor {{"liver": 1}}: {json.dumps(labels)[:80]}. '
                "Fix it or move it away."
            )
        if number in names:
            raise UserError(f"{path} has two names of the label {number}: {names[number]}, {name}. Keep one of them.")
        names[number] = name
    plain = {number: "".join(c for c in " ".join(name.split()) if c.isprintable()) for number, name in names.items()}
    return {number: plain[number] for number in sorted(plain) if number > 0}


def named_classes(names: Mapping[int, str] | Mapping[str, str]) -> str:
    """Class -> name as a text: 1 anterior, 2 posterior."""
    return ", ".join(f"{c} {name}" for c, name in names.items())


def refuse_other_numbers(
    names: Mapping[int, str], where: object, trained: Mapping[int, str], checkpoint: object
) -> None:
    """Checks that no class has the name of another one.

    Args:
        names, where: class -> name, and what states them.
        trained, checkpoint: the same of a checkpoint. Names that only one of the two has are left alone.

    Raises:
        UserError: naming the classes with other numbers.
    """
    differ = []
    for c, name in names.items():
        there = [number for number, other in trained.items() if other.casefold() == name.casefold()]
        if there and c not in there:
            differ.append(f"{name} is class {c} and class {there[0]}")
    if differ:
        raise UserError(
            f"{where} and {checkpoint} number the classes in different ways: {'; '.join(differ)}. They need the same "
            "order; --labels of tools.convert chooses it."
        )
