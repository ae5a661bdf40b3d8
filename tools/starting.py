"""The weights of another run, to start a training from."""

import dataclasses
from typing import Any

from torch import Tensor

from methods import Method, restore
from utils.errors import UserError
from utils.options import default_of, flag_of
from utils.run_folder import digest

SHOWN = 3  # differences that an error names


def start_from(method: Method, name: str, state: dict[str, Any]) -> dict[str, Any]:
    """Gives a new method the weights of a checkpoint, of its teacher and its critic too, but no optimiser's state.

    Args:
        method: the new method, on the CPU.
        name: its name, as of --method.
        state: contents of a checkpoint or of shared weights.

    Returns:
        Where the weights come from, for the manifest: file, method, iteration and a checksum.

    Raises:
        UserError: for weights of another method or of other shapes, naming what differs.
    """
    file, saved = state["file"], state["options"]
    if saved["method"] != name:
        raise UserError(
            f"--init {file} holds weights of --method {saved['method']}, and this run is of {name}. Give weights of "
            f"{name}, or train with --method {saved['method']}."
        )
    there = {key: w for key, w in restore(state).state_dict().items() if isinstance(w, Tensor)}
    fresh = method.state_dict()
    here = {key: w for key, w in fresh.items() if isinstance(w, Tensor)}
    differ = [f"{key} only there" for key in there.keys() - here.keys()]
    differ += [f"{key} only here" for key in here.keys() - there.keys()]
    differ += [
        f"{key} is {tuple(there[key].shape)} there and {tuple(here[key].shape)} here"
        for key in here
        if key in there and here[key].shape != there[key].shape
    ]
    if differ:
        options = [
            f"{flag_of(f.name) if f.metadata['flag'] else f.name} is {was} there and {now} here"
            for f in dataclasses.fields(method.options)
            if (was := saved.get(f.name, default_of(f))) != (now := getattr(method.options, f.name))
        ]
        more = f" and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
        why = "; ".join(options) or "another version wrote it"
        raise UserError(
            f"--init {file} does not fit this run: {why}. Train with the same, or start without --init. "
            f"Weights that differ: {'; '.join(sorted(differ)[:SHOWN])}{more}."
        )
    method.load_state_dict(fresh | there)
    weights = digest(*(weight.numpy() for _, weight in sorted(there.items())))
    return {"file": file, "method": name, "iteration": state["iteration"], "weights": weights}
