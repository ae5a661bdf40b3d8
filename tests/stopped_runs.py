"""Runs that are stopped or killed on the way, and the undisturbed ones that they equal once they are resumed."""

import signal

import pytest
from conftest import TINY, flat, load, method_words

import train_dtml
from methods import METHODS

N = 9
FLAGS = [*TINY, "--batch-size", "2", "--iterations", str(N), "--log-every", "1"]
# With 4 labeled cases an epoch is 4 iterations of DTML, 2 of the supervised method.
KINDS = {
    "dtml": [],
    "dtml, both losses": ["--sdm-loss", "both"],
    "supervised": method_words("supervised"),
    "mean-teacher": method_words("mean-teacher"),
    "ua-mt": [*method_words("ua-mt"), "--passes", "3"],
    "tcse": [*method_words("tcse"), "--scale", "0.2"],
    "double-unc": [*method_words("double-unc"), "--passes", "2"],
    "dtc": method_words("dtc"),
    "sassnet": method_words("sassnet"),
    "asdnet": [*method_words("asdnet"), "--critic-image"],
    "dk-uxnet": method_words("dk-uxnet"),
    "dtml, AdamW on UX-Net": ["--backbone", "uxnet", "--optimizer", "adamw", "--lr", "0.001"],
}

KINDS |= {m: method_words(m) for m in METHODS if not any(m in (kind.split(",")[0], *KINDS[kind]) for kind in KINDS)}
KINDS |= {kind: [*args, "--iterations", "4"] for kind, args in KINDS.items() if kind != "dtml"}
UNDISTURBED = {}


@pytest.fixture(scope="session")
def undisturbed(data, tmp_path_factory):
    """Kind -> the folder of its uninterrupted run, made once for all files that ask for it; one of four
    iterations has previous.pt after two of them."""

    def made(kind="dtml"):
        if kind not in UNDISTURBED:
            UNDISTURBED[kind] = tmp_path_factory.mktemp("undisturbed") / "run"
            train(data, UNDISTURBED[kind], *KINDS[kind], "--save-every", "2")
        return UNDISTURBED[kind]

    return made


@pytest.fixture(autouse=True)
def outside_handlers():
    """A signal that the training does not catch fails the test in place of ending the tests."""

    def uncaught(number, frame):
        pytest.fail(f"signal {number} was not caught by the training")

    before = {number: signal.signal(number, uncaught) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    assert [signal.getsignal(number) for number in before] == [uncaught] * 2, "the handlers were not put back"
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def after_step(monkeypatch):
    """Sets what happens after what every method does after each step; None: nothing more."""
    own = {kind: kind.after_step for kind in METHODS.values()}

    def set_hook(hook):
        for kind, real in own.items():

            def after(self, batch, iteration, real=real):
                real(self, batch, iteration)
                if hook:
                    hook(iteration)

            monkeypatch.setattr(kind, "after_step", after)

    return set_hook


def in_folder(folder):
    return ["--runs", str(folder.parent), "--name", folder.name]


def train(data, folder, *flags):
    train_dtml.main(["--data", str(data), *FLAGS, *in_folder(folder), *flags])


def assert_same_run(folder, expected):
    """Weights, batch-norm buffers, optimisers, data and curves are equal to the last bit, teachers and critics too."""
    a, b = load(folder), load(expected)
    for part in ("method", "optimizer", "iteration", "checksums"):
        ours, theirs = flat(a[part]), flat(b[part])
        assert list(ours) == list(theirs)
        assert [name for name in theirs if ours[name] != theirs[name]] == [], f"{part} differs"
    assert (folder / "scalars.csv").read_text() == (expected / "scalars.csv").read_text()
