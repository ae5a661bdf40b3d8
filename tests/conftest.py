"""Tiny data sets and runs that the tests share."""

import csv
import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

pytest.register_assert_rewrite("refusals", "stopped_runs")  # shared asserts say what they found, as those of a test do
ROOT = Path(__file__).resolve().parent.parent
GEOMETRY = {"spacing": (1.0, 1.0, 2.0), "direction": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)}
# A training run of seconds: patches of 16^3, two filters.
TINY = ["--patch-size", "16", "16", "16", "--filters", "2", "--labeled", "4", "--threads", "1", "--picture-every", "0"]


def write_case(path: Path, image: np.ndarray, label: np.ndarray | None, **attributes: object) -> None:
    """An h5 case file as the data sets have it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as f:
        f.create_dataset("image", data=image)
        if label is not None:
            f.create_dataset("label", data=label)
        f.attrs.update(attributes)


def make_set(folder: Path, train: int = 8, test: int = 2, labeled: int = 4, shape=(24, 22, 18)) -> Path:
    """A data set of noisy balls; cases after the first `labeled` of train.list have no label at all."""
    names = [f"case{i:02d}" for i in range(train + test)]
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    for i, name in enumerate(names):
        rng = np.random.default_rng(i)
        centre = np.array(shape).reshape(3, 1, 1, 1) / 2 + rng.uniform(-2, 2, (3, 1, 1, 1))
        label = (((grid - centre) ** 2).sum(axis=0) < rng.uniform(4, 6) ** 2).astype(np.uint8)
        image = (label + 0.3 * rng.standard_normal(shape)).astype(np.float32)
        hidden = labeled <= i < train
        write_case(folder / name / "mri_norm2.h5", image, None if hidden else label, **GEOMETRY)
    (folder / "train.list").write_text("\n".join(names[:train]) + "\n")
    (folder / "test.list").write_text("\n".join(names[train:]) + "\n")
    return folder


def make_validated_set(folder: Path) -> Path:
    """As `make_set`, and three labeled cases in validation.list."""
    make_set(folder, test=5)
    names = (folder / "test.list").read_text().split()
    (folder / "test.list").write_text("\n".join(names[:2]) + "\n")
    (folder / "validation.list").write_text("\n".join(names[2:]) + "\n")
    return folder


def method_words(method: str) -> list[str]:
    """The flags of a method in a tiny run. UA-MT's teacher sees unlabeled crops alone: its batch-norm needs two."""
    more = {"ua-mt": "--batch-size 3", "dk-uxnet": "--query-channels 16 --groups 3 2 --levels 8 4"}
    return ["--method", method, *more.get(method, "").split()]


def load(path: Path) -> dict[str, Any]:
    """A checkpoint: a file, or the last one of a run's folder."""
    return torch.load(path / "last.pt" if path.is_dir() else path, weights_only=True)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights of the last checkpoint of a run."""
    return load(run)["method"]


def csv_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a cases.csv, volumes.csv or scalars.csv, by their columns."""
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def trained_in_three_ways(folder: Path, argv: list[str]) -> dict[str, torch.Tensor]:
    """The weights of four iterations: from memory, from files by a worker, and resumed in between, which are equal."""
    import train_dtml  # not for tests that do without it

    argv = [*argv, "--iterations", "4", "--save-every", "2", "--runs", str(folder)]
    for name, args in {"ram": "", "none": "--cache none --workers 1"}.items():
        train_dtml.main([*argv, "--name", name, *args.split()])
    expected, streamed = weights(folder / "ram"), weights(folder / "none")
    (folder / "ram" / "previous.pt").rename(folder / "none" / "last.pt")
    assert load(folder / "none")["iteration"] == 2
    train_dtml.main(["--resume", str(folder / "none"), "--cache", "ram", "--workers", "0"])
    resumed = weights(folder / "none")
    for name, weight in expected.items():
        assert torch.equal(weight, streamed[name]) and torch.equal(weight, resumed[name])
    return expected


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts and lists of a checkpoint -> name -> type, shape and bytes of a tensor, or a plain value."""
    if isinstance(value, dict):
        return {k: v for key in value for k, v in flat(value[key], f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{name}/{i}").items()}
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return {name: (str(value.dtype), tuple(value.shape), value.numpy().tobytes())}
    return {name: value}


def nan_loss(method, losses):
    losses.terms["seg"] = losses.terms["seg"] * float("nan")
    losses.total = losses.terms["seg"]


def nan_gradient(method, losses):
    """The square root at 0: its value is finite, its derivative is not."""
    weight = next(method.parameters())
    losses.total = losses.total + (weight.flatten()[0] * 0).sqrt()


@pytest.fixture
def spoil(monkeypatch):
    """Spoils the losses of iteration k -> a dict that then holds the weights from before it."""

    from methods import METHODS  # not for tests that do without it

    def spoil_at(k, how):
        before = {}
        for kind, own in {kind: kind.forward for kind in METHODS.values()}.items():

            def forward(self, batch, iteration, real=own):
                weights = {name: p.detach().clone() for name, p in self.named_parameters()}
                losses = real(self, batch, iteration)
                if iteration == k:
                    before.update(weights=weights, method=self, cases=batch["case"])
                    how(self, losses)
                return losses

            monkeypatch.setattr(kind, "forward", forward)
        return before

    return spoil_at


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_set`, made once: to be read only."""
    return make_set(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="session")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two iterations on `data`, made once: to be read only."""
    import train_dtml  # not for tests that do without it

    runs = tmp_path_factory.mktemp("finished")
    train_dtml.main(["--data", str(data), "--runs", str(runs), *TINY, "--iterations", "2", "--name", "run"])
    return runs / "run"


@pytest.fixture(scope="session")
def trained(data: Path) -> Path:
    """The folder, beside `data`, of a run on it, made once: to be read only. 30 iterations are enough for balls: both
    networks segment most of each, with a ragged border. previous.pt is of 20 iterations."""
    import train_dtml  # not for tests that do without it

    argv = ["--data", str(data), "--runs", str(data.parent), "--name", "trained", *TINY, "--iterations", "30"]
    train_dtml.main([*argv, "--lr", "0.1", "--lr-steps", "--k", "10", "--filters", "4", "--save-every", "20"])
    return data.parent / "trained"


def score(checkpoint: Path, out: Path, *args: str) -> list[dict[str, str]]:
    """Tests a checkpoint and returns the rows of cases.csv."""
    import test_la  # not for tests that do without it

    where = ["--checkpoint", str(checkpoint), "--out", str(out), "--stride", "8", "8", "8"]
    test_la.main([*where, "--threads", "1", *args])
    return csv_rows(out / "cases.csv")


def saved_mask(out: Path, output: str, case: str) -> np.ndarray:
    """A saved prediction as (W,H,D)."""
    import SimpleITK as sitk  # not for tests that do without it

    return sitk.GetArrayFromImage(sitk.ReadImage(str(out / f"predictions/{output}/{case}.nii.gz"))).transpose(2, 1, 0)


@pytest.fixture
def checkpoint(finished: Path, tmp_path: Path) -> Path:
    """A copy of its checkpoint, alone in a folder."""
    (tmp_path / "copy").mkdir()
    return Path(shutil.copy(finished / "last.pt", tmp_path / "copy" / "last.pt"))


@pytest.fixture
def tiny_set(tmp_path: Path) -> Path:
    """8 training cases of 24x22x18 voxels, 4 with label, and 2 test cases."""
    return make_set(tmp_path / "set")


@pytest.fixture(scope="session", autouse=True)
def no_waiting() -> Iterator[None]:
    """Neither for the disk, as only a power cut would show what is not on it yet and each training writes nine files,
    nor for git, whose answers stay the same."""
    from utils import run_folder  # once pytest has put the code on the path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr(run_folder, "git", functools.cache(run_folder.git))
        yield


SLOW = ("test_docs.py", "test_distributed.py", "test_place.py", "test_recipes.py", "test_share.py", "test_make_runs.py")


def pytest_configure(config: pytest.Config) -> None:
    """Lets the tests begin with the files of SLOW. xdist would begin with those of most tests, and of two processes one
    would have nothing to do at the end."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in SLOW)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tensors are faster, and sums repeatable, on one thread; subprocesses inherit it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def no_card_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch reaches no GPU the tests run on the CPU on purpose, card or not."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def la_folder() -> Path | None:
    """The real LA volumes: $LA_DATA or data/la, if they are there."""
    folder = Path(os.environ.get("LA_DATA", ROOT / "data" / "la"))
    return folder if (folder / "2018LA_Seg_Training Set").is_dir() else None


@pytest.fixture
def la() -> Path:
    folder = la_folder()
    if folder is None:
        pytest.skip("the LA volumes are not there; see data/README.md")
    return folder
