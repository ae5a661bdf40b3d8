"""python -m tools.check: each thing that it finds is shown by a set that has it, and clean sets have none."""

import contextlib
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import GEOMETRY, TINY, make_set, make_validated_set, write_case
from scipy import ndimage

import train_dtml
from dataloaders.cases import Case, together
from dataloaders.findings import facts_of
from tools import check
from utils.errors import UserError

CHECK = ["--labeled", "4", "--patch-size", "16", "16", "16", "--workers", "1"]


def run_check(folder: Path, capsys: pytest.CaptureFixture, *args: str) -> tuple[list[str], str]:
    """The lines of the findings and the table."""
    with contextlib.suppress(UserError):
        check.main([str(folder), *CHECK, *args])
    lines, _, rest = capsys.readouterr().out.partition("| |")
    return [line for line in lines.splitlines() if line], rest


def volumes(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    with h5py.File(folder / name / "mri_norm2.h5") as f:
        return f["image"][()], f["label"][()] if "label" in f else None


def change(folder: Path, name: str, image=None, label=None, **geometry: object) -> None:
    """Writes a case anew, with other volumes (W,H,D) or geometry where given."""
    old = volumes(folder, name)
    new = (old[0] if image is None else image, old[1] if label is None else label)
    write_case(folder / name / "mri_norm2.h5", *new, **{**GEOMETRY, **geometry})


def drop_label(folder: Path, name: str) -> None:
    write_case(folder / name / "mri_norm2.h5", volumes(folder, name)[0], None, **GEOMETRY)


def log_of(data: Path, folder: Path, *args: str) -> list[str]:
    """The warnings in a run's log."""
    where = ["--runs", str(folder.parent), "--name", folder.name]
    train_dtml.main(["--data", str(data), *TINY, "--method", "dtc", "--iterations", "1", *where, *args])
    return [line for line in (folder / "log.txt").read_text().splitlines() if line.startswith("warning:")]


# -- facts --


def test_facts_are_those_of_the_whole_volume():
    rng = np.random.default_rng(0)
    image = rng.normal(3, 2, (120, 96, 88)).astype(np.float32)
    image[:, :, ::2] += 4  # planes that a sample with a step of an even number would miss
    label = rng.choice(np.array([0, 1, 3], np.uint8), image.shape, p=[0.7, 0.2, 0.1])
    x = facts_of(Case("a", Path("nowhere.h5"), True), image, label)
    assert (x.mean, x.sd) == (pytest.approx(image.mean(), rel=0.03), pytest.approx(image.std(), rel=0.03))
    assert (x.p1, x.p99) == (
        pytest.approx(np.percentile(image, 1), abs=0.3),
        pytest.approx(np.percentile(image, 99), abs=0.3),
    )
    assert x.voxels == {1: int((label == 1).sum()), 3: int((label == 3).sum())} and x.spacing is None


# -- errors --


def test_every_bad_file_is_named_at_once(tiny_set, capsys):
    (tiny_set / "case00" / "mri_norm2.h5").write_bytes(b"no h5")
    shutil.rmtree(tiny_set / "case01")
    image, label = volumes(tiny_set, "case02")
    change(tiny_set, "case02", label=label[:-1])
    change(tiny_set, "case03", label=label * 2)
    change(tiny_set, "case04", image=np.where(image > 1, np.nan, image))
    change(tiny_set, "case05", image=image[0])
    change(tiny_set, "case06", spacing=(1.0, -1.0, 1.0))
    drop_label(tiny_set, "case09")
    lines, rest = run_check(tiny_set, capsys)
    errors = [line for line in lines if line.startswith("error:")]
    args = {
        "case00": "damaged or incomplete", "case01": "there is no", "case02": "has shape",
        "case03": "0, 2 where only 0 and 1", "case04": "not a number", "case05": "three-dimensional",
        "case06": "above 0 mm", "case09": "without a dataset 'label'",
    }  # fmt: skip
    assert len(errors) == len(args) and "8 errors" in rest
    for name, text in args.items():
        (line,) = (line for line in errors if line.startswith(f"error:   {name}: "))
        assert text in line and "take the case out of the lists" in line


def test_a_test_image_that_was_changed_is_a_leak_all_the_same(tiny_set, capsys):
    change(tiny_set, "case06", image=volumes(tiny_set, "case09")[0][::-1].transpose(1, 0, 2))
    with pytest.raises(UserError):  # and so exit code 2
        check.main([str(tiny_set), *CHECK])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("error:"))
    assert "case06, case09: the same image, but for its direction, scale or rounding, under several names, to" in line


@pytest.mark.parametrize(
    ("place", "so"),
    [("case06", "to validate on and to train on: figures"), ("case09", "to validate on and to test on: figures")],
)
def test_a_validation_image_elsewhere_is_a_leak(place, so, tmp_path, capsys):
    folder = make_validated_set(tmp_path / "set")
    assert run_check(folder, capsys)[0] == []
    change(folder, place, image=volumes(folder, "case11")[0])
    lines, table = run_check(folder, capsys)
    (line,) = (line for line in lines if line.startswith("error:"))
    assert f"{place}, case11: the same image under several names, {so}" in line
    assert table.startswith(" labeled | unlabeled | test | validation | LA")


# -- warnings --


def warned(folder: Path, capsys: pytest.CaptureFixture, *args: str) -> str:
    """The one warning, and no error."""
    lines, _ = run_check(folder, capsys, *args)
    (line,) = (line for line in lines if not line.startswith("note:"))
    assert line.startswith("warning: ")
    return line.removeprefix("warning: ")


def speck() -> np.ndarray:
    """A label of four voxels."""
    label = np.zeros((24, 22, 18), np.uint8)
    label[10:12, 10:12, 9] = 1
    return label


WARNED = {  # how the warning begins: the case that is changed, and what makes its image, label or geometry of the set's
    "case05: .*not that of a normalised scan.*Subtract the mean": ("case05", lambda s: {"image": 200 * s("case05")[0]}),
    "case05: the mean of its intensities": ("case05", lambda s: {"image": s("case05")[0] + 2.5}),
    "case05: the standard deviation of its intensities": ("case05", lambda s: {"image": 5 * s("case05")[0]}),
    r"case03: voxels of another size than 1 1 2 mm.*1 x 1 x 2 to 3 mm.*python -m tools.convert --spacing 1 1 2\.$": (
        "case03", lambda s: {"spacing": (1.0, 1.0, 3.0)}
    ),
    "case01, case06: the same image under several names": ("case06", lambda s: {"image": s("case01")[0]}),
    "case01, case02: the same label with different images": ("case01", lambda s: {"label": s("case02")[1]}),
    "case02: the label is empty": ("case02", lambda s: {"label": 0 * s("case02")[1]}),
    r"case02: class 1 has 0\.008 ml, where [\d.]+ ml are usual": ("case02", lambda s: {"label": speck()}),
}  # fmt: skip


@pytest.mark.parametrize("begins", WARNED)
def test_one_thing_amiss_is_one_warning(begins, tiny_set, capsys):
    case, changes = WARNED[begins]
    change(tiny_set, case, **changes(lambda name: volumes(tiny_set, name)))
    assert re.match(begins, warned(tiny_set, capsys))


def test_a_set_of_raw_scans_is_one_warning(tiny_set, capsys):
    for i in range(10):
        change(tiny_set, f"case{i:02d}", image=700 * volumes(tiny_set, f"case{i:02d}")[0])
    assert warned(tiny_set, capsys).startswith(
        "case00, case01, case02, case03, case04 and 5 more: the intensities have mean"
    )


def test_orientations_that_differ_or_are_unknown(tiny_set, tmp_path, capsys):
    change(tiny_set, "case03", direction=(-1.0, 0, 0, 0, -1, 0, 0, 0, 1))
    line = warned(tiny_set, capsys)
    assert line.startswith("case03: the axes point to RAS, those of the other cases to LPS. ")
    assert sum("point to RAS" in line for line in log_of(tiny_set, tmp_path / "mixed")) == 1
    for i in range(10):
        name = f"case{i:02d}"
        write_case(tiny_set / name / "mri_norm2.h5", *volumes(tiny_set, name), spacing=(1.0, 1.0, 2.0))
    assert warned(tiny_set, capsys).startswith("all cases: the file does not state where its axes point. ")


def test_an_unknown_spacing_is_no_size_in_ml(tiny_set, capsys):
    for i in range(10):
        name = f"case{i:02d}"
        write_case(tiny_set / name / "mri_norm2.h5", *volumes(tiny_set, name), direction=GEOMETRY["direction"])
    (line, *_), rest = run_check(tiny_set, capsys)
    assert line.startswith("warning: all cases: neither the file nor the set states the size of a voxel")
    assert "| class 1, ml | | | |" in rest and "| spacing, mm | | | |" in rest
    (tiny_set / "spacing.txt").write_text("1 1 2\n")
    lines, rest = run_check(tiny_set, capsys)
    assert not any("size of a voxel" in line for line in lines) and "| spacing, mm | 1 x 1 x 2 |" in rest


def test_sides_of_a_patch_that_a_training_would_refuse(tiny_set, capsys):
    lines, _ = run_check(tiny_set, capsys, "--patch-size", "15", "15", "15")
    assert "error:   all cases: --patch-size 15 15 15 must be multiples of 16. Try --patch-size 16 16 16." in lines
    line = warned(tiny_set, capsys, "--patch-size", "16", "16", "12")
    assert line.endswith("must be multiples of 16. Try --patch-size 16 16 16. Or train with --halvings 4 4 2.")


def test_scans_smaller_than_the_patch(tiny_set, capsys, monkeypatch):
    check.main([str(tiny_set), "--labeled", "4", "--workers", "1"])  # a patch within the scans is suggested
    assert "smaller than" not in capsys.readouterr().out
    line = warned(tiny_set, capsys, "--patch-size", "32", "16", "32")
    assert "and 5 more: smaller than the patch 32 16 32 along x, z (the smallest is 24x22x18)" in line
    assert "filled up with zeros" in line
    monkeypatch.setattr(check, "total_memory_gib", lambda: 4e-4)  # the volumes have 3.5e-4
    assert any("--cache disk" in line for line in run_check(tiny_set, capsys)[0])
    assert not any("--cache disk" in line for line in run_check(tiny_set, capsys, "--downsample", "2")[0])
    assert "before --downsample 2" in warned(tiny_set, capsys, "--downsample", "2")
    lines, _ = run_check(tiny_set, capsys, "--patch-size", "16", "16", "16")
    assert not any("smaller than" in line for line in lines)
    change(
        tiny_set,
        "case02",
        image=volumes(tiny_set, "case02")[0][:, :, :12],
        label=volumes(tiny_set, "case02")[1][:, :, :12],
    )
    lines, _ = run_check(tiny_set, capsys, "--patch-size", "16", "16", "16")
    (line,) = (line for line in lines if "smaller than" in line)  # one of ten: what --patch-size of the suggestion does
    assert line.startswith("note:") and "case02: smaller than the patch 16 16 16 along z" in line


def test_one_mistake_in_many_cases_is_one_line(tiny_set, tmp_path, capsys):
    """Two classes where one is asked for, in six cases that are opened: tools.check and training name them together."""
    for name in (tiny_set / "train.list").read_text().split()[:4] + (tiny_set / "test.list").read_text().split():
        label = volumes(tiny_set, name)[1]
        label[0, 0, 0] = 2
        change(tiny_set, name, label=label)
    lines, _ = run_check(tiny_set, capsys, "--labeled", "4")
    (line,) = (line for line in lines if line.startswith("error:"))
    assert "and 1 more: " in line and "--classes 2 takes them all" in line
    with pytest.raises(UserError) as caught:
        train_dtml.main(["--data", str(tiny_set), "--runs", str(tmp_path), *TINY])
    (_, line) = str(caught.value).splitlines()
    assert line.startswith("  4 cases, case00, case01, case02, case03: ") and "--classes 2 takes them all" in line


def test_only_the_path_of_a_case_gives_way_to_its_problem():
    """Cases called 1 to 4: their names are not taken for the values in the text, nor for parts of longer names."""
    text = "data/set1/{}/mri_norm2.h5 'label' holds 0, 1, 2"
    lines = together([(name, text.format(name)) for name in "1234"] + [("5", "listed, but it is not there")])
    assert lines == [f"4 cases, 1, 2, 3, 4: {text.format('CASE')}", "5: listed, but it is not there"]
    assert together([(name, text.format(name)) for name in "123"]) == [f"{n}: {text.format(n)}" for n in "123"]


def test_an_inverted_label(tiny_set, capsys):
    change(tiny_set, "case02", label=1 - volumes(tiny_set, "case02")[1])
    lines, _ = run_check(tiny_set, capsys)
    assert any("case02: more object than background" in line for line in lines if line.startswith("warning:"))


# -- notes --


def noted(folder: Path, capsys: pytest.CaptureFixture, *args: str) -> list[str]:
    lines, _ = run_check(folder, capsys, *args)
    assert all(line.startswith("note:") for line in lines), lines
    return [line.removeprefix("note:").strip() for line in lines]


def test_anisotropy_a_border_and_a_file_that_no_list_names(tiny_set, capsys):
    label = volumes(tiny_set, "case02")[1].copy()
    label[:12, 11, 9] = 1
    for i in range(10):
        change(tiny_set, f"case{i:02d}", label=label if i == 2 else None, spacing=(0.5, 0.5, 3.0))
    shutil.copytree(tiny_set / "case01", tiny_set / "spare")
    lines = noted(tiny_set, capsys)
    for begins in (
        "all cases: voxels are 0.5 0.5 3 mm, 6.0 times",
        "case02: the object touches the border",
        "spare: has a file, but no list names it",
    ):
        assert len(lines) == 3 and any(line.startswith(begins) for line in lines)


def test_islands_are_those_of_scipy(tiny_set, capsys):
    label = volumes(tiny_set, "case02")[1].copy()
    label[2, 2, 2] = label[3, 3, 3] = label[2, 20, 3] = 1  # the first two touch at a corner
    change(tiny_set, "case02", label=label)
    _, count = ndimage.label(label, np.ones((3, 3, 3)))
    (line,) = noted(tiny_set, capsys)
    assert count == 3 and line.startswith(f"case02: class 1 lies in 3 parts of {int(label.sum()) - 3}, 2, 1 voxels")


def test_several_parts_are_one_note_and_specks_one_for_each_case(tiny_set, capsys):
    for i in range(3):
        label = np.zeros((24, 22, 18), np.uint8)
        label[2:10, 2:10, 2:10], label[12 + i : 16 + i, 12:16, 12:16] = 1, 1
        change(tiny_set, f"case0{i}", label=label)
    text = "class 1 lies in 2 parts of 512, 64 voxels in case00. Fine if the object has several parts."
    assert noted(tiny_set, capsys) == [f"case00, case01, case02: {text}"]
    label[20, 20, 3] = 1  # less than 1 % of it
    change(tiny_set, "case02", label=label)
    specks, several = noted(tiny_set, capsys)
    assert specks == "case02: class 1 lies in 3 parts of 512, 64, 1 voxels. See whether the specks belong to it."
    assert several == f"case00, case01: {text}"


def test_a_hidden_label_is_noted_and_opened_only_when_asked(tiny_set, capsys):
    image = volumes(tiny_set, "case05")[0]
    change(tiny_set, "case05", label=np.full(image.shape, 77, np.uint8))
    (line,) = noted(tiny_set, capsys)
    assert line.startswith("case05: without label in this check")
    lines, _ = run_check(tiny_set, capsys, "--all-labels")
    assert len(lines) == 1 and "case05" in lines[0] and "77 where only 0 and 1" in lines[0]


# -- several classes --


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A ball of class 1 with boxes of classes 2 and 3 beside it."""
    folder = make_set(tmp_path / "three", labeled=8)
    for i in range(10):
        label = volumes(folder, f"case{i:02d}")[1].copy()
        label[2:4, 2:6, 2:6], label[20:22, 2:6, 2:5] = 2, 3
        change(folder, f"case{i:02d}", label=label)
    return folder


def test_classes_are_counted_and_named_where_they_are_absent(three, capsys):
    lines, rest = run_check(three, capsys, "--classes", "3")
    assert [line for line in lines if not line.startswith("note:")] == []
    assert "| class 2, ml | 0.064 | | 0.064 | |" in rest and "| class 3, ml | 0.048 |" in rest
    assert "| sides, voxels | 24x22x18 | 24x22x18 | 24x22x18 |" in rest
    assert "e-0" not in rest.split("in memory")[0]
    (three / "dataset.json").write_text('{"labels": {"0": "background", "1": "liver"}}')
    assert "| class 1 liver, ml |" in run_check(three, capsys, "--classes", "3")[1]
    for i in range(4):
        label = volumes(three, f"case{i:02d}")[1].copy()
        label[label == 3] = 0
        change(three, f"case{i:02d}", label=label)
    label[label == 2] = 0
    change(three, "case03", label=label)
    lines, _ = run_check(three, capsys, "--classes", "3")
    assert any("no labeled training case has class 3, so that it cannot be learned" in line for line in lines)
    assert any(line.startswith("note:    case03: class 2 is absent") for line in lines)
