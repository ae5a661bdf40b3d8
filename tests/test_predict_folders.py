"""Folders, patterns and DICOM series to predict, the table of volumes, and what is refused before any result."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import csv_rows
from scans import OBLIQUE, make_scans, write
from series import SHAPE, write_series
from test_predict import predicted, scan, trained

import predict
from dataloaders.cases import CaseError
from dataloaders.dicom import read_series, series_in
from dataloaders.images import read_label
from methods import METHODS
from tools import convert
from tools.given_scans import given_scans, scans_in
from utils.errors import UserError
from utils.run_folder import write_json

WORLD: list[Path] = []


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """scans/ on oblique grids, set/ of two named classes made of them, and runs/dtml and runs/other trained on it; made
    once for all files that ask for it."""
    if WORLD:
        return WORLD[0]
    WORLD.append(folder := tmp_path_factory.mktemp("world"))
    make_scans(folder / "scans", labeled=3, unlabeled=1)
    convert.main(["--source", str(folder / "scans"), "--out", str(folder / "set"), "--spacing", "1", "1", "1.5"])
    write_json(folder / "set" / "dataset.json", {"labels": {"background": 0, "left atrium": 1}})
    trained(folder / "runs" / "dtml", folder / "set", "--method", "supervised", "--unlabeled", "0")
    trained(folder / "runs" / "other", folder / "set", "--method", "supervised", "--unlabeled", "0", "--seed", "2")
    return folder


@pytest.fixture
def bright(monkeypatch) -> None:
    """The network predicts what is bright: the ball."""
    monkeypatch.setattr(METHODS["supervised"], "predict", lambda self, image, outputs: (image - 2).sigmoid())


def values_of(folder: Path, i: int = 0) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(scan(folder, i)))).transpose(2, 1, 0).astype(np.int16)


def rows_of(out: Path) -> list[dict[str, str]]:
    return csv_rows(out / "volumes.csv")


# -- DICOM --


def test_a_dicom_series_is_predicted_to_the_voxel_as_its_nifti_twin(world, tmp_path, bright):
    """Oblique, mirrored, anisotropic; the network sees the scan resampled, and files are named against their order."""
    values = values_of(world) - np.int16(900)
    series = write_series(tmp_path / "patient7", values)
    twin = write(tmp_path / "twin.nii.gz", values)
    out = predicted(world / "runs" / "dtml", [series, twin], tmp_path / "out", "--probabilities", "float32")
    one, other = (sitk.ReadImage(str(out / name)) for name in ("patient7.nii.gz", "twin.nii.gz"))
    there = sitk.Resample(one, other, sitk.Transform(), sitk.sitkNearestNeighbor, 9)  # by places in mm
    a, b = sitk.GetArrayFromImage(there), sitk.GetArrayFromImage(other)
    assert (a == b).all() and 100 < a.sum() < a.size / 4 and a.max() == 1
    p, q = (sitk.ReadImage(str(out / f"{name}_probability.nii.gz")) for name in ("patient7", "twin"))
    there = sitk.GetArrayFromImage(sitk.Resample(p, q, sitk.Transform(), sitk.sitkLinear, 9.0))
    np.testing.assert_allclose(there, sitk.GetArrayFromImage(q), atol=1e-5)
    volumes = [row["ml"] for row in rows_of(out)]
    assert volumes[0] == volumes[1] and float(volumes[0]) == pytest.approx(a.sum() * 0.8 * 1.0 * 1.7 / 1000, rel=1e-5)


def test_intensities_are_those_after_each_slice_s_own_rescaling(tmp_path):
    values = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)
    folder = write_series(tmp_path / "ct", values)
    result, geometry = read_series(series_in(folder)[0].files)
    order = slice(None) if np.allclose(geometry["origin"], OBLIQUE["origin"]) else slice(None, None, -1)
    assert result.dtype == np.float32 and (result[:, :, order] == values).all()
    assert geometry["spacing"] == pytest.approx(OBLIQUE["spacing"], abs=1e-6)  # not the slices' thickness of 9 mm


def turned(z: int) -> np.ndarray:
    """Positions along a step that leans against the slices, as with a tilted gantry."""
    axes = np.reshape(OBLIQUE["direction"], (3, 3))
    return np.array(OBLIQUE["origin"]) + z * (1.7 * axes[:, 2] + 0.3 * axes[:, 1])


def gap(z: int) -> np.ndarray:
    return np.array(OBLIQUE["origin"]) + (z + (z > 7)) * 1.7 * np.reshape(OBLIQUE["direction"], (3, 3))[:, 2]


def twice(z: int) -> np.ndarray:
    return np.array(OBLIQUE["origin"]) + z // 2 * 1.7 * np.reshape(OBLIQUE["direction"], (3, 3))[:, 2]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"place": turned}, r"axes that are not at right angles: y and z .* tilted gantry"),
        (
            {"place": gap},
            r"not evenly spaced: 3.4 mm after slice (8|10) of 18, 1.7 mm elsewhere. A slice may be missing",
        ),
        ({"place": twice}, "several slices at one place"),
        ({"place": None}, r"does not state its position \(0020,0032\), .*IM010.dcm"),
    ],
    ids=["tilted", "a gap", "over time", "no position"],
)
def test_a_series_that_is_no_whole_grid_is_refused(more, message, world, tmp_path):
    folder = write_series(tmp_path / "bad", values_of(world), **more)
    if more["place"] is None:  # SimpleITK writes no file without a position
        tag, other = b"\x20\x00\x32\x00", b"\x20\x00\x31\x00"
        content = (folder / "IM010.dcm").read_bytes()
        assert content.count(tag) == 1
        (folder / "IM010.dcm").write_bytes(content.replace(tag, other))
    with pytest.raises(UserError, match=message):
        predicted(world / "runs" / "dtml", [folder], tmp_path / "out")
    assert not (tmp_path / "out" / "bad.nii.gz").exists()


def changed(folder: Path, name: str, old: bytes, new: bytes) -> None:
    content = (folder / name).read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    (folder / name).write_bytes(content.replace(old, new))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # ITK reads them as 65535 - value or -1 - value, pydicom as they are stored
        (lambda folder: changed(folder, "IM003.dcm", b"MONOCHROME2", b"MONOCHROME1"), "slices that are MONOCHROME1"),
        (lambda folder: changed(folder, "IM003.dcm", b"1\\.8", b"1\\.9"), "pixels of 1 x 0.8, 1 x 0.9 mm"),
        (lambda folder: [changed(path.parent, path.name, b"1\\.8", b"1\\.0") for path in sorted(folder.iterdir())],
         "pixels of 1 x 0 mm"),
        (lambda folder: shutil.copy(folder / "IM009.dcm", folder / "copy.dcm"), "several slices at one place"),
    ],
    ids=["inverted", "another size", "no size", "a copy"],
)  # fmt: skip
def test_a_series_whose_slices_are_not_alike_is_refused(change, message, tmp_path):
    folder = write_series(tmp_path / "bad", np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.int16))
    change(folder)
    with pytest.raises(CaseError, match=message):
        read_series(series_in(folder)[0].files)


def test_a_slice_that_is_cut_short_is_refused(tmp_path, capsys):
    """GDCM leaves it out; at either end of the series the others are a whole grid."""
    folder = write_series(tmp_path / "cut", np.zeros(SHAPE, np.int16))
    for name, bare in (("IM001.dcm", "IM001.dcm"), ("IM018.dcm", "IM018")):
        content = (folder / name).read_bytes()
        (folder / name).rename(folder / bare)
        for size in (0, 300, len(content) - 50):
            if size or bare == name:  # an empty file without an ending may be anything
                (folder / bare).write_bytes(content[:size])
                with pytest.raises(UserError, match=rf"cut holds files that are cut short or no DICOM: {bare}\. Copy"):
                    scans_in(folder, (), set())
        (folder / bare).write_bytes(content)
    (scan_of,) = scans_in(folder, (), set())
    assert len(scan_of.slices) == SHAPE[2] and not capsys.readouterr().err


# -- folders and patterns --


def test_folders_and_patterns_are_the_files_in_them(world, tmp_path, capsys, monkeypatch):
    made = tmp_path / "made"
    make_scans(made, labeled=0, unlabeled=1)
    (made / "images" / "notes.txt").write_text("of the patients")
    (made / "images" / "._patient0.nii.gz").write_bytes(b"macOS")
    run, images = world / "runs" / "dtml", made / "images"
    names = ["patient0.nii.gz", "patient1.nii.gz", "volumes.csv"]
    write(made / "images" / "patient1.nii.gz", values_of(world))
    ways = {
        "a folder": [images], "a pattern of everything": [f"{images}/*"],
        "files": [images / name for name in names[:2]], "folders": [f"{made}/*"],
    }  # fmt: skip
    contents = []
    for i, scans in enumerate(ways.values()):
        out = predicted(run, scans, tmp_path / f"out{i}")
        assert sorted(os.listdir(out)) == names
        contents.append([(out / name).read_bytes() for name in names])
    assert all(content == contents[0] for content in contents)
    assert f"not read in {images}: notes.txt" in capsys.readouterr().err
    monkeypatch.chdir(images)  # wherever the words stand
    predicted(run, ["."], tmp_path / "here")
    assert sorted(os.listdir(tmp_path / "here")) == names


def test_scans_and_checkpoints_are_told_apart_wherever_they_stand(world, tmp_path, bright):
    runs, folder, out = [str(world / "runs" / name) for name in ("dtml", "other")], scan(world).parent, tmp_path
    more = ["--device", "cpu", "--threads", "1"]
    predict.main(["--checkpoint", *runs, str(folder), "-o", str(out / "a"), *more])
    predict.main([str(folder), "--checkpoint", *runs, "-o", str(out / "b"), *more])
    predict.main(
        ["-o", str(out / "c"), *more, "--checkpoint", str(world / "runs" / "*"), "--threads", "1", str(folder)]
    )
    assert sorted(os.listdir(out / "a")) == sorted(os.listdir(out / "b")) == sorted(os.listdir(out / "c"))
    assert len(os.listdir(out / "a")) == 5


def test_what_is_no_scan_is_named_before_anything_is_written(world, tmp_path):
    run, out = world / "runs" / "dtml", tmp_path / "out"
    empty, mixed = tmp_path / "empty", tmp_path / "mixed"
    (empty / "inner").mkdir(parents=True)
    series = write_series(mixed, values_of(world)[..., :2])
    write(mixed / "scan.nii.gz", np.ones((9, 9, 9)))
    (tmp_path / "notes.txt").write_text("")
    for scans, message in (
        ([empty], r"empty holds no file that ends in .*, and no DICOM series. .* give '.*empty/\*'"),
        ([mixed], r"mixed holds both scan.nii.gz and IM001.dcm. Put DICOM into a folder of its own"),
        ([series / "IM001.dcm"], r"IM001.dcm is one slice of a DICOM series. Give its folder, .*mixed"),
        ([tmp_path / "*.nrrd"], r"nothing matches .*\*.nrrd"),
        ([scan(world), scan(world)], r"two scans are called patient0, .*Predict them into folders of their own"),
    ):
        with pytest.raises(UserError, match=message):
            predicted(run, scans, out)
    for name, message in (("notes.txt", "is no scan: files end in"), ("gone", "Give files that end in")):
        with pytest.raises(UserError, match=rf"{name}.* {message}"):
            predict.main([str(tmp_path / name), "--checkpoint", str(run), "-o", str(out)])
    with pytest.raises(UserError, match=r"there is no .*gone: neither a scan nor a further checkpoint"):
        predict.main(["--checkpoint", str(run), str(tmp_path / "gone"), "-o", str(out)])
    shutil.copytree(run, tmp_path / "fold0")
    (tmp_path / "fold1").mkdir()
    with pytest.raises(UserError, match=r"fold1 holds no checkpoint last.pt"):
        predict.main(["--checkpoint", str(tmp_path / "fold?"), str(run), str(scan(world)), "-o", str(out)])
    with pytest.raises(UserError, match="is where the scans are"):
        predicted(run, [write_series(tmp_path / "dicom", values_of(world))], tmp_path / "dicom")
    assert not out.exists() and not (tmp_path / "dicom" / "volumes.csv").exists()


def test_a_label_given_as_a_scan_is_warned_of(world, tmp_path, capsys):
    label = np.zeros(SHAPE)
    label[4:9, 5:9, 3:8] = 1
    write(tmp_path / "label.nii.gz", label)
    predicted(world / "runs" / "dtml", [tmp_path / "label.nii.gz", scan(world)], tmp_path / "out")
    warned = [line for line in capsys.readouterr().err.splitlines() if "Is it a label map?" in line]
    assert warned == [f"warning: {tmp_path / 'label.nii.gz'} has only the values 0, 1. Is it a label map?"]


@pytest.mark.parametrize("how", ["p1 p1_seg folder", "p1_0000 p1-label pattern", "p1 p1.Mask files", "p1 p1_GT files"])
def test_a_label_among_the_scans_is_refused_as_convert_does_it(how, world, tmp_path):
    image, label, way = how.split()
    for name in (image, label, "p2_seg"):  # the last has no scan here, so it may be one
        write(tmp_path / "new" / f"{name}.nii.gz", values_of(world))
    words = {
        "folder": [tmp_path / "new"], "pattern": [tmp_path / "new" / "*.nii.gz"],
        "files": [tmp_path / "new" / f"{name}.nii.gz" for name in (label, image)],
    }  # fmt: skip
    with pytest.raises(UserError, match=rf"new/{label}.nii.gz looks like the label of p1, and stands among the scans"):
        predicted(world / "runs" / "dtml", words[way], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "images").symlink_to(tmp_path / "new")
    with pytest.raises(UserError, match=rf"images/{label}.nii.gz looks like the label of p1, .* Move it to .*labels"):
        convert.main(["--source", str(tmp_path), "--out", str(tmp_path / "set")])
    (tmp_path / "new" / f"{label}.nii.gz").unlink()
    assert [scan.name for scan in given_scans([str(tmp_path / "new")], (), 1)] == [image, "p2_seg"]


def test_the_label_of_a_case_with_several_scans_is_refused_too(tmp_path):
    for name in ("p1_t1", "p1_flair", "p1_seg"):
        write(tmp_path / f"{name}.nii", np.ones((3, 3, 3)))
    with pytest.raises(UserError, match=r"p1_seg.nii looks like the label of p1, and stands among the scans"):
        given_scans([str(tmp_path)], (), 1)


@pytest.mark.parametrize("channels", [1, 2])
def test_numbers_of_channels_are_not_in_the_names_of_segmentations(channels, tmp_path):
    for name in ("p1", "p2"):
        for channel in range(channels):
            write(tmp_path / f"{name}_{channel:04d}.nii", np.ones((3, 3, 3)))
    scans = given_scans([str(tmp_path)], (), channels)
    assert [scan.name for scan in scans] == ["p1", "p2"] and {len(scan.files) for scan in scans} == {channels}


# -- the volumes --


def test_the_table_names_the_classes_and_keeps_the_rows_of_other_scans(world, tmp_path, bright, capsys, monkeypatch):
    run, out = world / "runs" / "dtml", tmp_path / "out"
    predicted(run, [scan(world, 0), scan(world, 1)], out)
    first = rows_of(out)
    assert list(first[0]) == ["scan", "class", "name", "voxels", "ml"]
    for i, row in enumerate(first):
        voxels = int((read_label(out / f"patient{i}.nii.gz")[0] == 1).sum())
        assert (row["scan"], row["class"], row["name"], row["voxels"]) == (
            f"patient{i}",
            "1",
            "left atrium",
            str(voxels),
        )
    assert "| patient0 | 1 left atrium |" in capsys.readouterr().out
    monkeypatch.setattr(METHODS["supervised"], "predict", lambda self, image, outputs: torch.ones_like(image))
    predicted(run, [scan(world, 1)], out, "--overwrite")
    predicted(run, [scan(world, 2)], out)  # its table is no obstacle to a new scan
    last = rows_of(out)
    assert [row["scan"] for row in last] == ["patient0", "patient1", "patient2"] and last[0] == first[0]
    assert last[1]["voxels"] == last[2]["voxels"] == str(np.prod(SHAPE))
    (tmp_path / "mine.csv").write_text("name,age\nA,7\n")
    with pytest.raises(UserError, match=r"mine.csv is no table of predict.py"):
        predicted(run, [scan(world, 3)], out, "--report", str(tmp_path / "mine.csv"))
    assert (tmp_path / "mine.csv").read_text() == "name,age\nA,7\n" and not (out / "patient3.nii.gz").exists()


def test_a_report_keeps_the_rows_of_another_scan_of_the_same_name(world, tmp_path):
    run, report = world / "runs" / "dtml", tmp_path / "all.csv"
    predicted(run, [scan(world)], tmp_path / "one", "--report", str(report))
    kept = report.read_bytes()
    with pytest.raises(UserError, match=r"all.csv has rows of patient0 already.*--overwrite"):
        predicted(run, [scan(world, 1), scan(world)], tmp_path / "two", "--report", str(report))
    assert report.read_bytes() == kept and not (tmp_path / "two").exists()
    predicted(run, [scan(world)], tmp_path / "two", "--report", str(report), "--overwrite")
    assert report.read_bytes() == kept
