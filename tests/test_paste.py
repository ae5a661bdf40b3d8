"""--paste: labeled crops pasted into each other, with volumes whose every voxel tells its scan."""

import collections
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, write_case

import train_dtml
from dataloaders import watched
from dataloaders.cases import Case
from dataloaders.two_stream import Patches, Slot
from dataloaders.volumes import Volumes
from losses.sdm import signed_distance_map
from utils.errors import UserError

SHAPE, PATCH = (20, 18, 16), (12, 10, 8)
SHARE, BOX = 0.5, (6, 5, 4)


@pytest.fixture
def volumes(tmp_path) -> Volumes:
    """Three labeled scans, 1, 2 and 3 in every voxel of image and label, and one of 9 without a label.

    The images have noise from 0 to 0.9 on top.
    """
    cases, noise = [], np.random.default_rng(0).uniform(0, 0.9, SHAPE).astype(np.float32)
    for value in (1, 2, 3, 9):
        label = np.full(SHAPE, min(value, 3), np.uint8)
        write_case(tmp_path / f"{value}.h5", value + noise, label)
        cases.append(Case(str(value), tmp_path / f"{value}.h5", value != 9, classes=3))
    return Volumes(cases)


def patches(volumes: Volumes, share: float = SHARE, **more) -> Patches:
    return Patches(volumes, **{"patch_size": PATCH, "augment": "d4", "seed": 5, "sdm": False, "paste": share, **more})


def test_a_box_of_another_labeled_scan_is_in_the_crop_image_and_label_alike(volumes):
    partners: collections.Counter[int] = collections.Counter()
    p, corners = patches(volumes), set()
    for step in range(300):
        item = p[Slot(step, 0, 0)]
        assert torch.equal(item["image"][0].floor(), item["label"].float())
        inside = np.argwhere(item["label"].numpy() != 1)
        low, high = inside.min(axis=0), inside.max(axis=0) + 1
        assert tuple(high - low) == BOX and len(inside) == np.prod(BOX)
        (partner,) = set(item["label"].unique().tolist()) - {1}
        partners[partner] += 1
        assert [slot.case for slot in p.slots_of(Slot(step, 0, 0))[0]] == [0, partner - 1]
        corners.add(tuple(low.tolist()))
    assert set(partners) == {2, 3} and abs(partners[2] - 150) < 4 * np.sqrt(300) / 2
    assert min(corners)[0] == 0 and max(corners)[0] == PATCH[0] - BOX[0]


def test_what_is_pasted_is_augmented_on_its_own_and_the_rest_is_as_without(tmp_path):
    rng, cases = np.random.default_rng(0), []
    for name in "ab":
        write_case(tmp_path / f"{name}.h5", rng.standard_normal(SHAPE).astype(np.float32), rng.integers(0, 2, SHAPE))
        cases.append(Case(name, tmp_path / f"{name}.h5", True))
    volumes = Volumes(cases)
    mixed, plain = (patches(volumes, share, intensity=0.5)[Slot(7, 2, 0)] for share in (SHARE, 0.0))
    changed = np.argwhere((mixed["image"] != plain["image"])[0].numpy())
    assert len(changed) == np.prod(BOX) and tuple(np.ptp(changed, axis=0) + 1) == BOX
    again = patches(volumes, intensity=0.5)[Slot(7, 2, 0)]
    assert all(torch.equal(again[name], mixed[name]) for name in ("image", "label"))


def test_what_is_pasted_has_a_place_and_a_turn_of_its_own(tmp_path):
    """From a twin of the scan, the same place turned alike would paste what is there already."""
    image = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    for name in "ab":
        write_case(tmp_path / f"{name}.h5", image, np.ones(SHAPE, np.uint8))
    volumes = Volumes([Case(name, tmp_path / f"{name}.h5", True) for name in "ab"])
    changed = []
    for step in range(10):
        mixed, plain = (patches(volumes, share)[Slot(step, 0, 0)]["image"] for share in (SHARE, 0.0))
        changed.append(int((mixed != plain).sum()))
    assert np.mean(changed) > 0.9 * np.prod(BOX)


def test_unlabeled_crops_stay_as_they_are(volumes):
    item = patches(volumes)[Slot(0, 4, 3)]
    assert (item["image"].floor() == 9).all() and "label" not in item


def test_a_second_crop_has_a_box_of_its_own(volumes):
    items = [patches(volumes, other=True)[Slot(step, 0, 1)] for step in range(10)]
    assert all(torch.equal(item["other_image"][0].floor(), item["other_label"].float()) for item in items)
    assert all((item["other_label"] != 2).sum() == np.prod(BOX) for item in items)
    assert any(not torch.equal(item["label"], item["other_label"]) for item in items)


def test_distances_are_those_of_the_mix_or_each_voxels_own_scan(volumes):
    item = patches(volumes, sdm=True)[Slot(0, 0, 0)]
    for c in (1, 2, 3):
        expected = signed_distance_map(item["label"].numpy() == c)
        np.testing.assert_array_equal(item["sdm"][c - 1].numpy(), expected)
    whole = patches(volumes, sdm=True, sdm_of="scan")
    own = [whole.distances_of_scan(case)[:, 0, 0, 0] for case in range(3)]  # constant: a class fills its scan
    item = whole[Slot(0, 0, 0)]
    for value in item["label"].unique().tolist():
        assert (item["sdm"][:, item["label"] == value] == own[value - 1][:, None]).all()


def test_one_labeled_scan_has_no_other_to_paste(data, tmp_path):
    flags = ["--labeled", "1", "--labeled-batch", "1", "--paste", "0.5", "--runs", str(tmp_path)]
    with pytest.raises(UserError, match=r"--paste 0.5: there is no second labeled scan"):
        train_dtml.main(["--data", str(data), *TINY, *flags])


def test_errors_name_the_scan_and_the_one_that_is_pasted_into_it(volumes, monkeypatch):
    """That of a diverged batch, and that of a worker that was killed while it read one of both."""
    tracked = watched.TrackedPatches(patches(volumes), workers=2)
    monkeypatch.setattr(watched, "get_worker_info", lambda: SimpleNamespace(id=1))
    for step in range(10):
        item = tracked[Slot(step, 0, 0)]
        (other,) = set(item["label"].unique().tolist()) - {1}
        assert item["case"] == f"1 with {other}"
        names = [text.partition(" (")[0] for text in tracked.cases_of([os.getpid(), None])]
        assert names == ["1", str(other)]
    assert tracked[Slot(0, 1, 3)]["case"] == "9"
    assert [text.partition(" (")[0] for text in tracked.cases_of([os.getpid()])] == ["9"]
    assert tracked.cases_of([os.getpid() + 1]) == []
