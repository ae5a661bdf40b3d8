"""Trains DTML, or another method of methods/, on labeled and unlabeled scans.

    python train_dtml.py                                      the phantom set, if the LA set is not under data/la
    python train_dtml.py --labeled 16                         16 of the 80 LA training scans labeled, the other 64 not
    python train_dtml.py --preset authors --seed 2            like the released code
    python train_dtml.py --method ua-mt --labeled 16          another method; --method ua-mt --help lists its options
    python train_dtml.py --data data/mine --validate-every 200   keep the best in validation.list, of own data
    python train_dtml.py --data data/mine --init runs/la/dtml-16-seed1337   start from the weights of another run
    python train_dtml.py --resume auto                        continue where the same command was interrupted

Learning rate, ramps, batches and dropout masks are functions of (seed, iteration) alone. A stopped and resumed run is
therefore equal to an uninterrupted one.
"""

import dataclasses
import sys
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from dataloaders.augmentation import Strengths
from dataloaders.channels import channel_names, channels_of_set
from dataloaders.class_names import class_names
from dataloaders.diagnostic import kept_for_diagnosis
from dataloaders.findings import warnings_of
from dataloaders.normalization import normalization_of
from dataloaders.orientation import common_orientation, known_orientation
from dataloaders.training import median_spacing, refuse_classes, training_cases, validation_names
from dataloaders.two_stream import Patches, TwoStreamBatchSampler, make_loader
from dataloaders.unseen import open_cases
from dataloaders.volumes import Volumes
from evaluation.slices import prediction_mesh, slice_picture
from losses.ramps import cosine_rate, learning_rate
from methods import METHODS, Method, Watch, restore
from networks.backbone import STEEPEST, compile_networks, set_precision, set_recompute
from settings import NOT_REPLAYED, OPTIMIZERS, Options, chosen_flags, flags_of, read_options
from tools.replay import replay_batch
from tools.starting import further, header, keep_finished, start_from
from tools.validation import validation_dice
from utils.checkpoint import BEST, fit_optimizer, load_checkpoint, save_checkpoint, write_whole
from utils.clock import Clock
from utils.devices import (
    choose_device,
    enough_memory,
    keep_freed_memory,
    peak_memory_gib,
    refuse_precision,
    seed_iteration,
    set_arithmetic,
    why_device,
)
from utils.distributed import RANK, RANKS, process_group, replicate, stop_of_any_rank, wait_for_rank_0
from utils.errors import Stopped, StopSignal, UserError, run
from utils.masks import label_map
from utils.options import (
    Parser,
    fill,
    options_file,
)
from utils.report import Report
from utils.run_folder import (
    MANIFEST,
    OPTIONS,
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

STOP_EVERY = 10  # iterations between checks whether any GPU's process received a stop signal
LONG = {"options", "checksums"}  # entries of the manifest that are not copied to TensorBoard


def current_lr(iteration: int, o: Options) -> float:
    """The learning rate of an iteration by --lr-schedule."""
    if o.lr_schedule == "cosine":
        return cosine_rate(iteration, o.iterations, o.lr)
    return learning_rate(iteration, o.lr, o.lr_steps or [], o.lr_gamma)


def speed(iterations: int, seconds: float) -> dict[str, float]:
    """Entries of the manifest about a whole run, including the time before it was resumed."""
    return {"wall_s": round(seconds, 1), "iterations_per_s": round(iterations / seconds, 4)}


def earlier_images(origin: dict[str, Any] | None, state: dict[str, Any] | None, own: Container[str]) -> dict[str, str]:
    """Name -> fingerprint of the scans that the weights of --init were trained on, so that none of them is tested on.

    Args:
        origin: the checkpoint of --init of a new run.
        state: the checkpoint of a resumed run, which knows them.
        own: names of this run's own scans.
    """
    if origin is not None:
        return {f"{name} of {origin['file']}": mark for name, mark in origin.get("images", {}).items()}
    return {name: mark for name, mark in (state or {}).get("images", {}).items() if name not in own}


def choose_arithmetic(method: Method, o: Options, device: torch.device) -> None:
    """Applies --precision, --recompute and --compile.

    Raises:
        UserError: if the device or the method does not support an option, or the options exclude each other.
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
    """Adds pictures to the report: a fixed slice of the first labeled and of the first unlabeled case.

    A picture shows the image, the method's maps and the contours. The labeled case also gets the surfaces of prediction
    and label.

    Args:
        report: the open report.
        method: the method; it is in training mode afterwards.
        patches: crops of the training.
        labeled: number of labeled cases, the index of the first unlabeled one.
        spacing: mm along x, y, z.
        done: finished iterations.
        device: device of the method.
    """
    method.eval()
    for name, case in {"labeled": 0, "unlabeled": labeled}.items():
        if case < len(patches.volumes.cases):
            item = patches.middle(case)
            tensors = {key: v[0] for key, v in method.maps(item["image"][None].to(device)).items()}
            prediction = label_map(torch.stack(list(tensors.values())[: method.options.classes])).cpu().numpy()
            maps = {key: v.cpu().numpy() for key, v in tensors.items()}
            label = item["label"].cpu().numpy() if "label" in item else None
            title = f"{item['case']}, iteration {done}"
            orientation = known_orientation(patches.volumes.cases[case])
            image = item["image"][0].cpu().numpy()
            report.picture(name, slice_picture(image, maps, prediction, label, title, orientation), done)
            if label is not None:
                report.mesh(f"surface/{name}", prediction_mesh(prediction, label, spacing), done)
    method.train()


@enough_memory(
    "Use --recompute, which changes no result, or keep the volumes out of it with --cache disk. Then lower "
    "--batch-size, --patch-size or --filters."
)
def main(argv: list[str] | None = None) -> None:
    args = Parser(add_help=False).expand(argv, chosen_flags)
    o, method_options, folder, state = read_options(args, __doc__)
    flags = {"method": o.method, "data": o.data} | flags_of(o.method).parse(args)
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
    if state is None:
        method_options.channels = channels_of_set(Path(o.data))
    torch.manual_seed(o.seed)
    method = restore(state) if state else kind(method_options, iterations=o.iterations)
    origin = load_checkpoint(Path(o.init)) if o.init and state is None else None
    began_from = start_from(method, o.method, origin) if origin else None
    if o.from_diagnostic and state is not None:
        print("\n".join(replay_batch(method, state, device)))
        return
    if state is not None and state["iteration"] >= o.iterations:
        print(f"{folder} is already done: {state['iteration']} of {o.iterations} iterations. --resume {folder} with "
              "more --iterations goes on from there.", file=sys.stderr)  # fmt: skip
        manifest = read_json(folder / MANIFEST)
        if RANK == 0 and manifest and "wall_s" not in manifest:  # killed between its last checkpoint and the manifest
            write_json(folder / MANIFEST, {**manifest, **speed(o.iterations, state["seconds"])})
        return
    cases, problems, labeled_batch = training_cases(
        Path(o.data), labeled=o.labeled, unlabeled=o.unlabeled, batch_size=o.batch_size,
        labeled_batch=o.labeled_batch, patch_size=o.patch_size, multiples=method.side_multiples,
        classes=method_options.classes, channels=method_options.channels, fold=o.fold,
    )  # fmt: skip
    labeled = sum(case.labeled for case in cases)
    if method.needs_unlabeled and labeled_batch == o.batch_size:
        raise UserError(
            f"--method {o.method} needs unlabeled scans, but all {o.labeled} are labeled. Lower --labeled, or leave "
            "out --unlabeled 0."
        )
    to_validate = validation_names(Path(o.data), o.labeled, o.fold) if o.validate_every else []
    normalize = normalization_of(dataclasses.asdict(o))
    volumes = Volumes(
        cases, cache=o.cache, folder=Path(o.cache_folder or Path(o.data, ".cache")), downsample=o.downsample,
        normalize=normalize, device=device, problems=problems,
    )  # fmt: skip
    if state is None:
        refuse_classes(cases, volumes.facts, method_options.classes)
    images = volumes.fingerprints | earlier_images(origin, state, volumes.fingerprints)
    validation, _ = open_cases(
        Path(o.data), to_validate, method_options.classes, volumes.checksums, images, method_options.channels, normalize
    )
    channels = channel_names(Path(o.data), method_options.channels)
    method.to(device)
    choose_arithmetic(method, o, device)
    trained = [p for p in method.parameters() if p.requires_grad]  # not a teacher or a critic
    optimizer = OPTIMIZERS[o.optimizer](trained, o)
    start, seconds = 0, 0.0
    best: dict[str, Any] | None = state.get("best") if state else None
    extended: list[int] = state.get("extended", []) if state else []
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
        object_share=o.object_share, flip_axes=o.flip_axes, strengths=fill(Strengths, dataclasses.asdict(o)),
    )  # fmt: skip
    sampler = TwoStreamBatchSampler(
        labeled, len(cases) - labeled, batch_size=o.batch_size, labeled_batch=labeled_batch,
        seed=o.seed, start=start, iterations=o.iterations, rank=RANK, ranks=RANKS,
    )  # fmt: skip
    spacing, orientation = median_spacing(cases), common_orientation(cases)
    names = {str(c): name for c, name in class_names(Path(o.data)).items() if c <= method_options.classes}
    everything = {**dataclasses.asdict(o), **dataclasses.asdict(method_options)}

    def contents(done: int) -> dict[str, Any]:
        return {
            "options": everything, "iteration": done, "seconds": time.monotonic() - began,
            "checksums": volumes.checksums, "images": images, "processes": RANKS, "spacing": spacing,
            "orientation": orientation, "channel_names": channels,
            **({"class_names": names} if names else {}),
            "method": method.state_dict(), "optimizer": optimizer.state_dict(), **({"best": best} if best else {}),
            **({"extended": extended} if extended else {}),
        }  # fmt: skip

    with (
        process_group(device),
        StopSignal() as stop,
        named_disk_errors(folder),
        nullcontext() if RANK else open_report(folder, o, start, state) as report,
        kept_for_diagnosis(folder, patches, sampler, contents),
    ):
        if report:
            for line in header(
                o, folder, labeled, len(cases) - labeled, len(validation), labeled_batch,
                sum(p.numel() for p in trained), why_device(o.device, device), start, current_lr(start, o),
            ):  # fmt: skip
                report.say(line)
            if state and "before" in state:
                report.say(further(state, o.iterations, current_lr(start - 1, fill(Options, state["before"])),
                                   current_lr(start, o)))  # fmt: skip
                keep_finished(folder, state)
            for line in warnings_of(
                volumes.facts, patch_size=o.patch_size, downsample=o.downsample, normalize=o.normalize
            ):
                report.say(line)
            if o.workers and volumes.on_device:
                report.say(f"--workers {o.workers} is not used: the volumes are on the GPU, where crops are made. "
                           "--cache ram uses it.")  # fmt: skip
            replay = {name: value for name, value in everything.items() if name not in NOT_REPLAYED}
            if start == 0 or not (folder / OPTIONS).exists():
                chosen = {name: flags.get(name) for name in replay} if start == 0 else replay
                write_whole(folder / OPTIONS, options_file(chosen, replay).encode())
            manifest = make_manifest(device, processes=RANKS, options=replay, checksums=volumes.checksums,
                                     channel_names=channels,
                                     **({"init": began_from} if began_from else {}))  # fmt: skip
            manifest = start_manifest(folder, start, {**manifest, **({"extended": extended} if extended else {})})
            if start == 0:
                report.settings(replay, "dice/validation" if validation else "loss/total")
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
                group["lr"] = current_lr(iteration, o)
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
            scores: dict[str, float] = {}
            if validation and (done % o.validate_every == 0 or done == o.iterations):
                watch.settle()
                scores["dice/validation"] = dice = validation_dice(
                    method, validation, device, downsample=o.downsample, normalize=normalize,
                    patch_size=o.patch_size, batch_size=o.batch_size,
                )  # fmt: skip
                clock.lap("validation")
                if report:
                    better = dice > (best["dice"] if best else -1)
                    text = f"validation after {done} iterations: Dice {100 * dice:.2f} %, {len(validation)} scans"
                    report.say(text + (", the best so far" if better else ""))
                    if better:
                        best = {"iteration": done, "dice": dice}
                        save_checkpoint(folder, contents(done), BEST)
                        clock.lap("saving")
            if report:
                rate = optimizer.param_groups[0]["lr"]
                report.iteration(iteration, losses, rate, clock, peak_memory_gib(device), scores)
                if o.picture_every and (done % o.picture_every == 0 or done == o.iterations):
                    show(report, method, patches, labeled, spacing or [1.0] * 3, done, device)
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
                wait_for_rank_0()  # process 0 may still be saving, and torchrun ends all processes when one ends
            elif RANKS > 1:  # stopped while waiting for a batch; the others wait for its gradients
                raise Stopped(stop.number, f"no batch came after {after}; {folder} is as it was last saved")
            else:
                watch.settle()
                save_checkpoint(folder, contents(done))
            raise Stopped(number or stop.number, f"saved {folder} after {after}; go on with --resume {folder}")

        # summary
        if report:
            wall = time.monotonic() - began
            measured: dict[str, Any] = {
                **speed(o.iterations, wall),
                "peak_memory_gib": round(peak_memory_gib(device), 2),
                "time_shares": {name: round(share, 4) for name, share in clock.all_shares().items()},
                **({"best": best} if best else {}),
            }
            write_json(folder / MANIFEST, {**manifest, **measured})
            report.say(f"done: {o.iterations} iterations in {wall / 60:.1f} min, {measured['iterations_per_s']} it/s, "
                       f"{measured['peak_memory_gib']} GiB at most")  # fmt: skip
            report.say("time: " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in measured["time_shares"].items()))
            report.say(f"test it:      python test_la.py --checkpoint {folder}")
            if best:
                report.say(f"the best:     python test_la.py --checkpoint {folder / BEST}   (iteration "
                           f"{best['iteration']}, Dice {100 * best['dice']:.2f} % in validation)")  # fmt: skip
            report.say(f"see curves:   tensorboard --logdir {folder}")


@contextmanager
def open_report(folder: Path, o: Options, start: int, state: dict[str, Any] | None) -> Iterator[Report]:
    """Context that creates the run folder, locks it and opens its report; nothing else is written before training."""
    refuse_locked(folder)  # otherwise --fresh would move the folder of a running training
    make_run_folder(folder, fresh=o.fresh and start == 0)
    with run_lock(folder):
        refuse_changed(folder, state)
        with Report(folder, start=start, iterations=o.iterations, log_every=o.log_every) as report:
            yield report


if __name__ == "__main__":
    run(main)
