"""Trains DTML, or another method of methods/, on labeled and unlabeled scans.

    python train_dtml.py                                      the phantom set, if the LA set is not under data/la
    python train_dtml.py --labeled 16                         16 of the 80 LA training scans labeled, the other 64 not
    python train_dtml.py --preset authors --seed 2            as the released code does it
    python train_dtml.py --method ua-mt --labeled 16          another method; --method ua-mt --help lists its options
    python train_dtml.py --resume auto                        go on where the same command was interrupted

The learning rate, the ramp-up, the batches and the dropout masks are functions of (seed, iteration) alone, so a run
that was stopped and resumed equals one that was not.
"""

import dataclasses
import itertools
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dataloaders.augmentation import AUGMENTATIONS
from dataloaders.cases import LA_FOLDER, PHANTOM_FOLDER
from dataloaders.diagnostic import kept_for_diagnosis
from dataloaders.findings import warnings_of
from dataloaders.normalization import NORMALIZATIONS
from dataloaders.orientation import common_orientation
from dataloaders.training import is_phantom, median_spacing, refuse_classes, training_cases, usual_labeled
from dataloaders.two_stream import SDM_OF, Patches, TwoStreamBatchSampler, make_loader
from dataloaders.volumes import CACHES, Volumes
from methods import METHODS, Method, Watch, restore
from methods.replay import replay_batch
from networks.backbone import PRECISIONS, STEEPEST, compile_networks, set_precision, set_recompute
from utils.checkpoint import fit_optimizer, load_checkpoint, save_checkpoint, write_whole
from utils.clock import Clock
from utils.devices import (
    choose_device,
    enough_memory,
    keep_freed_memory,
    peak_memory_gib,
    refuse_precision,
    seed_iteration,
    set_arithmetic,
)
from utils.distributed import RANK, RANKS, process_group, replicate, stop_of_any_rank, wait_for_rank_0
from utils.errors import Stopped, StopSignal, UserError, run
from utils.masks import label_map
from utils.options import (
    RENAMED,
    Condition,
    Parser,
    as_flags,
    fill,
    flag_of,
    harmless_names,
    option,
    options_file,
    refuse_differences,
    refuse_idle,
    renamed_words,
    varied,
)
from utils.ramps import SCHEDULES, cosine_rate, default_lr_steps, learning_rate
from utils.report import Report
from utils.run_folder import (
    MANIFEST,
    OPTIONS,
    has_checkpoint,
    make_manifest,
    make_run_folder,
    named_disk_errors,
    read_json,
    refuse_changed,
    refuse_existing,
    start_manifest,
    was_begun,
    write_json,
)
from utils.run_lock import refuse_locked, run_lock
from utils.slices import prediction_mesh, slice_picture

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
    """What every method shares. None means: depends on other options or on the data, settled by `read_options`."""

    method: str = option("dtml", "what to train; --method NAME --help lists its own options", choices=list(METHODS))
    preset: str = option("", "named settings of the method (default its first; most have paper and authors)")

    data: str = option(
        "", "folder of the data set (default data/la, else the phantom set)", group="data", harmless=True,
        only_if=TRAINS,
    )  # fmt: skip
    profile: str = option(
        "", "scale of the run: full (default), half, short, phantom", choices=list(PROFILES), group="data"
    )
    labeled: int = option(None, "the first N scans of train.list are labeled (default 16 of LA, 8 of the phantom set, "
                          "of other sets all that have a label)", group="data", type=int)  # fmt: skip
    unlabeled: int | None = option(None, "so many others without label (default all; 0: none)", group="data", type=int,
                                   only_if={"uses_unlabeled": bool})  # fmt: skip
    downsample: int = option(1, "pool this many voxels along each axis into one", group="data", minimum=1)
    patch_size: list[int] = option([112, 112, 80], "voxels of a crop along x, y, z", group="data", nargs=3, minimum=1)
    normalize: str = option(
        "none",
        "scan: each volume is clipped to its 0.5 and 99.5 percentiles, then scaled to zero mean and unit variance, in "
        "tests and predictions too",
        group="data",
        choices=NORMALIZATIONS,
    )
    augment: str = option("d4", "turns and flips of a crop", group="data", choices=AUGMENTATIONS)
    intensity: float = option(0.0, "random gamma, contrast and brightness of a crop, up to so much; 0: none",
                              group="data", minimum=0, maximum=2)  # fmt: skip
    sdm_of: str = option("crop", "distance maps of the crop, or cut out of those of the whole scan", group="data",
                         choices=SDM_OF, only_if={"needs_sdm": bool})  # fmt: skip
    cache: str = option("auto", "where the volumes stay", group="data", choices=CACHES, harmless=True, only_if=TRAINS)
    cache_folder: str = option("", "of --cache disk and none (default .cache in the data folder)", group="data",
                               harmless=True, only_if={"cache": ("disk", "none"), **TRAINS})  # fmt: skip
    workers: int = option(0, "processes that prepare crops", group="data", harmless=True, minimum=0, only_if=TRAINS)

    iterations: int = option(6000, "optimiser steps", group="training", minimum=1)
    batch_size: int = option(4, "crops in a batch, on each process", group="training", minimum=1)
    labeled_batch: int | None = option(None, "labeled ones (default half)", group="training", type=int, minimum=1)
    optimizer: str = option("sgd", "SGD with momentum, or AdamW", choices=list(OPTIMIZERS), group="training")
    lr: float = option(0.01, "learning rate", group="training", minimum=0)
    lr_schedule: str = option("steps", "how it falls: at --lr-steps, or as a cosine to 0", group="training",
                              choices=SCHEDULES)  # fmt: skip
    lr_steps: list[int] | None = option(
        None, "iterations of its drops (default 5/12 and 5/6 of all)", group="training", type=int, nargs="*", minimum=0,
        only_if={**DROPS, "lr_gamma": lambda factor: factor != 1},
    )  # fmt: skip
    lr_gamma: float = option(0.1, "factor of each drop", group="training", minimum=0,
                             only_if={**DROPS, "lr_steps": bool})  # fmt: skip
    momentum: float = option(0.9, "of SGD", group="training", minimum=0, only_if={"optimizer": ("sgd",)})
    weight_decay: float = option(1e-4, "decay of the weights", group="training", minimum=0)
    seed: int = option(1337, "of weights, batches and dropout", group="training", minimum=0, maximum=2**63 - 1)

    precision: str = option("fp32", "of the convolutions; networks with a distance head and k > 50 stay in fp32",
                            choices=PRECISIONS)  # fmt: skip
    compile: bool = option(False, "torch.compile the networks, which takes minutes at the start")
    recompute: bool = option(False, "less memory for a quarter more time: keep few maps for the way back",
                             harmless=True, only_if=TRAINS)  # fmt: skip
    device: str = option("auto", "auto, cpu, cuda or cuda:N", harmless=True)
    threads: int = option(0, "CPU threads; 0 leaves torch's choice", harmless=True, minimum=0)
    deterministic: bool = option(False, "operations that repeat exactly on a GPU too, at some cost", harmless=True)
    runs: str = option("runs", "where run folders go", harmless=True, only_if=ANEW)
    name: str = option("", "run folder below --runs (default from what varies)", harmless=True, only_if=ANEW)
    resume: str = option("", "auto: go on with this run if it exists; or a run folder or checkpoint", harmless=True,
                         only_if=TRAINS)  # fmt: skip
    from_diagnostic: str = option("", "run a diverged-rankR.pt's batch again: what in it is not finite", harmless=True)
    fresh: bool = option(False, "move an existing run folder aside and start again", harmless=True,
                         only_if={"resume": ("",), **TRAINS})  # fmt: skip
    save_every: int = option(500, "iterations between checkpoints", harmless=True, minimum=1, only_if=TRAINS)
    log_every: int = option(10, "iterations between points of the curves", harmless=True, minimum=1, only_if=TRAINS)
    picture_every: int = option(500, "iterations between pictures; 0: none", harmless=True, minimum=0, only_if=TRAINS)


NOT_REPLAYED = {"resume", "from_diagnostic", "fresh"}
EVERY = {
    "method", "preset", "data", "profile", "labeled", "downsample", "patch_size", "augment", "iterations", "batch_size",
    "lr", "lr_steps", "lr_gamma", "momentum", "weight_decay", "seed",
}  # fmt: skip
"""An early options.txt lists all options, these among them, and not only the chosen ones."""
WHY = {
    "needs_sdm": "no loss of this run needs distance maps",
    "uses_unlabeled": "this method learns from labeled scans only",
}
STOP_EVERY = 10  # iterations between two questions to the other GPUs whether someone asked to stop
LONG = {"options", "checksums"}  # of the manifest, not repeated in TensorBoard


def read_options(argv: list[str] | None) -> tuple[Options, Method.Options, Path, dict[str, Any] | None]:
    """The command line -> options of the run and of its method, its folder, and the checkpoint to go on from."""
    first = Parser(add_help=False)
    first.add_argument("--method", choices=list(METHODS))
    first.add_argument("--resume")
    first.add_argument("--from-diagnostic", dest="resume")
    words = first.expand(argv, chosen_words)
    known = vars(first.parse_known_args(words)[0])
    resume = known.get("resume", "auto")
    state = None if resume == "auto" else load_checkpoint(Path(resume))
    name = known.get("method", state["options"]["method"] if state else Options.method)
    if name not in METHODS:
        raise UserError(f"{resume} was trained with the method {name}, which this code does not have.")
    kind = METHODS[name]
    given = flags_of(name).parse(words)
    if state is not None:
        folder = Path(resume) if Path(resume).is_dir() else Path(resume).parent
    else:
        o, method_options = settle(given, kind)
        o.labeled = given["labeled"] if "labeled" in given else usual_labeled(Path(o.data), o.labeled)
        usual = combine({key: given[key] for key in ("data", "profile", "preset") if key in given}, kind)
        derived = combine({key: value for key, value in given.items() if key != "lr_steps"}, kind)[0].lr_steps
        skip = ["method", "labeled", "seed", *(["lr_steps"] if o.lr_steps == derived else [])]
        changed = varied(o, usual[0], skip) + varied(method_options, usual[1])
        dataset = Path(os.path.abspath(o.data)).name + ("" if o.profile in ("full", "phantom") else f"-{o.profile}")
        preset = [] if o.preset == next(iter(kind.PRESETS)) else [o.preset]
        words = [name, *preset, str(o.labeled), *changed, f"seed{o.seed}"]
        folder = Path(o.runs) / (o.name or f"{dataset}/" + "-".join(words))
        state = load_checkpoint(folder) if o.resume == "auto" and has_checkpoint(folder) else None
    if state is not None:
        if state["optimizer"] is None:
            raise UserError(f"{state['file']} holds weights to hand on, from which no training goes on. Give its run.")
        saved = state["options"]
        refuse_differences(given, saved, harmless_names([Options, kind.Options]), folder)
        o, method_options = (fill(cls, saved, given) for cls in (Options, kind.Options))
        refuse_idle(given, [Options], values_of(o, method_options, kind), saved.get, WHY)
    return o, method_options, folder, state


def flags_of(method: str) -> Parser:
    """The flags of the script and of a method."""
    parser = Parser(description=__doc__, prog="train_dtml.py", renamed=RENAMED.get(method))
    parser.add_dataclass(Options)
    parser.add_dataclass(METHODS[method].Options, title=f"method {method}")
    return parser


def chosen_words(words: list[str]) -> list[str]:
    """The flags of an @FILE under the names of today; of an early options.txt only those that were chosen, so that
    flags given beside it, as --iterations or --preset, mean what they mean without it."""
    names = [after for word, after in itertools.pairwise(words) if word == "--method"]
    if not names or names[-1] not in METHODS:
        return words
    words, kind = renamed_words(words, names[-1]), METHODS[names[-1]]
    if not {flag_of(name) for name in EVERY} <= set(words):
        return words
    given = flags_of(names[-1]).parse(words)
    chosen = {name: given[name] for name in ("method", "data", "labeled")}

    def other(name: str) -> bool:
        now = combine(chosen, kind)
        return given[name] != next(getattr(part, name) for part in now if hasattr(part, name))

    while differing := next((name for name in given if name not in chosen and other(name)), ""):
        chosen[differing] = given[differing]
    return shlex.split(as_flags(chosen))


def combine(given: dict[str, Any], kind: type[Method]) -> tuple[Options, Method.Options]:
    """Defaults < profile < preset < what is given; then what depends on other options."""
    data = given.get("data") or str(LA_FOLDER if LA_FOLDER.is_dir() else PHANTOM_FOLDER)
    profile = given.get("profile") or ("phantom" if is_phantom(Path(data)) else "full")
    preset = given.get("preset") or next(iter(kind.PRESETS))
    if preset not in kind.PRESETS:
        raise UserError(f"--preset {preset} is none of this method's. Choose from {', '.join(kind.PRESETS)}.")
    scale = dict(PROFILES[profile])
    if "iterations" in given:
        scale.pop("lr_steps", None)  # they belong to the profile's own schedule
    if not kind.uses_unlabeled:
        scale["unlabeled"] = 0
    layers = (scale, kind.PRESETS[preset], given, {"data": data, "profile": profile, "preset": preset})
    o = fill(Options, *layers)
    if o.lr_schedule == "cosine" and "lr_steps" not in given:
        o.lr_steps = []
    o.lr_steps = default_lr_steps(o.iterations) if o.lr_steps is None else o.lr_steps
    return o, fill(kind.Options, *layers)


def settle(given: dict[str, Any], kind: type[Method]) -> tuple[Options, Method.Options]:
    """All options from those that are given, by `combine`.

    Raises:
        UserError: a flag that does nothing beside the others, or an unknown preset.
    """
    o, method_options = combine(given, kind)

    def usual(name: str) -> Any:
        now = combine({key: value for key, value in given.items() if key != name}, kind)
        return next(getattr(part, name) for part in now if hasattr(part, name))

    refuse_idle(given, [Options, kind.Options], values_of(o, method_options, kind), usual, WHY)
    never = [step for step in given.get("lr_steps") or () if step >= o.iterations]
    if never:
        raise UserError(f"--lr-steps {never[0]} never comes in --iterations {o.iterations}. Give steps below that.")
    return o, method_options


def values_of(o: Options, method_options: Method.Options, kind: type[Method]) -> Callable[[str], Any]:
    """The value of an option, or of what a method says of itself with these options."""

    def value_of(name: str) -> Any:
        for part in (o, method_options, kind):
            if hasattr(part, name) and not isinstance(getattr(part, name), property):
                return getattr(part, name)
        with torch.device("meta"):  # shapes without memory
            return getattr(kind(method_options, iterations=o.iterations), name)

    return value_of


def rate(iteration: int, o: Options) -> float:
    """The learning rate of an iteration."""
    if o.lr_schedule == "cosine":
        return cosine_rate(iteration, o.iterations, o.lr)
    return learning_rate(iteration, o.lr, o.lr_steps or [], o.lr_gamma)


def speed(iterations: int, seconds: float) -> dict[str, float]:
    """What the manifest tells of a whole run, its earlier sessions included."""
    return {"wall_s": round(seconds, 1), "iterations_per_s": round(iterations / seconds, 4)}


def choose_arithmetic(method: Method, o: Options, device: torch.device) -> None:
    """--precision, --recompute and --compile.

    Raises:
        UserError: what this device, this method or the three together cannot do.
    """
    refuse_precision(o.precision, device)
    if o.compile and o.recompute:
        raise UserError("--compile decides by itself what it keeps for the way back. Leave out --recompute.")
    if not set_precision(method, o.precision, training=True):
        lower = f", or lower --k to {STEEPEST:g}" if hasattr(method.options, "k") else ""
        raise UserError(
            f"--precision {o.precision} changes nothing for --method {o.method}: its networks have a distance head and "
            f"stay in fp32. Leave it out{lower}."
        )
    set_recompute(method, o.recompute)
    if o.compile:
        compile_networks(method)


@torch.no_grad()
def show(
    report: Report, method: Method, patches: Patches, labeled: int, spacing: Sequence[float], done: int,
    device: torch.device,
) -> None:  # fmt: skip
    """One fixed slice of the first labeled and of the first unlabeled case: image, the method's maps, contours; and the
    surfaces of prediction and label of the labeled one, with voxels of `spacing` mm."""
    method.eval()
    for name, case in {"labeled": 0, "unlabeled": labeled}.items():
        if case < len(patches.volumes.cases):
            item = patches.middle(case)
            found = {key: v[0] for key, v in method.maps(item["image"][None].to(device)).items()}
            prediction = label_map(torch.stack(list(found.values())[: method.options.classes])).cpu().numpy()
            maps = {key: v.cpu().numpy() for key, v in found.items()}
            label = item["label"].cpu().numpy() if "label" in item else None
            title = f"{item['case']}, iteration {done}"
            report.picture(name, slice_picture(item["image"][0].cpu().numpy(), maps, prediction, label, title), done)
            if label is not None:
                report.mesh(f"surface/{name}", prediction_mesh(prediction, label, spacing), done)
    method.train()


@enough_memory("Lower --batch-size, --patch-size or --filters, or keep the volumes out of it with --cache disk.")
def main(argv: list[str] | None = None) -> None:
    words = Parser(add_help=False).expand(argv, chosen_words)
    o, method_options, folder, state = read_options(words)
    given = {"method": o.method, "data": o.data} | flags_of(o.method).parse(words)
    if not o.from_diagnostic:
        refuse_locked(folder)
    if state is None and not o.fresh and not (o.resume == "auto" and was_begun(folder)):
        refuse_existing(folder)
    if o.threads:
        torch.set_num_threads(o.threads)
    device = choose_device(o.device)
    set_arithmetic(deterministic=o.deterministic)
    keep_freed_memory()

    # method and data
    kind = METHODS[o.method]
    torch.manual_seed(o.seed)
    method = restore(state) if state else kind(method_options, iterations=o.iterations)
    if o.from_diagnostic and state is not None:
        print("\n".join(replay_batch(method, state, device)))
        return
    if state is not None and state["iteration"] >= o.iterations:
        print(f"{folder} is already done: {state['iteration']} of {o.iterations} iterations.", file=sys.stderr)
        manifest = read_json(folder / MANIFEST)
        if RANK == 0 and manifest and "wall_s" not in manifest:  # it was killed after its last checkpoint
            write_json(folder / MANIFEST, {**manifest, **speed(o.iterations, state["seconds"])})
        return
    cases, problems, labeled_batch = training_cases(
        Path(o.data), labeled=o.labeled, unlabeled=o.unlabeled, batch_size=o.batch_size,
        labeled_batch=o.labeled_batch, patch_size=o.patch_size, multiple=kind.side_multiple,
        classes=method_options.classes,
    )  # fmt: skip
    if method.needs_unlabeled and labeled_batch == o.batch_size:
        raise UserError(
            f"--method {o.method} needs unlabeled scans, but all {o.labeled} are labeled. Lower --labeled, or leave "
            "out --unlabeled 0."
        )
    volumes = Volumes(
        cases, cache=o.cache, folder=Path(o.cache_folder or Path(o.data, ".cache")), downsample=o.downsample,
        normalize=o.normalize, device=device, problems=problems,
    )  # fmt: skip
    if state is None:
        refuse_classes(cases, volumes.facts, method_options.classes)
    method.to(device)
    choose_arithmetic(method, o, device)
    trained = [p for p in method.parameters() if p.requires_grad]  # a teacher or critic is not this optimiser's
    optimizer = OPTIMIZERS[o.optimizer](trained, o)
    start, seconds = 0, 0.0
    if state is not None:
        if state["checksums"] != volumes.checksums:
            raise UserError(f"the volumes in {o.data} are not those {folder} began with. Resume with the same data.")
        if state["processes"] != RANKS:
            raise UserError(
                f"{folder} was trained by {state['processes']} processes, not {RANKS}. Resume it with as many."
            )
        try:
            fit_optimizer(optimizer, state["optimizer"])
        except ValueError as e:
            raise UserError(f"{state['file']} does not fit this code ({e}). Another version wrote it.") from e
        start, seconds = state["iteration"], state["seconds"]
    patches = Patches(
        volumes, patch_size=o.patch_size, augment=o.augment, seed=o.seed, sdm=method.needs_sdm,
        other=method.needs_other_crop, intensity=o.intensity, sdm_of=o.sdm_of,
    )  # fmt: skip
    sampler = TwoStreamBatchSampler(
        o.labeled, len(cases) - o.labeled, batch_size=o.batch_size, labeled_batch=labeled_batch,
        seed=o.seed, start=start, iterations=o.iterations, rank=RANK, ranks=RANKS,
    )  # fmt: skip
    spacing, orientation = median_spacing(cases), common_orientation(cases)
    everything = {**dataclasses.asdict(o), **dataclasses.asdict(method_options)}

    def contents(done: int) -> dict[str, Any]:
        return {
            "options": everything, "iteration": done, "seconds": time.monotonic() - began,
            "checksums": volumes.checksums, "images": volumes.fingerprints, "processes": RANKS, "spacing": spacing,
            "orientation": orientation,
            "method": method.state_dict(), "optimizer": optimizer.state_dict(),
        }  # fmt: skip

    with (
        process_group(device),
        StopSignal() as stop,
        named_disk_errors(folder),
        nullcontext() if RANK else open_report(folder, o, start, state) as report,
        kept_for_diagnosis(folder, patches, sampler, contents),
    ):
        if report:
            for line in warnings_of(
                volumes.facts, patch_size=o.patch_size, downsample=o.downsample, normalize=o.normalize
            ):
                report.say(line)
            replay = {name: value for name, value in everything.items() if name not in NOT_REPLAYED}
            if start == 0 or not (folder / OPTIONS).exists():
                chosen = {name: given.get(name) for name in replay} if start == 0 else replay
                write_whole(folder / OPTIONS, options_file(chosen, replay).encode())
            manifest = make_manifest(device, processes=RANKS, options=replay, checksums=volumes.checksums)
            manifest = start_manifest(folder, start, manifest)
            report.text({"options": replay, "manifest": {k: v for k, v in manifest.items() if k not in LONG}})
        wait_for_rank_0()
        model = replicate(method, device)
        began = time.monotonic() - seconds

        # the loop
        clock, watch, done, number = Clock(device), Watch(optimizer, device), start, 0
        method.train()
        for iteration, batch in enumerate(make_loader(patches, sampler, workers=o.workers, stop=stop), start):
            batch = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            seed_iteration(o.seed, iteration, RANK)
            for group in optimizer.param_groups:
                group["lr"] = rate(iteration, o)
            clock.lap("data")

            losses = model(batch, iteration)
            clock.lap("forward")
            optimizer.zero_grad(set_to_none=True)
            losses.total.backward()
            clock.lap("backward")
            watch.look(losses, method, batch, iteration)
            optimizer.step()
            method.after_step(batch, iteration)
            clock.lap("step")

            done = iteration + 1
            if report:
                report.iteration(iteration, losses, optimizer.param_groups[0]["lr"], clock, peak_memory_gib(device))
                if o.picture_every and (done % o.picture_every == 0 or done == o.iterations):
                    show(report, method, patches, o.labeled, spacing or [1.0] * 3, done, device)
                clock.lap("logging")
            saving = done % o.save_every == 0 or done == o.iterations
            ask = device.type == "cpu" or done % STOP_EVERY == 0 or saving
            number = stop_of_any_rank(stop.number, ask=ask, device=device)
            if number or saving:
                watch.settle()
            if report and (number or saving):
                save_checkpoint(folder, contents(done))
                clock.lap("saving")
            if number:
                break
        if done < o.iterations:
            after = f"{done} of {o.iterations} iterations"
            if number:
                wait_for_rank_0()  # it is still saving, and torchrun ends all when one leaves
            elif RANKS > 1:  # told while it waited for a batch, and the others wait for its gradients
                raise Stopped(stop.number, f"no batch came after {after}; {folder} is as it was last saved")
            else:
                watch.settle()
                save_checkpoint(folder, contents(done))
            raise Stopped(number or stop.number, f"saved {folder} after {after}; go on with --resume {folder}")

        # last word
        if report:
            wall = time.monotonic() - began
            measured: dict[str, Any] = {
                **speed(o.iterations, wall),
                "peak_memory_gib": round(peak_memory_gib(device), 2),
                "time_shares": {name: round(share, 4) for name, share in clock.all_shares().items()},
            }
            write_json(folder / MANIFEST, {**manifest, **measured})
            report.say(f"done: {o.iterations} iterations in {wall / 60:.1f} min, {measured['iterations_per_s']} it/s, "
                       f"{measured['peak_memory_gib']} GiB at most")  # fmt: skip
            report.say("time: " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in measured["time_shares"].items()))
            report.say(f"test it:      python test_la.py --checkpoint {folder}")
            report.say(f"see curves:   tensorboard --logdir {folder}")


@contextmanager
def open_report(folder: Path, o: Options, start: int, state: dict[str, Any] | None) -> Iterator[Report]:
    """Makes the run folder, the only thing written before the first iteration, locks it, and opens its log."""
    refuse_locked(folder)  # or --fresh would move it from under the run that is at it
    make_run_folder(folder, fresh=o.fresh and start == 0)
    with run_lock(folder):
        refuse_changed(folder, state)
        with Report(folder, start=start, iterations=o.iterations, log_every=o.log_every) as report:
            yield report


if __name__ == "__main__":
    run(main)
