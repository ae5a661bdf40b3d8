"""Scans as files and their grids, with SimpleITK's own reader and closed forms as the judges."""

import os

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from scans import OBLIQUE, write
from scipy import ndimage

from dataloaders.cases import CaseError
from dataloaders.images import (
    WRITTEN_AS,
    anti_alias,
    ending_of,
    grid_of_spacing,
    read_image,
    read_label,
    resample,
    same_grid,
    scan_name,
    to_physical,
    write_image,
    z_score,
)

SHAPE = (12, 9, 7)
RNG = np.random.default_rng(0)
ENDINGS = sorted(set(WRITTEN_AS.values()))


@pytest.mark.parametrize("ending", [*ENDINGS, ".mhd"])
def test_what_simpleitk_wrote_is_read_with_its_axes_in_order(ending, tmp_path):
    array = RNG.standard_normal(SHAPE).astype(np.float32)
    image, geometry = read_image(write(tmp_path / f"a{ending}", array))
    picture = sitk.ReadImage(str(tmp_path / f"a{ending}"))
    assert image.shape == SHAPE == picture.GetSize() and image.dtype == np.float32 and image.flags.c_contiguous
    assert image[5, 3, 2] == picture[5, 3, 2] and (image == array).all()
    place = picture.TransformContinuousIndexToPhysicalPoint((5.5, 3.0, 2.25))
    np.testing.assert_allclose(to_physical(geometry, (5.5, 3.0, 2.25)), place, atol=1e-9)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_what_is_written_simpleitk_reads_with_values_and_geometry(ending, kind, tmp_path):
    array = RNG.integers(0, 9, SHAPE).astype(kind)
    write_image(tmp_path / "new" / f"a{ending}", array, OBLIQUE)
    picture = sitk.ReadImage(str(tmp_path / "new" / f"a{ending}"))
    assert (sitk.GetArrayFromImage(picture).transpose(2, 1, 0) == array).all()
    assert sitk.GetArrayFromImage(picture).dtype == kind
    for name, values in OBLIQUE.items():
        np.testing.assert_allclose(getattr(picture, f"Get{name.capitalize()}")(), values, atol=1e-5)
    assert os.listdir(tmp_path / "new") == [f"a{ending}"]


@pytest.mark.parametrize(
    ("path", "ending", "name"),
    [("a/b.nii.gz", ".nii.gz", "b"), ("b.c.NRRD", ".nrrd", "b.c"), ("x.txt", "", "x.txt"),
     ("P/mri_norm2.h5", ".h5", "P")],
)  # fmt: skip
def test_names_and_endings(path, ending, name, tmp_path):
    assert ending_of(tmp_path / path) == ending and scan_name(tmp_path / path) == name


def test_labels_stay_as_they_are_and_must_be_integers(tmp_path):
    label = RNG.integers(0, 1200, SHAPE).astype(np.float32)
    result, _ = read_label(write(tmp_path / "a.nii.gz", label))
    assert result.dtype.kind in "iu" and (result == label).all()
    with pytest.raises(CaseError, match=r"holds 0\.5, and labels are integers"):
        read_label(write(tmp_path / "b.nii.gz", np.where(label > 0, 0.5, 0)))
    with pytest.raises(CaseError, match="holds -1, and labels are 0 or above"):
        read_label(write(tmp_path / "c.nii.gz", -(label > 0).astype(np.int16)))


def test_normalise_is_zero_mean_and_unit_variance_in_float64s_judgement():
    image = (1000 + 3 * RNG.standard_normal((40, 30, 20))).astype(np.float32)
    scaled, mean, sd = z_score(image)
    assert scaled.dtype == np.float32 and (mean, sd) == (image.astype(float).mean(), image.astype(float).std())
    assert abs(scaled.astype(float).mean()) < 1e-4 and scaled.astype(float).std() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(scaled, (image.astype(float) - mean) / sd, atol=2e-4)
    with pytest.raises(CaseError, match=r"is constant \(7\)"):
        z_score(np.full(SHAPE, 7, np.float32))


@pytest.mark.parametrize("spacing", [(0.5, 0.5, 0.5), (1.1, 1.3, 0.9), (2.0, 0.7, 4.0), (0.8, 1.0, 3.1)])
def test_a_grid_of_another_spacing_keeps_middle_axes_and_extent(spacing):
    shape = (31, 22, 17)
    size, grid = grid_of_spacing(shape, OBLIQUE, spacing)
    assert grid["spacing"] == spacing and grid["direction"] == OBLIQUE["direction"]
    middles = [to_physical(g, (np.array(s) - 1) / 2) for g, s in ((OBLIQUE, shape), (grid, size))]
    np.testing.assert_allclose(*middles, atol=1e-9)
    extents = np.array(size) * spacing, np.array(shape) * OBLIQUE["spacing"]
    assert (np.abs(extents[0] - extents[1]) <= np.array(spacing) / 2 + 1e-9).all()


def test_the_scan_s_own_spacing_and_nearly_so_leaves_the_grid():
    for spacing in (None, OBLIQUE["spacing"], (0.80001, 1.0, 1.7)):
        assert grid_of_spacing(SHAPE, OBLIQUE, spacing) == (SHAPE, OBLIQUE)


@pytest.mark.parametrize("how", ["linear", "bspline"])
@pytest.mark.parametrize("spacing", [(0.5, 0.6, 0.7), (1.5, 0.9, 1.1), (2.0, 2.5, 3.0)])
def test_a_field_that_is_linear_in_mm_is_resampled_exactly(how, spacing):
    """Its value at a voxel is known from where the voxel lies: any slip of axes, origin or half voxels would show."""
    shape, slope = (30, 28, 26), np.array([0.3, -1.1, 0.7])

    def field(size, grid):
        index = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), axis=-1)
        return (to_physical(grid, index) @ slope).astype(np.float32)

    size, grid = grid_of_spacing(shape, OBLIQUE, spacing)
    inner = tuple(slice(side // 4, -(side // 4)) for side in size)
    np.testing.assert_allclose(
        resample(field(shape, OBLIQUE), OBLIQUE, size, grid, how)[inner], field(size, grid)[inner], atol=0.05
    )
    there = resample(field(shape, OBLIQUE), OBLIQUE, size, grid, how)
    back = resample(there, grid, shape, OBLIQUE, how)
    inner = tuple(slice(side // 4, -(side // 4)) for side in shape)
    np.testing.assert_allclose(back[inner], field(shape, OBLIQUE)[inner], atol=0.05)


def test_nothing_falls_off_the_edge():
    """Where the new grid reaches beyond the old one the nearest value counts, not zero."""
    size, grid = grid_of_spacing((5, 5, 5), OBLIQUE, (2.8, 3.4, 6.0))  # one voxel, smaller than the five
    there = resample(np.full((5, 5, 5), 3, np.float32), OBLIQUE, size, grid)
    np.testing.assert_allclose(there, 3, rtol=1e-6)
    np.testing.assert_allclose(resample(there, grid, (5, 5, 5), OBLIQUE), 3, rtol=1e-6)


def test_coarsening_averages_what_would_be_skipped():
    stripes = np.zeros((64, 4, 4), np.float32)
    stripes[::4] = 4  # mean 1
    size, grid = grid_of_spacing(stripes.shape, OBLIQUE, (3.2, 1.0, 1.7))
    plain = resample(stripes, OBLIQUE, size, grid, smooth=False)
    smooth = resample(stripes, OBLIQUE, size, grid)
    assert np.abs(smooth[2:-2] - 1).max() < 0.2 < np.abs(plain[2:-2] - 1).max()
    assert anti_alias(stripes, np.array([0.5, 1.0, 1.0])) is stripes


def test_grids_are_the_same_within_a_tenth_of_a_voxel():
    def shifted(by):
        return {**OBLIQUE, "origin": tuple(np.array(OBLIQUE["origin"]) + by)}

    assert same_grid(SHAPE, OBLIQUE, SHAPE, shifted(0.04)) and not same_grid(SHAPE, OBLIQUE, SHAPE, shifted(0.06))
    assert not same_grid(SHAPE, OBLIQUE, (12, 9, 8), OBLIQUE)
    assert not same_grid(SHAPE, OBLIQUE, SHAPE, {**OBLIQUE, "spacing": (0.8, 1.0, 1.8)})
    assert not same_grid(SHAPE, OBLIQUE, SHAPE, {**OBLIQUE, "direction": (1.0, 0, 0, 0, 1, 0, 0, 0, 1)})


@pytest.mark.parametrize("shape", [(12, 9, 2), (2, 9, 7), (2, 2, 2)])
def test_a_cubic_spline_over_two_slices_is_scipy_s(shape):
    """The mirrored spline between the slices and up to half a voxel beyond them."""
    image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    geometry = {**OBLIQUE, "spacing": (1.0, 1.0, 1.5)}
    size, grid = grid_of_spacing(shape, geometry, (0.8, 0.7, 0.6))
    ours = resample(image, geometry, size, grid, "bspline")
    step = np.array(grid["spacing"]) / geometry["spacing"]
    first = (np.array(shape) - 1) / 2 - (np.array(size) - 1) / 2 * step  # both grids have one centre
    index = np.moveaxis(first + np.indices(size).transpose(1, 2, 3, 0) * step, -1, 0)
    expected = ndimage.map_coordinates(image.astype(np.float64), index, order=3, mode="mirror")
    within = [(i >= -0.5) & (i <= side - 0.5) for i, side in zip(index, shape, strict=True)]
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours[np.all(within, axis=0)], expected[np.all(within, axis=0)], atol=1e-5)


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".mhd", ".nii", ".nii.gz"])
def test_endings_in_capitals_are_read(ending, tmp_path):
    label = np.random.default_rng(0).integers(0, 3, (7, 6, 5)).astype(np.uint8)
    path = write(tmp_path / f"scan{ending}", label)
    found, geometry = read_label(path.rename(tmp_path / f"SCAN{ending.upper()}"))
    assert (found == label).all()
    np.testing.assert_allclose(geometry["origin"], OBLIQUE["origin"], atol=1e-4)


def test_labels_that_a_header_scales_are_the_integers_that_are_meant(tmp_path):
    """As nibabel writes floats of 0 to 17 into a file of bytes: 3 is 45 x 0.0666667, which is 3.0000002 in 32 bits."""
    label = np.arange(18.0).repeat(2).reshape(3, 3, 4)
    picture = nibabel.Nifti1Image(label, np.eye(4))
    picture.set_data_dtype(np.uint8)
    nibabel.save(picture, tmp_path / "label.nii.gz")
    found, _ = read_label(tmp_path / "label.nii.gz")
    assert (found == label).all() and found.dtype.kind == "i"
