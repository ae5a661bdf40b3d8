"""Cross-validation: what a fold leaves out, that it is validated and tested on, and what the folds give together."""

import json
import shutil
import statistics
from pathlib import Path

import pytest
from conftest import TINY, csv_rows, load, make_set

import test_la
import train_dtml
from dataloaders.folds import fold_numbers
from tools import command_line, folds
from utils.errors import UserError

LABELED = [f"case0{i}" for i in range(7)]
WORDS = [*TINY, "--labeled", "7", "--iterations", "1", "--device", "cpu", "--method", "supervised", "--unlabeled", "0"]


def words_of(folder: Path, fold: str, *more: str) -> list[str]:
    name = f"fold{fold[0]}"
    return ["--data", str(folder / "set"), "--runs", str(folder), "--name", name, *WORDS, "--fold", fold, *more]


def scored(run: Path, *args: str) -> list[dict[str, str]]:
    """The rows of cases.csv of --scans validation."""
    out = run.parent / "best-validation" if run.name == "best.pt" else run / "validation"
    test_la.main(
        ["--checkpoint", str(run), "--scans", "validation", "--stride", "16", "16", "16", "--threads", "1", *args]
    )
    return csv_rows(out / "cases.csv")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """set/ with 7 labeled and 2 unlabeled training scans, and the tested runs fold0, fold1 and fold2 of 3."""
    folder = tmp_path_factory.mktemp("folds")
    make_set(folder / "set", train=9, labeled=7)
    for i in range(3):
        train_dtml.main(words_of(folder, f"{i}/3", *(["--validate-every", "1"] if i == 0 else [])))
        scored(folder / f"fold{i}")
    return folder


@pytest.mark.parametrize("folds_", [2, 3, 5])
def test_folds_are_even_and_stay_as_they_are_when_scans_are_added(folds_):
    whole = fold_numbers(60, folds_)
    for count in range(60):
        numbers = fold_numbers(count, folds_)
        sizes = [numbers.count(fold) for fold in range(folds_)]
        assert numbers == whole[:count] and max(sizes) - min(sizes) <= 1
    for step in range(1, 7):  # a left and a right scan in turn, ...: no such pattern becomes a fold
        assert all(len(set(whole[start::step])) > 1 for start in range(step))


def test_every_labeled_scan_is_tested_once_by_the_run_that_did_not_train_on_it(three):
    everywhere = []
    for i in range(3):
        run = three / f"fold{i}"
        seen, names = set(load(run / "last.pt")["checksums"]), {row["case"] for row in rows_in(run)}
        assert seen == set(LABELED) - names and names <= set(LABELED)
        everywhere += names
    assert sorted(everywhere) == LABELED


def rows_in(run: Path) -> list[dict[str, str]]:
    return csv_rows(run / "validation" / "cases.csv")


def test_the_log_names_the_test_of_the_fold(three):
    log = (three / "fold1" / "log.txt").read_text()
    assert f"test_la.py --checkpoint {three / 'fold1'} --scans validation\n" in log


def test_a_fold_is_what_is_validated_while_the_run_trains(three):
    best = load(three / "fold0" / "best.pt")
    rows = [row for row in scored(three / "fold0" / "best.pt") if (row["output"], row["component"]) == ("seg", "all")]
    dices = [float(row["dice"]) for row in rows]
    assert {row["case"] for row in rows} == {row["case"] for row in rows_in(three / "fold0")}
    assert statistics.mean(dices) == pytest.approx(best["best"]["dice"], abs=2e-6)


def test_a_set_that_grew_is_tested_on_the_same_scans_and_never_on_one_of_the_training(three, tmp_path):
    shutil.copytree(three / "set", tmp_path / "set")
    before = {row["case"] for row in rows_in(three / "fold1")}
    lines = (tmp_path / "set" / "train.list").read_text().split()
    (tmp_path / "set" / "test.list").write_text("case10\n")
    (tmp_path / "set" / "train.list").write_text("\n".join([*lines[:7], "case09", *lines[7:]]) + "\n")
    test_la.main(["--checkpoint", str(three / "fold1"), "--scans", "validation", "--data", str(tmp_path / "set"),
                  "--out", str(tmp_path / "out"), "--threads", "1", "--stride", "16", "16", "16"])  # fmt: skip
    assert {row["case"] for row in csv_rows(tmp_path / "out" / "cases.csv")} == before
    (tmp_path / "set" / "train.list").write_text("\n".join([lines[6], *lines[:6], *lines[7:]]) + "\n")
    with pytest.raises(UserError, match="is a scan of the training"):
        test_la.main(["--checkpoint", str(three / "fold1"), "--scans", "validation", "--data", str(tmp_path / "set")])


def cells_of(text: str, title: str) -> dict[tuple[str, str], dict[str, str]]:
    """The table under a line: (output, component) -> column -> cell."""
    lines = text.partition(title)[2].strip().splitlines()
    header, _, *rest = [line for line in lines if line.startswith("|")]
    head = [cell.strip() for cell in header.strip("|").split("|")]
    result = {}
    for line in rest:
        row = dict(zip(head, [cell.strip() for cell in line.strip("|").split("|")], strict=True))
        result.setdefault((row["output"], row["component"]), row)
    return result


def test_the_summary_has_mean_and_sd_over_all_scans_and_over_the_folds(three, tmp_path, capsys):
    folds.main([str(three / "fold[0-2]"), "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert text in (tmp_path / "out" / "table.md").read_text() + "\n" and "3 of 3 folds, scans of fold 0: " in text
    by_fold = [
        [row for row in rows_in(three / f"fold{i}") if (row["output"], row["component"]) == ("seg", "all")]
        for i in range(3)
    ]
    for column, name, scale in (("Dice %", "dice", 100), ("95HD mm", "hd95_mm_penalised", 1)):
        values = [[scale * float(row[name]) for row in rows] for rows in by_fold]
        means, pooled = list(map(statistics.mean, values)), [v for fold in values for v in fold]
        for title, numbers in (("Over all scans:", pooled), ("Over the folds:", means)):
            cell = cells_of(text, title)["seg", "all"][column]
            assert cell.startswith(f"{statistics.mean(numbers):.2f} ± {statistics.stdev(numbers):.2f}"), (column, title)
    pooled_rows = csv_rows(tmp_path / "out" / "cases.csv")
    assert {(row["case"], row["fold"]) for row in pooled_rows} == {
        (row["case"], str(i)) for i, rows in enumerate(by_fold) for row in rows
    }


def test_what_is_not_one_cross_validation_is_refused(three, tmp_path, capsys):
    runs = [str(three / f"fold{i}") for i in range(3)]
    with pytest.raises(UserError, match=r"fold0/validation and .*fold0/validation are both of fold 0"):
        folds.main([runs[0], runs[0]])
    other = shutil.copytree(three / "fold1", tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["options"]["lr"] = 0.5
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"not of one cross-validation: --lr is 0.01 and 0.5\."):
        folds.main([runs[0], str(other)])
    for i in (0, 1):  # best.pt of each fold is of an iteration of its own
        folder = tmp_path / "best" / f"fold{i}"
        best = shutil.copytree(three / f"fold{i}", folder, ignore=shutil.ignore_patterns("best-*")) / "best-validation"
        (best.parent / "validation").replace(best)
        about = json.loads((best / "test.json").read_text())
        (best / "test.json").write_text(json.dumps({**about, "checkpoint": f"{best}/best.pt", "iteration": 400 + i}))
    folds.main([str(tmp_path / "best" / "fold?" / "best-validation")])
    with pytest.raises(UserError, match=r"the test is of iteration 1 and of best\.pt\."):
        folds.main([runs[0], str(best)])
    about = json.loads((three / "fold2" / "validation" / "test.json").read_text())
    shutil.copytree(three / "fold2", tmp_path / "third")
    (tmp_path / "third" / "validation" / "test.json").write_text(json.dumps({**about, "scans": "test"}))
    with pytest.raises(UserError, match=r"tested on the scans `test`. Test with --scans validation"):
        folds.main([runs[0], str(tmp_path / "third")])
    (tmp_path / "third" / "validation" / "test.json").write_text(json.dumps({**about, "cases": ["case00"]}))
    with pytest.raises(UserError, match=r"third/validation is of some scans of its fold alone, by --cases"):
        folds.main([runs[0], str(tmp_path / "third")])
    shutil.rmtree(tmp_path / "third" / "validation")
    with pytest.raises(UserError, match=r"third has no test of its fold. Run python test_la.py"):
        folds.main([str(tmp_path / "third")])
    del manifest["options"]["fold"]
    (tmp_path / "third" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"third is no run of train_dtml.py with --fold"):
        folds.main([str(tmp_path / "third")])
    capsys.readouterr()
    folds.main(runs[:2])
    assert "warning: fold 2 of 3 is missing" in capsys.readouterr().err


def test_wrong_folds_are_refused_and_a_run_is_named_after_its_own(three, tmp_path):
    with pytest.raises(UserError, match=r"there is no fold 3/3. Folds count from 0: 0/3 to 2/3"):
        train_dtml.main(words_of(three, "3/3"))
    with pytest.raises(UserError, match=r"no fold. Write the fold and their number, as 0/5"):
        train_dtml.main(words_of(three, "one"))
    with pytest.raises(UserError, match="deals out 8 folds, but only 7 scans are labeled"):
        train_dtml.main(words_of(three, "7/8"))
    assert not (three / "foldo").exists() and not (three / "fold7").exists()
    args = ["--data", str(three / "set"), "--labeled", "7", "--fold", "1/05"]
    assert command_line.read_options(args)[2].name == "dtml-7-fold1of5-seed1337"
