"""docs/curves.md names every tag that a run of any method writes; its figures are those of the curves in results/."""

import re
from pathlib import Path

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
