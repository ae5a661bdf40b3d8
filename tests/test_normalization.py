"""--normalize scan, window and foreground: against numpy and the raw intensities, in every cache, from training to
prediction."""

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import TINY, make_set
from scans import OBLIQUE, ball, turned, write
from test_data import patches, volumes

import predict
import test_la
import train_dtml
from dataloaders.cases import Case, CaseError, read_case
from dataloaders.images import read_image, to_physical
from dataloaders.normalization import NONE, Normalization, normalized, normalized_case, raw_of, scalings_of
from dataloaders.two_stream import Slot
from tools import command_line, convert
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.resample import downsample_image

SCAN = Normalization("scan")


def image(seed=0, shape=(30, 28, 20)):
    return (np.random.default_rng(seed).gamma(2.0, 3.0, shape) - 4).astype(np.float32)


def by_hand(x):
    """The formula, in float64."""
    low, high = np.quantile(x.astype(np.float64), (0.005, 0.995))
    clipped = np.clip(x.astype(np.float64), low, high)
    return (clipped - clipped.mean()) / clipped.std()


def test_scan_is_clipped_to_percentiles_then_z_scored():
    x = image()
    x[0, 0, 0], x[1, 1, 1] = 1e4, -1e4
    before = x.copy()
    result = normalized(x, SCAN)
    assert result.dtype == np.float32 and np.array_equal(x, before)
    np.testing.assert_allclose(result, by_hand(x), atol=1e-5)
    assert abs(result.mean()) < 1e-5 and abs(result.std() - 1) < 1e-5 and result.max() < 6
    assert normalized(x, NONE) is x and scalings_of(x, NONE) is None


@pytest.mark.parametrize(("a", "b"), [(0.3, 0.0), (3.0, 0.0), (1200.0, -700.0), (1e-3, 5.0)])
def test_scan_forgets_scale_and_offset(a, b):
    x = image()
    np.testing.assert_allclose(normalized(np.float32(a) * x + np.float32(b), SCAN), normalized(x, SCAN), atol=2e-3)


def test_a_volume_that_is_nearly_constant_stays_finite():
    x = np.zeros((20, 20, 20), np.float32)
    x[3, 4, 5] = 7
    np.testing.assert_allclose(normalized(x, SCAN), (x - x.mean()) / x.std(), rtol=1e-4)
    assert np.isfinite(normalized(np.full((4, 4, 4), 2.0, np.float32), SCAN)).all()


@pytest.mark.parametrize("downsample", [1, 2])
@pytest.mark.parametrize("cache", ["ram", "disk", "none"])
def test_every_cache_scales_the_whole_volume_before_pooling(tiny_set, tmp_path, cache, downsample):
    """Twice, so that what a first run left on disk is read too; and beside it the same set as it is."""
    where = {"cache": cache, "downsample": downsample, "folder": tmp_path}
    for _ in range(2):
        scaled, plain = volumes(tiny_set, normalize=SCAN, **where), volumes(tiny_set, **where)
        for i, case in enumerate(scaled.cases):
            whole = tuple(slice(0, side) for side in scaled.shapes[i])
            raw = read_case(case)[0]
            expected = downsample_image(torch.from_numpy(by_hand(raw).astype(np.float32)), downsample)
            part = tuple(slice(1, side - 2) for side in scaled.shapes[i])
            if cache == "none" and downsample == 2:  # a cell at the edge may hang over
                part = tuple(slice(1, side // 2) for side in raw.shape)
            torch.testing.assert_close(scaled.read(i, part)[0], expected[part], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(plain.read(i, whole)[0], downsample_image(torch.from_numpy(raw), downsample))
        assert scaled.checksums == plain.checksums


def test_a_scan_of_any_scale_is_segmented_alike(tmp_path):
    """Train, test and predict: with --normalize scan the test scans may be stored at any scale, without it not."""
    data = make_set(tmp_path / "set")
    args = ["--data", str(data), "--device", "cpu", "--iterations", "4", "--method", "supervised", *TINY]
    tested, predicted = {}, {}
    for kind in ("none", "scan"):
        run = tmp_path / kind
        train_dtml.main([*args, "--normalize", kind, "--runs", str(tmp_path), "--name", kind])
        for factor in (1.0, 4.0):
            other = make_set(tmp_path / f"x{factor}")
            file = other / "case08" / "mri_norm2.h5"
            with h5py.File(file, "r+") as f:
                f["image"][...] = factor * f["image"][()]
            out = tmp_path / f"{kind}{factor}"
            test_la.main(["--checkpoint", str(run), "--data", str(other), "--out", str(out / "test")])
            tested[kind, factor] = (out / "test" / "cases.csv").read_text().splitlines()[1]
            predict.main(["--checkpoint", str(run), str(file), "-o", str(out), "--probabilities", "float32"])
            predicted[kind, factor] = read_image(out / "case08_probability.nii.gz")[0]
    assert tested["scan", 4.0] == tested["scan", 1.0]
    np.testing.assert_allclose(predicted["scan", 4.0], predicted["scan", 1.0], atol=1e-4)
    assert np.abs(predicted["none", 4.0] - predicted["none", 1.0]).max() > 1e-3


# -- windows and foregrounds --


SHAPE = (26, 24, 18)
WINDOW = Normalization("window", (40.0, 400.0))
FOREGROUND = Normalization("foreground")


def ct(i: int) -> tuple[np.ndarray, np.ndarray]:
    """HU of air, of a body of soft tissue, an organ in it and some metal, and the organ's label."""
    rng = np.random.default_rng(i)
    middle = to_physical(OBLIQUE, np.array(SHAPE) / 2)
    body, organ = (ball(SHAPE, OBLIQUE, middle + rng.uniform(-2, 2, 3), radius) for radius in (10.0, 6.0))
    hu = -1000 + 1040.0 * body + 120.0 * organ + 15 * rng.standard_normal(SHAPE)
    hu[2:4, 3, 5] = 3000
    return np.rint(hu).astype(np.int16), organ


def mr(i: int) -> np.ndarray:
    """Intensities of a head, and exactly 0 around it."""
    hu, _ = ct(i)
    return np.where(hu > -500, hu + 1200, 0).astype(np.int16)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """ct/ and mr/, scans of 4 patients, sets made of them, and a run on the first with a window."""
    folder = tmp_path_factory.mktemp("world")
    for i in range(4):
        for name, image in (("ct", ct(i)[0]), ("mr", mr(i))):
            write(folder / name / "images" / f"p{i}.nii.gz", image)
            write(folder / name / "labels" / f"p{i}.nii.gz", ct(i)[1])
    for name in ("ct", "mr"):
        convert.main(["--source", str(folder / name), "--out", str(folder / f"{name}-set"), "--crop", "label"])
    train(folder / "ct-set", folder / "run", "--normalize", "window", "--window", "40", "400")
    return folder


def train(data: Path, run: Path, *args: str) -> Path:
    argv = ["--data", str(data), *TINY, "--labeled", "2", "--batch-size", "2", "--iterations", "2", "--device", "cpu"]
    argv += ["--method", "supervised", "--runs", str(run.parent), "--name", run.name]
    train_dtml.main([*argv, *args])
    return run


def raw_values(world: Path, name: str, i: int) -> tuple[Case, np.ndarray, np.ndarray]:
    """A case, its image, and the scan's own intensities at its voxels, from the file by SimpleITK's orientation."""
    case = Case(f"p{i}", world / f"{name}-set" / f"p{i}" / "mri_norm2.h5", True)
    array = ct(i)[0] if name == "ct" else mr(i)
    raw, _ = turned(array.astype(np.float32), OBLIQUE)
    image, _ = read_case(case)
    with h5py.File(case.path) as f:
        x, y, z = f.attrs["crop_corner"]
    w, h, d = image.shape
    return case, image, raw[x : x + w, y : y + h, z : z + d].astype(np.float64)


@pytest.mark.parametrize(("level", "width"), [(40.0, 400.0), (-600.0, 1500.0), (50.0, 120.0)])
def test_a_window_is_of_the_scan_s_own_intensities(level, width, world):
    case, image, hu = raw_values(world, "ct", 1)
    expected = np.clip((hu - (level - width / 2)) / width, 0, 1)
    result = normalized_case(case, image, Normalization("window", (level, width)))
    assert result.dtype == np.float32 and result.min() >= 0 and result.max() <= 1
    np.testing.assert_allclose(result, expected, atol=2e-4 * 1000 / width)


@pytest.mark.parametrize("name", ["mr", "ct"])
def test_the_foreground_are_the_voxels_that_are_not_0(name, world):
    """CT has hardly any voxel of 0 HU, so that nearly all count."""
    case, image, raw = raw_values(world, name, 2)
    inside = raw[raw != 0]
    assert (inside.size < 0.7 * raw.size) == (name == "mr")
    expected = (raw - inside.mean()) / inside.std()
    np.testing.assert_allclose(normalized_case(case, image, FOREGROUND), expected, atol=1e-4)


def test_an_image_that_states_no_scaling_holds_its_own_intensities(tmp_path):
    make_set(tmp_path, train=2, test=1, labeled=2)
    case = Case("case00", tmp_path / "case00" / "mri_norm2.h5", True)
    image, _ = read_case(case)
    assert raw_of(case) is None
    np.testing.assert_allclose(
        normalized_case(case, image, Normalization("window", (0.5, 2.0))), np.clip((image + 0.5) / 2, 0, 1), atol=1e-6
    )
    image[:8] = 0
    inside = image[image != 0].astype(np.float64)
    np.testing.assert_allclose(normalized(image, FOREGROUND), (image - inside.mean()) / inside.std(), atol=1e-5)


def test_each_channel_has_its_own_scale():
    a = np.random.default_rng(0).normal(100, 30, (12, 12, 12)).astype(np.float32)
    both = np.stack([(a - 100) / 30, (5 * a - 7) / 2])
    result = normalized(both, Normalization("window", (90.0, 80.0)), [(100.0, 30.0), (1.4, 0.4)])
    np.testing.assert_allclose(result, np.clip((np.stack([a, a]) - 50) / 80, 0, 1), atol=1e-5)
    two = Normalization("window", (90.0, 80.0, 110.0, 40.0))
    result = normalized(both, two, [(100.0, 30.0), (1.4, 0.4)])
    np.testing.assert_allclose(result, np.clip([(a - 50) / 80, (a - 90) / 40], 0, 1), atol=1e-5)
    assert two.suffix == "-window-90_80_110_40"
    assert len({Normalization("window", (level, 0.5)).suffix for level in (1e6, 1e6 + 1, 1e6 + 0.1)}) == 3


@pytest.mark.parametrize("how", [WINDOW, FOREGROUND], ids=str)
def test_every_cache_scales_alike(how, world, tmp_path):
    crops = []
    for cache in ("ram", "disk", "none"):
        for _ in range(2):  # what a first run left on disk is read too
            p = patches(world / "ct-set", (16, 16, 16), cache=cache, normalize=how, folder=tmp_path / cache)
        crops.append(torch.stack([p[Slot(step, 0, step % 3)]["image"] for step in range(6)]))
    assert torch.equal(crops[0], crops[1]) and torch.equal(crops[0], crops[2])
    other = Normalization("window", (0.0, 100.0))  # in the same folder, and not taken for the first
    p = patches(world / "ct-set", (16, 16, 16), cache="disk", normalize=other, folder=tmp_path / "disk")
    assert not torch.equal(p[Slot(0, 0, 0)]["image"], crops[0][0])


def predicted(run: Path, out: Path, *args: object) -> np.ndarray:
    predict.main(["--checkpoint", str(run), *map(str, args), "-o", str(out), "--device", "cpu", "--threads", "1",
                  "--probabilities", "float32"])  # fmt: skip
    return read_image(next(out.glob("*_probability.nii.gz")))[0]


def test_a_scan_is_predicted_in_the_window_of_the_training(world, tmp_path):
    """What lies outside of the window does not count, and the same window of the scan's own values does."""
    hu, _ = ct(0)
    usual = predicted(world / "run", tmp_path / "a", world / "ct" / "images" / "p0.nii.gz")
    beyond = np.where(hu > 2000, 1500, np.where(hu < -500, -300, hu))
    same = predicted(world / "run", tmp_path / "b", write(tmp_path / "p.nii.gz", beyond.astype(np.float32)))
    np.testing.assert_allclose(same, usual, atol=1e-4)
    moved = predicted(world / "run", tmp_path / "c", write(tmp_path / "q.nii.gz", hu.astype(np.float32) + 60))
    assert np.abs(moved - usual).max() > 1e-3


def test_a_test_scores_what_a_prediction_of_the_raw_scan_says(tmp_path, world):
    """The set's cases are whole scans here, so that both see the same voxels."""
    convert.main(["--source", str(world / "ct"), "--out", str(tmp_path / "set")])
    run = train(tmp_path / "set", tmp_path / "run", "--normalize", "window", "--window", "40", "400")
    state = load_checkpoint(run)
    assert (state["options"]["normalize"], state["options"]["window"]) == ("window", [40.0, 400.0])
    test_la.main(["--checkpoint", str(run), "--device", "cpu", "--stride", "16", "16", "8", "--save", "all"])
    (name,) = (tmp_path / "set" / "test.list").read_text().split()
    scan = world / "ct" / "images" / f"{name}.nii.gz"
    predict.main(["--checkpoint", str(run), str(scan), "-o", str(tmp_path / "out"),
                  "--stride", "16", "16", "8", "--device", "cpu"])  # fmt: skip
    ours = read_image(tmp_path / "out" / f"{name}.nii.gz")[0]
    theirs, _ = read_image(run / "test" / "predictions" / "seg" / f"{name}.nii.gz")
    np.testing.assert_array_equal(turned(ours, OBLIQUE)[0], theirs)


def test_a_window_that_shows_nothing_is_refused(world, tmp_path, tiny_set):
    """HU of a set whose cases hold no HU, in training, tests and predictions; a window too many."""
    with pytest.raises(UserError, match=r"set has 1 channel, and --window names 2 windows\. Give one"):
        train(tiny_set, tmp_path / "x", "--normalize", "window", "--window", "40", "400", "50", "100")
    with pytest.raises(UserError, match=r"case00: .* almost all alike in --window 40 400"):
        train(tiny_set, tmp_path / "x", "--normalize", "window", "--window", "40", "400")
    with pytest.raises(UserError, match=r"case08: .* almost all alike in --window 40 400"):
        test_la.main(["--checkpoint", str(world / "run"), "--data", str(tiny_set), "--device", "cpu"])
    path = write(tmp_path / "p.nii.gz", ct(0)[0].astype(np.float32) / 1000)
    with pytest.raises(UserError, match=r"intensities from -1.05\d* to 3, which are almost all alike"):
        predicted(world / "run", tmp_path / "out", path)


def test_a_run_keeps_to_its_window(world, tmp_path):
    shutil.copytree(world / "run", tmp_path / "run")
    with pytest.raises(UserError, match=r"--window: \[40.0, 400.0\] before, \[40.0, 300.0\] now"):
        train_dtml.main(["--resume", str(tmp_path / "run"), "--window", "40", "300"])
    again = command_line.read_options([f"@{world / 'run' / 'options.txt'}", "--seed", "2"])[0]
    assert (again.normalize, again.window) == ("window", [40.0, 400.0])
    other = train(world / "ct-set", tmp_path / "other", "--normalize", "window", "--window", "-600", "1500")
    with pytest.raises(UserError, match="differ in --window"):
        predict.main(["--checkpoint", str(world / "run"), str(other), str(world / "ct" / "images" / "p0.nii.gz"),
                      "-o", str(tmp_path / "out")])  # fmt: skip


def test_attributes_that_are_no_scaling_are_refused(world, tmp_path):
    case, image, _ = raw_values(world, "ct", 0)
    path = tmp_path / "a.h5"
    shutil.copy(case.path, path)
    with h5py.File(path, "r+") as f:
        f.attrs["sd"] = 0.0
    with pytest.raises(CaseError, match="which are no scaling"):
        normalized_case(Case("a", path, True), image, WINDOW)
