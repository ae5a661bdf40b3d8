"""Mistakes of the user: each is named in one text, before the first iteration, and leaves nothing behind."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_set
from refusals import SHAPE, edit, flags, image, refuse, train

import test_la
import train_dtml
from dataloaders.cases import find_cases, read_case
from dataloaders.lists import read_list
from utils.errors import UserError


def cut(path: Path, share: float) -> None:
    """Keeps the first part of a file, at least one byte less than all."""
    data = path.read_bytes()
    path.write_bytes(data[: min(int(len(data) * share), len(data) - 1)])


def label(value: float = 1, dtype: type = np.uint8) -> np.ndarray:
    """A label of 0 and 1 with one voxel of this value."""
    box = np.zeros(SHAPE, dtype)
    box[8:16, 8:16, 6:12] = 1
    box[8, 8, 6] = value
    return box


# -- cases that cannot be used --

BROKEN_CASES = [  # what is done to a labeled case, and what is said of it
    (lambda s, c: (s / c / "mri_norm2.h5").unlink(), "there is no"),
    (lambda s, c: cut(s / c / "mri_norm2.h5", 0.5), "damaged or incomplete"),
    (lambda s, c: cut(s / c / "mri_norm2.h5", 0), "damaged or incomplete"),
    (lambda s, c: (s / c / "mri_norm2.h5").write_text("image: none\n"), "damaged or incomplete"),
    (lambda s, c: edit(s, c, image=None), "no dataset 'image'"),
    (lambda s, c: edit(s, c, label=None), "without a dataset 'label'"),
    (lambda s, c: edit(s, c, label=label()[1:]), "(23, 22, 18)"),
    (lambda s, c: edit(s, c, image=image()[None, None]), "three-dimensional"),
    (lambda s, c: edit(s, c, image=1.5), "three-dimensional"),
    (lambda s, c: edit(s, c, image=np.full(SHAPE, b"a")), "three-dimensional numbers"),
    (lambda s, c: edit(s, c, image=image()[:0]), "empty"),
    (lambda s, c: edit(s, c, image=image(np.nan)), "not a number"),
    (lambda s, c: edit(s, c, image=image(np.inf)), "infinite"),
    (lambda s, c: edit(s, c, image=image(-np.inf)), "infinite"),
    (lambda s, c: edit(s, c, image=np.full(SHAPE, 7, np.float32)), "constant (7)"),
    (lambda s, c: edit(s, c, label=label(2)), "holds 0, 1, 2 "),
    (lambda s, c: edit(s, c, label=label() * 255), "divide by 255"),
    (lambda s, c: edit(s, c, label=label(0.5, np.float32)), "holds 0, 0.5, 1 "),
    (lambda s, c: edit(s, c, label=label(-1, np.int16)), "holds -1, 0, 1 "),
    (lambda s, c: edit(s, c, label=label(np.nan, np.float32)), "nan"),
]


@pytest.mark.parametrize("script", ["train", "test"])
def test_21_cases_that_cannot_be_used_are_named_all_at_once(script, tmp_path, checkpoint):
    n = len(BROKEN_CASES)
    folder = make_set(tmp_path / "set", train=n + 2, labeled=n + 1)
    if script == "test":
        names = (folder / "train.list").read_text().split()
        (folder / "train.list").write_text(names.pop() + "\n")
        (folder / "test.list").write_text("\n".join(names) + "\n")
    for i, (break_it, _) in enumerate(BROKEN_CASES):
        break_it(folder, f"case{i:02d}")
    argv = {
        "train": flags(folder, "--labeled", str(n + 1)),
        "test": ["--checkpoint", str(checkpoint), "--data", str(folder)],
    }
    main = {"train": train_dtml.main, "test": test_la.main}[script]
    message = refuse(argv[script], f"{n} cases are", untouched=tmp_path, main=main)
    lines = {line.strip().partition(":")[0]: line for line in message.splitlines()[1:]}
    assert sorted(lines) == [f"case{i:02d}" for i in range(n)]
    for i, (_, text) in enumerate(BROKEN_CASES):
        assert text in lines[f"case{i:02d}"] and "mri_norm2.h5" in lines[f"case{i:02d}"]


def test_21_a_case_that_is_damaged_during_the_test_is_named(tiny_set, checkpoint, monkeypatch):
    def damaged(case):
        cut(case.path, 0.5)
        return read_case(case)

    monkeypatch.setattr(test_la, "read_case", damaged)
    argv = ["--checkpoint", str(checkpoint), "--data", str(tiny_set), "--stride", "16", "16", "16"]
    with pytest.raises(UserError, match=r"case08: .*mri_norm2\.h5 .*damaged.* It was whole when the test began\."):
        test_la.main(argv)
    assert not list(tiny_set.parent.rglob("cases.csv"))


# -- folders and lists that cannot be used --


@pytest.mark.parametrize("split", ["train", "test"])
def test_32_one_list_without_the_other_is_refused(split, tiny_set):
    (tiny_set / f"{split}.list").unlink()
    refuse(flags(tiny_set), str(tiny_set), "only one of train.list and test.list", untouched=tiny_set.parent)


def test_32_a_folder_without_lists_whose_cases_are_not_la_s_is_told_so(tiny_set):
    for split in ("train", "test"):
        (tiny_set / f"{split}.list").unlink()
    text = f"{tiny_set} has no train.list and test.list, and none of LA's cases"
    refuse(flags(tiny_set), text, "one a line", untouched=tiny_set.parent)


BROKEN_LISTS = {
    "a name twice": ("train.list", "case00\ncase01\ncase02\ncase01\n", ("case01", "more than once")),
    "a name twice in the test": ("test.list", "case08\ncase08\n", ("case08", "more than once")),
    "a name with ..": ("train.list", "case00\n../set/case01\n", ("../set/case01", "outside the data set")),
    "an absolute name": ("test.list", "/case08\n", ("/case08", "outside the data set")),
    "nothing": ("train.list", "", ("names no case",)),
    "blank lines": ("test.list", "\n  \n\r\n", ("names no case",)),
    "bytes that are no text": ("train.list", b"\xff\xfe\x00c\x00a", ("text file",)),
}


@pytest.mark.parametrize("kind", BROKEN_LISTS)
def test_32_list_that_cannot_be_used_is_named(kind, tiny_set):
    name, content, texts = BROKEN_LISTS[kind]
    (tiny_set / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse(flags(tiny_set), str(tiny_set / name), *texts, untouched=tiny_set.parent)


@pytest.mark.parametrize("shared", ["case01", "./case01"])
def test_32_case_in_both_lists_is_refused(shared, tiny_set):
    (tiny_set / "test.list").write_text(f"case08\n{shared}\n")
    refuse(flags(tiny_set), "train.list", "test.list", "case01", untouched=tiny_set.parent)


# -- data that are fine --


def test_32_white_space_in_lists_is_ignored(tiny_set):
    for form in ("\ufeff{}", "\n  {}\t \r\n\n"):
        text = "\n".join(form.format(name) if i == 0 or "\ufeff" not in form else name for i, name in enumerate("abc"))
        (tiny_set.parent / "a.list").write_bytes(text.encode())
        assert read_list(tiny_set.parent / "a.list") == ["a", "b", "c"]


def test_28_labels_of_other_types_are_taken(tiny_set):
    before = [read_case(case)[1] for case in find_cases(tiny_set, ["case00", "case01"], labeled=True)[0]]
    for name, dtype in (("case00", bool), ("case01", np.float64)):
        edit(tiny_set, name, label=before[name == "case01"].astype(dtype))
    after = [read_case(case)[1] for case in find_cases(tiny_set, ["case00", "case01"], labeled=True)[0]]
    assert all(np.array_equal(a, b) and b.dtype == np.uint8 for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("method", [["--sdm-loss", "both"], ["--method", "supervised", "--head", "sdm"]], ids=" ".join)
@pytest.mark.parametrize("value", [0, 1], ids=["empty", "full"])
def test_29_empty_and_full_labels_train(value, method, tiny_set):
    for i in range(4):
        edit(tiny_set, f"case0{i}", label=np.full(SHAPE, value, np.uint8))
    state = train(tiny_set, "--iterations", "2", *method)
    assert all(torch.isfinite(t).all() for t in state["method"].values() if t.is_floating_point())


@pytest.mark.parametrize(
    ("shape", "cache"), [((12, 9, 7), "none"), ((16, 16, 16), "ram"), ((17, 17, 17), "none"), ((40, 9, 17), "ram")]
)
def test_30_volumes_of_any_size_train_and_test(shape, cache, tmp_path):
    folder = make_set(tmp_path / "set", shape=shape)
    state = train(folder, "--cache", cache, "--iterations", "2")
    assert state["iteration"] == 2 and all(torch.isfinite(t).all() for t in state["method"].values())
    test_la.main(["--checkpoint", str(tmp_path / "runs" / "run"), "--stride", "8", "8", "8", "--threads", "1"])
    rows = (tmp_path / "runs" / "run" / "test" / "cases.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 3 * 2
