"""Weights to hand on, as `python -m tools.share` writes them: safetensors files that each hold some of the weights.

The metadata of every file holds one JSON text: what a checkpoint states about its run, and a checksum of all weights.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.errors import UserError

ENDING = ".safetensors"
PIECES = f"weights-*-of-*{ENDING}"
METADATA = "checkpoint"  # one key, as safetensors writes several in any order
CHECKSUM = "sha256"
NO_TENSORS = "no_tensors"  # names of entries left out, such as the state of a critic's optimizer


def checksum_of(about: dict[str, Any], weights: Iterable[tuple[str, Tensor]]) -> str:
    """The SHA-256 of the weights, whatever their order, and of what is stated about them."""
    sha = hashlib.sha256(json.dumps({**about, CHECKSUM: ""}, sort_keys=True).encode())
    for name, weight in sorted(weights, key=lambda entry: entry[0]):
        sha.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        sha.update(weight.detach().contiguous().numpy().data)
    return sha.hexdigest()


def read_shared(folder: Path) -> dict[str, Any]:
    """The contents of a checkpoint without an optimizer, from all files of one tools.share.

    Raises:
        UserError: files that are missing, damaged, of other weights, or no such files.
    """
    files = sorted(folder.glob(PIECES))
    if not files:
        raise UserError(f"{folder} holds no file {PIECES} of tools.share. Give the folder or a file that it wrote.")
    names = {path.name for path in files}
    if names != {f"weights-{i}-of-{len(files)}{ENDING}" for i in range(1, len(files) + 1)}:
        raise UserError(f"{folder} lacks files of its weights; it has only {', '.join(sorted(names))}. Copy them all.")
    weights: dict[str, Any] = {}
    texts = set()
    for path in files:
        text, some = _read_piece(path)
        texts.add(text)
        weights |= some
    if len(texts) > 1:
        raise UserError(f"{folder} holds pieces of different weights. Delete them and copy those of one run.")
    try:
        about = json.loads(texts.pop())
        whole = about[CHECKSUM] == checksum_of(about, weights.items())
        weights |= dict.fromkeys(about.pop(NO_TENSORS))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{files[0]} holds no weights of this project ({e!r}). Use files of tools.share.") from e
    if not whole:
        raise UserError(f"{folder} is damaged: the checksum of {', '.join(sorted(names))} is wrong. Copy them again.")
    saved = max(path.stat().st_mtime_ns for path in files)
    return {**about, "method": weights, "optimizer": None, "file": str(folder), "saved": saved}


def _read_piece(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The metadata and the weights of one file, on the CPU."""
    try:
        with safe_open(path, framework="pt") as f:
            return (f.metadata() or {}).get(METADATA, ""), {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is incomplete or holds no weights ({e}). Copy it again.") from e
