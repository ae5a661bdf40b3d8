"""Cross-validation: what a fold leaves out, that it is validated and tested on, and what the folds give together. Of
several scans of one patient no list, fold or test mixes those that are trained on with those that are tested on."""

import json
import random
import shutil
import statistics
from pathlib import Path

import pytest
from conftest import TINY, csv_rows, load, make_set
from scans import make_scans

import test_la
import train_dtml
from dataloaders.folds import fold_numbers, split_fold
from dataloaders.patients import patients_by_name
from tools import command_line, convert, folds
from tools.set_lists import PreviousLists
from tools.sources import Source
from tools.split import choose_split
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


def test_a_fold_of_an_early_run_goes_with_one_of_today(three, tmp_path, capsys):
    """Its manifest states neither --softmax, what it had were sigmoids, nor an option that came later and is idle."""
    early = shutil.copytree(three / "fold1", tmp_path / "early")
    manifest = json.loads((early / "manifest.json").read_text())
    del manifest["options"]["softmax"], manifest["options"]["paste"], manifest["options"]["halvings"]
    (early / "manifest.json").write_text(json.dumps(manifest))
    folds.main([str(three / "fold0"), str(early), str(three / "fold2")])
    assert "3 of 3 folds" in capsys.readouterr().out
    manifest["options"]["softmax"] = True
    (early / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"not of one cross-validation: --softmax is False and True\."):
        folds.main([str(three / "fold0"), str(early)])


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
    manifest["options"]["lr"], manifest["extended"] = 0.01, [1]
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"trainings went on after none and after 1 of their iterations\."):
        folds.main([runs[0], str(other)])
    (other / "manifest.json").write_bytes((three / "fold1" / "manifest.json").read_bytes())
    table = other / "validation" / "cases.csv"
    table.write_text(table.read_text() + table.read_text().partition("\n")[2].replace(",seg,", ",teacher,"))
    with pytest.raises(UserError, match=r"the test is of the outputs seg and seg, teacher\."):
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


# -- patients --


def patient(name: str) -> str:
    return name.split("_")[0]


def scans_of(*patients: str, labeled: int, unlabeled: int = 0) -> list[Source]:
    """Scans p_0, p_1, ... of each patient p, the first `labeled` of them with a label."""
    return [
        Source(f"{p}_{i}", Path(f"{p}_{i}"), Path("label") if i < labeled else None)
        for p in patients
        for i in range(labeled + unlabeled)
    ]


def split(scans: list[Source], **args) -> list[set[str]]:
    """The three lists as sets, with the patients from the scans' names."""
    patients = {scan.name: patient(scan.name) for scan in scans}
    return [set(names) for names in choose_split(scans, **{"challenge": False, "seed": 1, **args}, patients=patients)]


@pytest.mark.parametrize("seed", range(5))
def test_a_patient_comes_to_one_list_and_the_shares_are_kept(seed):
    scans = scans_of(*(f"p{i}" for i in range(10)), labeled=2, unlabeled=1)
    train, test, validation = split(scans, share=0.3, validation_share=0.2, seed=seed)
    assert len(test) == 6 and len(validation) == 4
    kept, tested, validated = ({patient(name) for name in names} for names in (train, test, validation))
    assert not kept & tested and not kept & validated and not tested & validated
    # the third scans of the five patients who are tested or validated on have no label, and are in no list
    assert len(train) == 15 and not any(name.endswith("_2") for name in test | validation)


def test_a_share_below_half_of_every_patient_still_tests_the_smallest_patient():
    scans = scans_of("a", "b", labeled=5) + scans_of("c", labeled=4)
    _, test, _ = split(scans, share=0.05)
    assert {patient(name) for name in test} == {"c"}
    with pytest.raises(UserError, match="5 labeled cases to train on and 0 to test on"):
        split(scans_of("a", labeled=5), share=0.2)


def test_later_scans_follow_their_patient():
    patients = [f"p{i}" for i in range(6)]
    first = scans_of(*patients, labeled=1)
    train, test, validation = split(first, share=0.34, validation_share=0.17)
    everything = frozenset(scan.name for scan in first)
    before = PreviousLists(sorted(train), sorted(test), everything, frozenset(), sorted(validation))
    more = scans_of(*patients, labeled=2, unlabeled=1)
    added = split(more, share=0.34, validation_share=0.17, before=before)
    for old, new in zip((train, test, validation), added, strict=True):
        assert {name for name in new if name.endswith("_1")} == {f"{patient(name)}_1" for name in old}
    assert {name for name in set().union(*added) if name.endswith("_2")} == {f"{patient(name)}_2" for name in train}


def test_folds_hold_whole_patients_and_are_even():
    names = [f"p{i % 7}_{i // 7}" for i in range(21)]
    random.Random(0).shuffle(names)
    left_out = []
    for i in range(3):
        trained, fold = split_fold(names, f"{i}/3", {name: patient(name) for name in names})
        assert not {*map(patient, trained)} & {*map(patient, fold)} and sorted(trained + fold) == sorted(names)
        assert len({*map(patient, fold)}) in (2, 3)
        left_out += fold
    assert sorted(left_out) == sorted(names)
    with pytest.raises(UserError, match="only 21 scans are labeled, of 7 patients"):
        split_fold(names, "0/8", {name: patient(name) for name in names})


def test_a_run_of_a_fold_and_its_tests_leave_its_patients_out(tmp_path):
    """case00 and case05, case01 and case06, ...: of each patient one scan is labeled, and one is not."""
    folder = make_set(tmp_path / "set", train=12, labeled=12)
    patients = {f"case{i:02d}": f"p{i % 5}" for i in range(10)}
    (folder / "dataset.json").write_text(json.dumps({"patients": patients}))
    args = ["--data", str(folder), "--runs", str(tmp_path), *TINY, "--labeled", "5", "--iterations", "1"]
    train_dtml.main([*args, "--name", "fold", "--fold", "1/5"])
    seen = json.loads((tmp_path / "fold" / "manifest.json").read_text())["checksums"]
    (_, (left_out,)) = split_fold([f"case0{i}" for i in range(5)], "1/5", patients)
    of_patient = {name for name in patients if patients[name] == patients[left_out]}
    assert set(seen) == {f"case{i:02d}" for i in range(12)} - of_patient and len(of_patient) == 2

    train_dtml.main([*args, "--name", "few", "--unlabeled", "0"])
    test_la.main(["--checkpoint", str(tmp_path / "few"), "--scans", "held-out", "--threads", "1"])
    tested = {row["case"] for row in csv_rows(tmp_path / "few" / "held-out" / "cases.csv")}
    assert tested == {"case10", "case11"}  # patients of their own
    with pytest.raises(UserError, match=r"case05 is in train.list, and the training used another scan of its patient"):
        test_la.main(["--checkpoint", str(tmp_path / "few"), "--scans", "held-out", "--cases", "case05"])

    (folder / "dataset.json").write_text(json.dumps({"patients": {"case02": "p", "case12": "p"}}))
    with pytest.raises(UserError, match=r"p has case02 in .*train\.list and case12 in .*test\.list"):
        train_dtml.main([*args, "--name", "shared"])


def test_convert_reads_patients_from_names_or_a_column_and_keeps_them(tmp_path, capsys):
    make_scans(tmp_path / "made", labeled=4, unlabeled=4)
    for kind in ("images", "labels"):  # of each of four patients one scan with a label and one without
        (tmp_path / "scans" / kind).mkdir(parents=True)
        for path in (tmp_path / "made" / kind).iterdir():
            number = int(path.name[len("patient")])
            path.rename(tmp_path / "scans" / kind / f"sub{number % 4}_day{number // 4}.nii.gz")
    args = ["--source", str(tmp_path / "scans"), "--out", str(tmp_path / "set"), "--test-share", "0.33"]
    convert.main([*args, "--patient", "([^_]+)_"])
    printed = capsys.readouterr()
    assert "patients: 3 in train.list, 1 in test.list" in printed.out
    assert "left out: 1 scan without label, of patients in test.list" in printed.err
    names = {split: (tmp_path / "set" / f"{split}.list").read_text().split() for split in ("train", "test")}
    (tested,) = names["test"]
    later = f"{patient(tested)}_day1"  # without label, of the tested patient
    assert len(names["train"]) == 6 and later not in names["train"] and not (tmp_path / "set" / later).exists()
    stated = json.loads((tmp_path / "set" / "dataset.json").read_text())["patients"]
    assert stated == {name: patient(name) for name in (*names["train"], tested, later)}
    with pytest.raises(UserError, match=r"was made with patients.*Give --patient as before"):
        convert.main(args)
    (tmp_path / "later.csv").write_text(f"image\nscans/images/{later}.nii.gz\n")  # and so nothing to convert
    more = ["--source", str(tmp_path / "later.csv"), "--patient", "([^_]+)_", "--workers", "2"]
    convert.main([*args, *more])
    assert "0 converted, 0 already there, 0 refused, 7 kept" in capsys.readouterr().out

    lines = [
        f"scans/images/{path.name},{tmp_path / 'scans' / 'labels' / path.name},{patient(path.name)}"
        for path in sorted((tmp_path / "scans" / "labels").iterdir())
    ]
    (tmp_path / "scans.csv").write_text("\n".join(["image,label,patient", *lines]))
    args = ["--source", str(tmp_path / "scans.csv"), "--out", str(tmp_path / "from-csv"), "--test-share", "0.33"]
    convert.main(args)
    assert (tmp_path / "from-csv" / "test.list").read_text().split() == names["test"]
    with pytest.raises(UserError, match="the CSV has a column patient"):
        convert.main([*args, "--patient", "(.*)_"])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", "is no regular expression"), ("[^_]+_", "needs one group in parentheses"),
     ("(a)(_)", "needs one group in parentheses"), ("(a*)_", "finds no patient in b_1, c$")],
)  # fmt: skip
def test_a_pattern_that_names_no_patient_is_refused(pattern, message):
    with pytest.raises(UserError, match=message.replace("$", r"\. Change it")):
        patients_by_name(["a_0", "b_1", "c"], pattern)
