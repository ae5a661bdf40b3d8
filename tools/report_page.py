"""One page about a tested run: its table, every scan's figures, and all scans to look through.

    python -m tools.report_page runs/la/dtml-16-seed1337                 of what test_la.py has written there
    python test_la.py --checkpoint runs/la/dtml-16-seed1337 --report     the same, right after the test

Writes report.html into the test folder. It holds everything itself, so it opens offline and can be sent around.
"""

import dataclasses
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from tqdm import tqdm

from evaluation.predictions import read_scores, test_of
from evaluation.scores import CAPTION, MEAN, by_dice, caption_of, with_class_names
from evaluation.slices import COLOURS, LABEL, colour_of
from tools.report_scans import ALL_BYTES, MOST_BYTES, ShownCase, shown_first, viewers
from tools.report_tables import bars, every_table, results_table
from utils.checkpoint import write_whole
from utils.errors import run
from utils.options import option, read_flags
from utils.run_folder import MANIFEST, read_json

TEMPLATE = Path(__file__).with_name("report_page.html")
DEFINITIONS = (
    "<b>Dice</b> 2|P ∩ Y| / (|P| + |Y|) and <b>Jaccard</b> |P ∩ Y| / |P or Y| of prediction P and label Y.",
    "<b>ASD</b>: mean distance from the border of the prediction to the border of the label, in that direction only, "
    "as medpy's asd and as the papers of this field report it. It does not see what the prediction misses far away.",
    "<b>95HD</b>: the 95th percentile of the distances from each border to the other, both directions pooled.",
    "Both in voxels, as the papers print them, and in mm by the spacing of the scan.",
    "Where the prediction or the label alone is <b>empty</b>, Dice and Jaccard are 0 and there is no distance: in the "
    "means the volume's diagonal stands for it, and brackets say how many scans have a distance, and their mean alone. "
    "Where both are empty nothing is measured; such a scan is in no mean. The last columns count all three.",
    "<b>largest</b>: scored on the largest 26-connected component of the prediction alone; <b>all</b>: as predicted.",
)


@dataclasses.dataclass
class Options:
    """Where things are."""

    test: str = option("", "run folder that was tested, or a folder of test_la.py in it", word="RUN")
    data: str = option("", "folder of the data set (default the one that the test read)")


def write_report(test: Path, data: str = "") -> Path:
    """Writes test/report.html from cases.csv, test.json, the predictions, and manifest.json of the run.

    Raises:
        UserError: no such test, or a scan or prediction to be shown that cannot be read.
    """
    rows = read_scores(test)
    tested = read_json(test / "test.json")
    run_folder = _run_of(test, tested)
    trained = read_json(run_folder / MANIFEST)
    options = trained.get("options", {})
    output, component = rows[0]["output"], tested.get("saved", "largest")
    dices = by_dice(rows, output, component)  # of no scan if none was saved
    folder, first = Path(data or tested.get("data", "")), shown_first(dices)
    class_names = tested.get("class_names", {})
    most_bytes = min(MOST_BYTES, ALL_BYTES // max(len(dices), 1))
    names = tqdm(dices, "drawing", leave=False, unit="scan", disable=None)
    how: dict[str, Any] = {"most_bytes": most_bytes, "class_names": class_names}
    cases = [
        ShownCase(test, folder, name, output, component, rows, still=i in first, **how) for i, name in enumerate(names)
    ]
    about = [str(options[name]) for name in ("method", "preset") if name in options]
    about += [f"{options['labeled']} labeled scans"] if "labeled" in options else []
    about += [f"seed {options['seed']}"] if "seed" in options else []
    about += [f"iteration {tested['iteration']}"] if "iteration" in tested else []
    count, scans = len({row["case"] for row in rows}), tested.get("scans", "test")
    about += [f"{count} {scans} scans of {tested.get('data', 'unknown data')}"]
    shown = with_class_names(rows, class_names)
    more = caption_of(tested.get("nsd_tolerance_mm"), tested.get("metrics", [])).removeprefix(CAPTION).splitlines()
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"Test of {run_folder.resolve().name}"),
        subtitle=escape(", ".join(about)),
        prediction_colour=COLOURS[0],
        label_colour=LABEL,
        results=results_table(shown),
        classes=_key(rows, class_names),
        bars=bars(shown),
        viewers=viewers(cases, dices, output, component),
        every=every_table(shown),
        provenance=provenance(tested, trained),
        definitions="<ul>" + "".join(f"<li>{line}</li>" for line in (*DEFINITIONS, *more)) + "</ul>",
        data=json.dumps([case.data for case in cases]).replace("<", "\\u003c"),
    )
    path = test / "report.html"
    write_whole(path, page.encode())
    return path


def _run_of(test: Path, tested: dict[str, Any]) -> Path:
    """The run folder of a test: the one that it lies in, or that of the checkpoint that it states."""
    stated = Path(tested.get("checkpoint", test.parent))
    if (test.parent / MANIFEST).is_file():
        return test.parent
    return stated if stated.is_dir() else stated.parent


def _key(rows: Sequence[dict[str, Any]], class_names: dict[str, str]) -> str:
    """The classes with their colours and names; '' for a single one."""
    classes = [c for c in dict.fromkeys(str(row.get("class", MEAN)) for row in rows) if c != MEAN]
    chips = [f'<span class="chip" style="background:{colour_of(int(c))}"></span>' for c in classes]
    names = [escape(f"{c} {class_names.get(c, '')}".rstrip()) for c in classes]
    entries = ", ".join(chip + name for chip, name in zip(chips, names, strict=True))
    return f'<p class="soft">Classes: {entries}</p>' if classes else ""


def provenance(tested: dict[str, Any], trained: dict[str, Any]) -> str:
    """What test.json and manifest.json state, without the checksums of the volumes."""

    def entries(values: dict[str, Any]) -> str:
        lines = []
        for name, value in values.items():
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            lines.append(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>")
        return f"<dl>{''.join(lines)}</dl>"

    options = trained.get("options", {})
    rest = {k: v for k, v in trained.items() if k not in ("options", "checksums")}
    parts = {"The test": tested, "The training": rest, "Its options": options}
    return "".join(
        f"<details{' open' if name == 'The test' else ''}><summary>{name}</summary>{entries(values)}</details>"
        for name, values in parts.items()
        if values
    )


def main(argv: list[str] | None = None) -> None:
    """Writes the page of one test folder."""
    o: Options = read_flags(Options, __doc__, "python -m tools.report_page", argv)
    print(write_report(test_of(Path(o.test)), o.data))


if __name__ == "__main__":
    run(main)
