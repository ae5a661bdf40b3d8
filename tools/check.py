"""Checks a data set before training: every file of its lists, and what the volumes show together.

    python -m tools.check data/la --labeled 16
    python -m tools.check FOLDER --labeled 10 --patch-size 96 96 64
    python -m tools.check FOLDER --all-labels --memory 12

An error must be fixed before training (exit code 2), a warning is worth a look, a note is good to know; each names the
cases and what to do. The labels of the first --labeled training cases, of the test and of the validation cases are
opened, those of the others only with --all-labels. A table compares the set with LA. Without --patch-size the command
of a training ends the output, with a patch that suits the scans and the memory.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dataloaders.cases import FILE_NAME, MOST_CLASSES, Case, find_cases, has_label
from dataloaders.channel_names import channel_names_in
from dataloaders.class_names import DATASET, class_names, read_dataset
from dataloaders.findings import LEVELS, Facts, Finding, findings_of, memory_gib
from dataloaders.lists import lists_of, validation_of
from dataloaders.training import is_phantom, refuse_patch, usual_classes, usual_labeled
from methods import METHODS
from networks.heads import HALVINGS, side_multiples
from settings import Options as Training
from tools import suggestions
from tools.inspections import Inspection, findings_of_inspections, inspect
from tools.overview import table
from utils.devices import cores, total_memory_gib
from utils.errors import UserError, run
from utils.options import Parser, fill, flag_of, option

PHANTOM_PATCH = [48, 48, 32]  # of the profile phantom


@dataclasses.dataclass
class Options:
    labeled: int | None = option(
        None, "the first N scans of train.list are labeled (default as in training)", type=int, minimum=0
    )
    classes: int | None = option(
        None, "C, labels hold 0..C (default as many as the set's dataset.json names, else 1)", type=int, minimum=1,
        maximum=MOST_CLASSES,
    )  # fmt: skip
    patch_size: list[int] | None = option(
        None, "voxels of a crop along x, y, z (default one is suggested; of data/phantom 48 48 32)",
        type=int, nargs=3, minimum=1,
    )  # fmt: skip
    method: str = option(Training.method, "method to be trained, whose memory is counted", choices=list(METHODS))
    memory: float | None = option(
        None, "GiB of the device for which a patch is suggested (default that of the GPU, else 8)", type=float,
        minimum=0.1,
    )  # fmt: skip
    downsample: int = option(1, "as in training: pool this many voxels along each axis into one", minimum=1)
    all_labels: bool = option(False, "open the labels of the unlabeled scans too")
    workers: int = option(0, "processes that read; 0: as many as there are cores, 8 at most", minimum=0)


def unlisted(folder: Path, names: Sequence[str]) -> list[Finding]:
    """A note if there are case files that no list names."""
    files = {path.parent.name for path in folder.glob(f"**/{FILE_NAME}")} | {path.stem for path in folder.glob("*.h5")}
    others = tuple(sorted(files - {Path(name).name for name in names}))
    text = "has a file, but no list names it. Add it to train.list if it is to be used."
    return [Finding("note", others, text)] if others else []


def check(folder: Path, o: Options) -> tuple[list[Finding], str, str]:
    """All findings, errors first, the table, and what is suggested, '' with errors or a --patch-size.

    Raises:
        UserError: a missing folder, or lists that cannot be read or name a case twice; nothing can be checked then.
    """
    train, test = lists_of(folder)
    validation = validation_of(folder)
    classes = o.classes or usual_classes(folder)
    count = usual_labeled(folder) if o.labeled is None else o.labeled
    if count > len(train):
        raise UserError(f"--labeled {count} is more than the {len(train)} training cases of {folder}. Give fewer.")
    labeled, unlabeled = train[:count], train[count:]
    cases: list[Case] = []
    missing: list[Finding] = []
    for names, opened in ((labeled, True), (unlabeled, o.all_labels), (test, True), (validation, True)):
        usable, problems = find_cases(folder, names, labeled=opened, classes=classes)
        cases += [  # an unlabeled case need not have the label that --all-labels would open
            dataclasses.replace(
                case, labeled=opened and (names is not unlabeled or has_label(case.path, unreadable=False))
            )
            for case in usable
        ]
        for name, text in problems:
            missing.append(Finding("error", (name,), f"{text}. Put it there or take the case out of the lists."))
    inspections = list(_each(cases, o))
    good = {x.name: x.facts for x in inspections if x.facts}
    patch_size = o.patch_size or (PHANTOM_PATCH if is_phantom(folder) else [])
    lists = {"labeled": labeled, "unlabeled": unlabeled, "test": test}
    lists |= {"validation": validation} if validation else {}
    groups = {name: [good[n] for n in names if n in good] for name, names in lists.items()}
    trained = groups["labeled"] + groups["unlabeled"]
    everything = [
        *missing,
        *findings_of_inspections(inspections, classes=classes, labeled=labeled, test=test, validation=validation),
        *findings_of(list(good.values()), trained=trained, patch_size=patch_size, downsample=o.downsample),
        *(_sides(patch_size) if patch_size else []),
        *_memory(trained, o.downsample),
        *unlisted(folder, [*train, *test, *validation]),
    ]
    findings = sorted(everything, key=lambda finding: LEVELS.index(finding.level))
    suggested = ""
    bad = any(finding.level == "error" for finding in findings)
    if not (bad or o.patch_size or is_phantom(folder)) and groups["labeled"]:
        gib = suggestions.device_gib() if o.memory is None else o.memory
        t = suggestions.Planned(str(folder), o.labeled, o.method, classes, o.downsample, gib)
        try:
            suggested = suggestions.described(suggestions.suggest(trained, len(groups["labeled"]), t), trained, t)
        except UserError as e:  # the findings count all the same
            suggested = f"No patch is suggested: {e}"
    channels = channel_names_in(read_dataset(folder / DATASET), folder / DATASET)
    return findings, table(groups, classes, class_names(folder), channels), suggested


def _sides(patch_size: Sequence[int]) -> list[Finding]:
    """An error for a patch that no training takes, a warning for one that needs other halvings than the usual ones."""
    try:
        refuse_patch(patch_size, side_multiples(HALVINGS))
    except UserError as e:
        steps = max(HALVINGS)
        halvings = [max(n for n in range(steps + 1) if side % 2**n == 0) for side in patch_size]
        if max(halvings) < steps:
            return [Finding("error", (), str(e))]
        return [Finding("warning", (), f"{e} Or train with --halvings {' '.join(map(str, halvings))}.")]
    return []


def _memory(facts: Sequence[Facts], downsample: int) -> list[Finding]:
    need, there = memory_gib(facts) / downsample**3, total_memory_gib()
    if need <= 0.5 * there:
        return []
    text = f"the training volumes take {need:.1f} of {there:.1f} GiB of memory. Train with --cache disk."
    return [Finding("warning", (), text)]


def _each(cases: Sequence[Case], o: Options) -> Iterator[Inspection]:
    """Inspections of the cases in their order, from several processes: they are work, not waiting."""
    workers = min(o.workers or min(cores(), 8), len(cases))
    pool: Any = nullcontext()
    with suppress(OSError, NotImplementedError):  # where processes have no semaphores
        pool = ProcessPoolExecutor(workers) if workers > 1 else pool
    with pool as several:
        inspections = several.map(inspect, cases) if several else map(inspect, cases)
        try:
            yield from tqdm(inspections, "checking", len(cases), leave=False, unit="scan", disable=None)
        except BrokenProcessPool as e:
            raise UserError("a process that read the volumes was ended, as if memory ran out. Give --workers 1.") from e


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, prog="python -m tools.check")
    parser.add_argument("folder", metavar="DIR", help="folder of the data set")
    parser.add_dataclass(Options)
    options = parser.parse(argv)
    folder = Path(options.pop("folder"))
    idle = [flag_of(name) for name in ("method", "memory") if name in options and "patch_size" in options]
    if idle:
        raise UserError(f"{idle[0]} does nothing with --patch-size, as no patch is suggested then. Leave one out.")
    findings, summary, suggested = check(folder, fill(Options, options))
    for finding in findings:
        print(f"{finding.level + ':':8} {finding}")
    counts = {level: sum(finding.level == level for finding in findings) for level in LEVELS}
    print("\n" * bool(findings) + summary)
    if suggested:
        print("\n" + suggested)
    print("\n" + ", ".join(f"{n} {level}{'s' * (n != 1)}" for level, n in counts.items()))
    if counts["error"]:
        raise UserError(f"{folder} cannot be trained on as it is. Fix what is called an error above.")


if __name__ == "__main__":
    run(main)
