"""Training sees no label of an unlabeled case and no file of a test case, and each batch is made as the papers say."""

import os
import sys
from collections import Counter

import h5py
import numpy as np
import pytest
import torch
from conftest import TINY, flat, load, make_set, method_words

import train_dtml
from dataloaders.two_stream import TwoStreamBatchSampler
from methods import METHODS

LABELED, TRAIN = 4, 8
FLAGS = [*TINY, "--batch-size", "2", "--iterations", "4", "--log-every", "1", "--picture-every", "4"]


def train(data, folder, *flags):
    where = ["--runs", str(folder.parent), "--name", folder.name]
    train_dtml.main(["--data", str(data), *FLAGS, *where, *flags])


def result(folder):
    """Weights, buffers and a critic's optimiser as bytes, and the curves."""
    return flat(load(folder)["method"]), (folder / "scalars.csv").read_text()


def files(data, split):
    return [data / name / "mri_norm2.h5" for name in (data / f"{split}.list").read_text().split()]


# Labels of unlabeled cases.


def balls(image):
    return (image > 0.5).astype(np.uint8)


POISON = {
    "right labels": balls,
    "wrong labels": lambda image: 1 - balls(image),
    "any bytes": lambda image: np.random.default_rng(0).choice(np.array([0, 1, 2, 255], np.uint8), image.shape),
    "not a number": lambda image: np.full(image.shape, np.nan, np.float32),
    "another shape": lambda image: np.ones((2, 3), np.uint8),
    "a group": lambda image: None,
    "a link to nothing": lambda image: h5py.SoftLink("/nowhere"),
    "a link to a file that is not there": lambda image: h5py.ExternalLink("nowhere.h5", "/label"),
}


def poison(data, how):
    for path in files(data, "train")[LABELED:]:
        with h5py.File(path, "r+") as f:
            label = POISON[how](f["image"][()])
            if label is None:
                f.create_group("label")
            else:
                f["label"] = label


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Flags -> the result on a set whose unlabeled cases have no label, computed once."""
    place, known = tmp_path_factory.mktemp("clean"), {}
    data = make_set(place / "set")

    def made(*flags):
        if flags not in known:
            train(data, place / f"run{len(known)}", *flags)
            known[flags] = result(place / f"run{len(known)}")
        return known[flags]

    return made


WAYS = [["--sdm-loss", "both"], ["--cache", "none", "--downsample", "2"]]


@pytest.mark.parametrize(("how", "flags"), [(how, WAYS[i % 2]) for i, how in enumerate(POISON)])
def test_labels_of_unlabeled_cases_change_nothing(how, flags, clean, tmp_path):
    data = make_set(tmp_path / "set")
    poison(data, how)
    if "--downsample" in flags:
        flags = [*flags, "--workers", "2"]
    train(data, tmp_path / "run", *flags)
    assert result(tmp_path / "run") == clean(*flags)


def test_labels_of_labeled_cases_do_change_the_result(clean, tmp_path):
    data = make_set(tmp_path / "set")
    with h5py.File(files(data, "train")[0], "r+") as f:
        f["label"][()] = 1 - f["label"][()]
    train(data, tmp_path / "run", "--sdm-loss", "both")
    assert result(tmp_path / "run") != clean("--sdm-loss", "both")


# What is opened depends on unlabeled crops, a second crop, cache and workers alone: no method reads a file
# (test_house.py).
READERS = [("dtml", "right labels", "ram")]
READERS += [(flags, "wrong labels", "none") for flags in ("dtml", "supervised", "dk-uxnet --crops independent")]


LOG: list[int] = []


def note(text):
    if LOG and isinstance(text, (str, bytes, os.PathLike)):
        os.write(LOG[0], os.fsencode(text) + b"\n")


sys.addaudithook(lambda event, args: note(args[0]) if event == "open" else None)


@pytest.fixture
def log(tmp_path, monkeypatch):
    """A file with a line for each that is opened, and FILE:NAME for what is read of an h5 file; by workers too."""

    def opened(name, *args, real=h5py.h5f.open, **kwargs):
        note(name)
        return real(name, *args, **kwargs)

    def read(self, name, real=h5py.Group.__getitem__):
        note(f"{self.file.filename}:{name}")
        return real(self, name)

    monkeypatch.setattr(h5py.h5f, "open", opened)
    monkeypatch.setattr(h5py.Group, "__getitem__", read)
    LOG.append(os.open(tmp_path / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT))
    yield tmp_path / "log.txt"
    os.close(LOG.pop())


@pytest.mark.parametrize(("flags", "how", "cache"), READERS)
def test_no_label_of_an_unlabeled_case_and_no_file_of_a_test_case_is_opened(flags, how, cache, clean, tmp_path, log):
    method, *more = flags.split()
    flags = [*method_words(method), *more]
    expected = clean(*flags)
    data = make_set(tmp_path / "set")
    poison(data, how)
    os.truncate(log, 0)
    workers = "2" if (method, cache) == ("dtml", "none") else "0"
    more = ["--cache", cache, "--workers", workers, "--cache-folder", str(tmp_path / "cache")]
    train(data, tmp_path / "run", *flags, *more[: 6 if cache == "none" else 4])
    seen = Counter(log.read_text().splitlines())
    paths = [str(path) for path in files(data, "train")]
    used = paths if METHODS[method].uses_unlabeled else paths[:LABELED]
    for name, those in {"image": used, "label": paths[:LABELED]}.items():
        assert {x for x in seen if x.startswith(str(data)) and x.endswith(f":{name}")} == {f"{x}:{name}" for x in those}
    assert seen[str(data / "train.list")] > 0
    # Each training case once when the set is read, and again for its crops.
    assert all(seen[path] > (cache == "none") for path in used)
    assert not [name for name in seen if any(str(path.parent) in name for path in files(data, "test"))]
    assert result(tmp_path / "run") == expected


# Batches.


def sampler(labeled, unlabeled, batch, labeled_batch, *, iterations=40, start=0, seed=1337, **ranks):
    return TwoStreamBatchSampler(
        labeled, unlabeled, batch_size=batch, labeled_batch=labeled_batch,
        seed=seed, start=start, iterations=iterations, **ranks,
    )  # fmt: skip


SIZES = [(16, 64, 4, 2), (8, 72, 4, 2), (4, 4, 2, 1), (12, 30, 5, 3), (5, 40, 4, 2), (16, 0, 4, 4), (7, 1, 3, 2)]


@pytest.mark.parametrize("labeled, unlabeled, batch, labeled_batch", SIZES)
def test_an_epoch_is_one_pass_over_the_labeled_cases(labeled, unlabeled, batch, labeled_batch):
    batches = list(sampler(labeled, unlabeled, batch, labeled_batch))
    assert len(batches) == 40
    length = labeled // labeled_batch
    epochs = [batches[i : i + length] for i in range(0, 40 - length + 1, length)]
    assert len(epochs) > 1
    for epoch in epochs:
        cases = [[slot.case for slot in slots] for slots in epoch]
        assert all(len(row) == batch for row in cases)
        first = [case for row in cases for case in row[:labeled_batch]]
        second = [case for row in cases for case in row[labeled_batch:]]
        assert len(set(first)) == len(first) == length * labeled_batch and set(first) <= set(range(labeled))
        assert set(second) <= set(range(labeled, labeled + unlabeled))
        counts = Counter(second)
        if counts:  # as evenly as possible: all different where there are enough of them
            rounds = len(second) / unlabeled
            assert max(counts.values()) <= max(1, np.ceil(rounds)) and len(counts) == min(len(second), unlabeled)
    if labeled > 2:
        orders = {tuple(slot.case for slots in epoch for slot in slots[:labeled_batch]) for epoch in epochs}
        assert len(orders) > 1, "every epoch must be shuffled anew"


def test_batches_depend_on_seed_and_iteration_alone():
    batches = list(sampler(16, 64, 4, 2))
    np.random.seed(3)
    torch.manual_seed(3)
    assert list(sampler(16, 64, 4, 2)) == batches
    assert list(sampler(16, 64, 4, 2, iterations=20)) == batches[:20]
    assert list(sampler(16, 64, 4, 2, seed=1)) != batches
    for start in (1, 7, 8, 39):
        rest = sampler(16, 64, 4, 2, start=start)
        assert list(rest) == batches[start:] and len(rest) == 40 - start


@pytest.mark.parametrize(("ranks", "start"), [(2, 0), (3, 5)])
def test_processes_share_one_sequence(ranks, start):
    whole = list(sampler(16, 64, 4, 2, iterations=40 * ranks))
    parts = [list(sampler(16, 64, 4, 2, start=start, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert [batch for together in zip(*parts, strict=True) for batch in together] == whole[start * ranks :]
