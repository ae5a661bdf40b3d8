"""Puts the tests of a cross-validation's folds together: mean and SD over all scans, and over the folds.

    python train_dtml.py --data data/mine --fold 0/5 --name fold0          and so on, up to --fold 4/5
    python test_la.py --checkpoint runs/fold0 --scans validation           of each run
    python -m tools.folds runs/fold0 runs/fold1 runs/fold2 runs/fold3 runs/fold4
    python -m tools.folds 'runs/fold?/best-validation' --out runs/five     of the best checkpoints; written down too

RUN is a run folder, whose test is RUN/validation, a folder of test_la.py in it, or a pattern in quotes. Every run is
one fold, with the same options but --fold, and each scan is tested by the run that left it out.
"""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataloaders.class_names import named_classes
from evaluation.predictions import read_scores
from evaluation.rows import runs_of
from evaluation.scores import as_csv, caption_of, table, with_class_names
from methods import METHODS
from settings import Options as TrainingOptions
from utils.checkpoint import BEST, write_whole
from utils.early_options import renamed
from utils.errors import UserError, run, warn
from utils.options import flag_of, harmless_names, option, read_flags, with_defaults
from utils.run_folder import MANIFEST, read_json

TESTED = "validation"  # folder of test_la.py --scans validation in a run folder
OF_THE_TEST = ("scans", "patch_size", "stride", "weighting", "flips", "precision", "nsd_tolerance_mm", "metrics")


@dataclasses.dataclass
class Options:
    """Of what, and what to write."""

    runs: list[str] = option([], "run folders or test folders of the folds", word="RUN", type=str, nargs="+")
    out: str = option("", "folder for cases.csv of all scans and table.md (default none)")


@dataclasses.dataclass
class Fold:
    """The test of one fold."""

    test: Path
    """Folder of test_la.py."""
    number: int
    folds: int
    options: dict[str, Any]
    """Of the training."""
    extended: list[int]
    """The numbers of iterations after which the training was once finished."""
    about: dict[str, Any]
    """Content of test.json."""
    rows: list[dict[str, Any]]
    """Rows of cases.csv."""


def read_fold(path: Path) -> Fold:
    """Reads the test of a run folder, or of a folder of test_la.py in it.

    Raises:
        UserError: if it was not tested, is not of a run with --fold, or was not tested on all scans of its fold.
    """
    if not path.is_dir():
        raise UserError(f"there is no folder {path}. Give the run folder of each fold.")
    test = path if (path / "test.json").is_file() else path / TESTED
    about, manifest = read_json(test / "test.json"), read_json(test.parent / MANIFEST)
    options = renamed(manifest.get("options", {}))
    kinds = [METHODS[options["method"]].Options] if options.get("method") in METHODS else []
    options = with_defaults(options, [TrainingOptions, *kinds])
    if not options.get("fold"):
        raise UserError(f"{test.parent} is no run of train_dtml.py with --fold: its {MANIFEST} states none.")
    if not about:
        raise UserError(
            f"{path} has no test of its fold. Run python test_la.py --checkpoint {shlex.quote(str(path))} "
            f"--scans validation, which writes {path / TESTED}."
        )
    if about.get("scans") != TESTED:
        raise UserError(f"{test} was tested on the scans `{about.get('scans')}`. Test with --scans validation.")
    if about.get("cases"):
        raise UserError(f"{test} is of some scans of its fold alone, by --cases. Test without it.")
    number, folds = map(int, options["fold"].split("/"))
    return Fold(test, number, folds, options, manifest.get("extended", []), about, read_scores(test))


def tested(fold: Fold) -> str:
    """The kind of checkpoint that was tested: best.pt of each fold is of an iteration of its own."""
    file = fold.about.get("saved_as", Path(fold.about.get("checkpoint", "")).name)  # the first of shared weights
    return BEST if file == BEST else f"iteration {fold.about.get('iteration')}"


def outputs_of(fold: Fold) -> str:
    """The outputs that were scored, as text."""
    return ", ".join(dict.fromkeys(row["output"] for row in fold.rows))


def refuse_folds(folds: Sequence[Fold]) -> None:
    """Checks that the folds are of one cross-validation, each once.

    Raises:
        UserError: naming two that do not go together, and what differs.
    """
    first, *others = folds
    harmless = {*harmless_names([TrainingOptions]), "fold", "data", "profile"}
    for other in others:
        names = [name for name in {**first.options, **other.options} if name not in harmless]
        differ = [
            f"{flag_of(name)} is {first.options.get(name)} and {other.options.get(name)}"
            for name in names
            if first.options.get(name) != other.options.get(name)
        ]
        if first.folds != other.folds:
            differ = [f"--fold {first.number}/{first.folds} and {other.number}/{other.folds}"]
        differ += [
            f"{name} of the test is {first.about.get(name)} and {other.about.get(name)}"
            for name in OF_THE_TEST
            if first.about.get(name) != other.about.get(name)
        ]
        if first.extended != other.extended:
            ends = [" and ".join(map(str, fold.extended)) or "none" for fold in (first, other)]
            differ.append(f"trainings went on after {ends[0]} and after {ends[1]} of their iterations")
        if outputs_of(first) != outputs_of(other):
            differ.append(f"the test is of the outputs {outputs_of(first)} and {outputs_of(other)}")
        if tested(first) != tested(other):
            differ.append(f"the test is of {tested(first)} and of {tested(other)}")
        if differ:
            raise UserError(f"{first.test} and {other.test} are not of one cross-validation: {'; '.join(differ)}.")
    seen: dict[int, Fold] = {}
    scans: dict[str, Fold] = {}
    for fold in folds:
        if fold.number in seen:
            raise UserError(f"{seen[fold.number].test} and {fold.test} are both of fold {fold.number}. Give one.")
        seen[fold.number] = fold
        for name in {row["case"] for row in fold.rows}:
            if name in scans:
                raise UserError(
                    f"{scans[name].test} and {fold.test} both tested {name}: train.list changed between them. Train "
                    "and test them on the same lists."
                )
            scans[name] = fold


def main(argv: list[str] | None = None) -> None:
    """Prints the two tables, and warns of folds that are missing."""
    o: Options = read_flags(Options, __doc__, "python -m tools.folds", argv)
    paths = [Path(path) for where in o.runs for path in runs_of(where)]
    folds = sorted(map(read_fold, paths), key=lambda fold: fold.number)
    refuse_folds(folds)
    missing = sorted({*range(folds[0].folds)} - {fold.number for fold in folds})
    if missing:
        warn(f"fold {', '.join(map(str, missing))} of {folds[0].folds} is missing.")
    rows = [{"case": row["case"], "fold": fold.number, **row} for fold in folds for row in fold.rows]
    counts = ", ".join(f"{fold.number}: {len({row['case'] for row in fold.rows})}" for fold in folds)
    about = folds[0].about
    names = about.get("class_names", {})
    shown = with_class_names(rows, names)
    lines = [f"{len(folds)} of {folds[0].folds} folds, scans of fold {counts}.", ""]
    lines += ["Over all scans:", "", table(shown)]
    if len(folds) > 1:
        lines += ["Over the folds: mean ± SD of their means, with an SD from three folds on.", "", table(shown, "fold")]
    lines += [f"Class: {named_classes(names)}.", ""] if names and "class" not in rows[0] else []
    text = caption_of(about.get("nsd_tolerance_mm"), about.get("metrics", [])) + "\n" + "\n".join(lines)
    if o.out:
        write_whole(Path(o.out, "cases.csv"), as_csv(rows).encode())
        write_whole(Path(o.out, "table.md"), text.encode())
    print(text)


if __name__ == "__main__":
    run(main)
