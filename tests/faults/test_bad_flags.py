"""Flags that cannot be used: each is named in one text, before the first iteration, and leaves nothing behind."""

from pathlib import Path

import pytest
import torch
from conftest import make_set, method_words
from refusals import flags, refuse, train

import test_la
import train_dtml
from methods import METHODS
from tools import command_line
from utils.errors import UserError


@pytest.fixture(scope="module")
def whole_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_set`, which no test may change."""
    return make_set(tmp_path_factory.mktemp("whole") / "set")


# -- flags of the training --

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
    "/": ("unknown argument /. Did you mean --data /?",),
    "@nowhere/options.txt": ("cannot read the options file nowhere/options.txt: No such file or directory. Give an",),
    "--patch-size 16 16 0": ("--patch-size", "0 must be at least 1"),
    "--labeld 4": ("unknown argument --labeld.", "Did you mean --labeled?"),
    "--method dtm": ("--method: 'dtm' must be one of dtml, ", "Did you mean dtml?"),
    "--method segformer": ("--method: 'segformer' must be one of dtml, ", "unimatch."),
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


def test_40_gpu_that_is_not_there_is_refused(whole_set):
    count = torch.cuda.device_count()
    argv = flags(whole_set, "--device", f"cuda:{count}")
    advice = "Choose from cuda:0 to" if count else "--device cpu"
    refuse(argv, f"--device cuda:{count}", advice, untouched=whole_set.parent)


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
