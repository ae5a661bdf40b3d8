"""Diagnostic files of diverged runs: the batch, the positions of its crops, and the weights."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dataloaders.two_stream import Patches, TwoStreamBatchSampler, collate
from utils.checkpoint import save_checkpoint
from utils.errors import Diverged, UserError


def batch_of(patches: Patches, sampler: TwoStreamBatchSampler, iteration: int) -> tuple[dict, list[dict[str, Any]]]:
    """Makes the batch of an iteration again.

    Returns:
        The batch, and for each crop its case, slot and Draw.
    """
    slots = sampler.slots(iteration)
    boxes = [
        {"case": patches.volumes.cases[slot.case].name, "slot": slot.slot, **dataclasses.asdict(draw)}
        for slot in slots
        for draw in patches.draws(slot)[0]
    ]
    return collate([patches[slot] for slot in slots]), boxes


@contextmanager
def kept_for_diagnosis(
    folder: Path, patches: Patches, sampler: TwoStreamBatchSampler, contents: Callable[[int], dict[str, Any]]
) -> Iterator[None]:
    """Context that writes folder/diverged-rankR.pt if the training inside diverges.

    The file is a checkpoint that also holds the batch. Only processes with a loss or gradient that is not finite write
    it.

    Args:
        folder: folder of the file.
        patches, sampler: those of the training, to make the batch again.
        contents: iteration -> contents of a checkpoint.

    Raises:
        Diverged: the original error, with the path of the file in the message.
    """
    try:
        yield
    except Diverged as e:
        if e.iteration is None or not e.here:
            raise
        batch, boxes = batch_of(patches, sampler, e.iteration)
        extra = {"error": str(e), "rank": sampler.rank, "batch": batch, "boxes": boxes}
        try:
            path = save_checkpoint(folder, {**contents(e.iteration), **extra}, name=f"diverged-rank{sampler.rank}.pt")
        except UserError as full:
            raise Diverged(f"{e} Its batch could not be kept: {full}", e.iteration) from e
        raise Diverged(f"{e} Look into it with --from-diagnostic {path}.", e.iteration) from e
