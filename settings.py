"""The options of train_dtml.py that all methods share, what they depend on, and the profiles."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dataloaders.augmentation import AUGMENTATIONS, AXES
from dataloaders.folds import fold_text
from dataloaders.normalization import NORMALIZATIONS
from dataloaders.two_stream import SDM_OF
from dataloaders.volumes import CACHES
from losses.ramps import SCHEDULES
from methods import METHODS
from networks.backbone import PRECISIONS
from utils.options import Condition, option

PROFILES: dict[str, dict[str, Any]] = {
    "full": {},
    "half": {"downsample": 2, "patch_size": [64, 64, 32], "filters": 8, "query_channels": 32, "iterations": 2400},
    "short": {"downsample": 2, "patch_size": [48, 48, 32], "filters": 8, "query_channels": 32, "iterations": 600},
    "phantom": {
        "labeled": 8,
        "patch_size": [48, 48, 32],
        "filters": 8,
        "query_channels": 32,
        "iterations": 300,
        "lr_steps": [220, 280],
        "picture_every": 100,
    },
    "hippocampus": {  # of the Decathlon, whole scans at full resolution
        "data": "data/hippocampus",
        "classes": 2,
        "augment": "none",  # turned or flipped in x-y, the anterior part lies where the posterior one does
        "patch_size": [32, 48, 32],
        "filters": 8,
        "iterations": 2400,
        "optimizer": "adamw",  # a run with SGD and 8 labels ended with the same probability for both classes
        "lr": 0.001,
        "weight_decay": 0.01,
    },
}

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], "Options"], torch.optim.Optimizer]] = {
    "sgd": lambda p, o: torch.optim.SGD(p, lr=o.lr, momentum=o.momentum, weight_decay=o.weight_decay, fused=True),
    "adamw": lambda p, o: torch.optim.AdamW(p, lr=o.lr, weight_decay=o.weight_decay, fused=True),
}


TRAINS: Condition = {"from_diagnostic": ("",)}
ANEW: Condition = {"resume": ("", "auto"), **TRAINS}
DROPS: Condition = {"lr_schedule": ("steps",)}


@dataclasses.dataclass
class Options:
    """Options of all methods. None is replaced by `read_options`, depending on other options or on the data."""

    method: str = option("dtml", "method to train; --method NAME --help lists its own options", choices=list(METHODS))
    preset: str = option("", "named settings of the method (default its first; all have tuned, most paper and authors)")

    data: str = option(
        "", "folder of the data set (default data/la, else the phantom set; data/hippocampus with that profile)",
        group="data", harmless=True, only_if=TRAINS,
    )  # fmt: skip
    profile: str = option(
        "", "scale of the run: full (default), half, short, phantom, hippocampus", choices=list(PROFILES), group="data"
    )
    labeled: int = option(None, "the first N scans of train.list are labeled (default 16 of LA, 8 of the phantom set, "
                          "of other sets all that have a label)", group="data", type=int)  # fmt: skip
    unlabeled: int | None = option(None, "scans used without label (default all others; 0: none)", group="data",
                                   type=int, only_if={"uses_unlabeled": bool})  # fmt: skip
    fold: str = option("", "I/K: cross-validation, the labeled scans are dealt out to K folds, and fold I (from 0) is "
                       "left out for validation (default none)", group="data", type=fold_text)  # fmt: skip
    downsample: int = option(1, "pool this many voxels along each axis into one", group="data", minimum=1)
    patch_size: list[int] = option([112, 112, 80], "voxels of a crop along x, y, z", group="data", nargs=3, minimum=1)
    normalize: str = option(
        "none", "how intensities are scaled, in tests and predictions too. scan: each volume is clipped to its 0.5 and "
        "99.5 percentiles, then has zero mean and unit variance; foreground: zero mean and unit variance over the "
        "voxels that are not 0 in the scan; window: --window becomes 0 to 1", group="data", choices=NORMALIZATIONS,
    )  # fmt: skip
    window: list[float] | None = option(
        None, "LEVEL WIDTH of --normalize window, in the scan's own intensities, such as 40 400 HU; two more for each "
        "further channel, or the same for all (default none)",
        group="data", type=float, nargs="+", only_if={"normalize": ("window",)},
    )  # fmt: skip
    augment: str = option("d4", "90-degree rotations and flips of a crop: d4: all eight in the x-y plane; mirror: "
                          "always a flip, as released; flip: flips alone, along --flip-axes", group="data",
                          choices=AUGMENTATIONS)  # fmt: skip
    flip_axes: list[str] = option(list(AXES), "axes of --augment flip; a converted set's x goes from left to right",
                                  group="data", choices=AXES, nargs="+", only_if={"augment": ("flip",)})  # fmt: skip
    intensity: float = option(0.0, "intensity augmentation: random gamma, contrast (by exp(-X) to exp(X)) and "
                              "brightness (by up to X standard deviations of a scan; of --normalize window: window "
                              "widths); 0: none", group="data", minimum=0, maximum=2)  # fmt: skip
    random_scale: float = option(0.0, "random zoom by a factor from exp(-X) to exp(X); 0: none",
                                 group="data", minimum=0, maximum=1)  # fmt: skip
    random_rotation: float = option(0.0, "random rotation about each axis, up to X degrees to either side; 0: none",
                                    group="data", minimum=0, maximum=180)  # fmt: skip
    random_bias: float = option(0.0, "random smooth field as of an MR coil, a factor of exp(-X) to exp(X) above the "
                                "lowest intensity; 0: none", group="data", minimum=0, maximum=2)  # fmt: skip
    random_blur: float = option(0.0, "random Gaussian blur, SD up to X voxels; 0: none", group="data",
                                minimum=0, maximum=10)  # fmt: skip
    random_resolution: float = option(0.0, "random low resolution, voxels up to 1 + X times as long; 0: none",
                                      group="data", minimum=0, maximum=9)  # fmt: skip
    random_noise: float = option(0.0, "random Gaussian noise, SD up to X standard deviations of a scan (of --normalize "
                                 "window: window widths); 0: none", group="data", minimum=0, maximum=5)  # fmt: skip
    object_share: float = option(0.0, "probability that a labeled crop is centred on a foreground voxel, or as near as "
                                 "the border allows, each class equally often; for small organs",
                                 group="data", minimum=0, maximum=1)  # fmt: skip
    paste: float = option(0.0, "paste labeled crops into each other: each has a crop of another labeled scan inside a "
                          "random box with this share of its sides, such as 0.67; 0: none", group="data", minimum=0,
                          maximum=1)  # fmt: skip
    sdm_of: str = option("crop", "distance maps of the crop, or cut out of those of the whole scan", group="data",
                         choices=SDM_OF, only_if={"needs_sdm": bool})  # fmt: skip
    cache: str = option("auto", "where volumes are kept; none: read each crop from its file", group="data",
                        choices=CACHES, harmless=True, only_if=TRAINS)  # fmt: skip
    cache_folder: str = option("", "folder of --cache disk and none (default .cache in the data folder)", group="data",
                               harmless=True, only_if={"cache": ("disk", "none"), **TRAINS})  # fmt: skip
    workers: int = option(0, "processes that prepare crops", group="data", harmless=True, minimum=0, only_if=TRAINS)

    init: str = option("", "weights to start from: a run folder, a .pt file or shared weights of the same method; the "
                       "optimizer begins anew (default drawn by --seed)", group="training", only_if=ANEW)  # fmt: skip
    iterations: int = option(6000, "optimizer steps", group="training", minimum=1)
    batch_size: int = option(4, "crops in a batch of each process", group="training", minimum=1, maximum=10000)
    labeled_batch: int | None = option(
        None, "labeled crops in a batch (default half)", group="training", type=int, minimum=1
    )
    optimizer: str = option("sgd", "SGD with momentum, or AdamW", choices=list(OPTIMIZERS), group="training")
    lr: float = option(0.01, "learning rate", group="training", minimum=0)
    lr_schedule: str = option("steps", "how the learning rate falls: at --lr-steps, or as a cosine to 0",
                              group="training", choices=SCHEDULES)  # fmt: skip
    lr_steps: list[int] | None = option(
        None, "iterations at which the learning rate drops (default 5/12 and 5/6 of all)", group="training", type=int,
        nargs="*", minimum=0,
        only_if={**DROPS, "lr_gamma": lambda factor: factor != 1},
    )  # fmt: skip
    lr_gamma: float = option(0.1, "factor at each drop of the learning rate", group="training", minimum=0,
                             maximum=1, only_if={**DROPS, "lr_steps": bool})  # fmt: skip
    momentum: float = option(0.9, "momentum of SGD", group="training", minimum=0, only_if={"optimizer": ("sgd",)})
    weight_decay: float = option(1e-4, "weight decay", group="training", minimum=0)
    seed: int = option(1337, "seed of weights, batches and dropout", group="training", minimum=0, maximum=2**63 - 1)

    precision: str = option("fp32", "arithmetic of the convolutions; auto: bf16 if the device has it, else fp32; "
                            "networks with a distance head and k > 50 stay in fp32",
                            choices=("auto", *PRECISIONS))  # fmt: skip
    compile: bool = option(False, "torch.compile the networks, which takes minutes at the start")
    recompute: bool = option(False, "less memory, a quarter more time: recompute activations in the backward pass",
                             harmless=True, only_if=TRAINS)  # fmt: skip
    device: str = option("auto", "auto, cpu, cuda or cuda:N", harmless=True)
    threads: int = option(0, "CPU threads; 0 leaves torch's choice", harmless=True, minimum=0)
    deterministic: bool = option(False, "only operations that are deterministic on a GPU; slower", harmless=True)
    runs: str = option("runs", "parent of the run folders", harmless=True, only_if=ANEW)
    name: str = option("", "run folder below --runs (default from the chosen options)", harmless=True, only_if=ANEW)
    resume: str = option("", "auto: continue this run if it exists; or a run folder or checkpoint", harmless=True,
                         only_if=TRAINS)  # fmt: skip
    from_diagnostic: str = option(
        "", "run the batch of a diverged-rankR.pt again and report what is not finite", harmless=True
    )
    fresh: bool = option(False, "move an existing run folder aside and start again", harmless=True,
                         only_if={"resume": ("",), **TRAINS})  # fmt: skip
    save_every: int = option(500, "iterations between checkpoints", harmless=True, minimum=1, only_if=TRAINS)
    validate_every: int = option(
        0, "iterations between scores of the scans of validation.list, or of the --fold; the checkpoint with the best "
        "Dice is kept as best.pt; 0: none. LA has no validation set: its last iteration counts",
        harmless=True, minimum=0, only_if=TRAINS,
    )  # fmt: skip
    log_every: int = option(10, "iterations between points of the curves", harmless=True, minimum=1, only_if=TRAINS)
    picture_every: int = option(500, "iterations between pictures; 0: none", harmless=True, minimum=0, only_if=TRAINS)
