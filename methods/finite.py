"""Checks that loss and gradients are finite before they reach the weights."""

from typing import Any

import torch
from torch import Tensor, nn

from methods.base import Batch, Losses
from utils.distributed import worst_of_ranks
from utils.errors import Diverged


def check_finite(losses: Losses, network: nn.Module, batch: Batch, iteration: int) -> None:
    """Checks loss and gradients after the backward pass, before the optimiser step, over all processes. The error names
    the cases of the batch.

    Raises:
        Diverged: naming the loss terms that are not finite or, if all are finite, up to three parameters whose
            gradient is not.
    """
    gradients = gradients_of(network)
    bad = is_bad(losses, gradients)
    if worst_of_ranks(bad.float()):
        raise divergence(losses, gradients, batch, iteration, bad)


class Watch:
    """Runs `check_finite` at every iteration.

    On a GPU the result is read one iteration later, because the host would otherwise wait for the device at each
    iteration. Until then `found_inf` makes the fused optimiser skip the step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device):
        self.optimizer, self.late = optimizer, device.type == "cuda"
        self.unread: tuple[Any, ...] | None = None

    def look(self, losses: Losses, network: nn.Module, batch: Batch, iteration: int) -> None:
        """Call after the backward pass, before the optimiser step.

        Raises:
            Diverged: as `check_finite`; on a GPU for the previous iteration.
        """
        if not self.late:
            check_finite(losses, network, batch, iteration)
            return
        self.flush()
        gradients = gradients_of(network)
        bad = is_bad(losses, gradients)
        self.optimizer.found_inf = worst_of_ranks(bad.float())  # type: ignore[attr-defined]
        failed = self.optimizer.found_inf.to("cpu", non_blocking=True)  # type: ignore[attr-defined]
        copied = torch.cuda.Event()
        copied.record()
        self.unread = copied, failed, losses, gradients, batch, iteration, bad

    def flush(self) -> None:
        """Reads the pending result on a GPU; call before a checkpoint is saved.

        Raises:
            Diverged: as `check_finite`.
        """
        if self.unread is not None:
            (copied, failed, *arguments), self.unread = self.unread, None
            copied.synchronize()
            if failed:
                raise divergence(*arguments)


def gradients_of(network: nn.Module) -> dict[str, Tensor]:
    """Name of each parameter that has a gradient -> gradient."""
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def is_bad(losses: Losses, gradients: dict[str, Tensor]) -> Tensor:
    """Boolean scalar on the device: whether the loss or a gradient is not finite."""
    return ~torch.isfinite(losses.total.detach() + torch.nn.utils.get_total_norm(gradients.values()))


def divergence(losses: Losses, gradients: dict[str, Tensor], batch: Batch, iteration: int, bad: Tensor) -> Diverged:
    """Returns the error that names what is not finite, the iteration and the crops."""
    terms = [f"the loss {name}" for name, value in losses.terms.items() if not torch.isfinite(value)]
    names = terms or [f"the gradient of {name}" for name, g in gradients.items() if not torch.isfinite(g).all()][:3]
    what = ", ".join(names) or ("the norm of the gradient" if bad else "a loss of another process")
    return Diverged(
        f"at iteration {iteration} {what} is not finite, in the crops of {', '.join(batch['case'])}. "
        "What was saved is intact: try a lower --lr or another --seed.",
        iteration,
        here=bool(names or bad),
    )
