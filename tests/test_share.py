"""Weights to hand on: small, whole, the same predictions, and never mistaken for a run or for other weights."""

import csv
import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, csv_rows, make_set, method_words
from safetensors import safe_open
from safetensors.torch import save_file

import predict
import test_la
import train_dtml
from dataloaders.cases import LA_SUBFOLDER
from methods import restore
from tools import folds, share
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.shared_weights import checksum_of

MIB = 2**20
WORDS = [*TINY, "--batch-size", "2", "--device", "cpu", "--iterations", "2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """set/, and runs of DTML: tiny, and wide (7 MiB of weights)."""
    folder = tmp_path_factory.mktemp("share")
    data = ["--data", str(make_set(folder / "set")), "--runs", str(folder)]
    train_dtml.main([*WORDS, *data, "--name", "tiny"])
    train_dtml.main([*WORDS, *data, "--name", "wide", "--filters", "5"])
    return folder


def weights_of(where: Path) -> dict[str, torch.Tensor]:
    return restore(load_checkpoint(where)).state_dict()


def shared(run: Path, folder: Path, *args: str) -> list[Path]:
    share.main([str(run), str(folder), *args])
    return sorted(folder.iterdir())


def test_kernels_are_rounded_to_half_precision_and_nothing_else(runs, tmp_path):
    (file,) = shared(runs / "tiny", tmp_path / "w")
    assert file.name == "weights-1-of-1.safetensors"
    before, after = weights_of(runs / "tiny"), weights_of(tmp_path / "w")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert after[name].dtype == weight.dtype
        rounded = weight.half().float() if weight.dim() >= 2 else weight
        assert torch.equal(after[name], rounded), name
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_kernel_that_half_precision_does_not_hold_stays_as_it_is():
    for value in (torch.full((2, 2), 1e5), torch.ones(3), torch.ones(2, 2, dtype=torch.int64)):
        assert share.rounded(value) is value
    assert share.rounded(torch.ones(2, 2)).dtype == torch.float16


@pytest.mark.parametrize("exact", [False, True])
def test_files_are_small_and_hold_no_optimiser(exact, runs, tmp_path, capsys):
    files = shared(runs / "wide", tmp_path / "w", "--piece-mib", "1", *(["--exact"] if exact else []))
    numbers = sum(weight.numel() for weight in weights_of(runs / "wide").values())
    total = sum(file.stat().st_size for file in files)
    assert 1 < total / (numbers * (4 if exact else 2)) < 1.1
    assert len(files) >= total / MIB
    for file in files:
        with safe_open(file, framework="pt") as f:
            assert json.loads(f.metadata()["checkpoint"])["options"]["method"] == "dtml"
            assert file.stat().st_size <= MIB or len(list(f.keys())) == 1
    assert load_checkpoint(tmp_path / "w")["optimizer"] is None
    assert {file.name for file in files} == {
        f"weights-{i}-of-{len(files)}.safetensors" for i in range(1, len(files) + 1)
    }
    said = capsys.readouterr()
    assert said.out.count("MiB") == len(files) and str(tmp_path / "w") in said.err


@pytest.mark.parametrize("method", ["dtml", "sassnet", "dk-uxnet", "ad-mt"])
def test_a_method_predicts_from_them_what_its_run_does(method, tmp_path):
    make_set(tmp_path / "set")
    args = [*TINY, *method_words(method), "--device", "cpu", "--iterations", "1", "--data", str(tmp_path / "set")]
    train_dtml.main([*args, "--runs", str(tmp_path), "--name", "run"])
    shared(tmp_path / "run", tmp_path / "w", "--exact")
    shared(tmp_path / "run", tmp_path / "half")
    image = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for output in restore(load_checkpoint(tmp_path / "run")).outputs:
            run, exact, half = (
                restore(load_checkpoint(tmp_path / name)).eval().predict(image, (output,))
                for name in ("run", "w", "half")
            )
            assert torch.equal(run, exact)
            steep = method == "dtml" and output in ("sdm", "mean")  # k = 1500 makes a step of m
            assert ((run - half).abs().mean() if steep else (run - half).abs().max()) < 0.02


def test_test_la_and_predict_take_them_and_say_what_the_run_s_say(runs, tmp_path):
    shared(runs / "wide", tmp_path / "w", "--piece-mib", "1", "--exact")
    scan = str(runs / "set" / "case09" / "mri_norm2.h5")
    cases, masks = [], []
    for i, where in enumerate((runs / "wide", tmp_path / "w")):
        test_la.main(["--checkpoint", str(where), "--out", str(tmp_path / f"test{i}"), "--stride", "8", "8", "8"])
        with open(tmp_path / f"test{i}" / "cases.csv", newline="") as f:
            cases.append(list(csv.reader(f)))
        predict.main(["--checkpoint", str(where), scan, "-o", str(tmp_path / f"out{i}"), "--device", "cpu"])
        masks.append([path.read_bytes() for path in sorted((tmp_path / f"out{i}").rglob("*.nii.gz"))])
    assert cases[0] == cases[1] and len(cases[0]) > 2
    assert masks[0] == masks[1] and masks[0]


def test_those_of_the_best_checkpoint_are_called_finished(runs, tmp_path, capsys):
    state = load_checkpoint(runs / "tiny")
    options = {**state["options"], "iterations": 9}
    for name, warned in (("best.pt", False), ("last.pt", True)):
        torch.save({**state, "options": options}, tmp_path / name)
        share.main([str(tmp_path / name), str(tmp_path / name.partition(".")[0])])
        scan = str(runs / "set" / "case09" / "mri_norm2.h5")
        out = str(tmp_path / f"out-{name}")
        predict.main(["--checkpoint", str(tmp_path / name.partition(".")[0]), scan, "-o", out, "--device", "cpu"])
        assert ("not finished: 2 of 9 iterations" in capsys.readouterr().err) == warned


def test_tools_folds_takes_those_of_the_best_checkpoint_for_the_best(runs, tmp_path):
    """The names of their files do not say it."""
    train_dtml.main([*WORDS, "--data", str(runs / "set"), "--runs", str(tmp_path), "--name", "run", "--fold", "0/2",
                     "--validate-every", "1"])  # fmt: skip
    for file in ("best.pt", "last.pt"):
        weights, out = str(tmp_path / file.removesuffix(".pt")), str(tmp_path / "run" / f"of-{file}")
        share.main([str(tmp_path / "run" / file), weights])
        argv = ["--checkpoint", weights, "--out", out, "--scans", "validation", "--threads", "1"]
        test_la.main([*argv, "--device", "cpu", "--stride", "16", "16", "16"])
        assert folds.tested(folds.read_fold(Path(out))) == {"best.pt": "best.pt", "last.pt": "iteration 2"}[file]


def test_no_training_goes_on_from_them(runs, tmp_path):
    shared(runs / "tiny", tmp_path / "w")
    with pytest.raises(UserError, match=r"has no optimizer state, .* with --init .*w\."):
        train_dtml.main(["--resume", str(tmp_path / "w")])


@pytest.mark.parametrize("lost", [0, -1])
def test_a_missing_piece_is_told(lost, runs, tmp_path):
    files = shared(runs / "wide", tmp_path / "w", "--piece-mib", "1")
    files[lost].unlink()
    with pytest.raises(UserError, match="lacks files of its weights"):
        load_checkpoint(tmp_path / "w")
    with pytest.raises(UserError, match="does not exist"):
        load_checkpoint(files[lost])


def test_pieces_of_two_runs_are_told(runs, tmp_path):
    data = ["--data", str(runs / "set"), "--runs", str(tmp_path), "--name", "other", "--filters", "5", "--seed", "7"]
    train_dtml.main([*WORDS, *data])
    ours = shared(runs / "wide", tmp_path / "w", "--piece-mib", "1")
    theirs = shared(tmp_path / "other", tmp_path / "v", "--piece-mib", "1")
    ours[1].write_bytes(theirs[1].read_bytes())
    with pytest.raises(UserError, match="different weights"):
        load_checkpoint(tmp_path / "w")


def test_a_damaged_piece_is_told(runs, tmp_path):
    files = shared(runs / "wide", tmp_path / "w", "--piece-mib", "1")
    data = bytearray(files[1].read_bytes())
    data[len(data) // 2] ^= 1
    files[1].write_bytes(data)
    with pytest.raises(UserError, match=files[1].name):
        load_checkpoint(tmp_path / "w")


@pytest.mark.parametrize("about", [None, "", "{", "[]", "[" * 10_000, "{}", '{"sha256": 3, "no_tensors": 4}'])
def test_foreign_pieces_are_an_error_and_no_crash(about, tmp_path):
    file = tmp_path / "weights-1-of-1.safetensors"
    save_file({"x": torch.zeros(2)}, file, {} if about is None else {"checkpoint": about})
    with pytest.raises(UserError, match=file.name):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("changed", [{}, {"format": 2}, {"options": {}}, {"iteration": "2"}])
def test_what_is_stated_of_the_weights_is_checked_like_a_checkpoint(changed, runs, tmp_path):
    (file,) = shared(runs / "tiny", tmp_path / "w")
    with safe_open(file, framework="pt") as f:
        about = json.loads(f.metadata()["checkpoint"]) | changed
        weights = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    about["sha256"] = checksum_of(about, weights.items())
    save_file(weights, file, {"checkpoint": json.dumps(about)})
    if changed:
        with pytest.raises(UserError, match=r"weights-1|/w "):
            load_checkpoint(tmp_path / "w")
    else:
        assert weights_of(tmp_path / "w").keys() == weights_of(runs / "tiny").keys()


def test_the_weights_in_the_repository_give_the_recorded_figures_on_a_real_scan(la, tmp_path):
    """Those of DTML+ with 8 labels at half resolution, on the first scan of test.list."""
    record = ROOT / "results" / "half" / "plus-8-seed1340"
    lists = ROOT / "data" / "splits" / "la"
    name = (lists / "test.list").read_text().split()[0]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / LA_SUBFOLDER).symlink_to((la / LA_SUBFOLDER).resolve())
    (tmp_path / "set" / "train.list").write_text((lists / "train.list").read_text())
    (tmp_path / "set" / "test.list").write_text(f"{name}\n")
    args = ["--data", str(tmp_path / "set"), "--out", str(tmp_path / "out"), "--save", "none", "--device", "cpu"]
    test_la.main(["--checkpoint", str(record), *args])
    rows = []
    for file in (record / "cases.csv", tmp_path / "out" / "cases.csv"):
        rows.append({(r["output"], r["component"]): r for r in csv_rows(file) if r["case"] == name})
    recorded, result = rows
    assert recorded.keys() == result.keys() and len(result) == 12
    for key, row in result.items():
        assert float(row["dice"]) == pytest.approx(float(recorded[key]["dice"]), abs=0.0005), key


def test_what_is_there_is_never_overwritten(runs, tmp_path):
    with pytest.raises(UserError, match=r"last\.pt is there already"):
        share.main([str(runs / "tiny"), str(runs / "tiny")])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        share.main([str(runs / "tiny"), str(tmp_path / "file")])
