"""Own scans to a data set: every layout, what is done to intensities, labels and grids, and what is refused."""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children
from pathlib import Path

import h5py
import numpy as np
import pytest
from scans import OBLIQUE, ball, converted, make_scans, turned, write

from dataloaders.cases import Case, find_cases, read_case
from dataloaders.class_names import class_names
from dataloaders.geometry import read_geometry
from dataloaders.images import read_image, to_physical
from dataloaders.lists import lists_of
from tools import convert
from tools.case_of_scan import MARGINS, SMALLEST, Job, crop_box, map_labels
from tools.sources import Source, read_manifest
from utils.errors import UserError

SHAPE = (30, 28, 18)
RAS_GRID = {"spacing": (2.0, 2.0, 1.0), "origin": (0.0, 0.0, 0.0), "direction": (-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0)}


def read(out: Path, name: str, labeled: bool = True):
    """image, label or None, geometry and attributes of a case."""
    case = Case(name, out / name / "mri_norm2.h5", labeled)
    with h5py.File(case.path) as f:
        return *read_case(case), read_geometry(case), dict(f.attrs)


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    make_scans(folder)
    return folder


@pytest.fixture(scope="module")
def plain(scans, tmp_path_factory) -> Path:
    return converted(scans, tmp_path_factory.mktemp("plain") / "set")


def test_a_case_is_the_normalised_scan_with_its_geometry_and_where_it_came_from(scans, plain):
    image, label, geometry, about = read(plain, "patient1")
    stored, stored_geometry = read_image(scans / "images" / "patient1.nii.gz")
    source, result = turned(stored, stored_geometry)
    expected = (source.astype(float) - source.mean(dtype=float)) / source.std(dtype=float)
    np.testing.assert_allclose(image, expected, atol=1e-4)
    for name in result:
        np.testing.assert_allclose(geometry[name], result[name], atol=1e-9)
        np.testing.assert_allclose(about[f"source_{name}"], stored_geometry[name], rtol=0)
    assert label.sum() > 500
    assert about["source_image"] == "patient1.nii.gz" and len(about["source_label_sha256"]) == 64
    assert tuple(about["source_size"]) == SHAPE and tuple(about["crop_corner"]) == (0, 0, 0)
    assert about["mean"] == pytest.approx(source.mean(dtype=float)) and about["sd"] == pytest.approx(
        source.std(dtype=float)
    )
    assert json.loads(about["settings"])["crop"] == "none"
    with h5py.File(plain / "patient1" / "mri_norm2.h5") as f:
        assert (f["image"].dtype, f["label"].dtype, f["image"].compression) == ("float32", "uint8", "gzip")


def test_labeled_cases_come_first_and_unlabeled_ones_have_no_label(plain, capsys):
    train, test = lists_of(plain)
    assert sorted(train + test) == [f"patient{i}" for i in range(6)] and len(test) == 1
    assert train[3:] == ["patient4", "patient5"] and test[0] not in ("patient4", "patient5")
    with h5py.File(plain / "patient4" / "mri_norm2.h5") as f:
        assert set(f) == {"image"} and "source_label" not in f.attrs


def test_resampling_keeps_the_object_in_its_place(scans, tmp_path):
    out = converted(scans, tmp_path / "set", "--spacing", "1", "1.5", "1.2")
    for i, centre in enumerate(make_scans(tmp_path / "again")[:4]):
        image, label, geometry, _ = read(out, f"patient{i}")
        assert geometry["spacing"] == (1.0, 1.5, 1.2)
        result = to_physical(geometry, np.argwhere(label)).mean(0)
        assert np.linalg.norm(result - centre) < 0.3
        truth = ball(image.shape, geometry, centre, 7) > 0
        assert 2 * (truth & (label > 0)).sum() / (truth.sum() + label.sum()) > 0.88  # nearest voxels: a rough edge
        assert image[truth].mean() > image[~truth].mean() + 1


def job(name: str = "a", crop: str = "label", seed: int = 1337) -> Job:
    return Job(Source(name, Path(), None), Path(), crop, None, "linear", None, seed)


def test_margins_around_the_label_are_drawn_from_seed_and_name_within_the_published_bounds():
    image, label = np.zeros((300, 300, 200), np.float32), np.zeros((300, 300, 200), np.uint8)
    label[90:210, 80:230, 60:150] = 1
    drawn = set()
    for i in range(40):
        box, margins = crop_box(image, label, job(f"case{i}"))
        assert (box, margins) == crop_box(image, label, job(f"case{i}"))
        drawn.add(tuple(margins))
        for axis, (low, high) in enumerate(((90, 210), (80, 230), (60, 150))):
            before, after = margins[2 * axis : 2 * axis + 2]
            assert MARGINS[axis][0] <= min(before, after) and max(before, after) <= MARGINS[axis][1]
            assert box[axis] == slice(low - before, high + after)
    assert len(drawn) == 40 and crop_box(image, label, job(seed=1)) != crop_box(image, label, job(seed=2))
    for axis in range(6):  # every value within the bounds comes up
        assert {m[axis] for m in drawn} <= set(range(MARGINS[axis // 2][0], MARGINS[axis // 2][1] + 1))
        assert len({m[axis] for m in drawn}) >= 4


@pytest.mark.parametrize("low", [(0, 0, 0), (150, 150, 100), (280, 285, 190)])
def test_a_crop_has_at_least_the_published_size_where_the_scan_has(low):
    image, label = np.zeros((300, 300, 200), np.float32), np.zeros((300, 300, 200), np.uint8)
    inside = tuple(slice(start, start + 10) for start in low)
    label[inside] = 1
    box, _ = crop_box(image, label, job())
    assert all(s.stop - s.start >= side for s, side in zip(box, SMALLEST, strict=True)) and label[box].sum() == 1000
    small, _ = crop_box(image[:90, :300, :88], np.ones((90, 300, 88), np.uint8), job())
    assert small == (slice(0, 90), slice(0, 300), slice(0, 88))
    assert crop_box(image, label, job(crop="label-xy"))[0] == (*box[:2], slice(0, 200))


@pytest.mark.parametrize("crop", ["label", "foreground"])
def test_a_crop_keeps_every_voxel_in_its_place(crop, tmp_path):
    shape = (150, 140, 100)
    label = np.zeros(shape, np.uint8)
    label[60:80, 50:90, 40:60] = 1
    image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    image[20:130, 30:120, 10:90] += 20
    for i in range(3):
        write(tmp_path / "scans" / f"p{i}" / "image.nii.gz", image)
        write(tmp_path / "scans" / f"p{i}" / "label.nii.gz", label)
    out = converted(tmp_path / "scans", tmp_path / "set", "--crop", crop)
    corners = set()
    for name in ("p0", "p1", "p2"):
        cut, cut_label, geometry, about = read(out, name)
        corner = np.array(about["crop_corner"])
        assert about["crop"] == crop and cut.shape < shape and cut_label.sum() == label.sum()
        corners.add(tuple(corner))
        whole, there = turned(image, OBLIQUE)
        np.testing.assert_allclose(to_physical(geometry, (0, 0, 0)), to_physical(there, corner), atol=1e-4)
        box = tuple(slice(a, a + n) for a, n in zip(corner, cut.shape, strict=True))
        np.testing.assert_allclose(cut, ((whole - image.mean(dtype=float)) / image.std(dtype=float))[box], atol=1e-4)
    if crop == "foreground":
        bright = np.argwhere(whole > 10)
        assert corners == {tuple(bright.min(0))} and cut.shape == (110, 90, 80)
    else:
        assert len(corners) == 3


def test_a_crop_to_the_foreground_keeps_the_label_where_it_is_dark(tmp_path):
    image, label = 0.1 * np.random.default_rng(0).random(SHAPE), np.zeros(SHAPE, np.uint8)
    image[10:20, 8:20, 5:12] += 300
    label[2:14, 10:16, 6:10] = 1  # most of it is outside
    for i in range(2):
        write(tmp_path / "scans" / f"p{i}" / "image.nii.gz", image)
        write(tmp_path / "scans" / f"p{i}" / "label.nii.gz", label)
    out = converted(tmp_path / "scans", tmp_path / "set", "--crop", "foreground")
    cut, cut_label, _, about = read(out, "p0")
    assert cut.shape == (18, 12, 7) and cut_label.sum() == label.sum()
    box = tuple(slice(a, a + n) for a, n in zip(about["crop_corner"], cut.shape, strict=True))
    np.testing.assert_array_equal(cut_label, turned(label, OBLIQUE)[0][box])


def test_processes_change_nothing_and_what_is_there_is_left_alone(scans, plain, tmp_path, capsys):
    out = converted(scans, tmp_path / "set", "--workers", "2")
    files = sorted(str(path.relative_to(plain)) for path in plain.rglob("*") if path.is_file())
    assert files == sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) and len(files) == 9
    assert all((plain / name).read_bytes() == (out / name).read_bytes() for name in files)
    before = {name: (out / name).stat().st_mtime_ns for name in files if name.endswith(".h5")}
    capsys.readouterr()
    converted(scans, out)
    assert "0 converted, 6 already there, 0 refused" in capsys.readouterr().out
    assert before == {name: (out / name).stat().st_mtime_ns for name in before}


def test_a_killed_process_is_told_and_the_same_command_goes_on(scans, plain, tmp_path, monkeypatch):
    class Struck(ProcessPoolExecutor):
        def map(self, *args):
            outcomes = super().map(*args)
            active_children()[0].kill()
            return outcomes

    monkeypatch.setattr(convert, "ProcessPoolExecutor", Struck)
    with pytest.raises(UserError, match=r"was killed, as if memory ran out\. Give fewer --workers"):
        converted(scans, tmp_path / "set", "--workers", "2")
    monkeypatch.undo()
    out = converted(scans, tmp_path / "set")
    files = [path.relative_to(plain) for path in plain.rglob("*.h5")]
    assert files and all((plain / name).read_bytes() == (out / name).read_bytes() for name in files)
    assert not active_children()


def test_what_was_made_from_something_else_or_in_another_way_is_refused(tmp_path):
    make_scans(tmp_path / "scans")
    out = converted(tmp_path / "scans", tmp_path / "set")
    with pytest.raises(
        UserError, match=r"6 of 6 scans .*\n.*spacing: None before, \[1.0, 1.0, 1.0\] now.* another --out"
    ):
        converted(tmp_path / "scans", out, "--spacing", "1", "1", "1")
    write(tmp_path / "scans" / "images" / "patient2.nii.gz", np.random.random(SHAPE))
    write(tmp_path / "scans" / "labels" / "patient2.nii.gz", np.zeros(SHAPE, np.uint8))
    with pytest.raises(UserError, match=r"1 of 6 scans refused.*\n  patient2: .*source_image_sha256: .* before"):
        converted(tmp_path / "scans", out)
    (out / "patient2" / "mri_norm2.h5").write_text("half")
    with pytest.raises(UserError, match=r"is damaged or incomplete. Move it away"):
        converted(tmp_path / "scans", out)


def test_other_voxels_under_the_same_header_are_noticed(tmp_path):
    make_scans(tmp_path / "scans", ending=".mhd")
    out = converted(tmp_path / "scans", tmp_path / "set")
    for path in (tmp_path / "scans").glob("*/patient2.raw"):
        voxels = path.read_bytes()
        path.write_bytes(voxels[len(voxels) // 2 :] + voxels[: len(voxels) // 2])
    with pytest.raises(UserError, match=r"1 of 6 scans .*\n  patient2: .*image_sha256: .*; source_label_sha256: .*"):
        converted(tmp_path / "scans", out)


def test_good_scans_are_there_when_others_are_refused_and_lists_only_grow(tmp_path, capsys):
    make_scans(tmp_path / "scans", labeled=5)
    bad = tmp_path / "scans" / "images" / "patient5.nii.gz"
    kept = bad.read_bytes()
    bad.write_bytes(kept[:900])
    with pytest.raises(
        UserError, match=r"1 of 7 scans refused, the others are in .*set:\n  patient5: .*is damaged or incomplete"
    ):
        converted(tmp_path / "scans", tmp_path / "set")
    assert "6 converted, 0 already there, 1 refused" in capsys.readouterr().out
    train, test = lists_of(tmp_path / "set")
    assert len(train) + len(test) == 6 and not find_cases(tmp_path / "set", train + test, labeled=True)[1]
    bad.write_bytes(kept)
    about = json.loads((tmp_path / "set" / "dataset.json").read_text())
    (tmp_path / "set" / "dataset.json").write_text(json.dumps({**about, "licence": "CC BY 4.0"}))
    converted(tmp_path / "scans", tmp_path / "set")
    assert json.loads((tmp_path / "set" / "dataset.json").read_text())["licence"] == "CC BY 4.0"
    assert lists_of(tmp_path / "set") == ([*train, "patient5"], test)
    (tmp_path / "set" / "train.list").write_text("other\n")
    with pytest.raises(UserError, match=r"train.list names other, which this command would not put there"):
        converted(tmp_path / "scans", tmp_path / "set")
    assert not list((tmp_path / "set").rglob("*.partial*"))


def test_a_csv_names_files_labels_splits_and_cases(tmp_path):
    make_scans(tmp_path / "made", ending=".nrrd")
    rows = ["image,label,split,name"]
    for i in range(6):
        label = f"made/labels/patient{i}.nrrd" if i < 4 else ""
        rows.append(f"made/images/patient{i}.nrrd,{label},{'test' if i == 1 else 'train'},P{i}")
    (tmp_path / "scans.csv").write_text("\n".join(rows))
    out = converted(tmp_path / "scans.csv", tmp_path / "set")
    assert lists_of(out) == (["P0", "P2", "P3", "P4", "P5"], ["P1"])
    assert read(out, "P1")[3]["source_image"] == "patient1.nrrd"


def test_empty_rows_and_cells_of_a_spreadsheet_s_csv_are_left_out_and_lines_are_counted(tmp_path):
    path = tmp_path / "scans.csv"
    path.write_text("image,label\r\n\r\na.nii,b.nii,,\r\n,\r\n  \r\n", encoding="utf-8-sig", newline="")
    scan = Source("a", tmp_path / "a.nii", tmp_path / "b.nii")
    assert read_manifest(path) == ([scan], [])
    path.write_text("image ,label, ,\na.nii,b.nii,,\n")
    assert read_manifest(path) == ([scan], [])
    for row, message in (
        (",b.nii", "line 4: an image is needed"),
        ("a, b.nii,c.nii,d", "no column for c.nii, d. Quote"),
    ):
        path.write_text(f"image,label\n\na.nii,\n{row}\n")
        with pytest.raises(UserError, match=message):
            read_manifest(path)


def test_label_values_are_kept_mapped_or_refused():
    label = np.array([0, 1, 3, 7, 3]).reshape(5, 1, 1)
    assert map_labels(label, None).ravel().tolist() == [0, 1, 3, 7, 3]
    assert map_labels(label, (7, 3)).ravel().tolist() == [0, 0, 2, 1, 2]
    assert map_labels(255 * (label == 3), None).ravel().tolist() == [0, 0, 1, 0, 1]
    assert map_labels(1000 * label, (3000,)).ravel().tolist() == [0, 0, 1, 0, 1]
    assert map_labels(label, ((7, 1), 3)).ravel().tolist() == [0, 1, 2, 1, 2]
    with pytest.raises(
        convert.CaseError, match=r"has the label values 0 1000 3000 7000. Name those you mean by --labels"
    ):
        map_labels(1000 * label, None)


def test_values_joined_by_commas_become_one_class(tmp_path):
    """With the names of all of them; the same words go on, others are refused."""
    for i in range(3):
        label = np.zeros(SHAPE, np.uint8)
        label[5:9, 5:9, 5:9], label[9:12, 5:9, 5:9], label[20:, 20:] = 1, 4, 2
        write(tmp_path / f"scans/imagesTr/p{i}.nii.gz", np.random.default_rng(i).standard_normal(SHAPE))
        write(tmp_path / f"scans/labelsTr/p{i}.nii.gz", label)
    names = {"0": "background", "1": "core", "2": "edema", "4": "rim"}
    (tmp_path / "scans" / "dataset.json").write_text(json.dumps({"labels": names}))
    args = (tmp_path / "scans", tmp_path / "set", "--labels", "1,4", "2")
    for _ in range(2):
        out = converted(*args)
    label = read_case(Case("p0", out / "p0" / "mri_norm2.h5", True, classes=2))[1]
    assert (label == 1).sum() == 7 * 4 * 4 and (label == 2).sum() == 10 * 8 * SHAPE[2]
    assert class_names(out) == {1: "core + rim", 2: "edema"}
    for other, message in (
        (("1", "4", "2"), "1 is core . rim there, core now"),
        (("1,4", "2,4"), "names a value twice"),
        (("1,4,3", "2"), "--labels 3: no label holds that"),
        (("1,0", "2"), "1,0 is no value above 0, and no such values joined by commas"),
    ):
        with pytest.raises(UserError, match=message):
            converted(*args[:3], *other)


def test_a_margin_is_of_every_side_of_the_label_and_a_part_of_how_a_set_was_made(tmp_path):
    label = np.zeros((40, 36, 30), np.uint8)
    label[10:20, 12:15, 3:28] = 1
    for i in range(2):
        image = np.random.default_rng(i).standard_normal(label.shape)
        write(tmp_path / f"scans/images/p{i}.nii.gz", image.astype(np.float32), RAS_GRID)
        write(tmp_path / f"scans/labels/p{i}.nii.gz", label, RAS_GRID)
    args = (tmp_path / "scans", tmp_path / "set", "--crop", "label", "--spacing", "1", "1", "1", "--crop-margin", "5")
    out = converted(*args)
    _, cut, _, about = read(out, "p0")
    assert cut.shape == (20 + 10, 6 + 10, 30)  # 5 voxels of the new grid, and the scan's end along z
    assert np.argwhere(cut).min(axis=0).tolist() == [5, 5, 3] and about["crop_margins"].tolist() == [5] * 6
    assert converted(*args) == out
    for again, message in (
        ((*args[:-1], "6"), "margin: 5 before, 6 now"),
        (args[:-2], "margin: 5 before, None now"),
        ((*args[:2], "--crop-margin", "5"), "--crop-margin does nothing with --crop none"),
    ):
        with pytest.raises(UserError, match=message):
            converted(*again)
    (tmp_path / "Task.tar").touch()
    with pytest.raises(UserError, match=r"Task.tar is an archive. Unpack it and give its folder"):
        converted(tmp_path / "Task.tar", tmp_path / "other")
