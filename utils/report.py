"""What a run reports: progress bar or log lines, TensorBoard, and the curves as text."""

import json
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from utils.clock import Clock
from utils.run_folder import Scalars

ESTIMATED_AFTER = 10  # iterations of this start, the first of which is slower and does not count
FOREGROUND = "pseudo/foreground"  # monitor: share of foreground in the pseudo-labels
LOOKED_AT = 10  # logged iterations over which pseudo-labels and labels are compared
TOO_MUCH = 3  # times the labels' share of foreground, above which pseudo-labels are warned of; healthy runs reach 1.3
SHARED = 0.6  # cores for each thread below which they are thought to be shared with other programs


def duration(seconds: float) -> str:
    """A time to read, such as 40 s, 12 min or 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def put_events_in_order(folder: Path) -> None:
    """Renames the event files of earlier starts if a new one would not sort after them.

    TensorBoard reads the files of a folder by name: events.out.tfevents.SECOND.HOST.PID.COUNT. A file that begins at an
    earlier iteration than the file before it is taken for a restart, and every point from there on is dropped. COUNT is
    not padded with zeros, so 10 sorts before 9 within a second; and another machine's clock may be behind.
    """
    files = sorted(folder.glob("events.out.tfevents.[0-9]*.*"))
    now = int(time.time())
    for i, path in enumerate(files):
        *head, second, rest = path.name.split(".", 4)
        before = min(int(second), now - len(files) + i)  # in their present order
        path.rename(folder / ".".join([*head, f"{before:010d}", rest]))


class Report:
    """Log of one run, in its folder and on stderr.

    Numbers are fetched from the device only every `log_every` iterations. On a terminal there is one progress bar,
    elsewhere a line every `log_every` iterations. A resumed run continues its curves at `start`.
    """

    def __init__(self, folder: Path, *, start: int, iterations: int, log_every: int):
        self.log_every, self.iterations, self.start = log_every, iterations, start
        self.log = open(folder / "log.txt", "a", encoding="utf-8")  # first, as it marks that a run was begun here
        self.scalars = Scalars(folder, start)
        put_events_in_order(folder)
        self.board = SummaryWriter(str(folder), purge_step=start)
        self.pictures = folder / "pictures"
        self.bar = tqdm(total=iterations, initial=start, disable=None, unit="it", dynamic_ncols=True, smoothing=0.05)
        self.warned: set[str] = set()
        self.marked: deque[tuple[float, float]] = deque(maxlen=LOOKED_AT)
        """Share of foreground in the pseudo-labels and in the labels of the last logged iterations."""
        self.done = start
        """Finished iterations."""
        self.last, self.clock = start, time.monotonic()
        self.first = self.clock
        """When the first iteration of this start was done."""
        self.computed = time.process_time()
        """The processor's time until then."""

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.close()
        self.board.close()
        self.log.close()

    def say(self, line: str) -> None:
        """One line to stderr and to log.txt, above the bar if there is one."""
        tqdm.write(line, file=sys.stderr)
        self.log.write(line + "\n")
        self.log.flush()

    def text(self, texts: Mapping[str, Any]) -> None:
        """Nested values as TensorBoard text, one page per name."""
        for name, value in texts.items():
            self.board.add_text(name, "```\n" + json.dumps(value, indent=2) + "\n```", self.start)

    def settings(self, values: Mapping[str, Any], metric: str) -> None:
        """The options of the run for TensorBoard's HPARAMS page, in the run's own folder, with one curve to rank by."""
        plain = {name: value if isinstance(value, (bool, int, float, str)) else str(value)
                 for name, value in values.items()}  # fmt: skip
        for summary in hparams(plain, {metric: None}):
            self.board._get_file_writer().add_summary(summary)

    def iteration(
        self,
        iteration: int,
        losses: Any,
        label: Tensor,
        lr: float,
        clock: Clock,
        memory: float,
        scores: Mapping[str, float] = {},
    ) -> None:
        """After the optimizer step of an iteration, counted from 0 here, in scalars.csv and in TensorBoard: `losses` is
        methods.base.Losses, `label` that of the labeled crops, `lr` the learning rate of the step, `memory` the peak in
        GiB so far, `scores` those of the validation, with which an iteration is always logged."""
        self.bar.update()
        self.done = done = iteration + 1
        if done == self.start + 1:
            self.first, self.computed = time.monotonic(), time.process_time()
        if done == self.start + ESTIMATED_AFTER < self.iterations:
            waited = time.monotonic() - self.first
            each = waited / (ESTIMATED_AFTER - 1)
            time_left = duration(each * (self.iterations - done))
            self.say(f"about {time_left} left: {each:.3g} s an iteration, {self.iterations - done} iterations to go")
            cores, threads = (time.process_time() - self.computed) / max(waited, 1e-9), torch.get_num_threads()
            if not clock.cuda and threads > 1 and cores < SHARED * threads:
                self.say(f"{threads} threads had {cores:.1f} cores. If other programs run, --threads 1 may be faster.")
        if done % self.log_every and done != self.iterations and not scores:
            return
        now = time.monotonic()
        speed = (done - self.last) / max(now - self.clock, 1e-9)
        self.last, self.clock = done, now
        terms = {f"loss/{name}": float(value.detach()) for name, value in losses.terms.items()}
        monitors = {name: float(value) for name, value in losses.monitors.items()}
        curves = {"loss/total": float(losses.total.detach()), **terms, **losses.weights, "lr": lr, **monitors, **scores}
        shares = {f"time/{name}": share for name, share in clock.shares().items()}
        for name, value in {**curves, "speed/iterations_per_s": speed, "memory/peak_gib": memory, **shares}.items():
            self.board.add_scalar(name, value, iteration)
        self.scalars.add(iteration, curves)
        self.warn(iteration, monitors, label)
        short = [f"{name.partition('/')[2]} {value:.3f}" for name, value in terms.items()]
        short += [f"{name} {value:.4f}" for name, value in losses.weights.items()]
        self.bar.set_postfix_str(", ".join([*short, f"lr {lr:g}"]))
        left = (self.iterations - done) / speed
        line = f"{done}/{self.iterations}  {'  '.join(short)}  lr {lr:g}  {speed:.2f} it/s  {left / 60:.1f} min left"
        if self.bar.disable:
            self.say(line)
        else:
            self.log.write(line + "\n")

    def warn(self, iteration: int, monitors: Mapping[str, float], label: Tensor) -> None:
        """Warns once of each output without a gradient, and once of pseudo-labels with far too much foreground."""
        for name in monitors:
            if name.startswith("live_gradient/") and monitors[name] == 0 and name not in self.warned:
                self.warned.add(name)
                self.say(
                    f"warning: {name} is 0 at iteration {iteration}: that output has no gradient left and may never "
                    "move again. Watch it; a smaller --k or another --seed may help."
                )
        if not monitors.get(FOREGROUND) or FOREGROUND in self.warned:  # 0 until pseudo-labels count
            return
        self.marked.append((monitors[FOREGROUND], float((label > 0).float().mean())))
        pseudo, true = (mean(shares) for shares in zip(*self.marked, strict=True))
        if len(self.marked) == LOOKED_AT and pseudo > TOO_MUCH * true > 0:
            self.warned.add(FOREGROUND)
            self.say(
                f"warning: at iteration {iteration} the pseudo-labels are {pseudo:.0%} foreground, the labels "
                f"{true:.0%}. The networks that make them have not learned yet and teach their own mistakes. Let "
                "pseudo-labels count later (--start, where the method has it), or train longer (--iterations)."
            )

    def picture(self, name: str, picture: NDArray, done: int) -> None:
        """(height, width, 3) uint8 after `done` iterations to pictures/NAME-DONE.png, and to TensorBoard at the last of
        these."""
        self.board.add_image(name, picture, done - 1, dataformats="HWC")
        self.board.flush()
        self.pictures.mkdir(exist_ok=True)
        Image.fromarray(picture).save(self.pictures / f"{name}-{done:06d}.png")

    def mesh(self, name: str, mesh: dict[str, NDArray], done: int) -> None:
        """vertices (V,3) float, colours (V,3) uint8 and faces (F,3) of triangles to TensorBoard, as `picture`."""
        arrays = {key: values[None] for key, values in mesh.items()}
        self.board.add_mesh(name, arrays["vertices"], arrays["colours"], arrays["faces"], global_step=done - 1)
