"""The report of python -m tools.doctor: true, harmless to show, and without a traceback whatever the set is like."""

import socket
from pathlib import Path

import pytest
import torch
from conftest import make_set

from tools import doctor


def report(capsys, *args):
    doctor.main(list(args))
    return capsys.readouterr().out


def test_it_tells_versions_hardware_and_the_set(tiny_set, capsys):
    out = report(capsys, "--data", str(tiny_set))
    assert f"- torch: {torch.__version__}" in out and ", torch uses 1" in out
    assert "- lists: 8 to train on, 2 to test on" in out
    assert "- volumes: 10 read, sides from (24, 22, 18) to (24, 22, 18)" in out and "PROBLEM" not in out


def test_it_names_every_case_that_cannot_be_used(tiny_set, capsys):
    (tiny_set / "case01" / "mri_norm2.h5").write_bytes(b"no h5")
    (tiny_set / "case09" / "mri_norm2.h5").unlink()
    out = report(capsys, "--data", str(tiny_set))
    assert "- PROBLEM: 2 cases are not usable" in out and "case01" in out and "case09" in out and "8 read" in out


@pytest.mark.parametrize("args", [["--data", "nowhere"], []])
def test_it_reports_where_there_is_no_set(args, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = report(capsys, *args)
    assert ("PROBLEM: the data folder nowhere does not exist" if args else "folder: none here") in out


def test_it_tells_no_names_of_users_and_folders(capsys, tmp_path, monkeypatch):
    home = tmp_path / "home" / "jane-doe-7"
    data = make_set(home / "study" / "set")
    (data / "case01" / "mri_norm2.h5").unlink()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "jane-doe-7")
    for here in (tmp_path, home, home / "study", Path("/")):
        monkeypatch.chdir(here)
        out = report(capsys, "--data", str(data))
        assert "there is no ~/study/set/case01/mri_norm2.h5" in out
        assert "jane-doe-7" not in out and str(tmp_path) not in out and socket.gethostname() not in out
    monkeypatch.setenv("HOME", "/nowhere")
    assert "- folder: .../set" in report(capsys, "--data", str(data))


def test_it_tells_what_would_be_slow(monkeypatch):
    monkeypatch.setattr(doctor, "total_memory_gib", lambda: 4.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = "\n".join(doctor.slow(3.0))
    monkeypatch.setattr(doctor, "cores", lambda: 3)  # of 64 in the computer
    assert "torch uses 1 of 3 cores. Give --threads 3." in "\n".join(doctor.slow(3.0))
    assert doctor.hardware()["processor"].endswith("3 cores, torch uses 1")
    assert "no GPU" in text and "a full-size iteration needs" in text and "--cache disk" in text
