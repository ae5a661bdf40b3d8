"""Teachers that are the exponential moving average (EMA) of their student."""

import copy
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def make_teacher(student: M) -> M:
    """Returns a copy of the student whose weights need no gradient.

    In training mode its batch-norm layers normalise by the batch, as the student's do. Their momentum is 0, so only
    `ema_update` changes the running statistics, and the teacher can be tested too.
    """
    teacher = copy.deepcopy(student).requires_grad_(False)
    for module in teacher.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    return teacher


class Averages(nn.ModuleDict):
    """The moving average of each student, by name. They stay in evaluation mode.

    They have no dropout, and their batch norm uses the averaged statistics. Two averages may be of the same student.
    """

    def __init__(self, **students: nn.Module):
        super().__init__({name: make_teacher(student) for name, student in students.items()})
        self.eval()

    def train(self, mode: bool = True) -> "Averages":
        return super().train(False)

    def follow(self, decay: float, **students: nn.Module) -> None:
        """Moves the averages of these names towards their students, as `ema_update`; the others stay."""
        for name, student in students.items():
            ema_update(self[name], student, decay)


def ema_decay(iteration: int, limit: float) -> float:
    """min(1 - 1/(t+1), limit), Tarvainen & Valpola (2017): the mean over the first iterations, then the EMA."""
    return min(1 - 1 / (iteration + 1), limit)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """teacher <- decay teacher + (1 - decay) student, in place, for weights and batch-norm statistics.

    Integer buffers (batch counters) are copied.
    """
    pairs = list(zip(teacher.state_dict().values(), student.state_dict().values(), strict=True))
    averaged = [pair for pair in pairs if pair[0].is_floating_point()]
    torch._foreach_lerp_([t for t, _ in averaged], [s for _, s in averaged], 1 - decay)  # a few kernels on a GPU
    for t, s in pairs:
        if not t.is_floating_point():
            t.copy_(s)
