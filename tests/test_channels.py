"""Scans of several channels: from nnU-Net's files, a CSV or a 4-D NIfTI to predictions, against SimpleITK and numpy."""

import json
import shutil
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import TINY, make_set
from scans import OBLIQUE, ball, turned, write

import predict
import test_la
import train_dtml
from dataloaders.cases import Case, read_case
from dataloaders.channel_names import channels_of_set
from dataloaders.images import read_image, scan_name, to_physical
from methods.released import load_trained
from tools import check, convert, pictures
from tools.given_scans import given_scans
from utils.errors import UserError

SHAPE = (30, 28, 18)
NAMES = ["T1", "FLAIR"]


def scan(i: int, shape=SHAPE) -> tuple[np.ndarray, np.ndarray, dict]:
    """Image (K,W,H,D), each channel with its own noise and contrast, label of a ball, and an oblique geometry."""
    rng = np.random.default_rng(i)
    geometry = {**OBLIQUE, "origin": tuple(rng.uniform(-50, 50, 3))}
    label = ball(shape, geometry, to_physical(geometry, np.array(shape) / 2 + rng.uniform(-3, 3, 3)), 7.0)
    contrasts = [100.0 * (1 - 2 * c) * label for c in range(2)]
    image = np.stack([300 + 100 * c + x + 10 * rng.standard_normal(shape) for c, x in enumerate(contrasts)])
    return image.astype(np.float32), label, geometry


def nnunet(folder: Path, labeled: int = 5, unlabeled: int = 1, shape=SHAPE) -> Path:
    """nnU-Net's layout: imagesTr/p0_0000.nii.gz, p0_0001.nii.gz, labelsTr/p0.nii.gz; unlabeled scans in imagesTs."""
    for i in range(labeled + unlabeled):
        image, label, geometry = scan(i, shape)
        where = "imagesTr" if i < labeled else "imagesTs"
        for c, channel in enumerate(image):
            write(folder / where / f"p{i}_{c:04}.nii.gz", channel, geometry)
        if i < labeled:
            write(folder / "labelsTr" / f"p{i}.nii.gz", label, geometry)
    names = {"channel_names": {str(c): name for c, name in enumerate(NAMES)}}
    (folder / "dataset.json").write_text(json.dumps(names))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """scans/ in nnU-Net's layout, set/ made of them with the scans' own voxels, and runs/two trained on it."""
    folder = tmp_path_factory.mktemp("world")
    nnunet(folder / "scans")
    convert.main(["--source", str(folder / "scans"), "--out", str(folder / "set"), "--validation-share", "0.2"])
    train(folder / "set", folder / "runs" / "two", "--validate-every", "3", "--method", "supervised")
    return folder


def train(data: Path, run: Path, *args: str) -> Path:
    argv = ["--data", str(data), *TINY, "--labeled", "2", "--batch-size", "2", "--iterations", "3", "--device", "cpu"]
    train_dtml.main([*argv, "--runs", str(run.parent), "--name", run.name, *args])
    return run


def test_a_case_holds_what_simpleitk_reads_from_the_channels_files(world):
    for i in range(6):
        where = "imagesTr" if i < 5 else "imagesTs"
        with h5py.File(world / "set" / f"p{i}" / "mri_norm2.h5") as f:
            assert f["image"].shape == (2, *f["image"].shape[1:]) and f["image"].chunks[0] == 1
            for c in range(2):
                picture = sitk.ReadImage(str(world / "scans" / where / f"p{i}_{c:04}.nii.gz"), sitk.sitkFloat64)
                array = sitk.GetArrayFromImage(picture).transpose(2, 1, 0)
                geometry = {"spacing": picture.GetSpacing(), "origin": picture.GetOrigin(),
                            "direction": picture.GetDirection()}  # fmt: skip
                expected, there = turned((array - array.mean()) / array.std(), geometry)
                np.testing.assert_allclose(f["image"][c], expected, atol=1e-5)
                np.testing.assert_allclose(f.attrs["origin"], there["origin"], atol=1e-3)
                assert f.attrs["mean"][c] == pytest.approx(array.mean(), rel=1e-6)
            assert ("label" in f) == (i < 5)
    assert json.loads((world / "set" / "dataset.json").read_text())["channel_names"] == {"0": "T1", "1": "FLAIR"}


@pytest.mark.parametrize("layout", ["csv", "decathlon"])
def test_a_csv_and_4d_files_give_the_same_cases(layout, world, tmp_path):
    source = tmp_path / "source"
    if layout == "csv":
        rows = [f"imagesTr/p{i}_0000.nii.gz,imagesTr/p{i}_0001.nii.gz,labelsTr/p{i}.nii.gz,p{i}" for i in range(5)]
        rows.append("imagesTs/p5_0000.nii.gz,imagesTs/p5_0001.nii.gz,,p5")
        shutil.copytree(world / "scans", source)
        (source / "scans.csv").write_text("image_T1,image_FLAIR,label,name\n" + "\n".join(rows) + "\n")
        given = source / "scans.csv"
    else:  # by nibabel, as one file (X,Y,Z,channel)
        for i in range(6):
            where = "imagesTr" if i < 5 else "imagesTs"
            parts = [nibabel.load(world / "scans" / where / f"p{i}_{c:04}.nii.gz") for c in range(2)]
            (source / where).mkdir(parents=True, exist_ok=True)
            array = np.stack([part.get_fdata(dtype=np.float32) for part in parts], axis=-1)
            nibabel.save(nibabel.Nifti1Image(array, parts[0].affine), source / where / f"p{i}.nii.gz")
        shutil.copytree(world / "scans" / "labelsTr", source / "labelsTr")
        (source / "dataset.json").write_text(json.dumps({"modality": {"0": "T1", "1": "FLAIR"}}))
        given = source
    convert.main(["--source", str(given), "--out", str(tmp_path / "set"), "--validation-share", "0.2"])
    for name in ("train.list", "test.list", "validation.list"):
        assert (tmp_path / "set" / name).read_text() == (world / "set" / name).read_text()
    for i in range(6):
        cases = [Case(f"p{i}", where / "set" / f"p{i}" / "mri_norm2.h5", labeled=i < 5) for where in (world, tmp_path)]
        (image, label), (other, other_label) = map(read_case, cases)
        np.testing.assert_array_equal(image, other)
        np.testing.assert_array_equal(label, other_label)
    assert json.loads((tmp_path / "set" / "dataset.json").read_text())["channel_names"] == {"0": "T1", "1": "FLAIR"}


def test_convert_treats_each_channel_as_a_scan_of_its_own(tmp_path):
    """Bit for bit, with resampling and a crop."""
    nnunet(tmp_path / "scans", labeled=2, unlabeled=0)
    args = ["--spacing", "1.6", "1", "2", "--crop", "label"]
    convert.main(["--source", str(tmp_path / "scans"), "--out", str(tmp_path / "set"), *args])
    for c in range(2):
        source = tmp_path / f"scans{c}"
        shutil.copytree(tmp_path / "scans" / "labelsTr", source / "labelsTr")
        (source / "imagesTr").mkdir()
        for path in (tmp_path / "scans" / "imagesTr").glob(f"*_{c:04}.nii.gz"):
            shutil.copy(path, source / "imagesTr" / path.name.replace(f"_{c:04}", ""))
        convert.main(["--source", str(source), "--out", str(tmp_path / f"set{c}"), *args])
        for i in range(2):
            (image, label), (one, its_label) = (
                read_case(Case("", tmp_path / where / f"p{i}" / "mri_norm2.h5", True)) for where in ("set", f"set{c}")
            )
            assert one.ndim == 3
            np.testing.assert_array_equal(image[c], one)
            np.testing.assert_array_equal(label, its_label)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("place", r"p1_0001.nii.gz lies on another grid than .*p1_0000.nii.gz: \(30, 28, 18\) voxels, spacing"),
        ("shape", r"p1_0001.nii.gz lies on another grid than .*p1_0000.nii.gz: \(30, 28, 17\) voxels"),
        ("volumes", r"p1_0001.nii.gz has 2 channels, where a file for each channel has one"),
        (
            "missing",
            r"p1 has 1 files? of|has no p1_0001|p0 has 2 files of channels \(_0000, ...\), and p1 another number",
        ),
        ("constant", r"p1_0000.nii.gz, .*p1_0001.nii.gz is constant \(5\) in channel 1"),
        ("gap", r"has no p1_0001, and p1_0002.nii.gz is there"),
        ("names", r"dataset.json names 3, T1, T2, FLAIR"),
    ],
)
def test_channels_that_do_not_fit_are_refused(change, message, tmp_path):
    nnunet(tmp_path / "scans", labeled=3, unlabeled=0)
    path = tmp_path / "scans" / "imagesTr" / "p1_0001.nii.gz"
    image, _, geometry = scan(1)
    if change == "place":
        write(path, image[1], {**geometry, "origin": (0.0, 0.0, 0.0)})
    elif change == "shape":
        write(path, image[1][..., 1:], geometry)
    elif change == "constant":
        write(path, np.full(SHAPE, 5, np.float32), geometry)
    elif change == "volumes":
        nibabel.save(nibabel.Nifti1Image(np.moveaxis(image, 0, -1), nibabel.load(path).affine), path)
    elif change == "names":
        names = {"0": "T1", "1": "T2", "2": "FLAIR"}
        (tmp_path / "scans" / "dataset.json").write_text(json.dumps({"channel_names": names}))
    else:
        path.rename(path.with_name("p1_0002.nii.gz" if change == "gap" else ".p1_0001.nii.gz"))
    with pytest.raises(UserError, match=message):
        convert.main(["--source", str(tmp_path / "scans"), "--out", str(tmp_path / "set")])


def test_a_set_keeps_to_its_channels(tmp_path):
    """Other names, or one channel in place of two, are refused when it grows."""
    nnunet(tmp_path / "scans", labeled=2, unlabeled=0)
    args = ["--source", str(tmp_path / "scans"), "--out", str(tmp_path / "set")]
    convert.main(args)
    convert.main(args)
    (tmp_path / "scans" / "dataset.json").write_text(json.dumps({"channel_names": {"0": "FLAIR", "1": "T1"}}))
    with pytest.raises(UserError, match=r"channels: \['T1', 'FLAIR'\] before, \['FLAIR', 'T1'\] now"):
        convert.main(args)
    for path in (tmp_path / "scans").glob("*/p*"):
        path.rename(path.with_name(path.name.replace("p", "q", 1)))
    for path in (tmp_path / "scans" / "imagesTr").glob("*_0001*"):
        path.unlink()
    with pytest.raises(UserError, match=r"made in another way \(channels: \['T1', 'FLAIR'\] before, None now"):
        convert.main(args)


def test_a_checkpoint_names_its_channels_and_a_test_wants_the_same(world, tmp_path):
    state, method, _ = load_trained(str(world / "runs" / "two"))
    assert state["channel_names"] == NAMES and state["options"]["channels"] == 2
    assert method.network.encoder[0][0].weight.shape[1] == 2
    shutil.copytree(world / "set", tmp_path / "set")
    test_la.main(["--checkpoint", str(world / "runs" / "two"), "--data", str(tmp_path / "set"), "--device", "cpu",
                  "--out", str(tmp_path / "out"), "--report", "--stride", "16", "16", "8"])  # fmt: skip
    figure = ["--cases", "p0", "--out", str(tmp_path / "figure2.png"), "--dpi", "50"]
    pictures.main(["figure2", str(world / "runs" / "two"), *figure])
    names = {"channel_names": {"0": "FLAIR", "1": "T1"}}
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(names))
    with pytest.raises(UserError, match=r"are FLAIR, T1, and the network was trained on T1, FLAIR"):
        test_la.main(["--checkpoint", str(world / "runs" / "two"), "--data", str(tmp_path / "set"), "--device", "cpu"])
    with pytest.raises(
        UserError, match=r"--init .*two/last.pt was trained on the channels T1, FLAIR, .* are FLAIR, T1\. "
    ):
        train(tmp_path / "set", tmp_path / "init", "--method", "supervised", "--init", str(world / "runs" / "two"))
    make_set(tmp_path / "one", train=4, test=1)
    with pytest.raises(UserError, match="has 1 channel, where 2 are needed"):
        test_la.main(["--checkpoint", str(world / "runs" / "two"), "--data", str(tmp_path / "one"), "--device", "cpu"])
    with pytest.raises(UserError, match="channels is 2 there and 1 here"):
        train(tmp_path / "one", tmp_path / "init", "--method", "supervised", "--init", str(world / "runs" / "two"))


def test_a_case_with_other_channels_than_the_first_stops_a_training(tmp_path):
    make_set(tmp_path / "set", train=3, labeled=2)
    with h5py.File(tmp_path / "set" / "case01" / "mri_norm2.h5", "r+") as f:
        image = f["image"][()]
        del f["image"]
        f["image"] = np.stack([image, image])
    with pytest.raises(UserError, match=r"case01: .* has 2 channels, where 1 is needed"):
        train(tmp_path / "set", tmp_path / "run")
    findings, *_ = check.check(tmp_path / "set", check.Options(labeled=2, patch_size=[16, 16, 16], workers=1))
    assert [(x.level, x.cases) for x in findings if "channels" in x.text] == [("error", ("case01",))]
    assert channels_of_set(tmp_path / "set") == 1
    (tmp_path / "set" / "case00" / "mri_norm2.h5").write_bytes(b"damaged")
    assert channels_of_set(tmp_path / "set") == 2


def predicted(run: Path, out: Path, *args: object) -> Path:
    predict.main(["--checkpoint", str(run), *map(str, args), "-o", str(out), "--device", "cpu", "--threads", "1"])
    return out


def test_files_of_channels_in_any_form_are_predicted_alike(world, tmp_path):
    files = [world / "scans" / "imagesTs" / f"p5_{c:04}.nii.gz" for c in range(2)]
    image, _, geometry = scan(5)
    for name, channel in zip(NAMES, image, strict=True):
        write(tmp_path / f"{name}.nii.gz", channel, geometry)
    affine = nibabel.load(files[0]).affine
    nibabel.save(nibabel.Nifti1Image(np.moveaxis(image, 0, -1), affine), tmp_path / "both.nii.gz")
    run, args = world / "runs" / "two", ["--probabilities", "float32"]
    predicted(run, tmp_path / "a", files[1], files[0], *args)  # in any order
    predicted(run, tmp_path / "b", f"{tmp_path / 'T1.nii.gz'},{tmp_path / 'FLAIR.nii.gz'}", *args)
    predicted(run, tmp_path / "c", tmp_path / "both.nii.gz", *args)
    written = [tmp_path / "a" / "p5", tmp_path / "b" / "T1", tmp_path / "c" / "both"]
    maps = [read_image(path.with_name(path.name + "_probability.nii.gz")) for path in written]
    for p, geometry_there in maps:
        np.testing.assert_array_equal(p, maps[0][0])
        assert p.shape == SHAPE and np.allclose(geometry_there["origin"], geometry["origin"], atol=1e-3)
    predicted(run, tmp_path / "d", f"{tmp_path / 'FLAIR.nii.gz'},{tmp_path / 'T1.nii.gz'}", *args)
    assert not np.array_equal(read_image(tmp_path / "d" / "FLAIR_probability.nii.gz")[0], maps[0][0])


def test_h5_cases_are_no_channels_of_a_scan(world, tmp_path):
    """Each has been normalised, and states its own mean and sd."""
    file = world / "scans" / "imagesTs" / "p5_0000.nii.gz"
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["image"] = scan(5)[0][0]
        f.attrs.update(mean=300.0, sd=100.0)
    for words in (
        f"{tmp_path / 'a.h5'},{tmp_path / 'a.h5'}",
        f"{tmp_path / 'a.h5'},{file}",
        f"{file},{tmp_path / 'a.h5'}",
    ):
        with pytest.raises(UserError, match=r"a\.h5 is an h5 case, which holds all channels of a scan"):
            predicted(world / "runs" / "two", tmp_path / "out", words)


def test_a_wrong_number_of_channels_is_refused_with_what_is_needed(world, tmp_path):
    files = [world / "scans" / "imagesTs" / f"p5_{c:04}.nii.gz" for c in range(2)]
    run = world / "runs" / "two"
    needed = r"channels?, where 2 \(T1, FLAIR\) are needed"
    with pytest.raises(UserError, match=f"p5_0000.nii.gz has 1 {needed}"):
        predicted(run, tmp_path / "a", files[0])
    with pytest.raises(UserError, match=f"p5: has 3 {needed}"):
        predicted(run, tmp_path / "a", f"{files[0]},{files[1]},{files[1]}")
    with pytest.raises(UserError, match=r"has no p5_0000, and p5_0001.nii.gz is there"):
        predicted(run, tmp_path / "a", files[1])
    make_set(tmp_path / "one", train=4)
    one = train(tmp_path / "one", tmp_path / "run", "--method", "supervised")
    with pytest.raises(UserError, match="has 2 channels, where 1 is needed"):
        predicted(one, tmp_path / "a", f"{files[0]},{files[1]}")
    with pytest.raises(UserError, match="the checkpoints differ in the number of channels: 1, 2"):
        predict.main(["--checkpoint", str(run), str(one), str(files[0]), "-o", str(tmp_path / "a")])
    assert not list((tmp_path / "a").glob("*"))
    predicted(one, tmp_path / "b", files[0])  # the number is that of its only channel, as for convert
    assert (tmp_path / "b" / "p5.nii.gz").exists()


@pytest.mark.parametrize(
    ("args", "scans"),
    [
        (["d"], {"a": ["a_0000", "a_0001"], "b": ["b_0000", "b_0001"]}),
        (["d/a_0001.nii.gz", "d/a_0000.nii.gz"], {"a": ["a_0000", "a_0001"]}),
        (["d/*_0000.nii.gz", "d/?_0001.nii.gz"], {"a": ["a_0000", "a_0001"], "b": ["b_0000", "b_0001"]}),
        (["d/b_0001.nii.gz,d/b_0000.nii.gz"], {"b": ["b_0001", "b_0000"]}),
    ],
)
def test_the_files_of_a_scan_are_one_scan_however_they_are_named(args, scans, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("d").mkdir()
    for name in ("a_0000", "a_0001", "b_0000", "b_0001"):
        Path(f"d/{name}.nii.gz").touch()
    named = {scan.name: [scan_name(file) for file in scan.files] for scan in given_scans(args, [], channels=2)}
    assert named == scans
    assert len(given_scans(["d"], [], channels=1)) == 4


def test_a_scan_whose_channels_are_not_all_given_is_refused(tmp_path):
    (tmp_path / "a_0000.nii.gz").touch()
    (tmp_path / "a_0002.nii.gz").touch()
    with pytest.raises(UserError, match=r"has no a_0001, and a_0002\.nii\.gz is there"):
        given_scans([str(tmp_path)], [], channels=3)


def test_h5_cases_whose_names_end_in_four_digits_are_scans_of_their_own(tmp_path):
    """In both layouts of a set, and next to the files of another scan's channels."""
    folders, cases = [tmp_path / f"patient_000{i}" for i in (1, 2)], [tmp_path / f"patient_000{i}.h5" for i in (1, 2)]
    channels = [tmp_path / "flat" / f"patient_{c:04}.nii.gz" for c in range(2)]
    numbered = tmp_path / "flat" / "patient_0003.h5"
    for path in (*(folder / "mri_norm2.h5" for folder in folders), *cases, *channels, numbered):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    for words, names in (
        (folders, {"patient_0001": 1, "patient_0002": 1}),
        (cases, {"patient_0001": 1, "patient_0002": 1}),
        ([tmp_path / "flat"], {"patient": 2, "patient_0003": 1}),
    ):
        assert {scan.name: len(scan.files) for scan in given_scans([*map(str, words)], [], channels=2)} == names


def test_4d_files_whose_names_end_in_four_digits_are_scans_of_their_own(world, tmp_path):
    for i, name in enumerate(("scan_2019", "case_0000", "case_0001")):
        image, _, geometry = scan(i)
        matrix = np.eye(4)
        matrix[:3, :3] = np.diag([-1, -1, 1]) @ np.reshape(geometry["direction"], (3, 3)) * geometry["spacing"]
        nibabel.save(nibabel.Nifti1Image(np.moveaxis(image, 0, -1), matrix), tmp_path / f"{name}.nii.gz")
    predicted = tmp_path / "out"
    run = ["--checkpoint", str(world / "runs" / "two"), "--device", "cpu", "--threads", "1"]
    predict.main([*run, str(tmp_path), "-o", str(predicted)])
    for name in ("scan_2019", "case_0000", "case_0001"):
        ours, scans = (nibabel.load(folder / f"{name}.nii.gz") for folder in (predicted, tmp_path))
        assert ours.shape == scans.shape[:3] == SHAPE and np.allclose(ours.affine, scans.affine)
