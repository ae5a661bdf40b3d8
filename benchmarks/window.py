"""Sliding windows over a scan: one at a time as in the released loop, in batches, and with larger strides.

    python -m benchmarks.window --checkpoint runs/la/dtml-16-seed1337 --threads 2

The released loop runs the network twice in every window and sums in numpy. The second table shows the Dice with larger
strides. Those with the same Dice can be used in experiments; a comparison with the papers needs the papers' stride.
Without a checkpoint the network has random weights, and there is no second table.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.timing import scans, side_by_side, table
from dataloaders.normalization import NONE, normalization_of
from evaluation.metrics import segmentation_metrics
from evaluation.sliding_window import STRIDE, WEIGHTINGS, predict_scan, sliding_window, window_starts, windows
from methods import METHODS, restore
from settings import PROFILES
from tools.command_line import read_options
from utils.checkpoint import load_checkpoint
from utils.devices import set_up
from utils.errors import UserError, run
from utils.options import option, read_flags
from utils.resample import downsample_image


@dataclasses.dataclass
class Options:
    """Options of the benchmark."""

    checkpoint: str = option("", "run folder or .pt file; none: random weights of a V-Net")
    profile: str = option("half", "scale of the random weights", choices=list(PROFILES))
    data: str = option("", "folder of the data set (default data/la, else phantoms)")
    scans: int = option(20, "test scans of the second table", minimum=1)
    rounds: int = option(3, "timed repeats of the first table", minimum=1)
    overlaps: list[float] = option(
        [0.5, 0.4, 0.25, 0.0], "overlaps in the second table", type=float, nargs="+", minimum=0, maximum=0.99
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    threads: int = option(2, "CPU threads", minimum=1)


@torch.no_grad()
def one_at_a_time(
    predict: Callable[[Tensor], Tensor], image: Tensor, patch_size: Sequence[int], stride: Sequence[int], passes: int
) -> NDArray[np.float32]:
    """The released loop on image (W,H,D), which must be larger than the patch -> (W,H,D)."""
    total, count = (np.zeros(image.shape, np.float32) for _ in range(2))
    x, y, z = (window_starts(*sizes) for sizes in zip(image.shape, patch_size, stride, strict=True))
    for corner in ((a, b, c) for a in x for b in y for c in z):
        box = tuple(slice(c, c + p) for c, p in zip(corner, patch_size, strict=True))
        for _ in range(passes):
            p = predict(image[box][None, None])
        total[box] += p[0, 0].cpu().numpy()
        count[box] += 1
    return total / count


def main(argv: list[str] | None = None) -> None:
    o: Options = read_flags(Options, __doc__, "python -m benchmarks.window", argv)
    device = set_up(o.device, o.threads)
    if o.checkpoint:
        state = load_checkpoint(Path(o.checkpoint))
        method, trained = restore(state), state["options"]
        if trained.get("classes", 1) > 1:
            raise UserError(f"{o.checkpoint} was trained on several classes. Give a checkpoint of one class.")
        normalize = normalization_of(trained)
        patch_size, downsample = trained["patch_size"], trained["downsample"]
    else:
        options, method_options, *_ = read_options(["--method", "supervised", "--profile", o.profile])
        torch.manual_seed(0)
        method, normalize = METHODS["supervised"](method_options, iterations=1), NONE
        patch_size, downsample = options.patch_size, options.downsample
    method = method.to(device).eval()
    stride = [min(max(step // downsample, 1), side) for step, side in zip(STRIDE, patch_size, strict=True)]
    output = method.outputs[:1]
    predict = partial(method.predict, outputs=output)

    _, image, _ = next(scans(o.data, 1, normalize))
    volume = downsample_image(torch.from_numpy(image), downsample).to(device)
    forms: dict[str, Callable[[], NDArray[np.float32]]] = {
        "released loop": lambda: one_at_a_time(predict, volume, patch_size, stride, 2),
        "one window at a time": lambda: one_at_a_time(predict, volume, patch_size, stride, 1),
    }

    def ours(n: int) -> NDArray[np.float32]:
        return sliding_window(predict, volume, patch_size, stride, batch_size=n)[0].numpy()

    forms |= {f"ours, {n} at a time": partial(ours, n) for n in (1, 4, 8)}
    results = {name: form() for name, form in forms.items()}
    differences = {name: float(np.abs(p - results["one window at a time"]).max()) for name, p in results.items()}
    size, step = ("x".join(map(str, v)) for v in (patch_size, stride))
    count = len(windows(volume.shape, patch_size, stride))
    print(f"{count} windows of {size}, stride {step}, on {device.type}, threads: {o.threads}, {o.rounds} rounds.\n")
    timings = side_by_side(forms, rounds=o.rounds)
    print(table(["form", "s a scan", "times as fast", "largest difference"],
                [[name, t.seconds, t.ratio, differences[name]] for name, t in timings.items()]))  # fmt: skip
    if not o.checkpoint:
        return

    strides = {f"{step} (papers)": stride}
    for overlap in o.overlaps:
        wide = [max(round(side * (1 - overlap)), 1) for side in patch_size]
        strides["x".join(map(str, wide))] = wide
    kinds = [(name, wide, weighting) for name, wide in strides.items() for weighting in WEIGHTINGS]
    counts = dict.fromkeys(strides, 0)
    dices: dict[tuple[str, str], list[float]] = {(name, weighting): [] for name, _, weighting in kinds}
    for _, image, label in scans(o.data, o.scans, normalize):
        for name, wide, weighting in kinds:
            p = predict_scan(
                method, torch.from_numpy(image).to(device), output, downsample=downsample, patch_size=patch_size,
                stride=wide, weighting=weighting, batch_size=4,
            )  # fmt: skip
            dices[name, weighting].append(100 * segmentation_metrics((p[0] > 0.5).cpu().numpy(), label)["dice"])
            shape = [-(-side // downsample) for side in image.shape]
            counts[name] += len(windows(shape, patch_size, wide)) if weighting == WEIGHTINGS[0] else 0
    first = dices[kinds[0][0], kinds[0][2]]
    rows = []
    for name, _, weighting in kinds:
        mine = dices[name, weighting]
        gap = [a - b for a, b in zip(mine, first, strict=True)]
        rows.append([name, weighting, counts[name], counts[kinds[0][0]] / counts[name], f"{np.mean(mine):.2f}",
                     f"{np.mean(gap):+.2f}", f"{max(map(abs, gap)):.2f}"])  # fmt: skip
    print(f"\n{len(first)} scans, output {output[0]} of {o.checkpoint}.\n")
    print(table(["stride", "weighting", "windows", "times fewer", "Dice %", "mean change", "largest change"], rows))


if __name__ == "__main__":
    run(main)
