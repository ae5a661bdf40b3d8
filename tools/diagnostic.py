"""Diagnostic files of diverged runs: the batch, the positions of its crops and the weights; and that batch again."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dataloaders.two_stream import collate
from methods.base import Method
from tools.training import Training
from utils.checkpoint import save_checkpoint
from utils.devices import seed_iteration
from utils.distributed import RANK
from utils.errors import Diverged, UserError


@contextmanager
def kept_for_diagnosis(t: Training) -> Iterator[None]:
    """Context that writes diverged-rankR.pt into the run folder if the training inside diverges.

    The file is a checkpoint that also holds the batch. Only processes with a loss or gradient that is not finite write
    it.

    Raises:
        Diverged: the original error, with the path of the file in the message.
    """
    try:
        yield
    except Diverged as e:
        if e.iteration is None or not e.here:
            raise
        slots = t.sampler.slots(e.iteration)
        batch = collate([t.patches[slot] for slot in slots])  # the same again
        boxes = [
            {"case": t.volumes.cases[sample.case].name, "slot": slot.slot, **dataclasses.asdict(draw)}
            for slot in slots
            for sample in t.patches.slots_of(slot)[0]
            for draw in t.patches.draws(sample)[0]
        ]
        extra = {"error": str(e), "rank": RANK, "batch": batch, "boxes": boxes}
        try:
            path = save_checkpoint(t.folder, {**t.contents(e.iteration), **extra}, name=f"diverged-rank{RANK}.pt")
        except UserError as full:
            raise Diverged(f"{e} Its batch could not be kept: {full}", e.iteration) from e
        raise Diverged(f"{e} Look into it with --from-diagnostic {path}.", e.iteration) from e


def replay_batch(method: Method, state: dict[str, Any], device: torch.device) -> list[str]:
    """The iteration of a diagnostic file, forward and backward but for the step, in lines of text. The method has the
    weights of `state`, what load_checkpoint made of the file.

    Raises:
        UserError: a checkpoint without a batch.
    """
    if not {"batch", "boxes", "error", "rank"} <= state.keys():
        raise UserError(f"{state['file']} holds no batch: it is no diagnostic file. Give a diverged-rank0.pt of a run.")
    method.to(device).train()
    batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in state["batch"].items()}
    lines = [f"{state['file']}: {state['options']['method']}, iteration {state['iteration']}, process {state['rank']}"]
    lines += [f"then:  {state['error']}"]
    lines += ["crop:  " + "  ".join(f"{name} {value}" for name, value in box.items()) for box in state["boxes"]]
    lines += [f"batch: {name} {_about(value)}" for name, value in batch.items() if isinstance(value, Tensor)]
    bad = {name: p for name, p in method.state_dict().items() if isinstance(p, Tensor) and not _finite(p)}
    lines += [f"now:   the weight {name} {_about(p)}" for name, p in bad.items()]

    seed_iteration(state["options"]["seed"], state["iteration"], state["rank"])
    first: list[str] = []
    hooks = [module.register_forward_hook(_first_bad(name, first)) for name, module in method.named_modules()]
    losses = method(batch, state["iteration"])
    for hook in hooks:
        hook.remove()
    losses.total.backward()
    lines += [f"now:   the first map that is not finite is that of {name}" for name in first[:1]]
    for name, value in {**losses.terms, "total": losses.total}.items():
        lines.append(f"now:   the loss {name} is {value.item():g}{'' if _finite(value) else ', NOT FINITE'}")
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    spoilt = [name for name, g in gradients.items() if not _finite(g)]
    lines += [f"now:   the gradient of {name} {_about(gradients[name])}" for name in spoilt]
    lines.append(f"now:   {len(spoilt)} of {len(gradients)} gradients are not finite")
    if _finite(losses.total) and not spoilt:  # then it was a critic's own step
        try:
            method.after_step(batch, state["iteration"])
        except Diverged as e:
            lines.append(f"now:   {e}")
    return lines


def _finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())


def _about(value: Tensor) -> str:
    good = value[torch.isfinite(value)]
    span = f"{good.min().item():g} to {good.max().item():g}" if good.numel() else "no finite value"
    missing = value.numel() - good.numel()
    return f"{tuple(value.shape)}, {span}" + (f", {missing} of {value.numel()} NOT FINITE" if missing else "")


def _first_bad(name: str, first: list[str]) -> Any:
    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not _finite(output):
            first.append(f"{name} ({type(module).__name__})")

    return look
