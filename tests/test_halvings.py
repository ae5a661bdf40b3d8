"""Networks that leave an axis alone in their first steps, for scans with thick slices."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from conftest import TINY
from scans import make_scans
from test_unused_flags import SMALL

import predict
import test_la
import train_dtml
from methods import METHODS
from networks.backbones import BACKBONES
from networks.decoders import UPS, Doubled
from networks.heads import strides_of
from networks.vnet import Down, Up
from tools import convert
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.options import fill


@pytest.mark.parametrize("up", UPS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_axis_is_halved_so_often_and_last_of_all(backbone, up):
    network = BACKBONES[backbone](heads={"seg": 1}, filters=2, dropout=0.0, up=up, halvings=(4, 3, 1))
    image = torch.randn(2, 1, 32, 24, 6)
    maps = network.features(image)
    sides = [tuple(x.shape[2:]) for x in maps]
    assert sides == [(2, 3, 3), (4, 6, 6), (8, 12, 6), (16, 24, 6), (32, 24, 6)]
    network.read(maps)["seg"].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in network.parameters())


def test_by_default_every_step_halves_every_axis():
    assert strides_of((4, 4, 4)) == [(2, 2, 2)] * 4
    assert strides_of((4, 4, 2)) == [(2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2)]


def test_a_step_that_leaves_z_alone_is_that_of_its_slices():
    """Against torch's two-dimensional convolutions, slice by slice."""
    x = torch.randn(2, 4, 6, 8, 5)
    down, up = Down(4, (2, 2, 1))[0], Up(4, "transposed", (2, 2, 1))[0]
    for layer, plane in ((down, F.conv2d), (up, F.conv_transpose2d)):
        slices = [plane(x[..., z], layer.weight[..., 0], layer.bias, stride=2) for z in range(5)]
        torch.testing.assert_close(layer(x), torch.stack(slices, dim=-1))
    for mode in ("trilinear", "nearest"):
        expected = F.interpolate(x, scale_factor=(2, 2, 1), mode=mode)
        torch.testing.assert_close(Doubled(mode, (2, 2, 1))(x), expected)


@pytest.mark.parametrize("name", ["dtml", "asdnet", "sassnet", "tcse", "dk-uxnet", "mc-net-plus"])
def test_critics_views_queries_and_decoders_take_a_thin_patch(name):
    torch.manual_seed(0)
    kind = METHODS[name]
    method = kind(fill(kind.Options, SMALL, {"halvings": [4, 4, 1]}), iterations=8).train()
    x, y, z = method.side_multiples
    assert (x, y) == (16, 16) and z == {"sassnet": 16, "asdnet": 8}.get(name, 2)
    shape = (2 * x, y, z)
    label = (torch.rand(2, *shape) < 0.4).to(torch.uint8)
    batch = {"image": torch.randn(4, 1, *shape), "label": label, "case": ["a"] * 4, "sdm": torch.rand(2, 1, *shape)}
    batch |= {"other_image": batch["image"].flip(2), "other_label": label.flip(1)}
    method(batch, 4).total.backward()
    method.after_step(batch, 4)
    gradients = [p.grad for p in method.parameters() if p.requires_grad and p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)
    with torch.no_grad():
        p = method.eval().predict(batch["image"], method.outputs)
    assert p.shape == (4, len(method.outputs), *shape)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_thin_scan_is_trained_on_tested_and_predicted(backbone, tmp_path, capsys):
    make_scans(tmp_path / "scans", shape=(30, 28, 9))
    convert.main(["--source", str(tmp_path / "scans"), "--out", str(tmp_path / "set"), "--spacing", "1", "1", "4"])
    args = ["--data", str(tmp_path / "set"), *TINY, "--labeled", "2", "--batch-size", "2", "--iterations", "2"]
    args += ["--device", "cpu", "--runs", str(tmp_path), "--method", "dtc", "--backbone", backbone]
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"16 16 10 must be multiples of 16 16 4. Try --patch-size 16 16 8"):
        train_dtml.main([*args, "--halvings", "4", "4", "2", "--patch-size", "16", "16", "10"])
    train_dtml.main([*args, "--halvings", "4", "4", "2", "--patch-size", "32", "16", "4", "--name", "run"])
    assert load_checkpoint(run)["options"]["halvings"] == [4, 4, 2]
    with pytest.raises(UserError, match=r"--patch-size .16, 16, 6. must be multiples of 16 16 4"):
        test_la.main(["--checkpoint", str(run), "--patch-size", "16", "16", "6", "--device", "cpu"])
    test_la.main(["--checkpoint", str(run), "--device", "cpu", "--threads", "1"])
    assert "windows of 32x16x4" in capsys.readouterr().out
    scan = tmp_path / "scans" / "images" / "patient0.nii.gz"
    predict.main(["--checkpoint", str(run), str(scan), "-o", str(tmp_path / "out"), "--device", "cpu"])
    there, given = (sitk.ReadImage(str(path)) for path in (tmp_path / "out" / scan.name, scan))
    assert there.GetSize() == given.GetSize() and np.allclose(there.GetDirection(), given.GetDirection())


def test_turned_windows_whose_sides_do_not_fit_are_refused(tmp_path, tiny_set):
    args = ["--data", str(tiny_set), *TINY, "--patch-size", "4", "16", "16", "--halvings", "2", "4", "4"]
    args += ["--batch-size", "2", "--iterations", "1", "--method", "supervised", "--runs", str(tmp_path)]
    train_dtml.main([*args, "--name", "run"])
    test = ["--checkpoint", str(tmp_path / "run"), "--threads", "1", "--save", "none", "--stride", "4", "16", "16"]
    with pytest.raises(UserError, match=r"--flips 8 turns windows of .4, 16, 16., .* 16 4 along x and y"):
        test_la.main([*test, "--flips", "8"])
    test_la.main([*test, "--flips", "4"])
