"""From folders of others to a data set: the Decathlon's and nnU-Net's layouts, labels, what is not read, and what is
refused with its reason."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from scans import DECATHLON, NNUNET, OBLIQUE, SHAPE, add, converted, decathlon, make_scans, names, write

from dataloaders.cases import Case, read_case
from dataloaders.class_names import class_names
from dataloaders.images import read_image
from dataloaders.lists import lists_of
from utils.errors import UserError

# -- layouts --


@pytest.mark.parametrize(("ending", "about"), [("", DECATHLON), ("_0000", NNUNET)], ids=["Decathlon", "nnU-Net"])
def test_images_tr_are_split_and_images_ts_are_unlabeled(ending, about, tmp_path, capsys):
    source = decathlon(tmp_path / "Task", labeled=10, ending=ending, about=about)
    train, test = lists_of(converted(source, tmp_path / "set"))
    assert len(test) == 2 and train[8:] == names(10, 11) and sorted(train[:8] + test) == names(*range(10))
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "12 converted, 0 already there, 0 refused",
        "train.list: 8 labeled, then 2 unlabeled; test.list: 2",
        "label values: 1 in 10 cases, 2 in 10 cases",
        "classes: 1 Anterior, 2 Posterior",
        "train on all of them, or keep some with --labels",
    ]
    assert class_names(tmp_path / "set") == {1: "Anterior", 2: "Posterior"}
    for name in test:
        image, label = read_case(Case(name, tmp_path / "set" / name / "mri_norm2.h5", True, 2))
        expected = sitk.GetArrayFromImage(sitk.ReadImage(str(source / "labelsTr" / f"{name}.nii.gz"))).T
        assert (
            np.bincount(label.ravel()).tolist() == np.bincount(expected.ravel()).tolist() and image.shape == label.shape
        )


def test_the_share_is_of_images_tr_and_images_ts_can_be_left(tmp_path, capsys):
    source = decathlon(tmp_path / "Task")
    train, test = lists_of(converted(source, tmp_path / "set", "--test-share", "0.5", "--images-ts", "leave"))
    assert len(test) == 3 and sorted(train + test) == names(*range(6))
    assert "left out: 2 scans of imagesTs without label" in capsys.readouterr().err
    again = lists_of(converted(source, tmp_path / "other", "--test-share", "0.5"))
    assert again == ([*train, *names(6, 7)], test)


def test_labels_of_images_ts_make_them_the_test_cases(tmp_path, capsys):
    source = decathlon(tmp_path / "Task", unlabeled=0)
    add(source, "ball_006", seed=6, split="Ts")
    add(source, "ball_007", seed=7, split="Ts", label=False)
    assert lists_of(converted(source, tmp_path / "set")) == (names(*range(6)), names(6))
    assert "left out: 1 scan of imagesTs" in capsys.readouterr().err
    train, test = lists_of(converted(source, tmp_path / "more", "--images-ts", "unlabeled"))
    assert (train, test) == (names(*range(6), 7), names(6))
    with pytest.raises(UserError, match="--test-share is given, but the source states"):
        converted(source, tmp_path / "other", "--test-share", "0.5")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"0": "background", "1": "liver", "2": "tumour"}, {1: "liver", 2: "tumour"}),
        ({"background": 0, "liver": 1, "tumour": 2}, {1: "liver", 2: "tumour"}),
        ({"background": "0", "tumour": "2", "liver": "1"}, {1: "liver", 2: "tumour"}),
        ({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}, {3: "enhancing"}),
        ({"0": "", "1": " left\tatrium\n"}, {1: "left atrium"}),
        ({}, {}),
    ],
)  # fmt: skip
def test_both_forms_of_dataset_json_are_read(labels, expected, tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}), encoding="utf-8-sig")
    assert class_names(tmp_path) == expected and class_names(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"cannot read .*dataset\.json.*Fix it or move it away"),
        ("[1]", "holds no JSON object"),
        ('{"labels": ["liver"]}', "neither"),
        ('{"labels": {"liver": 1.5}}', "neither"),
        ('{"labels": {"liver": null}}', "neither"),
        ('{"labels": {"liver": 1, "tumour": 1}}', "two names of the label 1: liver, tumour"),
        ('{"labels": {"background": 0, "ball": 1, "ignore": 3}}', "voxels to ignore.*--labels"),
    ],
)
def test_a_dataset_json_of_another_kind_is_refused(text, message, tmp_path):
    source = decathlon(tmp_path / "Task")
    (source / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=message):
        converted(source, tmp_path / "set")
    assert not (tmp_path / "set").exists()


# -- what is not read --


def test_what_is_not_read_is_named(tmp_path, capsys):
    make_scans(tmp_path / "scans", ending=".mhd")
    for name in ("images/a.img", "images/b.nii.bz2", "images/c.dcm", "labels/d.img", "images/.hidden.img", "notes.txt"):
        (tmp_path / "scans" / name).write_bytes(b"x")
    (tmp_path / "scans" / "images" / "series").mkdir()
    write(tmp_path / "scans" / "loose.nii.gz", np.random.random(SHAPE))
    write(tmp_path / "scans" / "imagesVal" / "e.nii.gz", np.random.random(SHAPE))
    converted(tmp_path / "scans", tmp_path / "set")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("not read"))
    assert line == "not read: imagesVal/, loose.nii.gz, images/a.img, images/b.nii.bz2, images/c.dcm and 2 more"


@pytest.mark.parametrize(("name", "layout"), [("Patient1.NII.BZ2", ""), ("patient1.json", "Tr")])
def test_a_label_that_is_not_read_is_an_error(name, layout, tmp_path):
    """Its scan would be trained on as one without label."""
    make_scans(tmp_path / "scans")
    if layout:
        for kind in ("images", "labels"):
            (tmp_path / "scans" / kind).rename(tmp_path / "scans" / f"{kind}Tr")
    labels = tmp_path / "scans" / f"labels{layout}"
    (labels / "patient1.nii.gz").unlink()
    (labels / name).write_bytes(b"x")
    with pytest.raises(UserError, match=rf"{name} looks like the label of patient1, and is no format .*Convert it"):
        converted(tmp_path / "scans", tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("name", ["Label.nii.gz", "segmentation.nrrd"])
def test_a_label_of_another_name_in_the_folder_of_a_case_is_an_error_and_beside_a_label_not_read(
    name, tmp_path, capsys
):
    for i in range(3):
        folder = tmp_path / "scans" / f"p{i}"
        write(folder / "image.nii.gz", np.random.default_rng(i).random(SHAPE))
        write(folder / (name if i == 2 else "label.nii.gz"), np.ones(SHAPE, np.uint8))
    with pytest.raises(UserError, match=rf"p2/{name} lies beside image.nii.gz, which has no label.*rename it to label"):
        converted(tmp_path / "scans", tmp_path / "set")
    assert not (tmp_path / "set").exists()
    write(tmp_path / "scans" / "p2" / "label.nii.gz", np.ones(SHAPE, np.uint8))
    converted(tmp_path / "scans", tmp_path / "set")
    assert f"not read: p2/{name}\n" in capsys.readouterr().out


# -- labels --


def test_each_value_of_labels_must_occur_somewhere(tmp_path, capsys):
    source = decathlon(tmp_path / "Task")
    for args, message in (
        (["3"], "--labels 3: no label holds that. They hold 1 2"),
        (["2", "7", "5"], "--labels 5 7: no label holds that"),
    ):
        with pytest.raises(UserError, match=message):
            converted(source, tmp_path / "set", "--labels", *args)
        assert not (tmp_path / "set").exists()
    write(source / "labelsTr" / "ball_005.nii.gz", 5 * np.eye(30, 28, dtype=np.uint8)[:, :, None].repeat(18, 2))
    converted(source, tmp_path / "set", "--labels", "2", "5")  # one label of all is enough
    assert "label values: 1 in 5 cases, 2 in 1 cases" in capsys.readouterr().out


STRAIGHT = {"LPS": (1.0, 0, 0, 0, 1, 0, 0, 0, 1), "RAS": (-1.0, 0, 0, 0, -1, 0, 0, 0, 1)}


@pytest.mark.parametrize(
    ("what", "frame", "message"),
    [
        (
            "label",
            "LPS",
            "The label has no place of its own.*do not resample the label.*Give the label the other's affine",
        ),
        (
            "scan",
            "RAS",
            "The scan has no place of its own.*do not resample the label.*Give the scan the other's affine",
        ),
        ("turned", "LPS", "The label has no place of its own.*its axes are in another order. Save it again"),
        ("smaller", "RAS", "The label has no place of its own.*and other voxels. Do not resample it"),
    ],
)
def test_a_label_without_its_scan_s_affine_is_not_to_be_resampled(what, frame, message, tmp_path):
    """Its header has the spacing alone, or is the identity."""
    make_scans(tmp_path / "scans")
    spacing = OBLIQUE["spacing"] if frame == "LPS" else (1.0, 1.0, 1.0)
    nowhere = {"spacing": spacing, "origin": (0.0, 0.0, 0.0), "direction": STRAIGHT[frame]}
    label = np.ones({"turned": SHAPE[::-1], "smaller": (30, 28, 9)}.get(what, SHAPE), np.uint8)
    folder, array = ("images", np.random.random(SHAPE)) if what == "scan" else ("labels", label)
    write(tmp_path / "scans" / folder / "patient0.nii.gz", array, nowhere)
    with pytest.raises(UserError, match=rf"patient0: .*lies on another grid.*{message}"):
        converted(tmp_path / "scans", tmp_path / "set")


# -- refused --


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
    elif what == "volumes":
        picture = nibabel.load(image)
        nibabel.save(nibabel.Nifti1Image(np.stack([picture.get_fdata()] * 2, -1), picture.affine), image)
    elif what == "empty":
        write(label, np.zeros(SHAPE, np.uint8), geometry)


@pytest.mark.parametrize(
    ("what", "args", "message"),
    [
        ("shape", (), r"labels/patient0.nii.gz lies on another grid than .*\(30, 28, 17\) voxels"),
        ("origin", (), r"lies on another grid .*origin 0 0 0.* Resample the label onto the scan"),
        ("fraction", (), r"labels/patient0.nii.gz holds 0.5, and labels are integers"),
        ("constant", (), r"images/patient0.nii.gz is constant \(5\)\nMend each, or take it and its label out of"),
        ("volumes", (), r"1 of 6 scans refused.*\n  patient0: .* has 2 channels, where 1 is needed"),
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
        (lambda t: write(t / "scans" / "labels" / "a.nii", np.ones((3, 3, 3))), "1 label has no scan in"),
        (lambda t: [write(t / f"scans/{x}.nii", np.ones((3,) * 3)) for x in ("images/a", "labels/a_seg")],
         r"1 label has no scan in .*images: .*A label has the name of its scan: rename a_seg\.nii to a\.nii"),
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
        (lambda t: (t / "scans").write_bytes("image\nMüller.nii\n".encode("latin-1")), "Save it as UTF-8.*a CSV"),
    ],
)  # fmt: skip
def test_sources_that_make_no_set_are_refused(make, message, tmp_path):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        converted(tmp_path / "scans", tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_the_source_is_no_place_for_the_set(tmp_path):
    make_scans(tmp_path / "scans")
    with pytest.raises(UserError, match=r"--out .*scans is the source"):
        converted(tmp_path / "scans", tmp_path / "scans")
    assert sorted(path.name for path in (tmp_path / "scans").iterdir()) == ["images", "labels"]
