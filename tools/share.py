"""Weights to hand on: a trained run's, in files small enough for a repository.

    python -m tools.share runs/la/dtml-16-seed1337 weights/dtml-16
    python test_la.py --checkpoint weights/dtml-16

They hold what test_la.py and predict.py need and no optimiser, so no training goes on from them. Kernels are rounded
to half precision, which --exact leaves out; biases and batch norms stay as they are. A file holds whole tensors and is
below --piece-mib, if no tensor is larger. The run's options go along, with the paths that they name.
"""

import dataclasses
import hashlib
import io
import sys
from pathlib import Path
from typing import Any

import torch

from methods import restore
from utils.checkpoint import load_checkpoint, tensors_in, write_whole
from utils.errors import UserError, run
from utils.options import Parser, fill, option

KEPT = (  # of a checkpoint
    "format", "options", "iteration", "seconds", "checksums", "images", "processes", "spacing", "orientation"
)  # fmt: skip
OVERHEAD = 512  # bytes beside each tensor's own, of the archive: at most


@dataclasses.dataclass
class Options:
    """How small."""

    piece_mib: int = option(15, "largest file, in MiB", minimum=1)
    exact: bool = option(False, "kernels in the precision of the run, twice as large")


def rounded(value: Any) -> Any:
    """A kernel in half precision, if that holds it; anything else as it is."""
    if not isinstance(value, torch.Tensor) or value.dim() < 2 or value.dtype != torch.float32:
        return value
    half = value.half()
    return half if half.isfinite().all() else value


def pieces(weights: dict[str, Any], limit: int) -> list[dict[str, Any]]:
    """The entries of a state_dict, in their order, parted so that each part is below `limit` bytes or one entry."""
    parts: list[dict[str, Any]] = [{}]
    size = 0
    for name, value in weights.items():
        cost = OVERHEAD + sum(OVERHEAD + tensor.numel() * tensor.element_size() for tensor in tensors_in(value))
        if parts[-1] and size + cost > limit:
            parts.append({})
            size = 0
        parts[-1][name] = value
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
    there = sorted(folder.glob("*.pt"))
    if there:
        raise UserError(f"{there[0]} is there already. Name another folder for the weights, or delete it first.")
    common = {name: state[name] for name in KEPT if name in state}
    head = len(_bytes(common))
    weights = {name: value if o.exact else rounded(value) for name, value in state["method"].items()}
    parts = pieces(weights, o.piece_mib * 2**20 - head)
    whole = hashlib.sha256(_bytes({**common, "method": weights})).hexdigest()
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for i, part in enumerate(parts, 1):
            path = folder / f"weights-{i}-of-{len(parts)}.pt"
            write_whole(path, _bytes({**common, "method": part, "optimizer": None, "whole": whole}))
            written.append(path)
    except OSError as e:
        raise UserError(f"cannot write to {folder}: {e.strerror or e}. Free some space or name another folder.") from e
    restore(load_checkpoint(folder))
    return written


def _bytes(state: dict[str, Any]) -> bytes:
    """A file's content."""
    data = io.BytesIO()
    torch.save(state, data)
    return data.getvalue()


def main(argv: list[str] | None = None) -> None:
    """Writes the weights, and reports how large they are."""
    parser = Parser(description=__doc__, prog="python -m tools.share")
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder or .pt file of train_dtml.py")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where to write the weights")
    parser.add_dataclass(Options)
    given = parser.parse(argv)
    written = share(given["run"], given["folder"], fill(Options, given))
    for path in written:
        print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")
    print(f"test them: python test_la.py --checkpoint {given['folder']}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
