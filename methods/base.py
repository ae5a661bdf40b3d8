"""The one interface between the training loop and a paper."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from networks.backbones import BACKBONES
from networks.heads import STRIDE
from utils.distributed import any_rank
from utils.errors import Diverged
from utils.options import option

Batch = dict[str, Any]
"""image (N,1,W,H,D) float32, the L labeled items first; label (L,W,H,D) uint8; sdm (L,1,W,H,D) float32 if
`needs_sdm`; other_image and other_label if `needs_other_crop`; case: N names."""


@dataclass
class Losses:
    """What one iteration minimises, and what the log shows of it."""

    total: Tensor
    """The scalar to minimise."""
    terms: dict[str, Tensor]
    """Name -> scalar loss term, before its weight."""
    weights: dict[str, float] = field(default_factory=dict)
    """Name -> number, as lambda, the weight of the consistency."""
    monitors: dict[str, Tensor] = field(default_factory=dict)
    """Name -> scalar worth watching that is not minimised."""


class Method(nn.Module):
    """One per paper; its networks are its children. `forward` is the loss, so that DistributedDataParallel and
    torch.compile wrap a method like any module."""

    @dataclass
    class Options:
        """The method's own knobs, and what its networks are."""

        backbone: str = option("vnet", "encoder-decoder of every network", choices=list(BACKBONES))

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"paper": {}}
    """Preset name -> options (of the method or of the script) it sets; the first is the default."""
    uses_unlabeled: ClassVar[bool] = True
    side_multiple: ClassVar[int] = STRIDE
    """Every side of a patch must be a multiple of this."""

    def __init__(self, options: Any, *, iterations: int):
        super().__init__()
        self.options = options
        self.iterations = iterations

    @property
    def needs_sdm(self) -> bool:
        """Whether batches must carry the signed distance maps of the labels."""
        return False

    @property
    def needs_other_crop(self) -> bool:
        """Whether batches must carry a second crop of every scan, drawn on its own: other_image, other_label."""
        return False

    @property
    def needs_unlabeled(self) -> bool:
        """Whether a batch without unlabeled crops would leave a loss term empty."""
        return False

    @property
    def outputs(self) -> tuple[str, ...]:
        """What `predict` can return, the default first."""
        raise NotImplementedError

    def forward(self, batch: Batch, iteration: int) -> Losses:
        """What is minimised at this iteration (0 <= iteration < iterations)."""
        raise NotImplementedError

    def predict(self, image: Tensor, outputs: tuple[str, ...]) -> Tensor:
        """image (N,1,W,H,D) -> foreground probabilities in [0,1], one channel per output: (N,len(outputs),W,H,D)."""
        raise NotImplementedError

    def after_step(self, batch: Batch, iteration: int) -> None:
        """After the optimiser's step: an EMA teacher, a critic's own update. By default nothing."""

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        """image (N,1,W,H,D) -> name -> (N,W,H,D): what is worth looking at."""
        raise NotImplementedError


def labeled_part(x: Tensor, batch: Batch) -> Tensor:
    """The items of x (N,...) that have a label: the first L."""
    return x[: len(batch["label"])]


def check_finite(losses: Losses, network: nn.Module, batch: Batch, iteration: int) -> None:
    """After backward, before the step: a bad loss or gradient of any process must not reach the weights of one.

    Raises:
        Diverged: naming the loss term or, if all are finite, the parameters whose gradient is not.
    """
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(gradients.values())
    bad = not torch.isfinite(losses.total.detach() + norm)
    if not any_rank(bad, device=norm.device)[0]:
        return
    terms = [f"the loss {name}" for name, value in losses.terms.items() if not torch.isfinite(value)]
    found = terms or [f"the gradient of {name}" for name, g in gradients.items() if not torch.isfinite(g).all()][:3]
    what = ", ".join(found) or ("the norm of the gradient" if bad else "a loss of another process")
    raise Diverged(
        f"at iteration {iteration} {what} is not finite, in the crops of {', '.join(batch['case'])}. "
        "The last checkpoint is intact: try a lower --lr or another --seed.",
        iteration,
        here=bool(found or bad),
    )
