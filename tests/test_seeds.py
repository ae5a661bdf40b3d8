"""The seed of a tested run is that of its training, whatever its folders are called."""

from pathlib import Path

import pytest
from test_statistics import row, write

from evaluation import statistics
from evaluation.rows import read_runs
from utils.errors import UserError
from utils.run_folder import write_json


def make_run(folder: Path, seed: int, values: dict[str, float]) -> Path:
    """A run folder and its test/, as train_dtml.py and test_la.py leave them."""
    (folder / "test").mkdir(parents=True)
    write_json(folder / "manifest.json", {"options": {"seed": seed, "labeled": 8}})
    write_json(folder / "test" / "test.json", {"checkpoint": str(folder)})
    write(folder / "test" / "cases.csv", values)
    return folder


def test_runs_with_names_of_their_own_are_paired_by_the_seeds_they_were_trained_with(tmp_path, capsys):
    """The names contradict the seeds: paired by them, one run of two would be higher, not both."""
    for name, seed, shift in (("old-a", 7, 0.0), ("old-seed9", 8, 0.2), ("new-b", 8, 0.3), ("new-seed9", 7, 0.1)):
        make_run(tmp_path / name, seed, row(0, shift=shift))
    statistics.main([f"{tmp_path}/old-*", f"{tmp_path}/new-*/test"])
    reference, line = [line for line in capsys.readouterr().out.splitlines() if str(tmp_path) in line]
    assert reference.endswith("runs: 2 (seeds 7, 8)") and "| 2 (seeds 8, 7) |" in line and "| 2 of 2 |" in line


def test_a_test_elsewhere_is_of_the_run_that_it_states(tmp_path, monkeypatch):
    run = make_run(tmp_path / "mine", 5, row(0))
    for stated, name in ((run, "a"), (run / "best.pt", "b")):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "cases.csv", row(1))
        write_json(tmp_path / name / "test.json", {"checkpoint": str(stated)})
        for where in (tmp_path / name, tmp_path / name / "cases.csv"):
            assert [*read_runs(f"{where}:seg", "dice", "all")] == [5]
    with pytest.raises(UserError, match="matches two runs of seed 5"):
        read_runs(f"{tmp_path}/[ab]", "dice", "all")
