"""The start of a training: what it says of its data, and the weights of another run."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataloaders.channel_names import channel_names
from dataloaders.class_names import class_names, refuse_other_numbers
from methods import Method, restore
from networks.backbone import precision_of
from networks.vnet import parameter_count
from tools.training import Training
from utils.checkpoint import BEST, channels_of_state, classes_of_state, load_checkpoint, write_whole
from utils.distributed import RANKS
from utils.errors import UserError, warn
from utils.options import as_flags, flag_of
from utils.run_folder import digest
from utils.text import some


def header(t: Training, device: str, rate: float) -> list[str]:
    """The first lines of a run's log, with the device as `why_device` calls it and the learning rate of the first
    iteration.
    """
    o = t.o
    left_out = f", fold {o.fold} left out" if o.fold else ""
    validation = f", {len(t.validation)} validated every {o.validate_every} iterations" if t.validation else ""
    pooled = f" at 1/{o.downsample} of the resolution" if o.downsample > 1 else ""
    size = "x".join(map(str, o.patch_size)) + f" voxels{pooled}"
    where = f", in each of {RANKS} processes" if RANKS > 1 else ""
    names, count = t.class_names, t.method.options.classes
    classes = ", ".join(f"{c} {names.get(str(c), 'without a name')}" for c in range(1, count + 1))
    lines = {
        "run": str(t.folder),
        "method": f"{o.method}, preset {o.preset}, {parameter_count(t.method):,} parameters",
        "data": f"{o.data}: {t.labeled} labeled and {t.unlabeled} unlabeled scans{left_out}{validation}",
        **({"classes": classes} if names else {"classes": str(count)} if count > 1 else {}),
        "batch": f"{o.batch_size} crops of {size}, {t.labeled_batch} of them labeled{where}",
        "device": device,
        "precision": precision_of(t.method),
        "iterations": f"{t.start} to {o.iterations}, {o.optimizer}, learning rate {rate:g} at first",
    }
    return [f"{name:<12}{text}" for name, text in lines.items()]


def extension_note(state: dict[str, Any], iterations: int, before: float, now: float) -> str:
    """What --iterations changes in a finished run, as a line of the log. `state` is its checkpoint after `extend`,
    `before` and `now` are the learning rates of the last iteration and of the next one.
    """
    done, start = state["iteration"], state["options"].get("start", 0) * iterations
    waits = done < start and state["options"].get("unlabeled") != 0
    later = f" Unlabeled scans count again from iteration {math.ceil(start)} on (--start)." if waits else ""
    return (
        f"This run was finished after {done} iterations and goes on to {iterations}, with the schedules of a run of "
        f"{iterations}: the learning rate was {before:g} at last and is {now:g} now, and a weight that rises over the "
        f"run begins lower again. {iterations} iterations from the start would give another result.{later} The "
        f"checkpoint so far is kept as {finished_name(done)}."
    )


def preset_note(state: dict[str, Any]) -> str:
    """What the preset of --resume auto sets otherwise than in the run that goes on, as a line of the log. `state` is
    the checkpoint, with the options of today as `today`.
    """
    saved, now = state["options"], state["today"]
    began, today = (" ".join(as_flags({name: values[name] for name in now}).split()) for values in (saved, now))
    return f"This run goes on as it began, with {began}. A new one with --preset {saved['preset']} would have {today}."


def best_kept(t: Training) -> dict[str, Any] | None:
    """`Training.best` of a resumed run by best.pt itself, which may be of a later iteration than the last checkpoint:
    of one that was lost as the run was killed. None without the file, or if it cannot be read.
    """
    path = t.folder / BEST
    if not path.exists():
        return None
    try:
        return load_checkpoint(path).get("best")
    except UserError as e:
        warn(f"{e} The best is chosen anew.")
        return None


def finished_name(iterations: int) -> str:
    """The file of the checkpoint that was the last one until its run went further."""
    return f"finished-{iterations}.pt"


def keep_as_finished(folder: Path, state: dict[str, Any]) -> None:
    """Copies the last checkpoint of a finished run, before others replace it."""
    write_whole(folder / finished_name(state["iteration"]), Path(state["file"]).read_bytes())


def refuse_other_order(data: Path, o: Method.Options, state: dict[str, Any]) -> None:
    """Refuses weights that have channels or classes of a set in another order, by their names in both.

    Other names are those of another task, for which weights may be taken all the same.

    Raises:
        UserError: naming them.
    """
    names, there = channel_names(data, o.channels), channels_of_state(state)
    if names != there and sorted(names) == sorted(there):
        raise UserError(
            f"--init {state['file']} was trained on the channels {', '.join(there)}, and those of {data} are "
            f"{', '.join(names)}. Convert the scans with their channels in the order of the weights."
        )
    classes = {c: name for c, name in class_names(data).items() if c <= o.classes}
    refuse_other_numbers(classes, data, classes_of_state(state), state["file"])


def shapes_networks(name: str, a: Method, b: Method) -> bool:
    """Whether an option in which two of the same method differ changes their weights' names or shapes, if one of the
    two has the value of the other, or leaves it without networks at all.
    """

    def changes(method: Method, other: Method) -> bool:
        options = dataclasses.replace(method.options, **{name: getattr(other.options, name)})
        try:
            with torch.device("meta"):  # no memory
                changed = type(method)(options, iterations=1).state_dict()
        except (UserError, ValueError):
            return True
        return shapes(changed) != shapes(method.state_dict())

    def shapes(entries: dict[str, Any]) -> dict[str, Any]:
        return {key: weight.shape for key, weight in entries.items() if isinstance(weight, Tensor)}

    return changes(a, b) or changes(b, a)


def start_from(method: Method, name: str, state: dict[str, Any], data: Path) -> dict[str, Any]:
    """Gives a new method the weights of a checkpoint, of its critic too, but no optimizer's state and none of the other
    entries that are no weights, such as the seed of AD-MT's turns. A teacher's first update gives it the student's.

    Returns:
        Where the weights come from, for the manifest: file, method, iteration and a checksum.

    Raises:
        UserError: for weights of another method, of other shapes or of other classes, or of the same channels or
            classes in another order, naming what differs.
    """
    file, saved = state["file"], state["options"]
    if saved["method"] != name:
        raise UserError(
            f"--init {file} holds weights of --method {saved['method']}, and this run is of {name}. Give weights of "
            f"{name}, or train with --method {saved['method']}."
        )
    before = restore(state)
    fresh = method.state_dict()
    here, there = (
        {key: w for key, w in entries.items() if isinstance(w, Tensor) and not key.endswith("_extra_state")}
        for entries in (fresh, before.state_dict())
    )
    differ = [f"{key} only there" for key in there.keys() - here.keys()]
    differ += [f"{key} only here" for key in here.keys() - there.keys()]
    differ += [
        f"{key} is {tuple(there[key].shape)} there and {tuple(here[key].shape)} here"
        for key in here
        if key in there and here[key].shape != there[key].shape
    ]
    # A softmax of C classes has as many channels as sigmoids of C+1, in another order.
    if differ or before.options.classes != method.options.classes:
        options = [
            f"{flag_of(f.name) if f.metadata['flag'] else f.name} is {was} there and {now} here"
            for f in dataclasses.fields(method.options)
            if (was := getattr(before.options, f.name)) != (now := getattr(method.options, f.name))
            and shapes_networks(f.name, before, method)
        ]
        why = "; ".join(options) or "another version wrote it"
        shown = f" Weights that differ: {some(sorted(differ), 3, '; ')}." if differ else ""
        raise UserError(
            f"--init {file} does not fit this run: {why}. Train with the same, or start without --init.{shown}"
        )
    refuse_other_order(data, method.options, state)
    method.load_state_dict(fresh | there)
    weights = digest(*(weight.numpy() for _, weight in sorted(there.items())))
    return {"file": file, "method": name, "iteration": state["iteration"], "weights": weights}
