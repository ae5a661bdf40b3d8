"""A data set that grows with its source: no case changes its place, and none is trained on that was tested on."""

import json
import random
import shutil
from pathlib import Path

import h5py
import pytest
from scans import add, converted, decathlon, make_scans, names

from dataloaders.lists import lists_of
from tools import check, convert
from tools.set_lists import PreviousLists, extended_lists
from tools.sources import Source
from tools.split import choose_split
from utils.errors import UserError


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


def test_lists_that_another_conversion_wrote_meanwhile_are_not_overwritten(tmp_path, monkeypatch):
    for folder, first in (("a", 0), ("b", 10)):
        for i in range(first, first + 3):
            add(tmp_path / folder, f"ball_{i:03d}", seed=i)

    def meanwhile(*args):
        monkeypatch.undo()
        converted(tmp_path / "b", tmp_path / "set")
        return convert.outcomes_of(*args)

    monkeypatch.setattr(convert, "outcomes_of", meanwhile)
    with pytest.raises(UserError, match=r"lists of .*set have changed meanwhile.*Give the same command again"):
        converted(tmp_path / "a", tmp_path / "set")
    out = converted(tmp_path / "a", tmp_path / "set")
    assert sorted(name for names in lists_of(out) for name in names) == names(*range(3), *range(10, 13))


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
    assert f"in none of the lists, and so left out: {', '.join(sorted([train[3], test[0]]))}" in (
        capsys.readouterr().out
    )
    assert {train[3], test[0]}.isdisjoint([*now, *now_test]) and "late" in [*now, *now_test]
    for split in ("train", "test"):
        (out / f"{split}.list").unlink()  # anew
    converted(source, out)
    assert sorted([*lists_of(out)[0], *lists_of(out)[1]]) == sorted([*train, *test, "late"])


def test_lists_written_before_the_first_conversion_are_what_the_set_has(tmp_path, capsys):
    """A published split: fewer scans than the download, in its own order, an unlabeled one first."""
    source, out = decathlon(tmp_path / "Task", labeled=10), tmp_path / "set"
    labeled, unlabeled = names(*range(10)), "ball_010"
    train, test = [unlabeled, *labeled[4:1:-1]], [labeled[7]]
    out.mkdir()
    (out / "train.list").write_text("\n".join(train) + "\n")
    (out / "test.list").write_text("\n".join(test) + "\n")
    for _ in range(2):  # the second time it is a set that may grow
        converted(source, out, "--test-share", "0.5")
        assert lists_of(out) == (train, test)
        assert {path.parent.name for path in out.rglob("*.h5")} == {*train, *test}
        assert "in none of the lists, and so left out: " in capsys.readouterr().out
    add(source, "late", seed=40)
    converted(source, out)
    assert "late" in [*lists_of(out)[0], *lists_of(out)[1]]
    (out / "test.list").write_text(f"{test[0]}\n{labeled[0]}\n")
    converted(source, out)
    assert lists_of(out)[1] == [test[0], labeled[0]] and (out / labeled[0]).is_dir()


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
    before, listed, has_label = PreviousLists(), {}, {}
    share, to_validate = draw.choice([None, 0.0, 0.3, 0.5]), draw.choice([0.0, 0.2, 0.4]) if seed % 2 else 0.0
    for step in range(6):
        for i in range(draw.randint(2, 9) if step == 0 else draw.randint(0, 4)):
            has_label[f"{draw.random()}"] = i < 3 if step == 0 and i < 4 else draw.random() < 0.6
        for name in has_label:
            has_label[name] |= name in before.train and draw.random() < 0.1
        scans = [Source(x, Path(x), Path(x) if has_label[x] else None) for x in sorted(has_label, key=hash)]
        scans = scans if step == 0 else [scan for scan in scans if draw.random() < 0.8]  # some are gone
        args = {"challenge": False, "share": share, "seed": seed, "before": before}
        train, test, validation = choose_split(scans, **args, validation_share=to_validate)
        assert test == choose_split(scans, **args)[1]
        labeled = frozenset(name for name in has_label if has_label[name])
        lists = extended_lists(before, train, test, validation, labeled=labeled, listed=listed)
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
        before = PreviousLists(now, now_test, frozenset(labeled & {*everything}), validation=validated)


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


def test_the_lists_of_a_new_set_are_drawn_as_if_refused_scans_were_not_there_and_have_them_once_they_are_fixed(
    tmp_path, capsys
):
    source = decathlon(tmp_path / "Task", labeled=10, unlabeled=0)
    _, test = lists_of(converted(source, tmp_path / "whole"))
    shutil.copytree(source, tmp_path / "fixed")
    shutil.copytree(source, tmp_path / "rest")
    for name in test:
        (source / "imagesTr" / f"{name}.nii.gz").write_bytes(b"cut")
        for part in ("images", "labels"):
            (tmp_path / "rest" / f"{part}Tr" / f"{name}.nii.gz").unlink()
    rest = converted(tmp_path / "rest", tmp_path / "smaller", "--validation-share", "0.3")
    capsys.readouterr()
    with pytest.raises(UserError, match=r"2 of 10 scans refused, the others are in"):
        converted(source, tmp_path / "set", "--validation-share", "0.3")
    said = capsys.readouterr().out
    assert "train.list: 4 labeled, then 0 unlabeled; test.list: 2; validation.list: 2" in said and "asks" not in said
    assert lists_of(tmp_path / "set") == lists_of(rest) and validation_list(tmp_path / "set") == validation_list(rest)
    out = converted(tmp_path / "fixed", tmp_path / "set", "--validation-share", "0.3")
    assert lists_of(out)[1] == lists_of(rest)[1] and {*test} <= {*lists_of(out)[0], *validation_list(out)}


def test_no_list_is_written_where_all_test_cases_of_the_source_are_refused(tmp_path):
    """Nothing is drawn in their place: the source states the split."""
    source = decathlon(tmp_path / "Task", labeled=3, unlabeled=0)
    add(source, "late", seed=4, split="Ts")
    (source / "imagesTs" / "late.nii.gz").write_bytes(b"cut")
    with pytest.raises(
        UserError, match=r"(?s)1 of 4 .*Without them no list is written: 3 .* train on and 0 to test on"
    ):
        converted(source, tmp_path / "set")
    assert not list((tmp_path / "set").glob("*.list"))
    scans = [Source(name, Path(name), Path(name), "test" if name == "a" else "") for name in "abc"]
    with pytest.raises(UserError, match="2 labeled cases to train on and 0 to test on"):
        choose_split(scans, challenge=False, share=None, seed=0, unusable={"a"})
