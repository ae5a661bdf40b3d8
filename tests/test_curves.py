"""docs/curves.md names every tag that a run of any method writes; its figures are those of the curves in results/."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, make_set, method_words
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_dtml
from methods import METHODS

PAGE = (ROOT / "docs" / "curves.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`([a-z_]+(?:/[a-z_]+)?)`", PAGE))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("curves") / "set")


@pytest.mark.parametrize(
    "words", [*([m] for m in METHODS), ["dtml", "--sdm-loss", "both"], ["supervised", "--head", "sdm"]]
)
def test_every_tag_is_named(words, data, tmp_path):
    method, *more = words
    flags = [*method_words(method), *more, *TINY, "--iterations", "2", "--picture-every", "1", "--log-every", "1"]
    train_dtml.main(["--data", str(data), "--runs", str(tmp_path), "--name", "run", "--save-every", "1", *flags])
    tags = EventAccumulator(str(tmp_path / "run")).Reload().Tags()
    found = {
        re.sub(r"/text_summary$|_(VERTEX|FACE|COLOR)$", "", t)
        for kind in ("scalars", "images", "tensors")
        for t in tags[kind]
    }
    assert "surface/labeled" in found and "time/saving" in found and len(found) > 15
    assert found - NAMED == set()


def curve(run: str, tag: str, first: int, last: int) -> float:
    """Mean of a curve over some iterations of a committed run."""
    with open(ROOT / "results" / "half" / run / "scalars.csv", newline="") as f:
        rows = [row for row in csv.DictReader(f) if first <= int(row["iteration"]) < last]
    return float(np.mean([float(row[tag]) for row in rows]))


@pytest.mark.parametrize(
    ("run", "tag", "text"),
    [
        ("dtml", "dice/train_seg", "0.48, 0.70, 0.78, 0.85"),
        ("dtml", "dice/train_sdm", "0.47, 0.63, 0.76, 0.82"),
        ("dtml", "live_gradient/sdm", "0.15 %, 0.07 %, 0.06 %, 0.05 %"),
        ("ua-mt", "certain_share", "0.35, 0.79, 0.91, 0.99"),
    ],
)
def test_its_figures_are_those_of_the_runs(run, tag, text):
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{tag}`")]
    assert text in line
    scale = 100 if "%" in text else 1
    means = [
        scale * curve(f"{run}-16-seed1337", tag, *span) for span in ((0, 200), (200, 600), (600, 1400), (2000, 2400))
    ]
    assert [float(word.strip(" %")) for word in text.split(",")] == pytest.approx(means, abs=0.0051)


def test_the_run_called_collapsed_has_no_live_voxel_from_iteration_179_on():
    with open(ROOT / "results" / "half" / "dtml-authors-16-seed1337" / "scalars.csv", newline="") as f:
        live = {int(row["iteration"]): float(row["live_gradient/sdm"]) for row in csv.DictReader(f)}
    assert all((value == 0) == (iteration >= 179) for iteration, value in live.items())
