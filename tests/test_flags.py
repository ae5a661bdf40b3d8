"""Every flag does something: what changes a result changes it, and what is called harmless changes something else."""

import dataclasses
import functools
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from changing_flags import OWN, SHARED
from conftest import TINY, csv_rows, flat, load, make_set, make_validated_set, method_words
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import settings
import test_la
import train_dtml
from dataloaders.two_stream import Patches
from methods import METHODS
from networks import backbone
from utils import devices

OPENED = 1 + 4 * 8 + 2 * 4
"""h5 files that a run on the set opens at its start: the first for the number of its channels; all 8 for the volumes
and, thrice, for where they lie in mm; the 4 labeled ones to see that they have a label, and for their spacing."""
BASE = [*TINY, "--device", "cpu", "--iterations", "3", "--log-every", "1"]


@dataclasses.dataclass
class Trained:
    """A finished training run and what was seen while it ran."""

    folder: Path
    weights: dict[str, Any]
    """The method's part of the checkpoint, with the state of a critic's optimiser if it has one."""
    deterministic: bool
    opened: int
    """h5 files opened: at the start each for its volumes and its spacing, a labeled one also to see that it has a label
    and for the median."""
    processes: set[int]
    """Those that made crops."""
    recomputed: int
    """Blocks of networks that were computed again on the way back."""

    @property
    def scalars(self) -> list[dict[str, float]]:
        """The rows of scalars.csv."""
        return [{k: float(v) for k, v in row.items()} for row in csv_rows(self.folder / "scalars.csv")]

    @property
    def options(self) -> list[str]:
        """The words of options.txt."""
        return shlex.split((self.folder / "options.txt").read_text())

    @property
    def pictures(self) -> list[str]:
        """Names of the pictures in the TensorBoard files."""
        events = EventAccumulator(str(self.folder), size_guidance={"images": 0})
        return sorted(events.Reload().Tags()["images"])


def train(folder: Path, *argv: str) -> Trained:
    """Trains; the run is the one folder below `folder` that holds a new checkpoint."""
    opened, recomputed, pids = 0, 0, folder / "pids"
    folder.mkdir(parents=True, exist_ok=True)
    pids.unlink(missing_ok=True)
    file, make_item, again = h5py.File, Patches.__getitem__, backbone.checkpoint

    def open_file(*args: Any, **kwargs: Any) -> h5py.File:
        nonlocal opened
        opened += 1
        return file(*args, **kwargs)

    def make_and_note(self: Patches, slot: Any) -> Any:
        with open(pids, "a") as f:
            f.write(f"{os.getpid()}\n")
        return make_item(self, slot)

    def compute_again(*args: Any, **kwargs: Any) -> Any:
        nonlocal recomputed
        recomputed += 1
        return again(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(h5py, "File", open_file)
        patch.setattr(backbone, "checkpoint", compute_again)
        patch.setattr(Patches, "__getitem__", make_and_note)
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        train_dtml.main(["--runs", str(folder), *argv])
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    last = max(folder.rglob("last.pt"), key=lambda path: path.stat().st_mtime_ns)
    weights = load(last)["method"]
    return Trained(last.parent, weights, deterministic, opened, set(map(int, pids.read_text().split())), recomputed)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two methods are bit-identical, teachers, critics and their optimisers included."""
    return flat(a) == flat(b)


def learned(weights: dict[str, Any]) -> dict[str, Any]:
    """The networks that the losses move: neither a teacher nor a critic, which a flag may change to no effect."""
    return {name: value for name, value in weights.items() if not name.startswith(("teacher.", "adversary."))}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data sets `set` and `other`, in which paths of the tables below lie."""
    folder = tmp_path_factory.mktemp("flags")
    make_validated_set(folder / "set")
    make_set(folder / "other", shape=(22, 24, 18))
    for path in make_set(folder / "two").glob("*/mri_norm2.h5"):  # as `set`, half of each ball being the second class
        with h5py.File(path, "a") as f:
            if "label" in f:
                f["label"][:, :11] *= 2
    argv = ["--data", str(folder / "set"), "--runs", str(folder), "--name", "origin", *BASE, "--seed", "5"]
    train_dtml.main([*argv, "--iterations", "1"])
    return folder


@pytest.fixture(autouse=True)
def inside(sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags name data by relative paths."""
    monkeypatch.chdir(sets)


@pytest.fixture(scope="module")
def run(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """Trains with BASE and more words, once for all tests that ask for the same ones."""

    @functools.cache
    def trained(*argv: str) -> Trained:
        return train(tmp_path_factory.mktemp("my runs"), "--data", "set", *BASE, *argv)

    return trained


# -- what changes a result --


def words_of(method: str, *flags: str) -> list[str]:
    """The words of some flags for a method, which is not named where a flag names it."""
    argv = [word for flag in flags for word in flag.split()]
    if "--no-kmax" in argv:  # which leaves nothing of the queries' flags
        return ["--method", method, *argv]
    return argv if "--method" in argv else [*method_words(method), *argv]


LEARNING = [("dtml", changed, beside) for pairs in SHARED.values() for changed, beside in pairs]


# Those of the methods: test_unused_flags.py; their presets: test_golden.py.
@pytest.mark.parametrize(("method", "changed", "beside"), LEARNING)
def test_flag_changes_the_result(method, changed, beside, run):
    usual, other = run(*words_of(method, beside)), run(*words_of(method, beside, changed))
    assert not same(learned(usual.weights), learned(other.weights))


# -- what is harmless --


def flag_of(run: Trained, name: str) -> str:
    """The word after a flag in options.txt."""
    return run.options[run.options.index(name) + 1]


def kept_in(folder: str) -> int:
    """Images in a folder of --cache disk."""
    return len(list(Path(folder or "nowhere").rglob("*.image.npy")))


HARMLESS: dict[str, tuple[str, Callable[[Trained], Any], Any]] = {
    # option: flags, what to look at, what to see there
    "cache": ("--cache none --cache-folder checks", lambda r: r.opened, OPENED + 3 * 4),
    "cache_folder": ("--cache disk --cache-folder kept", lambda r: kept_in(flag_of(r, "--cache-folder")), 8),
    "workers": ("--workers 2", lambda r: (len(r.processes), os.getpid() in r.processes), (2, False)),
    "recompute": ("--recompute", lambda r: r.recomputed, 3 * 2 * 17),  # iterations, networks, blocks
    "device": ("--device auto", lambda r: r.options[r.options.index("--device") + 1], "auto"),
    "deterministic": ("--deterministic", lambda r: r.deterministic, True),
    "runs": ("--runs elsewhere", lambda r: r.folder.parts[0], "elsewhere"),
    "name": ("--name mine/too", lambda r: r.folder.parts[-2:], ("mine", "too")),
    "save_every": ("--save-every 1", lambda r: (r.folder / "previous.pt").exists(), True),
    "validate_every": ("--validate-every 2", lambda r: (r.folder / "best.pt").exists(), True),
    "log_every": ("--log-every 2", lambda r: [row["iteration"] for row in r.scalars], [1, 2]),
    "picture_every": ("--picture-every 1", lambda r: r.pictures, ["labeled", "unlabeled"]),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_flag_changes_something_but_not_the_result(name, run, tmp_path, request):
    flags, look, expected = HARMLESS[name]
    if name == "device" and torch.cuda.is_available():
        pytest.skip("a GPU rounds in another way")
    usual = run()
    if name == "runs":
        train_dtml.main(["--data", "set", *BASE, *flags.split()])
        (last,) = Path("elsewhere").rglob("last.pt")
        other = dataclasses.replace(usual, folder=last.parent, weights=load(last)["method"])
    else:
        other = train(tmp_path / "runs", "--data", "set", *BASE, *flags.split())
    assert look(other) == expected != look(usual)
    assert same(other.weights, usual.weights)


def test_threads_change_only_the_rounding(run, tmp_path):
    usual = run("--iterations", "1")
    other = train(tmp_path / "runs", "--data", "set", *BASE, "--iterations", "1", "--threads", "2")
    assert [json.loads((r.folder / "manifest.json").read_text())["threads"] for r in (usual, other)] == [1, 2]
    for name, weight in usual.weights.items():
        torch.testing.assert_close(other.weights[name], weight, rtol=1e-4, atol=1e-6)


def test_compile_makes_one_program_of_each_network(run, tmp_path, monkeypatch):
    """But for torch.compile itself, whose C++ takes minutes to build on a CPU."""
    made = []
    monkeypatch.setattr(torch, "compile", lambda f: made.append(f) or f)
    other = train(tmp_path / "runs", "--data", "set", *BASE, "--compile")
    assert len(made) == 2 and same(other.weights, run().weights)
    assert "-compileTrue-" in other.folder.name


ELSEWHERE = {
    "compile": test_compile_makes_one_program_of_each_network,
    "threads": test_threads_change_only_the_rounding,
    "resume": "faults/test_stop_and_resume.py",
    "fresh": "faults/test_refused_checkpoints.py",
    "from_diagnostic": "faults/test_diagnostic.py",
}


# -- the test script --


@pytest.fixture(scope="module")
def finished(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run long enough that windows matter, with a checkpoint previous.pt of 20 and a last.pt of 30 iterations."""
    runs = tmp_path_factory.mktemp("finished")
    argv = ["--iterations", "30", "--lr", "0.1", "--lr-steps", "--k", "10", "--filters", "4", "--save-every", "20"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(sets)
        train_dtml.main(["--runs", str(runs), "--data", "set", *BASE, *argv, "--name", "run"])
    return runs / "run"


@dataclasses.dataclass
class Outcome:
    """What a test left, and what was seen while it ran."""

    out: Path
    batches: list[int]
    device: str
    pools: list[int]

    @property
    def cases(self) -> str:
        return (self.out / "cases.csv").read_text()

    @property
    def settings(self) -> dict[str, Any]:
        return json.loads((self.out / "test.json").read_text())

    @property
    def predictions(self) -> dict[str, bytes]:
        folder = self.out / "predictions"
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.nii.gz")}


def run_test(finished: Path, out: Path, *argv: str) -> Outcome:
    """Tests the run `finished`; the results are in `out` unless the words say otherwise."""
    batches, asked, pools = [], [], []
    choose, predict, pool = devices.choose_device, METHODS["dtml"].predict, test_la.ThreadPoolExecutor

    def note_batch(self: Any, image: torch.Tensor, outputs: Any) -> torch.Tensor:
        batches.append(len(image))
        return predict(self, image, outputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "choose_device", lambda name: asked.append(name) or choose(name))
        patch.setattr(METHODS["dtml"], "predict", note_batch)
        patch.setattr(test_la, "ThreadPoolExecutor", lambda count: pools.append(count) or pool(count))
        usual = ["--checkpoint", str(finished), "--stride", "8", "8", "8", "--device", "cpu"]
        test_la.main([*usual, "--threads", "1", "--out", str(out), *argv])
    return Outcome(Path(argv[argv.index("--out") + 1]) if "--out" in argv else out, batches, asked[0], pools)


@pytest.fixture(scope="module")
def usual_test(sets: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The run `finished` tested with no more words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(sets)
        return run_test(finished, tmp_path_factory.mktemp("tested"))


TEST_FLAGS: dict[str, tuple[list[str], Callable[[Outcome], Any]]] = {
    # option: flags, what differs; unless it is the cases, the cases are the same
    "checkpoint": (["--checkpoint", "{finished}/previous.pt"], lambda t: t.cases),
    "data": (["--data", "other"], lambda t: t.cases),
    "output": (["--output", "sdm", "mean"], lambda t: t.cases),
    "cases": (["--cases", "case09"], lambda t: t.cases),
    "metrics": (["--metrics", "rve"], lambda t: t.settings.get("metrics")),
    "nsd_tolerance": (["--nsd-tolerance", "1"], lambda t: t.settings.get("nsd_tolerance_mm")),
    "patch_size": (["--patch-size", "32", "16", "16"], lambda t: t.cases),
    "stride": (["--stride", "16", "5", "16"], lambda t: t.cases),
    "weighting": (["--weighting", "gaussian"], lambda t: t.cases),
    "flips": (["--flips", "4"], lambda t: t.cases),
    "batch_size": (["--batch-size", "3"], lambda t: max(t.batches)),
    "out": (["--out", "{tmp}/mine"], lambda t: t.out),
    "report": (["--report"], lambda t: (t.out / "report.html").exists()),
    "workers": (["--workers", "1"], lambda t: t.pools),
    "precision": (["--precision", "bf16"], lambda t: t.settings["precision"]),
    "save": (["--save", "none"], lambda t: sorted(t.predictions)),
    "device": (["--device", "auto"], lambda t: t.device),
    "threads": (["--threads", "2"], lambda t: t.settings["threads"]),
}


@pytest.mark.parametrize("name", TEST_FLAGS)
def test_flag_of_the_test_changes_something(name, finished, usual_test, tmp_path):
    argv, look = TEST_FLAGS[name]
    argv = [word.format(finished=finished, tmp=tmp_path) for word in argv]
    other = run_test(finished, tmp_path / "out", *argv)
    assert look(other) != look(usual_test)
    changing = ["checkpoint", "data", "output", "cases", "metrics", "nsd_tolerance", "patch_size", "stride",
                "weighting", "flips", "precision"]  # fmt: skip
    if name != "device" or not torch.cuda.is_available():
        assert (other.cases != usual_test.cases) == (name in changing)


# -- no flag is forgotten --


def names(cls: type) -> set[str]:
    """The options of a dataclass that are flags."""
    return {f.name for f in dataclasses.fields(cls) if f.metadata["flag"]}


def test_every_flag_is_tested_here():
    assert {*SHARED, *HARMLESS, *ELSEWHERE} == names(settings.Options)
    assert {method: set(own) for method, own in OWN.items()} == {m: names(c.Options) for m, c in METHODS.items()}
    of_bare_weights = {"method", "sdm_weights"}  # see test_released.py
    assert set(TEST_FLAGS) | of_bare_weights | {"scans"} == names(test_la.Options)  # see test_held_out.py
    classes = [settings.Options, *(kind.Options for kind in METHODS.values())]
    marked = {f.name for cls in classes for f in dataclasses.fields(cls) if f.metadata["harmless"]}
    assert marked | {"compile"} == {*HARMLESS, *ELSEWHERE, "data"}  # a set may move; its checksums tell another one
