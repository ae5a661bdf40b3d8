"""Scans, labels and lists of scans that tools.convert refuses, each with its reason."""

from pathlib import Path

import numpy as np
import pytest
from scans import converted, make_scans, write

from dataloaders.images import read_image
from utils.errors import UserError

SHAPE = (30, 28, 18)


def spoil(folder: Path, what: str) -> None:
    """One of the four labeled scans, patient0, made bad."""
    image, label = folder / "images" / "patient0.nii.gz", folder / "labels" / "patient0.nii.gz"
    _, geometry = read_image(image)
    if what == "shape":
        write(label, np.ones((30, 28, 17), np.uint8), geometry)
    elif what == "origin":
        write(label, np.ones(SHAPE, np.uint8), {**geometry, "origin": (0.0, 0.0, 0.0)})
    elif what == "fraction":
        write(label, np.full(SHAPE, 0.5, np.float32), geometry)
    elif what == "constant":
        write(image, np.full(SHAPE, 5, np.float32), geometry)
    elif what == "empty":
        write(label, np.zeros(SHAPE, np.uint8), geometry)


@pytest.mark.parametrize(
    ("what", "args", "message"),
    [
        ("shape", (), r"labels/patient0.nii.gz lies on another grid than .*\(30, 28, 17\) voxels"),
        ("origin", (), r"lies on another grid .*origin 0 0 0.* Resample the label onto the scan"),
        ("fraction", (), r"labels/patient0.nii.gz holds 0.5, and labels are integers"),
        ("constant", (), r"is constant \(5\)"),
        ("empty", ("--crop", "label"), "has an empty label to crop around. Use --crop foreground or --crop none"),
        ("", ("--crop", "label"), "patient4: has no label to crop around"),
    ],
)
def test_a_scan_that_cannot_be_used_is_refused_with_its_reason(what, args, message, tmp_path):
    make_scans(tmp_path / "scans")
    spoil(tmp_path / "scans", what)
    with pytest.raises(UserError, match=message):
        converted(tmp_path / "scans", tmp_path / "set", *args)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: None, "scans does not exist. Give a folder of scans or a CSV"),
        (lambda t: (t / "scans" / "x").mkdir(parents=True), "holds no scans in a known layout.* of DICOM first"),
        (lambda t: write(t / "scans" / "labels" / "a.nii", np.ones((3, 3, 3))), "1 labels have no scan in"),
        (lambda t: [write(t / "scans/images" / f"a{e}", np.ones((3,) * 3)) for e in (".nii", ".mha")], "have one name"),
        (lambda t: [write(t / f"scans/imagesTr/{x}.nii", np.ones((3, 3, 3))) for x in ("a_0000", "b_0001")], "b_0000"),
        (lambda t: make_scans(t / "scans", labeled=1), "0 labeled cases to train on and 0 to test on|1 labeled cases"),
        (lambda t: make_scans(t / "scans", labeled=0), "none of the 2 scans of .*has a label.*a column label\\.$"),
        (lambda t: (make_scans(t / "scans"), (t / "scans/labels").rename(t / "scans/label")), "Not read: label/\\.$"),
        (lambda t: (t / "scans").write_text("image,mask\na,b\n"), "has the columns image, mask. Use image and"),
        (lambda t: (t / "scans").write_text("image,image\na,b\n"), "has the columns image, image. Use image and.*once"),
        (lambda t: (t / "scans").write_text("image,split\na.nii,validate\n"), "line 2: an image is needed"),
        (lambda t: (t / "scans").write_text("image\na.nii\nb/a.nii\n"), "names a twice"),
        (lambda t: (t / "scans").write_text("image,name\na.nii,b/../c\n"), "which is not a valid case name"),
        (lambda t: (t / "scans").write_text("image,label,split\na.nii,,test\nb.nii,b,train\n"), "cannot be tested on"),
        (lambda t: (t / "scans").write_bytes(b"\xff\xfe\x00"), "cannot read .*It must be a CSV"),
    ],
)  # fmt: skip
def test_sources_that_make_no_set_are_refused(make, message, tmp_path):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        converted(tmp_path / "scans", tmp_path / "set")
    assert not (tmp_path / "set").exists()
