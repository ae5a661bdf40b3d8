"""Folders of scans in the Decathlon's and nnU-Net's layouts, and the data sets made of them."""

import json
from pathlib import Path

import numpy as np
from scans import OBLIQUE, ball, write

from dataloaders.images import to_physical

SHAPE = (30, 28, 18)
CENTRE = to_physical(OBLIQUE, (15, 14, 9))
DECATHLON = {"name": "Ball", "labels": {"0": "background", "1": "Anterior", "2": "Posterior"}}
NNUNET = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "Anterior": 1, "Posterior": 2},
    "file_ending": ".nii.gz",
}


def add(folder: Path, name: str, *, seed: int, label: bool = True, ending: str = "", split: str = "Tr") -> None:
    """A scan of imagesTr and, if it has one, its label of 0, 1 and 2, in labelsTr."""
    rng = np.random.default_rng(seed)
    inner, outer = (ball(SHAPE, OBLIQUE, CENTRE + rng.uniform(-3, 3, 3), r) for r in (5, 8))
    image = 300 + 100.0 * inner + 10 * rng.standard_normal(SHAPE)
    write(folder / f"images{split}" / f"{name}{ending}.nii.gz", image.astype(np.float32))
    if label:
        write(folder / f"labels{split}" / f"{name}.nii.gz", inner + outer)


def decathlon(folder: Path, labeled: int = 6, unlabeled: int = 2, ending: str = "", about: dict | None = None) -> Path:
    """The layout of the Decathlon's tars, with the files that macOS put into them."""
    for i in range(labeled):
        add(folder, f"ball_{i:03d}", seed=i, ending=ending)
    for i in range(labeled, labeled + unlabeled):
        add(folder, f"ball_{i:03d}", seed=i, ending=ending, label=False, split="Ts")
    for path in list(folder.rglob("*.nii.gz")):
        path.with_name(f"._{path.name}").write_bytes(b"Mac OS X")
    (folder / "._dataset.json").write_bytes(b"Mac OS X")
    (folder / "dataset.json").write_text(json.dumps(about or DECATHLON))
    return folder


def names(*numbers: int) -> list[str]:
    return [f"ball_{i:03d}" for i in numbers]
