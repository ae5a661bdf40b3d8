"""The losses of the first three iterations of every method are those of golden/first_losses.json.

They are nobody else's numbers: they tell that a change moved what it was not meant to move. After one that was:

    python -m tests.test_golden [METHOD ...]

In double precision, initial weights too: in single the batch-norm of tiny crops and sigmoid(-1500 z) make 1e-3 of a
rounding error, which differs between processors.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from losses.sdm import signed_distance_map
from methods import METHODS, check_finite
from utils.devices import seed_iteration
from utils.options import fill

FILE = Path(__file__).parent / "golden" / "first_losses.json"
ITERATIONS, SIDE, SEED = 3, 16, 1  # with this seed no network is dead
TOLERANCE = 5e-6
CASES = {  # name: method, options; every preset that changes a formula, and what else does
    **{
        f"{m}, {preset}": (m, kind.PRESETS[preset])
        for m, kind in METHODS.items()
        for i, (preset, values) in enumerate(kind.PRESETS.items())
        if i == 0 or set(values) & {f.name for f in dataclasses.fields(kind.Options)}
        if m not in ("dtml-plus", "ad-mt", "unimatch")  # whose unlabeled crops count later than here
    },
    "unimatch, every voxel": ("unimatch", {"threshold": 0.0}),
    "unimatch, authors, every voxel": ("unimatch", {**METHODS["unimatch"].PRESETS["authors"], "threshold": 0.0}),
    "dtml, distances": ("dtml", {"sdm_loss": "dis"}),
    "dtml, agreeing on unlabeled crops": ("dtml", {"consistency_on": "unlabeled", "ramp_end": 0.0}),
    "dtml-plus, from the start": ("dtml-plus", {"start": 0.0, "full": 0.0, "trust": "all"}),
    "ad-mt, every voxel": ("ad-mt", {"threshold": 0.0, "period": 1}),
    "dtml, both losses": ("dtml", {"sdm_loss": "both", "dis_weight": 2.0, "k": 20.0}),
    "supervised, head sdm": ("supervised", {"head": "sdm"}),
    "tcse, zoomed": ("tcse", {"scale": 0.2}),
    "asdnet, critic of the image": ("asdnet", {"critic_image": True, "threshold": 0.27}),
    "dk-uxnet, two V-Nets": ("dk-uxnet", {"share_weights": False, "backbone": "vnet", "contrast": "mse"}),
    "dtml, on UX-Net": ("dtml", {"backbone": "uxnet"}),
    "double-unc, not learnable": ("double-unc", {"learnable": False, "feature_blocks": "bottom"}),
}


def make_batch(iteration, *, unlabeled):
    """Four crops of noisy balls by formula, no random number in them; the last two without label where asked for."""
    x, y, z = np.meshgrid(*[np.arange(SIDE, dtype=np.float64)] * 3, indexing="ij")
    images, labels = [], []
    for i in range(4):
        n = 4 * iteration + i
        ball = (x - 6 - n % 4) ** 2 + (y - 9 + n % 3) ** 2 + (z - 7.5) ** 2 < (3.3 + 0.2 * n) ** 2
        grain = np.sin(1.7 * x + n) * np.cos(2.3 * y - 0.6 * n) + np.sin(3.1 * z * (1 + 0.05 * x) + 0.2 * y)
        images.append(ball + 0.4 * grain)
        labels.append(ball)
    labels = np.array(labels[: 2 if unlabeled else 4])
    return {
        "image": torch.from_numpy(np.array(images)[:, None]),
        "label": torch.from_numpy(labels.astype(np.uint8)),
        "sdm": torch.from_numpy(np.array([signed_distance_map(label) for label in labels]))[:, None].double(),
        "case": [f"case{i}" for i in range(4)],
    }


def first_losses(method, options):
    """Name -> the losses of the first iterations, as train_dtml.py makes them."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    kind = METHODS[method]
    torch.set_default_dtype(torch.float64)
    try:
        network = kind(
            fill(kind.Options, {"filters": 2, "query_channels": 16, **options}), iterations=ITERATIONS
        ).train()
    finally:
        torch.set_default_dtype(torch.float32)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9, weight_decay=1e-4)
    result = {}
    for iteration in range(ITERATIONS):
        batch = make_batch(iteration, unlabeled=kind.uses_unlabeled)
        if network.needs_other_crop:
            other = make_batch(iteration + ITERATIONS, unlabeled=True)
            batch |= {"other_image": other["image"], "other_label": other["label"]}
        seed_iteration(SEED, iteration)
        losses = network(batch, iteration)
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        check_finite(losses, network, batch, iteration)
        optimizer.step()
        network.after_step(batch, iteration)
        for name, value in {"total": losses.total, **losses.terms}.items():
            result.setdefault(name, []).append(round(value.item(), 8))
    return result


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch draws other dropout masks, without MKL")
@pytest.mark.parametrize("case", CASES)
def test_first_losses_are_the_stored_ones(case):
    stored, result = json.loads(FILE.read_text())[case], first_losses(*CASES[case])
    assert set(result) == set(stored)
    for name, values in stored.items():
        assert result[name] == pytest.approx(values, abs=TOLERANCE, rel=0), name


def test_the_stored_losses_are_of_these_cases_and_alive():
    stored = json.loads(FILE.read_text())
    assert list(stored) == list(CASES)
    for case, losses in stored.items():
        for name, values in losses.items():
            assert len(values) == ITERATIONS and len(set(values)) > 1, f"{case}: {name} does not move"


if __name__ == "__main__":  # of the methods that are named, or of all
    losses = json.loads(FILE.read_text())
    chosen = sys.argv[1:] or METHODS
    changed = [case for case, (method, _) in CASES.items() if method in chosen or case not in losses]
    losses |= {case: first_losses(*CASES[case]) for case in changed}
    lines = [f'"{case}": {json.dumps(losses[case])}' for case in CASES]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
