"""What a run that diverged leaves, and the same batch again."""

import pytest
import torch
from conftest import TINY, flat, load, method_words, nan_gradient, nan_loss

import train_dtml
from dataloaders.augmentation import Draw, turn_and_flip
from dataloaders.cases import Case, read_case
from methods import METHODS
from utils.checkpoint import load_checkpoint
from utils.errors import Diverged, UserError

FILE = "diverged-rank0.pt"


def flags(data, folder, *more):
    args = ["--data", str(data), *TINY, "--batch-size", "2", "--iterations", "8", "--log-every", "3"]
    return [*args, "--runs", str(folder.parent), "--name", folder.name, *more]


def diverge(data, folder, *more):
    """Trains until it diverges -> the error's text, the diagnostic file."""
    with pytest.raises(Diverged) as diverged:
        train_dtml.main(flags(data, folder, *more))
    return str(diverged.value), load_checkpoint(folder / FILE)


def replayed(folder, capsys):
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    train_dtml.main(["--from-diagnostic", str(folder / FILE)])
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}, "it changes nothing"
    return capsys.readouterr().out


# Batches as they were.


@pytest.mark.parametrize(("method", "k"), [("dtml", 3), ("ua-mt", 5), ("dk-uxnet", 3)])  # 5 is logged, 3 is not
def test_18_the_diagnostic_file_names_term_cases_and_boxes_and_replays_the_batch(
    method, k, tiny_set, tmp_path, monkeypatch, capsys
):
    seen, kind = {}, METHODS[method]
    real = kind.forward

    def spoilt(self, batch, iteration):
        losses = real(self, batch, iteration)
        if iteration == k:
            seen.setdefault("batch", dict(batch))
            seen.setdefault("terms", {name: value.item() for name, value in losses.terms.items()})
            losses.terms["seg"] = losses.terms["seg"] * float("nan")
            losses.total = losses.total + losses.terms["seg"]
        return losses

    monkeypatch.setattr(kind, "forward", spoilt)
    more = {"dk-uxnet": ["--crops", "independent"], "ua-mt": ["--precision", "bf16"]}
    args = [*method_words(method), *more.get(method, [])]
    text, kept = diverge(tiny_set, tmp_path / "run", *args)
    assert f"--from-diagnostic {tmp_path / 'run' / FILE}" in text
    assert kept["iteration"] == k and "the loss seg" in kept["error"] and kept["rank"] == 0
    assert (
        flat(kept["batch"]) == flat(seen["batch"])
        and kept["batch"]["case"] == [b["case"] for b in kept["boxes"]][:: 2 if method == "dk-uxnet" else 1]
    )
    for box in kept["boxes"]:
        image, _ = read_case(Case(box["case"], tiny_set / box["case"] / "mri_norm2.h5", False))
        draw = Draw(tuple(box["start"]), tuple(box["size"]), box["turns"], tuple(box["flips"]))
        place = tuple(slice(a, a + s) for a, s in zip(draw.start, draw.size, strict=True))
        crop = turn_and_flip(torch.from_numpy(image[place]), draw)
        of = [
            kept["batch"]["image"][box["slot"], 0],
            *([kept["batch"]["other_image"][box["slot"], 0]] if "other_image" in kept["batch"] else []),
        ]
        assert any(torch.equal(crop, result) for result in of)

    out = replayed(tmp_path / "run", capsys)
    assert "now:   the loss seg is nan, NOT FINITE" in out and f"iteration {k}, process 0" in out
    for name in seen["batch"]["case"]:
        assert f"crop:  case {name}  slot" in out
    monkeypatch.setattr(kind, "forward", real)
    out = replayed(tmp_path / "run", capsys)  # unspoilt, it computes to the digit what the run did
    for name, value in seen["terms"].items():
        assert f"now:   the loss {name} is {value:g}\n" in out
    assert "NOT FINITE" not in out and "now:   0 of" in out


def test_18_what_overflows_by_itself_is_found_where_it_begins(tiny_set, tmp_path, capsys):
    """A rate that makes every weight huge: the first map after the first step."""
    text, kept = diverge(tiny_set, tmp_path / "run", "--lr", "1e37")
    assert "at iteration 1" in text and torch.isfinite(kept["batch"]["image"]).all()
    out = replayed(tmp_path / "run", capsys)
    assert ", NOT FINITE" in out and "now:   the first map that is not finite is that of M_s." in out


def test_19_a_gradient_alone_is_named_by_its_weights(tiny_set, tmp_path, spoil, capsys):
    spoil(4, nan_gradient)
    _, kept = diverge(tiny_set, tmp_path / "run", "--save-every", "1")
    last = load(tmp_path / "run")
    weights = [name for name in last["method"] if name.endswith("weight")]
    assert last["iteration"] == 4 and flat([last["method"][n] for n in weights]) == flat(
        [kept["method"][n] for n in weights]
    )
    assert flat(last["optimizer"]) == flat(kept["optimizer"]), "the optimiser's moments are those of before, too"
    out = replayed(tmp_path / "run", capsys)
    assert "now:   the gradient of M_s.encoder.0.0.weight" in out and "now:   1 of" in out


# What is no diagnostic file, or cannot be written.


def test_18_a_disk_too_full_for_the_batch_does_not_hide_the_divergence(tiny_set, tmp_path, spoil, monkeypatch):
    def full(folder, state, name):
        raise UserError(f"cannot save {name}: No space left on device.")

    spoil(0, nan_loss)
    monkeypatch.setattr("tools.diagnostic.save_checkpoint", full)
    with pytest.raises(Diverged, match=r"the loss seg is not finite.* could not be kept: cannot save diverged-rank0"):
        train_dtml.main(flags(tiny_set, tmp_path / "run"))


def test_18_a_file_without_a_batch_is_no_diagnostic_file(tiny_set, tmp_path):
    train_dtml.main(flags(tiny_set, tmp_path / "run"))
    with pytest.raises(UserError, match=r"last\.pt holds no batch"):
        train_dtml.main(["--from-diagnostic", str(tmp_path / "run" / "last.pt")])
    with pytest.raises(UserError, match=r"--lr: 0\.01 before, 0.5 now"):
        train_dtml.main(["--from-diagnostic", str(tmp_path / "run" / "last.pt"), "--lr", "0.5"])
