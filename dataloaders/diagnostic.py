"""What a run that diverged leaves for looking into: the batch, where its crops lie, and the weights it met."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dataloaders.two_stream import Patches, TwoStreamBatchSampler, collate
from utils.checkpoint import save_checkpoint
from utils.errors import Diverged, UserError


def batch_of(patches: Patches, sampler: TwoStreamBatchSampler, iteration: int) -> tuple[dict, list[dict[str, Any]]]:
    """The batch of an iteration, made again, and for each crop case, slot, start, size, turns and flip."""
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
    """If what runs inside diverges, writes folder/diverged-rankR.pt, a checkpoint (`contents` of the iteration) that
    holds the batch too, on each process whose loss or gradient it was.

    Raises:
        Diverged: again, naming the file.
    """
    try:
        yield
    except Diverged as e:
        if e.iteration is None or not e.here:
            raise
        batch, boxes = batch_of(patches, sampler, e.iteration)
        found = {"error": str(e), "rank": sampler.rank, "batch": batch, "boxes": boxes}
        try:
            path = save_checkpoint(folder, {**contents(e.iteration), **found}, name=f"diverged-rank{sampler.rank}.pt")
        except UserError as full:
            raise Diverged(f"{e} Its batch could not be kept: {full}", e.iteration) from e
        raise Diverged(f"{e} Look into it with --from-diagnostic {path}.", e.iteration) from e
