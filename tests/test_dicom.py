"""DICOM series against pydicom's reading: files of a scanner, each slice with a scale of its own, compressed voxels."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from series import SHAPE, locale_kept, write_series

from dataloaders.cases import CaseError
from dataloaders.dicom import is_damaged, is_dicom, read_series, series_in
from tools.given_scans import given_scans
from utils.errors import UserError

pydicom = pytest.importorskip("pydicom")
FILES = Path(pydicom.__file__).parent / "data" / "test_files"
CT = FILES / "dicomdirtests" / "98892001" / "CT5N"


def by_pydicom(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (W,H,D) and the matrix (3,4) from their indices to mm, LPS; slices in the order along their normal."""
    slices = [pydicom.dcmread(path) for path in folder.iterdir()]
    x, y = np.array(slices[0].ImageOrientationPatient, float).reshape(2, 3)
    slices.sort(key=lambda one: np.cross(x, y) @ np.array(one.ImagePositionPatient, float))
    first, last = (np.array(slices[i].ImagePositionPatient, float) for i in (0, -1))
    down, right = map(float, slices[0].PixelSpacing)
    voxels = np.stack([float(s.RescaleSlope) * s.pixel_array.T + float(s.RescaleIntercept) for s in slices], -1)
    return voxels, np.column_stack([x * right, y * down, (last - first) / (len(slices) - 1), first])


def changed(folder: Path, change) -> Path:
    """A copy of the scanner's series; `change` gets the number of a slice and its data set."""
    folder.mkdir()
    for i, path in enumerate(sorted(CT.iterdir())):
        one = pydicom.dcmread(path)
        change(i, one)
        one.save_as(folder / path.name)
    return folder


def scaled(i, one):
    one.RescaleSlope, one.RescaleIntercept = f"{0.1 + 0.37 * i:.3f}", str(-1000 + 13 * i)


def mixed(i, one):
    """Every other slice with stored values from 0, of as many bits as they need."""
    if i % 2:
        one.PixelData = (one.pixel_array.astype(int) + 4096).astype("<u2").tobytes()
        one.PixelRepresentation, one.RescaleIntercept = 0, float(one.RescaleIntercept) - 4096
        one.BitsStored, one.HighBit = 16, 15
        one.pop("PixelPaddingValue", None)


@pytest.mark.parametrize("change", [lambda i, one: None, scaled, mixed], ids=["as scanned", "own scales", "signs"])
def test_equal_to_pydicom_on_a_scanners_files(change, tmp_path):
    folder = changed(tmp_path / "ct", change)
    (series,) = series_in(folder)
    image, geometry = read_series(series.files)
    expected, matrix = by_pydicom(folder)
    assert expected.min() < -800 and expected.max() > 0
    np.testing.assert_allclose(image, expected, rtol=1e-6, atol=1e-4)
    axes = np.reshape(geometry["direction"], (3, 3)) * geometry["spacing"]
    np.testing.assert_allclose(np.column_stack([axes, geometry["origin"]]), matrix, atol=1e-9)


@pytest.mark.parametrize("kind", ["JPEG2000", "JPEGLS"])
@locale_kept()
def test_compressed_voxels_are_read_and_a_cut_file_is_named(kind, tmp_path):
    """GDCM reads a file whose compressed voxels do not end without end itself, and fills the memory."""
    values = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)
    plain = write_series(tmp_path / "plain", values)
    folder = tmp_path / "compressed"
    folder.mkdir()
    for path in plain.iterdir():
        one = pydicom.dcmread(path)
        if kind == "JPEGLS":
            one.compress(pydicom.uid.JPEGLSLossless, generate_instance_uid=False)
            one.save_as(folder / path.name)
        else:
            writer = sitk.ImageFileWriter()
            writer.KeepOriginalImageUIDOn()
            writer.UseCompressionOn()
            writer.SetFileName(str(folder / path.name))
            writer.Execute(sitk.ReadImage(str(path)))
    assert (read_series(series_in(folder)[0].files)[0] == read_series(series_in(plain)[0].files)[0]).all()
    content = (folder / "IM003.dcm").read_bytes()
    for less in (1, 9, 60):
        (folder / "IM003.dcm").write_bytes(content[:-less])
        with pytest.raises(UserError, match=r"compressed holds files that are cut short: IM003.dcm. Copy them again"):
            given_scans([str(folder)], [], 1)


def test_an_rt_dose_that_stops_the_reading_is_named(tmp_path):
    folder = changed(tmp_path / "ct", lambda i, one: None)
    for name in ("rtdose_1frame.dcm", "rtstruct.dcm", "test-SR.dcm"):  # the others have no voxels, and are passed over
        shutil.copy(FILES / name, folder)
    with pytest.raises(UserError, match=r"ct holds DICOM that is no series of slices: .*rtdose_1frame.dcm.* Move it"):
        given_scans([str(folder)], [], 1)
    (folder / "rtdose_1frame.dcm").unlink()
    (scan,) = given_scans([str(folder)], [], 1)
    assert len(scan.slices) == 5


@pytest.mark.parametrize(
    ("characters", "description"),
    [("ISO_IR 100", "Schädel"), ("ISO_IR 192", "Schädel"), ("ISO 2022 IR 100", "Crâne"), ("ISO_IR 144", "Череп"),
     ("ISO_IR 101", "Łąka"), ("ISO_IR 148", "baş"), ("ISO_IR 13", "ｱﾀﾏ"), ("ISO_IR 166", "ศีรษะ"), ("ISO_IR 6", "CT")],
)  # fmt: skip
def test_a_description_is_in_the_characters_that_pydicom_writes(characters, description, tmp_path):
    def described(i, one):
        one.SpecificCharacterSet, one.SeriesDescription = characters, description

    folder = changed(tmp_path / "ct", described)
    (series,) = series_in(folder)
    assert series.description == description
    (scan,) = given_scans([str(folder)], [description.upper()], 1)
    assert len(scan.slices) == 5
    with pytest.raises(UserError, match=r"ct holds 1 DICOM series, and --series Sch del fits none of them\."):
        given_scans([str(folder)], ["Sch del"], 1)


def test_what_pydicom_reads_is_whole_and_what_is_cut_is_damaged():
    """Of every transfer syntax, also DICOMDIRs and reports, which GDCM leaves out as it does damaged files."""
    files = [path for path in FILES.rglob("*") if path.is_file() and is_dicom(path)]
    assert len(files) > 100
    for path in files:
        content = path.read_bytes()
        assert is_damaged(content) == ("truncated" in path.name), path.name
        deflated = path.name == "image_dfl.dcm"
        assert all(is_damaged(content[:size]) for size in (0, 100, len(content) - 1)) or deflated, path.name


def test_reports_beside_a_series_are_passed_over_and_a_cut_one_is_refused(tmp_path, capsys):
    folder = changed(tmp_path / "ct", lambda i, one: None)
    others = [FILES / "test-SR.dcm", FILES / "rtplan.dcm", FILES / "dicomdirtests" / "DICOMDIR"]
    for path in others:
        shutil.copy(path, folder)
    (scan,) = given_scans([str(folder)], [], 1)
    assert len(scan.slices) == 5
    assert f"not read in {folder}: DICOMDIR, rtplan.dcm, test-SR.dcm." in capsys.readouterr().err
    shutil.copy(FILES / "rtplan_truncated.dcm", folder / "rtplan.dcm")
    with pytest.raises(UserError, match=r"ct holds files that are cut short or no DICOM: rtplan\.dcm\. Copy them"):
        given_scans([str(folder)], [], 1)


def test_a_slice_in_another_direction_is_named(tmp_path):
    def turned(i, one):
        if i == 2:
            one.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]

    folder = changed(tmp_path / "ct", turned)
    with pytest.raises(CaseError, match=rf"several directions.*{sorted(CT.iterdir())[2].name}.* Move those"):
        read_series(series_in(folder)[0].files)
