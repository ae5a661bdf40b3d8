"""What python -m tools.check suggests for a training, and the memory that it counts for it."""

import math
import re
import shlex
from pathlib import Path

import h5py
import pytest
import torch
from conftest import make_set
from small_methods import make_batch

import train_dtml
from methods import METHODS
from tools import check
from tools.memory import MARGIN, PeakMemory, meta_method, step_bytes
from tools.suggestions import halvings_for, largest_patch
from utils.errors import UserError
from utils.options import fill


@pytest.fixture(scope="module")
def thin(tmp_path_factory) -> Path:
    """A set of slices of 3 mm with voxels of 0.7 mm."""
    return with_spacing(make_set(tmp_path_factory.mktemp("thin") / "set", shape=(50, 40, 14)), (0.7, 0.7, 3.0))


def with_spacing(folder: Path, spacing: tuple[float, ...], cases: str = "case*") -> Path:
    for path in folder.glob(f"{cases}/mri_norm2.h5"):
        with h5py.File(path, "a") as f:
            f.attrs["spacing"] = spacing
    return folder


def suggested(folder: Path, capsys: pytest.CaptureFixture, *args: str) -> tuple[str, list[str]]:
    """What the check prints after its table, and the words of the command in it."""
    check.main([str(folder), "--workers", "1", *args])
    text = capsys.readouterr().out.partition("in memory, GiB")[2]
    commands = [line for line in text.splitlines() if line.startswith("python train_dtml.py")]
    return text, shlex.split(commands[0])[2:] if commands else []


def values(command: list[str], flag: str) -> list[int]:
    """The numbers after a flag."""
    after = command[command.index(flag) + 1 :]
    return [int(word) for word in after[: next((i for i, word in enumerate(after) if word[:2] == "--"), None)]]


# -- the memory --


def test_what_lives_at_once_is_counted_once():
    with torch.device("meta"), PeakMemory() as memory:
        a = torch.empty(1000)  # 4000 bytes
        b = a.exp()
        b.view(10, 100).add_(1)  # the same bytes
        assert (memory.now, memory.peak) == (8000, 8000)
        del a
        c = b.double()
        assert (memory.now, memory.peak) == (12000, 12000)
        del b, c
    assert (memory.now, memory.peak) == (0, 12000)


@pytest.mark.parametrize(("method", "backbone"), [("supervised", "vnet"), ("dtml", "vnet"), ("supervised", "uxnet")])
def test_a_step_takes_what_autograd_saves_and_little_more(method, backbone):
    """Against the tensors that autograd keeps of a real forward pass, whose sizes are those of the count."""
    kind, options = METHODS[method], {"filters": 4, "backbone": backbone}
    real = kind(fill(kind.Options, options), iterations=100).train()
    own = {x.untyped_storage().data_ptr() for x in real.state_dict().values()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses = real(make_batch(side=32), 50)
    kept = sum(storage.nbytes() for storage in saved.values())
    del losses
    weights, rest = step_bytes(meta_method(method, options), (32, 32, 32), 4, 2)
    assert weights == 2 * 4 * sum(p.numel() for p in real.parameters())  # and the momentum of SGD
    assert kept < rest < 1.3 * kept


def test_a_step_grows_with_voxels_filters_channels_and_classes():
    def rest(patch=(32, 32, 32), batch=4, **options) -> int:
        return step_bytes(meta_method("supervised", {"filters": 8, **options}), patch, batch, batch)[1]

    usual = rest()
    assert rest((64, 32, 32)) == pytest.approx(2 * usual, rel=0.01) == rest(batch=8)
    assert rest(filters=16) == pytest.approx(2 * usual, rel=0.15)
    voxels = 4 * 32**3
    assert 4 * voxels <= rest(channels=2) - usual < 20 * voxels  # a channel more of the batch
    assert 12 * 4 * voxels < rest(classes=13) - usual < 12 * 40 * voxels  # the maps of the losses


@pytest.mark.parametrize("method", ["dtml", "dtc", "dk-uxnet"])  # all of them on meta: test_one_device.py
def test_the_step_of_a_method_can_be_counted(method):
    small = {"filters": 2, "query_channels": 16, "groups": [3, 2], "levels": [8, 4]}
    weights, rest = step_bytes(meta_method(method, small), (16, 16, 16), 4, 2)
    assert weights > 0 and rest > 4 * 4 * 16**3


# -- halvings and patch --


@pytest.mark.parametrize(
    ("spacing", "sides", "halvings"),
    [
        ((1, 1, 1), (100, 100, 100), (4, 4, 4)),
        ((1, 1, 1.9), (100, 100, 100), (4, 4, 4)),
        ((1, 1, 2), (100, 100, 100), (4, 4, 3)),
        ((0.7, 0.7, 3), (100, 100, 100), (4, 4, 2)),
        ((5, 0.6, 0.6), (100, 100, 100), (1, 4, 4)),
        ((1, 1, 40), (100, 100, 100), (4, 4, 0)),
        ((1, 1, 1), (100, 100, 9), (4, 4, 3)),
        ((1, 1, 3), (100, 100, 3), (4, 4, 1)),
        ((1, 1, 1), (9, 9, 9), (4, 4, 4)),  # one axis must be halved four times
    ],
)
def test_long_voxels_and_few_of_them_are_halved_less(spacing, sides, halvings):
    assert halvings_for(spacing, sides) == halvings


@pytest.mark.parametrize("most", [16 * 16 * 4, 40_000, 120_000, 10**7])
def test_the_patch_is_within_scans_and_memory_and_its_longest_side_gives_way(most):
    multiples, spacing = (16, 16, 4), (0.7, 0.7, 3.0)
    patch = largest_patch((90, 70, 15), multiples, spacing, most)
    assert math.prod(patch) <= most and patch <= (80, 64, 12)
    assert all(side % m == 0 for side, m in zip(patch, multiples, strict=True))
    lengths = [side * mm for side, mm in zip(patch, spacing, strict=True)]
    assert most > 10**6 or max(lengths) - min(lengths) <= 16 * 0.7 + 4 * 3
    assert largest_patch((90, 70, 15), multiples, spacing, 16 * 16 * 4 - 1) == (0, 0, 0)
    assert largest_patch((9, 90, 90), (16, 16, 16), None, most)[0] in (0, 16)  # scans are filled up to one multiple


# -- the command --


def test_the_command_of_a_thin_set_trains(thin, tmp_path, capsys):
    text, command = suggested(thin, capsys)
    assert "0.7 x 0.7 x 3 mm, the median\n" in text and "8 GiB" in text
    assert values(command, "--halvings") == [4, 4, 2] and values(command, "--patch-size") == [48, 32, 12]
    assert values(command, "--batch-size") == [4] and "--labeled" not in command
    train_dtml.main([*command, "--iterations", "2", "--filters", "2", "--runs", str(tmp_path), "--threads", "1"])


@pytest.mark.parametrize(("method", "gib"), [("dtml", 0.35), ("supervised", 0.2), ("dtml-plus", 0.9)])
def test_the_suggested_step_fits_into_the_memory(method, gib, thin, capsys):
    _, command = suggested(thin, capsys, "--method", method, "--memory", str(gib))
    patch, (batch,) = values(command, "--patch-size"), values(command, "--batch-size")
    labeled = batch // 2 if METHODS[method].uses_unlabeled else batch
    if method == "dtml-plus":
        assert batch == 6
        labeled = 4
    counted = meta_method(method, {"halvings": values(command, "--halvings")})
    need = MARGIN * sum(step_bytes(counted, patch, batch, labeled))
    assert 0.5 * gib < need / 2**30 < gib
    assert (["--method", method] == command[2:4]) == (method != "dtml")


def test_what_is_known_stands_in_the_command(tmp_path, capsys):
    folder = make_set(tmp_path / "a set", labeled=8, shape=(40, 24, 24))
    for path in folder.glob("case*/mri_norm2.h5"):
        with h5py.File(path, "a") as f:
            f["image"][...] *= 700
            f["label"][1:3, 1:3, 1:3] = 2
            f.attrs["spacing"] = (2.0, 0.5, 0.5)
    with_spacing(folder, (4.0, 0.5, 0.5), "case03")
    text, command = suggested(folder, capsys, "--labeled", "1", "--classes", "2")
    assert "resample first: python -m tools.convert --source SCANS --out NEW --spacing 2 0.5 0.5" in text
    assert command == shlex.split(
        f"--data '{folder}' --labeled 1 --classes 2 --normalize scan --halvings 2 4 4 --augment none --patch-size "
        "40 16 16 --batch-size 2"
    )


def test_one_spacing_is_named_that_of_the_training_cases(tmp_path, capsys):
    """Five of the eight scans are tested on, so that the median of all of them would be theirs."""
    folder = with_spacing(make_set(tmp_path / "set", train=3, test=5, labeled=3, shape=(40, 24, 24)), (1.0, 1.0, 1.5))
    with_spacing(folder, (0.3, 0.3, 2.0), "case0[3-7]")
    check.main([str(folder), "--workers", "1"])
    text = capsys.readouterr().out
    assert "spacing   1 x 1 x 1.5 mm, the median" in text
    assert "case03, case04, case05, case06, case07: voxels of another size than 1 1 1.5 mm; in the set" in text
    assert set(re.findall(r"--spacing ([\d. ]+\d)", text)) == {"1 1 1.5"}


def test_nothing_is_suggested_with_a_patch_size_or_an_error(thin, tiny_set, capsys):
    assert "Suggested" not in suggested(thin, capsys, "--patch-size", "16", "16", "12")[0]
    text, command = suggested(thin, capsys, "--memory", "0.1")
    assert "No patch is suggested: --memory 0.1 does not suffice for dtml" in text and not command
    with pytest.raises(UserError, match="--memory does nothing with --patch-size"):
        check.main([str(thin), "--memory", "4", "--patch-size", "16", "16", "12"])
    (tiny_set / "case00" / "mri_norm2.h5").write_bytes(b"no h5")
    with pytest.raises(UserError):
        check.main([str(tiny_set), "--workers", "1"])
    assert "Suggested" not in capsys.readouterr().out
