"""The runs of the grid that tools/reproduce.py shows or makes, and how far each is."""

import dataclasses
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataloaders.augmentation import Strengths
from dataloaders.cases import LA_FOLDER, PHANTOM_FOLDER
from evaluation.metrics import COMPONENTS
from evaluation.rows import read_row
from evaluation.sliding_window import usual_stride
from settings import PROFILES
from tools.command_line import read_options
from tools.grid import (
    BEYOND_TABLE,
    GLANCE,
    LA_RUNS,
    LA_TABLES,
    PHANTOM_RUNS,
    PHANTOM_TABLES,
    RETIRED,
    TESTS,
    TRAINED_AS,
    Tables,
)
from tools.hippocampus_grid import HIPPOCAMPUS_RUNS, HIPPOCAMPUS_TABLES
from utils.early_options import renamed
from utils.errors import UserError
from utils.options import as_flags, flag_of, option, with_defaults
from utils.run_folder import MANIFEST, has_checkpoint

GRIDS = {"phantom": (PHANTOM_RUNS, PHANTOM_TABLES), "hippocampus": (HIPPOCAMPUS_RUNS, HIPPOCAMPUS_TABLES)}  # others: LA
FORMATS = ("markdown", "latex", "csv")
TRAINING = ("augment", "flip_axes", "intensity", *(f.name for f in dataclasses.fields(Strengths)), "normalize",
            "paste", "batch_norm", "optimizer", "lr", "lr_schedule", "lr_steps", "lr_gamma", "momentum",
            "weight_decay")  # fmt: skip
TEST = "test.json"
READ_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, UserError)  # what a damaged file can raise


@dataclasses.dataclass
class Options:
    """What to show or to do. Lists are typed `Sequence`, as `list` is a flag here."""

    profile: str = option("full", "scale of the runs", choices=list(PROFILES), group="what")
    table: Sequence[str] = option([], f"only these tables: {', '.join(LA_TABLES)}", type=str, nargs="+", group="what")
    rows: Sequence[str] = option([], "only these runs: keys or names of methods", type=str, nargs="+", group="what")
    labels: Sequence[int] = option([], "only rows with these numbers of labeled scans", type=int, nargs="+", minimum=1,
                                   group="what")  # fmt: skip
    seeds: Sequence[int] = option([], "default 1337 1338 1339 (phantom 1337), and in the tables those recorded",
                                  type=int, nargs="+", group="what")  # fmt: skip
    results: str = option("results", "where the records are", group="what")
    format: str = option("markdown", "of the tables; csv has one number in a column",
                         choices=FORMATS, group="what")  # fmt: skip
    list: bool = option(False, "print every run, how far it is, and its command", group="do")
    missing: bool = option(False, "train and test what is missing, then print the tables", group="do")
    budget: float = option(0.0, "minutes for --missing; 0: no limit", minimum=0, group="do")
    submit: str = option("", "a submitit job for each missing run: slurm, or local, all at once here",
                         choices=["local", "slurm"], group="do")  # fmt: skip
    slurm: Sequence[str] = option([], "KEY=VALUE of submitit's update_parameters", type=str, nargs="+", group="do")
    runs: str = option("runs/reproduce", "where the run folders go", group="do")
    data: str = option("", "folder of the data set (default data/la, or that of the profile)", group="do")
    device: str = option("", "of the runs: cpu, cuda or cuda:N", group="do")
    threads: int = option(0, "CPU threads of a run; 0 leaves torch's choice", minimum=0, group="do")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of one seed: the settings that its result depends on, its two commands, and its folders."""

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


def data_of(profile: str) -> str:
    """The usual folder of the data set that a profile's grid is trained on."""
    return str(PHANTOM_FOLDER) if profile == "phantom" else PROFILES[profile].get("data", str(LA_FOLDER))


def recorded_seeds(folder: Path, key: str) -> list[int]:
    """The seeds of a row that have a record."""
    matches = [re.fullmatch(r"\d+", path.name.removeprefix(f"{key}-seed")) for path in folder.glob(f"{key}-seed*")]
    return [int(match[0]) for match in matches if match]


def select(o: Options) -> tuple[list[Run], Tables]:
    """The runs and tables that --table, --rows, --labels and --seeds select, ordered by seed, then as in the tables.

    Raises:
        UserError: a table, a row or a number of labels that this profile does not have, or no row that has all.
    """
    grid, tables = GRIDS.get(o.profile, (LA_RUNS, LA_TABLES))
    flags = {key: shlex.split(line) for key, line in grid.items()}
    methods = {key: arguments[arguments.index("--method") + 1] for key, arguments in flags.items()}
    names = list(dict.fromkeys([*flags, *methods.values()]))
    numbers = sorted({row.labeled for _, rows in tables.values() for row in rows})
    selections: list[tuple[str, Sequence[Any], Sequence[Any]]] = [
        ("table", o.table, list(tables)), ("rows", o.rows, names), ("labels", o.labels, numbers)
    ]  # fmt: skip
    for flag, selected, choices in selections:
        unknown = " ".join(str(name) for name in selected if name not in choices)
        if unknown:
            raise UserError(f"--{flag} {unknown} is not in this grid. Choose from {', '.join(map(str, choices))}.")
    chosen: Tables = {}
    shown = [name for name in tables if name != GLANCE]
    if not any(Path(o.results, o.profile).glob(f"{BEYOND_TABLE}-*")):
        shown = [name for name in shown if name != BEYOND_TABLE]
    for name in o.table or shown:
        rows = [row for row in tables[name][1] if not o.rows or {row.key, methods[row.key]} & set(o.rows)]
        rows = [row for row in rows if not o.labels or row.labeled in o.labels]
        chosen |= {name: (tables[name][0], rows)} if rows else {}
    if not chosen:
        raise UserError("no row is in all of --table, --rows and --labels. Leave one of them out.")
    every = [row for _, rows in chosen.values() for row in rows]
    every += [row._replace(key=row.alone) for row in every if row.alone]
    place = ["--data", o.data or data_of(o.profile)]
    place += ["--device", o.device] if o.device else []
    place += ["--threads", str(o.threads)] if o.threads else []
    runs = []
    usual = [1337] if o.profile == "phantom" else [1337, 1338, 1339]
    keys = list(dict.fromkeys(row.key for row in every))
    recorded = {key: set(recorded_seeds(Path(o.results, o.profile), key)) for key in keys}
    seeds = {key: set(o.seeds or [*usual, *recorded[key]]) for key in keys}
    seeds |= {key: seeds[key] & recorded[key] for key in RETIRED & set(keys)}
    for seed in dict.fromkeys(o.seeds or sorted({seed for of_key in seeds.values() for seed in of_key})):
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


def recipe_of(settings: list[str]) -> str:
    """The preset of a run in Markdown, and the flags of its command that set its training settings in another way."""
    o, *_, flags = read_options(settings)
    others = as_flags({name: value for name, value in flags.items() if name in TRAINING}).split("\n")
    return ", ".join(f"`{text}`" for text in (o.preset, *others) if text)


def other_options(run: Run, manifest: Path) -> list[str]:
    """The recorded options that can change the result and differ from those of the row today."""
    if run.key in RETIRED:
        return []
    parts: tuple[Any, ...] = read_options(run.settings)[:2]
    options = with_defaults(renamed(json.loads(manifest.read_text(encoding="utf-8"))["options"]), map(type, parts))
    fields = [(part, f) for part in parts for f in dataclasses.fields(part) if not f.metadata["harmless"]]
    fields = [(part, f) for part, f in fields if f.name != "preset"]  # its name may change; what it sets is compared
    now = {f.name: getattr(part, f.name) for part, f in fields}
    then = {f.name: options[f.name] for _, f in fields}
    for side in (now, then):  # None and the value that it stands for are equal
        usual = side["batch_size"] if side["unlabeled"] == 0 else max(side["batch_size"] // 2, 1)
        side["labeled_batch"] = side["labeled_batch"] or usual
    differ = [name for name in now if now[name] != then[name]]
    return [f"{flag_of(name)} {now[name]} here, {then[name]} in the record" for name in differ]


def mismatches(run: Run, record: Path) -> list[str]:
    """Why a record does not count: other options, another iteration than the last, a missing output."""
    problems = other_options(run, record / MANIFEST)
    trained = json.loads((record / MANIFEST).read_text(encoding="utf-8"))["options"]
    tested, last = json.loads((record / TEST).read_text(encoding="utf-8")), trained["iterations"]
    problems += [f"tested at iteration {tested['iteration']} of {last}"] if tested["iteration"] != last else []
    windows = {
        "patch_size": trained["patch_size"], "stride": usual_stride(trained["patch_size"], trained["downsample"])
    }  # fmt: skip
    usual = {"scans": "test", "flips": 1, "weighting": "uniform", "precision": "fp32", "cases": [], **windows}
    then = usual | tested  # early records do not state all of it
    now = {name: TESTS.get(run.key, {}).get(name, value) for name, value in usual.items()}
    problems += [f"tested with {flag_of(name)} {then[name]}" for name in now if then[name] != now[name]]
    for output in run.outputs:
        for component in COMPONENTS:
            read_row(f"{record}:{output}", "dice", component)
    return problems


def status_of(run: Run) -> str:
    """'done', 'missing', 'started' if there is a checkpoint, or 'other options: ...' with each difference."""
    try:
        if run.record.exists():
            status, problems = "done", mismatches(run, run.record)
        elif has_checkpoint(run.folder):
            status, problems = "started", other_options(run, run.folder / MANIFEST)
        else:
            return "missing"
    except READ_ERRORS as e:
        problems = [f"cannot be read ({e})"]
    return f"other options: {'; '.join(problems)}" if problems else status


def records_of(runs: Sequence[Run]) -> dict[str, dict[int, Path]]:
    """Key -> seed -> record, of the runs that are done."""
    done: dict[str, dict[int, Path]] = {}
    for run in runs:
        if status_of(run) == "done":
            done.setdefault(run.key, {})[run.seed] = run.record
    return done


def print_list(runs: list[Run], tables: Tables) -> None:
    """Prints every run with its tables, and for each seed its state and the command that trains it."""
    for key in dict.fromkeys(run.key for run in runs):
        where = [name for name, (_, rows) in tables.items() if any(key in (row.key, row.alone) for row in rows)]
        print(f"{key} (table {', '.join(where)})")
        for run in runs:
            if run.key == key:
                print(f"  {run.seed} {status_of(run)}\n    python {shlex.join(run.train)}")
                if run.key in RETIRED:
                    print("    an option that this code no longer has")
