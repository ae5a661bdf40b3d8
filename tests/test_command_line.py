"""What a command line comes to: files of options, presets, profiles, and the name of the run folder."""

import dataclasses
import errno
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, make_set

import train_dtml
from methods import METHODS
from tools import command_line
from utils.errors import run
from utils.options import as_flags


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data set `set`."""
    return make_set(tmp_path_factory.mktemp("sets") / "set").parent


@pytest.fixture(autouse=True)
def inside(sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags name data by relative paths."""
    monkeypatch.chdir(sets)


# -- how flags are written --


def test_underscores_are_hyphens_but_in_values():
    args = ["--patch_size", "32", "16", "16", "--lr_gamma=0.5", "--name=my_run"]
    o, _, folder, *_ = command_line.read_options(["--data", "set", *args])
    assert (o.patch_size, o.lr_gamma, folder.name) == ([32, 16, 16], 0.5, "my_run")


def test_later_flags_win_over_an_options_file(tmp_path):
    (tmp_path / "options.txt").write_text("# a comment\n--lr 0.5 --seed 7\n--name 'from file'\n")
    o, _, folder, *_ = command_line.read_options(["--data", "set", f"@{tmp_path / 'options.txt'}", "--lr", "0.25"])
    assert (o.lr, o.seed, folder) == (0.25, 7, Path("runs/from file"))
    assert command_line.read_options(["--data", "set", "--lr", "0.25", f"@{tmp_path / 'options.txt'}"])[0].lr == 0.5


# -- presets, profiles, names --


def settled(*args: str) -> dict[str, Any]:
    """All options that a command line comes to."""
    o, method_options, *_ = command_line.read_options(list(args))
    return {**dataclasses.asdict(o), **dataclasses.asdict(method_options)}


AUTHORS = {"lambda_max": 1.0, "ramp": "steps", "consistency_times": 2, "augment": "mirror"}


@pytest.mark.parametrize(
    ("choice", "name", "value"),
    [("--preset authors", "ramp", "gaussian"), ("--preset authors", "lambda_max", 0.3),
     ("--profile half", "patch_size", [32, 48, 16]), ("--profile half", "iterations", 60)],
)  # fmt: skip
def test_flag_wins_over_a_preset_and_a_profile(choice, name, value):
    flag = shlex.split(as_flags({name: value}))
    usual = settled("--data", "set", *choice.split())
    for args in ([*flag, *choice.split()], [*choice.split(), *flag]):
        options = settled("--data", "set", *args)
        assert options[name] == value != usual[name]
        assert {other for other in options if options[other] != usual[other]} <= {name, "lr_steps"}


@pytest.mark.parametrize(
    ("flags", "batch", "labeled"),
    [("", 6, 4), ("--batch-size 8", 8, 4), ("--batch-size 4", 4, None), ("--batch-size 4 --labeled-batch 1", 4, 1),
     ("--labeled-batch 3", 6, 3), ("--unlabeled 0", 4, None), ("--unlabeled 0 --batch-size 6", 6, None)],
)  # fmt: skip
def test_a_preset_s_labeled_crops_count_where_the_batch_has_room_for_them(flags, batch, labeled):
    options = settled("--method", "dtml-plus", "--data", "set", *flags.split())
    assert (options["batch_size"], options["labeled_batch"]) == (batch, labeled)


def test_profile_sets_the_scale_and_nothing_else():
    full, half = settled("--data", "set"), settled("--data", "set", "--profile", "half")
    scale = {"downsample": 2, "patch_size": [64, 64, 32], "filters": 8, "iterations": 2400}
    follows = {"profile": "half", "lr_steps": [1000, 2000]}
    assert {name: value for name, value in half.items() if value != full[name]} == {**scale, **follows}
    assert full["patch_size"] == [112, 112, 80] and full["iterations"] == 6000 and full["lr_steps"] == [2500, 5000]
    both = settled("--data", "set", "--profile", "half", "--preset", "authors")
    assert {name: both[name] for name in (*scale, *AUTHORS)} == {**scale, **AUTHORS}


def test_without_la_the_phantom_set_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = settled()
    assert (options["data"], options["profile"], options["labeled"]) == ("data/phantom", "phantom", 8)
    assert settled("--data", "data/phantom") == options and options["iterations"] < 6000
    (tmp_path / "data" / "la").mkdir(parents=True)
    options = settled()
    assert (options["data"], options["profile"], options["labeled"]) == ("data/la", "full", 16)


@pytest.mark.parametrize(
    ("args", "name"),
    [
        ("", "set/dtml-4-seed1337"),
        ("--labeled 8 --seed 2", "set/dtml-8-seed2"),
        ("--preset authors", "set/dtml-authors-4-seed1337"),
        ("--profile hippocampus", "set-hippocampus/dtml-4-seed1337"),
        ("--profile half --filters 16", "set-half/dtml-4-filters16-seed1337"),
        ("--patch-size 32 32 16 --lr 0.02", "set/dtml-4-patchsize32x32x16-lr0.02-seed1337"),
        ("--method sassnet --adversarial-max 0.015 --labeled 8", "set/sassnet-8-adversarialmax0.015-seed1337"),
        ("--method double-unc --no-learnable", "set/double-unc-4-learnableFalse-seed1337"),
        ("--augment flip --flip-axes y z", "set/dtml-4-augmentflip-flipaxesyz-seed1337"),
        ("--workers 4 --save-every 7", "set/dtml-4-seed1337"),
        ("--classes 2", "set/dtml-4-classes2-seed1337"),
        ("--classes 2 --softmax", "set/dtml-4-classes2-seed1337"),
        ("--classes 2 --no-softmax", "set/dtml-4-classes2-softmaxFalse-seed1337"),
        ("--softmax", "set/dtml-4-softmaxTrue-seed1337"),
        ("--no-softmax", "set/dtml-4-seed1337"),
        ("--profile hippocampus --no-softmax", "set-hippocampus/dtml-4-softmaxFalse-seed1337"),
        ("--method ua-mt --preset authors --no-softmax", "set/ua-mt-authors-4-softmaxFalse-seed1337"),
        ("--init runs/pre", "set/dtml-4-init-pre-seed1337"),
        ("--init runs/lr0.02-seed1", "set/dtml-4-init-lr0.02-seed1-seed1337"),
        ("--init runs/pre/best.pt", "set/dtml-4-init-pre-best-seed1337"),
        ("--name mine", "mine"),
    ],
)
def test_run_folder_is_named_after_what_varies(args, name):
    assert command_line.read_options(["--data", "set", *args.split()])[2] == Path("runs") / name


# -- the preset tuned --


OF_A_METHOD = {  # method: what it needs otherwise, of the options that all share
    "supervised": {"batch_size": 4, "labeled_batch": None, "unlabeled": 0},  # labeled crops alone
    "bcp": {"batch_size": 8},  # pastes as many unlabeled crops as labeled ones
}
SEPARATE = {"batch_norm": "separate"}
OF_A_LOSS = {  # in `tuned`, of the method's own options
    **dict.fromkeys(("mean-teacher", "ua-mt", "tcse", "double-unc", "dtc", "sassnet", "asdnet"), SEPARATE),
    **dict.fromkeys(("mc-net-plus", "ss-net", "ad-mt"), SEPARATE),
    "dtml": {"k": 50.0, **SEPARATE},
    "unimatch": {"pseudo_loss": "dice", **SEPARATE},
    "cps": {"pseudo_on": "unlabeled", "pseudo_weight": 0.1, "ramp_end": 1.0, **SEPARATE},
}


def shared(*args):
    """The options that all methods share, as a command line comes to them; without the names of method and preset."""
    o = command_line.read_options(["--data", "set", "--labeled", "8", *args])[0]
    return {name: value for name, value in vars(o).items() if name not in ("method", "preset")}


@pytest.mark.parametrize("profile", ["full", "half", "hippocampus"])
def test_under_tuned_all_methods_are_trained_alike(profile):
    """One word gives every method the same training settings, in each another than by default."""
    args = ["--preset", "tuned", "--profile", profile]
    usual = shared("--method", "dtml", *args)
    stated = {"lr_schedule": "cosine", "lr_steps": [], "intensity": 0.3, "normalize": "scan",
              "augment": "d4", "optimizer": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4,
              "precision": "fp32", "batch_size": 6, "labeled_batch": 4, "unlabeled": None}  # fmt: skip
    if profile == "hippocampus":
        stated |= {"augment": "none", "optimizer": "adamw", "lr": 0.001, "weight_decay": 0.01}
    assert {name: usual[name] for name in stated} == stated
    for method in METHODS:
        result = shared("--method", method, *args)
        assert result == usual | OF_A_METHOD.get(method, {}), method
        assert (result["labeled_batch"] or result["batch_size"]) == 4, "labeled crops in a batch"
    paper = shared("--method", "dtml", "--profile", profile)
    differ = {name for name in usual if usual[name] != paper[name]}
    assert differ == {"lr_schedule", "lr_steps", "intensity", "normalize", "batch_size", "labeled_batch"}


@pytest.mark.parametrize("method", METHODS)
def test_tuned_leaves_a_methods_own_options_as_they_are(method):
    """But for a few constants; so methods differ by their losses alone."""
    args = ["--method", method, "--data", "set", "--labeled", "8"]
    tuned, usual = (command_line.read_options([*args, *more])[1] for more in (["--preset", "tuned"], []))
    names = [f.name for f in dataclasses.fields(usual)]
    differ = {name: getattr(tuned, name) for name in names if getattr(tuned, name) != getattr(usual, name)}
    assert differ == OF_A_LOSS.get(method, {})


@pytest.mark.parametrize("method", ["dtml", "supervised", "dk-uxnet"])
def test_its_settings_are_flags_that_win_over_it(method):
    result = shared("--method", method, "--preset", "tuned", "--normalize", "none", "--lr", "0.02", "--intensity", "0")
    assert (result["normalize"], result["lr"], result["intensity"], result["lr_schedule"]) == (
        "none",
        0.02,
        0,
        "cosine",
    )
    alone = shared("--method", method, "--preset", "tuned", "--unlabeled", "0")  # its control
    assert (alone["batch_size"], alone["labeled_batch"]) == (4, None)


@pytest.mark.parametrize("flag", ["--name", "--init", "--resume"])
@pytest.mark.parametrize("why", ["File name too long", "Permission denied"])
def test_a_path_that_cannot_be_looked_at_is_a_user_s_mistake(flag, why, tmp_path, monkeypatch, capsys):
    """Path.exists and its like raise an error for some of them."""
    name = "a" * 300
    if why == "Permission denied":  # as within a folder of another user
        name, real = "closed", os.stat

        def stat(path, *args, **more):
            if not isinstance(path, int) and Path(os.fsdecode(path)).name == name:
                raise PermissionError(errno.EACCES, why, os.fsdecode(path))
            return real(path, *args, **more)

        monkeypatch.setattr(os, "stat", stat)
    more = ["--runs", str(tmp_path)] if flag != "--resume" else []
    with pytest.raises(SystemExit) as ended:
        run(lambda: train_dtml.main([*TINY, "--device", "cpu", "--data", "set", flag, name, *more]))
    err = capsys.readouterr().err
    assert ended.value.code == 2 and name in err and why in err and not [*tmp_path.iterdir()]
