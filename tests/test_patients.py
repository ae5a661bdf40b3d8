"""Several scans of one patient: no list, fold or test mixes a patient who is trained on with one who is tested on."""

import json
import random
from pathlib import Path

import pytest
from conftest import TINY, csv_rows, make_set
from scans import make_scans

import test_la
import train_dtml
from dataloaders.folds import split_fold
from dataloaders.patients import patients_by_name
from tools import convert
from tools.set_lists import PreviousLists
from tools.sources import Source
from tools.split import choose_split
from utils.errors import UserError


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
    assert "left out: 1 scans without label, of patients in test.list" in printed.err
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
