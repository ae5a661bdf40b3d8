"""Mistakes of the user: each is named in one text, before the first iteration, and leaves nothing behind."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_set, method_words
from refusals import SHAPE, edit, flags, image, refuse, train

import test_la
import train_dtml
from dataloaders.cases import find_cases, read_case
from dataloaders.lists import read_list
from methods import METHODS
from tools import command_line
from utils.errors import UserError


def cut(path: Path, share: float) -> None:
    """Keeps the first part of a file, at least one byte less than all."""
    data = path.read_bytes()
    path.write_bytes(data[: min(int(len(data) * share), len(data) - 1)])


def label(value: float = 1, dtype: type = np.uint8) -> np.ndarray:
    """A label of 0 and 1 with one voxel of this value."""
    box = np.zeros(SHAPE, dtype)
    box[8:16, 8:16, 6:12] = 1
    box[8, 8, 6] = value
    return box


@pytest.fixture(scope="module")
def whole_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_set`, which no test may change."""
    return make_set(tmp_path_factory.mktemp("whole") / "set")


# -- cases that cannot be used --

BROKEN_CASES = [  # what is done to a labeled case, and what is said of it
    (lambda s, c: (s / c / "mri_norm2.h5").unlink(), "there is no"),
    (lambda s, c: cut(s / c / "mri_norm2.h5", 0.5), "damaged or incomplete"),
    (lambda s, c: cut(s / c / "mri_norm2.h5", 0), "damaged or incomplete"),
    (lambda s, c: (s / c / "mri_norm2.h5").write_text("image: none\n"), "damaged or incomplete"),
    (lambda s, c: edit(s, c, image=None), "no dataset 'image'"),
    (lambda s, c: edit(s, c, label=None), "without a dataset 'label'"),
    (lambda s, c: edit(s, c, label=label()[1:]), "(23, 22, 18)"),
    (lambda s, c: edit(s, c, image=image()[None, None]), "three-dimensional"),
    (lambda s, c: edit(s, c, image=1.5), "three-dimensional"),
    (lambda s, c: edit(s, c, image=np.full(SHAPE, b"a")), "three-dimensional numbers"),
    (lambda s, c: edit(s, c, image=image()[:0]), "empty"),
    (lambda s, c: edit(s, c, image=image(np.nan)), "not a number"),
    (lambda s, c: edit(s, c, image=image(np.inf)), "infinite"),
    (lambda s, c: edit(s, c, image=image(-np.inf)), "infinite"),
    (lambda s, c: edit(s, c, image=np.full(SHAPE, 7, np.float32)), "constant (7)"),
    (lambda s, c: edit(s, c, label=label(2)), "holds 0, 1, 2 "),
    (lambda s, c: edit(s, c, label=label() * 255), "divide by 255"),
    (lambda s, c: edit(s, c, label=label(0.5, np.float32)), "holds 0, 0.5, 1 "),
    (lambda s, c: edit(s, c, label=label(-1, np.int16)), "holds -1, 0, 1 "),
    (lambda s, c: edit(s, c, label=label(np.nan, np.float32)), "nan"),
]


@pytest.mark.parametrize("script", ["train", "test"])
def test_21_cases_that_cannot_be_used_are_named_all_at_once(script, tmp_path, checkpoint):
    n = len(BROKEN_CASES)
    folder = make_set(tmp_path / "set", train=n + 2, labeled=n + 1)
    if script == "test":
        names = (folder / "train.list").read_text().split()
        (folder / "train.list").write_text(names.pop() + "\n")
        (folder / "test.list").write_text("\n".join(names) + "\n")
    for i, (break_it, _) in enumerate(BROKEN_CASES):
        break_it(folder, f"case{i:02d}")
    argv = {
        "train": flags(folder, "--labeled", str(n + 1)),
        "test": ["--checkpoint", str(checkpoint), "--data", str(folder)],
    }
    main = {"train": train_dtml.main, "test": test_la.main}[script]
    message = refuse(argv[script], f"{n} cases are", untouched=tmp_path, main=main)
    lines = {line.strip().partition(":")[0]: line for line in message.splitlines()[1:]}
    assert sorted(lines) == [f"case{i:02d}" for i in range(n)]
    for i, (_, text) in enumerate(BROKEN_CASES):
        assert text in lines[f"case{i:02d}"] and "mri_norm2.h5" in lines[f"case{i:02d}"]


def test_21_a_case_that_is_damaged_during_the_test_is_named(tiny_set, checkpoint, monkeypatch):
    def damaged(case):
        cut(case.path, 0.5)
        return read_case(case)

    monkeypatch.setattr(test_la, "read_case", damaged)
    argv = ["--checkpoint", str(checkpoint), "--data", str(tiny_set), "--stride", "16", "16", "16"]
    with pytest.raises(UserError, match=r"case08: .*mri_norm2\.h5 .*damaged.* It was whole when the test began\."):
        test_la.main(argv)
    assert not list(tiny_set.parent.rglob("cases.csv"))


# -- folders and lists that cannot be used --


@pytest.mark.parametrize("split", ["train", "test"])
def test_32_one_list_without_the_other_is_refused(split, tiny_set):
    (tiny_set / f"{split}.list").unlink()
    refuse(flags(tiny_set), str(tiny_set), "only one of train.list and test.list", untouched=tiny_set.parent)


def test_32_a_folder_without_lists_whose_cases_are_not_la_s_is_told_so(tiny_set):
    for split in ("train", "test"):
        (tiny_set / f"{split}.list").unlink()
    text = f"{tiny_set} has no train.list and test.list, and none of LA's cases"
    refuse(flags(tiny_set), text, "one a line", untouched=tiny_set.parent)


BROKEN_LISTS = {
    "a name twice": ("train.list", "case00\ncase01\ncase02\ncase01\n", ("case01", "more than once")),
    "a name twice in the test": ("test.list", "case08\ncase08\n", ("case08", "more than once")),
    "a name with ..": ("train.list", "case00\n../set/case01\n", ("../set/case01", "outside the data set")),
    "an absolute name": ("test.list", "/case08\n", ("/case08", "outside the data set")),
    "nothing": ("train.list", "", ("names no case",)),
    "blank lines": ("test.list", "\n  \n\r\n", ("names no case",)),
    "bytes that are no text": ("train.list", b"\xff\xfe\x00c\x00a", ("text file",)),
}


@pytest.mark.parametrize("kind", BROKEN_LISTS)
def test_32_list_that_cannot_be_used_is_named(kind, tiny_set):
    name, content, texts = BROKEN_LISTS[kind]
    (tiny_set / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse(flags(tiny_set), str(tiny_set / name), *texts, untouched=tiny_set.parent)


@pytest.mark.parametrize("shared", ["case01", "./case01"])
def test_32_case_in_both_lists_is_refused(shared, tiny_set):
    (tiny_set / "test.list").write_text(f"case08\n{shared}\n")
    refuse(flags(tiny_set), "train.list", "test.list", "case01", untouched=tiny_set.parent)


# -- data that are fine --


def test_32_white_space_in_lists_is_ignored(whole_set):
    for form in ("\ufeff{}", "\n  {}\t \r\n\n"):
        text = "\n".join(form.format(name) if i == 0 or "\ufeff" not in form else name for i, name in enumerate("abc"))
        (whole_set.parent / "a.list").write_bytes(text.encode())
        assert read_list(whole_set.parent / "a.list") == ["a", "b", "c"]


def test_28_labels_of_other_types_are_taken(tiny_set):
    before = [read_case(case)[1] for case in find_cases(tiny_set, ["case00", "case01"], labeled=True)[0]]
    for name, dtype in (("case00", bool), ("case01", np.float64)):
        edit(tiny_set, name, label=before[name == "case01"].astype(dtype))
    after = [read_case(case)[1] for case in find_cases(tiny_set, ["case00", "case01"], labeled=True)[0]]
    assert all(np.array_equal(a, b) and b.dtype == np.uint8 for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("method", [["--sdm-loss", "both"], ["--method", "supervised", "--head", "sdm"]], ids=" ".join)
@pytest.mark.parametrize("value", [0, 1], ids=["empty", "full"])
def test_29_empty_and_full_labels_train(value, method, tiny_set):
    for i in range(4):
        edit(tiny_set, f"case0{i}", label=np.full(SHAPE, value, np.uint8))
    state = train(tiny_set, "--iterations", "2", *method)
    assert all(torch.isfinite(t).all() for t in state["method"].values() if t.is_floating_point())


@pytest.mark.parametrize(
    ("shape", "cache"), [((12, 9, 7), "none"), ((16, 16, 16), "ram"), ((17, 17, 17), "none"), ((40, 9, 17), "ram")]
)
def test_30_volumes_of_any_size_train_and_test(shape, cache, tmp_path):
    folder = make_set(tmp_path / "set", shape=shape)
    state = train(folder, "--cache", cache, "--iterations", "2")
    assert state["iteration"] == 2 and all(torch.isfinite(t).all() for t in state["method"].values())
    test_la.main(["--checkpoint", str(tmp_path / "runs" / "run"), "--stride", "8", "8", "8", "--threads", "1"])
    rows = (tmp_path / "runs" / "run" / "test" / "cases.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 3 * 2


# -- flags --

BAD_FLAGS = {
    "--labeled 0": ("--labeled 0", "between 1 and 8"),
    "--labeled 9": ("--labeled 9", "between 1 and 8"),
    "--labeled 1": ("--labeled 1", "2 labeled crops", "--labeled-batch"),
    "--unlabeled 5": ("--unlabeled 5", "between 0 and 4"),
    "--labeled-batch 5": ("5 labeled crops", "Label more cases and raise --batch-size, or give --labeled-batch 3"),
    "--labeled-batch 4 --batch-size 2": ("4 labeled crops", "Raise --batch-size, or give --labeled-batch 1"),
    "--labeled-batch 4": ("--labeled-batch 4", "4 unlabeled cases", "Raise --batch-size"),
    "--method dtml-plus --labeled 8": ("--batch-size 6", "0 unlabeled cases", "Lower --labeled", "--unlabeled 0"),
    "--labeled-batch 2 --unlabeled 0": ("--labeled-batch 2", "0 unlabeled cases"),
    "--patch-size 24 16 16": ("--patch-size 24 16 16", "multiples of 16", "Try --patch-size 32 16 16"),
    "--patch-size 16 16": ("--patch-size", "3 arguments"),
    "--patch-size 16 16 16 16": ("unknown argument 16",),
    "--patch-size 16 16 0": ("--patch-size", "0 must be at least 1"),
    "--labeld 4": ("unknown argument --labeld.", "Did you mean --labeled?"),
    "--method dtm": ("--method: 'dtm' must be one of dtml, ", "Did you mean dtml?"),
    "--method segformer": ("--method: invalid choice: 'segformer' (choose from", "See --help."),
    "--lambda_mx 1": ("unknown argument --lambda-mx.", "Did you mean --lambda-max?"),
    "--lr nan": ("--lr", "nan"),
    "--lr inf": ("--lr", "inf"),
    "--lr fast": ("--lr", "fast"),
    "--lr": ("--lr", "expected one argument"),
    "--seed 99999999999999999999": ("--seed", "99999999999999999999"),
    "--iterations 0": ("--iterations", "0"),
    "--lr-steps 1 -1": ("--lr-steps", "-1"),
    "--lr-gamma 1e308": ("--lr-gamma", "1e308 must be between 0 and 1"),
    "--batch-size 1000000000": ("--batch-size", "1000000000 must be between 1 and 10000"),
    "--threads 100000": ("--threads 100000 is more than 1024", "cores"),
    "--augment flips": ("--augment", "flips", "mirror"),
    "--device tpu": ("--device tpu", "cuda:N"),
    "--preset nonsense": ("--preset nonsense", "paper, authors"),
    "--profile nonsense": ("--profile", "nonsense", "half"),
    "--method nonsense": ("--method", "nonsense", "supervised"),
    "--method supervised --lambda-max 1": ("unknown argument --lambda-max.",),
    "--method tcse --preset authors": ("--preset authors", "Choose from paper, tuned."),
    "--method ua-mt --passes 0": ("--passes", "0 must be at least 1"),
    "--method mean-teacher --ema-decay 1.1": ("--ema-decay", "1.1 must be between 0 and 1"),
    "--method dtc --ramp linear": ("--ramp", "linear", "gaussian"),
    "--downsample 100": ("--downsample",),
    "--data nowhere": ("nowhere", "does not exist"),
    "@nowhere/options.txt": ("nowhere/options.txt", "cannot read"),
    "--resume nowhere/run": ("nowhere/run", "does not exist"),
    "somewhere": ("unknown argument somewhere",),
    # labels
    "--labeled 6": ("case04", "case05", "first 6 of train.list", "give --labeled 4 for those before case04"),
    "--labeled 5 --unlabeled 0": ("case04", "give --labeled 4", "put the labeled cases first"),
    "--method supervised --labeled 2": ("4 labeled crops", "give --batch-size 2"),
    # what does nothing beside another flag
    "--resume auto --fresh": ("--fresh does nothing with --resume auto",),
    "--cache-folder there": ("--cache-folder does nothing with --cache auto",),
    "--lr-steps 0 --lr-gamma 1": ("--lr-steps does nothing with --lr-gamma 1",),
    "--lr-steps --lr-gamma 0.5": ("--lr-gamma does nothing with --lr-steps",),
    "--iterations 12 --lr-steps 3 12": ("--lr-steps 12 never comes in --iterations 12",),
    "--method supervised --unlabeled 2": ("--unlabeled does nothing here: ", "labeled scans only"),
    "--method dtc --beta 0 --sdm-of scan": ("--sdm-of does nothing here: ", "no loss of this run needs distance maps"),
    "--sdm-loss both --dis-weight 0 --sdm-of scan": ("--sdm-of does nothing here",),
    "--lambda-max 0 --ramp-end 0.5": ("--ramp-end", "--lambda-max 0"),
    "--flip-axes z": ("--flip-axes does nothing with --augment d4",),
    "--window 40 400": ("--window does nothing with --normalize none",),
    "--normalize scan --window 40 400": ("--window does nothing with --normalize scan",),
    "--device cpu --precision bf16 --method dtc": ("changes nothing for --method dtc",),
    # what does not go together, or is out of bounds
    "--device cpu --precision tf32": ("is arithmetic of GPUs",),
    "--compile --recompute": ("Leave out --recompute",),
    "--method dtc --sdm-of scan --random-rotation 5": ("--sdm-of scan does not go with", "--sdm-of crop"),
    "--method dtc --sdm-of scan --random-scale 0.1": ("--sdm-of scan does not go with",),
    "--augment flip --flip-axes x x": ("--flip-axes names an axis twice",),
    "--random-rotation 200": ("between 0 and 180",),
    "--halvings 3 3 2": ("--halvings must be three numbers from 0 to 4, the largest 4",),
    "--halvings 2 2 0": ("--halvings must be three numbers from 0 to 4, the largest 4",),
    "--normalize window": ("--normalize window needs --window LEVEL WIDTH",),
    "--normalize window --window 40 0": ("--window 40 0: the width must be above 0",),
    "--normalize window --window 40 -3": ("the width must be above 0",),
    "--normalize window --window nan 3": ("both be finite",),
    "--normalize window --window 40": ("--window 40 needs a LEVEL and a WIDTH",),
    "--normalize window --window 40 400 50 0": ("--window 40 400 50 0: the width must be above 0",),
    "--method asdnet --classes 2": ("--classes 2: this method knows one class",),
    "--method dk-uxnet --groups 8": ("--groups must be two",),
    "--method dk-uxnet --query-channels 20": ("multiple of 16",),
    "--method dk-uxnet --no-kmax --consistency-terms qdc": ("--no-kmax",),
    "--method mc-net-plus --temperature 2": ("--temperature 2 must be at most 1",),
    "--method ua-mt --head sdm": ("--head. It is an option of --method supervised.",),
    "--method ua-mt --no-learnable": ("--no-learnable. It is an option of --method double-unc.",),
    # words of other projects
    "--epochs 100": ("unknown argument --epochs. Here it is --iterations, a number of batches",),
    "--gpu 0": ("unknown argument --gpu. Here it is --device, as --device cuda:0",),
    "--lr_rate 0.1": ("unknown argument --lr-rate. Here it is --lr.",),
    "--labeled_bs=2": ("unknown argument --labeled-bs. Here it is --labeled-batch.",),
    "--output-dir x": ("Here it is --runs.",),
}


@pytest.mark.parametrize("args", BAD_FLAGS)
def test_34_bad_flag_is_named(args, whole_set):
    refuse(flags(whole_set, *args.split()), *BAD_FLAGS[args], untouched=whole_set.parent)


NEED_UNLABELED = ["ua-mt", "sassnet", "asdnet", *(f"{m} --consistency-on unlabeled" for m in ("mean-teacher", "tcse"))]


@pytest.mark.parametrize("method", NEED_UNLABELED)
def test_33_method_that_needs_unlabeled_scans_is_refused_without(method, whole_set):
    for args, labeled in (("--unlabeled 0", 4), ("--labeled 8", 8)):
        argv = flags(whole_set, "--method", *method.split(), *args.split())
        text = f"--method {method.split()[0]} needs unlabeled scans"
        refuse(argv, text, f"all {labeled} are labeled", "--unlabeled 0", untouched=whole_set.parent)


@pytest.mark.parametrize(
    "method", [m for m, kind in METHODS.items() if kind.uses_unlabeled and m not in NEED_UNLABELED]
)
def test_33_method_that_needs_none_trains_without_unlabeled_scans(method, tiny_set):
    args = [*method_words(method), "--unlabeled", "0"]
    options = command_line.read_options(flags(tiny_set, *method_words(method)))[1]
    if METHODS[method](options, iterations=1).needs_unlabeled:  # one that is not yet in the list
        refuse(flags(tiny_set, *args), "needs unlabeled scans", untouched=tiny_set.parent)
    else:
        assert len(train(tiny_set, *args)["checksums"]) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_40_gpu_that_is_not_there_is_refused(whole_set):
    argv = flags(whole_set, "--device", "cuda:1")
    refuse(argv, "--device cuda:1", "--device cpu", untouched=whole_set.parent)


@pytest.mark.parametrize("script", ["train", "test"])
def test_40_both_scripts_say_what_to_lower_where_memory_does_not_suffice(script, tiny_set, checkpoint, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(METHODS["dtml"], {"train": "forward", "test": "predict"}[script], fail)
    with pytest.raises(UserError, match=r"the GPU's memory does not suffice.* [Ll]ower --batch-size"):
        if script == "train":
            train(tiny_set)
        else:
            test_la.main(["--checkpoint", str(checkpoint), "--data", str(tiny_set), "--stride", "16", "16", "16"])
    assert list((tiny_set.parent / "runs").rglob("*.pt")) == []


@pytest.mark.parametrize("args", [["--runs", "set/train.list"], ["--name", "x" * 300]], ids=["a file", "too long"])
def test_35_run_folder_that_cannot_be_made_is_named(args, tiny_set, monkeypatch):
    monkeypatch.chdir(tiny_set.parent)
    before = {path for path in tiny_set.parent.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=f"cannot make the run folder .*{args[1]}"):
        train_dtml.main(flags(tiny_set, *args))
    assert {path for path in tiny_set.parent.rglob("*") if path.is_file()} == before


def test_35_a_folder_that_holds_no_run_cannot_be_resumed(tiny_set):
    folder = tiny_set.parent / "runs" / "notes"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("seeds")
    with pytest.raises(UserError, match=r"holds files, but no run to go on with\. Use --fresh"):
        train_dtml.main(flags(tiny_set, "--name", "notes", "--resume", "auto"))
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


# -- flags of the test --

BAD_TEST_FLAGS = {
    "--output nonsense": ("--output nonsense", "seg, sdm, mean"),
    "--stride 17 16 16": ("--stride", "17", "patch"),
    "--stride 0 8 8": ("--stride", "0"),
    "--patch-size 16 24 16": ("--patch-size", "24", "multiples of 16"),
    "--weighting nonsense": ("--weighting", "gaussian"),
    "--save nonsense": ("--save", "largest"),
    "--device tpu": ("--device tpu",),
    "--data nowhere": ("nowhere", "does not exist"),
    "--strides 8 8 8": ("unknown argument --strides.", "Did you mean --stride?"),
    "--model x": ("Here it is --checkpoint.",),
    "--epochs 3": ("unknown argument --epochs. See --help",),
}


def test_34_bad_flag_of_the_test_is_named(checkpoint):
    for args, texts in BAD_TEST_FLAGS.items():
        argv = ["--checkpoint", str(checkpoint), "--stride", "8", "8", "8", *args.split()]
        refuse(argv, *texts, untouched=checkpoint.parent.parent, main=test_la.main)
