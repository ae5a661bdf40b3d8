"""What a teacher's input or network is perturbed with. All draws are torch's, so (seed, iteration) fixes them."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def noisy(image: Tensor, sd: float) -> Tensor:
    """The image plus Gaussian noise of this standard deviation, clipped at two of them."""
    return image + (sd * torch.randn_like(image)).clamp(-2 * sd, 2 * sd)


def monte_carlo(
    network: nn.Module, image: Tensor, *, passes: int, noise: float, read: Callable[[Tensor], Any] | None = None
) -> Iterator[Any]:
    """Stochastic passes over image (N,1,W,H,D): dropout on, fresh noise in each, no gradient.

    Yields what `read` (default: the network itself) makes of two passes at a time, as the released code of UA-MT
    runs them: a batch of 2N, first all items of the one pass, then those of the other; N at the end if `passes` is odd.
    """
    was = network.training
    network.train()
    try:
        for first in range(0, passes, 2):
            with torch.no_grad():
                tiled = image.repeat(min(2, passes - first), 1, 1, 1, 1)
                found = (read or network)(noisy(tiled, noise))
            yield found
    finally:
        network.train(was)
