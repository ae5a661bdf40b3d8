"""Precision, recomputation, compilation, and the check that stands between a gradient and the weights."""

import json
from functools import partial

import pytest
import torch
from conftest import TINY, weights
from torch import nn

import settings
import test_la
import train_dtml
from methods import METHODS, Losses, Watch
from networks.backbone import compile_networks, compiled, set_precision, set_recompute
from networks.uxnet import UXNet
from networks.vnet import VNet
from utils.devices import seed_iteration
from utils.errors import Diverged, UserError
from utils.options import fill

CONVOLUTIONS = (nn.Conv3d, nn.ConvTranspose3d)


def make(method="dtml", **options):
    torch.manual_seed(0)
    kind = METHODS[method]
    return kind(fill(kind.Options, {"filters": 2, **options}), iterations=10).train()


def make_batch(side=16):
    torch.manual_seed(1)
    label = (torch.rand(2, side, side, side) > 0.7).to(torch.uint8)
    return {"image": torch.randn(4, 1, side, side, side), "label": label, "case": list("abcd")}


def gradients(method, batch):
    seed_iteration(0, 0)
    method.zero_grad()
    losses = method(batch, 5)
    losses.total.backward()
    return losses.total.detach(), {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def test_in_bf16_M_s_rounds_and_M_d_does_not():
    method, batch = make(), make_batch()
    plain = gradients(method, batch)[1]
    assert set_precision(method, "bf16", training=True)
    seen = {}
    for name, module in method.named_modules():
        if isinstance(module, CONVOLUTIONS):
            module.register_forward_hook(lambda m, x, y, name=name: seen.update({name: y.dtype}))
    low = gradients(method, batch)[1]
    for name, dtype in seen.items():
        rounded = name.startswith("M_s") and "heads" not in name
        assert dtype == (torch.bfloat16 if rounded else torch.float32), name
    far = {n: float((low[n] - g).norm() / g.norm().clamp(min=1e-9)) for n, g in plain.items() if ".0.weight" in n}
    assert max(v for n, v in far.items() if n.startswith("M_s")) > 1e-3
    # M_d feels the rounding only through p in the consistency, whose weight is small.
    assert max(v for n, v in far.items() if n.startswith("M_d")) < 1e-2
    assert all(p.dtype == torch.float32 for p in method.parameters())


def test_auto_is_the_precision_of_the_device_and_the_run_says_which(tiny_set, tmp_path, monkeypatch):
    """SASSNet's network stays in fp32 whatever the device has, and `auto` is not refused."""

    def run(name, *args):
        train_dtml.main([*TINY, "--data", str(tiny_set), "--runs", str(tmp_path), "--name", name, "--iterations", "2",
                         "--precision", *args])  # fmt: skip
        return weights(tmp_path / name), json.loads((tmp_path / name / "manifest.json").read_text())["precision"]

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    (auto, of_auto), (bf16, of_bf16) = run("auto", "auto"), run("bf16", "bf16")
    assert of_auto == of_bf16 == "bf16 and fp32" and all(torch.equal(auto[name], w) for name, w in bf16.items())
    assert "precision   bf16 and fp32\n" in (tmp_path / "auto" / "log.txt").read_text()
    assert run("sassnet", "auto", "--method", "sassnet")[1] == "fp32"
    test_la.main(["--checkpoint", str(tmp_path / "auto"), "--precision", "auto", "--data", str(tiny_set)])
    assert json.loads((tmp_path / "auto" / "test" / "test.json").read_text())["precision"] == "bf16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    (slow, of_slow), (fp32, _) = run("slow", "auto"), run("fp32", "fp32")
    assert of_slow == "fp32" and all(torch.equal(slow[name], w) for name, w in fp32.items())


@pytest.mark.parametrize("kind", [VNet, UXNet])
def test_recomputing_changes_nothing_but_the_memory(kind):
    def outcome(recompute):
        torch.manual_seed(0)
        network = kind(heads={"seg": 1}, filters=4).train()
        set_recompute(network, recompute)
        image, kept = torch.randn(2, 1, 32, 32, 32), 0

        def keep(x):
            nonlocal kept
            kept += x.numel()
            return x

        torch.manual_seed(2)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = network(image)["seg"].square().mean()
        loss.backward()
        return kept, loss, [p.grad for p in network.parameters()], list(network.buffers())

    plain, again = outcome(False), outcome(True)
    assert torch.equal(plain[1], again[1])
    for a, b in zip(plain[2] + plain[3], again[2] + again[3], strict=True):
        assert torch.equal(a, b)
    assert again[0] < 0.6 * plain[0]


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_compiled_networks_have_the_same_losses_and_gradients(precision, monkeypatch):
    """With torch's plainest backend: what its C++ one makes takes minutes to build on a CPU."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    # In float32 an activation near 0 has one sign or the other, by the CPU, and the gradient jumps.
    dtype = torch.float32 if precision == "bf16" else torch.float64
    batch, result = make_batch(), []
    batch["image"] = batch["image"].to(dtype)
    for fast in (False, True):
        method = make("supervised").to(dtype)
        set_precision(method, precision, training=True)
        if fast:
            compile_networks(method)
        result.append((*gradients(method, batch), set(method.state_dict())))
    plain, other = result
    assert torch.allclose(plain[0], other[0], rtol=1e-4)
    for name, g in plain[1].items():
        assert torch.allclose(g, other[1][name], rtol=1e-3, atol=1e-5), name
    assert plain[2] == other[2]


def test_where_torch_cannot_compile_one_is_told_to_do_without(monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    with pytest.raises(UserError, match=r"--compile does not work here \(.*Failed to find C compiler.* Leave it out"):
        compiled(lambda image: [image + 1])(torch.ones(2))


class Event:
    """Of a GPU whose queue is always empty."""

    def record(self):
        pass

    def synchronize(self):
        pass


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_on_a_gpu_the_answer_comes_an_iteration_later_and_the_weights_stay(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    network, batch = nn.Linear(3, 1), {"case": ["a", "b"]}
    options = settings.Options(lr=0.1)
    optimizer = settings.OPTIMIZERS[name](list(network.parameters()), options)
    watch = Watch(optimizer, torch.device("cuda"))

    def step(iteration, factor):
        optimizer.zero_grad(set_to_none=True)
        loss = network(torch.ones(2, 3)).square().mean()
        total = loss + factor * network.weight.sum()
        total.backward()
        watch.look(Losses(total, {"seg": loss}), network, batch, iteration)
        optimizer.step()

    for iteration in range(3):
        before = network.weight.detach().clone()
        step(iteration, 1.0)
        assert not torch.equal(before, network.weight)
    before, state = network.weight.detach().clone(), optimizer.state_dict()["state"]
    kept = [v.clone() for s in state.values() for v in s.values() if v is not None]
    step(3, float("nan"))
    assert torch.equal(before, network.weight)
    for a, b in zip(kept, [v for s in optimizer.state_dict()["state"].values() for v in s.values() if v is not None],
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)
    with pytest.raises(Diverged, match=r"at iteration 3 the gradient of weight is not finite, in the crops of a, b"):
        step(4, 1.0)
    watch.flush()  # said once
    step(5, float("inf"))
    with pytest.raises(Diverged, match="at iteration 5"):
        watch.flush()


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted({*METHODS} - {"bcp", "asdnet", "sassnet"}))
def test_a_training_step_never_makes_the_host_wait(name):
    """The component filter of BCP is the CPU's, and a critic's step looks at its loss."""
    device = torch.device("cuda")
    method = make(name).to(device)
    optimizer = settings.OPTIMIZERS["sgd"](list(method.parameters()), settings.Options())
    watch, batch = Watch(optimizer, device), {k: v.to(device) if k != "case" else v for k, v in make_batch().items()}
    for iteration in range(4):
        torch.cuda.set_sync_debug_mode("error" if iteration else "default")
        try:
            seed_iteration(0, iteration)
            losses = method(batch, iteration)
            optimizer.zero_grad(set_to_none=True)
            losses.total.backward()
            watch.look(losses, method, batch, iteration)
            optimizer.step()
            method.after_step(batch, iteration)
        finally:
            torch.cuda.set_sync_debug_mode("default")
