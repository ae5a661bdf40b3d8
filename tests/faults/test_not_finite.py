"""A loss or a gradient that is not finite, of a method or of its critic, never reaches a weight."""

import pytest
import torch
from checkpoints import train
from conftest import flat, load, method_words, nan_gradient, nan_loss

from methods.adversary import Adversary
from utils.checkpoint import LAST
from utils.errors import Diverged, run


def infinite_loss(method, losses):
    losses.terms["seg"] = losses.terms["seg"] + float("inf")
    losses.total = losses.terms["seg"]


def all_finite(saved):
    return all(v.isfinite().all() for v in saved["method"].values() if isinstance(v, torch.Tensor))


SPOILS = {
    nan_loss: "the loss seg",
    infinite_loss: "the loss seg",
    nan_gradient: r"the gradient of (M_s|student|networks?(\.\w+)*)\.(encoder\.0|stem)\.0\.weight",
}
SPOILED = [("dtml", nan_loss, 0), ("dtml", infinite_loss, 4), ("dtml", nan_gradient, 7)]
SPOILED += [(method, nan_gradient, 2) for method in ("ua-mt", "sassnet", "dk-uxnet")]  # a teacher, a critic, UX-Net


@pytest.mark.parametrize(("method", "how", "k"), SPOILED)  # 4 is logged, 7 is the last one
def test_18_what_is_not_finite_never_reaches_the_weights(method, how, k, tiny_set, tmp_path, spoil):
    before, folder = spoil(k, how), tmp_path / "run"
    with pytest.raises(Diverged, match=f"at iteration {k} {SPOILS[how]}") as diverged:
        train(tiny_set, folder, *method_words(method), "--save-every", "1", "--log-every", "5")
    assert all(case in str(diverged.value) for case in before["cases"])
    after = dict(before["method"].named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in before["weights"].items())
    assert (folder / LAST).exists() == (k > 0)
    if k:
        saved = load(folder / LAST)
        assert saved["iteration"] == k
        assert all(torch.equal(saved["method"][name], weight) for name, weight in before["weights"].items())
        assert all_finite(saved)


def nan_of_critic(critic, loss):
    return loss * float("nan")


def nan_gradient_of_critic(critic, loss):
    return loss + (next(critic.parameters()).flatten()[0] * 0).sqrt()


@pytest.mark.parametrize(
    ("how", "named"), [(nan_of_critic, "the loss critic"), (nan_gradient_of_critic, r"the gradient of \S+\.weight")]
)
@pytest.mark.parametrize("method", ["sassnet", "asdnet"])
def test_18_what_is_not_finite_never_reaches_the_critic(method, how, named, tiny_set, tmp_path, monkeypatch):
    real, seen = Adversary.step, []

    def weights_of(adversary):
        return flat([dict(adversary.named_parameters()), adversary.get_extra_state()])

    def step(self, loss, batch, iteration):
        if iteration != 2:
            return real(self, loss, batch, iteration)
        seen.append(weights_of(self))
        try:
            real(self, lambda critic: how(critic, loss(critic)), batch, iteration)
        finally:
            seen.append(weights_of(self))
            assert not self.critic.training and not any(p.requires_grad for p in self.parameters())

    monkeypatch.setattr(Adversary, "step", step)
    with pytest.raises(Diverged, match=f"at iteration 2 {named}"):
        train(tiny_set, tmp_path / "run", "--method", method, "--save-every", "1")
    assert seen[0] == seen[1]
    saved = load(tmp_path / "run" / LAST)
    assert saved["iteration"] == 2 and all_finite(saved)


def test_18_a_diverged_program_exits_with_3_and_can_go_on(tiny_set, tmp_path, spoil, monkeypatch, capsys):
    spoil(5, nan_gradient)
    with pytest.raises(SystemExit) as left:
        run(lambda: train(tiny_set, tmp_path / "run", "--save-every", "3", "--log-every", "1"))
    assert left.value.code == 3
    assert "diverged: at iteration 5 the gradient of" in capsys.readouterr().err
    monkeypatch.undo()
    train(tiny_set, tmp_path / "run", "--resume", "auto", "--log-every", "1")
    train(tiny_set, tmp_path / "other", "--log-every", "1")
    result, wanted = (flat(load(tmp_path / name / LAST)["method"]) for name in ("run", "other"))
    assert result == wanted
    assert (tmp_path / "run" / "scalars.csv").read_text() == (tmp_path / "other" / "scalars.csv").read_text()
