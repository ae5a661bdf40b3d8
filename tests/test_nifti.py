"""Headers of scans: what they contradict themselves in is refused or told, what they do not tell is not made up, and a
result keeps its scan's own header."""

import gzip
import itertools
import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from headers import AFFINE, ARRAY, FLIP, RNG, SHAPE, meta, nifti, nrrd, rows, turned_by
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scans import OBLIQUE, write

from dataloaders.cases import CaseError
from dataloaders.images import read_image, read_label, to_physical, write_image
from dataloaders.orientation import orientation_of
from utils.errors import UserError


def affine_of(geometry: dict) -> np.ndarray:
    """RAS, of what was read."""
    axes = np.reshape(geometry["direction"], (3, 3)) * geometry["spacing"]
    return FLIP @ np.vstack([np.column_stack([axes, geometry["origin"]]), [0, 0, 0, 1]])


# -- what is read --


@pytest.mark.parametrize(
    ("number", "kind", "ending"),
    [
        (number, (nibabel.Nifti1Image, nibabel.Nifti2Image)[i % 2], (".nii", ".nii.gz")[i % 3 > 0])
        for i, number in enumerate(["uint8", "int16", ">i2", "uint32", "float32", ">f4", "float64", ">f8", "int64"])
    ],
)
def test_voxels_and_places_are_those_of_nibabel(kind, ending, number, tmp_path):
    array = RNG.integers(0, 200, SHAPE).astype(number)
    order = "big" if number.startswith(">") else "little"
    image = kind(array, AFFINE, kind.header_class(endianness=order), dtype=number)
    nibabel.save(image, tmp_path / f"a{ending}")
    result, geometry = read_image(tmp_path / f"a{ending}")
    loaded = nibabel.load(tmp_path / f"a{ending}")
    assert loaded.header.endianness == {"big": ">", "little": "<"}[order]
    assert result.dtype == np.float32 and (result == loaded.get_fdata()).all() and result.flags.c_contiguous
    np.testing.assert_allclose(affine_of(geometry), loaded.affine, atol=1e-5)
    label, _ = read_label(tmp_path / f"a{ending}")
    assert (label == array).all() and label.dtype.kind in "iu" and label.dtype.isnative


@pytest.mark.parametrize(
    ("sform_code", "qform_code", "qfac"),
    [(s, q, (1.0, -1.0, 0.0)[(s + q) % 3]) for s, q in itertools.product((0, 1, 4), (0, 1, 2))],
)
def test_the_form_that_counts_is_nibabel_s(sform_code, qform_code, qfac, tmp_path, capfd):
    path = nifti(tmp_path / "a.nii", sform_code=sform_code, qform_code=qform_code, **rows(turned_by(10) @ AFFINE))
    header = nibabel.load(path).header
    pixdim = header["pixdim"].copy()
    pixdim[0] = qfac
    path = nifti(
        tmp_path / "a.nii", sform_code=sform_code, qform_code=qform_code, **rows(turned_by(10) @ AFFINE), pixdim=pixdim
    )
    _, geometry = read_image(path)
    said = capfd.readouterr().err
    if not sform_code and not qform_code:
        assert set(geometry) == {"spacing"} and not said
    else:
        np.testing.assert_allclose(affine_of(geometry), nibabel.load(path).affine, atol=1e-4)
        assert said.count("its sform and its qform lie up to") == bool(sform_code and qform_code)
        assert ("built on ITK" in said) == (sform_code > 1 and qform_code > 0)
        picture = sitk.ReadImage(str(path))
        itk = picture.TransformContinuousIndexToPhysicalPoint((1.0, 2.0, 3.0))
        if "built on ITK" not in said:  # elsewhere ITK has the same rule
            np.testing.assert_allclose(to_physical(geometry, (1, 2, 3)), itk, atol=1e-4)
        else:
            assert np.abs(to_physical(geometry, (1, 2, 3)) - itk).max() > 1
    np.testing.assert_allclose(geometry["spacing"], OBLIQUE["spacing"], rtol=1e-6)


@pytest.mark.parametrize(("scale", "axis", "qform_code"), [(0.98, 0, 0), (1.02, 1, 1), (1000.0, 2, 0), (0.0, 0, 1)])
def test_lengths_that_contradict_each_other_are_refused(scale, axis, qform_code, tmp_path):
    affine = AFFINE.copy()
    affine[:, axis] *= scale
    path = nifti(tmp_path / "a.nii.gz", **rows(affine), qform_code=qform_code)
    made = [mm * (scale if i == axis else 1) for i, mm in enumerate(OBLIQUE["spacing"])]
    both = "pixdim and qform" if qform_code else "pixdim"
    for read in (read_image, read_label):
        with pytest.raises(CaseError) as e:
            read(path)
        assert f"its sform makes voxels of {' x '.join(f'{mm:g}' for mm in made)} mm" in str(e.value)
        assert f"its {both} of 0.8 x 1 x 1.7 mm" in str(e.value)
    path = nifti(tmp_path / "b.nii.gz", **rows(affine), sform_code=0)  # a form that is not used contradicts nothing
    assert read_image(path)[1]["spacing"] == pytest.approx(OBLIQUE["spacing"])


@pytest.mark.parametrize(
    ("value", "axis", "sform_code", "qform_code"), [(0, 1, 1, 0), (np.nan, 2, 0, 1), (np.inf, 3, 0, 0), (-1.0, 1, 0, 1)]
)
def test_a_pixdim_that_is_no_length_is_refused(value, axis, sform_code, qform_code, tmp_path):
    pixdim = nibabel.load(nifti(tmp_path / "a.nii")).header["pixdim"].copy()
    pixdim[axis] = value
    path = nifti(tmp_path / "a.nii", sform_code=sform_code, qform_code=qform_code, pixdim=pixdim)
    for read in (read_image, read_label):
        with pytest.raises(CaseError, match=r"mm \(pixdim\), which must be above 0"):
            read(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (rows(np.full((4, 4), np.nan)), "has a sform that is not all numbers"),
        ({"srow_x": (np.inf, 0, 0, 0)}, "has a sform that is not all numbers"),
        ({"sform_code": 0, "quatern_b": np.nan}, "has a qform whose quaternion, nan"),
        ({"sform_code": 0, "quatern_b": 1.0, "quatern_c": 1.0}, "is longer than 1"),
        ({"qoffset_x": np.nan}, "has a qform that is not all numbers"),
        ({"xyzt_units": 1}, "states its lengths in metres"),
        ({"xyzt_units": 8 + 3}, "states its lengths in microns"),
        ({"scl_inter": np.nan}, "a scl_inter of nan"),
        ({"magic": b"ni1"}, r"is the header of a pair of files, .hdr and .img"),
        ({"magic": b""}, "is damaged or incomplete"),
        ({"datatype": 9999}, "that the standard does not know, datatype 9999"),
        ({"datatype": 128}, "has voxels of RGB, where one number must stand"),
        ({"datatype": 32}, "has voxels of complex64, where one number must stand"),
        ({"dim": [3, 7, -6, 5, 1, 1, 1, 1]}, "and so none"),
        ({"dim": [3, 7, 6, 0, 1, 1, 1, 1]}, "and so none"),
        ({"dim": [2, 7, 6, 5, 1, 1, 1, 1]}, "has 2 dimensions"),
        ({"dim": [4, 7, 6, 1, 5, 1, 1, 1]}, "has 4 dimensions"),
        ({"vox_offset": np.nan}, "begin at byte nan"),
        ({"vox_offset": 1e30}, "begin at byte 1e.30"),
        ({"vox_offset": 100}, "begin at byte 100, where they cannot"),
    ],
)
def test_a_header_that_is_none_is_refused(fields, message, tmp_path):
    path = nifti(tmp_path / "a.nii", **fields)
    for read in (read_image, read_label):
        with pytest.raises(CaseError, match=message):
            read(path)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(st.lists(st.tuples(st.integers(0, 351), st.integers(1, 255)), min_size=1, max_size=4))
def test_any_damage_to_a_header_is_named_or_harmless(tmp_path, changes):
    data = bytearray(nifti(tmp_path / "a.nii").read_bytes())
    for place, change in changes:
        data[place] ^= change
    (tmp_path / "a.nii").write_bytes(data)
    try:
        image, geometry = read_image(tmp_path / "a.nii")
    except CaseError:
        return
    assert image.ndim == 3 and np.isfinite(image).all() and min(geometry["spacing"]) > 0
    assert all(np.isfinite(values).all() for values in geometry.values())


@pytest.mark.parametrize("units", [0, 2, 10, 8])
def test_lengths_in_mm_or_of_no_unit_are_mm(units, tmp_path):
    assert read_image(nifti(tmp_path / "a.nii", xyzt_units=units))[1]["spacing"] == pytest.approx(OBLIQUE["spacing"])


@pytest.mark.parametrize(
    ("ending", "kind", "value"),
    [(".nii", ">f4", np.nan), (".nii.gz", "float64", np.inf), (".nrrd", "float32", -np.inf),
     (".mha", "float64", np.nan)],
)  # fmt: skip
def test_values_that_are_no_numbers_are_refused(ending, kind, value, tmp_path):
    array = np.ones(SHAPE, kind)
    array[3, 2, 1] = value
    if ".nii" in ending:
        path = nifti(tmp_path / f"a{ending}", array=array)
    else:
        path = write(tmp_path / f"a{ending}", array.astype(array.dtype.newbyteorder("=")))
    with pytest.raises(CaseError, match="not a number or infinite"):
        read_image(path)
    with pytest.raises(CaseError, match=r"holds (nan|-?inf), and labels are integers"):
        read_label(path)


@pytest.mark.parametrize(
    ("slope", "inter"),
    [(0.5, 3.0), (2.0, 0.0), (1.0, -7.0), (0.0, 5.0), (0.1, 0.0), (np.nan, 0.0), (np.nan, np.nan), (np.inf, 0.0)],
)
def test_intensities_are_scaled_as_simpleitk_scales_them(slope, inter, tmp_path):
    path = nifti(tmp_path / "a.nii", scl_slope=slope, scl_inter=inter)
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).transpose(2, 1, 0)
    if slope:  # of 0 the standard says no scaling; SimpleITK still adds scl_inter
        np.testing.assert_allclose(read_image(path)[0], expected, rtol=1e-6)
    np.testing.assert_allclose(read_image(path)[0], nibabel.load(path).get_fdata(), rtol=1e-6)


def test_one_volume_of_four_dimensions_is_a_scan(tmp_path):
    image, geometry = read_image(nifti(tmp_path / "a.nii.gz", array=ARRAY[..., None]))
    assert (image == ARRAY).all() and geometry["spacing"] == pytest.approx(OBLIQUE["spacing"])


# -- what is written --


FIELDS = ("pixdim", "sform_code", "qform_code", "xyzt_units", "descrip", "aux_file", "toffset", "slice_code",
          "dim_info", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y",
          "srow_z")  # fmt: skip


def raw_header(path: Path, kind=nibabel.Nifti1Image):
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
        return kind.header_class(f.read(kind.header_class.sizeof_hdr), check=False)


@pytest.mark.parametrize(
    ("kind", "sform_code", "qform_code", "ending"),
    [(nibabel.Nifti1Image, 2, 1, ".nii.gz"), (nibabel.Nifti2Image, 4, 0, ".nii"), (nibabel.Nifti1Image, 0, 2, ".nii"),
     (nibabel.Nifti1Image, 0, 0, ".nii.gz")],
)  # fmt: skip
def test_a_result_has_the_header_of_its_scan(kind, sform_code, qform_code, ending, tmp_path):
    """Field by field as the file has it, so that every viewer, whatever its rule, lays it on the scan."""
    more = {"sform_code": sform_code, "qform_code": qform_code, "descrip": b"of a scanner", "toffset": 3.5,
            "cal_max": 9}  # fmt: skip
    pixdim = nibabel.load(nifti(tmp_path / "q.nii")).header["pixdim"].copy()
    pixdim[[0, 4]] = 0, 2.5
    more |= {"scl_slope": 2.0, "scl_inter": 1.0, "intent_code": 3, "xyzt_units": 10, "dim_info": 57, "pixdim": pixdim}
    scan = nifti(tmp_path / f"a{ending}", array=ARRAY, kind=kind, **rows(turned_by(7) @ AFFINE), **more)
    _, geometry = read_image(scan)
    for name, values in (("l", ARRAY.astype(np.uint8)), ("p", RNG.random(SHAPE).astype(np.float32))):
        write_image(tmp_path / f"{name}{ending}", values, geometry, like=scan)
        before, after = (raw_header(path, kind) for path in (scan, tmp_path / f"{name}{ending}"))
        for field in FIELDS:
            assert before[field].tobytes() == after[field].tobytes(), field
        assert [float(after[f]) for f in ("scl_slope", "scl_inter", "cal_max", "intent_code")] == [1, 0, 0, 0]
        loaded = nibabel.load(tmp_path / f"{name}{ending}")
        assert (loaded.get_fdata() == values).all() and loaded.get_data_dtype() == values.dtype
        assert (loaded.affine == nibabel.load(scan).affine).all()
        if kind is nibabel.Nifti1Image:
            result, source = (sitk.ReadImage(str(p)) for p in (tmp_path / f"{name}{ending}", scan))
            assert (sitk.GetArrayFromImage(result).transpose(2, 1, 0) == values).all()
            for what in ("GetSpacing", "GetOrigin", "GetDirection"):
                assert getattr(result, what)() == getattr(source, what)()


def test_a_header_that_went_away_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*b\.nii"):
        write_image(tmp_path / "b.nii", ARRAY, OBLIQUE, like=tmp_path / "gone.nii")
    (tmp_path / "half.nii").write_bytes(struct.pack("<i", 348))
    with pytest.raises(UserError, match=r"cannot write .*is cut short: 4 bytes"):
        write_image(tmp_path / "b.nii", ARRAY, OBLIQUE, like=tmp_path / "half.nii")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.nii"]


# -- NRRD and MetaImage, in the same words --


TILTED = AFFINE @ [[1, 0, 0, 0], [0, 1, 0.26 * 1.7, 0], [0, 0, 0.966, 0], [0, 0, 0, 1]]
LPS = ("space: left-posterior-superior", "space directions: (0.8,0,0) (0,1,0) (0,0,1.7)", "space origin: (1,2,3)")
UNNAMED = {"spacing", "origin", "unnamed_direction"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: nifti(t / "a.nii", TILTED), "y and z are at .* tilted gantry"),
        (lambda t: meta(t / "a.mha", TransformMatrix="1 0 0 0 1 0 0 0.27 0.963"), "y and z are at 74.34 degrees"),
        (lambda t: meta(t / "a.mhd.mha", TransformMatrix="0.8 0 0 0 1 0 0 0 1"), "no unit vectors but 0.8, 1, 1 long"),
        (lambda t: meta(t / "a.mha", TransformMatrix="1 0 0 0 1 0 0 0 0"), "has a direction of determinant 0"),
        (lambda t: meta(t / "a.mha", TransformMatrix="1 0 0 0 1 0 0 0 1.02"), "no unit vectors"),
        (lambda t: meta(t / "a.mha", DistanceUnits="um"), "states its lengths in um"),
        (lambda t: nrrd(t / "a.nrrd", LPS[0], "space directions: (1,0,0) (0,1,0) (0,0.5,1.7)", LPS[2]), "y and z are"),
        (lambda t: nrrd(t / "a.nrrd", *LPS, 'space units: "cm" "cm" "cm"'), "states its lengths in cm"),
    ],
)  # fmt: skip
def test_axes_that_are_no_grid_are_refused_in_every_format(make, message, tmp_path):
    for read in (read_image, read_label):
        with pytest.raises(CaseError, match=message):
            read(make(tmp_path))


@pytest.mark.parametrize(
    ("make", "known"),
    [
        (lambda t: meta(t / "a.mha"), {"spacing", "origin", "direction"}),
        (lambda t: meta(t / "a.mha", DistanceUnits="mm"), {"spacing", "origin", "direction"}),
        (lambda t: meta(t / "a.mha", TransformMatrix=""), {"spacing", "origin"}),
        (lambda t: meta(t / "a.mha", TransformMatrix="", Offset=""), {"spacing"}),
        (lambda t: meta(t / "a.mha", ElementSpacing=""), {"origin", "direction"}),
        (lambda t: nrrd(t / "a.nrrd", *LPS, 'space units: "mm" "mm" "mm"'), {"spacing", "origin", "direction"}),
        (lambda t: nrrd(t / "a.nrrd", "space: scanner-xyz", *LPS[1:]), UNNAMED),
        (lambda t: nrrd(t / "a.nrrd", "space dimension: 3", *LPS[1:]), UNNAMED),
        (lambda t: nrrd(t / "a.nrrd", "spacings: 0.8 1 1.7"), {"spacing"}),
        (lambda t: nrrd(t / "a.nrrd"), set()),
        (lambda t: write(t / "a.nrrd", ARRAY), {"spacing", "origin", "direction"}),
        (lambda t: write(t / "a.mha", ARRAY), {"spacing", "origin", "direction"}),
    ],
)
def test_what_a_header_does_not_tell_is_not_made_up(make, known, tmp_path):
    image, geometry = read_image(make(tmp_path))
    assert set(geometry) == known and (image == ARRAY).all()
    assert "spacing" not in known or geometry["spacing"] == pytest.approx((0.8, 1, 1.7))


def test_a_nrrd_in_ras_is_turned_into_the_frame_of_all_others(tmp_path):
    _, geometry = read_image(nrrd(tmp_path / "a.nrrd", "space: RAS", *LPS[1:]))
    assert orientation_of(geometry["direction"]) == "RAS" and geometry["origin"] == (-1.0, -2.0, 3.0)
