"""A training step of DTML on the same scans, released form compared with ours, and errors of the gradients.

    python -m benchmarks.step --patch-size 48 48 32 --threads 1

The released form decodes a whole h5 volume for each crop, turns it and then crops it. It computes a signed distance map
of each label, which no loss uses. Both networks have both heads. There are two backward passes through one graph, and
two SGD optimizers without fused kernels. The second pass adds the consistency to both networks again; here its weight
is halved, so that both forms minimize the same loss.

Our form is timed as in the paper, in float32, and in bfloat16 with k = 50, the steepest that trains in it. How near its
gradients are to float64 is shown by benchmarks.precision.
"""

import dataclasses
import time
from collections.abc import Callable
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.data import released as released_crop
from benchmarks.timing import labeled_cases, table
from dataloaders.cases import usual_folder
from dataloaders.two_stream import Patches, TwoStreamBatchSampler, collate
from dataloaders.volumes import Volumes
from losses.sdm import signed_distance_map
from losses.terms import consistency_loss, dice_loss, sdm_to_mask, seg_loss
from methods import check_finite
from methods.dtml import DTML
from networks.backbone import STEEPEST, set_precision
from networks.vnet import VNet
from settings import OPTIMIZERS
from tools.command_line import read_options
from utils.clock import Clock
from utils.devices import peak_memory_gib, set_up
from utils.errors import run
from utils.options import option, read_flags

PARTS = ("data", "forward and backward", "step")


@dataclasses.dataclass
class Options:
    """Options of the benchmark."""

    data: str = option("", "folder of the data set (default data/la, else the phantom set)")
    patch_size: list[int] = option([48, 48, 32], "voxels of a crop along x, y, z", nargs=3, minimum=16)
    filters: int = option(16, "channels of the first block", minimum=1)
    rounds: int = option(7, "timed steps of each form", minimum=1)
    seeds: int = option(5, "weights and crops whose gradients are compared with float64's; 0: none", minimum=0)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    threads: int = option(1, "CPU threads", minimum=1)


class ReleasedNet(VNet):
    """The released V-Net: two heads, of which the loss uses one, no in-place ReLU, and the contiguous layout."""

    cpu_layout = torch.contiguous_format

    def __init__(self, filters: int):
        super().__init__(heads={"seg": 1, "sdm": 1}, filters=filters)
        for module in self.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False


def released_backward(M_s: nn.Module, M_d: nn.Module, batch: dict[str, Any], lambda_: float) -> None:
    """Computes the gradients of both networks by two backward passes through one graph."""
    label = batch["label"]
    logits, z = M_s(batch["image"])["seg"], M_d(batch["image"])["sdm"]
    p, m = logits.sigmoid(), sdm_to_mask(z, 1500.0)
    consistency = lambda_ / 2 * consistency_loss(m, p)
    loss_s = seg_loss(logits[: len(label)], label) + consistency
    loss_d = dice_loss(m[: len(label)], label) + consistency
    loss_s.backward(retain_graph=True)
    loss_d.backward()


def main(argv: list[str] | None = None) -> None:
    o: Options = read_flags(Options, __doc__, "python -m benchmarks.step", argv)
    device = set_up(o.device, o.threads)
    cases = labeled_cases(usual_folder(o.data), 8)
    options, dtml_options, *_ = read_options(["--method", "dtml", "--filters", str(o.filters)])
    method_options = cast(DTML.Options, dtml_options)
    torch.manual_seed(0)
    method = DTML(method_options, iterations=10).to(device).train()
    in_bf16 = DTML(dataclasses.replace(method_options, k=STEEPEST), iterations=10).to(device).train()
    set_precision(in_bf16, "bf16", training=True)
    networks = ReleasedNet(o.filters).to(device).train(), ReleasedNet(o.filters).to(device).train()
    for network, ours in zip(networks, (method.M_s, method.M_d), strict=True):
        network.load_state_dict(ours.state_dict(), strict=False)
    optimizers = [
        torch.optim.SGD(network.parameters(), options.lr, options.momentum, weight_decay=options.weight_decay,
                        foreach=False)
        for network in networks
    ]  # fmt: skip
    patches = Patches(Volumes(cases, device=device), patch_size=o.patch_size, augment="d4", seed=0, sdm=False)
    sampler = TwoStreamBatchSampler(4, 4, batch_size=4, labeled_batch=2, seed=0, start=0, iterations=10_000)
    batches = iter(sampler)
    iteration, lambda_ = 9, method_options.lambda_max

    def on_device(items: list[dict[str, Any]]) -> dict[str, Any]:
        items = [item if i < 2 else {k: v for k, v in item.items() if k != "label"} for i, item in enumerate(items)]
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in collate(items).items()}

    def released_step(clock: Clock) -> None:
        items = [released_crop(patches, slot) for slot in next(batches)]
        for item in items:
            signed_distance_map(item["label"].numpy())
        batch = on_device(items)
        clock.lap("data")
        released_backward(*networks, batch, lambda_)
        clock.lap("forward and backward")
        for sgd in optimizers:
            sgd.step()
            sgd.zero_grad()
        clock.lap("step")

    def step_of(method: DTML) -> Callable[[Clock], None]:
        optimizer = OPTIMIZERS["sgd"](list(method.parameters()), options)

        def our_step(clock: Clock) -> None:
            batch = on_device([patches[slot] for slot in next(batches)])
            clock.lap("data")
            losses = method(batch, iteration)
            optimizer.zero_grad(set_to_none=True)
            losses.total.backward()
            clock.lap("forward and backward")
            check_finite(losses, method, batch, iteration)
            optimizer.step()
            clock.lap("step")

        return our_step

    forms: dict[str, Callable[[Clock], None]] = {
        "released": released_step,
        "ours": step_of(method),
        f"ours, bf16, k = {STEEPEST:g}": step_of(in_bf16),
    }
    clocks = {name: Clock(device) for name in forms}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for i in range(-1, o.rounds):  # the first round is not timed
        for name, form in forms.items():
            clocks[name] = Clock(device) if i <= 0 else clocks[name]
            clocks[name].lap("between")
            began = time.perf_counter()
            form(clocks[name])
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name] += [time.perf_counter() - began] if i >= 0 else []
    rows = []
    for name, mine in seconds.items():
        ratio = median(a / b for a, b in zip(seconds["released"], mine, strict=True))
        clocks[name].shares()
        spent = [clocks[name].seconds[part] for part in PARTS]
        rows.append([name, median(mine), ratio, *(100 * part / sum(spent) for part in spent)])
    size, peak = "x".join(map(str, o.patch_size)), peak_memory_gib(device)
    print(f"Two V-Nets of {o.filters} filters, 4 crops of {size}, on {device.type}, threads: {o.threads}.")
    print(f"{o.rounds} rounds; {peak:.2f} GiB at most, all forms together.\n")
    print(table(["form", "s a step", "times as fast", *(f"% {part}" for part in PARTS)], rows))
    if o.seeds:
        heads = [f"gradient of ({o.seeds} seeds)", "released, from float64", "ours, from float64"]
        squares = np.mean([distances(o, method_options, patches, seed) ** 2 for seed in range(o.seeds)], axis=0)
        rows = [[network, *map(float, row)] for network, row in zip(("M_s", "M_d"), np.sqrt(squares), strict=True)]
        print("\n" + table(heads, rows))


def distances(o: Options, method_options: DTML.Options, patches: Patches, seed: int) -> NDArray[np.float64]:
    """Relative L2 distance of the gradients from those in float64, with initial weights and without dropout.

    Returns:
        [[M_s released, M_s ours], [M_d released, M_d ours]].
    """
    batch = collate([patches[slot] for slot in next(iter(
        TwoStreamBatchSampler(4, 4, batch_size=4, labeled_batch=2, seed=seed, start=0, iterations=1)
    ))])  # fmt: skip
    batch["label"] = batch["label"][:2]
    gradients: dict[str, list[Tensor]] = {}
    for name, dtype in (("float64", torch.float64), ("released", torch.float32), ("ours", torch.float32)):
        torch.manual_seed(seed)
        method = DTML(method_options, iterations=10)
        pair: tuple[nn.Module, nn.Module] = (method.M_s, method.M_d)
        if name == "released":
            pair = ReleasedNet(o.filters), ReleasedNet(o.filters)
            for released, ours in zip(pair, (method.M_s, method.M_d), strict=True):
                released.load_state_dict(ours.state_dict(), strict=False)
        for network in pair:
            network.to(batch["image"].device, dtype).train()
            for module in network.modules():
                if isinstance(module, nn.Dropout3d):
                    module.p = 0.0
        converted = {**batch, "image": batch["image"].to(dtype)}
        if name == "released":
            released_backward(*pair, converted, method_options.lambda_max)
        else:
            method(converted, 9).total.backward()
        gradients[name] = [
            torch.cat([p.grad.flatten().double() for _, p in sorted(network.named_parameters()) if p.grad is not None])
            for network in pair
        ]
    true = gradients.pop("float64")
    return np.array([[float((g[i] - true[i]).norm() / true[i].norm()) for g in gradients.values()] for i in range(2)])


if __name__ == "__main__":
    run(main)
