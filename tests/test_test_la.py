"""The test script: what it prints, what it writes, and that both are what the predictions on disk say."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import ROOT, TINY, csv_rows, load, make_set, saved_mask, score
from medpy.metric import binary

import test_la
import train_dtml
from evaluation.sliding_window import predict_scan
from utils.errors import UserError

CASES = ("case08", "case09")
SPACING = (1.0, 1.0, 2.0)
OUTPUTS = ("seg", "sdm", "mean")
COMPONENTS = ("all", "largest")


@pytest.fixture(scope="module")
def tested(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The run tested with --save all: the folder, the rows of cases.csv and what was printed."""
    out = tmp_path_factory.mktemp("tested")
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.redirect_stderr(io.StringIO()) as err:
        rows = score(trained, out, "--save", "all")
    assert "not finished" not in err.getvalue()
    return SimpleNamespace(out=out, rows=rows, text=text.getvalue())


def label_of(folder: Path, case: str) -> np.ndarray:
    """The label of a case as (W,H,D)."""
    with h5py.File(folder / case / "mri_norm2.h5") as f:
        return f["label"][()]


def measure(mask: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """The columns of a row as medpy computes them."""
    return {
        "dice": binary.dc(mask, label),
        "jaccard": binary.jc(mask, label),
        "asd": binary.asd(mask, label),
        "hd95": binary.hd95(mask, label),
        "asd_mm": binary.asd(mask, label, voxelspacing=SPACING),
        "hd95_mm": binary.hd95(mask, label, voxelspacing=SPACING),
        "voxels": np.count_nonzero(mask),
        "label_voxels": np.count_nonzero(label),
    }


def table_in(text: str) -> list[dict[str, str]]:
    """The rows of the one Markdown table in a text, by column."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    header, rule, *rows = lines
    assert set("".join(rule)) == {"-"}
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.fixture
def fake(monkeypatch):
    """Puts given masks, by the sum of the scan they belong to, in the place of the predictions."""

    def use(folder: Path, masks: dict[str, np.ndarray]) -> None:
        by_sum = {}
        for case, mask in masks.items():
            with h5py.File(folder / case / "mri_norm2.h5") as f:
                by_sum[float(f["image"][()].sum())] = mask

        def predict(method, image, outputs, **_):
            mask = torch.from_numpy(by_sum[float(image.numpy().sum())].astype(np.float32))
            return torch.stack([mask] * len(outputs))

        monkeypatch.setattr(test_la, "predict_scan", predict)

    return use


# -- rows and table --


def test_rows_are_what_medpy_says_of_the_saved_predictions(tested, trained):
    keys = [(row["case"], row["output"], row["component"]) for row in tested.rows]
    assert keys == [(case, output, c) for case in CASES for output in OUTPUTS for c in COMPONENTS]
    for row in tested.rows:
        if row["component"] == "all":
            mask = saved_mask(tested.out, row["output"], row["case"])
            label = label_of(trained.parent / "set", row["case"])
            assert set(np.unique(mask)) == {0, 1} and 0.3 < binary.dc(mask, label) < 0.99
            for name, value in measure(mask, label).items():
                assert float(row[name]) == pytest.approx(value, abs=1e-6), name


def test_files_without_a_spacing_give_no_distance_in_mm(trained, tested, tmp_path, capsys):
    shutil.copytree(trained.parent / "set", tmp_path / "set")
    for case in CASES:
        with h5py.File(tmp_path / "set" / case / "mri_norm2.h5", "a") as f:
            del f.attrs["spacing"]
    rows = score(trained, tmp_path / "out", "--data", str(tmp_path / "set"))
    assert "No distance in mm: the files of" in capsys.readouterr().out and "No distance in mm" not in tested.text
    for row, usual in zip(rows, tested.rows, strict=True):
        assert row == usual | {name: "nan" for name in usual if "_mm" in name}


def test_table_has_the_papers_columns_and_the_means_of_the_rows(tested):
    assert (tested.out / "table.md").read_text() in tested.text
    table = table_in(tested.text)
    columns = {"Dice %": "dice", "Jaccard %": "jaccard", "ASD voxel": "asd", "95HD voxel": "hd95"}
    columns |= {"ASD mm": "asd_mm", "95HD mm": "hd95_mm"}
    empty = ["no prediction", "no label", "neither"]
    assert list(table[0]) == ["output", "component", "scans", *columns, *empty]
    assert [(r["output"], r["component"]) for r in table] == [(o, c) for o in OUTPUTS for c in COMPONENTS]
    for line in table:
        key = (line["output"], line["component"])
        chosen = [row for row in tested.rows if (row["output"], row["component"]) == key]
        assert line["scans"] == "2" and [line[name] for name in empty] == ["0", "0", "0"]
        for column, name in columns.items():
            values = np.array([float(row[name]) for row in chosen]) * (100 if "%" in column else 1)
            assert line[column] == f"{values.mean():.2f}"


# -- empty predictions, components --


def test_empty_prediction_counts_as_dice_0_and_scores_the_diagonal(trained, tmp_path, capsys, fake):
    folder = trained.parent / "set"
    near = np.roll(label_of(folder, "case09"), 2, axis=0)
    fake(folder, {"case08": np.zeros_like(near), "case09": near})
    capsys.readouterr()
    empty, full = (row for row in score(trained, tmp_path, "--output", "seg") if row["component"] == "all")
    assert (empty["case"], empty["voxels"], float(empty["dice"]), float(empty["jaccard"])) == ("case08", "0", 0.0, 0.0)
    assert {empty[name] for name in ("asd", "hd95", "asd_mm", "hd95_mm")} == {"nan"}
    assert empty["shape"] == full["shape"] == "24x22x18"
    expected = measure(near, label_of(folder, "case09"))
    assert float(full["dice"]) == pytest.approx(expected["dice"], abs=1e-6)
    line = table_in(capsys.readouterr().out)[0]
    assert (line["scans"], line["no prediction"], line["no label"], line["neither"]) == ("2", "1", "0", "0")
    diagonal, in_mm = (np.linalg.norm(sides) for sides in ((24, 22, 18), (24, 22, 36)))
    assert line["Dice %"] == f"{100 * expected['dice'] / 2:.2f}"
    assert line["ASD voxel"] == f"{(expected['asd'] + diagonal) / 2:.2f} (1 of 2; these alone {expected['asd']:.2f})"
    assert line["95HD mm"] == f"{(expected['hd95_mm'] + in_mm) / 2:.2f} (1 of 2; these alone {expected['hd95_mm']:.2f})"
    for unit, length in {"": diagonal, "_mm": in_mm}.items():
        for name in ("asd", "hd95"):
            assert float(empty[f"{name}{unit}_penalised"]) == pytest.approx(length, abs=1e-6)
            assert full[f"{name}{unit}_penalised"] == full[f"{name}{unit}"]


def test_a_scan_whose_prediction_overflows_is_named_not_scored_as_empty(trained, tmp_path):
    folder = shutil.copytree(trained.parent / "set", tmp_path / "set")
    with h5py.File(folder / "case08" / "mri_norm2.h5", "a") as f:
        f["image"][...] *= 1e6
    args = ["--data", str(folder), "--output", "seg"]
    score(trained, tmp_path / "fp32", *args)
    with pytest.raises(UserError, match=r"case08: .*case08.* not a number or infinite.*--precision fp16"):
        score(trained, tmp_path / "fp16", *args, "--precision", "fp16")
    assert not (tmp_path / "fp16" / "cases.csv").exists()


def test_a_scan_with_nothing_to_find_is_counted_apart(trained, tmp_path, capsys, fake):
    folder = shutil.copytree(trained.parent / "set", tmp_path / "set")
    nothing = np.zeros_like(label_of(folder, "case08"))
    with h5py.File(folder / "case08" / "mri_norm2.h5", "a") as f:
        f["label"][...] = 0
    near = np.roll(label_of(folder, "case09"), 2, axis=0)
    fake(folder, {"case08": nothing, "case09": near})
    capsys.readouterr()
    score(trained, tmp_path / "out", "--data", str(folder), "--output", "seg")
    line = table_in(capsys.readouterr().out)[0]
    assert (line["no prediction"], line["no label"], line["neither"]) == ("0", "0", "1")
    expected = measure(near, label_of(folder, "case09"))
    assert line["Dice %"] == f"{100 * expected['dice']:.2f} (1 of 2)"
    assert line["95HD voxel"] == f"{expected['hd95']:.2f} (1 of 2)"


def test_largest_component_alone_is_kept(trained, tmp_path, fake):
    folder = trained.parent / "set"
    label = label_of(folder, "case08")
    speck = label.copy()
    speck[0, 0, 0:3] = 1
    fake(folder, {"case08": speck, "case09": label_of(folder, "case09")})
    rows = score(trained, tmp_path / "largest", "--output", "seg")
    dice = {row["component"]: float(row["dice"]) for row in rows if row["case"] == "case08"}
    assert dice["largest"] == 1 and dice["all"] == pytest.approx(binary.dc(speck, label), abs=1e-6) != 1
    assert np.array_equal(saved_mask(tmp_path / "largest", "seg", "case08"), label)
    score(trained, tmp_path / "all", "--output", "seg", "--save", "all")
    assert np.array_equal(saved_mask(tmp_path / "all", "seg", "case08"), speck)


# -- grids --


def test_half_resolution_is_scored_on_the_scans_own_grid(tmp_path):
    shape = (37, 35, 33)
    folder = make_set(tmp_path / "set", shape=shape)
    args = ["--data", str(folder), "--runs", str(tmp_path), *TINY, "--iterations", "30", "--lr", "0.1", "--lr-steps"]
    train_dtml.main([*args, "--k", "10", "--filters", "4", "--downsample", "2", "--name", "half"])
    test_la.main(["--checkpoint", str(tmp_path / "half"), "--save", "all", "--threads", "1"])
    out = tmp_path / "half" / "test"
    settings = json.loads((out / "test.json").read_text())
    assert settings["stride"] == [9, 9, 2], "the papers' stride on the pooled grid"
    assert settings["downsample"] == 2 and settings["windows"] == 2 * (2 * 2 * 2)  # 19x18x17 voxels, patches of 16
    for row in csv_rows(out / "cases.csv"):
        if row["component"] == "all":
            path = out / "predictions" / row["output"] / f"{row['case']}.nii.gz"
            assert sitk.ReadImage(str(path)).GetSize() == shape and sitk.ReadImage(str(path)).GetSpacing() == SPACING
            mask, label = saved_mask(out, row["output"], row["case"]), label_of(folder, row["case"])
            assert int(row["label_voxels"]) == label.sum() and int(row["voxels"]) == mask.sum()
            assert float(row["dice"]) == pytest.approx(binary.dc(mask, label), abs=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_half_resolution_moves_nothing(axis):
    """A method that returns its input gives back a scan that rises evenly, away from the ends of the axis."""
    echo, shape = SimpleNamespace(predict=lambda patches, outputs: patches), (41, 36, 35)
    sides = [n if i == axis else 1 for i, n in enumerate(shape)]
    rising = torch.linspace(0, 1, shape[axis]).reshape(sides).expand(*shape).contiguous()
    window = {"patch_size": (16, 16, 16), "stride": (8, 8, 8), "weighting": "uniform", "batch_size": 2}
    p = predict_scan(echo, rising, ("seg",), downsample=2, **window)
    assert p.shape == (1, *shape)
    inner = slice(2, shape[axis] - 4)
    torch.testing.assert_close(p[0].movedim(axis, 0)[inner], rising.movedim(axis, 0)[inner], rtol=0, atol=1e-5)
    same = predict_scan(echo, rising, ("seg",), downsample=1, **window)
    torch.testing.assert_close(same[0], rising, rtol=0, atol=1e-6)


# -- checkpoints and cases --


def test_unfinished_checkpoint_is_tested_with_a_warning(trained, tested, tmp_path, capsys):
    unfinished = score(trained / "previous.pt", tmp_path / "unfinished")
    assert "warning: " in (err := capsys.readouterr().err) and "previous.pt is not finished: 20 of 30 iterations" in err
    assert unfinished != tested.rows
    assert json.loads((tmp_path / "unfinished" / "test.json").read_text())["iteration"] == 20


def test_only_test_cases_are_tested_and_training_files_are_not_needed(trained, tested, tmp_path):
    folder = shutil.copytree(trained.parent / "set", tmp_path / "set")
    for i in range(8):
        shutil.rmtree(folder / f"case0{i}")
    assert score(trained, tmp_path / "out", "--data", str(folder)) == tested.rows


def test_cases_in_subfolders_have_predictions_in_subfolders(trained, tmp_path):
    folder = make_set(tmp_path / "set")
    (folder / "site").mkdir()
    (folder / "case08").rename(folder / "site" / "case08")
    (folder / "test.list").write_text("site/case08\ncase09\n")
    rows = score(trained, tmp_path / "out", "--data", str(folder))
    assert {row["case"] for row in rows} == {"site/case08", "case09"}
    assert saved_mask(tmp_path / "out", "seg", "site/case08").shape == (24, 22, 18)


# -- what made it --


def test_a_run_and_a_test_write_down_what_made_them(tiny_set, tmp_path):
    folder = tmp_path / "run"
    args = ["--data", str(tiny_set), *TINY, "--iterations", "2", "--seed", "7", "--picture-every", "1"]
    train_dtml.main([*args, "--runs", str(tmp_path), "--name", "run"])
    test_la.main(["--checkpoint", str(folder), "--stride", "8", "8", "8", "--threads", "1"])
    saved = load(folder)
    run, test = (json.loads((folder / name).read_text()) for name in ("manifest.json", "test/test.json"))
    assert (saved["options"]["seed"], run["options"]["seed"]) == (7, 7) and saved["options"]["data"] == str(tiny_set)
    assert saved["checksums"] == run["checksums"] and len(run["checksums"]) == 8
    for told in (run, test):
        assert told["command"].startswith("python ") and told["packages"]["torch"] == torch.__version__
        assert not (ROOT / ".git").exists() or re.fullmatch("[0-9a-f]{40}", told["commit"])
    assert test["data"] == str(tiny_set) and test["iteration"] == 2
    known = {"manifest.json", "options.txt", "scalars.csv", "log.txt", "last.pt", "pictures", "test"}
    assert {path.name for path in folder.iterdir() if "tfevents" not in path.name} == known
