"""Gradients of DTML in low precision compared with those in float64, for each part of the networks.

    python -m benchmarks.precision --checkpoints runs/la/dtml-16-seed1337/previous.pt runs/la/dtml-16-seed1337/last.pt

m = sigmoid(-1500 z) has a gradient only where |z| < 0.005. Rounding errors of z move this shell to other voxels, so the
gradient of M_d becomes that of another surface. The table shows the cosine between the gradient of each part and that
in float64, on the same crops, without dropout: 1 is the same direction, 0 an unrelated one. On a CPU tf32 is emulated:
the inputs of every convolution, forward and backward, are rounded to ten bits.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import labeled_cases, table
from dataloaders.cases import usual_folder
from dataloaders.two_stream import Patches, Slot, collate
from dataloaders.volumes import Volumes
from methods import restore
from methods.dtml import DTML
from networks.backbone import Backbone
from settings import PROFILES
from tools.command_line import read_options
from utils.checkpoint import load_checkpoint
from utils.devices import set_up
from utils.errors import UserError, run
from utils.options import option, read_flags

PARTS = ("encoder", "bottom", "decoder", "heads")


@dataclasses.dataclass
class Options:
    """Options of the benchmark."""

    checkpoints: list[str] = option([], "of DTML, in addition to initial weights", type=str, nargs="+")
    data: str = option("", "folder of the data set (default data/la, else the phantom set)")
    profile: str = option("short", "scale of the initial weights and of the crops", choices=list(PROFILES))
    seeds: int = option(4, "batches of crops, and initial weights", minimum=1)
    k: float = option(0.0, "steepness; 0: that of the checkpoint", minimum=0)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    threads: int = option(1, "CPU threads", minimum=1)


class Rounded(torch.autograd.Function):
    """Rounds values to ten bits of mantissa, as tensor cores read float32; the gradient is not rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        bits = x.contiguous().view(torch.int32)
        return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def emulate_tf32(network: nn.Module) -> None:
    """Emulates tf32 in all convolutions of a network but those of the heads."""
    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)) and "heads" not in name:
            convolve = F.conv3d if isinstance(module, nn.Conv3d) else F.conv_transpose3d

            def forward(x: Tensor, m: Any = module, convolve: Any = convolve) -> Tensor:
                y = convolve(Rounded.apply(x), Rounded.apply(m.weight), None, m.stride, m.padding)
                y.register_hook(Rounded.apply)  # its gradient is an input of both convolutions of the backward pass
                return y + m.bias.view(-1, 1, 1, 1)

            setattr(module, "forward", forward)  # noqa: B010


def in_float32(block: nn.Module) -> None:
    """Makes a block compute in float32 in any surrounding precision."""
    forward = block.forward

    def wide(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float())

    setattr(block, "forward", wide)  # noqa: B010


def in_tf32(*networks: Backbone) -> None:
    """Sets the networks to tf32, emulated without a GPU."""
    for network in networks:
        network.precision = "tf32"
        if not next(network.parameters()).is_cuda:
            emulate_tf32(network)


def in_bf16(*networks: Backbone) -> None:
    """Sets the networks to bf16 by autocast."""
    for network in networks:
        network.precision = "bf16"


def in_bf16_but_the_last_block(*networks: Backbone) -> None:
    """Sets the networks to bf16 by autocast, except for the last block and the head."""
    in_bf16(*networks)
    for network in networks:
        *_, last = network.get_submodule("decoder").children()
        in_float32(last)


MODES: dict[str, Callable[[DTML], Any]] = {
    "fp32": lambda method: None,
    "tf32 in both": lambda method: in_tf32(method.M_s, method.M_d),
    "bf16 in both": lambda method: in_bf16(method.M_s, method.M_d),
    "bf16 in both, last blocks fp32": lambda method: in_bf16_but_the_last_block(method.M_s, method.M_d),
    "tf32 in M_s alone": lambda method: in_tf32(method.M_s),
    "bf16 in M_s alone": lambda method: in_bf16(method.M_s),
}


def gradients(method: DTML, batch: dict[str, Any], mode: str) -> tuple[dict[tuple[str, str], Tensor], float]:
    """Gradients of one iteration in a mode.

    Returns:
        (network, part) -> gradient, one float64 vector, and the share of voxels at which m has a gradient.
    """
    method.train()
    for module in method.modules():
        if isinstance(module, nn.Dropout3d):
            module.p = 0.0
    if mode == "float64":
        method.double()
        batch = {**batch, "image": batch["image"].double()}
    else:
        MODES[mode](method)
    losses = method(batch, method.iterations - 1)
    losses.total.backward()
    vectors: dict[tuple[str, str], list[Tensor]] = {}
    for name, p in method.named_parameters():
        network, part, *_ = name.split(".")
        assert p.grad is not None
        for key in (part if part in PARTS else {"down": "encoder", "up": "decoder"}[part], "all"):
            vectors.setdefault((network, key), []).append(p.grad.flatten().double())
    return {key: torch.cat(parts) for key, parts in vectors.items()}, float(losses.monitors["live_gradient/sdm"])


def main(argv: list[str] | None = None) -> None:
    o: Options = read_flags(Options, __doc__, "python -m benchmarks.precision", argv)
    device = set_up(o.device, o.threads)
    folder = usual_folder(o.data)
    cases = labeled_cases(folder, 8)
    states = [load_checkpoint(Path(path)) for path in o.checkpoints]
    unfit = [str(state["file"]) for state in states if state["options"]["method"] != "dtml"]
    if unfit:
        raise UserError(f"--checkpoints takes those of dtml, not {', '.join(unfit)}.")
    settings, own, *_ = read_options(["--method", "dtml", "--profile", o.profile, "--data", str(folder)])

    def make(state: dict[str, Any] | None, seed: int) -> DTML:
        torch.manual_seed(seed)
        method = restore(state) if state else DTML(own, iterations=settings.iterations)  # type: ignore[arg-type]
        assert isinstance(method, DTML)
        if o.k:
            method.options = dataclasses.replace(method.options, k=o.k)
        return method.to(device)

    volumes = Volumes(cases, downsample=settings.downsample, device=device)
    patches = Patches(volumes, patch_size=settings.patch_size, augment="d4", seed=0, sdm=False)
    rows = []
    for state in (None, *states):
        cosines: dict[tuple[str, tuple[str, str]], list[float]] = {}
        live = []
        for seed in range(o.seeds):
            batch = collate([patches[Slot(seed, i, case)] for i, case in enumerate((0, 1, 4, 5))])
            batch["label"] = batch["label"][:2]
            true, share = gradients(make(state, seed), batch, "float64")
            live.append(share)
            for mode in MODES:
                for key, g in gradients(make(state, seed), batch, mode)[0].items():
                    cosine = float(F.cosine_similarity(g, true[key], dim=0)) if true[key].any() else float("nan")
                    cosines.setdefault((mode, key), []).append(cosine)
        when = f"{state['iteration']} of {state['options']['iterations']}" if state else "0"
        print(f"iteration {when}: m has a gradient at {100 * sum(live) / len(live):.2g} % of the voxels")
        for mode in MODES:
            columns = [cosines[mode, (net, part)] for net in ("M_s", "M_d") for part in ("all", *PARTS)]
            rows.append([when, mode, *(f"{sum(values) / len(values):.3f}" for values in columns)])
    size = "x".join(map(str, settings.patch_size))
    print(f"\nMean cosine to float64 over {o.seeds} batches of 4 crops of {size}; on {device.type}.\n")
    heads = [f"{net} {part}" if part == "all" else part for net in ("M_s", "M_d") for part in ("all", *PARTS)]
    print(table(["iteration", "convolutions in", *heads], rows))


if __name__ == "__main__":
    run(main)
