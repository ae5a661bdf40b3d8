"""docs/own-data.md: its commands, in its order, lead from small made-up scans to segmentations in their place."""

import glob
import re
import shlex
from importlib import import_module
from pathlib import Path

import numpy as np
from scans import make_scans

from dataloaders.images import read_image, read_label

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "own-data.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
SMALL = ["--patch-size", "16", "16", "16", "--filters", "2", "--iterations", "2", "--threads", "1", "--device", "cpu"]


def test_the_commands_of_the_page_lead_from_scans_to_segmentations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_scans(tmp_path / "scans", labeled=12, unlabeled=2)
    make_scans(tmp_path / "made", labeled=0, unlabeled=2)
    (tmp_path / "made" / "images").rename(tmp_path / "new")
    done = []
    for command in COMMANDS:
        python, first, *words = shlex.split(command)
        module = words.pop(0) if first == "-m" else first.removesuffix(".py")
        assert python == "python"
        words = [found for word in words for found in (sorted(glob.glob(word)) if "*" in word else [word])]
        import_module(module).main([*words, *(SMALL if module == "train_dtml" else [])])
        done.append(module)
    assert done == ["tools.convert", "tools.check", "train_dtml", "test_la", "predict"]
    assert len((tmp_path / "predictions" / "volumes.csv").read_text().splitlines()) == 3
    for path in (tmp_path / "new").iterdir():
        (image, geometry), (label, found) = read_image(path), read_label(tmp_path / "predictions" / path.name)
        assert image.shape == label.shape and set(np.unique(label)) <= {0, 1}
        assert all(np.allclose(geometry[name], found[name], atol=1e-6) for name in geometry)
