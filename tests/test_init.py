"""--init: what a run takes from the weights of another one, what begins anew, and what is refused."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import TINY, flat, load, make_set

import test_la
import train_dtml
from methods import METHODS, Method
from methods.dtml import DTML
from tools.training_start import refuse_other_order, start_from
from utils.errors import UserError

WORDS = [*TINY, "--iterations", "2", "--save-every", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `set`, and the run `pre` on it."""
    folder = tmp_path_factory.mktemp("init")
    make_set(folder / "set")
    train(folder, "pre", "--seed", "5", "--lr", "0.1")
    return folder


def train(folder: Path, name: str, *args: str) -> Path:
    argv = ["--data", str(folder / "set"), "--runs", str(folder), "--name", name, *WORDS, *args]
    train_dtml.main(argv)
    return folder / name


def parameters(path: Path) -> dict:
    """The weights without the running statistics of the batch norms, which move with a learning rate of 0 too."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return flat({k: v for k, v in load(path)["method"].items() if not k.endswith(statistics)})


def test_with_a_learning_rate_of_0_the_weights_are_those_of_the_other_run(folder):
    run = train(folder, "still", "--init", str(folder / "pre"), "--lr", "0", "--iterations", "1")
    assert parameters(run / "last.pt") == parameters(folder / "pre" / "last.pt")
    assert parameters(run / "last.pt") != parameters(train(folder, "cold", "--lr", "0") / "last.pt")


def test_iteration_and_optimiser_begin_anew(folder):
    """The first step is as if there were no other: momentum is the gradient itself, a critic's Adam takes step 1."""
    for method in ("dtml", "sassnet"):
        pre = train(folder, f"pre-{method}", "--method", method, "--lr", "0.1")
        run = train(folder, f"run-{method}", "--method", method, "--init", str(pre), "--iterations", "1", "--lr-steps")
        state = load(run / "last.pt")
        assert state["iteration"] == 1
        if method == "sassnet":
            steps = {float(e["step"]) for e in state["method"]["adversary._extra_state"]["state"].values()}
            assert steps == {1.0}
    before, after = (load(path / "last.pt") for path in (folder / "pre-dtml", folder / "run-dtml"))
    name = next(
        name for name, _ in METHODS["dtml"](METHODS["dtml"].Options(filters=2), iterations=1).named_parameters()
    )
    momentum = after["optimizer"]["state"][0]["momentum_buffer"]
    torch.testing.assert_close(after["method"][name], before["method"][name] - 0.01 * momentum)


def test_the_turns_of_ad_mt_are_those_of_the_run_s_own_seed(folder):
    """They are no weights: with those of the other run, five seeds from the same weights would have the same turns."""
    pre = train(folder, "pre-ad-mt", "--method", "ad-mt", "--seed", "5")
    warm = train(folder, "warm-ad-mt", "--method", "ad-mt", "--seed", "6", "--init", str(pre))
    cold = train(folder, "cold-ad-mt", "--method", "ad-mt", "--seed", "6")
    there, here, expected = (load(run)["method"]["_extra_state"] for run in (pre, warm, cold))
    assert torch.equal(here, expected) and not torch.equal(here, there)


def test_a_run_goes_on_without_the_weights_that_it_began_with(folder, tmp_path):
    shutil.copytree(folder / "pre", tmp_path / "pre")
    args = ["--data", str(folder / "set"), "--runs", str(tmp_path), "--name", "run", *WORDS]
    args += ["--init", str(tmp_path / "pre")]
    train_dtml.main(args)
    whole = load(tmp_path / "run" / "last.pt")
    (tmp_path / "run" / "previous.pt").replace(tmp_path / "run" / "last.pt")
    shutil.rmtree(tmp_path / "pre")
    train_dtml.main([*args, "--resume", "auto"])
    resumed = load(tmp_path / "run" / "last.pt")
    for part in ("method", "optimizer", "images"):
        assert flat(whole[part]) == flat(resumed[part])


def test_scans_of_the_first_training_are_not_tested_on_after_the_second(folder, tmp_path):
    """Nor are they after the second was resumed."""
    data = make_set(tmp_path / "set")
    # a scan of `pre` that is a test case of another set
    shutil.copy(folder / "set" / "case02" / "mri_norm2.h5", data / "case08" / "mri_norm2.h5")
    (data / "train.list").write_text("case00\ncase01\ncase03\ncase04\n")
    args = ["--data", str(data), "--runs", str(tmp_path), "--name", "run", *WORDS, "--labeled", "3"]
    train_dtml.main([*args, "--init", str(folder / "pre")])
    tested = ["--checkpoint", str(tmp_path / "run"), "--stride", "8", "8", "8", "--threads", "1"]
    message = r"case08: .*is a scan of the training, there called case02 of .*pre"
    with pytest.raises(UserError, match=message):
        test_la.main(tested)
    (tmp_path / "run" / "previous.pt").replace(tmp_path / "run" / "last.pt")
    train_dtml.main(["--resume", str(tmp_path / "run")])
    with pytest.raises(UserError, match=message):
        test_la.main(tested)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"1": "anterior", "2": "posterior"}, ""),
        ({"1": "liver", "2": "tumour"}, ""),
        ({}, ""),
        ({"1": "posterior", "2": "anterior"}, "set and w.pt number the classes in different ways: posterior is class 1 "
                                              "and class 2; anterior is class 2 and class 1"),
    ],
)  # fmt: skip
def test_classes_of_the_weights_in_another_order_are_refused(names, message, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dataset.json").write_text(json.dumps({"labels": names}))
    state = {"file": "w.pt", "options": {}, "class_names": {"1": "anterior", "2": "posterior"}}
    with pytest.raises(UserError, match=message) if message else nullcontext():
        refuse_other_order(tmp_path / "set", DTML.Options(classes=2), state)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method", "dtc"], r"holds weights of --method dtml, and this run is of dtc\. .*--method dtml"),
        (
            ["--filters", "3"],
            r"does not fit .*: --filters is 2 there and 3 here\. .*\(32, 32, 3, 3, 3\) there and \(48",
        ),
        (
            ["--filters", "3", "--k", "10", "--lambda-max", "0.5", "--dropout", "0", "--sdm-loss", "both"],
            r"does not fit this run: --filters is 2 there and 3 here\. Train",  # the others shape nothing
        ),
        (["--softmax"], r"does not fit .*: --softmax is False there and True here"),
        (["--backbone", "uxnet"], r"--backbone is vnet there and uxnet here.* only (t)?here"),
        (["--init", "nowhere"], "nowhere does not exist"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_what_differs(args, message, folder, tmp_path):
    with pytest.raises(UserError, match=message):
        train_dtml.main(["--data", str(folder / "set"), "--runs", str(tmp_path / "runs"), *WORDS,
                         "--init", str(folder / "pre"), *args])  # fmt: skip
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("there", "here"), [((2, True), (3, False)), ((3, False), (2, True)), ((1, True), (2, False))])
def test_a_softmax_is_not_taken_for_sigmoids_of_one_class_more(there, here, tmp_path):
    """Both have as many channels, but the first is the background's in one and that of class 1 in the other."""
    kind = METHODS["supervised"]

    def made(classes: int, softmax: bool) -> Method:
        return kind(kind.Options(filters=2, classes=classes, softmax=softmax), iterations=1)

    options = {"method": "supervised", "filters": 2, "classes": there[0], "softmax": there[1], "iterations": 1}
    state = {"file": "w.pt", "options": options, "method": made(*there).state_dict(), "iteration": 1}
    message = rf"--classes is {there[0]} there and {here[0]} here; --softmax is {there[1]} there and {here[1]} here"
    with pytest.raises(UserError, match=message):
        start_from(made(*here), "supervised", state, tmp_path)
