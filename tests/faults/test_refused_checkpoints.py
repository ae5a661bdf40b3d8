"""Existing runs and checkpoints that do not fit a command: refused with what differs, and left as they are."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import flat, load, make_set
from refusals import edit, files, flags, image, refuse, train

import test_la
import train_dtml


def same_weights(a: dict, b: dict) -> bool:
    """Whether two checkpoints hold the same networks, bit for bit."""
    return flat(a["method"]) == flat(b["method"])


# -- run folders that are there already --


def test_35_existing_run_folder_is_left_alone_unless_fresh_moves_it_aside(tiny_set, monkeypatch):
    runs, first = tiny_set.parent / "runs", train(tiny_set)
    before = {path.name: path.read_bytes() for path in (runs / "run").iterdir()}
    refuse(flags(tiny_set, "--name", "run"), "runs/run exists", "--resume", "--fresh", untouched=tiny_set.parent)
    refuse(flags(tiny_set, "--name", "run", "--seed", "2"), "runs/run exists", untouched=tiny_set.parent)
    monkeypatch.setattr("utils.run_folder.time.strftime", lambda *_: "20210101-000000")
    second = train(tiny_set, "--fresh", "--seed", "2")
    (old,) = [path for path in runs.iterdir() if path.name != "run"]
    assert old.name.startswith("run.") and {path.name: path.read_bytes() for path in old.iterdir()} == before
    assert not same_weights(first, second)
    train(tiny_set, "--fresh")  # within a second of the one before
    assert len([path for path in runs.iterdir() if (path / "last.pt").exists()]) == 3
    edit(tiny_set, "case01", image=image(np.nan))  # a run that cannot start moves nothing
    refuse(flags(tiny_set, "--name", "run", "--fresh"), "case01", untouched=tiny_set.parent)


# -- resuming --

HARMLESS = ["--log-every", "2", "--save-every", "3", "--cache", "none", "--device", "cpu", "--threads", "1"]


def test_13_resume_with_other_options_lists_them(tiny_set):
    train(tiny_set)
    run = str(tiny_set.parent / "runs" / "run")
    other = ["--lr", "0.02", "--lambda-max", "0.5", "--patch-size", "32", "16", "16", *HARMLESS]
    message = refuse(["--resume", run, *other], run, "--lr: 0.01 before, 0.02 now", untouched=tiny_set.parent)
    listed = [line.split()[0] for line in message.splitlines()[1:]]
    assert sorted(listed) == ["--lambda-max:", "--lr:", "--patch-size:"]
    argv = flags(tiny_set, "--name", "run", "--resume", "auto", "--seed", "2")
    refuse(argv, run, "--seed: 1337 before, 2 now", untouched=tiny_set.parent)
    texts = (run, "--method: dtml before, dtc now")
    refuse(["--resume", run, "--method", "dtc"], *texts, untouched=tiny_set.parent)
    refuse(flags(tiny_set, "--name", "run", "--resume", "auto", "--method", "dtc"), *texts, untouched=tiny_set.parent)


def test_13_resume_with_harmless_options_goes_on(tiny_set):
    whole = train(tiny_set, "--iterations", "4", "--save-every", "2")
    run = tiny_set.parent / "runs" / "run"
    assert load(run / "previous.pt")["iteration"] == 2
    train_dtml.main(["--resume", str(run / "previous.pt"), *HARMLESS])
    assert same_weights(load(run), whole)
    assert [row.split(",")[0] for row in (run / "scalars.csv").read_text().splitlines()] == ["iteration", "3"]


def test_14_resume_of_a_finished_run_says_so_and_touches_nothing(tiny_set, capsys):
    train(tiny_set)
    run = tiny_set.parent / "runs" / "run"
    before = files(tiny_set.parent)
    for argv in (flags(tiny_set, "--name", "run", "--resume", "auto"), ["--resume", str(run)],
                 ["--resume", str(run / "last.pt")]):  # fmt: skip
        capsys.readouterr()
        train_dtml.main(argv)
        assert "already done: 1 of 1" in capsys.readouterr().err and files(tiny_set.parent) == before


def test_13_resume_with_other_volumes_is_refused(tiny_set):
    train(tiny_set, "--iterations", "2", "--save-every", "1")
    edit(tiny_set, "case05", image=image())
    run = tiny_set.parent / "runs" / "run"
    refuse(["--resume", str(run / "previous.pt")], str(tiny_set), "not those", untouched=tiny_set.parent)


def test_13_resume_with_train_list_in_another_order_is_refused(tiny_set):
    """The scans are drawn by their place in the list, so that a batch would have others."""
    train(tiny_set, "--iterations", "2", "--save-every", "1")
    run, train_list = tiny_set.parent / "runs" / "run", tiny_set / "train.list"
    first, second, *rest = train_list.read_text().splitlines()
    train_list.write_text("\n".join([second, first, *rest]))
    resume = ["--resume", str(run / "previous.pt")]
    refuse(resume, str(tiny_set), "train.list has them in another order", untouched=tiny_set.parent)
    train_list.write_text("\n".join([first, second, *rest]))
    train_dtml.main(resume)


# -- checkpoints --


def rewrite(path: Path, **changes: object) -> None:
    """Changes values of a checkpoint; None removes one."""
    state = {**load(path), **changes}
    torch.save({k: v for k, v in state.items() if v is not None}, path)


BOTH = pytest.mark.parametrize("script", ["test", "resume"])


def refuse_checkpoint(script: str, path: Path, *texts: str) -> str:
    """Asserts that both test_la.py and --resume of train_dtml.py refuse the checkpoint, with its name."""
    main, argv = {
        "test": (test_la.main, ["--checkpoint", str(path), "--stride", "16", "16", "16"]),
        "resume": (train_dtml.main, ["--resume", str(path)]),
    }[script]
    return refuse(argv, str(path), *texts, untouched=path.parent, main=main)


@BOTH
def test_14_checkpoint_that_is_missing_is_named(script, tmp_path):
    refuse_checkpoint(script, tmp_path / "none.pt", "does not exist")
    (tmp_path / "empty").mkdir()
    refuse_checkpoint(script, tmp_path / "empty", "holds no checkpoint")


@BOTH
def test_08_weights_that_do_not_fit_and_unknown_methods_are_refused(script, checkpoint):
    options = load(checkpoint)["options"]
    for change, text in ({"filters": 3}, "does not fit"), ({"method": "tomorrow"}, "tomorrow"):
        rewrite(checkpoint, options={**options, **change})
        refuse_checkpoint(script, checkpoint, text)


# -- checkpoints of a method with a critic --


@pytest.fixture(scope="module")
def adversarial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of sassnet, which no test may change."""
    folder = make_set(tmp_path_factory.mktemp("adversarial") / "set")
    train(folder, "--method", "sassnet", "--iterations", "2", "--save-every", "1")
    return folder.parent / "runs" / "run"


@pytest.fixture
def unfinished(adversarial: Path, tmp_path: Path) -> Path:
    """A copy of its checkpoint after one of two iterations, alone in a folder."""
    (tmp_path / "copy").mkdir()
    return Path(shutil.copy(adversarial / "previous.pt", tmp_path / "copy" / "last.pt"))


@BOTH
@pytest.mark.parametrize("method", ["dtml", "mean-teacher"])
def test_08_checkpoint_of_one_method_is_none_of_another(method, script, unfinished):
    options = load(unfinished)["options"]
    rewrite(unfinished, options={**options, "method": method})
    refuse_checkpoint(script, unfinished, "does not fit")


STATE = "adversary._extra_state"


def without(state: dict, *path: object) -> None:
    """Removes an entry of nested dicts and lists."""
    for key in path[:-1]:
        state = state[key]
    del state[path[-1]]


def squeeze_moments(weights: dict) -> None:
    """Gives the moments of one weight another shape."""
    moments = weights[STATE]["state"][0]
    moments["exp_avg"] = moments["exp_avg"].flatten()[:1]


BROKEN_CRITICS = {
    "no weight": lambda w: without(w, "adversary.critic.map.weight"),
    "another shape of a weight": lambda w: w.update({"adversary.critic.map.weight": torch.zeros(3)}),
    "no state": lambda w: without(w, STATE),
    "a text": lambda w: w.update({STATE: "state"}),
    "an empty state": lambda w: w.update({STATE: {}}),
    "no groups": lambda w: without(w, STATE, "param_groups"),
    "fewer weights": lambda w: without(w, STATE, "param_groups", 0, "params", -1),
    "no moments of a weight": lambda w: without(w, STATE, "state", 0),
    "moments of another shape": squeeze_moments,
    "no second moment": lambda w: without(w, STATE, "state", 0, "exp_avg_sq"),
}


@pytest.mark.parametrize("kind", BROKEN_CRITICS)
def test_08_damaged_state_of_a_critic_is_refused(kind, unfinished):
    weights = load(unfinished)["method"]
    BROKEN_CRITICS[kind](weights)
    rewrite(unfinished, method=weights)
    refuse_checkpoint("resume", unfinished, "does not fit")


def test_08_damaged_state_of_the_optimiser_is_refused(unfinished):
    for state in ({}, "state", {"state": {}, "param_groups": []}):
        rewrite(unfinished, optimizer=state)
        refuse_checkpoint("resume", unfinished, "does not fit")
