"""The commands of docs/recipes.md, with the files of data/recipes, and of docs/own-data.md lead from small sets of that
shape to predictions.

The folder with hippocampus.tar is looked for beside the repository, in shared/hippocampus, or in $HIPPOCAMPUS_DATA.
"""

import glob
import json
import os
import re
import shlex
import subprocess
import tarfile
from importlib import import_module
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
from conftest import ROOT
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from scans import ball, make_scans, write
from scipy.ndimage import gaussian_filter

import predict
import test_la
import train_dtml
from dataloaders.images import read_image, read_label
from dataloaders.lists import lists_of, validation_of
from tools import check, convert
from tools.split import count_to_test, count_to_validate
from utils.checkpoint import load_checkpoint

TAR = Path(os.environ.get("HIPPOCAMPUS_DATA", ROOT.parent / "shared" / "hippocampus")) / "hippocampus.tar"
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", (ROOT / "docs" / "recipes.md").read_text(), re.M | re.S))
SMALL = {  # after the flags of a command, which they win over
    "tools.check": "--workers 1 --labeled 3",
    "train_dtml": "--labeled 3 --patch-size 16 16 16 --filters 2 --iterations 2 --batch-size 2 --picture-every 0 "
    "--threads 1 --device cpu",
    "test_la": "--patch-size 16 16 16 --stride 16 16 16 --threads 1 --device cpu",
    "predict": "--patch-size 16 16 16 --stride 16 16 16 --threads 1 --device cpu",
}
GRID = {"spacing": (1.5, 1.5, 2.0), "origin": (0.0, 0.0, 0.0), "direction": (-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0)}


def follow(text: str, small: dict[str, str] = SMALL) -> list[str]:
    """Runs the commands of a text; returns the programs of this project."""
    done = []
    for line in "".join(re.findall(r"```bash\n(.*?)```", text, re.S)).splitlines():
        args = [word.replace("@data/", f"@{ROOT}/data/") for word in shlex.split(line)]
        if args[0] != "python":
            subprocess.run(["bash", "-c", line], check=True)
            continue
        module = args[2] if args[1] == "-m" else args[1].removesuffix(".py")
        args = args[3 if args[1] == "-m" else 2 :]
        args = [result for word in args for result in (sorted(glob.glob(word)) if "*" in word else [word])]
        import_module(module).main([*args, *small.get(module, "").split()])
        done.append(module)
    return done


def scan(seed: int, background: float, object_: float, values: tuple[int, ...] = (1,), shape=(20, 18, 14)):
    """image and label of a ball of several values along x, in a body with a texture, within air of `background`."""
    rng = np.random.default_rng(seed)
    middle = -np.array(GRID["spacing"]) * [1, 1, -1] * (np.array(shape) / 2 + rng.uniform(-1, 1, 3))
    body, inside = ball(shape, GRID, middle, rng.uniform(9, 13)) > 0, ball(shape, GRID, middle, rng.uniform(4, 6)) > 0
    label = np.zeros(shape, np.uint8)
    for i, value in enumerate(values):
        first = round(shape[0] / 2 + (i - len(values) / 2) * 3)
        label[first:][inside[first:]] = value
    label[inside & (label == 0)] = values[0]
    texture = gaussian_filter(rng.standard_normal(shape), 1.5, mode="wrap")
    image = np.where(body, object_ * (0.6 + 0.4 * inside + 2 * texture), background)
    return (image + rng.standard_normal(shape) * (background != 0)).astype(np.float32), label


@pytest.fixture
def inside(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


ALL = ["tools.convert", "tools.check", "train_dtml", "test_la", "predict"]


def predicted(inside: Path, count: int = 1) -> bool:
    return len((inside / "predictions" / "volumes.csv").read_text().splitlines()) == 1 + count


def test_pancreas_ct(inside):
    """Of 80 scans 18 are tested on; a crop of 25 mm around the label, at 1 mm, and a window of HU."""
    assert count_to_test(80, 0.225) == 18
    for i in range(11):
        image, label = scan(i, -1000, 100, shape=(44, 18, 14) if i == 0 else (20, 18, 14))
        folder = inside / "Pancreas-CT" if i < 10 else inside / "new"
        write(folder / ("images" if i < 10 else "") / f"PANCREAS_{i:04d}.nii.gz", image, GRID)
        if i < 10:
            write(inside / f"Pancreas-CT/labels/PANCREAS_{i:04d}.nii.gz", label, GRID)
    assert follow(SECTIONS["Pancreas-CT"]) == ALL and predicted(inside)
    train, test = lists_of(inside / "data/pancreas")
    assert (len(train), len(test)) == (8, 2)
    with h5py.File(inside / "data/pancreas/PANCREAS_0000/mri_norm2.h5") as f:
        sides = np.ptp(np.argwhere(f["label"]), axis=0) + 1
        assert f["label"].shape == (min(66, sides[0] + 50), 27, 28) and sides[0] + 50 < 66
        assert f.attrs["spacing"].tolist() == [1, 1, 1]
    options = load_checkpoint(inside / "runs/pancreas-12")["options"]
    chosen = {"augment": "none", "normalize": "window", "window": [75.0, 400.0]}
    assert {name: options[name] for name in chosen} == chosen


def test_a_published_split_is_put_there_before(inside):
    """And kept, in its order; the first N are the first of the list."""
    names = [f"PANCREAS_{i:04d}" for i in range(8)]
    for i, name in enumerate(names):
        image, label = scan(i, -1000, 100)
        write(inside / f"Pancreas-CT/images/{name}.nii.gz", image, GRID)
        write(inside / f"Pancreas-CT/labels/{name}.nii.gz", label, GRID)
    lists = {"train": [names[i] for i in (5, 0, 7, 2)], "test": [names[i] for i in (6, 1)],
             "validation": [names[i] for i in (4, 3)]}  # fmt: skip
    out = inside / "data" / "pancreas"
    out.mkdir(parents=True)
    for split, those in lists.items():
        (out / f"{split}.list").write_text("\n".join(those) + "\n")
    args = ["--source", "Pancreas-CT", "--out", "data/pancreas", f"@{ROOT}/data/recipes/pancreas/convert.txt"]
    for _ in range(2):
        convert.main(args)
        assert lists_of(out) == (lists["train"], lists["test"]) and validation_of(out) == lists["validation"]


def test_brats_2019(inside):
    """The published numbers of 335 scans; folders as they are downloaded; all values of the tumour are one class."""
    assert (count_to_test(335, 0.179), count_to_validate(335, 0.075)) == (60, 25)
    for i in range(12):
        grade, name = "HGG" if i < 9 else "LGG", f"BraTS19_CBICA_{i:03d}_1"
        image, label = scan(i, 0, 300, (1, 2, 4))
        folder = inside / "MICCAI_BraTS_2019_Data_Training" / grade / name
        write(folder / f"{name}_flair.nii.gz", image, GRID)
        write(folder / f"{name}_t1.nii.gz", image + 7, GRID)
        write(folder / f"{name}_seg.nii.gz", label, GRID)
    write(inside / "new" / "patient.nii.gz", scan(99, 0, 300)[0], GRID)
    assert follow(SECTIONS["BraTS 2019"]) == ALL and predicted(inside)
    train, test = lists_of(inside / "data/brats")
    assert (len(train), len(test), len(validation_of(inside / "data/brats"))) == (9, 2, 1)
    with h5py.File(inside / f"data/brats/{train[0]}/mri_norm2.h5") as f:
        assert set(np.unique(f["label"])) == {0, 1} and f["label"].shape < (20, 18, 14)
    assert (inside / "runs/brats-25/best.pt").exists()


def packed(inside: Path, task: str, background: float, values: tuple[int, ...], channels: int) -> None:
    """A task's tar, with dataset.json, unlabeled scans of imagesTs and the hidden files of macOS; and a new scan."""
    folder = inside / "made" / task
    for i in range(10):
        image, label = scan(i, background, 100, values)
        several = np.stack([image * (1 + c) for c in range(channels)], axis=-1) if channels > 1 else image
        kind, name = ("Tr", f"scan_{i:02d}.nii.gz") if i < 7 else ("Ts", f"scan_{i:02d}.nii.gz")
        path = folder / f"images{kind}" / name if i < 9 else inside / "new" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if channels > 1:
            nibabel.save(nibabel.Nifti1Image(several, np.diag([*GRID["spacing"], 1.0])), path)
        else:
            write(path, image, GRID)
        if i < 7:
            write(folder / "labelsTr" / name, label, GRID)
            (folder / "labelsTr" / f"._{name}").write_bytes(b"of macOS")
    labels = {"0": "background"} | {str(v): f"part {v}" for v in values}
    modality = {str(c): f"MR {c}" for c in range(channels)}
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, "modality": modality}))
    with tarfile.open(inside / f"{task}.tar", "w") as tar:
        tar.add(folder, task)


def test_a_ct_of_the_decathlon(inside):
    packed(inside, "Task09_Spleen", -1000, (1,), 1)
    assert follow(SECTIONS["Decathlon"]) == ALL and predicted(inside)
    train, test = lists_of(inside / "data/spleen")
    assert (len(train), len(test), len(validation_of(inside / "data/spleen"))) == (5 + 2, 1, 1)
    assert load_checkpoint(inside / "runs/spleen-8/best.pt")["class_names"] == {"1": "part 1"}


def test_four_channels_of_the_decathlon(inside):
    packed(inside, "Task01_BrainTumour", 0, (1, 2, 3), 4)
    assert follow(SECTIONS["Brain tumours of the Decathlon"]) == ALL and predicted(inside)
    state = load_checkpoint(inside / "runs/brain-8/best.pt")
    assert state["channel_names"] == ["MR 0", "MR 1", "MR 2", "MR 3"] and state["options"]["augment"] == "flip"
    assert state["class_names"] == {"1": "part 1 + part 2 + part 3"}


def test_real_scans_of_the_hippocampus(inside):
    """At their full size, for two iterations; packed as the Decathlon's tar."""
    if not TAR.is_file():
        pytest.skip("the hippocampus scans are not there")
    folder = inside / "made" / "Task04_Hippocampus"
    with tarfile.open(TAR) as tar:
        names = sorted(name for name in tar.getnames() if "labels/" in name and name.endswith(".nii.gz"))[:8]
        for i, name in enumerate(names):
            for kind in ("images", "labels"):
                path = folder / ("imagesTs" if i > 5 else f"{kind}Tr") / Path(name).name
                path = inside / "new" / path.name if i == 7 else path
                path.parent.mkdir(parents=True, exist_ok=True)
                if kind == "images" or i <= 5:
                    path.write_bytes(tar.extractfile(name.replace("labels/", f"{kind}/")).read())
    (folder / "dataset.json").write_text('{"labels": {"0": "background", "1": "Anterior", "2": "Posterior"}}')
    with tarfile.open("Task04_Hippocampus.tar", "w") as tar:
        tar.add(folder, folder.name)
    assert follow(SECTIONS["Hippocampus"]) == ALL
    text = (inside / "predictions" / "volumes.csv").read_text()
    assert "Anterior" in text and "Posterior" in text


def test_the_commands_for_own_data_lead_from_scans_to_segmentations(inside):
    make_scans(inside / "scans", labeled=12, unlabeled=2)
    make_scans(inside / "made", labeled=0, unlabeled=2)
    (inside / "made" / "images").rename(inside / "new")
    train = "--patch-size 16 16 16 --filters 2 --iterations 2 --threads 1 --device cpu"
    page = (ROOT / "docs" / "own-data.md").read_text(encoding="utf-8")
    assert follow(page, {"train_dtml": train}) == ["tools.convert", "tools.check", "train_dtml", "test_la", "predict"]
    assert len((inside / "predictions" / "volumes.csv").read_text().splitlines()) == 3
    for path in (inside / "new").iterdir():
        (image, geometry), (label, result) = read_image(path), read_label(inside / "predictions" / path.name)
        assert image.shape == label.shape and set(np.unique(label)) <= {0, 1}
        assert all(np.allclose(geometry[name], result[name], atol=1e-6) for name in geometry)


# -- real scans in every orientation --


ORIENTATIONS = ("RAS", "LPS", "LPI", "PIR", "SRP", "ASL")
REAL = ["--classes", "2", "--patch-size", "32", "48", "32", "--filters", "2", "--threads", "1", "--device", "cpu"]


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
    args = ["--data", str(tmp_path / "set"), *REAL, "--labeled", "3", "--iterations", "2", "--batch-size", "2"]
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
