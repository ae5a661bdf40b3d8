"""One patient, stored in any orientation, is one patient: nibabel and SimpleITK are the judges."""

import itertools
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import TINY, load, make_set
from headers import ARRAY, meta, nrrd
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from scans import OBLIQUE, ball, picture_of, turned, write
from scipy.spatial.transform import Rotation

import predict
import train_dtml
from dataloaders.cases import Case
from dataloaders.geometry import read_geometry
from dataloaders.images import read_image, read_label, to_physical
from dataloaders.orientation import Turn, orientation_of, turn_to
from tools import convert
from utils.checkpoint import load_checkpoint
from utils.errors import UserError

CODES = ["".join(c) for axes in itertools.permutations(("RL", "AP", "SI")) for c in itertools.product(*axes)]
SIX = ("LPS", "RAS", "LPI", "PIR", "SRP", "ASL")
SHAPE = (30, 28, 18)
ENDINGS = (".nii.gz", ".nrrd", ".mha", ".nii", ".nii.gz", ".mha")
RNG = np.random.default_rng(0)


def restored(path: Path, array: np.ndarray, geometry: dict, code: str, by: str = "itk") -> Path:
    """A file of the same patient with its axes in another order, by SimpleITK or, of a NIfTI, by nibabel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if by == "itk":
        return write(path, *turned(array, geometry, code))
    image = nibabel.load(write(path.with_name(f"plain-{path.name}"), array, geometry))
    change = ornt_transform(io_orientation(image.affine), axcodes2ornt(code))
    nibabel.save(image.as_reoriented(change), path)
    return path


def told(picture: sitk.Image) -> dict:
    return {
        "spacing": picture.GetSpacing(),
        "origin": picture.GetOrigin(),
        "direction": picture.GetDirection(),
    }


def random_geometry(rng: np.random.Generator) -> dict:
    """Axes of any order and sign, turned by up to 35 degrees: nobody doubts which are nearest."""
    axes = np.eye(3)[:, rng.permutation(3)] * rng.choice((-1, 1), 3)
    turn = Rotation.from_rotvec(
        rng.uniform(0, np.radians(35)) * Rotation.random(rng=rng).apply([1.0, 0, 0])
    ).as_matrix()
    direction = tuple((turn @ axes).ravel())
    return {"spacing": tuple(rng.uniform(0.5, 3, 3)), "origin": tuple(rng.uniform(-99, 99, 3)), "direction": direction}


def test_every_orientation_is_turned_as_simpleitk_and_nibabel_do():
    array = RNG.random((5, 4, 3))
    for i in range(60):
        geometry, code = random_geometry(np.random.default_rng(i)), CODES[i % len(CODES)]
        picture = picture_of(array, geometry)
        expected = sitk.DICOMOrient(picture, code)
        turn = turn_to(code, geometry["direction"])
        result, after = turn(array), turn.geometry(geometry, array.shape)
        assert (result == sitk.GetArrayFromImage(expected).transpose(2, 1, 0)).all() and result.flags.c_contiguous
        for name, values in told(expected).items():
            np.testing.assert_allclose(after[name], values, atol=1e-9)
        affine = np.eye(4)
        affine[:3] = np.diag([-1, -1, 1]) @ np.column_stack(
            [np.reshape(geometry["direction"], (3, 3)) * geometry["spacing"], geometry["origin"]]
        )
        assert orientation_of(geometry["direction"]) == "".join(nibabel.aff2axcodes(affine))
        assert orientation_of(after["direction"]) == code
        canonical = nibabel.as_closest_canonical(nibabel.Nifti1Image(array, affine))
        ras = turn_to("RAS", geometry["direction"])
        assert (ras(array) == canonical.get_fdata()).all()
        assert (turn.back(result) == array).all()
        again = turn.back.geometry(after, result.shape)
        assert all(np.allclose(again[name], geometry[name], atol=1e-9) for name in geometry)


def test_without_a_spacing_voxels_are_of_1_mm_as_for_simpleitk():
    geometry = {**random_geometry(RNG), "spacing": (1.0, 1.0, 1.0)}
    expected = told(sitk.DICOMOrient(picture_of(RNG.random((5, 4, 3)), geometry), "PIR"))
    del geometry["spacing"]
    after = turn_to("PIR", geometry["direction"]).geometry(geometry, (5, 4, 3))
    assert after.keys() == geometry.keys()
    np.testing.assert_allclose(after["origin"], expected["origin"], atol=1e-9)


def test_what_is_not_known_is_not_turned():
    assert turn_to("RAS", None) == turn_to(None, OBLIQUE["direction"]) == Turn()
    assert Turn().geometry({"spacing": (1.0, 2.0, 3.0)}, SHAPE) == {"spacing": (1.0, 2.0, 3.0)}
    array = RNG.random((3, 4, 5))
    assert Turn()(array) is array


@pytest.mark.parametrize(("axis", "angle"), [("x", 45.0), ("y", 44.999), ("z", 135.0)])
def test_axes_midway_are_turned_alike_however_they_are_stored(axis, angle):
    """Nothing is nearest there, but the same patient must become the same array; files round to 32 bits."""
    array = RNG.random((5, 4, 3))
    direction = Rotation.from_euler(axis, angle, degrees=True).as_matrix()
    result = set()
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            stored = array.transpose(order)[tuple(slice(None, None, s) for s in signs)]
            axes = (direction[:, order] * signs).astype(np.float32)
            result.add(turn_to("RAS", tuple(map(float, axes.ravel())))(stored).tobytes())
    assert len(result) == 1


# -- from files to a set, and to predictions --


@pytest.fixture(scope="module")
def patients(tmp_path_factory) -> Path:
    """Six labeled scans of bright balls, oblique and anisotropic, each in an orientation and format of its own."""
    folder = tmp_path_factory.mktemp("patients")
    for i, (code, ending) in enumerate(zip(SIX, ENDINGS, strict=True)):
        rng = np.random.default_rng(i)
        label = ball(SHAPE, OBLIQUE, to_physical(OBLIQUE, np.array(SHAPE) / 2 + rng.uniform(-3, 3, 3)), 7.0)
        image = (300 + 100.0 * label + 10 * rng.standard_normal(SHAPE)).astype(np.float32)
        restored(folder / "images" / f"p{i}{ending}", image, OBLIQUE, code)
        restored(folder / "labels" / f"p{i}{ENDINGS[i - 1]}", label, OBLIQUE, SIX[i - 1])  # a label in another one
        restored(folder / "plain" / "images" / f"p{i}{ending}", image, OBLIQUE, "RAS")
        restored(folder / "plain" / "labels" / f"p{i}{ending}", label, OBLIQUE, "RAS")
    return folder


@pytest.mark.parametrize("args", [[], ["--spacing", "1", "1.5", "1.2"], ["--crop", "label"]])
def test_a_set_is_the_same_however_its_scans_are_stored(args, patients, tmp_path, capsys):
    for source, out in ((patients, "mixed"), (patients / "plain", "plain")):
        convert.main(["--source", str(source), "--out", str(tmp_path / out), *args])
    assert "orientations differ" not in capsys.readouterr().out
    for i in range(6):
        with (
            h5py.File(tmp_path / "mixed" / f"p{i}" / "mri_norm2.h5") as mixed,
            h5py.File(tmp_path / "plain" / f"p{i}" / "mri_norm2.h5") as plain,
        ):
            assert all((mixed[name][()] == plain[name][()]).all() for name in ("image", "label"))
            for name in ("spacing", "origin", "direction"):
                np.testing.assert_allclose(mixed.attrs[name], plain.attrs[name], atol=1e-4)
            assert orientation_of(mixed.attrs["direction"]) == "RAS" and mixed["label"][()].any()
            assert orientation_of(mixed.attrs["source_direction"]) == SIX[i]


@pytest.fixture(scope="module")
def run(patients, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    convert.main(["--source", str(patients), "--out", str(folder / "set"), "--spacing", "1.1", "0.9", "1.5"])
    args = ["--data", str(folder / "set"), *TINY, "--iterations", "1", "--batch-size", "2", "--device", "cpu"]
    train_dtml.main([*args, "--runs", str(folder), "--name", "run"])
    assert load_checkpoint(folder / "run")["orientation"] == "RAS"
    return folder / "run"


def predicted(run: Path, path: Path, out: Path, *args: str) -> tuple[np.ndarray, np.ndarray]:
    """Label and probability in the scan's own axes."""
    argv = ["--checkpoint", str(run), str(path), "-o", str(out), "--device", "cpu", "--threads", "1", "--overwrite"]
    predict.main([*argv, "--probabilities", "float32", *args])
    name = path.name.partition(".")[0]
    (label,) = out.glob(f"{name}.*")
    (probability,) = out.glob(f"{name}_probability*")
    for file in (label, probability):  # where the scan is, by SimpleITK
        result, source = (sitk.ReadImage(str(p)) for p in (file, path))
        assert result.GetSize() == source.GetSize()
        for what in ("GetSpacing", "GetOrigin", "GetDirection"):
            np.testing.assert_allclose(getattr(result, what)(), getattr(source, what)(), atol=1e-6)
    return read_label(label)[0], read_image(probability)[0]


@pytest.mark.parametrize(
    ("ending", "args"), [(".nii.gz", ()), (".nrrd", ("--spacing", "0.8", "1", "1.7", "--largest-component"))]
)
def test_a_patient_is_predicted_the_same_however_it_is_stored(ending, args, run, tmp_path):
    """Bit for bit, the probabilities too, once SimpleITK has brought them to one orientation."""
    image = RNG.standard_normal(SHAPE).astype(np.float32)
    result = []
    for code in SIX:
        path = restored(tmp_path / f"{code}{ending}", image, OBLIQUE, code, "nibabel" if ".nii" in ending else "itk")
        geometry = told(sitk.ReadImage(str(path)))
        maps = predicted(run, path, tmp_path / "out", *args)
        result.append([turned(values.astype(np.float32), geometry)[0] for values in maps])
    assert 0 < result[0][0].mean() < 1 and result[0][1].std() > 1e-4
    for label, probability in result[1:]:
        assert (label == result[0][0]).all() and (probability == result[0][1]).all()


def test_a_checkpoint_has_the_orientation_of_its_own_cases(tmp_path, patients, capsys):
    """One of sets that convert did not make, LPS here; what differs or is not told is none, and is said."""
    folder = make_set(tmp_path / "set")
    args = ["--data", str(folder), *TINY, "--iterations", "1", "--batch-size", "2", "--device", "cpu"]
    train_dtml.main([*args, "--runs", str(tmp_path), "--name", "lps"])
    assert load_checkpoint(tmp_path / "lps")["orientation"] == "LPS"
    image, geometry = turned(RNG.standard_normal(SHAPE).astype(np.float32), OBLIQUE, "LPS")
    straight, other = write(tmp_path / "a.nrrd", image, geometry), write(tmp_path / "b.nrrd", image[::-1], geometry)
    changed = {**geometry, "direction": tuple((np.reshape(geometry["direction"], (3, 3)) * [-1, 1, 1]).ravel())}
    mirrored = write(tmp_path / "c.nrrd", image[::-1], changed)
    capsys.readouterr()
    lps = [predicted(tmp_path / "lps", path, tmp_path / "out")[1] for path in (straight, other, mirrored)]
    assert (lps[2][::-1] == lps[0]).all() and (lps[1][::-1] != lps[0]).any()
    assert "axes" not in capsys.readouterr().err
    state = load(tmp_path / "lps")
    del state["orientation"]
    torch.save(state, tmp_path / "old.pt")
    old = [predicted(tmp_path / "old.pt", path, tmp_path / "out")[1] for path in (straight, other, mirrored)]
    assert (old[0] == lps[0]).all() and (old[2] == old[1]).all()  # axes as they are stored, as before
    assert "does not state where the axes of its training scans point" in capsys.readouterr().err
    with pytest.raises(predict.UserError, match=r"different orientations: LPS, unknown"):
        predict.main(["--checkpoint", str(tmp_path / "lps"), str(tmp_path / "old.pt"), str(straight), "-o", "x"])


UNNAMED = ("space directions: (-0.8,0,0) (0,0,1) (0,1.7,0)", "space origin: ({},-80,310)")
FRAMELESS = {  # header without a frame, at x
    "a.mha": lambda path, x: meta(path, TransformMatrix="", Offset=f"{x} -80 310"),
    "a.nrrd": lambda path, x: nrrd(path, "space: scanner-xyz", UNNAMED[0], UNNAMED[1].format(x)),
    "b.nrrd": lambda path, x: nrrd(path, "space dimension: 3", UNNAMED[0], UNNAMED[1].format(x)),
}


@pytest.mark.parametrize("name", FRAMELESS)
def test_a_scan_that_names_no_frame_is_not_turned_and_its_prediction_lies_over_it(name, run, tmp_path, capsys):
    """`predicted` asks SimpleITK, which takes such a frame for LPS."""
    scan = FRAMELESS[name](tmp_path / name, -120)
    predicted(run, scan, tmp_path / "out")
    assert "does not state where its axes point; they are taken as they are stored" in capsys.readouterr().err
    assert (read_image(scan)[0] == ARRAY).all()


@pytest.mark.parametrize("name", FRAMELESS)
def test_a_label_beside_a_scan_that_names_no_frame_is_refused_and_one_on_it_is_taken(name, tmp_path):
    ending = Path(name).suffix
    for folder, x in (("images", -120), ("labels", -100)):
        (tmp_path / folder).mkdir()
        for i in range(2):
            FRAMELESS[name](tmp_path / folder / f"p{i}{ending}", x)
    args = ["--source", str(tmp_path), "--out", str(tmp_path / "set")]
    with pytest.raises(UserError, match=r"lies on another grid .*origin -100 -80 310.* the scan has .*origin -120 -80"):
        convert.main(args)
    for i in range(2):
        FRAMELESS[name](tmp_path / "labels" / f"p{i}{ending}", -120)
    convert.main(args)
    geometry = read_geometry(Case("p0", tmp_path / "set" / "p0" / "mri_norm2.h5", labeled=True))
    expected = told(sitk.ReadImage(str(tmp_path / "images" / f"p0{ending}")))
    for what, values in expected.items():
        np.testing.assert_allclose(geometry[what], values, atol=1e-6)
    with h5py.File(tmp_path / "set" / "p0" / "mri_norm2.h5") as f:
        assert "direction" not in f.attrs


def test_the_challenge_s_folders_keep_their_axes_as_the_published_set_does(tmp_path):
    image = RNG.standard_normal((130, 120, 20)).astype(np.float32)
    label = np.zeros(image.shape, np.uint8)
    label[40:60, 30:70, 5:9] = 255
    for i in range(3):
        geometry = {**OBLIQUE, "direction": (1.0, 0, 0, 0, 1, 0, 0, 0, 1)}
        write(tmp_path / "c" / f"p{i}" / "lgemri.nrrd", image, geometry)
        write(tmp_path / "c" / f"p{i}" / "laendo.nrrd", label, geometry)
    convert.main(["--source", str(tmp_path / "c"), "--out", str(tmp_path / "set"), "--crop", "none"])
    with h5py.File(tmp_path / "set" / "p0" / "mri_norm2.h5") as f:
        np.testing.assert_allclose(f["image"][()], (image - image.mean()) / image.std(), atol=1e-5)
        assert (f["label"][()] == (label > 0)).all() and orientation_of(f.attrs["direction"]) == "LPS"
