"""Trains DTML, or another method of methods/, on labeled and unlabeled scans.

    python train_dtml.py                                      the phantom set, if the LA set is not under data/la
    python train_dtml.py --labeled 16                         16 of the 80 LA training scans labeled, the other 64 not
    python train_dtml.py --preset authors --seed 2            as the released code does it
    python train_dtml.py --method supervised --labeled 80     an upper bound
    python train_dtml.py --resume auto                        go on where the same command was interrupted

The learning rate, the ramp-up, the batches and the dropout masks are functions of (seed, iteration) alone, so a run
that was stopped and resumed equals one that was not.
"""

import dataclasses
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from dataloaders.augmentation import AUGMENTATIONS
from dataloaders.cases import LA_FOLDER, PHANTOM_FOLDER, find_cases, lists_of
from dataloaders.phantom import make_phantom_set
from dataloaders.two_stream import Patches, TwoStreamBatchSampler, make_loader
from dataloaders.volumes import CACHES, Volumes
from methods import METHODS, Losses, Method
from networks.vnet import STRIDE
from utils.checkpoint import load_checkpoint, save_checkpoint, write_whole
from utils.devices import choose_device, peak_memory_gib, seed_iteration, set_arithmetic
from utils.distributed import RANK, RANKS, any_rank, process_group, wait_for_rank_0
from utils.errors import Diverged, Stopped, StopSignal, UserError, run
from utils.options import Parser, as_flags, fill, harmless_names, option
from utils.pictures import LABEL, PREDICTION, fixed_slice, panels
from utils.ramps import default_lr_steps, learning_rate
from utils.report import Report
from utils.run_folder import MANIFEST, OPTIONS, has_checkpoint, make_manifest, open_run_folder, write_json


@dataclasses.dataclass
class Options:
    """What every method shares. None means: depends on other options, settled by `settle`."""

    method: str = option(
        "dtml", "what to train; METHOD --help lists its own options", group="method", choices=list(METHODS)
    )
    preset: str | None = option(
        None, "named settings of the method: paper (default), authors", group="method", type=str
    )

    data: str | None = option(
        None, "folder of the data set (default data/la, else the phantom set)", group="data", type=str
    )
    profile: str | None = option(
        None,
        "scale of the run; default full, phantom on the phantom set",
        group="data",
        type=str,
        choices=("full", "half", "phantom"),
    )
    labeled: int = option(16, "the first N scans of train.list are labeled", group="data")
    unlabeled: int | None = option(
        None, "how many of the others to use without label (default all; 0: labeled only)", group="data", type=int
    )
    downsample: int = option(1, "pool this many voxels along each axis into one", group="data")
    patch_size: list[int] = option([112, 112, 80], "voxels of a crop along x, y, z", group="data", nargs=3)
    augment: str = option("d4", "turns and flips of a crop", group="data", choices=AUGMENTATIONS)
    cache: str = option("auto", "where the volumes stay", group="data", choices=CACHES, harmless=True)
    workers: int = option(0, "processes that prepare crops; cached volumes need none", group="data", harmless=True)

    iterations: int = option(6000, "optimiser steps", group="optimisation")
    batch_size: int = option(4, "crops in a batch, on each process", group="optimisation")
    labeled_batch: int | None = option(
        None, "labeled crops of these (default half, or all without unlabeled scans)", group="optimisation", type=int
    )
    lr: float = option(0.01, "learning rate of SGD", group="optimisation")
    lr_steps: list[int] | None = option(
        None,
        "iterations at which it drops (default 5/12 and 5/6 of all: 2500 5000)",
        group="optimisation",
        type=int,
        nargs="*",
    )
    lr_gamma: float = option(0.1, "factor of each drop", group="optimisation")
    momentum: float = option(0.9, "of SGD", group="optimisation")
    weight_decay: float = option(1e-4, "of SGD", group="optimisation")
    seed: int = option(1337, "of the initial weights, the batches and the dropout", group="optimisation")

    device: str = option("auto", "auto, cpu, cuda or cuda:N", harmless=True)
    threads: int = option(0, "CPU threads; 0 leaves torch's choice", harmless=True)
    deterministic: bool = option(False, "bit-exact repeats on a GPU too, at some cost", harmless=True)
    runs: str = option("runs", "where run folders go", harmless=True)
    name: str | None = option(None, "run folder below --runs (default from what varies)", type=str, harmless=True)
    resume: str | None = option(
        None, "auto: go on with this run if it exists; or a run folder or checkpoint", type=str, harmless=True
    )
    fresh: bool = option(False, "move an existing run folder aside and start again", harmless=True)
    save_every: int = option(500, "iterations between checkpoints", harmless=True)
    log_every: int = option(10, "iterations between points of the curves", harmless=True)
    picture_every: int = option(500, "iterations between pictures; 0: none", harmless=True)


PROFILES: dict[str, dict[str, Any]] = {
    "full": {},
    "half": {"downsample": 2, "patch_size": [64, 64, 32], "filters": 8, "iterations": 2400},
    "phantom": {"labeled": 8, "patch_size": [48, 48, 32], "filters": 8, "iterations": 300, "picture_every": 100},
}
NOT_REPLAYED = {"resume", "fresh"}


def read_options(argv: list[str] | None) -> tuple[Options, Method.Options, Path, dict[str, Any] | None]:
    """The command line -> options of the run and of its method, its folder, and the checkpoint to go on from."""
    first = Parser(add_help=False)
    first.add_argument("--method", choices=list(METHODS))
    first.add_argument("--resume")
    words = first.expand(argv)
    known = vars(first.parse_known_args(words)[0])
    state = None
    if known.get("resume", "auto") != "auto":
        state = load_checkpoint(Path(known["resume"]))
        known.setdefault("method", state["options"]["method"])
    kind = METHODS[known.get("method", Options.method)]

    parser = Parser(description=__doc__, prog="train_dtml.py")
    parser.add_dataclass(Options)
    parser.add_dataclass(kind.Options, title=f"method {kind.__name__}")
    given = parser.parse(words)
    if state is None:
        options, method_options = settle(given, kind)
        folder = Path(options.runs) / (options.name or default_name(options, method_options, given, kind))
        if options.resume == "auto" and has_checkpoint(folder):
            state = load_checkpoint(folder)
    else:
        path = Path(known["resume"])
        folder = path if path.is_dir() else path.parent
    if state is not None:
        harmless = harmless_names([Options, kind.Options])
        differ = {k: v for k, v in given.items() if k not in harmless and v != state["options"].get(k)}
        if differ:
            lines = "\n".join(
                f"  --{k.replace('_', '-')}: {state['options'].get(k)} before, {v} now" for k, v in differ.items()
            )
            raise UserError(f"the run {folder} was started with other options. Resume it without them:\n{lines}")
        options, method_options = (fill(c, state["options"], given) for c in (Options, kind.Options))
    return options, method_options, folder, state


def settle(given: dict[str, Any], kind: type[Method]) -> tuple[Options, Method.Options]:
    """Defaults < profile < preset < the command line; then what depends on other options."""
    data = given.get("data") or str(LA_FOLDER if LA_FOLDER.is_dir() else PHANTOM_FOLDER)
    profile = given.get("profile") or ("phantom" if Path(data) == PHANTOM_FOLDER else "full")
    preset = given.get("preset") or next(iter(kind.PRESETS))
    if preset not in kind.PRESETS:
        raise UserError(
            f"--preset {preset} is none of {given.get('method', Options.method)}'s: {', '.join(kind.PRESETS)}."
        )
    named = {"data": data, "profile": profile, "preset": preset}
    layers = (PROFILES[profile], kind.PRESETS[preset], given, named)
    options, method_options = fill(Options, *layers), fill(kind.Options, *layers)
    if not kind.uses_unlabeled:
        options.unlabeled = 0
    if options.lr_steps is None:
        options.lr_steps = default_lr_steps(options.iterations)
    return options, method_options


def default_name(options: Options, method_options: Method.Options, given: dict[str, Any], kind: type[Method]) -> str:
    """From what varies, e.g. la/dtml-16-seed1337 or la-half/dtml-authors-16-k150-seed1."""
    dataset = Path(options.data or "").name + ("" if options.profile in ("full", "phantom") else f"-{options.profile}")
    usual, usual_method = settle({k: given[k] for k in ("data", "profile", "preset") if k in given}, kind)
    varied = []
    for now, before in ((options, usual), (method_options, usual_method)):
        for f in dataclasses.fields(now):
            value = getattr(now, f.name)
            derived = f.name == "lr_steps" and "lr_steps" not in given
            if (
                not f.metadata["harmless"]
                and not derived
                and f.name not in ("labeled", "seed", "method")
                and value != getattr(before, f.name)
            ):
                shown = "x".join(map(str, value)) if isinstance(value, list) else value
                varied.append(f"{f.name.replace('_', '')}{shown}")
    preset = [] if options.preset == next(iter(kind.PRESETS)) else [options.preset]
    words = [options.method, *preset, options.labeled, *varied, f"seed{options.seed}"]
    return f"{dataset}/" + "-".join(map(str, words))


def open_data(o: Options, device: torch.device) -> tuple[Volumes, int]:
    """The training volumes, labeled ones first, and how many these are. The test list is read, its cases never."""
    folder = Path(o.data or "")
    if folder == PHANTOM_FOLDER:
        if RANK == 0:
            print(f"No LA data in {LA_FOLDER}, so this run uses the PHANTOM SET in {folder}: made-up atria, good for trying "
                  "things out, not for figures to compare with any paper. data/README.md tells where LA comes from.", file=sys.stderr)  # fmt: skip
        make_phantom_set(folder)
    train, _ = lists_of(folder)
    if any(side % STRIDE or side < STRIDE for side in o.patch_size):
        near = [max(STRIDE, round(side / STRIDE) * STRIDE) for side in o.patch_size]
        raise UserError(
            f"--patch-size {' '.join(map(str, o.patch_size))} must be multiples of {STRIDE}. Try {' '.join(map(str, near))}."
        )
    if not 1 <= o.labeled <= len(train):
        raise UserError(f"--labeled {o.labeled} must lie between 1 and the {len(train)} cases of train.list.")
    others = train[o.labeled :] if o.unlabeled is None else train[o.labeled : o.labeled + o.unlabeled]
    if o.unlabeled is not None and not 0 <= o.unlabeled <= len(train) - o.labeled:
        raise UserError(
            f"--unlabeled {o.unlabeled} must lie between 0 and {len(train) - o.labeled}, the cases left after --labeled."
        )
    if o.labeled_batch is None:
        o.labeled_batch = max(o.batch_size // 2, 1) if others else o.batch_size
    if not 1 <= o.labeled_batch <= min(o.batch_size, o.labeled):
        raise UserError(
            f"--labeled-batch {o.labeled_batch} must lie between 1 and the smaller of --batch-size {o.batch_size} and "
            f"--labeled {o.labeled}. Label more cases or take a smaller batch."
        )
    if (o.labeled_batch < o.batch_size) != bool(others):
        raise UserError(
            f"--labeled-batch {o.labeled_batch} of --batch-size {o.batch_size} does not fit {len(others)} unlabeled cases. "
            "Fill the batch with labeled crops exactly if there is no unlabeled case."
        )
    cases, problems = find_cases(folder, train[: o.labeled], labeled=True)
    more, more_problems = find_cases(folder, others, labeled=False)
    volumes = Volumes(
        cases + more, cache=o.cache, downsample=o.downsample, device=device, problems=problems + more_problems
    )
    return volumes, len(cases)


def check_finite(losses: Losses, method: Method, iteration: int, batch: dict[str, Any], device: torch.device) -> None:
    """Raises Diverged, naming the term or the parameter, before a bad gradient can reach the weights of any process."""
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(gradients.values())
    bad = not torch.isfinite(losses.total.detach() + norm)
    if not any_rank(bad, device=device)[0]:
        return
    terms = [f"the loss {name}" for name, value in losses.terms.items() if not torch.isfinite(value)]
    grads = [f"the gradient of {name}" for name, g in gradients.items() if not torch.isfinite(g).all()]
    what = ", ".join(terms or grads[:3] or ["a loss of another process"])
    raise Diverged(
        f"at iteration {iteration} {what} is not finite (cases {', '.join(batch['case'])}). The weights of the last "
        "checkpoint are intact; try a lower --lr or another --seed."
    )


@torch.no_grad()
def show_pictures(
    report: Report, method: Method, patches: Patches, labeled: int, done: int, device: torch.device
) -> None:
    """One fixed slice of the first labeled and of the first unlabeled case: image, the method's maps, contours."""
    method.eval()
    for name, case in {"labeled": 0, "unlabeled": labeled}.items():
        if case == len(patches.volumes.cases):
            continue
        item = patches.middle(case)
        maps = {k: v[0].cpu().numpy() for k, v in method.maps(item["image"][None].to(device)).items()}
        label = item["label"].cpu().numpy() if "label" in item else None
        z = fixed_slice(label, item["image"].shape[-1])
        contours = {"prediction": (next(iter(maps.values()))[..., z] > 0.5, PREDICTION)}
        if label is not None:
            contours["label"] = (label[..., z], LABEL)
        slices = {k: v[..., z] for k, v in maps.items()}
        report.picture(
            name,
            panels(item["image"][0, ..., z].cpu().numpy(), slices, contours, f"{item['case']} iteration {done}"),
            done,
        )
    method.train()


def main(argv: list[str] | None = None) -> None:
    o, method_options, folder, state = read_options(argv)
    if o.threads:
        torch.set_num_threads(o.threads)
    device = choose_device(o.device)
    set_arithmetic(deterministic=o.deterministic)

    # data and method
    volumes, labeled = open_data(o, device)
    torch.manual_seed(o.seed)
    method = METHODS[o.method](method_options, iterations=o.iterations).to(device)
    optimizer = torch.optim.SGD(method.parameters(), lr=o.lr, momentum=o.momentum, weight_decay=o.weight_decay)
    start, seconds = 0, 0.0
    if state is not None:
        if state["checksums"] != volumes.checksums:
            raise UserError(
                f"the volumes in {o.data} are not those that the run {folder} began with. Resume with the same data."
            )
        method.load_state_dict(state["method"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds = state["iteration"], state["seconds"]
        if start >= o.iterations:
            print(f"{folder} is already done: {start} of {o.iterations} iterations.", file=sys.stderr)
            return
    patches = Patches(volumes, patch_size=tuple(o.patch_size), augment=o.augment, seed=o.seed, sdm=method.needs_sdm)
    sampler = TwoStreamBatchSampler(
        labeled, len(volumes.cases) - labeled, batch_size=o.batch_size, labeled_batch=o.labeled_batch or o.batch_size,
        seed=o.seed, start=start, iterations=o.iterations, rank=RANK, ranks=RANKS,
    )  # fmt: skip
    everything = {**dataclasses.asdict(o), **dataclasses.asdict(method_options)}

    with (
        process_group(device),
        StopSignal() as stop,
        nullcontext() if RANK else open_report(folder, o, start) as report,
    ):
        if report:
            replay = {name: value for name, value in everything.items() if name not in NOT_REPLAYED}
            write_whole(folder / OPTIONS, as_flags(replay).encode())
            manifest = make_manifest(device, processes=RANKS, options=replay, checksums=volumes.checksums)
            write_json(folder / MANIFEST, manifest)
            report.text({"options": replay, "manifest": {k: v for k, v in manifest.items() if k != "options"}})
        wait_for_rank_0()
        model = (
            DistributedDataParallel(method, device_ids=[device] if device.type == "cuda" else None)
            if RANKS > 1
            else method
        )
        began = time.monotonic() - seconds

        # the loop
        method.train()
        for iteration, batch in enumerate(make_loader(patches, sampler, workers=o.workers), start):
            batch = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            seed_iteration(o.seed, iteration, RANK)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(iteration, o.lr, o.lr_steps or [], o.lr_gamma)

            losses = model(batch, iteration)
            optimizer.zero_grad(set_to_none=True)
            losses.total.backward()
            check_finite(losses, method, iteration, batch, device)
            optimizer.step()
            method.after_step(batch, iteration)

            done = iteration + 1
            if report:
                report.iteration(iteration, losses, optimizer.param_groups[0]["lr"])
                if o.picture_every and (done % o.picture_every == 0 or done == o.iterations):
                    show_pictures(report, method, patches, labeled, done, device)
            number = int(any_rank(stop.number, device=device)[0])
            if report and (number or done % o.save_every == 0 or done == o.iterations):
                save_checkpoint(folder, {
                    "options": everything, "iteration": done, "seconds": time.monotonic() - began,
                    "checksums": volumes.checksums, "method": method.state_dict(), "optimizer": optimizer.state_dict(),
                })  # fmt: skip
            if number and done < o.iterations:
                raise Stopped(
                    number, f"saved {folder} after {done} of {o.iterations} iterations; go on with --resume {folder}"
                )

        # last word
        if report:
            wall = time.monotonic() - began
            measured = {
                "wall_s": round(wall, 1),
                "iterations_per_s": round(o.iterations / wall, 4),
                "peak_memory_gib": round(peak_memory_gib(device), 2),
            }
            write_json(folder / MANIFEST, {**manifest, **measured})
            report.say(f"done: {o.iterations} iterations in {wall / 60:.1f} min, {measured['iterations_per_s']} it/s, "
                       f"{measured['peak_memory_gib']} GiB at most")  # fmt: skip
            report.say(f"test it:      python test_la.py --checkpoint {folder}")
            report.say(f"see curves:   tensorboard --logdir {folder}")


def open_report(folder: Path, o: Options, start: int) -> Report:
    """Makes the run folder, the only thing written before the first iteration, and its log."""
    open_run_folder(folder, resume=start > 0, fresh=o.fresh)
    return Report(folder, start=start, iterations=o.iterations, log_every=o.log_every)


if __name__ == "__main__":
    run(main)
