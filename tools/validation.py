"""Scores a method on the validation scans while it is trained."""

from collections.abc import Sequence

import torch

from dataloaders.cases import Case, CaseError, read_case
from dataloaders.normalization import Normalization, normalized_case
from evaluation.metrics import mean_and_sd
from evaluation.scores import mean_dice
from evaluation.sliding_window import half_a_patch, predict_scan
from methods import Method
from utils.distributed import RANK, RANKS, in_turn, share_buffers
from utils.errors import UserError
from utils.masks import label_map


def validation_dice(
    method: Method,
    cases: Sequence[Case],
    device: torch.device,
    *,
    downsample: int,
    normalize: Normalization,
    patch_size: Sequence[int],
    batch_size: int,
) -> float:
    """Mean Dice of the method's default output over the scans, each on its own grid and without component filter.

    Windows overlap by half a patch. Several processes share the scans out, and all get the result.

    Args:
        method: on the device; it is in training mode afterwards.
        cases: labeled cases that it is not trained on.
        downsample, normalize, patch_size: as in its training.
        batch_size: windows at a time.

    Returns:
        Mean over the scans of the mean over the classes, in [0,1]; NaN if nothing is labeled and nothing predicted.

    Raises:
        UserError: for a case that can no longer be read.
    """
    share_buffers(method)  # each process has running statistics of its own, and the checkpoint those of process 0
    method.eval()
    dices = []
    for case in cases[RANK::RANKS]:
        try:
            image, label = read_case(case)
            image = normalized_case(case, image, normalize)
        except CaseError as e:
            raise UserError(f"the validation case {case.path} {e}. It was whole when the training began.") from e
        assert label is not None
        p = predict_scan(
            method, torch.from_numpy(image).to(device), method.outputs[:1],
            downsample=downsample, patch_size=patch_size, stride=half_a_patch(patch_size), weighting="uniform",
            batch_size=batch_size,
        )  # fmt: skip
        dices.append(mean_dice(label_map(p).cpu().numpy(), label, case.classes))
    method.train()
    return mean_and_sd(in_turn(dices, 1))[0]
