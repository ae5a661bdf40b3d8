"""Every file that a run or a test writes tells, by itself or by its folder's manifest, what made it."""

import json
import re

import torch
from conftest import ROOT, TINY, load

import test_la
import train_dtml


def test_a_run_and_a_test_write_down_what_made_them(tiny_set, tmp_path):
    folder = tmp_path / "run"
    words = ["--data", str(tiny_set), *TINY, "--iterations", "2", "--seed", "7", "--picture-every", "1"]
    train_dtml.main([*words, "--runs", str(tmp_path), "--name", "run"])
    test_la.main(["--checkpoint", str(folder), "--stride", "8", "8", "8", "--threads", "1"])
    saved = load(folder)
    run, test = (json.loads((folder / name).read_text()) for name in ("manifest.json", "test/test.json"))
    assert (saved["options"]["seed"], run["options"]["seed"]) == (7, 7) and saved["options"]["data"] == str(tiny_set)
    assert saved["checksums"] == run["checksums"] and len(run["checksums"]) == 8
    for told in (run, test):
        assert told["command"].startswith("python ") and told["packages"]["torch"] == torch.__version__
        assert not (ROOT / ".git").exists() or re.fullmatch("[0-9a-f]{40}", told["commit"])
    assert test["data"] == str(tiny_set) and test["iteration"] == 2
    known = {"manifest.json", "options.txt", "scalars.csv", "log.txt", "last.pt", "pictures", "test"}
    assert {path.name for path in folder.iterdir() if "tfevents" not in path.name} == known
