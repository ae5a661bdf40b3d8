"""What stays behind where a program ends in the middle: a training in its first iteration, a test in its last moves."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import TINY

import train_dtml
from evaluation.predictions import PARTIAL, replace_test
from utils.errors import UserError


class Killed(BaseException):
    """In place of a signal that no code sees."""


def test_a_wrong_option_seen_in_the_first_iteration_leaves_no_run_folder(data, tmp_path, monkeypatch):
    """One crop whose deepest map is one voxel. An older folder stays, and so does that of a later failure."""
    method = ["--method", "supervised", "--unlabeled", "0", "--iterations", "3", "--log-every", "9"]
    flags = ["--data", str(data), "--runs", str(tmp_path), *TINY, *method]
    with pytest.raises(UserError, match="batch norm needs more than one voxel"):
        train_dtml.main([*flags, "--name", "new", "--batch-size", "1"])
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with pytest.raises(UserError, match="batch norm needs more than one voxel"):
        train_dtml.main([*flags, "--name", "old", "--batch-size", "1"])
    assert (tmp_path / "old" / "log.txt").is_file()

    def fails(iteration, o, real=train_dtml.current_lr):
        if iteration == 2:
            raise UserError("later")
        return real(iteration, o)

    monkeypatch.setattr(train_dtml, "current_lr", fails)
    with pytest.raises(UserError, match="later"):
        train_dtml.main([*flags, "--name", "later"])
    assert (tmp_path / "later" / "log.txt").is_file()


def prepared(test: Path, outputs: Sequence[str], cases: Sequence[str]) -> set[str]:
    """Files of a finished test in test/.partial; returns where its predictions belong."""
    names = {f"predictions/{output}/{case}.nii.gz" for output in outputs for case in cases}
    rows = [f"{case},{output},all,0.5" for output in outputs for case in cases]
    scores = "\n".join(["case,output,component,dice", *rows])
    texts = {**dict.fromkeys(names, ""), "cases.csv": scores, "test.json": ""}
    for name, text in texts.items():
        path = test / PARTIAL / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return names


@pytest.mark.parametrize("step", range(1, 12))
def test_a_test_killed_while_it_replaces_another_leaves_nothing_for_the_next(step, tmp_path, monkeypatch):
    """Four predictions and two files are deleted, two looked for, three moved. Those of the first test that are left
    would stand next to the scores of the third."""
    prepared(tmp_path, ["seg", "sdm"], ["a", "b"])
    replace_test(tmp_path)
    prepared(tmp_path, ["seg"], ["a"])
    steps = []

    def counted(real):
        def called(*args, **more):
            steps.append(args)
            if len(steps) == step:
                raise Killed
            return real(*args, **more)

        return called

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", counted(Path.unlink))
        patched.setattr(os, "replace", counted(os.replace))
        with pytest.raises(Killed):
            replace_test(tmp_path)
    expected = prepared(tmp_path, ["seg"], ["a"])
    replace_test(tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.nii.gz")} == expected
