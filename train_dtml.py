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

import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from dataloaders.channel_names import channels_of_set
from dataloaders.findings import warnings_of
from dataloaders.two_stream import make_loader
from losses.ramps import cosine_rate, learning_rate
from methods import METHODS, Losses, Watch, restore
from networks.backbone import precision_of, set_precision
from settings import Options
from tools.command_line import NOT_REPLAYED, read_options
from tools.diagnostic import kept_for_diagnosis, replay_batch
from tools.training import Training, prepare, show
from tools.training_start import best_kept, extension_note, header, keep_as_finished, preset_note, start_from
from tools.validation import VALIDATION, validation_line, validation_scores
from utils.checkpoint import BEST, load_checkpoint, save_checkpoint, write_whole
from utils.clock import Clock
from utils.devices import enough_memory, peak_memory_gib, precision_on, seed_iteration, set_up, to_device, why_device
from utils.distributed import RANK, RANKS, process_group, replicate, stop_of_any_rank, wait_for_rank_0
from utils.errors import Stopped, StopSignal, UserError, run
from utils.options import fill, options_file
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


@enough_memory(
    "Use --recompute, which changes no result, or keep the volumes out of it with --cache disk. Then lower "
    "--batch-size, --patch-size or --filters."
)
def main(argv: list[str] | None = None) -> None:
    o, method_options, folder, state, flags = read_options(argv, __doc__)
    if not o.from_diagnostic:
        refuse_locked(folder)
    if state is None and not o.fresh and not (o.resume == "auto" and was_begun(folder)):
        refuse_existing(folder, resume=o.resume == "auto")
    device = set_up(o.device, o.threads, deterministic=o.deterministic)

    # method and data
    kind = METHODS[o.method]
    if state is None:
        method_options.channels = channels_of_set(Path(o.data))
    torch.manual_seed(o.seed)
    method = restore(state) if state else kind(method_options, iterations=o.iterations)
    origin = load_checkpoint(Path(o.init)) if o.init and state is None else None
    began_from = start_from(method, o.method, origin, Path(o.data)) if origin else None
    if o.from_diagnostic and state is not None:
        set_precision(method, precision_on(device, o.precision), training=True)
        print("\n".join(replay_batch(method, state, device)))
        return
    if state is not None and state["iteration"] >= o.iterations:
        print(f"{folder} is already done: {state['iteration']} of {o.iterations} iterations. --resume {folder} with "
              "more --iterations goes on from there.", file=sys.stderr)  # fmt: skip
        before = read_json(folder / MANIFEST)
        if RANK == 0 and before and "wall_s" not in before:  # killed between its last checkpoint and the manifest
            write_json(folder / MANIFEST, {**before, **speed(o.iterations, state["seconds"])})
        return
    t = prepare(o, folder, method, device, state, origin)
    with (
        process_group(device),
        StopSignal() as stop,
        named_disk_errors(folder),
        nullcontext() if RANK else open_report(folder, o, t.start, state) as report,
        kept_for_diagnosis(t),
    ):
        manifest: dict[str, Any] = {}
        if report:
            if state and "before" in state:
                keep_as_finished(folder, state)
            manifest = begin(t, report, state, {"method": o.method, "data": o.data} | flags, began_from)
        wait_for_rank_0()
        shares = train(t, replicate(method, device), report, stop)
        if report:
            summarize(t, report, manifest, shares)


def begin(
    t: Training, report: Report, state: dict[str, Any] | None, flags: dict[str, Any],
    began_from: dict[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """Writes what a run begins with: the log's first lines, options.txt and the manifest, which is returned. `state` is
    the checkpoint that it goes on from, `began_from` where the weights of --init come from, if any.
    """
    o, volumes = t.o, t.volumes
    for line in header(t, why_device(o.device, t.device), current_lr(t.start, o)):
        report.say(line)
    if state and "before" in state:
        last = current_lr(t.start - 1, fill(Options, state["before"]))
        report.say(extension_note(state, o.iterations, last, current_lr(t.start, o)))
    if state and state.get("today"):
        report.say(preset_note(state))
    if t.start:
        t.best = best_kept(t)
    scans = [case.name for case in t.validation]
    if t.best and scans and t.best.get("scans", scans) != scans:  # early checkpoints do not name them
        report.say(f"The best checkpoint so far, after {t.best['iteration']} iterations, was chosen on other "
                   "validation scans than there are now. The best is chosen anew.")  # fmt: skip
        t.best = None
    for line in warnings_of(volumes.facts, patch_size=o.patch_size, downsample=o.downsample, normalize=o.normalize):
        report.say(line)
    if o.workers and volumes.on_device:
        report.say(f"--workers {o.workers} is not used: the volumes are on the GPU, where crops are made. "
                   "--cache ram uses it.")  # fmt: skip
    replay = {name: value for name, value in t.options.items() if name not in NOT_REPLAYED}
    if t.start == 0 or not (t.folder / OPTIONS).exists():
        chosen = {name: flags.get(name) for name in replay} if t.start == 0 else replay
        write_whole(t.folder / OPTIONS, options_file(chosen, replay).encode())
    manifest = make_manifest(t.device, processes=RANKS, precision=precision_of(t.method), options=replay,
                             checksums=volumes.checksums, channel_names=t.constant["channel_names"],
                             **({"init": began_from} if began_from else {}))  # fmt: skip
    manifest = start_manifest(t.folder, t.start, {**manifest, **({"extended": t.extended} if t.extended else {})})
    if t.start == 0:
        report.settings(replay, VALIDATION if t.validation else "loss/total")
    report.text({"options": replay, "manifest": {k: v for k, v in manifest.items() if k not in LONG}})
    return manifest


def train(t: Training, model: Callable[..., Losses], report: Report | None, stop: StopSignal) -> dict[str, float]:
    """The loop.

    Args:
        model: its method, with several processes their gradients' mean.
        stop: looked at after each iteration.

    Returns:
        Part of an iteration -> its share of the time.

    Raises:
        Stopped: a signal came; the last iteration is saved.
        Diverged: a loss or gradient is not finite.
    """
    o, method, optimizer, device = t.o, t.method, t.optimizer, t.device
    clock, watch, done, number = Clock(device), Watch(optimizer, device), t.start, 0
    t.began = time.monotonic()
    method.train()
    for iteration, batch in enumerate(make_loader(t.patches, t.sampler, workers=o.workers, stop=stop), t.start):
        batch = {k: to_device(v, device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
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
        last = done == o.iterations
        scores: dict[str, float] = {}
        if t.validation and (done % o.validate_every == 0 or last):
            watch.flush()
            scores = validation_scores(t)
            clock.lap("validation")
            if report:
                dice = scores[VALIDATION]
                better = dice > (t.best["dice"] if t.best else -1)
                text = validation_line(scores, len(t.validation), done, t.class_names)
                report.say(text + (", the best so far" if better else ""))
                if better:
                    t.best = {"iteration": done, "dice": dice, "scans": [case.name for case in t.validation]}
                    save_checkpoint(t.folder, t.contents(done), BEST)
                    clock.lap("saving")
        if report:
            rate = optimizer.param_groups[0]["lr"]
            report.iteration(iteration, losses, batch["label"], rate, clock, peak_memory_gib(device), scores)
            if o.picture_every and (done % o.picture_every == 0 or last):
                show(t, report, done)
            clock.lap("logging")
        saving = done % o.save_every == 0 or last
        ask = device.type == "cpu" or done % STOP_EVERY == 0 or saving
        number = stop_of_any_rank(stop.number, ask=ask, device=device)
        if number or saving:
            watch.flush()
        if report and (number or saving):
            save_checkpoint(t.folder, t.contents(done))
            clock.lap("saving")
        if number:
            break
    if done < o.iterations:
        after = f"{done} of {o.iterations} iterations"
        if number:
            wait_for_rank_0()  # process 0 may still be saving, and torchrun ends all processes when one ends
        elif RANKS > 1:  # stopped while waiting for a batch; the others wait for its gradients
            raise Stopped(stop.number, f"no batch came after {after}; {t.folder} is as it was last saved")
        else:
            watch.flush()
            save_checkpoint(t.folder, t.contents(done))
        raise Stopped(number or stop.number, f"saved {t.folder} after {after}; go on with --resume {t.folder}")
    return clock.all_shares()


def summarize(t: Training, report: Report, manifest: dict[str, Any], shares: dict[str, float]) -> None:
    """Adds what was measured to the manifest and the log, and names the commands that come next."""
    o, folder, best = t.o, t.folder, t.best
    wall, memory = t.elapsed, peak_memory_gib(t.device)
    chosen = {"best": {name: best[name] for name in ("iteration", "dice")}} if best else {}
    measured: dict[str, Any] = {
        **speed(o.iterations, wall),
        "peak_memory_gib": round(memory, 2),
        "time_shares": {name: round(share, 4) for name, share in shares.items()},
        **chosen,
    }
    write_json(folder / MANIFEST, {**manifest, **measured})
    report.say(f"done: {o.iterations} iterations in {wall / 60:.1f} min, {measured['iterations_per_s']} it/s, "
               f"{measured['peak_memory_gib']} GiB at most")  # fmt: skip
    report.say("time: " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in measured["time_shares"].items()))
    scans = " --scans validation" if o.fold else ""  # of the fold
    report.say(f"test it:      python test_la.py --checkpoint {shlex.quote(str(folder))}{scans}")
    if best:
        report.say(f"the best:     python test_la.py --checkpoint {shlex.quote(str(folder / BEST))}   (iteration "
                   f"{best['iteration']}, Dice {100 * best['dice']:.2f} % in validation)")  # fmt: skip
    report.say(f"see curves:   tensorboard --logdir {shlex.quote(str(folder))}")


@contextmanager
def open_report(folder: Path, o: Options, start: int, state: dict[str, Any] | None) -> Iterator[Report]:
    """Context that creates the run folder, locks it and opens its report; nothing else is written before training.

    A folder that it has created is removed if the first iteration ends with a UserError, as for a wrong option.
    """
    refuse_locked(folder)  # otherwise --fresh would move the folder of a running training
    fresh = o.fresh and state is None  # a resumed run may have begun with --fresh
    new = fresh or not folder.exists()
    make_run_folder(folder, fresh=fresh)
    with run_lock(folder):
        refuse_changed(folder, state)
        report = Report(folder, start=start, iterations=o.iterations, log_every=o.log_every)
        try:
            with report:
                yield report
        except UserError:
            if new and report.done == start:
                shutil.rmtree(folder, ignore_errors=True)
            raise


if __name__ == "__main__":
    run(main)
