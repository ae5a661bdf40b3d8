"""Predictions of own scans: in their own place and format, the same numbers as test_la.py, and what is refused."""

import csv
import os
import shutil
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import TINY, make_set
from scans import OBLIQUE, ball, make_scans, write
from scipy import ndimage

import predict
import test_la
import train_dtml
from dataloaders.images import read_image, read_label, to_physical
from dataloaders.lists import lists_of
from methods import METHODS
from tools import convert
from utils.checkpoint import load_checkpoint
from utils.errors import UserError

SHAPE = (30, 28, 18)


def trained(folder: Path, data: Path, *args: str) -> Path:
    """A run folder, by default of DTML after one iteration."""
    argv = ["--data", str(data), *TINY, "--labeled", "2", "--batch-size", "2", "--iterations", "1", "--device", "cpu"]
    train_dtml.main([*argv, "--runs", str(folder.parent), "--name", folder.name, *args])
    return folder


def predicted(run: Path | list[Path], scans: list[Path], out: Path, *args: str) -> Path:
    runs = [str(path) for path in (run if isinstance(run, list) else [run])]
    predict.main(["--checkpoint", *runs, *map(str, scans), "-o", str(out), "--device", "cpu", "--threads", "1", *args])
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """scans/ of bright balls on oblique grids, set/ made of them, and runs/ trained on it."""
    folder = tmp_path_factory.mktemp("world")
    make_scans(folder / "scans")
    convert.main(["--source", str(folder / "scans"), "--out", str(folder / "set"), "--spacing", "1", "1", "1.5"])
    trained(folder / "runs" / "dtml", folder / "set")
    trained(folder / "runs" / "other", folder / "set", "--seed", "2")
    return folder


@pytest.fixture
def bright(monkeypatch) -> None:
    """Every method predicts what is bright, which is the ball: a network that has learned to perfection."""
    monkeypatch.setattr(METHODS["dtml"], "predict", lambda self, image, outputs: (image - 2).sigmoid())


def scan(folder: Path, i: int = 0) -> Path:
    return folder / "scans" / "images" / f"patient{i}.nii.gz"


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * ((a > 0) & (b > 0)).sum() / ((a > 0).sum() + (b > 0).sum())


# -- in its own place --


def test_oblique_scans_are_converted_trained_on_and_predicted_in_their_own_place(world, tmp_path):
    """What a network of seconds learned lies where the object was put, by SimpleITK's own places in mm."""
    args = ["--method", "supervised", "--iterations", "40", "--lr", "0.1", "--filters", "4"]
    run = trained(tmp_path / "runs" / "learned", world / "set", *args)
    assert load_checkpoint(run)["spacing"] == [1.0, 1.0, 1.5]
    places = make_scans(tmp_path / "new" / "scans", labeled=0, unlabeled=3)
    out = predicted(run, [scan(tmp_path / "new", i) for i in range(3)], tmp_path / "out", "--largest-component")
    for i, place in enumerate(places):
        result = sitk.ReadImage(str(out / f"patient{i}.nii.gz"))
        source = sitk.ReadImage(str(scan(tmp_path / "new", i)))
        assert result.GetSize() == source.GetSize() == SHAPE and result.GetPixelID() == sitk.sitkUInt8
        for corner in ((0, 0, 0), (29, 0, 0), (0, 27, 17)):
            there, here = (p.TransformIndexToPhysicalPoint(corner) for p in (source, result))
            np.testing.assert_allclose(here, there, atol=1e-6)
        inside = np.argwhere(sitk.GetArrayFromImage(result))[:, ::-1]
        centre = np.mean([result.TransformIndexToPhysicalPoint(tuple(map(int, index))) for index in inside], axis=0)
        assert np.linalg.norm(centre - place) < 1.5  # mm; a voxel is 0.8 x 1.0 x 1.7
        truth = ball(SHAPE, read_image(scan(tmp_path / "new", i))[1], place, 7)
        assert dice(sitk.GetArrayFromImage(result).transpose(2, 1, 0), truth) > 0.8


@pytest.mark.parametrize(
    ("spacing", "axes"), [("1.6 1.3 1.1", (1, 1, 1)), ("0.7 0.6 0.9", (-1, 1, -1)), ("0.8 1.0 1.7", (1, 1, 1))]
)
def test_a_bright_object_is_found_where_it_is_whatever_the_spacing(spacing, axes, world, tmp_path, bright):
    shape, direction = (26, 33, 21), np.reshape(OBLIQUE["direction"], (3, 3)) * axes
    geometry = {**OBLIQUE, "direction": tuple(map(float, direction.ravel()))}
    place = to_physical(geometry, (9.3, 21.6, 12.1))
    label = ball(shape, geometry, place, 6.0)
    path = write(tmp_path / "one.nrrd", (100.0 * label).astype(np.float32), geometry)
    out = predicted(world / "runs" / "dtml", [path], tmp_path / "out", "--spacing", *spacing.split())
    result, after = read_label(out / "one.nrrd")
    assert np.linalg.norm(to_physical(after, np.argwhere(result)).mean(0) - place) < 0.4 and dice(result, label) > 0.8


def test_an_h5_case_is_taken_as_it_is_and_predicted_as_test_la_does(tmp_path):
    """The same windows by the other script, which has a reference and is tested against it."""
    data = make_set(tmp_path / "set")
    run = trained(tmp_path / "runs" / "run", data, "--k", "5")
    args = ["--checkpoint", str(run), "--save", "all", "--stride", "8", "8", "8", "--device", "cpu"]
    test_la.main([*args, "--out", str(tmp_path / "tested")])
    for output in ("seg", "sdm", "mean"):
        cases = [data / name / "mri_norm2.h5" for name in ("case08", "case09")]
        out = predicted(run, cases, tmp_path / output, "--stride", "8", "8", "8", "--output", output)
        for name in ("case08.nii.gz", "case09.nii.gz"):
            (mine, geometry), (theirs, expected) = (
                read_label(path) for path in (out / name, tmp_path / "tested" / "predictions" / output / name)
            )
            assert (mine == theirs).all() and geometry == expected and geometry["spacing"] == (1.0, 1.0, 2.0)


def test_a_nifti_s_prediction_has_the_scan_s_own_header(world, tmp_path, capfd):
    """Both forms, which differ, and all that any viewer may go by; said once for each scan."""
    image = nibabel.load(scan(world))
    sform = image.affine.copy()
    sform[:3, 3] += 40
    header = image.header.copy()
    header.set_sform(sform, 4)
    header["descrip"], header["pixdim"][4], header["cal_max"] = b"of a scanner", 2.5, 500
    paths = [tmp_path / "one.nii.gz", tmp_path / "two.nii"]
    for path in paths:
        nibabel.save(nibabel.Nifti1Image(image.get_fdata(dtype=np.float32), None, header), path)
    out = predicted(world / "runs" / "dtml", paths, tmp_path / "out", "--probabilities", "float32")
    err = capfd.readouterr().err
    for path in paths:
        assert err.count(f"{path}: its sform and its qform lie up to 69.3 mm apart. The sform (code 4) counts") == 1
        for file in out.glob(f"{path.name.partition('.')[0]}*"):
            before, after = nibabel.load(path).header, nibabel.load(file).header
            for name in ("pixdim", "sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c",
                         "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "xyzt_units", "descrip"):  # fmt: skip
                assert before[name].tobytes() == after[name].tobytes(), name
            assert after["cal_max"] == 0


# -- what is predicted --


def test_probabilities_are_what_the_segmentation_is_cut_from(world, tmp_path):
    for kind in ("float32", "uint8"):
        out = predicted(world / "runs" / "dtml", [scan(world)], tmp_path / kind, "--probabilities", kind)
    label, _ = read_label(out / "patient0.nii.gz")
    p, _ = read_image(tmp_path / "float32" / "patient0_probability.nii.gz")
    assert (label == (p > 0.5)).all() and 0 < p.min() < p.max() < 1
    assert (read_image(tmp_path / "uint8" / "patient0_probability.nii.gz")[0] == np.rint(255 * p)).all()


def probability_of(runs: list[Path], path: Path, out: Path, *args: str) -> np.ndarray:
    predicted(runs, [path], out, "--probabilities", "float32", *args)
    return read_image(out / f"{path.name.removesuffix('.nii.gz')}_probability.nii.gz")[0]


@pytest.fixture(scope="module")
def usual(world: Path) -> np.ndarray:
    """The probability of the first scan by the first run, with no more words."""
    return probability_of([world / "runs" / "dtml"], scan(world), world / "usual")


def test_several_checkpoints_are_averaged(world, usual, tmp_path):
    runs = [world / "runs" / name for name in ("dtml", "other")]
    each = [usual, probability_of(runs[1:], scan(world), tmp_path / "other")]
    both = probability_of(runs, scan(world), tmp_path / "both")
    assert np.abs(each[0] - each[1]).max() > 0.01
    np.testing.assert_allclose(both, (each[0] + each[1]) / 2, atol=1e-6)


def test_the_largest_component_and_the_report(world, tmp_path, monkeypatch, capsys):
    shape, small, large = (30, 28, 18), (6, 6, 5), (20, 18, 11)
    parts = [
        ball(shape, OBLIQUE, to_physical(OBLIQUE, place), radius) for place, radius in ((small, 3.0), (large, 5.0))
    ]
    path = write(tmp_path / "two.nii.gz", (100 * (parts[0] | parts[1])).astype(np.int16))
    monkeypatch.setattr(METHODS["dtml"], "predict", lambda self, image, outputs: (image > 1).float())
    args = ["--spacing", *map(str, OBLIQUE["spacing"])]
    both = read_label(predicted(world / "runs" / "dtml", [path], tmp_path / "both", *args) / "two.nii.gz")[0]
    assert (both == (parts[0] | parts[1])).all() and ndimage.label(both)[1] == 2
    report = tmp_path / "new" / "volumes.csv"
    out = predicted(
        world / "runs" / "dtml", [path], tmp_path / "one", *args, "--largest-component", "--report", str(report)
    )
    assert (read_label(out / "two.nii.gz")[0] == parts[1]).all()
    (row,) = csv.DictReader(report.open())
    assert (row["scan"], row["class"], row["voxels"]) == ("two", "1", str(parts[1].sum()))
    assert float(row["ml"]) == pytest.approx(parts[1].sum() * 0.8 * 1.0 * 1.7 / 1000, rel=1e-5)
    assert f"| two | 1 | {parts[1].sum()} |" in capsys.readouterr().out


def test_several_classes_are_predicted_each_in_its_place(tmp_path, monkeypatch):
    """Two balls of different brightness: converted, trained on and predicted as labels 1 and 2."""
    shape, places = (30, 28, 18), [to_physical(OBLIQUE, place) for place in ((8, 8, 5), (21, 19, 12))]
    label = sum(c * ball(shape, OBLIQUE, place, 5.0) for c, place in enumerate(places, 1)).astype(np.uint8)
    for i in range(3):
        write(tmp_path / "s" / f"p{i}" / "image.nii.gz", (label + 0.01 * np.random.default_rng(i).random(shape)))
        write(tmp_path / "s" / f"p{i}" / "label.nii.gz", 4 * label)
    convert.main(["--source", str(tmp_path / "s"), "--out", str(tmp_path / "set"), "--labels", "4", "8"])
    run = trained(tmp_path / "runs" / "two", tmp_path / "set", "--classes", "2")

    source, _ = read_image(tmp_path / "s" / "p0" / "image.nii.gz")
    edges = [(c - source.mean()) / source.std() for c in (0.5, 1.5)]
    monkeypatch.setattr(
        METHODS["dtml"],
        "predict",
        lambda self, x, outputs: torch.cat([(x > edges[0]) & (x < edges[1]), x >= edges[1]], 1).float(),
    )
    args = ["--probabilities", "uint8", "--report", str(tmp_path / "r.csv"), "--largest-component"]
    out = predicted(run, [tmp_path / "s" / "p0" / "image.nii.gz"], tmp_path / "out", *args)
    assert sorted(os.listdir(out)) == ["image.nii.gz", "image_probability_1.nii.gz", "image_probability_2.nii.gz"]
    assert (read_label(out / "image.nii.gz")[0] == label).all()
    assert (read_label(out / "image_probability_2.nii.gz")[0] == 255 * (label == 2)).all()
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert [(row["class"], row["voxels"]) for row in rows] == [(str(c), str((label == c).sum())) for c in (1, 2)]


@pytest.mark.parametrize(
    ("args", "changes"),
    [
        (["--output", "sdm"], True),
        (["--spacing", "2", "2", "2"], True),
        (["--interpolation", "bspline"], True),
        (["--patch-size", "32", "16", "16"], True),
        (["--stride", "5", "16", "7"], True),
        (["--weighting", "gaussian"], True),
        (["--precision", "bf16"], True),
        (["--batch-size", "3"], False),
        (["--threads", "2"], False),
    ],
)
def test_flags_change_the_probability_or_only_its_rounding(args, changes, world, usual, tmp_path):
    other = probability_of([world / "runs" / "dtml"], scan(world), tmp_path / "other", *args)
    assert (np.abs(usual - other).max() > 1e-4) == changes


# -- what is refused --


def test_results_that_are_there_are_left_unless_told_otherwise(world, tmp_path):
    out = predicted(world / "runs" / "dtml", [scan(world)], tmp_path / "out")
    kept = (out / "patient0.nii.gz").read_bytes()
    (out / "patient0.nii.gz").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"patient0.nii.gz exists already. Choose another --out, or --overwrite"):
        predicted(world / "runs" / "dtml", [scan(world, 1), scan(world)], out)
    (out / "patient1.nii.gz").touch()
    with pytest.raises(UserError, match=r"patient1.nii.gz, .*patient0.nii.gz exist already\."):
        predicted(world / "runs" / "dtml", [scan(world, 1), scan(world)], out)
    (out / "patient1.nii.gz").unlink()
    assert (
        sorted(os.listdir(out)) == ["patient0.nii.gz", "volumes.csv"]
        and (out / "patient0.nii.gz").read_bytes() == b"mine"
    )
    predicted(world / "runs" / "dtml", [scan(world)], out, "--overwrite")
    assert (out / "patient0.nii.gz").read_bytes() == kept


def test_bad_scans_are_named_and_the_others_predicted(world, tmp_path):
    shutil.copy(scan(world), tmp_path / "good.nii.gz")
    (tmp_path / "cut.nii.gz").write_bytes(scan(world).read_bytes()[:999])
    flat = write(tmp_path / "flat.nrrd", np.ones((9, 9, 9)))
    scans = [tmp_path / "cut.nii.gz", flat, tmp_path / "good.nii.gz"]
    with pytest.raises(UserError, match=r"2 of 3 scans .*\n  .*cut.nii.gz is damaged.*\n  .*flat.nrrd is constant"):
        predicted(world / "runs" / "dtml", scans, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["good.nii.gz", "volumes.csv"]


def test_a_scan_whose_prediction_overflows_is_named_not_segmented_as_empty(world, tmp_path):
    name = lists_of(world / "set")[1][0]
    scans = [shutil.copy(world / "set" / name / "mri_norm2.h5", tmp_path / f"{kind}.h5") for kind in ("good", "large")]
    with h5py.File(scans[1], "a") as f:
        f["image"][...] *= 1e6
    with pytest.raises(UserError, match=r"1 of 2 scans .*\n  .*large.h5 gets .* not a number or infinite"):
        predicted(world / "runs" / "dtml", scans, tmp_path / "out", "--precision", "fp16")
    assert sorted(os.listdir(tmp_path / "out")) == ["good.nii.gz", "volumes.csv"]


def test_scans_and_places_that_would_get_in_each_other_s_way_are_refused(world, tmp_path):
    run = world / "runs" / "dtml"
    alike = [write(tmp_path / name, np.ones((9, 9, 9))) for name in ("patient0.nii.gz", "patient0.nrrd")]
    for scans, out, message in (
        ([], "out", "no scan is given"),
        ([tmp_path / "none.nii.gz"], "out", r"there is no .*none.nii.gz. Give files that end in .nii.gz"),
        (alike, "out", "two scans are called patient0"),
    ):
        with pytest.raises(UserError, match=message):
            predicted(run, scans, tmp_path / out)
    with pytest.raises(UserError, match="is where the scans are: they would be replaced"):
        predicted(run, [scan(world)], scan(world).parent, "--overwrite")
    assert not (tmp_path / "out").exists()


def test_a_place_that_takes_no_file_is_refused_before_any_scan_is_predicted(world, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "predict_scan", None)
    (tmp_path / "file").touch()
    for out, args in (
        (tmp_path / "file", ()),
        (tmp_path / "file" / "out", ()),
        (Path("/proc/out"), ()),
        (tmp_path / "out", ("--report", str(tmp_path / "file" / "volumes.csv"))),
    ):
        with pytest.raises(UserError, match=r"cannot write (/proc/out|.*file.*): .*\. Choose another folder\."):
            predicted(world / "runs" / "dtml", [scan(world)], out, *args)
    assert os.listdir(tmp_path) == ["file"]


def test_checkpoints_that_cannot_be_averaged_are_refused(world, tmp_path):
    first = world / "runs" / "dtml"
    for args, message in (
        (["--downsample", "2"], "the checkpoints differ in --downsample: 1, 2"),
        (["--patch-size", "16", "32", "16"], "Choose one by --patch-size"),
    ):
        second = trained(tmp_path / "runs" / args[0].strip("-"), world / "set", *args)
        with pytest.raises(UserError, match=message):
            predicted([first, second], [scan(world)], tmp_path / "out")
    state = torch.load(first / "last.pt", weights_only=True)
    for file, names in (("a.pt", {"1": "aorta", "2": "vein"}), ("b.pt", {"1": "vein"})):
        torch.save({**state, "class_names": names}, tmp_path / file)
    with pytest.raises(UserError, match=r"b\.pt and .*a\.pt number the classes .*: vein is class 1 and class 2\."):
        predicted([tmp_path / "a.pt", tmp_path / "b.pt"], [scan(world)], tmp_path / "out")
    coarse = make_set(tmp_path / "coarse")  # spacing 1 1 2
    second = trained(tmp_path / "runs" / "coarse", coarse)
    with pytest.raises(UserError, match=r"of different spacings. Choose one by --spacing"):
        predicted([first, second], [scan(world)], tmp_path / "out")


def test_a_checkpoint_without_spacing_leaves_scans_at_theirs(world, usual, tmp_path, capsys):
    state = torch.load(world / "runs" / "dtml" / "last.pt", weights_only=True)
    del state["spacing"]
    torch.save(state, tmp_path / "old.pt")
    old = probability_of([tmp_path / "old.pt"], scan(world), tmp_path / "old")
    assert "does not state the spacing" in capsys.readouterr().err
    own = probability_of([world / "runs" / "dtml"], scan(world), tmp_path / "own", "--spacing", "0.8", "1", "1.7")
    assert (old == own).all() and (old != usual).any()
