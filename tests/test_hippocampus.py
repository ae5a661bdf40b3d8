"""Real scans of the Decathlon's hippocampus, some stored in other orientations, from files to predictions.

The folder with hippocampus.tar is looked for beside the repository, in shared/hippocampus, or in $HIPPOCAMPUS_DATA.
"""

import os
import tarfile
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
from conftest import ROOT
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

import predict
import test_la
import train_dtml
from dataloaders.cases import lists_of
from tools import check, convert
from utils.checkpoint import load_checkpoint

ORIENTATIONS = ("RAS", "LPS", "LPI", "PIR", "SRP", "ASL")
TAR = Path(os.environ.get("HIPPOCAMPUS_DATA", ROOT.parent / "shared" / "hippocampus")) / "hippocampus.tar"
SMALL = ["--classes", "2", "--patch-size", "32", "48", "32", "--filters", "2", "--threads", "1", "--device", "cpu"]


def store(source: Path, path: Path, code: str) -> Path:
    """The same scan with its axes in another order, by nibabel."""
    image = nibabel.load(source)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt(code))), path)
    return path


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """The first eight labeled scans, and one more to predict."""
    if not TAR.is_file():
        pytest.skip("the hippocampus scans are not there")
    folder = tmp_path_factory.mktemp("hippocampus")
    with tarfile.open(TAR) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)  # early 3.11 has none
        names = sorted(name for name in tar.getnames() if "labels/" in name and name.endswith(".nii.gz"))[:9]
        for name in names:
            tar.extract(name, folder)
            tar.extract(name.replace("labels/", "images/"), folder)
    return folder


def test_real_scans_are_predicted_the_same_in_every_orientation(scans, tmp_path, capsys):
    *learned, new = sorted((scans / "images").iterdir())
    for path, code in zip(learned, (*ORIENTATIONS, "RAS", "RAS"), strict=True):
        store(path, tmp_path / "scans" / "images" / path.name, code)
        store(scans / "labels" / path.name, tmp_path / "scans" / "labels" / path.name, code)
    convert.main(["--source", str(tmp_path / "scans"), "--out", str(tmp_path / "set")])
    train, test = lists_of(tmp_path / "set")
    assert len(train) + len(test) == 8 and "orientations differ" not in capsys.readouterr().out
    for path in learned:  # what nibabel makes of the scan as it was published
        image = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata()
        label = nibabel.as_closest_canonical(nibabel.load(scans / "labels" / path.name)).get_fdata()
        with h5py.File(tmp_path / "set" / path.name.removesuffix(".nii.gz") / "mri_norm2.h5") as f:
            np.testing.assert_allclose(f["image"][()], (image - image.mean()) / image.std(), atol=1e-4)
            assert (f["label"][()] == label).all() and tuple(f.attrs["spacing"]) == (1.0, 1.0, 1.0)

    check.main([str(tmp_path / "set"), "--labeled", "3", "--classes", "2", "--patch-size", "32", "48", "32"])
    assert "axes" not in capsys.readouterr().out
    args = ["--data", str(tmp_path / "set"), *SMALL, "--labeled", "3", "--iterations", "2", "--batch-size", "2"]
    train_dtml.main([*args, "--runs", str(tmp_path), "--name", "run", "--picture-every", "0"])
    state = load_checkpoint(tmp_path / "run")
    assert state["orientation"] == "RAS" and state["spacing"] == [1.0, 1.0, 1.0]
    test_la.main(["--checkpoint", str(tmp_path / "run"), "--device", "cpu", "--stride", "32", "48", "32"])

    result = []
    for code in ORIENTATIONS:
        path = store(new, tmp_path / "new" / f"{code}.nii.gz", code)
        argv = ["--checkpoint", str(tmp_path / "run"), str(path), "-o", str(tmp_path / "out"), "--device", "cpu"]
        predict.main([*argv, "--probabilities", "float32", "--threads", "1"])
        scan = nibabel.load(path)
        files = [tmp_path / "out" / f"{code}{kind}.nii.gz" for kind in ("", "_probability_1", "_probability_2")]
        assert nibabel.aff2axcodes(nibabel.load(files[0]).affine) == tuple(code)
        for file in files:
            assert nibabel.load(file).shape == scan.shape and (nibabel.load(file).affine == scan.affine).all()
        result.append([nibabel.as_closest_canonical(nibabel.load(file)).get_fdata() for file in files])
    assert result[0][0].shape == nibabel.as_closest_canonical(nibabel.load(new)).shape and result[0][1].std() > 0
    for maps in result[1:]:
        assert all((a == b).all() for a, b in zip(maps, result[0], strict=True))
