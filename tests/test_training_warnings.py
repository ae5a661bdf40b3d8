"""What train_dtml.py says of the scans that it reads, as `tools.check` does."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load
from test_check import change, log_of, volumes

import train_dtml
from utils.errors import UserError


def test_training_tells_of_a_class_that_no_labeled_scan_has(tiny_set, tmp_path):
    for i in range(4):
        label = volumes(tiny_set, f"case{i:02d}")[1]
        change(tiny_set, f"case{i:02d}", label=np.where(label > 0, 3 if i else 1, 0).astype(np.uint8))
    text = (
        "no labeled training case has class 2, so that it cannot be learned. See --classes and the order of the list."
    )
    said = [f"warning: all cases: {text}"]
    assert log_of(tiny_set, tmp_path / "once", "--classes", "3", "--cache", "disk") == said
    change(tiny_set, "case03")  # alone read anew; the cache knows the others
    assert log_of(tiny_set, tmp_path / "again", "--classes", "3", "--cache", "disk") == said


def test_training_tells_what_it_sees_and_a_clean_set_is_silent(tiny_set, tmp_path, capsys):
    assert log_of(tiny_set, tmp_path / "clean") == []
    image, _ = volumes(tiny_set, "case01")
    change(tiny_set, "case06", image=image)
    change(tiny_set, "case02", label=np.zeros(image.shape, np.uint8))
    change(tiny_set, "case03", spacing=(1.0, 1.0, 3.0))
    change(tiny_set, "case05", image=900 * volumes(tiny_set, "case05")[0])
    (tiny_set / "case09" / "mri_norm2.h5").write_bytes(b"a test case is no business of training")
    capsys.readouterr()
    lines = log_of(tiny_set, tmp_path / "run", "--patch-size", "32", "16", "16")
    assert [next(word for word in ("normalised", "another size", "smaller", "empty", "same image") if word in line)
            for line in lines] == ["normalised", "another size", "smaller", "empty", "same image"]  # fmt: skip
    err = capsys.readouterr().err
    assert all(err.count(line) == 1 for line in lines)
    for name in ("made", "used"):  # the second does not read the files again, and says the same
        flags = ["--patch-size", "32", "16", "16", "--cache", "disk"]
        assert log_of(tiny_set, tmp_path / name, *flags) == lines


def test_a_resumed_run_refuses_cases_that_state_something_else(tiny_set, tmp_path):
    """The voxels are the same; spacing and direction go into the checkpoint, mean and sd into a window."""
    run, windowed = tmp_path / "run", tmp_path / "windowed"
    log_of(tiny_set, run)
    log_of(tiny_set, windowed, "--normalize", "window", "--window", "1", "4")

    def resume(folder: Path, iterations: int) -> None:
        train_dtml.main(["--resume", str(folder), "--iterations", str(iterations)])

    for stated in ({"spacing": (1.0, 1.0, 2.5)}, {"direction": (-1.0, 0, 0, 0, -1, 0, 0, 0, 1)}):
        change(tiny_set, "case01", **stated)
        with pytest.raises(UserError, match=r"^spacing, direction, mean or sd that the files of case01 in .*set state"):
            resume(run, 2)
    change(tiny_set, "case01", mean=0.5, sd=2.0)
    resume(run, 2)
    with pytest.raises(UserError, match="the files of case01 in"):
        resume(windowed, 2)
    state = load(windowed)
    del state["attributes"]  # an early checkpoint, which does not know them
    torch.save(state, windowed / "last.pt")
    resume(windowed, 2)
