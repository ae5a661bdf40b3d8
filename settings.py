"""The options of train_dtml.py that all methods share, the profiles, and the dependencies between options.

Order of precedence: defaults < profile < preset < command line.
"""

import dataclasses
import itertools
import math
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dataloaders.augmentation import AUGMENTATIONS, AXES
from dataloaders.cases import LA_FOLDER, PHANTOM_FOLDER
from dataloaders.folds import fold_text
from dataloaders.normalization import NORMALIZATIONS
from dataloaders.training import is_phantom, usual_labeled
from dataloaders.two_stream import SDM_OF
from dataloaders.volumes import CACHES
from losses.ramps import SCHEDULES, default_lr_steps
from methods import METHODS, Method
from networks.backbone import PRECISIONS
from utils.checkpoint import go_further, load_checkpoint
from utils.errors import UserError
from utils.options import (
    RENAMED,
    Condition,
    Parser,
    as_flags,
    fill,
    flag_of,
    harmless_names,
    option,
    refuse_differences,
    refuse_idle,
    refuse_removed,
    renamed_words,
    varied,
)
from utils.run_folder import has_checkpoint
from utils.shared_weights import ENDING

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
        "optimizer": "adamw",  # with SGD p1 and p2 stay equal: the V-Net never tells anterior from posterior
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
    preset: str = option("", "named settings of the method (default its first; most have paper and authors)")

    data: str = option(
        "", "folder of the data set (default data/la, else the phantom set)", group="data", harmless=True,
        only_if=TRAINS,
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
        "none",
        "how intensities are scaled, in tests and predictions too. scan: each volume is clipped to its 0.5 and 99.5 "
        "percentiles, then has zero mean and unit variance; foreground: zero mean and unit variance over the voxels "
        "that are not 0 in the scan; window: --window becomes 0 to 1",
        group="data",
        choices=NORMALIZATIONS,
    )
    window: list[float] | None = option(
        None, "LEVEL WIDTH of --normalize window, in the scan's own intensities, such as 40 400 HU (default none)",
        group="data", type=float, nargs=2, only_if={"normalize": ("window",)},
    )  # fmt: skip
    augment: str = option("d4", "turns and flips of a crop: d4: all eight in the x-y plane; mirror: always a flip, as "
                          "released; flip: flips alone, along --flip-axes", group="data",
                          choices=AUGMENTATIONS)  # fmt: skip
    flip_axes: list[str] = option(list(AXES), "axes of --augment flip; a converted set's x goes from left to right",
                                  group="data", choices=AXES, nargs="+", only_if={"augment": ("flip",)})  # fmt: skip
    intensity: float = option(0.0, "intensity augmentation: random gamma, contrast and brightness, up to this "
                              "strength; 0: none", group="data", minimum=0, maximum=2)  # fmt: skip
    random_scale: float = option(0.0, "random size of a crop's content, exp(-X) to exp(X) times its own; 0: none",
                                 group="data", minimum=0, maximum=1)  # fmt: skip
    random_rotation: float = option(0.0, "random rotation about each axis, up to so many degrees to either side; 0: "
                                    "none", group="data", minimum=0, maximum=180)  # fmt: skip
    random_bias: float = option(0.0, "random smooth field as of an MR coil, a factor of exp(-X) to exp(X) above the "
                                "lowest intensity; 0: none", group="data", minimum=0, maximum=2)  # fmt: skip
    random_blur: float = option(0.0, "random Gaussian blur, SD up to so many voxels; 0: none", group="data",
                                minimum=0, maximum=10)  # fmt: skip
    random_resolution: float = option(0.0, "random low resolution, voxels up to 1 + X times as long; 0: none",
                                      group="data", minimum=0, maximum=9)  # fmt: skip
    random_noise: float = option(0.0, "random Gaussian noise, SD up to X standard deviations of a scan (of --normalize "
                                 "window: window widths); 0: none", group="data", minimum=0, maximum=5)  # fmt: skip
    object_share: float = option(0.0, "share of the labeled crops placed around a voxel of the object, of all classes "
                                 "alike; for small organs", group="data", minimum=0, maximum=1)  # fmt: skip
    sdm_of: str = option("crop", "distance maps of the crop, or cut out of those of the whole scan", group="data",
                         choices=SDM_OF, only_if={"needs_sdm": bool})  # fmt: skip
    cache: str = option(
        "auto",
        "where volumes are kept; none: read each crop from its file",
        group="data",
        choices=CACHES,
        harmless=True,
        only_if=TRAINS,
    )
    cache_folder: str = option("", "folder of --cache disk and none (default .cache in the data folder)", group="data",
                               harmless=True, only_if={"cache": ("disk", "none"), **TRAINS})  # fmt: skip
    workers: int = option(0, "processes that prepare crops", group="data", harmless=True, minimum=0, only_if=TRAINS)

    init: str = option("", "weights to start from: a run folder, a .pt file or shared weights of the same method; the "
                       "optimiser begins anew (default drawn by --seed)", group="training", only_if=ANEW)  # fmt: skip
    iterations: int = option(6000, "optimiser steps", group="training", minimum=1)
    batch_size: int = option(4, "crops in a batch of each process", group="training", minimum=1)
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
                             only_if={**DROPS, "lr_steps": bool})  # fmt: skip
    momentum: float = option(0.9, "momentum of SGD", group="training", minimum=0, only_if={"optimizer": ("sgd",)})
    weight_decay: float = option(1e-4, "weight decay", group="training", minimum=0)
    seed: int = option(1337, "seed of weights, batches and dropout", group="training", minimum=0, maximum=2**63 - 1)

    precision: str = option("fp32", "arithmetic of the convolutions; networks with a distance head and k > 50 stay in "
                            "fp32", choices=PRECISIONS)  # fmt: skip
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


NOT_REPLAYED = {"resume", "from_diagnostic", "fresh", "channels"}
EVERY = {
    "method", "preset", "data", "profile", "labeled", "downsample", "patch_size", "augment", "iterations", "batch_size",
    "lr", "lr_steps", "lr_gamma", "momentum", "weight_decay", "seed",
}  # fmt: skip
"""Options that every early options.txt lists: it has all options, not only the chosen ones."""
WHY = {  # attribute of a method in `only_if` -> reason in the error message
    "needs_sdm": "no loss of this run needs distance maps",
    "uses_unlabeled": "this method learns from labeled scans only",
}


def read_options(
    argv: list[str] | None, description: str = ""
) -> tuple[Options, Method.Options, Path, dict[str, Any] | None]:
    """Reads the command line.

    Args:
        argv: arguments; None: those of the program.
        description: text of --help.

    Returns:
        Options of the run, options of its method, the run folder, and the contents of the checkpoint to continue, if
        any.

    Raises:
        UserError: for options that are not valid, have no effect, or differ from the checkpoint's; for a checkpoint
            that cannot be loaded, or whose method is unknown.
    """
    first = Parser(add_help=False)
    first.add_argument("--method", choices=list(METHODS))
    first.add_argument("--resume")
    first.add_argument("--from-diagnostic", dest="resume")
    args = first.expand(argv, chosen_flags)
    early = vars(first.parse_known_args(args)[0])
    resume = early.get("resume", "auto")
    state = None if resume == "auto" else load_checkpoint(Path(resume))
    name = early.get("method", state["options"]["method"] if state else Options.method)
    if name not in METHODS:
        raise UserError(f"{resume} was trained with the method {name}, which this code does not have.")
    kind = METHODS[name]
    flags = flags_of(name, description).parse(args)
    if state is not None:
        folder = Path(resume) if Path(resume).is_dir() else Path(resume).parent
    else:
        o, method_options = settle(flags, kind)
        o.labeled = flags["labeled"] if "labeled" in flags else usual_labeled(Path(o.data), o.labeled)
        defaults = combine({key: flags[key] for key in ("data", "profile", "preset") if key in flags}, kind)
        derived = combine({key: value for key, value in flags.items() if key != "lr_steps"}, kind)[0].lr_steps
        skip = ["method", "labeled", "seed", "init", *(["lr_steps"] if o.lr_steps == derived else [])]
        changed = varied(o, defaults[0], skip) + varied(method_options, defaults[1])
        dataset = Path(os.path.abspath(o.data)).name
        dataset += "" if o.profile in ("full", "phantom", dataset) else f"-{o.profile}"
        preset = [] if o.preset == next(iter(kind.PRESETS)) else [o.preset]
        origin = [f"init-{origin_name(Path(o.init))}"] if o.init else []
        parts = [name, *preset, str(o.labeled), *changed, *origin, f"seed{o.seed}"]
        folder = Path(o.runs) / (o.name or f"{dataset}/" + "-".join(parts))
        state = load_checkpoint(folder) if o.resume == "auto" and has_checkpoint(folder) else None
    if state is not None:
        if state["optimizer"] is None:
            raise UserError(f"{state['file']} holds weights to hand on, from which no training goes on. Give its run.")
        saved = state["options"]
        refuse_removed(saved["method"], saved)
        steps = PROFILES[saved.get("profile", "full")].get("lr_steps")
        saved = go_further(state, flags, lambda iterations: [steps, default_lr_steps(iterations)])
        refuse_differences(flags, saved, harmless_names([Options, kind.Options]), folder)
        o, method_options = (fill(cls, saved, flags) for cls in (Options, kind.Options))
        refuse_idle(flags, [Options], values_of(o, method_options, kind), saved.get, WHY)
    return o, method_options, folder, state


def origin_name(path: Path) -> str:
    """The name of a run or of weights in the name of a run that starts from them: RUN, or RUN-best of RUN/best.pt."""
    path = Path(os.path.abspath(path))
    return f"{path.parent.name}-{path.stem}" if path.suffix in (".pt", ENDING) else path.name


def flags_of(method: str, description: str = "") -> Parser:
    """The parser of train_dtml.py for a method."""
    parser = Parser(description=description, prog="train_dtml.py", renamed=RENAMED.get(method))
    parser.add_dataclass(Options)
    parser.add_dataclass(METHODS[method].Options, title=f"method {method}")
    return parser


def chosen_flags(args: list[str]) -> list[str]:
    """Translates the arguments of an @FILE to current names, and of an early options.txt keeps only chosen options.

    An early options.txt lists all options. Without the unchosen ones, further flags such as --iterations or --preset
    have their usual effect.
    """
    names = [after for arg, after in itertools.pairwise(args) if arg == "--method"]
    if not names or names[-1] not in METHODS:
        return args
    args, kind = renamed_words(args, names[-1]), METHODS[names[-1]]
    if not {flag_of(name) for name in EVERY} <= set(args):
        return args
    flags = flags_of(names[-1]).parse(args)
    chosen = {name: flags[name] for name in ("method", "data", "labeled")}

    def differs(name: str) -> bool:
        current = combine(chosen, kind)
        return flags[name] != next(getattr(part, name) for part in current if hasattr(part, name))

    while differing := next((name for name in flags if name not in chosen and differs(name)), ""):
        chosen[differing] = flags[differing]
    return shlex.split(as_flags(chosen))


def combine(flags: dict[str, Any], kind: type[Method]) -> tuple[Options, Method.Options]:
    """Combines defaults < profile < preset < flags, and then sets what depends on other options.

    Args:
        flags: option -> value from the command line.
        kind: class of the method.

    Returns:
        Options of the run and of its method.

    Raises:
        UserError: for an unknown preset.
    """
    usual = PROFILES.get(flags.get("profile", ""), {}).get("data")
    data = flags.get("data") or usual or str(LA_FOLDER if LA_FOLDER.is_dir() else PHANTOM_FOLDER)
    profile = flags.get("profile") or ("phantom" if is_phantom(Path(data)) else "full")
    preset = flags.get("preset") or next(iter(kind.PRESETS))
    if preset not in kind.PRESETS:
        raise UserError(f"--preset {preset} is none of this method's. Choose from {', '.join(kind.PRESETS)}.")
    scale = dict(PROFILES[profile])
    if "iterations" in flags:
        scale.pop("lr_steps", None)  # they fit the profile's number of iterations only
    if not kind.uses_unlabeled:
        scale["unlabeled"] = 0
    layers = (
        scale,
        preset_for(scale | flags, kind.PRESETS[preset]),
        flags,
        {"data": data, "profile": profile, "preset": preset},
    )
    o = fill(Options, *layers)
    if o.lr_schedule == "cosine" and "lr_steps" not in flags:
        o.lr_steps = []
    o.lr_steps = default_lr_steps(o.iterations) if o.lr_steps is None else o.lr_steps
    return o, fill(kind.Options, *layers)


def preset_for(flags: dict[str, Any], preset: dict[str, Any]) -> dict[str, Any]:
    """A preset without its numbers of crops where the profile, the method or the flags leave them no room.

    They count labeled crops next to unlabeled ones. A smaller --batch-size takes half of its crops as labeled, as
    without a preset. Without unlabeled scans a batch has the usual number of crops, all labeled.
    """
    if flags.get("unlabeled") == 0:
        dropped = {"batch_size", "labeled_batch"}
    else:
        dropped = {"labeled_batch"} if flags.get("batch_size", math.inf) <= preset.get("labeled_batch", 0) else set()
    return {name: value for name, value in preset.items() if name not in dropped}


def settle(flags: dict[str, Any], kind: type[Method]) -> tuple[Options, Method.Options]:
    """`combine`, with a check that every flag has an effect.

    Raises:
        UserError: for a flag without effect, or an unknown preset.
    """
    o, method_options = combine(flags, kind)

    def without(name: str) -> Any:
        options = combine({key: value for key, value in flags.items() if key != name}, kind)
        return next(getattr(part, name) for part in options if hasattr(part, name))

    refuse_idle(flags, [Options, kind.Options], values_of(o, method_options, kind), without, WHY)
    if o.normalize == "window" and o.window is None:
        raise UserError("--normalize window needs --window LEVEL WIDTH, as --window 40 400 for the abdomen in CT.")
    if o.window is not None and not (math.isfinite(o.window[0]) and 0 < o.window[1] < math.inf):
        raise UserError(f"--window {o.window[0]:g} {o.window[1]:g}: the width must be above 0, and both be finite.")
    if o.sdm_of == "scan" and (o.random_scale or o.random_rotation):
        raise UserError(
            "--sdm-of scan does not go with --random-scale and --random-rotation: the distances of a whole scan do not "
            "hold in a crop that is scaled or rotated. Take --sdm-of crop."
        )
    if len({*o.flip_axes}) < len(o.flip_axes):
        raise UserError("--flip-axes names an axis twice. Name each once.")
    never = [step for step in flags.get("lr_steps") or () if step >= o.iterations]
    if never:
        raise UserError(f"--lr-steps {never[0]} never comes in --iterations {o.iterations}. Give steps below that.")
    return o, method_options


def values_of(o: Options, method_options: Method.Options, kind: type[Method]) -> Callable[[str], Any]:
    """Returns a function: name of an option, or of an attribute of the method -> its value with these options."""

    def value_of(name: str) -> Any:
        for options in (o, method_options):
            if hasattr(options, name):
                return getattr(options, name)
        with torch.device("meta"):  # shapes only, no memory
            return getattr(kind(method_options, iterations=o.iterations), name)

    return value_of
