"""What a run that diverged leaves for looking into: the batch, where its crops lie, and the weights it met."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.augmentation import draw_augmentation
from dataloaders.two_stream import Patches, Slot, TwoStreamBatchSampler, collate
from utils.checkpoint import save_checkpoint
from utils.errors import Diverged, UserError


def batch_of(patches: Patches, sampler: TwoStreamBatchSampler, iteration: int) -> tuple[dict, list[dict[str, Any]]]:
    """The batch of an iteration, made again, and for each crop case, slot, start, size, turns and flip."""
    step = iteration * sampler.ranks + sampler.rank
    slots = [Slot(step, slot, case) for slot, case in enumerate(sampler.cases(step))]
    boxes = []
    for slot in slots:
        generator = np.random.default_rng([patches.seed, 1, slot.step, slot.slot])
        for _ in range(1 + patches.other):
            shape = patches.volumes.shapes[slot.case]
            draw = draw_augmentation(generator, shape, patches.patch_size, patches.augment)
            boxes.append({"case": patches.volumes.cases[slot.case].name, "slot": slot.slot, **dataclasses.asdict(draw)})
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
