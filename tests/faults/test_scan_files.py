"""Scans that are no scans, and disks that do not keep what is written."""

import os
import resource
import signal
import struct

import numpy as np
import pytest
import SimpleITK as sitk
from scans import OBLIQUE, write

from dataloaders.cases import CaseError
from dataloaders.images import read_image, write_image
from evaluation import statistics
from tools import case_of_scan
from tools.volumes import read_volumes, write_volumes
from utils.errors import UserError

SHAPE = (12, 9, 7)


@pytest.mark.parametrize(
    ("ending", "share"),
    [(".nii", 0.0), (".nii", 0.97), (".nii.gz", 0.05), (".nii.gz", 0.97), (".nrrd", 0.5), (".mha", 0.97)],
)
def test_39_a_scan_cut_short_is_refused(ending, share, tmp_path):
    path = write(tmp_path / f"a{ending}", np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CaseError, match=r"is cut short|is damaged or incomplete"):
        read_image(path)


@pytest.mark.parametrize("cut", ["a.mha", "a.raw", "a.mhd"])
def test_39_a_metaimage_is_damaged_without_a_reason_that_is_another_s_and_a_missing_file_is_named(cut, tmp_path):
    for name in ("a.mha", "a.mhd"):
        write(tmp_path / name, np.ones(SHAPE, np.float32))
    whole = (tmp_path / cut).read_bytes()
    (tmp_path / cut).write_bytes(whole[: len(whole) // 2])
    scan = (tmp_path / cut).with_suffix(".mha" if cut == "a.mha" else ".mhd")
    with pytest.raises(CaseError, match=r"^is damaged or incomplete$"):
        read_image(scan)
    (tmp_path / cut).write_bytes(whole)
    assert read_image(scan)[0].shape == SHAPE
    if cut == "a.raw":
        (tmp_path / cut).unlink()
        with pytest.raises(CaseError, match=r"names the file a\.raw for its voxels, which is not there\. Put it"):
            read_image(scan)


def test_39_a_damaged_nii_gz_is_noticed_by_its_checksum(tmp_path):
    path = write(tmp_path / "a.nii.gz", np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CaseError, match=r"is damaged or incomplete"):
        read_image(path)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd"])
def test_39_what_is_not_three_dimensional_numbers_is_refused(ending, tmp_path):
    path = str(tmp_path / f"a{ending}")
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((5, 6))), path)
    with pytest.raises(CaseError, match=r"has 2 dimensions, \(6, 5\), where a scan has three"):
        read_image(tmp_path / f"a{ending}")
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((2, 4, 5, 6)), isVector=False), path)
    if ending == ".nrrd":
        with pytest.raises(CaseError, match=r"has 4 dimensions, \(6, 5, 4, 2\), where a scan has three"):
            read_image(tmp_path / f"a{ending}")
    else:  # two channels
        assert read_image(tmp_path / f"a{ending}")[0].shape == (2, 6, 5, 4)
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((4, 5, 6, 3)), isVector=True), path)
    with pytest.raises(CaseError, match="vector of 64-bit float, where one number must stand"):
        read_image(tmp_path / f"a{ending}")


def test_39_a_header_that_claims_terabytes_is_refused_before_any_voxel_is_read(tmp_path):
    path = write(tmp_path / "a.nii", np.zeros(SHAPE, np.float32))
    data = bytearray(path.read_bytes())
    struct.pack_into("<8h", data, 40, 3, 30000, 30000, 30000, 1, 1, 1, 1)
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CaseError, match=r"claims .*30000.* more than 2 GiB"):
        read_image(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
    struct.pack_into("<8h", data, 40, 3, 120, 90, 70, 1, 1, 1, 1)
    path.write_bytes(data)
    with pytest.raises(CaseError, match=r"is cut short: .* bytes where its header states 3024352"):
        read_image(path)


def test_39_what_is_missing_or_no_scan_is_named(tmp_path):
    with pytest.raises(CaseError, match="does not exist"):
        read_image(tmp_path / "a.nii.gz")
    (tmp_path / "a.nii.gz").write_text("hello")
    with pytest.raises(CaseError, match="is damaged or incomplete"):
        read_image(tmp_path / "a.nii.gz")
    (tmp_path / "a.jpg").write_text("hello")
    with pytest.raises(CaseError, match=r"is no format that is read here: .nii.gz, "):
        read_image(tmp_path / "a.jpg")
    (tmp_path / "b.nii.gz").mkdir()
    with pytest.raises(CaseError, match="is no file"):
        read_image(tmp_path / "b.nii.gz")


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_39_a_disk_that_fills_up_leaves_the_old_file_and_says_so(ending, tmp_path):
    """ITK itself does not report it for a NIfTI. The limit of a file's size stands for the disk's."""
    path = tmp_path / f"a{ending}"
    write_image(path, np.ones(SHAPE, np.uint8), OBLIQUE)
    old = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
        with pytest.raises(UserError, match=f"cannot write .*a{ending}: .* or choose another folder"):
            write_image(path, np.random.default_rng(0).random((40, 40, 40)), OBLIQUE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == old and os.listdir(tmp_path) == [path.name]


def test_39_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    mask, rows = np.ones(SHAPE, np.uint8), [{"scan": "a", "class": 1, "name": "", "voxels": 1, "ml": ""}]
    for name, put in {
        "a.nii.gz": lambda path: write_image(path, mask, OBLIQUE),
        "a.h5": lambda path: case_of_scan.write_case(path, mask, None, {}),
        "volumes.csv": lambda path: write_volumes(path, rows),
        "a.png": lambda path: statistics.scatter({"a": 1.0}, {"row": {"a": 2.0}}, "title", "dice, all", path),
    }.items():
        with pytest.raises(UserError, match=rf"cannot write {tmp_path}/file/{name}: .*File exists"):
            put(tmp_path / "file" / name)
        put(tmp_path / "new" / "folder" / name)
        assert (tmp_path / "new" / "folder" / name).stat().st_size
    write_volumes(tmp_path / "new" / "folder" / "volumes.csv", [{**rows[0], "scan": "b"}])  # of another process
    write_volumes(tmp_path / "new" / "folder" / "volumes.csv", [*rows, {**rows[0], "scan": "c"}])
    assert [row["scan"] for row in read_volumes(tmp_path / "new" / "folder" / "volumes.csv")] == ["b", "a", "c"]
