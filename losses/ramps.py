"""Weights and learning rates as pure functions of the iteration t in [0, T)."""

import math
from collections.abc import Sequence

RAMPS = ("gaussian", "steps", "literal", "epochs")
SCHEDULES = ("steps", "cosine")
EPOCHS = (200, 800, 1600)
STEPS = 40  # the released codes raise the weight 40 times: every 150 of 6000 iterations


def ramp_up(iteration: float, iterations: float, shape: str = "gaussian") -> float:
    """The ramp of the consistency weight, in (0,1], at iteration t of T.

    gaussian  exp(-5 (1 - t/T)^2), Laine & Aila (2017), which DTML cites
    steps     the same on 40 plateaus, as in the released codes of UA-MT, DTC and DTML
    literal   exp(-5 (1 - t/T)), as printed in the DTML paper, without the square
    epochs    1/20 at first, then 1/4, 1/2 and 1 after 200, 800 and 1600 iterations, independent of T: 5, 20 and 40
              epochs of the code that DK-UXNet's preset `released` follows

    Raises:
        ValueError: for another shape.
    """
    if shape == "epochs":
        return (0.05, 0.25, 0.5, 1.0)[sum(iteration > t for t in EPOCHS)]
    if iterations <= 0:
        return 1.0
    if shape == "steps":
        left = 1 - math.floor(min(max(iteration, 0), iterations) * STEPS / iterations) / STEPS
    else:
        left = 1 - min(max(iteration, 0), iterations) / iterations
    if shape == "literal":
        return math.exp(-5 * left)
    if shape in ("gaussian", "steps"):
        return math.exp(-5 * left**2)
    raise ValueError(f"ramp must be one of {RAMPS}, not {shape!r}")


def default_lr_steps(iterations: int) -> list[int]:
    """Iterations at which the learning rate drops: 5/12 and 5/6 of the training, 2500 and 5000 of 6000."""
    return [max(1, round(iterations * 5 / 12)), max(1, round(iterations * 5 / 6))]


def learning_rate(iteration: int, lr: float, steps: Sequence[int], gamma: float) -> float:
    """lr gamma^n after n of the `steps`; the iteration of a step is the first with the lower learning rate."""
    return lr * gamma ** sum(iteration >= step for step in steps)


def cosine_rate(iteration: int, iterations: int, lr: float) -> float:
    """lr (1 + cos(pi t/T)) / 2: the learning rate falls to 0, Loshchilov & Hutter (2017) without restarts."""
    return lr * (1 + math.cos(math.pi * iteration / iterations)) / 2
