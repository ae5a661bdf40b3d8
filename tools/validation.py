"""Scores a method on the validation scans while it is trained."""

from collections.abc import Mapping

import torch

from dataloaders.cases import named, read_case
from dataloaders.normalization import normalized_case
from evaluation.metrics import mean_and_sd
from evaluation.scores import class_dices
from evaluation.sliding_window import half_a_patch, predict_scan
from tools.training import Training
from utils.distributed import RANK, RANKS, broadcast_buffers, gather_in_order
from utils.masks import label_map
from utils.text import counted

VALIDATION = "dice/validation"
"""The curve by which the best checkpoint is chosen."""


def validation_scores(t: Training) -> dict[str, float]:
    """Mean Dice of the method's default output over the validation scans, each on its own grid and without component
    filter.

    Windows overlap by half a patch. Several processes share the scans out, and all get the result. The method is in
    training mode afterwards.

    Returns:
        Curve -> value in [0,1]: `dice/validation`, the mean over the scans of the mean over the classes, and of several
        classes `dice/validation_1` and so on, each a mean over the scans that have the class in label or prediction.
        NaN if no scan has.

    Raises:
        UserError: for a case that can no longer be read, or whose prediction is not finite.
    """
    o, method = t.o, t.method
    broadcast_buffers(method)  # each process has running statistics of its own, and the checkpoint those of process 0
    method.eval()
    dices: list[list[float]] = []  # of each scan, by class
    for case in t.validation[RANK::RANKS]:
        with named(case, "It was whole when the training began."):
            image, label = read_case(case)
            image = normalized_case(case, image, t.normalize)
        assert label is not None
        with named(case):
            p = predict_scan(
                method, torch.from_numpy(image).to(t.device), method.outputs[:1], downsample=o.downsample,
                patch_size=o.patch_size, stride=half_a_patch(o.patch_size), weighting="uniform",
                batch_size=o.batch_size,
            )  # fmt: skip
        dices.append(class_dices(label_map(p).numpy(), label, case.classes))
    method.train()
    dices = gather_in_order(dices, 1)
    scores = {VALIDATION: mean_and_sd([mean_and_sd(one)[0] for one in dices])[0]}
    by_class = list(zip(*dices, strict=True))
    if len(by_class) > 1:
        scores |= {f"{VALIDATION}_{c}": mean_and_sd(values)[0] for c, values in enumerate(by_class, 1)}
    return scores


def validation_line(scores: Mapping[str, float], scans: int, done: int, names: Mapping[str, str]) -> str:
    """A line of the log: the mean Dice, and that of each class by its name if it has one, after `done` iterations."""
    classes = {key.rpartition("_")[2]: dice for key, dice in scores.items() if key != VALIDATION}
    each = ", ".join(f"{names.get(c, f'class {c}')} {100 * dice:.2f}" for c, dice in classes.items())
    mean = f"Dice {100 * scores[VALIDATION]:.2f} %"
    return f"validation after {done} iterations: {mean}{f' ({each})' if each else ''}, {counted(scans, 'scan')}"
