"""Two-stream batches: L labeled crops, then unlabeled ones, as a pure function of (seed, iteration)."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dataloaders.augmentation import (
    AXES,
    UNCHANGED,
    Draw,
    Strengths,
    Warp,
    degraded,
    draw_augmentation,
    draw_warp,
    random_intensities,
    turn_and_flip,
)
from dataloaders.geometry import known_spacing
from dataloaders.volumes import Volumes
from dataloaders.watched import TrackedPatches, WatchedLoader
from losses.mixing import paste, random_box
from losses.sdm import signed_distance_map
from utils.channels import with_channels
from utils.errors import StopSignal, ignore_stop_signals
from utils.resample import pad, padding

SDM_OF = ("crop", "scan")
MOST_VOXELS = 10_000
"""Voxels of a class of a case that crops are placed around; 240 kB in memory."""
PASTED = 1_000_000
"""Added to the number of a slot, it is that of the sample pasted into it, which so has random numbers of its own."""


class Slot(NamedTuple):
    """One sample of one batch."""

    step: int
    """Number of the batch, over all iterations and ranks."""
    slot: int
    """Position in the batch."""
    case: int
    """Index of the case."""


class TwoStreamBatchSampler(Sampler[list[Slot]]):
    """Batches of `labeled_batch` labeled and `batch_size - labeled_batch` unlabeled cases, labeled first.

    An epoch is one pass over the labeled cases, without replacement; both streams are shuffled at each epoch. An
    incomplete last batch of an epoch is dropped, as in the released codes. Several processes (ranks) take the batches
    of one sequence in turn.

    Args:
        labeled: number of labeled cases, with indices 0..labeled-1.
        unlabeled: number of unlabeled cases, with the next indices.
        batch_size: crops in a batch of one process.
        labeled_batch: labeled crops in a batch, at most `labeled`.
        start: first iteration.
        iterations: end of the training (exclusive).
    """

    def __init__(
        self,
        labeled: int,
        unlabeled: int,
        *,
        batch_size: int,
        labeled_batch: int,
        seed: int,
        start: int,
        iterations: int,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.labeled, self.unlabeled = labeled, unlabeled
        self.labeled_batch, self.unlabeled_batch = labeled_batch, batch_size - labeled_batch
        self.seed, self.start, self.iterations = seed, start, iterations
        self.rank, self.ranks = rank, ranks
        self.per_epoch = labeled // labeled_batch

    def __len__(self) -> int:
        return self.iterations - self.start

    def cases(self, step: int) -> list[int]:
        """Case indices of batch `step` of the sequence."""
        epoch, place = divmod(step, self.per_epoch)
        generator = np.random.default_rng([self.seed, 0, epoch])
        first = generator.permutation(self.labeled)[place * self.labeled_batch :][: self.labeled_batch]
        if self.unlabeled_batch == 0:
            return first.tolist()
        wanted = self.per_epoch * self.unlabeled_batch
        passes = -(-wanted // self.unlabeled)  # an epoch may use the unlabeled cases several times
        order = np.concatenate([generator.permutation(self.unlabeled) for _ in range(passes)])
        second = order[place * self.unlabeled_batch :][: self.unlabeled_batch]
        return first.tolist() + (self.labeled + second).tolist()

    def slots(self, iteration: int) -> list[Slot]:
        """The batch of an iteration on this process."""
        step = iteration * self.ranks + self.rank
        return [Slot(step, slot, case) for slot, case in enumerate(self.cases(step))]

    def __iter__(self) -> Iterator[list[Slot]]:
        return map(self.slots, range(self.start, self.iterations))


class Patches(Dataset[dict[str, Any]]):
    """Augmented crops, indexed by a Slot.

    An item holds image (K,w,h,d) float32 and case (its name, NAME with OTHER after `paste`). A labeled case also has
    label (w,h,d) uint8 and, with `sdm`, sdm (C,w,h,d) float32 in [-1,1].

    Args:
        patch_size: voxels of a crop along x, y, z.
        augment: one of AUGMENTATIONS.
        flip_axes: the axes of `augment` flip.
        sdm: whether to compute signed distance maps.
        other: whether to add other_image and other_label of a second, independent crop.
        intensity: strength of `random_intensities`; 0: none.
        sdm_of: compute distance maps in the 'crop', as in the released codes, or in the whole 'scan' before cropping.
        object_share: probability that a labeled crop is placed around a voxel of the object, see `onto_object`.
        paste: share of its sides that the box has inside of which a labeled crop is one of another labeled case, image,
            label and map alike; 0: none. A map of the crop is that of the mix, one of the scan each voxel's own scan's.
    """

    def __init__(
        self,
        volumes: Volumes,
        *,
        patch_size: Sequence[int],
        augment: str,
        seed: int,
        sdm: bool,
        other: bool = False,
        intensity: float = 0.0,
        sdm_of: str = "crop",
        object_share: float = 0.0,
        paste: float = 0.0,
        flip_axes: Sequence[str] = AXES,
        strengths: Strengths = UNCHANGED,
    ):
        self.volumes, self.patch_size, self.augment, self.seed = volumes, patch_size, augment, seed
        self.flip_axes, self.strengths = flip_axes, strengths
        self.sdm, self.other, self.intensity, self.sdm_of = sdm, other, intensity, sdm_of
        self.object_share, self.paste = object_share, paste
        self._labeled = [index for index, case in enumerate(volumes.cases) if case.labeled]
        self._distances: dict[int, Tensor] = {}
        self._objects: dict[int, list[NDArray[np.int64]]] = {}
        self._spacings: dict[int, tuple[float, ...]] = {}

    def draws(self, slot: Slot) -> tuple[list[Draw], np.random.Generator]:
        """Parameters of the crop of a slot, with `other` of the second crop too, and the generator after drawing."""
        shape = self.volumes.shapes[slot.case]
        generator = np.random.default_rng([self.seed, 1, slot.step, slot.slot])
        draws = [
            draw_augmentation(generator, shape, self.patch_size, self.augment, self.flip_axes)
            for _ in range(1 + self.other)
        ]
        if self.object_share and self.volumes.cases[slot.case].labeled:
            chance = np.random.default_rng([self.seed, 2, slot.step, slot.slot])  # the draws above stay as they are
            draws = [self.onto_object(draw, slot.case, chance) for draw in draws]
        if self.strengths.random_scale or self.strengths.random_rotation:
            places = np.random.default_rng([self.seed, 3, slot.step, slot.slot])
            draws = [dataclasses.replace(draw, **draw_warp(places, self.strengths)) for draw in draws]
        return draws, generator

    def onto_object(self, draw: Draw, case: int, chance: np.random.Generator) -> Draw:
        """The draw, with probability `object_share` moved so that a voxel of the object is the centre of its box.

        The class is drawn from those in the label, all alike, then a voxel of that class, all alike. At the border of
        the volume the box is moved inwards. An empty label leaves the draw as it is.
        """
        objects = self.objects_of(case)
        if chance.random() >= self.object_share or not objects:
            return draw
        voxels = objects[chance.integers(len(objects))]
        centre = voxels[chance.integers(len(voxels))].tolist()
        sides = zip(centre, draw.size, self.volumes.shapes[case], strict=True)
        start = tuple(min(max(x - size // 2, 0), max(side - size, 0)) for x, size, side in sides)
        return dataclasses.replace(draw, start=start)

    def objects_of(self, case: int) -> list[NDArray[np.int64]]:
        """Voxels (n,3) of each class in the label of a case, at most MOST_VOXELS each; read once and kept."""
        if case not in self._objects:
            self._objects[case] = voxels_of_classes(self.label_of(case).cpu().numpy())
        return self._objects[case]

    def label_of(self, case: int) -> Tensor:
        """The whole label (W,H,D) of a labeled case."""
        whole = tuple(slice(0, side) for side in self.volumes.shapes[case])
        _, label = self.volumes.read(case, whole)  # type: ignore[arg-type]
        assert label is not None
        return label

    def __getitem__(self, slot: Slot) -> dict[str, Any]:
        (own, *pasted), generator = self.slots_of(slot)
        item = self.sample(own)
        for other in pasted:
            inside = self.sample(other)
            item["case"] += f" with {inside['case']}"
            for names in (("image", "label", "sdm"), ("other_image", "other_label")):  # a second crop has its own box
                box = random_box(self.patch_size, self.paste, lambda n: int(generator.integers(n)))
                item |= {x: paste(item[x], inside[x], box.to(item[x].device)) for x in names if x in item}
        if self.sdm and self.sdm_of == "crop" and "label" in item:
            item["sdm"] = self.distances_of(item["label"], slot.case)
        return item

    def slots_of(self, slot: Slot) -> tuple[list[Slot], np.random.Generator]:
        """The slots of the samples in an item, and the generator after drawing them.

        They are its own and, with `paste` and a label, one of another labeled case, all alike, to paste in (CutMix).
        """
        generator = np.random.default_rng([self.seed, 5, slot.step, slot.slot])
        if not (self.paste and self.volumes.cases[slot.case].labeled):
            return [slot], generator
        others = [case for case in self._labeled if case != slot.case]
        return [slot, Slot(slot.step, slot.slot + PASTED, others[generator.integers(len(others))])], generator

    def sample(self, slot: Slot) -> dict[str, Any]:
        """The item of a slot before pasting, without distance maps of the crop."""
        draws, generator = self.draws(slot)
        item, *second = (self.crop(slot.case, draw) for draw in draws)
        for crop in (item, *second) if self.intensity else ():
            channels = [random_intensities(channel, generator, self.intensity) for channel in crop["image"]]
            crop["image"] = torch.stack(channels)
        s = self.strengths
        if s.random_bias or s.random_blur or s.random_resolution or s.random_noise:
            worse = np.random.default_rng([self.seed, 4, slot.step, slot.slot])
            for crop in (item, *second):
                channels = [degraded(channel, worse, s) for channel in crop["image"]]
                crop["image"] = torch.stack(channels)
        for crop in second:
            item |= {f"other_{name}": crop[name] for name in ("image", "label") if name in crop}
        return item

    def centre_crop(self, case: int) -> dict[str, Any]:
        """The crop at the centre of a case, without augmentation."""
        shape = self.volumes.shapes[case]
        start = tuple(max(side - s, 0) // 2 for side, s in zip(shape, self.patch_size, strict=True))
        return self.crop(case, Draw(start, tuple(self.patch_size), turns=0, flips=()))  # type: ignore[arg-type]

    def crop(self, case: int, draw: Draw) -> dict[str, Any]:
        """The item of a case with these parameters, without changes of the intensities."""
        shape = self.volumes.shapes[case]
        # Along sides shorter than the box the whole volume is taken and padded with zeros at both ends.
        box = tuple(slice(a, min(a + s, side)) for a, s, side in zip(draw.start, draw.size, shape, strict=True))
        margins = padding([s.stop - s.start for s in box], draw.size)
        if draw.warped:
            image, label = self.warped(case, draw)
        else:
            image, label = self.volumes.read(case, box)  # type: ignore[arg-type]
            image, label = pad(image, margins), None if label is None else pad(label, margins)
        item = {"image": with_channels(turn_and_flip(image, draw)), "case": self.volumes.cases[case].name}
        if label is not None:
            item["label"] = turn_and_flip(label, draw)
            if self.sdm and self.sdm_of == "scan":
                parts = [part[box] for part in self.distances_of_scan(case)]
                # Padding counts as background at the largest distance: +1, not 0.
                item["sdm"] = torch.stack([turn_and_flip(1 - pad(1 - part, margins), draw) for part in parts])
        return item

    def warped(self, case: int, draw: Draw) -> tuple[Tensor, Tensor | None]:
        """The box of a case, rotated and scaled about its centre: image, linear, and label, of the nearest voxels."""
        if case not in self._spacings:  # without one the voxels are taken to be cubes
            self._spacings[case] = known_spacing(self.volumes.cases[case]) or (1.0, 1.0, 1.0)
        shape = self.volumes.shapes[case]
        warp = Warp.of(draw, shape, self._spacings[case])
        box = warp.box(shape)
        image, label = self.volumes.read(case, box)
        if label is not None:
            label = warp(label.float(), box, "nearest").to(label.dtype)
        return warp(image, box, "bilinear"), label

    def distances_of(self, label: Tensor, case: int) -> Tensor:
        """label (w,h,d) -> signed distance maps (C,w,h,d) in [-1,1]."""
        classes = range(1, self.volumes.cases[case].classes + 1)
        distances = np.stack([signed_distance_map(label.cpu().numpy() == c) for c in classes])
        return torch.from_numpy(distances).to(label.device)

    def distances_of_scan(self, case: int) -> Tensor:
        """Signed distance maps (C,W,H,D) of a whole labeled case; computed once and kept."""
        if case not in self._distances:
            self._distances[case] = self.distances_of(self.label_of(case), case)
        return self._distances[case]


def voxels_of_classes(label: NDArray[np.uint8]) -> list[NDArray[np.int64]]:
    """Label map (W,H,D) -> voxels (n,3) of each class that occurs; of more than MOST_VOXELS a random choice."""
    voxels = [np.argwhere(label == c) for c in range(1, int(label.max(initial=0)) + 1)]
    rng = np.random.default_rng(0)
    return [x if len(x) <= MOST_VOXELS else x[rng.choice(len(x), MOST_VOXELS, replace=False)] for x in voxels if len(x)]


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks items to the batch of methods/base.py; label and sdm over the labeled items, which come first."""
    batch: dict[str, Any] = {"case": [item["case"] for item in items]}
    for name in ("image", "label", "sdm", "other_image", "other_label"):
        values = [item[name] for item in items if name in item]
        if values:
            batch[name] = torch.stack(values)
    return batch


def make_loader(
    patches: Patches, sampler: TwoStreamBatchSampler, *, workers: int, stop: StopSignal | None = None
) -> DataLoader:
    """A loader of batches in the sampler's order, the same for any number of workers.

    It has a generator of its own: without one each iterator would draw from the global torch generator. With volumes on
    a GPU there are no workers. `stop` ends the batches early.

    Raises:
        UserError, RuntimeError: as WatchedLoader, while batches are drawn.
    """
    workers = 0 if patches.volumes.on_device else workers
    return WatchedLoader(
        TrackedPatches(patches, workers),
        workers=workers,
        collate=collate,
        stop=stop,
        batch_sampler=sampler,
        generator=torch.Generator(),
        worker_init_fn=ignore_stop_signals,
    )
