"""Cached volumes, which are cropped by indexing."""

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataloaders.cases import Case, CaseError, Problem, check_all, read_case
from dataloaders.disk_cache import CaseCache
from dataloaders.findings import Facts, facts_of
from dataloaders.fingerprints import DIGITS
from dataloaders.normalization import NONE, Normalization, Scaling, normalized_case, scaled
from utils.distributed import RANK, RANKS
from utils.errors import UserError
from utils.resample import downsample_image, downsample_label
from utils.run_folder import digest

CACHES = ("auto", "device", "ram", "disk", "none")
ON_DEVICE = 0.3  # of the free memory of a GPU: more of it is not taken for volumes


class Volumes:
    """The images and labels of some cases.

    Args:
        cases: labeled or unlabeled cases; the label of an unlabeled case is never opened.
        cache: 'device' keeps all volumes on `device`, 'ram' in memory, 'disk' as plain arrays in `folder`; 'none'
            reads each crop from its file; 'auto' is the device if it is a GPU with enough memory, else memory.
        downsample: factor f; f^3 voxels are pooled into one, see utils/resample.py.
        normalize: scaling of each whole volume before pooling, see dataloaders/normalization.py.
        folder: folder of the arrays ('disk') or of the results of checking the files ('none'). Entries of earlier runs
            are used again.
        problems: those of before, reported with the others.

    Raises:
        UserError: naming every unusable case.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        *,
        cache: str = "auto",
        downsample: int = 1,
        normalize: Normalization = NONE,
        device: torch.device | None = None,
        folder: Path | None = None,
        problems: Sequence[Problem] = (),
    ):
        self.cases, self.downsample = list(cases), downsample
        self.shapes: list[tuple[int, ...]] = []
        self.checksums: dict[str, str] = {}
        self.fingerprints: dict[str, str] = {}  # of the images
        self.facts: list[Facts] = []
        self._images: list[Tensor] = []
        self._labels: list[Tensor | None] = []
        self._scalings: list[list[Scaling] | None] = []  # of the channels of images read crop by crop
        keep = cache in ("auto", "device", "ram")

        def pool(volume: NDArray, is_label: bool) -> NDArray:
            down = downsample_label if is_label else downsample_image
            return down(torch.from_numpy(volume), downsample).numpy()

        checks: CaseCache | None = None
        if cache == "disk":
            checks = CaseCache((folder or Path()) / f"downsample{downsample}{normalize.suffix}", normalize, pool)
        elif cache == "none":
            checks = CaseCache(folder and folder / f"checked{normalize.suffix}", normalize)

        def check(case: Case) -> None:
            kept = checks.find(case) if checks else None
            if kept is not None and min(kept.facts.shape) >= downsample:
                return
            image, label = read_case(case)
            facts = facts_of(case, image, label)
            if min(facts.shape) < downsample:
                raise CaseError(f"has {facts.shape} voxels, too few for --downsample {downsample}")
            if checks:
                checks.add(case, image, label, facts)
                return
            checksum = facts.fingerprint[:DIGITS] if label is None else digest(image, label)
            kept_image = pool(normalized_case(case, image, normalize), False)
            self._note(facts, checksum)
            self._keep(kept_image, None if label is None else pool(label, True))

        # Each process begins with another case, and skips the cases that another process has checked meanwhile.
        first = RANK * len(cases) // RANKS if checks else 0
        check_all([*cases[first:], *cases[:first]], check, problems)
        if checks:
            for case in cases:
                kept = checks.find(case)
                if kept is None:
                    raise UserError(f"{case.path} is changing while it is read. Start again when it is whole.")
                self._note(kept.facts, kept.checksum)
                self._scalings.append(kept.scalings)
                if kept.image is not None:
                    self._keep(kept.image, kept.label)
        self.on_device = False
        if keep and device is not None and (cache == "device" or (cache == "auto" and self._fits(device))):
            self._images = [image.to(device) for image in self._images]
            self._labels = [None if label is None else label.to(device) for label in self._labels]
            self.on_device = device.type != "cpu"
        self.kind = ("device" if self.on_device else "ram") if keep else cache

    def _note(self, facts: Facts, checksum: str) -> None:
        self.facts.append(facts)
        self.checksums[facts.case.name] = checksum
        self.fingerprints[facts.case.name] = facts.fingerprint
        self.shapes.append(tuple(-(-side // self.downsample) for side in facts.shape))

    def _keep(self, image: NDArray, label: NDArray | None) -> None:
        self._images.append(torch.from_numpy(image))
        self._labels.append(None if label is None else torch.from_numpy(label))

    def _fits(self, device: torch.device) -> bool:
        if device.type != "cuda":
            return False
        need = sum(image.numel() * 5 for image in self._images)
        return need < ON_DEVICE * torch.cuda.mem_get_info(device)[0]

    def read(self, index: int, box: tuple[slice, slice, slice]) -> tuple[Tensor, Tensor | None]:
        """Image float32 (w,h,d) or (K,w,h,d), and label uint8 (w,h,d), None if unlabeled, of a case in a box of voxels
        of the downsampled grid."""
        if self.kind != "none":
            label = self._labels[index]
            return self._images[index][(..., *box)], None if label is None else label[box]
        case, f = self.cases[index], self.downsample
        fine = tuple(slice(s.start * f, s.stop * f) for s in box)
        with h5py.File(case.path, "r") as file:
            values = file["image"][(..., *fine)].astype(np.float32, copy=False)
            label = torch.from_numpy(file["label"][fine].astype(np.uint8, copy=False)) if case.labeled else None
        image = torch.from_numpy(scaled(values, self._scalings[index]))
        return downsample_image(image, f), None if label is None else downsample_label(label, f)
