"""Weights to hand on: a trained run's, in files small enough for a repository.

    python -m tools.share runs/la/dtml-16-seed1337 weights/dtml-16
    python test_la.py --checkpoint weights/dtml-16

The weights are safetensors files, with the run's options and the paths that they name as JSON metadata. They hold what
test_la.py and predict.py need. They hold no optimizer, so no training goes on from them. Kernels are rounded to half
precision, unless --exact is given; biases and batch norms stay as they are. A file holds whole tensors and is below
--piece-mib, if no tensor is larger.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from methods import restore
from utils.checkpoint import load_checkpoint, write_whole
from utils.errors import UserError, run
from utils.options import option, read_flags
from utils.shared_weights import CHECKSUM, ENDING, METADATA, NO_TENSORS, checksum_of

KEPT = (  # of a checkpoint
    "format", "options", "iteration", "seconds", "checksums", "images", "processes", "spacing", "orientation",
    "channel_names",
    "class_names", "best", "saved_as",
)  # fmt: skip
OVERHEAD = 256  # bytes of a file's header for each tensor, at most


@dataclasses.dataclass
class Options:
    """Of what, where, and how small."""

    run: str = option("", "run folder or .pt file of train_dtml.py", word="RUN")
    folder: str = option("", "where to write the weights", word="FOLDER")
    piece_mib: int = option(15, "largest file, in MiB", minimum=1)
    exact: bool = option(False, "kernels in the precision of the run, twice as large")


def rounded(weight: Tensor) -> Tensor:
    """A kernel in half precision, if no value overflows there; any other tensor as it is."""
    if weight.dim() < 2 or weight.dtype != torch.float32:
        return weight
    half = weight.half()
    return half if half.isfinite().all() else weight


def pieces(weights: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Divides the weights, in their order, so that each part is below `limit` bytes or one tensor."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, weight in weights.items():
        cost = OVERHEAD + weight.numel() * weight.element_size()
        if parts[-1] and size + cost > limit:
            parts.append({})
            size = 0
        parts[-1][name] = weight
        size += cost
    return parts


def share(checkpoint: Path, folder: Path, o: Options) -> list[Path]:
    """Writes the weights of a checkpoint into a folder; returns the files.

    Raises:
        UserError: a checkpoint that cannot be loaded or does not fit, a folder that holds one or cannot be written.
    """
    state = load_checkpoint(checkpoint)
    restore(state)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file. Name a folder for the weights.")
    there = sorted([*folder.glob("*.pt"), *folder.glob(f"*{ENDING}")])
    if there:
        raise UserError(f"{there[0]} is there already. Name another folder for the weights, or delete it first.")
    entries = state["method"]
    # a copy of each, as safetensors takes no two tensors of the same memory
    weights = {name: value.contiguous().clone() for name, value in entries.items() if isinstance(value, Tensor)}
    weights = weights if o.exact else {name: rounded(weight) for name, weight in weights.items()}
    state = {"saved_as": Path(state["file"]).name, **state}
    about: dict[str, Any] = {name: state[name] for name in KEPT if name in state}
    about[NO_TENSORS] = [name for name in entries if name not in weights]
    about[CHECKSUM] = checksum_of(about, weights.items())
    text = json.dumps(about)
    parts = pieces(weights, o.piece_mib * 2**20 - 2 * len(text) - OVERHEAD)  # its quotation marks are escaped
    written = []
    for i, part in enumerate(parts, 1):
        path = folder / f"weights-{i}-of-{len(parts)}{ENDING}"
        write_whole(path, save(part, {METADATA: text}))
        written.append(path)
    restore(load_checkpoint(folder))
    return written


def main(argv: list[str] | None = None) -> None:
    """Writes the weights, and reports how large they are."""
    o: Options = read_flags(Options, __doc__, "python -m tools.share", argv)
    for path in share(Path(o.run), Path(o.folder), o):
        print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")
    print(f"test them: python test_la.py --checkpoint {Path(o.folder)}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
