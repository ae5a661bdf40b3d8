"""Folders that hold several DICOM series, and series of several patients whose folders have one name."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from test_predict import predicted
from test_predict_folders import UID, bright, rows_of, values_of, world, write_series

from dataloaders.images import read_label
from tools.given_scans import given_scans
from utils.errors import UserError

__all__ = ["bright", "world"]  # fixtures


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
