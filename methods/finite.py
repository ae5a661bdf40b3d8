"""No loss and no gradient that is not finite may reach the weights."""

from typing import Any

import torch
from torch import Tensor, nn

from methods.base import Batch, Losses
from utils.distributed import worst_of_ranks
from utils.errors import Diverged


def check_finite(losses: Losses, network: nn.Module, batch: Batch, iteration: int) -> None:
    """After backward, before the step: a bad loss or gradient of any process must not reach the weights of one.

    Raises:
        Diverged: naming the loss term or, if all are finite, the parameters whose gradient is not.
    """
    gradients = gradients_of(network)
    bad = is_bad(losses, gradients)
    if worst_of_ranks(bad.float()):
        raise divergence(losses, gradients, batch, iteration, bad)


class Watch:
    """`check_finite` of every iteration. On a GPU the answer is read one iteration later, as the host would otherwise
    wait for the device each time; until then `found_inf` has a fused optimiser leave the weights alone."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device):
        self.optimizer, self.late = optimizer, device.type == "cuda"
        self.unread: tuple[Any, ...] | None = None

    def look(self, losses: Losses, network: nn.Module, batch: Batch, iteration: int) -> None:
        """After backward, before the step. Raises as `check_finite`, on a GPU for the iteration before."""
        if not self.late:
            check_finite(losses, network, batch, iteration)
            return
        self.settle()
        gradients = gradients_of(network)
        bad = is_bad(losses, gradients)
        self.optimizer.found_inf = worst_of_ranks(bad.float())  # type: ignore[attr-defined]
        answer = self.optimizer.found_inf.to("cpu", non_blocking=True)  # type: ignore[attr-defined]
        copied = torch.cuda.Event()
        copied.record()
        self.unread = copied, answer, losses, gradients, batch, iteration, bad

    def settle(self) -> None:
        """Reads the last answer, before anything is saved."""
        if self.unread is not None:
            (copied, answer, *about), self.unread = self.unread, None
            copied.synchronize()
            if answer:
                raise divergence(*about)


def gradients_of(network: nn.Module) -> dict[str, Tensor]:
    """Name of the parameter -> its gradient."""
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def is_bad(losses: Losses, gradients: dict[str, Tensor]) -> Tensor:
    """Scalar, true or false, on the device."""
    return ~torch.isfinite(losses.total.detach() + torch.nn.utils.get_total_norm(gradients.values()))


def divergence(losses: Losses, gradients: dict[str, Tensor], batch: Batch, iteration: int, bad: Tensor) -> Diverged:
    """The error that says what is not finite and where."""
    terms = [f"the loss {name}" for name, value in losses.terms.items() if not torch.isfinite(value)]
    found = terms or [f"the gradient of {name}" for name, g in gradients.items() if not torch.isfinite(g).all()][:3]
    what = ", ".join(found) or ("the norm of the gradient" if bad else "a loss of another process")
    return Diverged(
        f"at iteration {iteration} {what} is not finite, in the crops of {', '.join(batch['case'])}. "
        "The last checkpoint is intact: try a lower --lr or another --seed.",
        iteration,
        here=bool(found or bad),
    )
