"""dataset.json, as the Medical Segmentation Decathlon and nnU-Net have it: the names of the classes."""

import json
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.text import read_text

DATASET = "dataset.json"


def read_dataset(path: Path) -> dict[str, Any]:
    """A dataset.json as the Decathlon and nnU-Net have it; nothing where there is none.

    Raises:
        UserError: it cannot be read, or is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        told = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"cannot read {path}: {e}. Fix it or move it away.") from e
    if not isinstance(told, dict):
        raise UserError(f"{path} holds no JSON object, as the Decathlon's and nnU-Net's do. Fix it or move it away.")
    return told


def class_names(folder: Path) -> dict[int, str]:
    """Value of a label -> name of its class, as the folder's dataset.json has it; the background is left out.

    Both forms are read, {"0": "background", "1": "liver"} and {"background": 0, "liver": 1}. A region of several
    values, as nnU-Net may have them, names no class.

    Raises:
        UserError: a dataset.json that cannot be read or has other content.
    """
    return names_in(read_dataset(folder / DATASET), folder / DATASET)


def names_in(told: dict[str, Any], path: Path) -> dict[int, str]:
    """`class_names` of the content of a dataset.json, at `path`."""
    labels = told.get("labels", {})
    found: dict[int, str] = {}
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
        if number in found:
            raise UserError(f"{path} has two names of the label {number}: {found[number]}, {name}. Keep one of them.")
        found[number] = name
    plain = {number: "".join(c for c in " ".join(name.split()) if c.isprintable()) for number, name in found.items()}
    return {number: plain[number] for number in sorted(plain) if number > 0}
