"""The DICOM-SEG of a series: the voxels, places and names of the NIfTI, read back by pydicom and by highdicom."""

import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from test_predict import predicted, scan
from test_predict_folders import SHAPE, UID, bright, values_of, world, write_series

from dataloaders.cases import CaseError
from dataloaders.dicom import read_series, series_in
from tools.dicom_seg import dicom_seg
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
