"""The preset `tuned`: one word gives every method the same training settings."""

import dataclasses

import pytest

from methods import METHODS
from tools import command_line

OWN = {  # method: what it needs otherwise, of the options that all share
    "supervised": {"batch_size": 4, "labeled_batch": None, "unlabeled": 0},  # labeled crops alone
    "bcp": {"batch_size": 8},  # pastes as many unlabeled crops as labeled ones
}
OF_A_LOSS = {"dtml": {"k": 50.0}, "unimatch": {"pseudo_loss": "dice"}}  # in `tuned`, of the method's own options


def shared(*words):
    """The options that all methods share, as a command line comes to them; without the names of method and preset."""
    o = command_line.read_options(["--data", "set", "--labeled", "8", *words])[0]
    return {name: value for name, value in vars(o).items() if name not in ("method", "preset")}


@pytest.mark.parametrize("profile", ["full", "half", "hippocampus"])
def test_under_tuned_all_methods_are_trained_alike(profile):
    """And in another way than by default, in each of the settings."""
    words = ["--preset", "tuned", "--profile", profile]
    usual = shared("--method", "dtml", *words)
    stated = {"lr_schedule": "cosine", "lr_steps": [], "intensity": 0.3, "normalize": "scan",
              "augment": "d4", "optimizer": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4,
              "precision": "fp32", "batch_size": 6, "labeled_batch": 4, "unlabeled": None}  # fmt: skip
    if profile == "hippocampus":
        stated |= {"augment": "none", "optimizer": "adamw", "lr": 0.001, "weight_decay": 0.01}
    assert {name: usual[name] for name in stated} == stated
    for method in METHODS:
        found = shared("--method", method, *words)
        assert found == usual | OWN.get(method, {}), method
        assert (found["labeled_batch"] or found["batch_size"]) == 4, "labeled crops in a batch"
    paper = shared("--method", "dtml", "--profile", profile)
    differ = {name for name in usual if usual[name] != paper[name]}
    assert differ == {"lr_schedule", "lr_steps", "intensity", "normalize", "batch_size", "labeled_batch"}


@pytest.mark.parametrize("method", METHODS)
def test_tuned_leaves_a_methods_own_options_as_they_are(method):
    """But for two constants; so methods differ by their losses alone."""
    words = ["--method", method, "--data", "set", "--labeled", "8"]
    tuned, usual = (command_line.read_options([*words, *more])[1] for more in (["--preset", "tuned"], []))
    names = [f.name for f in dataclasses.fields(usual)]
    differ = {name: getattr(tuned, name) for name in names if getattr(tuned, name) != getattr(usual, name)}
    assert differ == OF_A_LOSS.get(method, {})


@pytest.mark.parametrize("method", METHODS)
def test_its_settings_are_flags_that_win_over_it(method):
    found = shared("--method", method, "--preset", "tuned", "--normalize", "none", "--lr", "0.02", "--intensity", "0")
    assert (found["normalize"], found["lr"], found["intensity"], found["lr_schedule"]) == ("none", 0.02, 0, "cosine")
    alone = shared("--method", method, "--preset", "tuned", "--unlabeled", "0")  # its control
    assert (alone["batch_size"], alone["labeled_batch"]) == (4, None)
