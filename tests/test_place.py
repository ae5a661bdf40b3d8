"""The place a program runs in: a notebook's backend, a terminal in ASCII, closed or full streams, no /dev/shm."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, make_set

import train_dtml
from tools.given_scans import given_scans
from utils.errors import UserError

DRIVER = """
import importlib, json, sys
from utils.errors import run
for name, argv in json.loads(sys.argv[1]):
    module = importlib.import_module(name)
    sys.argv = [name, *argv]
    code = 0
    try:
        run(module.main)
    except SystemExit as e:
        code = e.code or 0
    except OSError as e:
        code = e.errno
    print("CODE", name, code, file=sys.stderr)
assert "matplotlib.pyplot" not in sys.modules
"""


def programs(
    commands: list[tuple[str, list[str]]], environment: dict[str, str], **streams
) -> subprocess.CompletedProcess:
    """Runs the mains of modules one after the other in one process, as `python FILE` would run each."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    args = [sys.executable, "-c", DRIVER, json.dumps(commands, ensure_ascii=False)]
    return subprocess.run(args, cwd=ROOT, env=env, timeout=300, **streams)


def whole_way(place: Path) -> list[tuple[str, list[str]]]:
    """Training, test with its report, prediction, tables, pictures."""
    data, run = place / "set", place / "runs" / "run"
    make_set(data)
    small = ["--stride", "16", "16", "16", "--threads", "1", "--device", "cpu"]
    where = ["--data", str(data), "--device", "cpu", "--iterations", "2", "--runs", str(run.parent), "--name", run.name]
    return [
        ("train_dtml", [*TINY, *where, "--picture-every", "2"]),
        ("test_la", ["--checkpoint", str(run), "--report", *small]),
        ("predict", ["--checkpoint", str(run), str(data / "case08" / "mri_norm2.h5"), "-o", str(place / "out"),
                     "--report", str(place / "out" / "volumes.csv"), *small]),
        ("evaluation.statistics", [f"{run}/test:seg", f"{run}/test:sdm", "--picture", str(place / "scatter.png")]),
        ("tools.pictures", ["figure3", str(run), "--out", str(place / "figure3.png")]),
        ("tools.pictures", ["curves", str(run), "--out", str(place / "curves.png")]),
        ("tools.report_page", [str(run / "test")]),
        ("tools.share", [str(run), str(place / "shared")]),
        ("tools.doctor", ["--data", str(data)]),
        ("tools.check", [str(data), "--workers", "1", "--labeled", "4"]),
        ("tools.reproduce", ["--profile", "half", "--table", "1"]),
        ("tools.reproduce", ["--list", "--rows", "dtml-16"]),
        ("train_dtml", ["--help"]),
    ]  # fmt: skip


def test_everything_runs_in_a_notebook_s_environment_with_a_terminal_and_a_locale_in_ascii(tmp_path):
    commands = whole_way(tmp_path)
    ascii_locale = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    notebook = {"MPLBACKEND": "module://matplotlib_inline.nowhere"}
    done = programs(commands, {**ascii_locale, **notebook}, capture_output=True)
    told = done.stderr.decode("ascii")
    assert [line.split()[1:] for line in told.splitlines() if line.startswith("CODE ")] == [
        [name, "0"] for name, _ in commands
    ], told[-3000:]
    assert done.returncode == 0 and " +- " in done.stdout.decode("ascii")
    run = tmp_path / "runs" / "run"
    assert "\u00b1" in (run / "test" / "table.md").read_text(encoding="utf-8")
    assert "\u00b1" in (run / "test" / "report.html").read_text(encoding="utf-8")
    for made in ("out/volumes.csv", "out/case08.nii.gz", "scatter.png", "figure3.png", "curves.png", "shared"):
        assert (tmp_path / made).exists(), made


def test_a_name_that_is_no_text_here_is_refused_in_words(tmp_path):
    """Python hands on its bytes as surrogates, on which TensorBoard, ITK and an options.txt in UTF-8 fail later."""
    folder = os.fsencode(tmp_path) + b"/s\xe4t"
    os.mkdir(folder)
    with pytest.raises(UserError, match=r"s\\udce4t' is not valid in this locale's encoding. Set LC_ALL=C.UTF-8"):
        train_dtml.main(["--data", os.fsdecode(folder)])


@pytest.mark.parametrize("ending", [".nii.gz", ".dcm"])
def test_a_scan_of_a_folder_whose_name_is_no_text_here_is_refused_before_any_is_predicted(ending, tmp_path):
    """GDCM ends the whole process at such a slice, and a NIfTI failed at the table of volumes."""
    for name in (b"a", b"M\xfcller"):
        (tmp_path / os.fsdecode(name + ending.encode())).touch()
    for word in (tmp_path, f"{tmp_path}/M*"):
        with pytest.raises(UserError, match=r"M\\udcfcller.* is not valid in this locale's encoding. Set LC_ALL"):
            given_scans([str(word)], [], 1)


def test_closed_streams_neither_end_a_training_nor_get_into_its_files(tmp_path):
    """Of `>&- 2>&-` the next files that are opened would take the numbers, and what libraries print there."""
    (name, args), *_ = whole_way(tmp_path)
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, f"{name}.py", *args]
    assert subprocess.run(closed, cwd=ROOT).returncode == 0
    assert (tmp_path / "runs" / "run" / "log.txt").read_text().count("2/2  ") == 1
