"""The one interface between the training loop and a paper."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from networks.backbones import BACKBONES
from networks.heads import STRIDE
from utils.errors import UserError
from utils.options import option

Batch = dict[str, Any]
"""image (N,1,W,H,D) float32, the L labeled items first; label (L,W,H,D) uint8 of 0..C; sdm (L,C,W,H,D) float32 if
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
        classes: int = option(1, "C, to tell apart beside the background; labels hold 0..C", minimum=1, maximum=254)

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"paper": {}}
    """Preset name -> options (of the method or of the script) it sets; the first is the default."""
    uses_unlabeled: ClassVar[bool] = True
    multiclass: ClassVar[bool] = False
    """Whether it takes more than one class."""
    side_multiple: ClassVar[int] = STRIDE
    """Every side of a patch must be a multiple of this."""

    def __init__(self, options: Any, *, iterations: int):
        super().__init__()
        if options.classes > 1 and not self.multiclass:
            raise UserError(
                f"--classes {options.classes}: this method knows one class. Others take more, as dtml, dtc and ua-mt."
            )
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
        """image (N,1,W,H,D) -> foreground probabilities in [0,1], C channels per output: (N,len(outputs)*C,W,H,D)."""
        raise NotImplementedError

    def after_step(self, batch: Batch, iteration: int) -> None:
        """After the optimiser's step: an EMA teacher, a critic's own update. By default nothing."""

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        """image (N,1,W,H,D) -> name -> (N,W,H,D): what is worth looking at, the C channels of a prediction first."""
        raise NotImplementedError


def by_name(**found: Tensor) -> dict[str, Tensor]:
    """name -> (N,C,W,H,D) as `maps` returns it: name -> (N,W,H,D), with several classes under name1..nameC."""
    return {
        name if x.shape[1] == 1 else f"{name}{c + 1}": x[:, c] for name, x in found.items() for c in range(x.shape[1])
    }


def labeled_part(x: Tensor, batch: Batch) -> Tensor:
    """The items of x (N,...) that have a label: the first L."""
    return x[: len(batch["label"])]
