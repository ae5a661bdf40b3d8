"""Several channels in training: crops and views are those of each channel alone, and every method learns from all."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import TINY, make_set, trained_in_three_ways, write_case

from dataloaders.augmentation import random_intensities
from dataloaders.cases import Case, read_case
from dataloaders.normalization import Normalization
from dataloaders.two_stream import Patches, Slot
from dataloaders.volumes import Volumes
from evaluation.sliding_window import sliding_window
from losses.perturbation import strong_view
from methods import METHODS
from tools import check

SCAN = Normalization("scan")


def two_channels(folder: Path, channels: int = 2, **args) -> Path:
    """The set of `make_set`, with further channels that are mixtures of the first and noise."""
    make_set(folder, **args)
    for path in sorted(folder.glob("*/mri_norm2.h5")):
        with h5py.File(path, "r+") as f:
            first = f["image"][()]
            noise = np.random.default_rng(len(path.parent.name)).standard_normal((channels - 1, *first.shape))
            del f["image"]
            f["image"] = np.concatenate([first[None], 0.5 * noise - first]).astype(np.float32)
    return folder


@pytest.mark.parametrize("downsample", [1, 2])
@pytest.mark.parametrize("cache", ["ram", "disk", "none"])
def test_crops_are_those_of_each_channel_alone(cache, downsample, tmp_path):
    """Turned, flipped, scaled by the channel's own percentiles and padded, as one-channel sets of the same volumes."""
    two_channels(tmp_path / "two", train=2, test=1, labeled=2, shape=(24, 22, 14))
    sets = {"two": None, "0": 0, "1": 1}
    crops = {}
    for name, c in sets.items():
        cases = [Case(f"case{i:02d}", tmp_path / name / f"case{i:02d}" / "mri_norm2.h5", True) for i in range(2)]
        for case in cases if c is not None else ():
            image, label = read_case(Case("", tmp_path / "two" / case.name / "mri_norm2.h5", True))
            write_case(case.path, image[c], label)
        for _ in range(1 + (cache != "ram")):  # what a first run left on disk is read too
            volumes = Volumes(cases, cache=cache, downsample=downsample, normalize=SCAN, folder=tmp_path / f"c{name}")
        patches = Patches(volumes, patch_size=(16, 16, 16), augment="d4", seed=3, sdm=True)
        crops[name] = [patches[Slot(step, 0, step % 2)] for step in range(8)]
    for two, *ones in zip(*crops.values(), strict=True):
        assert two["image"].shape == (2, 16, 16, 16)
        assert torch.equal(two["image"], torch.cat([one["image"] for one in ones]))
        assert torch.equal(two["label"], ones[0]["label"]) and torch.equal(two["sdm"], ones[1]["sdm"])


def test_intensities_are_drawn_for_each_channel(tmp_path):
    two_channels(tmp_path, train=1, test=1, labeled=1)
    volumes = Volumes([Case("case00", tmp_path / "case00" / "mri_norm2.h5", True)])
    plain, varied = (
        Patches(volumes, patch_size=(16, 16, 16), augment="d4", seed=3, sdm=False, intensity=x) for x in (0.0, 0.4)
    )
    slot = Slot(5, 1, 0)
    _, generator = varied.draws(slot)
    expected = [random_intensities(channel, generator, 0.4) for channel in plain[slot]["image"]]
    assert torch.equal(varied[slot]["image"], torch.stack(expected))


def test_strong_views_are_of_each_channel():
    """With one channel as before, and no channel depends on another: drawn twice with another second channel."""
    image = torch.randn(3, 2, 8, 8, 8)
    torch.manual_seed(0)
    first = strong_view(image, 0.5)
    torch.manual_seed(0)
    other = strong_view(torch.stack([image[:, 0], 7 - 3 * image[:, 1]], dim=1), 0.5)
    assert torch.equal(first[:, 0], other[:, 0]) and not torch.equal(first[:, 1], other[:, 1])
    scales = (first.flatten(2).std(2) / image.flatten(2).std(2)).flatten()
    assert len(set(scales.tolist())) == 6


def test_the_sliding_window_shows_every_channel_to_the_network():
    """A network that adds up its channels with weights gives that sum of the volumes, padded sides and all."""
    image = torch.randn(3, 20, 12, 17)
    weights = torch.tensor([1.0, -2.0, 0.5]).view(-1, 1, 1, 1)
    result = sliding_window(lambda x: (x * weights).sum(dim=1, keepdim=True), image, (16, 16, 16), (5, 7, 4))
    torch.testing.assert_close(result[0], (image * weights).sum(dim=0))


@pytest.mark.parametrize(
    ("method", "backbone"), [*((m, "vnet") for m in METHODS), ("dtml", "uxnet"), ("mc-net-plus", "uxnet")]
)
def test_every_method_learns_from_every_channel(method, backbone):
    """The first convolution has two input channels, and what is minimised depends on both."""
    flags = {"backbone": backbone, "channels": 2, "filters": 2}
    flags |= {"query_channels": 16, "groups": [3, 2], "levels": [8, 4]} if method == "dk-uxnet" else {}
    flags |= {"critic_image": True} if method == "asdnet" else {}
    kind = METHODS[method]
    options = kind.Options(**flags)
    torch.manual_seed(0)
    network = kind(options, iterations=1)
    label = (torch.rand(2, 16, 16, 16) > 0.5).to(torch.uint8)
    batch = {"image": torch.randn(4, 2, 16, 16, 16), "label": label, "case": list("abcd")}
    batch |= {"other_image": torch.randn(4, 2, 16, 16, 16), "other_label": label}
    batch["sdm"] = torch.rand(2, 1, 16, 16, 16) * 2 - 1
    if not kind.uses_unlabeled:
        batch["image"] = batch["image"][:2]
    batch["image"].requires_grad_()
    losses = network.train()(batch, 0)
    losses.total.backward()
    assert (batch["image"].grad.abs().amax((0, 2, 3, 4)) > 0).all()
    batch["image"] = batch["image"].detach()
    network.after_step(batch, 0)
    network.eval()
    with torch.no_grad():
        p = network.predict(batch["image"], network.outputs)
        assert p.shape == (len(batch["image"]), len(network.outputs), 16, 16, 16)
        assert all(x.shape == (len(p), 16, 16, 16) for x in network.maps(batch["image"]).values())


def test_a_run_is_the_same_in_every_cache_and_when_resumed(tmp_path):
    data = two_channels(tmp_path / "set", train=4, labeled=2)
    argv = ["--data", str(data), *TINY, "--labeled", "2", "--batch-size", "2", "--device", "cpu"]
    trained_in_three_ways(tmp_path, [*argv, "--normalize", "scan", "--intensity", "0.3", "--method", "supervised"])


def test_check_looks_at_every_channel(tmp_path):
    two_channels(tmp_path, train=3, labeled=2)
    with h5py.File(tmp_path / "case01" / "mri_norm2.h5", "r+") as f:
        f["image"][1] = 1000 + f["image"][1]
    (tmp_path / "dataset.json").write_text('{"channel_names": {"0": "T1", "1": "T2"}}')
    findings, table, _ = check.check(tmp_path, check.Options(labeled=2, patch_size=[16, 16, 16], workers=1))
    odd = [x for x in findings if "not that of a normalised scan" in x.text]
    assert [x.cases for x in odd] == [("case01",)] and odd[0].text.startswith("in channel 1 the intensities")
    assert "T1, mean" in table and "T2, 99th percentile" in table
