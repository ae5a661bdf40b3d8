"""The adversarial step, once: a critic that learns by an optimiser of its own, and never through the method's loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from methods.base import Batch, Losses
from methods.finite import check_finite
from utils.checkpoint import fit_optimizer
from utils.distributed import average_gradients


class Adversary(nn.Module):
    """A critic and its Adam (betas 0.9 and 0.99, constant rate).

    Called, it judges in evaluation mode, its weights frozen: the gradient passes through to what is judged. Only
    `step` moves it. Adam's state travels in the state_dict, so that a resumed run goes on exactly.
    """

    def __init__(self, critic: nn.Module, *, lr: float):
        super().__init__()
        self.critic, self.lr = critic.requires_grad_(False), lr
        self._adam: torch.optim.Adam | None = None
        self._saved: dict[str, Any] | None = None

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.critic(*inputs)

    def train(self, mode: bool = True) -> "Adversary":
        super().train(mode)
        self.critic.eval()
        return self

    def step(self, loss: Callable[[nn.Module], Tensor], batch: Batch, iteration: int) -> None:
        """One step of Adam on loss(critic), gradients averaged over the processes.

        Raises:
            Diverged: if the loss or a gradient is not finite; the weights are then untouched.
        """
        self.critic.train().requires_grad_(True)
        try:
            value = loss(self.critic)
            value.backward()
            average_gradients(self.critic.parameters())
            check_finite(Losses(value, {"critic": value}), self.critic, batch, iteration)
            self._optimizer().step()
        finally:
            self.critic.zero_grad(set_to_none=True)
            self.critic.eval().requires_grad_(False)

    def _optimizer(self) -> torch.optim.Adam:
        """Made at the first step, when the weights are on their device, with the state of the checkpoint if any."""
        if self._adam is None:
            self._adam = self._new_adam(self._saved)
        return self._adam

    def _new_adam(self, state: dict[str, Any] | None) -> torch.optim.Adam:
        adam = torch.optim.Adam(self.critic.parameters(), lr=self.lr, betas=(0.9, 0.99))
        if state is not None:
            fit_optimizer(adam, state)
        return adam

    def get_extra_state(self) -> dict[str, Any] | None:
        return self._adam.state_dict() if self._adam is not None else self._saved

    def set_extra_state(self, state: dict[str, Any] | None) -> None:
        self._new_adam(state)  # refuses a damaged one now, not at the first step
        self._saved, self._adam = state, None


@torch.no_grad()
def judged_output(network: nn.Module, image: Tensor) -> Any:
    """The network's output in evaluation mode and without gradient: its weights and buffers keep no trace of it."""
    was = network.training
    network.eval()
    try:
        return network(image)
    finally:
        network.train(was)
