"""The critic of ASDNet and SASSNet: trained by an optimiser of its own, never by the method's loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from methods.base import Batch, Losses
from methods.finite import check_finite
from utils.checkpoint import fit_optimizer
from utils.distributed import average_gradients


class Adversary(nn.Module):
    """A critic and its Adam optimiser (betas 0.9 and 0.99, constant learning rate).

    The forward pass runs the critic in evaluation mode with frozen weights. The gradient reaches the inputs, but not
    the weights. Only `step` updates the weights. The state_dict holds Adam's state, so a resumed run continues
    exactly.
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
        """Updates the critic by one step of Adam on loss(critic), with gradients averaged over the processes. The
        critic is in training mode then. An error names the cases of the batch.

        Raises:
            Diverged: if the loss or a gradient is not finite; the weights are then unchanged.
        """
        self.critic.train().requires_grad_(True)
        try:
            value = loss(self.critic)
            value.backward()
            average_gradients(self.critic.parameters())
            check_finite(Losses(value, {"critic": value}), self.critic, batch, iteration)
            self._adam = self._adam or self._new_adam(self._saved)  # here, as the weights are on their device by now
            self._adam.step()
        finally:
            self.critic.zero_grad(set_to_none=True)
            self.critic.eval().requires_grad_(False)

    def _new_adam(self, state: dict[str, Any] | None) -> torch.optim.Adam:
        adam = torch.optim.Adam(self.critic.parameters(), lr=self.lr, betas=(0.9, 0.99))
        if state is not None:
            fit_optimizer(adam, state)
        return adam

    def get_extra_state(self) -> dict[str, Any] | None:
        return self._adam.state_dict() if self._adam is not None else self._saved

    def set_extra_state(self, state: dict[str, Any] | None) -> None:
        self._new_adam(state)  # a damaged state raises here, not at the first step
        self._saved, self._adam = state, None


@torch.no_grad()
def judged_output(network: nn.Module, image: Tensor) -> Any:
    """Returns network(image) in evaluation mode, without gradient; running statistics and mode stay unchanged."""
    training = network.training
    network.eval()
    try:
        return network(image)
    finally:
        network.train(training)
