"""--normalize scan: against numpy, in every cache, through training, test and prediction."""

import h5py
import numpy as np
import pytest
import torch
from conftest import TINY, make_set
from test_data import volumes

import predict
import test_la
import train_dtml
from dataloaders.cases import read_case
from dataloaders.images import read_image
from dataloaders.normalization import NONE, Normalization, normalized, scalings_of
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
