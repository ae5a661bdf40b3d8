"""Weights of the released repositories: loaded, they compute what the released network is written down to compute.

The reference is that network as plain function calls on a state dict with the released names, after the table of its
layers (no class of ours, no class of theirs).
"""

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from conftest import make_set, write_case
from torch import Tensor

import predict
import test_la
from methods.released import load_trained
from utils.errors import UserError

FILTERS = 4
DEPTHS = {"one": 1, "two": 2, "three": 3, "four": 3, "five": 3, "six": 3, "seven": 3, "eight": 2, "nine": 1}
SCALE = {"one": 1, "two": 2, "three": 4, "four": 8, "five": 16, "six": 8, "seven": 4, "eight": 2, "nine": 1}
Weights = OrderedDict[str, Tensor]


# -- the released network, by hand --


def released_weights(heads: dict[str, int], *, filters: int = FILTERS, seed: int = 0) -> Weights:
    """Random weights and running statistics of the released V-Net; heads: name -> channels."""
    rng = torch.Generator().manual_seed(seed)
    result: Weights = OrderedDict()

    def conv(name: str, out: int, into: int, side: int, *, transposed: bool = False) -> None:
        shape = (into, out) if transposed else (out, into)
        spread = (2 / (into * side**3)) ** 0.5 if not transposed else (2 / into) ** 0.5
        result[f"{name}.weight"] = spread * torch.randn(*shape, side, side, side, generator=rng)
        result[f"{name}.bias"] = 0.1 * torch.randn(out, generator=rng)

    def norm(name: str, size: int) -> None:
        result[f"{name}.weight"] = 1 + 0.2 * torch.randn(size, generator=rng)
        result[f"{name}.bias"] = 0.2 * torch.randn(size, generator=rng)
        result[f"{name}.running_mean"] = 0.2 * torch.randn(size, generator=rng)
        result[f"{name}.running_var"] = 0.5 + torch.rand(size, generator=rng)
        result[f"{name}.num_batches_tracked"] = torch.tensor(6000)

    for block, depth in DEPTHS.items():
        size = SCALE[block] * filters
        for i in range(depth):
            conv(f"block_{block}.conv.{3 * i}", size, 1 if block == "one" and i == 0 else size, 3)
            norm(f"block_{block}.conv.{3 * i + 1}", size)
        if block in ("one", "two", "three", "four"):
            conv(f"block_{block}_dw.conv.0", 2 * size, size, 2)
            norm(f"block_{block}_dw.conv.1", 2 * size)
        elif block != "nine":
            conv(f"block_{block}_up.conv.0", size // 2, size, 2, transposed=True)
            norm(f"block_{block}_up.conv.1", size // 2)
    for name, channels in heads.items():
        conv(name, channels, filters, 1)
    return result


def released_network(w: Weights, image: Tensor) -> dict[str, Tensor]:
    """image (N,1,W,H,D) -> head name -> (N,channels,W,H,D) before any activation; dropout is off."""

    def normed(x: Tensor, name: str) -> Tensor:
        mean, var, scale, shift = (
            w[f"{name}.{k}"].view(1, -1, 1, 1, 1) for k in ("running_mean", "running_var", "weight", "bias")
        )
        return torch.relu((x - mean) / torch.sqrt(var + 1e-5) * scale + shift)

    def block(x: Tensor, name: str) -> Tensor:
        for i in range(DEPTHS[name]):
            at = f"block_{name}.conv"
            x = F.conv3d(x, w[f"{at}.{3 * i}.weight"], w[f"{at}.{3 * i}.bias"], padding=1)
            x = normed(x, f"{at}.{3 * i + 1}")
        return x

    def down(x: Tensor, name: str) -> Tensor:
        at = f"block_{name}_dw.conv"
        return normed(F.conv3d(x, w[f"{at}.0.weight"], w[f"{at}.0.bias"], stride=2), f"{at}.1")

    def up(x: Tensor, name: str) -> Tensor:
        at = f"block_{name}_up.conv"
        return normed(F.conv_transpose3d(x, w[f"{at}.0.weight"], w[f"{at}.0.bias"], stride=2), f"{at}.1")

    x1 = block(image, "one")
    x2 = block(down(x1, "one"), "two")
    x3 = block(down(x2, "two"), "three")
    x4 = block(down(x3, "three"), "four")
    x5 = block(down(x4, "four"), "five")
    x6 = block(up(x5, "five") + x4, "six")
    x7 = block(up(x6, "six") + x3, "seven")
    x8 = block(up(x7, "seven") + x2, "eight")
    x9 = block(up(x8, "eight") + x1, "nine")
    heads = [name.removesuffix(".weight") for name in w if name.startswith("out_conv") and name.endswith("weight")]
    return {name: F.conv3d(x9, w[f"{name}.weight"], w[f"{name}.bias"]) for name in heads}


SOFTMAX, TWO = {"out_conv": 2}, {"out_conv": 1, "out_conv2": 1}
HEADS = {"ua-mt": SOFTMAX, "supervised": SOFTMAX, "dtc": TWO, "sassnet": TWO, "dtml": TWO}
CROPS = [(1, 1, 16, 48, 32), (2, 1, 32, 16, 16)]


def save(path: Path, weights: Weights, *, prefix: str = "", **how: object) -> Path:
    torch.save(OrderedDict((prefix + name, w) for name, w in weights.items()), path, **how)
    return path


def double(weights: Weights) -> Weights:
    return OrderedDict((name, w.double() if w.is_floating_point() else w) for name, w in weights.items())


def probabilities(weights: Weights, image: Tensor) -> dict[str, Tensor]:
    """What the released test scripts threshold, of a segmentation and, if there is one, of a map."""
    result = released_network(weights, image)
    if "out_conv2" not in result:
        return {"seg": result["out_conv"].softmax(dim=1)[:, 1:]}
    return {"seg": result["out_conv2"].sigmoid(), "sdm": 1 / (1 + (1500 * result["out_conv"].tanh()).exp())}


# -- the same numbers --


@pytest.mark.parametrize(
    ("method", "prefix"), [("ua-mt", ""), ("supervised", "module."), ("dtc", "module."), ("sassnet", "")]
)
def test_one_file_gives_the_probabilities_of_the_released_network(method, prefix, tmp_path):
    weights = released_weights(HEADS[method])
    state, trained, outputs = load_trained(str(save(tmp_path / "w.pth", weights, prefix=prefix)), method=method)
    assert outputs == {"dtc": ("seg", "sdm")}.get(method, ("seg",)) and state["options"]["filters"] == FILTERS
    for shape in CROPS:
        image = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        expected = probabilities(double(weights), image.double())
        assert expected["seg"].std() > 0.05
        with torch.no_grad():
            p = trained.float().eval().predict(image, ("seg",))
            assert (p - expected["seg"]).abs().max() < 1e-5
            exact = trained.double().predict(image.double(), outputs)
        assert (exact - torch.cat([expected[name] for name in outputs], dim=1)).abs().max() < 1e-9


@pytest.mark.parametrize("given", [("seg", "sdm"), ("seg",), ("sdm",)], ids="-".join)
def test_the_two_files_of_dtml_are_m_s_and_m_d(given, tmp_path):
    both = {name: released_weights(TWO, seed=seed) for seed, name in enumerate(("seg", "sdm"))}
    files = {name: str(save(tmp_path / f"{name}.pth", w)) if name in given else "" for name, w in both.items()}
    _, trained, outputs = load_trained(files["seg"], method="dtml", sdm_weights=files["sdm"])
    assert outputs == (("seg", "sdm", "mean") if len(given) == 2 else given)
    image = torch.randn(CROPS[0], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = {name: probabilities(double(w), image)[name] for name, w in both.items()}
    expected["mean"] = (expected["seg"] + expected["sdm"]) / 2
    with torch.no_grad():
        result = trained.double().eval().predict(image, outputs)
        z = trained.maps(image)["z"]
    assert (result - torch.cat([expected[name] for name in outputs], dim=1)).abs().max() < 1e-9
    if "sdm" in given:
        assert (z - released_network(double(both["sdm"]), image)["out_conv"].tanh()[:, 0]).abs().max() < 1e-12


def test_a_head_of_one_channel_is_a_sigmoid(tmp_path):
    weights = released_weights({"out_conv": 1})
    state, trained, _ = load_trained(str(save(tmp_path / "w.pth", weights)), method="supervised")
    image = torch.randn(CROPS[1], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        p = trained.eval().predict(image, ("seg",))
    assert not state["options"]["softmax"]
    assert (p - released_network(weights, image)["out_conv"].sigmoid()).abs().max() < 1e-5


def test_files_of_old_versions_of_torch_load(tmp_path):
    """Before torch 1.6 a file was no zip archive, before 0.4.1 batch norm did not count its batches."""
    weights = released_weights(SOFTMAX)
    fewer = OrderedDict((name, w) for name, w in weights.items() if not name.endswith("num_batches_tracked"))
    old = save(tmp_path / "old.pth", fewer, _use_new_zipfile_serialization=False)
    first, second = (load_trained(str(path), method="ua-mt")[1] for path in (old, save(tmp_path / "new.pth", weights)))
    image = torch.randn(CROPS[1], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(*(x.eval().predict(image, ("seg",)) for x in (first, second)))


# -- wrong files --


def refused(path: Path, method: str, *, sdm_weights: Path | None = None) -> str:
    with pytest.raises(UserError) as result:
        load_trained(str(path), method=method, sdm_weights=str(sdm_weights or ""))
    return str(result.value)


def test_another_familys_file_is_named_with_what_is_missing_and_unexpected(tmp_path):
    one, two = save(tmp_path / "one.pth", released_weights(SOFTMAX)), save(tmp_path / "two.pth", released_weights(TWO))
    text = refused(one, "dtc")
    assert "one.pth does not hold the released V-Net with two heads" in text and "Give the --method" in text
    assert "  missing: out_conv2.weight, out_conv2.bias" in text
    assert f"out_conv.weight (2, {FILTERS}, 1, 1, 1) in place of (1, {FILTERS}, 1, 1, 1)" in text
    text = refused(two, "ua-mt")
    assert "with one head" in text and "  unexpected: out_conv2.bias, out_conv2.weight" in text


def test_what_is_missing_unexpected_of_another_shape_or_not_finite_is_listed(tmp_path):
    weights = released_weights(SOFTMAX)
    del weights["block_six.conv.4.running_var"]
    weights["block_ten.conv.0.weight"] = torch.zeros(1)
    weights["block_two.conv.3.weight"] = torch.zeros(8, 8, 3, 3)
    weights["block_nine.conv.0.bias"][0] = float("nan")
    lines = refused(save(tmp_path / "w.pth", weights), "ua-mt").splitlines()[1:]
    assert lines == [
        "  missing: block_six.conv.4.running_var",
        "  unexpected: block_ten.conv.0.weight",
        "  unfit: block_two.conv.3.weight (8, 8, 3, 3) in place of (8, 8, 3, 3, 3), block_nine.conv.0.bias not finite",
    ]


@pytest.mark.parametrize("content", [{"state": {"epoch": 3}}, {}, [torch.zeros(3)], {"a": 1}, {3: torch.zeros(3)}])
def test_what_is_no_state_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    assert "not bare weights" in refused(tmp_path / "w.pth", "dtc")


@pytest.mark.parametrize("older", [False, True])
def test_a_file_that_was_cut_is_refused(older, tmp_path):
    path = save(tmp_path / "w.pth", released_weights(TWO), _use_new_zipfile_serialization=not older)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "w.pth" in refused(path, "dtc")


def test_files_and_flags_that_do_not_fit_each_other_are_refused(tmp_path):
    weights = save(tmp_path / "w.pth", released_weights(TWO))
    assert "does not exist" in refused(tmp_path / "nowhere.pth", "dtc")
    assert "is a folder" in refused(tmp_path, "dtc")
    assert "--method dtml" in refused(weights, "dtc", sdm_weights=weights)
    assert "--method dtml" in refused(weights, "", sdm_weights=weights)
    torch.save({"format": 1}, tmp_path / "ours.pt")
    assert "Leave out --method" in refused(tmp_path / "ours.pt", "dtc")
    for method, args in (("", "a run folder"), ("dtc", "dtc's bare weights")):
        with pytest.raises(UserError, match=f"--checkpoint is missing. Give .*{args}"):
            load_trained("", method=method)
    with pytest.raises(UserError, match=r"--output sdm: .*w.pth has no such output\. Choose from seg\."):
        test_la.main(["--checkpoint", str(weights), "--method", "dtml", "--output", "sdm"])


# -- tested --


def test_the_test_script_tests_bare_weights_with_the_papers_settings(tmp_path, monkeypatch, capsys):
    """One window of 112x112x80 around a smaller scan; the saved mask is that of the reference on the padded scan."""
    data = make_set(tmp_path / "set", train=2, test=1, labeled=2)
    image = np.random.default_rng(3).standard_normal((112, 111, 80)).astype(np.float32)
    write_case(data / "case02" / "mri_norm2.h5", image, (image > 1).astype(np.uint8), spacing=(1.0, 1.0, 2.0))
    padded = torch.from_numpy(np.pad(image, ((0, 0), (0, 1), (0, 0))))[None, None]
    weights = {name: released_weights(TWO, filters=1, seed=seed) for seed, name in enumerate(("seg", "dis"))}
    weights["seg"]["out_conv2.bias"] -= released_network(weights["seg"], padded)["out_conv2"].median()  # a half of each
    for name, w in weights.items():
        save(tmp_path / f"best_model_{name}.pth", w)
    args = ["--checkpoint", "best_model_seg.pth", "--sdm-weights", "best_model_dis.pth", "--method", "dtml"]
    monkeypatch.chdir(tmp_path)
    test_la.main([*args, "--data", str(data), "--save", "all", "--threads", "1"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in printed if line.startswith("| ")][1:] == [
        "seg", "seg", "sdm", "sdm", "mean", "mean"
    ]  # fmt: skip
    out = tmp_path / "best_model_seg-test"
    settings = json.loads((out / "test.json").read_text())
    assert (settings["patch_size"], settings["stride"], settings["windows"]) == ([112, 112, 80], [18, 18, 4], 1)
    assert settings["method"] == "dtml" and set(settings["released"]) == {"best_model_seg.pth", "best_model_dis.pth"}
    mask = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "predictions" / "seg" / "case02.nii.gz"))).transpose(2, 1, 0)
    p = probabilities(weights["seg"], padded)["seg"][0, 0, :, :111].numpy()
    assert mask.shape == image.shape and 0.3 < mask.mean() < 0.7
    assert (mask == (p > 0.5))[abs(p - 0.5) > 1e-4].all()


def test_predict_takes_bare_weights_too(tmp_path):
    """One scan of one window at the released network's spacing: its mask is that network's probability above 0.5."""
    weights = released_weights(SOFTMAX)
    image = np.random.default_rng(2).normal(3, 2, (16, 16, 16)).astype(np.float32)
    picture = sitk.GetImageFromArray(image.transpose(2, 1, 0))
    picture.SetSpacing((0.625, 0.625, 0.625))
    sitk.WriteImage(picture, str(tmp_path / "scan.nii.gz"))
    args = ["--checkpoint", str(save(tmp_path / "w.pth", weights)), "--method", "ua-mt", str(tmp_path / "scan.nii.gz")]
    predict.main([*args, "--patch-size", "16", "16", "16", "-o", str(tmp_path / "out"), "--threads", "1"])
    result = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "scan.nii.gz"))).transpose(2, 1, 0)
    normalised = torch.from_numpy((image - image.mean()) / image.std())[None, None].double()
    p = probabilities(double(weights), normalised)["seg"][0, 0].numpy()
    clear = np.abs(p - 0.5) > 1e-4
    assert clear.mean() > 0.99 and 0.02 < (p > 0.5).mean() < 0.98
    assert (result[clear] == (p > 0.5)[clear]).all()
