"""The interface between the training loop and a method."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from losses.ramps import RAMPS
from losses.terms import probabilities
from networks.backbone import Backbone
from networks.backbones import BACKBONES
from networks.heads import DROPOUT, HALVINGS, side_multiples, strides_of
from utils.errors import UserError
from utils.options import Condition, option

Batch = dict[str, Any]
"""image (N,K,W,H,D) float32, K channels, the L labeled items first; label (L,W,H,D) uint8 of 0..C; case: N names.

sdm (L,C,W,H,D) float32 in [-1,1] if the method `needs_sdm`; other_image and other_label, of the same shapes as image
and label, if it `needs_other_crop`."""

TUNED: dict[str, Any] = {
    "lr_schedule": "cosine",
    "batch_size": 6,
    "labeled_batch": 4,
    "intensity": 0.3,
    "normalize": "scan",
}
"""The training settings of the preset `tuned`, the same for every method. A method adds only what is its own.

They were chosen for DTML and DTML+ on held-out training scans. Arithmetic (--precision) is no part of them."""
TUNED_SEPARATE: dict[str, Any] = {**TUNED, "batch_norm": "separate"}
"""`tuned` of methods whose passes hold labeled and unlabeled crops. Chosen on held-out scans of both sets."""


def softmax_option(**kwargs: Any) -> Any:
    """The option --softmax of a method whose network has the head seg; None is replaced by `Method.Options`."""
    text = "p by a softmax over C+1 channels, not by C sigmoids (default yes with several classes, no with one)"
    return option(None, text, type=bool, **kwargs)


def batch_norm_option() -> Any:
    """The option --batch-norm of a method whose passes hold labeled and unlabeled crops; see `Method.parts`."""
    text = "batch norm, as a network learns, over all crops of a batch, or over labeled and unlabeled ones separately"
    return option("joint", text, choices=("joint", "separate"))


ITEMS = ("all", "unlabeled")
"""The crops on which an unlabeled loss is computed."""
UNLABELED: Condition = {"unlabeled": lambda number: number != 0}
"""When options of what is learned from unlabeled scans act, in a method that goes without them."""
# When options of a consistency with the weight lambda(t) act:
AGREES: Condition = {"lambda_max": bool}
RISES: Condition = {**AGREES, "ramp_end": bool}
TIMED: Condition = {**AGREES, "ramp": ("gaussian", "steps", "literal")}  # epochs: after fixed iterations


def ramp_option() -> Any:
    """The option --ramp of a method whose consistency has the weight lambda(t)."""
    return option("gaussian", "how lambda rises; literal: as printed in DTML's paper", choices=RAMPS, only_if=RISES)


def ramp_end_option(share: float) -> Any:
    """The option --ramp-end of such a method."""
    return option(share, "share of the iterations after which lambda is largest", minimum=0, maximum=1, only_if=TIMED)


@dataclass
class Losses:
    """The loss of one iteration, its terms and what else the log shows."""

    total: Tensor
    """The scalar to minimise."""
    terms: dict[str, Tensor]
    """Name -> scalar loss term, before its weight."""
    weights: dict[str, float] = field(default_factory=dict)
    """Name -> weight, for example lambda(t) of the consistency."""
    monitors: dict[str, Tensor] = field(default_factory=dict)
    """Name -> scalar for the log, not minimised."""


class Method(nn.Module):
    """A semi-supervised method; its networks are its child modules.

    `forward` returns the loss, so that DistributedDataParallel wraps a method like any module. What a method needs and
    returns are class attributes. Where an option decides, `__init__` sets the attribute of the instance.

    Args:
        options: values of the method's `Options`.
        iterations: optimiser steps of the whole training, for ramps.

    Raises:
        UserError: for several classes if the method handles only one.
    """

    @dataclass
    class Options:
        """The method's own options; each is a flag of train_dtml.py."""

        backbone: str = option("vnet", "encoder-decoder of every network", choices=list(BACKBONES))
        dropout: float = option(DROPOUT, "share of the channels dropped in training, after the deepest map and before "
                                "the heads", minimum=0, maximum=0.9)  # fmt: skip
        classes: int = option(1, "C, foreground classes; labels hold 0..C; as many as the set's dataset.json names, "
                             "if it does", minimum=1, maximum=254)  # fmt: skip
        channels: int = option(1, "K, channels of the images", flag=False)
        halvings: list[int] = option(
            [*HALVINGS], "how often the networks halve x, y and z; fewer along the thick slices of anisotropic scans: "
            "4 4 2 leaves z alone in the first two of four steps. Sides of a patch are multiples of 2^halvings",
            nargs=3, minimum=0, maximum=max(HALVINGS),
        )  # fmt: skip
        filters: int = option(16, "channels of the first block of every network", minimum=1)

        def __post_init__(self) -> None:
            if getattr(self, "softmax", None) is None:  # not chosen, or a method without --softmax
                self.softmax = self.classes > 1  # with one class a sigmoid does the same

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"paper": {}, "tuned": TUNED}
    """Preset name -> option (of the method or of the script) -> value; the first is the default. All have `tuned`."""
    uses_unlabeled: ClassVar[bool] = True
    """Whether batches hold unlabeled crops."""
    multiclass: ClassVar[bool] = False
    """Whether the method handles more than one class."""
    least_multiple: ClassVar[int] = 1
    """Every side of a patch must be a multiple of this, for networks other than the backbones."""
    outputs: tuple[str, ...] = ()
    """Names that `predict` accepts, the default first."""
    needs_sdm: bool = False
    """Whether batches must hold the signed distance maps of the labels."""
    needs_other_crop: bool = False
    """Whether batches must hold a second, independent crop of every scan: other_image, other_label."""
    needs_unlabeled: bool = False
    """Whether a batch without unlabeled crops would leave a loss term empty."""

    def __init__(self, options: Any, *, iterations: int):
        super().__init__()
        if options.classes > 1 and not self.multiclass:
            raise UserError(
                f"--classes {options.classes}: this method knows one class. Take one that knows several, as dtml "
                "or ua-mt, or a set of one class: tools.convert --labels keeps or joins label values. Without "
                "--classes there are as many as the set's dataset.json names."
            )
        try:
            strides_of(options.halvings)
        except ValueError as e:
            raise UserError(f"--{e}.") from e
        self.options = options
        self.iterations = iterations

    @property
    def side_multiples(self) -> tuple[int, ...]:
        """The sides of a patch must be multiples of these numbers of voxels, along x, y and z."""
        return tuple(max(multiple, self.least_multiple) for multiple in side_multiples(self.options.halvings))

    @property
    def seg_channels(self) -> int:
        """Channels of p's logits: C+1 for a softmax, as classes exclude each other, or C for sigmoids."""
        return self.options.classes + self.options.softmax

    @property
    def backbone(self) -> Callable[..., Backbone]:
        """The class of --backbone, to be called with `heads`: for images of K channels, with --filters."""
        o = self.options
        return partial(
            BACKBONES[o.backbone], filters=o.filters, in_channels=o.channels, dropout=o.dropout, halvings=o.halvings
        )

    def parts(self, image: Tensor, labeled: int) -> list[Tensor]:
        """image (N,K,W,H,D) -> the crops of each pass: all, or with --batch-norm separate the labeled and the others.

        Crops of one pass share the mean and variance of batch norm. Where little is learned from the unlabeled ones, a
        network can tell both kinds apart by them, and then fails on other scans (docs/findings.md).
        """
        apart = self.options.batch_norm == "separate"
        return [x for x in image.tensor_split([labeled]) if len(x)] if apart else [image]

    def by_parts(self, f: Callable[[Tensor], Tensor], image: Tensor, labeled: int) -> Tensor:
        """f(image), image (N,K,W,H,D), computed in the passes of `parts`: (N,...)."""
        return joined([f(x) for x in self.parts(image, labeled)])

    def passes(self, network: nn.Module, image: Tensor, labeled: int) -> dict[str, Tensor]:
        """The outputs of network(image), image (N,K,W,H,D), computed in the passes of `parts`."""
        outputs = [network(x) for x in self.parts(image, labeled)]
        return {name: joined([x[name] for x in outputs]) for name in outputs[0]}

    def forward(self, batch: Batch, iteration: int) -> Losses:
        """Returns the losses of a batch at this iteration (0 <= iteration < iterations)."""
        raise NotImplementedError

    def predict(self, image: Tensor, outputs: tuple[str, ...]) -> Tensor:
        """image (N,K,W,H,D) -> foreground probabilities (N,len(outputs)*C,W,H,D) in [0,1], C channels per output."""
        raise NotImplementedError

    def after_step(self, batch: Batch, iteration: int) -> None:
        """Runs after each optimiser step, for example to update an EMA teacher or a critic. Does nothing by default."""

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        """image (N,K,W,H,D) -> name -> map (N,W,H,D) for the pictures; the C channels of a prediction come first.

        By default the first of `outputs`, as p.
        """
        return by_name(p=self.predict(image, self.outputs[:1]))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Outputs of the passes of `Method.parts`, (n,...) each -> (N,...); that of a single pass is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def by_name(**maps: Tensor) -> dict[str, Tensor]:
    """Splits maps by class for `Method.maps`: name -> (N,C,W,H,D) to name -> (N,W,H,D); "p, class 1" ... if C > 1."""
    return {
        name if x.shape[1] == 1 else f"{name}, class {c + 1}": x[:, c]
        for name, x in maps.items()
        for c in range(x.shape[1])
    }


def seg_outputs(networks: Mapping[str, nn.Module], image: Tensor, outputs: Collection[str], classes: int) -> Tensor:
    """`Method.predict` of networks with the head seg, by the name of the output: each runs for its own output alone."""
    return torch.cat([probabilities(networks[name](image)["seg"], classes) for name in outputs], dim=1)


def labeled_part(x: Tensor, batch: Batch) -> Tensor:
    """x (N,...) -> the first L items (L,...), which have a label."""
    return x[: len(batch["label"])]
