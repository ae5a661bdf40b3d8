"""The memory that a training step of every method needs, counted on tensors without values, and the GPUs that hold it.

    python -m benchmarks.memory                      as in the papers, at full size
    python -m benchmarks.memory --profile half
    python -m benchmarks.memory --classes 13         the methods that take several classes

prints a Markdown table in half a minute on any computer. Each method has its first preset and its batch. `GPU` is the
smallest of the usual cards that holds a margin times the count, in fp32: 1.3 (`tools.memory.MARGIN`), with --recompute
1.4, as measured on a CPU (docs/training.md). What fits no card is marked -.
"""

import dataclasses
from typing import Any

from benchmarks.timing import table
from methods import METHODS
from networks.backbone import set_recompute
from settings import PROFILES
from tools.command_line import read_options
from tools.memory import MARGIN, meta_method, step_bytes
from utils.errors import run
from utils.options import option, read_flags

CARDS = (8, 11, 12, 16, 24, 40, 80, 141)
"""GiB of the usual cards."""
RECOMPUTED = 1.4  # margin with --recompute


@dataclasses.dataclass
class Options:
    """Options of the benchmark."""

    profile: str = option("full", "scale of the run", choices=list(PROFILES))
    classes: int = option(1, "foreground classes", minimum=1, maximum=254)


def gib_of_step(name: str, profile: str, classes: int, *, recompute: bool) -> tuple[float, int]:
    """The counted GiB of a training step of a method, and its crops in a batch."""
    o, own, *_ = read_options(["--method", name, "--profile", profile, "--data", "set", "--labeled", "16",
                                "--classes", str(classes)])  # fmt: skip
    method = meta_method(name, dataclasses.asdict(own))
    set_recompute(method, recompute)
    usual = o.batch_size // 2 if method.uses_unlabeled else o.batch_size
    return sum(step_bytes(method, o.patch_size, o.batch_size, o.labeled_batch or usual)) / 2**30, o.batch_size


def card_for(gib: float) -> int | str:
    """The GiB of the smallest card that has as much, or '-'."""
    return next((card for card in CARDS if gib <= card), "-")


def main(argv: list[str] | None = None) -> None:
    o: Options = read_flags(Options, __doc__, "python -m benchmarks.memory", argv)
    rows: list[list[Any]] = []
    for name in (name for name, kind in METHODS.items() if o.classes == 1 or kind.multiclass):
        (plain, crops), (less, _) = (
            gib_of_step(name, o.profile, o.classes, recompute=again) for again in (False, True)
        )
        rows.append([name, crops, plain, card_for(MARGIN * plain), less, card_for(RECOMPUTED * less)])
    print(table(["method", "crops", "GiB", "GPU", "GiB with `--recompute`", "GPU"], rows))


if __name__ == "__main__":
    run(main)
