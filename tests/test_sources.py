"""From folders of others to a data set: the Decathlon's and nnU-Net's layouts, what is not read, and sets that grow."""

import json
import random
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import SimpleITK as sitk
from scans import OBLIQUE, ball, make_scans, write

from dataloaders.cases import Case, lists_of, read_case
from dataloaders.class_names import class_names
from dataloaders.images import to_physical
from tools import check, convert
from tools.growing import Before, grown
from tools.sources import Source
from tools.split import choose_split
from utils.errors import UserError

SHAPE = (30, 28, 18)
CENTRE = to_physical(OBLIQUE, (15, 14, 9))
DECATHLON = {"name": "Ball", "labels": {"0": "background", "1": "Anterior", "2": "Posterior"}}
NNUNET = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "Anterior": 1, "Posterior": 2},
    "file_ending": ".nii.gz",
}


def converted(source: Path, out: Path, *words: str) -> Path:
    convert.main(["--source", str(source), "--out", str(out), *words])
    return out


def add(folder: Path, name: str, *, seed: int, label: bool = True, ending: str = "", split: str = "Tr") -> None:
    """A scan of imagesTr and, if it has one, its label of 0, 1 and 2, in labelsTr."""
    rng = np.random.default_rng(seed)
    inner, outer = (ball(SHAPE, OBLIQUE, CENTRE + rng.uniform(-3, 3, 3), r) for r in (5, 8))
    image = 300 + 100.0 * inner + 10 * rng.standard_normal(SHAPE)
    write(folder / f"images{split}" / f"{name}{ending}.nii.gz", image.astype(np.float32))
    if label:
        write(folder / f"labels{split}" / f"{name}.nii.gz", inner + outer)


def decathlon(folder: Path, labeled: int = 6, unlabeled: int = 2, ending: str = "", about: dict | None = None) -> Path:
    """The layout of the Decathlon's tars, with the files that macOS put into them."""
    for i in range(labeled):
        add(folder, f"ball_{i:03d}", seed=i, ending=ending)
    for i in range(labeled, labeled + unlabeled):
        add(folder, f"ball_{i:03d}", seed=i, ending=ending, label=False, split="Ts")
    for path in list(folder.rglob("*.nii.gz")):
        path.with_name(f"._{path.name}").write_bytes(b"Mac OS X")
    (folder / "._dataset.json").write_bytes(b"Mac OS X")
    (folder / "dataset.json").write_text(json.dumps(about or DECATHLON))
    return folder


def names(*numbers: int) -> list[str]:
    return [f"ball_{i:03d}" for i in numbers]


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
        "train on all of them with --classes 2, or keep some with --labels",
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
    assert "left out: 1 scans of imagesTs" in capsys.readouterr().err
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


@pytest.mark.parametrize("name", ["patient1-label", "patient1_GT"])
def test_a_label_among_the_scans_is_no_scan(name, tmp_path):
    make_scans(tmp_path / "scans")
    (tmp_path / "scans" / "labels" / "patient1.nii.gz").rename(tmp_path / "scans" / "images" / f"{name}.nii.gz")
    with pytest.raises(UserError, match=rf"{name}.nii.gz looks like the label of patient1, and stands among the scans"):
        converted(tmp_path / "scans", tmp_path / "set")


# -- labels --


def test_each_value_of_labels_must_occur_somewhere(tmp_path, capsys):
    source = decathlon(tmp_path / "Task")
    for words, message in (
        (["3"], "--labels 3: no label holds that. They hold 1 2"),
        (["2", "7", "5"], "--labels 5 7: no label holds that"),
    ):
        with pytest.raises(UserError, match=message):
            converted(source, tmp_path / "set", "--labels", *words)
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


# -- a set that grows --


def test_a_set_grows_and_nothing_changes_its_place(tmp_path, capsys):
    source = decathlon(tmp_path / "Task", labeled=10)
    out = converted(source, tmp_path / "set")
    train, test = lists_of(out)
    first, rest = train[:8], train[8:]
    by_hand = [*first[::-1], *rest[::-1]]
    (out / "train.list").write_text("\n".join(by_hand) + "\n")
    (out / "test.list").write_text("\n".join(test[::-1]) + "\n")
    for i in range(20, 25):
        add(source, f"ball_{i:03d}", seed=i)
    add(source, "another", seed=30, label=False, split="Ts")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.h5")}
    capsys.readouterr()
    converted(source, out)
    assert "6 converted, 12 already there, 0 refused\ntrain.list: 12 labeled, then 3 unlabeled; test.list: 3" in (
        capsys.readouterr().out
    )
    now, now_test = lists_of(out)
    added = now[8:12]
    assert now == [*first[::-1], *added, *rest[::-1], "another"] and now_test[:2] == test[::-1]
    assert sorted([*added, now_test[2]]) == names(*range(20, 25))  # 3 of 15 is the nearest to a fifth
    assert before == {path: path.stat().st_mtime_ns for path in before}
    converted(source, out)
    assert lists_of(out) == (now, now_test)
    check.main([str(out), "--labeled", "12", "--classes", "2", "--workers", "1", "--patch-size", "16", "16", "16"])


def test_an_unlabeled_case_that_gets_a_label_is_made_anew_and_follows_the_labeled_ones(tmp_path, capsys):
    make_scans(tmp_path / "scans", labeled=5, unlabeled=3)
    labels = tmp_path / "scans" / "labels"
    shutil.copytree(labels, tmp_path / "kept")
    make_scans(tmp_path / "all", labeled=8, unlabeled=0)
    out = converted(tmp_path / "scans", tmp_path / "set")
    train, test = lists_of(out)
    image = h5py.File(out / "patient6" / "mri_norm2.h5")["image"][()]
    shutil.copy(tmp_path / "all" / "labels" / "patient6.nii.gz", labels)
    capsys.readouterr()
    converted(tmp_path / "scans", out)
    assert "0 converted, 7 already there, 0 refused, 1 made again with the label" in capsys.readouterr().out
    assert lists_of(out) == ([*train[:4], "patient6", "patient5", "patient7"], test)  # never a test case
    with h5py.File(out / "patient6" / "mri_norm2.h5") as f:
        assert (f["image"][()] == image).all() and f["label"][()].sum() > 500
    (out / "train.list").write_text(
        "\n".join([*train[:4], "patient5", "patient6", "patient7"])
    )  # by hand, and so it stays
    converted(tmp_path / "scans", out)
    assert lists_of(out)[0] == [*train[:4], "patient5", "patient6", "patient7"]
    assert "1 of those unlabeled ones have a label" in capsys.readouterr().out
    (labels / "patient6.nii.gz").unlink()
    with pytest.raises(UserError, match=r"source_label: patient6\.nii\.gz before, None now"):
        converted(tmp_path / "scans", out)


def test_a_case_whose_source_is_gone_stays_and_another_source_adds_to_the_set(tmp_path, capsys):
    out = converted(decathlon(tmp_path / "a"), tmp_path / "set")
    train, test = lists_of(out)
    for i in range(4):
        add(tmp_path / "b", f"late_{i}", seed=60 + i)
    capsys.readouterr()
    converted(tmp_path / "b", out)
    said = capsys.readouterr().out
    assert "4 converted, 0 already there, 0 refused, 8 kept that the source does not have" in said
    assert "label values: 1 in 10 cases, 2 in 10 cases\nclasses: 1 Anterior, 2 Posterior" in said
    now, now_test = lists_of(out)
    assert [x for x in now if "ball" in x] == train and now_test[:1] == test and len(now_test) == 2
    add(tmp_path / "c", "x", seed=70)
    with pytest.raises(
        UserError, match=r"does not have, was made in another way \(spacing: None before, \[2.0, .* now"
    ):
        converted(tmp_path / "c", out, "--spacing", "2", "2", "2")
    (tmp_path / "b" / "dataset.json").write_text(json.dumps({"labels": {"liver": 1}}))
    with pytest.raises(UserError, match="has other classes: 1 is Anterior there, liver now"):
        converted(tmp_path / "b", out)
    assert lists_of(out) == (now, now_test) and not (out / "x").exists()


def test_what_was_taken_out_of_the_lists_stays_out(tmp_path, capsys):
    source = decathlon(tmp_path / "Task", labeled=10)
    out = converted(source, tmp_path / "set")
    train, test = lists_of(out)
    (out / "train.list").write_text("\n".join([*train[:3], *train[4:]]) + "\n")
    (out / "test.list").write_text(f"{test[1]}\n")
    add(source, "late", seed=40)
    converted(source, out)
    now, now_test = lists_of(out)
    assert f"taken out of the lists by hand, and so left out: {', '.join(sorted([train[3], test[0]]))}" in (
        capsys.readouterr().out
    )
    assert {train[3], test[0]}.isdisjoint([*now, *now_test]) and "late" in [*now, *now_test]
    for split in ("train", "test"):
        (out / f"{split}.list").unlink()  # anew
    converted(source, out)
    assert sorted([*lists_of(out)[0], *lists_of(out)[1]]) == sorted([*train, *test, "late"])


def test_a_source_that_tells_another_split_is_refused(tmp_path):
    source = decathlon(tmp_path / "Task")
    out = converted(source, tmp_path / "set")
    lists = lists_of(out)
    add(source, "ball_006", seed=6, split="Ts")  # it was an unlabeled training case, and is a test case now
    (tested,) = lists[1]
    with pytest.raises(
        UserError, match=rf"{tested} stands in test\.list and is a train case of the source\. A case never"
    ):
        converted(source, out)
    (source / "imagesTr" / f"{tested}.nii.gz").unlink()
    (source / "labelsTr" / f"{tested}.nii.gz").unlink()
    with pytest.raises(UserError, match=r"ball_006 stands in train\.list and is a test case of the source"):
        converted(source, out)
    assert lists_of(out) == lists


@pytest.mark.parametrize("seed", range(12))
def test_however_a_set_grows_it_keeps_its_promises(seed):
    """Random sources, again and again, with lists that are shuffled by hand between."""
    draw = random.Random(seed)
    before, listed, has_label = Before(), {}, {}
    share, to_validate = draw.choice([None, 0.0, 0.3, 0.5]), draw.choice([0.0, 0.2, 0.4]) if seed % 2 else 0.0
    for step in range(6):
        for i in range(draw.randint(2, 9) if step == 0 else draw.randint(0, 4)):
            has_label[f"{draw.random()}"] = i < 3 if step == 0 and i < 4 else draw.random() < 0.6
        for name in has_label:
            has_label[name] |= name in before.train and draw.random() < 0.1
        scans = [Source(x, Path(x), Path(x) if has_label[x] else None) for x in sorted(has_label, key=hash)]
        scans = scans if step == 0 else [scan for scan in scans if draw.random() < 0.8]  # some are gone
        words = {"challenge": False, "share": share, "seed": seed, "before": before}
        train, test, validation = choose_split(scans, **words, validation_share=to_validate)
        assert test == choose_split(scans, **words)[1]
        labeled = frozenset(name for name in has_label if has_label[name])
        lists = grown(before, train, test, validation, labeled=labeled, listed=listed)
        now, now_test, validated = lists["train"], lists["test"], lists["validation"]
        everything = [*now, *now_test, *validated]
        assert len({*everything}) == len(everything) and {scan.name for scan in scans} <= {*everything}
        assert validated[: len(before.validation)] == before.validation and set(validated) <= labeled
        assert bool(validated) == (to_validate > 0) and len(validated) <= max(round(to_validate * len(labeled)), 1)
        assert set(now) & labeled and not set(before.train) & set(validated)
        assert now_test[: len(before.test)] == before.test and not set(before.train) & set(now_test)
        assert set(now_test) <= labeled and now_test
        late = {x for x in before.train if x in labeled and not listed[x]}
        assert [x for x in now if x in before.train and x not in late] == [x for x in before.train if x not in late]
        first = next((i for i, x in enumerate(before.train) if not listed[x]), len(before.train))
        assert now[:first] == before.train[:first]
        prefix = next((i for i, x in enumerate(now) if x not in labeled), len(now))
        assert {x for x in now if x in labeled and (x not in before.train or x in late)} <= set(now[:prefix])
        listed |= {name: name in labeled for name in everything}
        if draw.random() < 0.5:
            draw.shuffle(now)
            draw.shuffle(now_test)
            draw.shuffle(validated)
        before = Before(now, now_test, frozenset(labeled & {*everything}), validation=validated)


def validation_list(out: Path) -> list[str]:
    return (out / "validation.list").read_text().split()


def test_validation_cases_are_labeled_ones_that_would_be_trained_on_and_stay_when_the_set_grows(tmp_path, capsys):
    source = decathlon(tmp_path / "Task", labeled=10)
    train, test = lists_of(converted(source, tmp_path / "without"))
    assert not (tmp_path / "without" / "validation.list").exists()
    capsys.readouterr()
    out = converted(source, tmp_path / "set", "--validation-share", "0.3")
    assert "train.list: 5 labeled, then 2 unlabeled; test.list: 2; validation.list: 3\n" in capsys.readouterr().out
    now, now_test = lists_of(out)
    chosen = validation_list(out)
    assert now_test == test and sorted([*now, *chosen]) == sorted(train) and now == [x for x in train if x in now]
    assert set(chosen) <= set(train[:8]) and len(chosen) == 3
    for i in range(20, 25):
        add(source, f"ball_{i:03d}", seed=i)
    (out / "validation.list").write_text("\n".join(chosen[::-1]))
    converted(source, out, "--validation-share", "0.3")
    assert validation_list(out)[:3] == chosen[::-1] and len(validation_list(out)) == 4  # of 15 labeled ones
    assert set(now) <= set(lists_of(out)[0]) and lists_of(out)[1][:2] == test
    before = [(out / f"{split}.list").read_bytes() for split in ("train", "test", "validation")]
    converted(source, out)  # without the share no more of them are chosen, and none goes
    assert before == [(out / f"{split}.list").read_bytes() for split in ("train", "test", "validation")]
    (out / "validation.list").write_text("\n".join(chosen[1:]))
    converted(source, out)
    assert chosen[0] not in {*validation_list(out), *lists_of(out)[0], *lists_of(out)[1]}
