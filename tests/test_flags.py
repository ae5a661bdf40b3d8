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
from conftest import TINY, csv_rows, flat, load, make_set, make_validated_set, method_words
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import predict
import settings
import test_la
import train_dtml
from dataloaders.two_stream import Patches
from methods import METHODS
from networks import backbone
from tools import convert
from utils.options import default_of

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


def train(folder: Path, *words: str) -> Trained:
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
        train_dtml.main(["--runs", str(folder), *words])
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
    words = ["--data", str(folder / "set"), "--runs", str(folder), "--name", "origin", *BASE, "--seed", "5"]
    train_dtml.main([*words, "--iterations", "1"])
    return folder


@pytest.fixture(autouse=True)
def inside(sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags name data by relative paths."""
    monkeypatch.chdir(sets)


@pytest.fixture(scope="module")
def run(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """Trains with BASE and more words, once for all tests that ask for the same ones."""

    @functools.cache
    def trained(*words: str) -> Trained:
        return train(tmp_path_factory.mktemp("my runs"), "--data", "set", *BASE, *words)

    return trained


# -- what changes a result --

# Option -> flags that change the result, and where needed the flags beside which they do.
SHARED = {
    "method": [("--method supervised", "")],
    "preset": [("--preset authors", "")],
    "data": [("--data other", "")],
    "profile": [("--profile half", "")],
    "labeled": [("--labeled 3", "")],
    "unlabeled": [("--unlabeled 2", ""), ("--unlabeled 0", "")],
    "fold": [("--fold 0/2", "")],
    "downsample": [("--downsample 2", "")],
    "patch_size": [("--patch-size 16 32 16", ""), ("--patch-size 32 16 16", "--patch-size 16 32 16")],
    "augment": [
        ("--augment none", ""),
        ("--augment mirror", ""),
        ("--augment mirror", "--augment none"),
        ("--augment flip", "--augment none"),
    ],
    "flip_axes": [("--flip-axes z", "--augment flip")],
    "normalize": [("--normalize scan", ""), ("--normalize foreground", "")],
    "window": [("--window 0.5 2", "--normalize window --window 0.4 3")],
    "intensity": [("--intensity 0.3", ""), ("--intensity 0.3", "--intensity 0.1")],
    "random_scale": [("--random-scale 0.2", ""), ("--random-scale 0.2", "--random-scale 0.1")],
    "random_rotation": [("--random-rotation 20", ""), ("--random-rotation 20", "--random-rotation 10")],
    "random_bias": [("--random-bias 0.3", ""), ("--random-bias 0.3", "--random-bias 0.1")],
    "random_blur": [("--random-blur 1", ""), ("--random-blur 1", "--random-blur 0.7")],
    "random_resolution": [("--random-resolution 1", ""), ("--random-resolution 2", "--random-resolution 1")],
    "random_noise": [("--random-noise 0.2", ""), ("--random-noise 0.2", "--random-noise 0.1")],
    "object_share": [("--object-share 1", "")],
    "sdm_of": [("--sdm-of scan", "--sdm-loss both")],
    "init": [("--init origin", "")],
    "iterations": [("--iterations 4", "")],
    "precision": [("--precision bf16", "")],
    "batch_size": [("--batch-size 3", "--labeled-batch 2")],
    "labeled_batch": [("--labeled-batch 1", "")],
    "optimizer": [("--optimizer adamw", "")],
    "lr": [("--lr 0.02", "")],
    "lr_schedule": [("--lr-schedule cosine", "")],
    "lr_steps": [("--lr-steps 2", ""), ("--lr-steps", "")],
    "lr_gamma": [("--lr-gamma 0.5", "")],
    "momentum": [("--momentum 0.5", "")],
    "weight_decay": [("--weight-decay 0.01", ""), ("--weight-decay 0.3", "--optimizer adamw")],
    "seed": [("--seed 2", "")],
}
TEACHER = "--filters 3, --softmax, --lambda-max 1, --ramp steps, --ema-decay 0.3, --noise 0"
LEARNS = "--start 0 --full 0 --filters 8 --lr 0.3"  # enough for two networks that agree in part
BROKEN = "--filters 4 --ema-decay 0"  # with which a pseudo-label has several components
# Method: for each of its options flags that change the result, and where needed those beside which they do.
OWN_FLAGS = {
    "dtml": "--softmax, --filters 3, --k 20, --lambda-max 1, --consistency-times 2, --consistency-on unlabeled, "
    "--sdm-loss dis, --sdm-loss both, --sdm-loss both beside --sdm-loss dis --k 20, --dis-weight 2 beside --sdm-loss "
    "both, --ramp steps, --ramp literal, --ramp literal beside --ramp steps, --ramp-end 0.5, --ramp-end 0 beside "
    "--ramp-end 0.5",
    "dtml-plus": "--filters 3, --k 20, --strong 1, --ema-decay 0.3 beside --start 0 --full 0, --ema-decay 0.6 beside "
    "--ema-decay 0.3 --start 0, --pseudo-weight 1 beside --start 0 --full 0 --trust all, --start 0 beside --trust all, "
    f"--full 0.9 beside --start 0 --trust all, --trust all beside {LEARNS}, --trust voxel beside {LEARNS}",
    "supervised": "--filters 3, --head sdm, --softmax, --softmax beside --no-softmax, --k 20 beside --head sdm",
    "mean-teacher": f"{TEACHER}, --consistency-on unlabeled, --ema-decay 0.6 beside --iterations 4, --noise 0.2",
    "ua-mt": f"{TEACHER}, --consistency-on all, --passes 7, --passes 1 beside --passes 2, --entropy-epsilon 0.5",
    "tcse": f"{TEACHER}, --consistency-on unlabeled, --scale 0.2, --scale 0.1 beside --scale 0.2",
    "double-unc": f"{TEACHER}, --consistency-on unlabeled, --passes 7, --no-learnable, --gamma 2, --feature-blocks "
    "bottom, --feature-blocks none, --feature-blocks none beside --no-learnable",
    "dtc": "--softmax, --filters 3, --beta 1, --k 20, --lambda-max 0.1, --ramp steps",
    "sassnet": "--softmax, --filters 3, --beta 1, --adversarial-max 0.015, --ramp steps, --critic-lr 0.001, "
    "--critic-lr 0",
    "asdnet": "--filters 3, --softmax, --attention none, --attention released, --attention none beside --attention "
    "released, --lambda-adv 0.1, --lambda-semi 0.2, --threshold 0.46, --threshold 0.9 beside --threshold 0.46, "
    "--semi-start 0, --semi-start 0.5 beside --semi-start 0, --semi-start 1, --critic-lr 0.001, --critic-image",
    "dk-uxnet": "--backbone vnet, --filters 3, --no-kmax, --groups 2 3, --groups 2 3 2 beside --groups 2 3, "
    "--query-channels 48, --levels 16 8 4, --levels 8, --bn-momentum 0.01, --logit-scale 0.1, --no-share-weights, "
    "--crops independent, --noise-variance 0, --noise-variance 5, --qd-weight 0, --deep-weight 0, --deep-weight 1, "
    "--consistency-terms segc, --consistency-terms qdc, --consistency-terms none, --contrast sum, --contrast mse, "
    "--temperature 1, --lambda-max 1, --ramp steps, --ramp epochs",
    "cps": "--filters 3, --pseudo-weight 1, --pseudo-on unlabeled, --ramp-end 0.5, --ramp-end 1 beside --ramp-end 0.5",
    "bcp": "--filters 3, --start 0.5, --box 0.5, --pseudo-weight 1, --ema-decay 0.3, --no-largest-component beside "
    f"{BROKEN}",
    "ad-mt": "--filters 3, --ema-decay 0.3, --period 1, --threshold 0.5, --strong 1, --pseudo-weight 1 beside "
    "--threshold 0.5, --ramp-end 0.9 beside --threshold 0.5, --ramp-end 0 beside --threshold 0.5 --ramp-end 0.9",
    "mc-net-plus": "--filters 3, --softmax, --temperature 0.5, --target-gradient, --seg-weight 1, --lambda-max 0.1, "
    "--ramp literal, --ramp steps beside --ramp-end 0.9, --ramp-end 1",
    "ss-net": "--filters 3, --softmax, --distance agreement, --magnitude 1, --xi 1, --separation 1, --prototypes 4, "
    "--rank lowest, --no-background, --lambda-max 0.1, --ramp literal, --ramp steps beside --ramp-end 0.9, "
    "--ramp-end 1",
    "unimatch": "--filters 3, --softmax, --threshold 0, --threshold 0.7 beside --threshold 0, --feature-dropout 0.2, "
    "--pseudo-loss dice beside --threshold 0, --feature-weight 1 beside --threshold 0, --strong-weight 1 beside "
    "--threshold 0, --strong 1 beside --threshold 0, --cutmix 1 beside --threshold 0, --cutmix 0 beside --threshold 0",
}


def pairs_of(method: str) -> dict[str, list[tuple[str, str]]]:
    """Option -> flags that change the result, and the flags beside which they do."""
    pairs: dict[str, list[tuple[str, str]]] = {}
    for entry in OWN_FLAGS[method].split(", "):
        changed, _, beside = entry.partition(" beside ")
        name = changed.split()[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        pairs.setdefault(name, []).append((changed, beside))
    pairs.setdefault("backbone", [("--backbone uxnet", "")])
    pairs["halvings"] = [("--halvings 4 4 2", "")]
    pairs["classes"] = [("--classes 2 --data two", "")] if METHODS[method].multiclass else []  # else: test_classes.py
    return pairs


OWN = {method: pairs_of(method) for method in OWN_FLAGS}


def words_of(method: str, *flags: str) -> list[str]:
    """The words of some flags for a method, which is not named where a flag names it."""
    words = [word for flag in flags for word in flag.split()]
    if "--no-kmax" in words:  # which leaves nothing of the queries' flags
        return ["--method", method, *words]
    return words if "--method" in words else [*method_words(method), *words]


LEARNING = [("dtml", changed, beside) for pairs in SHARED.values() for changed, beside in pairs]


# Those of the methods: test_idle.py; their presets: test_golden.py.
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
    words = ["--iterations", "30", "--lr", "0.1", "--lr-steps", "--k", "10", "--filters", "4", "--save-every", "20"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(sets)
        train_dtml.main(["--runs", str(runs), "--data", "set", *BASE, *words, "--name", "run"])
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


def run_test(finished: Path, out: Path, *words: str) -> Outcome:
    """Tests the run `finished`; the results are in `out` unless the words say otherwise."""
    batches, asked, pools = [], [], []
    choose, predict, pool = test_la.choose_device, METHODS["dtml"].predict, test_la.ThreadPoolExecutor

    def note_batch(self: Any, image: torch.Tensor, outputs: Any) -> torch.Tensor:
        batches.append(len(image))
        return predict(self, image, outputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_la, "choose_device", lambda name: asked.append(name) or choose(name))
        patch.setattr(METHODS["dtml"], "predict", note_batch)
        patch.setattr(test_la, "ThreadPoolExecutor", lambda count: pools.append(count) or pool(count))
        usual = ["--checkpoint", str(finished), "--stride", "8", "8", "8", "--device", "cpu"]
        test_la.main([*usual, "--threads", "1", "--out", str(out), *words])
    return Outcome(Path(words[words.index("--out") + 1]) if "--out" in words else out, batches, asked[0], pools)


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
    words, look = TEST_FLAGS[name]
    words = [word.format(finished=finished, tmp=tmp_path) for word in words]
    other = run_test(finished, tmp_path / "out", *words)
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


def help_of(main: Callable[[list[str]], None], argv: list[str], capsys: pytest.CaptureFixture) -> dict[str, str]:
    """Flag -> its words in the --help text."""
    with pytest.raises(SystemExit) as ended:
        main([*argv, "--help"])
    assert ended.value.code == 0
    texts: dict[str, str] = {}
    flag = ""
    for line in capsys.readouterr().out.partition("options:")[2].splitlines():
        if line.startswith("  -"):
            flag = line.split()[0].rstrip(",")
            texts[flag] = line
        elif line.startswith("   ") and flag:
            texts[flag] += " " + line
    return {flag: " ".join(text.split()) for flag, text in texts.items()}


OTHERS = {"test": test_la, "predict": predict, "convert": convert}


@pytest.mark.parametrize("script", [*METHODS, *OTHERS])
def test_help_lists_every_option_with_its_default(script, capsys):
    if script in OTHERS:
        classes, shown = [OTHERS[script].Options], help_of(OTHERS[script].main, [], capsys)
        shown.pop("-o", None)  # of predict.py, the same as --out
    else:
        classes = [settings.Options, METHODS[script].Options]
        shown = help_of(train_dtml.main, ["--method", script], capsys)
    fields = [f for cls in classes for f in dataclasses.fields(cls) if f.metadata["flag"]]
    assert set(shown) == {"-h", *("--" + f.name.replace("_", "-") for f in fields)}
    for f in fields:
        text, default = shown["--" + f.name.replace("_", "-")], default_of(f)
        assert f.metadata["help"] in text
        if isinstance(default, list) and default:
            assert text.endswith(f"(default {' '.join(map(str, default))})")
        elif isinstance(default, bool):
            assert text.endswith("(default yes)" if default else "(default no)")
        elif default not in (None, "", []):
            assert text.endswith(f"(default {default:g})" if isinstance(default, float) else f"(default {default})")
        elif f.name not in ("checkpoint", "resume", "from_diagnostic", "source") and (
            script == "test" or f.name != "out"
        ):
            assert "default" in text, f"{f.name} does not say what it is unless given"
