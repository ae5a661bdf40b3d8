"""The DICOM-SEG of a series, read back by pydicom and by highdicom; folders of several series."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from series import SHAPE, UID, write_series
from test_predict import predicted, scan
from test_predict_folders import bright, rows_of, values_of, world

from dataloaders.cases import CaseError
from dataloaders.dicom import read_series, series_in
from dataloaders.images import read_label
from tools.dicom_seg import dicom_seg
from tools.given_scans import given_scans
from utils.errors import UserError

__all__ = ["bright", "world"]  # fixtures


def made(folder: Path) -> tuple[tuple[str, ...], dict]:
    """The files of a series and its geometry."""
    files = series_in(write_series(folder, np.zeros(SHAPE, np.int16)))[0].files
    return files, read_series(files)[1]


def test_the_object_has_the_voxels_of_the_nifti_at_their_places_in_mm(world, tmp_path, bright):
    """Frame by frame with pydicom alone: position, orientation and size of a pixel give each voxel's place."""
    pydicom = pytest.importorskip("pydicom")
    pytest.importorskip("highdicom")
    series = write_series(tmp_path / "patient7", values_of(world))
    out = predicted(world / "runs" / "dtml", [series, scan(world, 1)], tmp_path / "out", "--dicom-seg")
    assert {path.name for path in out.glob("*.dcm")} == {"patient7_seg.dcm"}
    seg = pydicom.dcmread(out / "patient7_seg.dcm")
    nifti = sitk.ReadImage(str(out / "patient7.nii.gz"))
    expected = {tuple(map(int, i)) for i in np.argwhere(sitk.GetArrayFromImage(nifti).transpose(2, 1, 0))}
    shared = seg.SharedFunctionalGroupsSequence[0]
    cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(2, 3)
    down, across = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    there = set()
    for frame, group in zip(seg.pixel_array, seg.PerFrameFunctionalGroupsSequence, strict=True):
        corner = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        for row, column in np.argwhere(frame):
            place = corner + column * across * cosines[0] + row * down * cosines[1]
            there.add(nifti.TransformPhysicalPointToIndex(place.tolist()))
    assert there == expected and 100 < len(there) < np.prod(SHAPE) / 4
    assert [one.SegmentLabel for one in seg.SegmentSequence] == ["left atrium"]
    assert seg.SegmentSequence[0].SegmentAlgorithmName == "Supervised, seg"
    assert (seg.Modality, seg.FrameOfReferenceUID, seg.StudyInstanceUID) == ("SEG", f"{UID}.8", f"{UID}.9")
    (source,) = seg.ReferencedSeriesSequence
    assert source.SeriesInstanceUID == f"{UID}.1" and len(source.ReferencedInstanceSequence) == SHAPE[2]
    with pytest.raises(UserError, match=r"patient7_seg\.dcm exists already"):
        (out / "patient7.nii.gz").unlink()
        predicted(world / "runs" / "dtml", [series], out, "--dicom-seg")
    predicted(world / "runs" / "other", [series], out, "--overwrite")
    assert not (out / "patient7_seg.dcm").exists(), "it is of the prediction before"


@pytest.mark.parametrize("present", [(1, 2, 3), (3,), ()])
def test_several_classes_come_back_with_their_names_and_grid(present, tmp_path):
    """The series states another distance between its slices than their positions have, as headers do."""
    hd = pytest.importorskip("highdicom")
    files, geometry = made(tmp_path / "series")
    label = np.random.default_rng(0).choice(np.array([0, *present], np.uint8), SHAPE)
    data = dicom_seg(label, geometry, files, classes=3, names={1: "left atrium", 3: "x" * 80}, method="dtml")
    (tmp_path / "seg.dcm").write_bytes(data)
    seg = hd.seg.segread(tmp_path / "seg.dcm")
    assert [one.SegmentLabel for one in seg.SegmentSequence] == ["left atrium", "class 2", "x" * 64]
    if not present:
        assert not seg.pixel_array.any()
        return
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(geometry["direction"], (3, 3)) * geometry["spacing"]
    affine[:3, 3] = geometry["origin"]
    grid = hd.VolumeGeometry(affine, SHAPE, coordinate_system="PATIENT")
    assert np.array_equal(seg.get_volume(combine_segments=True).match_geometry(grid).array, label)


def test_what_a_series_lacks_is_named(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    pytest.importorskip("highdicom")
    files, geometry = made(tmp_path / "series")
    for file in files:  # GDCM reads those without the preamble of 128 bytes and DICM too
        Path(file).write_bytes(Path(file).read_bytes()[132:])
        image = pydicom.dcmread(file, force=True)
        del image.FrameOfReferenceUID
        image.save_as(file)
    with pytest.raises(
        CaseError, match=r"cannot be written as DICOM-SEG .*Frame Of Reference UID.*Leave out --dicom-seg"
    ):
        dicom_seg(np.ones(SHAPE, np.uint8), geometry, files, classes=1, names={}, method="dtml")


def test_without_a_series_or_the_package_it_is_refused_before_anything_is_predicted(world, tmp_path, monkeypatch):
    run, out = world / "runs" / "dtml", tmp_path / "out"
    with pytest.raises(UserError, match="--dicom-seg does nothing here: no DICOM series"):
        predicted(run, [scan(world)], out, "--dicom-seg")
    monkeypatch.setitem(sys.modules, "highdicom", None)
    series = write_series(tmp_path / "patient7", values_of(world))
    with pytest.raises(UserError, match=r"needs the package highdicom .* pip install -r requirements-dicom\.txt"):
        predicted(run, [series], out, "--dicom-seg")
    assert not out.exists()


# -- several series --


def test_of_several_series_one_is_chosen_by_its_uid(world, tmp_path, bright):
    values, run = values_of(world), world / "runs" / "dtml"
    write_series(tmp_path / "both", values[..., :12], f"{UID}.2", description="T2 TSE", prefix="B")
    write_series(tmp_path / "both", values, f"{UID}.1", description="T1 MPRAGE", prefix="A")
    with pytest.raises(UserError) as caught:
        predicted(run, [tmp_path / "both"], tmp_path / "out")
    assert "both holds 2 DICOM series. Choose with --series: UIDs, descriptions, or all:" in str(caught.value)
    assert [" ".join(line.split()) for line in str(caught.value).splitlines()[1:]] == [
        f"{UID}.1 18 slices, MR, T1 MPRAGE", f"{UID}.2 12 slices, MR, T2 TSE"
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"holds 2 DICOM series"):
        predicted(run, [tmp_path / "both"], tmp_path / "out", "--series", "1.2.3")
    assert not (tmp_path / "out").exists()
    out = predicted(run, [tmp_path / "both"], tmp_path / "out", "--series", f"{UID}.2")
    assert read_label(out / "both.nii.gz")[0].shape == (30, 28, 12)
    with pytest.raises(UserError, match=r"--series 1.2.3 is in none of the folders"):
        predicted(run, [write_series(tmp_path / "one", values)], tmp_path / "out", "--series", "1.2.3")


def test_several_series_are_predicted_by_one_command(world, tmp_path, bright):
    """Each under a name of its own, and to the voxel as alone: of one folder, and of folders of one name."""
    values, run = values_of(world), world / "runs" / "dtml"
    for i, (patient, description) in enumerate([("p1", "T1 MPRAGE"), ("p1", "T2/TSE"), ("p2", "t1 mprage")]):
        folder = tmp_path / patient / "MR"
        write_series(folder, np.roll(values, 2 * i, 0), f"{UID}.{i}", description=description, prefix="ABC"[i])
    words = [tmp_path / "*" / "MR"]
    alone = [
        predicted(run, [tmp_path / patient / "MR"], tmp_path / f"alone{i}", "--series", f"{UID}.{i}") / "MR.nii.gz"
        for i, patient in enumerate(("p1", "p1", "p2"))
    ]
    expected = [sitk.GetArrayFromImage(sitk.ReadImage(str(path))).tolist() for path in alone]
    for chosen, where in {
        ("T1 mprage",): {"p1_MR": 0, "p2_MR": 2},
        (f"{UID}.1",): {"p1_MR": 1, "p2_MR": 2},  # one alone in its folder needs no UID
        (f"{UID}.1", f"{UID}.0"): {"MR_T1_MPRAGE": 0, "MR_T2_TSE": 1, "MR": 2},
        ("all",): {"MR_T1_MPRAGE": 0, "MR_T2_TSE": 1, "MR": 2},
    }.items():
        out = predicted(run, words, tmp_path / "out", "--series", *chosen)
        assert {row["scan"] for row in rows_of(out)} == {*where}
        for name, i in where.items():
            assert sitk.GetArrayFromImage(sitk.ReadImage(str(out / f"{name}.nii.gz"))).tolist() == expected[i]
        shutil.rmtree(out)
    with pytest.raises(UserError, match=rf"p2/MR holds 1 DICOM series.*\n  {UID}.2  18 slices, MR, t1 mprage"):
        predicted(run, words, tmp_path / "out", "--series", "T2/TSE")


def test_series_of_one_description_are_called_by_their_uids_and_listed_with_their_patients(world, tmp_path):
    folder = tmp_path / "export"
    for i in (1, 2):
        write_series(folder, values_of(world), f"{UID}.{i}", prefix="AB"[i - 1], patient=f"ID{i}")
    with pytest.raises(UserError, match=rf"\n  {UID}.1  18 slices, MR, T1, patient ID1\n  {UID}.2 .* patient ID2$"):
        given_scans([str(folder)], (), 1)
    scans = given_scans([str(folder)], ["T1"], 1)
    assert [scan.name for scan in scans] == [f"export_{UID}.1", f"export_{UID}.2"]
    assert [Path(scan.slices[0]).name[0] for scan in scans] == ["A", "B"]
