"""NRRD and MetaImage headers: refused in the same words as those of NIfTI, and what they do not tell is not made up."""

import pytest
from headers import AFFINE, ARRAY, meta, nifti, nrrd
from scans import write

from dataloaders.cases import CaseError
from dataloaders.images import read_image, read_label
from dataloaders.orientation import orientation_of

TILTED = AFFINE @ [[1, 0, 0, 0], [0, 1, 0.26 * 1.7, 0], [0, 0, 0.966, 0], [0, 0, 0, 1]]
LPS = ("space: left-posterior-superior", "space directions: (0.8,0,0) (0,1,0) (0,0,1.7)", "space origin: (1,2,3)")


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
        (lambda t: meta(t / "a.mha", TransformMatrix=""), {"spacing"}),
        (lambda t: meta(t / "a.mha", ElementSpacing=""), {"origin", "direction"}),
        (lambda t: nrrd(t / "a.nrrd", *LPS, 'space units: "mm" "mm" "mm"'), {"spacing", "origin", "direction"}),
        (lambda t: nrrd(t / "a.nrrd", "space: scanner-xyz", *LPS[1:]), {"spacing"}),
        (lambda t: nrrd(t / "a.nrrd", "space dimension: 3", *LPS[1:]), {"spacing"}),
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
