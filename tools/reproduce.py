"""Makes and prints the grid (tools/grid.py): every row of the DTML paper's Tables 1 to 3 and DK-UXNet's, and its seeds.

    python -m tools.reproduce                                     the tables, from what is in results/full
    python -m tools.reproduce --list                              every run: how far it is, and its command
    python -m tools.reproduce --missing                           train and test what is missing, then print the tables
    python -m tools.reproduce --missing --budget 60               the same for an hour; the same command goes on
    python -m tools.reproduce --profile half --table 3 --rows ua-mt dtc --seeds 1337
    python -m tools.reproduce --profile half --table glance       the README's table
    python -m tools.reproduce --submit slurm --slurm gpus_per_node=1 timeout_min=240

A run is the two commands that a user would type, train_dtml.py and test_la.py; then its options, manifest, curves and
metrics are copied to RESULTS/PROFILE/KEY-seedSEED. Such a record counts only if it fits what its row asks for today.
"""

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import submitit
import torch
from submitit.core.utils import UncompletedJobError

from dataloaders.cases import LA_FOLDER, PHANTOM_FOLDER, ROOT, lists_of
from evaluation.metrics import COMPONENTS
from evaluation.sliding_window import usual_stride
from evaluation.statistics import read_row
from settings import PROFILES, read_options
from tools.grid import GLANCE, LA_RUNS, LA_TABLES, PHANTOM_RUNS, PHANTOM_TABLES, RETIRED, TESTS, TRAINED_AS, Tables
from tools.table_rows import (
    BEYOND_HEAD,
    HEAD,
    LIVE_HEAD,
    PHANTOM_HEAD,
    RUNS_HEAD,
    Records,
    beyond_line,
    comparison_tables,
    comparisons,
    glance_table,
    live_line,
    phantom_line,
    row_lines,
    ruled,
    run_lines,
)
from utils.checkpoint import fsync_folder, write_whole
from utils.errors import Stopped, StopSignal, UserError, run
from utils.options import Parser, as_flags, default_of, fill, option, renamed
from utils.run_folder import MANIFEST, OPTIONS, SCALARS, has_checkpoint
from utils.run_lock import inherited_lock

ABOUT = """\
Profile `{profile}`, seeds {seeds}. The last iteration, always. A figure is the mean over the runs of a row (the last
column: their number and seeds) of their means over the {scans}test scans; ± is the SD over the runs, shown from three
on. `all` is without a component filter, `largest` with it. Behind a distance: how many of the scans of all runs have
one. An empty mask has none; it scores the volume's diagonal, or nothing where `not penalised`: in records from before
there was that score, whose distances are then too low."""
QUOTED = """
The lines `paper` are quoted from the DTML paper, which took most from the methods' own papers; these differ in, or do
not tell, the component filter and the checkpoint that they tested."""
SMALL = """
**Not the paper's size:** {} Compare our lines with each other only."""
COMPARED = """\
**Comparisons**

Dice in points, `all`, over the seeds that both rows have. `difference`: of the means over runs and scans, with its 95 %
interval by a hierarchical bootstrap; `over` says whether the runs are a source of its width. An interval over scans
only is of these two runs, not of two methods. `median of the scans`: of their differences, each scan its mean over the
seeds (Hodges-Lehmann). `higher in`: of the pairs of runs with the same seed; with five runs and more on each side also
p of a permutation of the runs, and with Holm's correction over all lines here."""
LIVE = """\
**M_d's gradient**

Voxels of m with 1e-3 < m < 1 - 1e-3, the only ones through which M_d learns: their share in the labeled crops, over all
logged iterations, and at the lowest; how many of these iterations had none; and the Dice of M_d at the end."""
EACH = """\
**Each run: mean ± SD over its scans, whose number is in the column `scans`**

Behind a distance: how many of the scans have one, as above."""
SCALES = {
    "full": QUOTED,
    "half": QUOTED + SMALL.format("half resolution, 8 filters, 2400 iterations."),
    "short": QUOTED + SMALL.format("half resolution, small crops, 8 filters, 600 iterations."),
    "phantom": SMALL.format("made-up atria, small crops, 8 filters, 300 iterations."),
}
BEYOND = "beyond"  # shown where it has records, or if it is asked for
TEST = "test.json"
BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError, UserError)  # what a damaged file can raise


@dataclasses.dataclass
class Options:
    """What to show or to do; `Sequence`, as `list` is a flag here."""

    profile: str = option("full", "scale of the runs", choices=list(PROFILES), group="what")
    table: Sequence[str] = option([], f"only these tables: {', '.join(LA_TABLES)}", type=str, nargs="+", group="what")
    rows: Sequence[str] = option([], "only these runs: keys or names of methods", type=str, nargs="+", group="what")
    seeds: Sequence[int] = option([], "default 1337 1338 1339 (phantom 1337), and in the tables those recorded",
                                  type=int, nargs="+", group="what")  # fmt: skip
    results: str = option("results", "where the records are", group="what")
    list: bool = option(False, "print every run, how far it is, and its command", group="do")
    missing: bool = option(False, "train and test what is missing, then print the tables", group="do")
    budget: float = option(0.0, "minutes for --missing; 0: no end", minimum=0, group="do")
    submit: str = option("", "a submitit job for each missing run: slurm, or local, all at once here",
                         choices=["local", "slurm"], group="do")  # fmt: skip
    slurm: Sequence[str] = option([], "KEY=VALUE of submitit's update_parameters", type=str, nargs="+", group="do")
    runs: str = option("runs/reproduce", "where the run folders go", group="do")
    data: str = option("", "folder of the data set (default data/la; phantom data/phantom)", group="do")
    device: str = option("", "of the runs: cpu, cuda or cuda:N", group="do")
    threads: int = option(0, "CPU threads of a run; 0 leaves torch's choice", minimum=0, group="do")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run and its seed: what its result depends on, its two commands, and where it trains and is recorded."""

    key: str
    method: str
    seed: int
    settings: list[str]
    train: list[str]
    test: list[str]
    folder: Path
    tested: Path
    record: Path
    outputs: list[str]


def recorded_seeds(folder: Path, key: str) -> list[int]:
    """The seeds of which there is a record of a row."""
    found = [re.fullmatch(r"\d+", path.name.removeprefix(f"{key}-seed")) for path in folder.glob(f"{key}-seed*")]
    return [int(match[0]) for match in found if match]


def select(o: Options) -> tuple[list[Run], Tables]:
    """The runs and tables that --table, --rows and --seeds leave; runs seed by seed, in the tables' order.

    Raises:
        UserError: a table or a row that this profile does not have.
    """
    phantom = o.profile == "phantom"
    grid, tables = (PHANTOM_RUNS, PHANTOM_TABLES) if phantom else (LA_RUNS, LA_TABLES)
    flags = {key: shlex.split(words) for key, words in grid.items()}
    methods = {key: words[words.index("--method") + 1] for key, words in flags.items()}
    names = list(dict.fromkeys([*flags, *methods.values()]))
    for flag, asked, known in (("table", o.table, list(tables)), ("rows", o.rows, names)):
        unknown = [word for word in asked if word not in known]
        if unknown:
            raise UserError(f"--{flag} {' '.join(unknown)} is not in this grid. Choose from {', '.join(known)}.")
    chosen: Tables = {}
    shown = [name for name in tables if name != GLANCE]
    if not any(Path(o.results, o.profile).glob(f"{BEYOND}-*")):
        shown = [name for name in shown if name != BEYOND]
    for name in o.table or shown:
        rows = [row for row in tables[name][1] if not o.rows or {row.key, methods[row.key]} & set(o.rows)]
        chosen |= {name: (tables[name][0], rows)} if rows else {}
    every = [row for _, rows in chosen.values() for row in rows]
    every += [row._replace(key=row.alone) for row in every if row.alone]
    place = ["--data", o.data or str(PHANTOM_FOLDER if phantom else LA_FOLDER)]
    place += ["--device", o.device] if o.device else []
    place += ["--threads", str(o.threads)] if o.threads else []
    runs = []
    usual = [1337] if phantom else [1337, 1338, 1339]
    keys = list(dict.fromkeys(row.key for row in every))
    recorded = {key: set(recorded_seeds(Path(o.results, o.profile), key)) for key in keys}
    seeds = {key: set(o.seeds or [*usual, *recorded[key]]) for key in keys}
    seeds |= {key: seeds[key] & recorded[key] for key in RETIRED & set(keys)}
    for seed in dict.fromkeys(o.seeds or sorted({seed for those in seeds.values() for seed in those})):
        for key in [key for key in keys if seed in seeds[key]]:
            trained = TRAINED_AS.get(key, key)
            folder = Path(o.runs) / o.profile / f"{trained}-seed{seed}"
            how = TESTS.get(key, {})
            tested = folder / (how.get("scans", "test") if trained == key else key)
            settings = [*flags[key], "--profile", o.profile, "--seed", str(seed)]
            where = ["--runs", str(folder.parent), "--name", folder.name]
            runs.append(Run(
                key, methods[key], seed, settings,
                train=["train_dtml.py", *settings, "--resume", "auto", *where, *place],
                test=["test_la.py", "--checkpoint", str(folder), "--out", str(tested),
                      *shlex.split(as_flags(how)), *place],
                folder=folder, tested=tested, record=Path(o.results) / o.profile / f"{key}-seed{seed}",
                outputs=list(dict.fromkeys(row.output for row in every if row.key == key)),
            ))  # fmt: skip
    return runs, chosen


# what is there
def other_options(this: Run, manifest: Path) -> list[str]:
    """Where recorded options differ, in what can change the result, from what the row asks for today."""
    if this.key in RETIRED:
        return []
    options = renamed(json.loads(manifest.read_text(encoding="utf-8"))["options"])
    asked: tuple[Any, ...] = read_options(this.settings)[:2]
    fields = [(part, f) for part in asked for f in dataclasses.fields(part) if not f.metadata["harmless"]]
    fields = [(part, f) for part, f in fields if f.name != "preset"]  # its name may change; what it sets is compared
    now = {f.name: getattr(part, f.name) for part, f in fields}
    then = {f.name: options.get(f.name, default_of(f)) for _, f in fields}
    for side in (now, then):  # None and what it stands for are the same
        usual = side["batch_size"] if side["unlabeled"] == 0 else max(side["batch_size"] // 2, 1)
        side["labeled_batch"] = side["labeled_batch"] or usual
    differ = [name for name in now if now[name] != then[name]]
    return [f"--{name.replace('_', '-')} {now[name]} here, {then[name]} in the record" for name in differ]


def unfit(this: Run, record: Path) -> list[str]:
    """Why a record does not count: other options, not the last iteration, an output that is not there."""
    problems = other_options(this, record / MANIFEST)
    trained = json.loads((record / MANIFEST).read_text(encoding="utf-8"))["options"]
    found, last = json.loads((record / TEST).read_text(encoding="utf-8")), trained["iterations"]
    problems += [f"tested at iteration {found['iteration']} of {last}"] if found["iteration"] != last else []
    windows = {
        "patch_size": trained["patch_size"], "stride": usual_stride(trained["patch_size"], trained["downsample"])
    }  # fmt: skip
    usual = {"scans": "test", "flips": 1, "weighting": "uniform", "precision": "fp32", **windows}
    then = usual | found  # early records do not tell all of it
    asked = {name: TESTS.get(this.key, {}).get(name, value) for name, value in usual.items()}
    problems += [f"tested with --{name} {then[name]}" for name in asked if then[name] != asked[name]]
    for output in this.outputs:
        for component in COMPONENTS:
            read_row(f"{record}:{output}", "dice", component)
    return problems


def state(this: Run) -> str:
    """done, missing, started (there is a checkpoint), or other options: in what a record or a run folder differs."""
    try:
        if this.record.exists():
            word, problems = "done", unfit(this, this.record)
        elif has_checkpoint(this.folder):
            word, problems = "started", other_options(this, this.folder / MANIFEST)
        else:
            return "missing"
    except BROKEN as e:
        problems = [f"cannot be read ({e})"]
    return f"other options: {'; '.join(problems)}" if problems else word


def print_list(runs: list[Run], tables: Tables) -> None:
    """Every run with its tables, and for each seed how far it is and the command that trains it."""
    for key in dict.fromkeys(this.key for this in runs):
        where = [name for name, (_, rows) in tables.items() if any(key in (row.key, row.alone) for row in rows)]
        print(f"{key} (table {', '.join(where)})")
        for this in runs:
            if this.key == key:
                print(f"  {this.seed} {state(this)}\n    python {shlex.join(this.train)}")
                if this.key in RETIRED:
                    print("    an option that this code no longer has")


# the tables
def print_tables(o: Options, runs: list[Run], tables: Tables) -> None:
    """Markdown on stdout; on stderr what is left out, and records of other test scans."""
    done: dict[str, Records] = {}
    scans: dict[Path, int] = {}
    devices = set()
    for this in runs:
        word = state(this)
        if word == "done":
            done.setdefault(this.key, {})[this.seed] = this.record
            if this.key not in TESTS:
                scans[this.record] = len(read_row(f"{this.record}:{this.outputs[0]}", "dice", "all"))
            manifest = json.loads((this.record / MANIFEST).read_text(encoding="utf-8"))
            devices.add(f"{manifest.get('device')}, threads: {manifest.get('threads')}")
        elif this.record.exists():
            print(f"warning: {this.record} is left out; {word}", file=sys.stderr)
    if GLANCE in tables:
        print(glance_table(tables[GLANCE][1], done))
        tables = {name: table for name, table in tables.items() if name != GLANCE}
        if not tables:
            return
    usual = Counter(scans.values()).most_common(1)[0][0] if scans else 0
    for path, count in scans.items():
        if count != usual:
            print(f"warning: {path} was tested on {count} scans, most others on {usual}.", file=sys.stderr)
    seeds = ", ".join(map(str, dict.fromkeys(this.seed for this in runs)))
    print(ABOUT.format(profile=o.profile, seeds=seeds, scans=f"{usual} " if scans else "") + SCALES[o.profile])
    phantom = o.profile == "phantom"
    if phantom and devices:
        print(f"Speed and memory on {'; '.join(sorted(devices))}.")
    for name, (title, rows) in tables.items():
        head = PHANTOM_HEAD if phantom else BEYOND_HEAD if name == BEYOND else HEAD
        print(f"\n**{title}**\n\n{ruled(head)}")
        for row in rows:
            records = done.get(row.key, {})
            if phantom:
                print(phantom_line(row, records))
            elif name == BEYOND:
                print(beyond_line(row, records, done.get(f"{BEYOND}-paper", {})))
            else:
                print(row_lines(row, records))
    compared = comparisons(tables, done)
    if compared:
        print(f"\n{COMPARED}\n{comparison_tables(compared)}", end="")
    live = [live_line(path) for key, records in done.items() if key not in TRAINED_AS for path in records.values()]
    if any(live):
        print(f"\n{LIVE}\n\n{ruled(LIVE_HEAD)}\n" + "\n".join(filter(None, live)))
    if done:
        print(f"\n{EACH}\n\n{ruled(RUNS_HEAD)}")
    for records in done.values():
        for path in records.values():
            print(run_lines(path))


# what is missing
class OutOfTime(Exception):
    """The budget is used up."""


def call(words: list[str], lock: IO[str], stop: StopSignal, deadline: float) -> int:
    """Runs one of the scripts and returns its exit code; a signal to us, or the deadline, is handed on to it.

    Raises:
        Stopped, OutOfTime: once the script has saved and left because of it.
    """

    def due() -> int:
        return stop.number or (signal.SIGTERM if time.monotonic() >= deadline else 0)

    told, code = due(), 0
    if not told:
        print(f"+ python {shlex.join(words)}", file=sys.stderr, flush=True)
        # A process group of its own, so that Ctrl-C reaches it once, from here. A cluster sends SIGUSR2 to everyone.
        child = subprocess.Popen(
            [sys.executable, str(ROOT / words[0]), *words[1:]], stdin=subprocess.DEVNULL, stdout=2, process_group=0,
            pass_fds=[lock.fileno()], preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
        )  # fmt: skip
        try:
            while child.poll() is None:
                if not told and due():
                    told = due()
                    child.send_signal(told)
                time.sleep(0.1)
            code = child.returncode
        except KeyboardInterrupt:  # the second Ctrl-C
            child.send_signal(signal.SIGINT)
            raise
        finally:
            child.terminate()
            child.wait()
    if stop.number:
        raise Stopped(stop.number, "the same command goes on from here")
    if told:
        raise OutOfTime
    return code


def record(this: Run) -> str:
    """Copies what a trained and tested run found to its record, whole or not at all; returns why not, or nothing."""
    partial = this.record.with_name(f".{this.record.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        trained, tested = (OPTIONS, MANIFEST, SCALARS), ("cases.csv", "table.md", TEST)
        for path in [*(this.folder / name for name in trained), *(this.tested / name for name in tested)]:
            write_whole(partial / path.name, path.read_bytes())
        problems = unfit(this, partial)
        if not problems:
            partial.rename(this.record)
            fsync_folder(this.record.parent)
        return "; ".join(problems)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def make(this: Run, stop: StopSignal, deadline: float = math.inf) -> str:
    """Trains, tests and records one run, from where it is; returns what went wrong, or nothing."""
    try:
        this.folder.parent.mkdir(parents=True, exist_ok=True)
        with inherited_lock(this.folder.with_name(f".{this.folder.name}.lock")) as lock:
            if lock is None:
                return "another process is at it"
            word = state(this)
            if word == "done":
                return ""
            if word not in ("missing", "started"):
                return f"{this.record if this.record.exists() else this.folder} is not overwritten; {word}"
            for words in (this.train, this.test):
                code = call(words, lock, stop, deadline)
                if code:
                    return f"{words[0]} left with exit code {code}{' (diverged)' if code == 3 else ''}"
            return record(this)
    except BROKEN as e:
        return f"cannot be recorded ({e})"


def make_missing(o: Options, runs: list[Run]) -> list[str]:
    """Makes one run after the other until the budget ends; returns a line for each that failed."""
    deadline = time.monotonic() + 60 * o.budget if o.budget else math.inf
    failed = []
    with StopSignal() as stop:
        for this in runs:
            try:
                problem = "" if state(this) == "done" else make(this, stop, deadline)
            except OutOfTime:
                print(f"{o.budget:g} minutes are used up; the same command goes on from here.", file=sys.stderr)
                break
            if problem:
                failed.append(f"{this.record.name}: {problem}")
                print(f"failed: {failed[-1]}", file=sys.stderr)
    return failed


@dataclasses.dataclass(frozen=True)
class Job(submitit.helpers.Checkpointable):
    """Runs of one folder, for submitit, which queues them again when time is over; they go on from its checkpoint."""

    runs: list[Run]

    def __call__(self) -> str:
        with StopSignal() as stop:
            return "; ".join(filter(None, (make(this, stop) for this in self.runs)))


def submit(o: Options, runs: list[Run]) -> list[str]:
    """Submits every missing run; waits for local ones and returns a line for each that failed."""
    settings: dict[str, Any] = {"name": "dtml", "timeout_min": 24 * 60}
    settings |= {"gpus_per_node": torch.cuda.device_count()} if o.submit == "local" else {}
    settings |= {key: int(value) if value.isdigit() else value for key, _, value in (w.partition("=") for w in o.slurm)}
    try:
        executor = submitit.AutoExecutor(folder=Path(o.runs) / "submitit", cluster=o.submit)
        executor.update_parameters(**settings)
    except (RuntimeError, NameError, AssertionError, ValueError, OSError) as e:
        raise UserError(f"--submit {o.submit} {shlex.join(o.slurm)}: {e} Fix --slurm, or use --missing.") from e
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # jobs import this code
    missing: dict[Path, list[Run]] = {}
    for this in runs:
        if state(this) != "done":
            missing.setdefault(this.folder, []).append(this)
    names = [" ".join(this.record.name for this in those) for those in missing.values()]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # so that at Ctrl-C submitit lets local jobs save
    jobs = [executor.submit(Job(those)) for those in missing.values()]
    signal.signal(signal.SIGINT, before)
    failed = []
    for name, job in zip(names, jobs, strict=True):
        print(f"job {job.job_id}: {name}", file=sys.stdout if o.submit == "slurm" else sys.stderr)
    for name, job in zip(names, jobs, strict=True) if o.submit == "local" else ():
        try:
            problem = job.result()
        except UncompletedJobError:
            problem = f"its job broke off, see {job.paths.stderr}"
        failed += [f"{name}: {problem}"] if problem else []
    return failed


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, prog="python -m tools.reproduce")
    parser.add_dataclass(Options)
    o: Options = fill(Options, parser.parse(argv))
    runs, tables = select(o)
    if o.budget and (o.submit or not o.missing):
        raise UserError("--budget goes with --missing alone. A job's own end is --slurm timeout_min=MINUTES.")
    if o.list:
        print_list(runs, tables)
        return
    failed = []
    if o.submit or o.missing:
        if o.data or o.profile != "phantom":
            lists_of(Path(o.data or LA_FOLDER))  # or else every run would say that there is no data
        failed = submit(o, runs) if o.submit else make_missing(o, runs)
    if o.submit != "slurm":
        print_tables(o, runs, tables)
    if failed:
        print("failed:", *failed, sep="\n  ", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run(main)
