"""A teacher that is the exponential moving average (EMA) of its student."""

import copy
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def make_teacher(student: M) -> M:
    """A copy of the student that no optimiser moves.

    In training mode its batch-norm layers normalise by the batch as the student's do, but their running statistics
    are left to `ema_update`, so that the teacher can also be tested.
    """
    teacher = copy.deepcopy(student).requires_grad_(False)
    for module in teacher.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    return teacher


def ema_decay(iteration: int, limit: float) -> float:
    """min(1 - 1/(t+1), limit), Tarvainen & Valpola (2017): the true average of the first iterations, then the EMA."""
    return min(1 - 1 / (iteration + 1), limit)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """teacher = decay teacher + (1 - decay) student, batch-norm statistics included; counters are copied."""
    for t, s in zip(teacher.state_dict().values(), student.state_dict().values(), strict=True):
        if t.is_floating_point():
            t.lerp_(s, 1 - decay)
        else:
            t.copy_(s)
