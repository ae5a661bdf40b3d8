"""Reads the options of train_dtml.py: from the command line, the profile, the preset and the checkpoint.

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

from dataloaders.cases import usual_folder
from dataloaders.training import is_phantom, usual_classes, usual_labeled
from losses.ramps import default_lr_steps
from methods import METHODS, Method
from settings import PROFILES, Options
from utils.checkpoint import LAST, PREVIOUS, load_checkpoint
from utils.early_options import BEFORE_PRESETS, RENAMED, refuse_removed, renamed_words
from utils.errors import UserError
from utils.options import (
    DERIVED,
    Parser,
    as_flags,
    fill,
    flag_of,
    harmless_names,
    refuse_differences,
    refuse_unused,
    varied,
    with_defaults,
)
from utils.run_folder import has_checkpoint
from utils.shared_weights import ENDING

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
) -> tuple[Options, Method.Options, Path, dict[str, Any] | None, dict[str, Any]]:
    """Reads the command line.

    Returns:
        Options of the run, options of its method, the run folder, the contents of the checkpoint to continue, if any,
        and option -> value of those on the command line.

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
    today: dict[str, Any] = {}  # the preset of --resume auto, and what it sets
    if state is not None:
        file = Path(resume)
        folder = file if file.is_dir() else file.parent
        if "resume" in flags and file.is_file() and file.name not in (LAST, PREVIOUS) and has_checkpoint(folder):
            newest = load_checkpoint(folder)["iteration"]
            if newest > state["iteration"]:
                raise UserError(
                    f"{file} is at iteration {state['iteration']}, and its run at {newest}, which would be lost. Give "
                    f"--resume {folder}, or --init {file} for a new run."
                )
    else:
        o, method_options = resolve(flags, kind)
        o.labeled = flags["labeled"] if "labeled" in flags else usual_labeled(Path(o.data), o.labeled)
        if "classes" not in flags and method_options.classes == kind.Options.classes:  # nor has the profile any
            method_options = combine({**flags, "classes": usual_classes(Path(o.data))}, kind)[1]
        folder = Path(o.runs) / (o.name or usual_name(o, method_options, flags, kind))
        state = load_checkpoint(folder) if o.resume == "auto" and has_checkpoint(folder) else None
        values = {**dataclasses.asdict(o), **dataclasses.asdict(method_options)}
        today = {option: values[option] for option in ("preset", *kind.PRESETS[o.preset]) if option not in flags}
    if state is not None:
        if state["optimizer"] is None:
            raise UserError(
                f"{state['file']} has no optimizer state, so it cannot be resumed. Resume its run, or start from these "
                f"weights with --init {resume}."
            )
        saved = state["options"] = with_defaults(state["options"], [Options, kind.Options])
        refuse_removed(saved["method"], saved)
        finished = state["iteration"] >= saved["iterations"]
        if finished and flags.get("iterations", 0) > saved["iterations"]:
            saved = extend(state, flags)
        refuse_differences(flags, saved, harmless_names([Options, kind.Options]), folder)
        differing = {option: value for option, value in today.items() if saved[option] != value}
        state["today"] = {} if "preset" in differing else differing
        o, method_options = (fill(cls, saved, flags) for cls in (Options, kind.Options))
        refuse_unused(flags, [Options], values_of(o, method_options, kind), saved.get, WHY)
        refuse_late_steps(flags, o.iterations)
    return o, method_options, folder, state, flags


def extend(state: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The options with which a finished run goes on to the --iterations of `flags`.

    Learning rate and ramps are those of a run of that length. The steps of the learning rate move along, unless they
    were chosen or --lr-steps is given. `state` gets the new options, the old ones as `before`, and `extended`, the
    iterations at which the run was finished before.
    """
    saved = state["options"]
    usual = (PROFILES[saved.get("profile", "full")].get("lr_steps"), default_lr_steps(saved["iterations"]))
    steps = default_lr_steps(flags["iterations"]) if saved["lr_steps"] in usual else saved["lr_steps"]
    state["options"] = {**saved, "iterations": flags["iterations"], "lr_steps": flags.get("lr_steps", steps)}
    state["extended"] = [*state.get("extended", []), saved["iterations"]]
    state["before"] = saved
    return state["options"]


def usual_name(o: Options, method_options: Method.Options, flags: dict[str, Any], kind: type[Method]) -> str:
    """DATASET/METHOD-LABELED-SEED, with the preset, the weights of --init and the options that are not the usual ones,
    for the folder of a run.
    """
    usual, usual_of_method = combine({key: flags[key] for key in ("data", "profile", "preset") if key in flags}, kind)
    derived = combine({key: value for key, value in flags.items() if key != "lr_steps"}, kind)[0].lr_steps
    skip = ["method", "labeled", "seed", "init", *(["lr_steps"] if o.lr_steps == derived else [])]
    # --softmax follows from the classes, unless the preset sets it:
    usual_of_method.softmax = fill(kind.Options, kind.PRESETS[o.preset]).softmax or method_options.classes > 1
    changed = varied(o, usual, skip) + varied(method_options, usual_of_method)
    dataset = Path(os.path.abspath(o.data)).name
    dataset += "" if o.profile in ("full", "phantom", dataset) else f"-{o.profile}"
    preset = [] if o.preset == next(iter(kind.PRESETS)) else [o.preset]
    origin = [f"init-{origin_name(Path(o.init))}"] if o.init else []
    return f"{dataset}/" + "-".join([o.method, *preset, str(o.labeled), *changed, *origin, f"seed{o.seed}"])


def origin_name(path: Path) -> str:
    """The name of a run or of weights in the name of a run that starts from them: RUN, or RUN-best of RUN/best.pt."""
    path = Path(os.path.abspath(path))
    return f"{path.parent.name}-{path.stem}" if path.suffix in (".pt", ENDING) else path.name


def flags_of(method: str, description: str = "") -> Parser:
    """The parser of train_dtml.py for a method."""
    owners: dict[str, list[str]] = {}
    for other, kind in METHODS.items():
        for f in (f for f in dataclasses.fields(kind.Options) if f.metadata["flag"]):
            owners.setdefault(f.name, []).append(other)
    parser = Parser(description=description, prog="train_dtml.py", renamed=RENAMED.get(method, {}), owners=owners)
    parser.add_dataclass(Options)
    parser.add_dataclass(METHODS[method].Options, title=f"method {method}")
    return parser


def chosen_flags(args: list[str], text: str) -> list[str]:
    """Translates the arguments of an @FILE to current names, and of an early options.txt keeps only chosen options.

    An early options.txt lists all options. Without the unchosen ones, further flags such as --iterations or --preset
    have their usual effect. Where it lacks an option that its preset sets today, the option is what it was then.
    """
    method = dict(itertools.pairwise(args)).get("--method", "")
    if method not in METHODS:
        return args
    args, kind = renamed_words(args, method), METHODS[method]
    full = {flag_of(name) for name in EVERY} <= set(args)
    if full or DERIVED in text:
        preset = kind.PRESETS.get(dict(itertools.pairwise(args)).get("--preset", ""), {})
        derived = dict(line[2:].partition(" ")[::2] for line in text.splitlines() if line.startswith("# --"))
        then = {name: derived.get(flag_of(name), old) for name, old in BEFORE_PRESETS.items()}
        before = {name: x for name, x in then.items() if preset.get(name, x) != x and flag_of(name) not in args}
        args += shlex.split(as_flags(before))
    if not full:
        return args
    flags = flags_of(method).parse(args)
    chosen = {name: flags[name] for name in ("method", "data", "labeled")}

    def differs(name: str) -> bool:
        current = combine(chosen, kind)
        return flags[name] != next(getattr(part, name) for part in current if hasattr(part, name))

    while differing := next((name for name in flags if name not in chosen and differs(name)), ""):
        chosen[differing] = flags[differing]
    return shlex.split(as_flags(chosen))


def combine(flags: dict[str, Any], kind: type[Method]) -> tuple[Options, Method.Options]:
    """Combines defaults < profile < preset < flags, and then sets what depends on other options.

    Returns:
        Options of the run and of its method.

    Raises:
        UserError: for an unknown preset.
    """
    usual = PROFILES.get(flags.get("profile", ""), {}).get("data")
    data = flags.get("data") or usual or str(usual_folder())
    profile = flags.get("profile") or ("phantom" if is_phantom(Path(data)) else "full")
    preset = flags.get("preset") or next(iter(kind.PRESETS))
    if preset not in kind.PRESETS:
        raise UserError(f"--preset {preset}: this method has no such preset. Choose from {', '.join(kind.PRESETS)}.")
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


def resolve(flags: dict[str, Any], kind: type[Method]) -> tuple[Options, Method.Options]:
    """`combine`, with a check that every flag has an effect.

    Raises:
        UserError: for a flag without effect, or an unknown preset.
    """
    o, method_options = combine(flags, kind)

    def without(name: str) -> Any:
        options = combine({key: value for key, value in flags.items() if key != name}, kind)
        return next(getattr(part, name) for part in options if hasattr(part, name))

    refuse_unused(flags, [Options, kind.Options], values_of(o, method_options, kind), without, WHY)
    if o.normalize == "window" and o.window is None:
        raise UserError("--normalize window needs --window LEVEL WIDTH, as --window 40 400 for the abdomen in CT.")
    window = o.window or []
    shown = " ".join(f"{value:g}" for value in window)
    if len(window) % 2:
        raise UserError(f"--window {shown} needs a LEVEL and a WIDTH, or both for each channel.")
    if not all(map(math.isfinite, window)) or min(window[1::2], default=1) <= 0:
        raise UserError(f"--window {shown}: the width must be above 0, and both be finite.")
    if o.sdm_of == "scan" and (o.random_scale or o.random_rotation):
        raise UserError(
            "--sdm-of scan does not go with --random-scale and --random-rotation: the distances of a whole scan do not "
            "hold in a crop that is scaled or rotated. Take --sdm-of crop."
        )
    if flags.get("batch_norm") == "separate" and (method_options.backbone == "uxnet" or o.unlabeled == 0):
        why = "--unlabeled 0" if o.unlabeled == 0 else "--backbone uxnet, which has no batch norm"
        raise UserError(f"--batch-norm separate does nothing with {why}. Leave one of them out.")
    if len({*o.flip_axes}) < len(o.flip_axes):
        raise UserError("--flip-axes names an axis twice. Name each once.")
    refuse_late_steps(flags, o.iterations)
    return o, method_options


def refuse_late_steps(flags: dict[str, Any], iterations: int) -> None:
    """Raises UserError for a chosen step of the learning rate that a run of so many iterations never reaches."""
    never = [step for step in flags.get("lr_steps") or () if step >= iterations]
    if never:
        raise UserError(f"--lr-steps {never[0]} never comes in --iterations {iterations}. Give steps below that.")


def values_of(o: Options, method_options: Method.Options, kind: type[Method]) -> Callable[[str], Any]:
    """Returns a function: name of an option, or of an attribute of the method -> its value with these options."""

    def value_of(name: str) -> Any:
        for options in (o, method_options):
            if hasattr(options, name):
                return getattr(options, name)
        with torch.device("meta"):  # shapes only, no memory
            return getattr(kind(method_options, iterations=o.iterations), name)

    return value_of
