"""Checkpoints made to do harm: nothing in them is run, and memory stays bounded."""

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoints import state
from refusals import bounded_memory

from methods import METHODS, restore
from utils import checkpoint
from utils.checkpoint import load_checkpoint
from utils.errors import UserError


def test_07_what_runs_code_is_not_loaded(tmp_path):
    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was run",)

    content = state(0, x=Attack(), format=checkpoint.FORMAT)
    torch.save(content, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(content))
    torch.save(content, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for name in ("zip.pt", "plain.pt", "legacy.pt"):
        with pytest.raises(UserError, match=name):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "was run").exists()


def archive(path, edit=None, compression=zipfile.ZIP_STORED, **content):
    """A checkpoint whose pickle's bytes were edited; torch names its entries archive/..."""
    data = io.BytesIO()
    torch.save(state(0, format=checkpoint.FORMAT, **content), data)
    with zipfile.ZipFile(data) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            held = old.read(entry)
            edited = edit(held) if edit and entry.filename.endswith("data.pkl") else held
            new.writestr(entry.filename, edited, compression)
            new.infolist()[-1].external_attr = 0  # as torch writes it
    return path


def replaced(old, new):
    def edit(data):
        assert data.count(old) == 1
        return data.replace(old, new)

    return edit


TEXT = b"X\x04\x00\x00\x00text"
ZEROS_OF_16_TIB = b"c__builtin__\nbytearray\n\x8a\x06\0\0\0\0\0\x10\x85R"
BOMBS = {  # what is wrong: what the file is made of, what is said of it
    "zeros that compress to nothing": ({"x": torch.zeros(2**26), "compression": zipfile.ZIP_DEFLATED}, "unpack to"),
    "a size the file does not hold": (
        {"x": torch.arange(77.0), "edit": replaced(b"KMtq", b"J\x00\x00\x00\x70tq")},
        "does not match expected size",
    ),
    "an array of bytes": ({"x": "text", "edit": replaced(TEXT, ZEROS_OF_16_TIB)}, "MemoryError"),
    "other code": ({"x": "text", "edit": replaced(TEXT, b"cos\nsystem\nX\x02\0\0\0ls\x85R")}, "nothing in it was run"),
    "a pickle cut short": ({"edit": lambda data: data[: len(data) // 2]}, "not loaded"),
    "nothing but a stop": ({"edit": lambda data: b"."}, "incomplete or no checkpoint"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_07_a_file_that_claims_more_than_it_holds_is_refused_within_bounded_memory(name, tmp_path):
    content, said = BOMBS[name]
    path = archive(tmp_path / "bomb.pt", **content)
    with bounded_memory(), pytest.raises(UserError, match=rf"bomb\.pt .*{said}"):
        load_checkpoint(path)


def test_07_a_checkpoint_that_asks_for_a_huge_network_is_refused_within_bounded_memory(tmp_path):
    options = {"method": "dtml", "backbone": "vnet", "filters": 4096, "iterations": 8}
    small = METHODS["dtml"](METHODS["dtml"].Options(filters=2), iterations=8).state_dict()
    path = archive(tmp_path / "huge.pt", options=options, method=small)
    with bounded_memory(), pytest.raises(UserError, match=r"huge\.pt does not fit this code .*shape"):
        restore(load_checkpoint(path))


WRONG_KINDS = [{"options": []}, {"options": {}}, {"options": {"method": []}}, {"iteration": "8"}, {"seconds": None}]
WRONG_KINDS += [{"checksums": [1]}, {"checksums": {"a": []}}, {"images": []}, {"images": {"a": 1}}]


@pytest.mark.parametrize("wrong", [*WRONG_KINDS, {"format": torch.zeros(2)}], ids=str)
def test_07_contents_of_another_kind_are_refused(wrong, tmp_path):
    torch.save({**state(0, format=checkpoint.FORMAT), **wrong}, tmp_path / "wrong.pt")
    with pytest.raises(UserError, match=r"wrong\.pt"):
        load_checkpoint(tmp_path / "wrong.pt")
