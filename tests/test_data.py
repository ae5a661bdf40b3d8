"""Crops, augmentation, caches and case files."""

import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import make_set, write_case

from dataloaders.augmentation import Draw, draw_augmentation, turn_and_flip
from dataloaders.cases import Case, CaseError, find_cases, read_case
from dataloaders.geometry import known_spacing, read_geometry
from dataloaders.lists import lists_of
from dataloaders.two_stream import Patches, Slot, TwoStreamBatchSampler, collate, make_loader
from dataloaders.volumes import Volumes
from losses.sdm import signed_distance_map
from utils.errors import UserError


def orbit(kind: str) -> set[tuple[float, ...]]:
    """Every image that the augmentation makes of a small square with four different corners."""
    square = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[:, :, None]
    result = set()
    for seed in range(200):
        draw = draw_augmentation(np.random.default_rng(seed), (2, 2, 1), (2, 2, 1), kind)
        result.add(tuple(turn_and_flip(square, draw).flatten().tolist()))
    return result


def test_d4_has_all_eight_turns_and_reflections_and_mirror_the_four_reflections():
    original = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    turned = {tuple(torch.rot90(original, k).flatten().tolist()) for k in range(4)}
    mirrored = {tuple(torch.rot90(original.flip(0), k).flatten().tolist()) for k in range(4)}
    assert orbit("d4") == turned | mirrored
    assert orbit("mirror") == mirrored
    assert orbit("none") == {(1.0, 2.0, 3.0, 4.0)}


def test_every_offset_is_drawn_the_last_one_included():
    draws = [draw_augmentation(np.random.default_rng(i), (6, 7, 5), (4, 4, 4), "none") for i in range(300)]
    assert [sorted({d.start[axis] for d in draws}) for axis in range(3)] == [[0, 1, 2], [0, 1, 2, 3], [0, 1]]


@pytest.mark.parametrize("seed", range(10))
def test_crop_then_turn_equals_turn_then_crop(seed):
    """The same patch stands somewhere in the whole volume turned and flipped first, as the released codes do."""
    volume = torch.arange(9.0 * 7 * 5).view(9, 7, 5)
    draw = draw_augmentation(np.random.default_rng(seed), volume.shape, (4, 3, 2))
    box = tuple(slice(a, a + s) for a, s in zip(draw.start, draw.size, strict=True))
    patch = turn_and_flip(volume[box], draw)
    assert patch.shape == (4, 3, 2)
    whole = turn_and_flip(volume, draw)
    corner = (whole == patch[0, 0, 0]).nonzero()[0].tolist()
    assert torch.equal(whole[tuple(slice(c, c + s) for c, s in zip(corner, patch.shape, strict=True))], patch)


@pytest.mark.parametrize("flips", [(), (0,), (1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("turns", range(4))
def test_turning_is_rot90(turns, flips):
    volume = torch.randn(5, 7, 3)
    turned = torch.rot90(volume, turns, (0, 1))
    expected = turned.flip(flips)
    assert torch.equal(turn_and_flip(volume, Draw((0, 0, 0), (5, 7, 3), turns, flips)), expected)


def volumes(folder, /, labeled=4, **options) -> Volumes:
    train, _ = lists_of(folder)
    cases = find_cases(folder, train[:labeled], labeled=True)[0] + find_cases(folder, train[labeled:], labeled=False)[0]
    return Volumes(cases, **options)


def patches(folder, /, size=(16, 12, 8), **options) -> Patches:
    kept = {k: options.pop(k) for k in ("cache", "folder", "downsample", "normalize") if k in options}
    return Patches(volumes(folder, **kept), patch_size=size, **{"augment": "d4", "seed": 5, "sdm": False, **options})


@pytest.mark.parametrize("cache", ["disk", "none"])
@pytest.mark.parametrize("downsample", [1, 2])
def test_reading_crops_from_disk_equals_memory(tiny_set, downsample, cache, tmp_path):
    ram = patches(tiny_set, (8, 8, 8), cache="ram", downsample=downsample)
    disk = patches(tiny_set, (8, 8, 8), cache=cache, downsample=downsample, folder=tmp_path)
    assert (ram.volumes.kind, disk.volumes.kind) == ("ram", cache)
    assert ram.volumes.checksums == disk.volumes.checksums and ram.volumes.shapes == disk.volumes.shapes
    for step in range(20):
        a, b = (p[Slot(step, 0, step % 8)] for p in (ram, disk))
        assert torch.equal(a["image"], b["image"]) and ("label" in a) == ("label" in b) == (step % 8 < 4)
        assert "label" not in a or torch.equal(a["label"], b["label"])


def kept(folder: Path, name: str, what: str) -> Path:
    """The one file of a cache that belongs to a case."""
    (path,) = folder.glob(f"{name}-*.{what}")
    return path


@pytest.fixture
def opened(monkeypatch):
    """Names of the cases whose h5 files are opened."""
    names, real = [], h5py.File
    monkeypatch.setattr(h5py, "File", lambda path, *args: names.append(Path(path).parent.name) or real(path, *args))
    return names


def test_the_disk_cache_is_decoded_once_and_again_only_where_the_source_or_the_entry_changed(tmp_path, opened):
    data, cache = make_set(tmp_path / "set", labeled=6), tmp_path / "cache"
    opened.clear()
    first = volumes(data, cache="disk", folder=cache)
    train, _ = lists_of(data)
    assert opened == train and len(list(cache.rglob("*.label.npy"))) == 4 and len(list(cache.rglob("*.image.npy"))) == 8
    opened.clear()
    assert volumes(data, cache="disk", folder=cache).checksums == first.checksums and opened == []
    assert volumes(data, labeled=6, cache="disk", folder=cache).kind == "disk" and opened == train[4:6]
    opened.clear()
    # labels are there now, and not looked at where they should not be
    assert volumes(data, cache="disk", folder=cache).checksums == first.checksums and opened == []

    write_case(data / train[1] / "mri_norm2.h5", *read_case(Case(train[2], data / train[2] / "mri_norm2.h5", True)))
    image, label, entry = (kept(cache / "downsample1", train[i], what) for i, what in
                           ((3, "image.npy"), (2, "label.npy"), (5, "json")))  # fmt: skip
    short = image.read_bytes()[:-100]
    image.unlink()  # `first` holds on to it
    image.write_bytes(short)
    label.unlink()
    empty = kept(cache / "downsample1", train[7], "image.npy")
    empty.unlink()
    empty.write_bytes(b"")
    entry.write_text("{")
    opened.clear()
    again = volumes(data, cache="disk", folder=cache)
    assert opened == [train[i] for i in (1, 2, 3, 5, 7)]
    assert again.checksums == {**first.checksums, train[1]: first.checksums[train[2]]}
    assert torch.equal(again.read(3, (slice(None),) * 3)[0], first.read(3, (slice(None),) * 3)[0])
    assert not list(cache.rglob(".*"))


def twin_sets(folder: Path) -> tuple[Path, Path]:
    """Two sets whose files have the same names, sizes and times of change, and other voxels."""
    a, b = make_set(folder / "a"), make_set(folder / "b")
    for first in a.rglob("*.h5"):
        second = b / first.relative_to(a)
        with h5py.File(second, "r+") as f:
            f["image"][()] *= -2
            if "label" in f:
                f["label"][()] = 1 - f["label"][()]
        for path in (first, second):
            os.utime(path, ns=(0, 10**18))
        assert first.stat().st_size == second.stat().st_size and first.stat().st_mtime_ns == second.stat().st_mtime_ns
    return a, b


def assert_read(result: Volumes, expected: Volumes) -> None:
    """Voxels, shapes and checksums of all cases."""
    assert (result.checksums, result.shapes) == (expected.checksums, expected.shapes)
    for i, shape in enumerate(expected.shapes):
        whole = tuple(slice(0, side) for side in shape)
        for one, other in zip(result.read(i, whole), expected.read(i, whole), strict=True):
            assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize(
    ("how", "cache"),
    [("swapped", "disk"), ("written over", "none"), ("put in its place", "disk"), ("linked in its place", "none"),
     ("symbolic link", "disk")],
)  # fmt: skip
def test_another_file_in_the_place_of_the_first_is_read_anew(how, cache, tmp_path):
    """Whatever the way, it has the name, the size and the time of the first one."""
    a, b = twin_sets(tmp_path)
    if how == "symbolic link":
        (tmp_path / "now").symlink_to(a)
        a = tmp_path / "now"
    volumes(a, cache=cache, folder=tmp_path / "cache")
    if how == "swapped":
        a.rename(tmp_path / "c")
        b.rename(a)
    elif how == "symbolic link":
        a.unlink()
        a.symlink_to(b)
    else:
        for path in a.rglob("*.h5"):
            other, times = b / path.relative_to(a), (0, path.stat().st_mtime_ns)
            if how == "written over":
                path.write_bytes(other.read_bytes())
            elif how == "put in its place":
                shutil.copy(other, path.with_suffix(".new"))
                os.replace(path.with_suffix(".new"), path)
            else:
                path.unlink()
                os.link(other, path)
            os.utime(path, ns=times)
    assert_read(volumes(a, cache=cache, folder=tmp_path / "cache"), volumes(a, cache="ram"))


def test_what_a_run_does_to_its_crops_stays_out_of_the_disk_cache(tiny_set, tmp_path):
    result = volumes(tiny_set, cache="disk", folder=tmp_path)
    image, label = result.read(0, (slice(None),) * 3)
    expected = image.clone(), label.clone()
    image.zero_()
    label.fill_(7)
    again = volumes(tiny_set, cache="disk", folder=tmp_path).read(0, (slice(None),) * 3)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_a_disk_cache_that_cannot_be_written_is_a_user_s_mistake(tiny_set, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--cache-folder"):
        volumes(tiny_set, cache="disk", folder=tmp_path / "file")


def test_a_source_that_changes_while_it_is_read_is_not_remembered(tiny_set, tmp_path, monkeypatch):
    def read_and_touch(case):
        result = read_case(case)
        os.utime(case.path, ns=(0, case.path.stat().st_mtime_ns + 1))
        return result

    monkeypatch.setattr("dataloaders.volumes.read_case", read_and_touch)
    for cache in ("none", "disk"):
        with pytest.raises(UserError, match="changing while it is read"):
            volumes(tiny_set, cache=cache, folder=tmp_path)
    monkeypatch.undo()
    assert volumes(tiny_set, cache="none", folder=tmp_path).kind == "none"


def test_processes_share_out_the_check(tiny_set, tmp_path, opened, monkeypatch):
    """Each begins at a share of its own, and does not read what another has checked."""
    train, _ = lists_of(tiny_set)
    monkeypatch.setattr("dataloaders.volumes.RANKS", 2)
    monkeypatch.setattr("dataloaders.volumes.RANK", 1)
    second = volumes(tiny_set, cache="none", folder=tmp_path)
    assert opened == [*train[4:], *train[:4]]
    for name in train[:3]:
        kept(tmp_path / "checked", name, "json").unlink()
    opened.clear()
    monkeypatch.setattr("dataloaders.volumes.RANK", 0)
    first = volumes(tiny_set, cache="none", folder=tmp_path)
    assert opened == train[:3] and (first.checksums, first.shapes) == (second.checksums, second.shapes)


def test_image_label_and_map_of_a_crop_belong_together(tiny_set):
    """The image of the tiny set is its label plus noise, so a label turned otherwise would not fit it."""
    made = patches(tiny_set, sdm=True)
    for step in range(20):
        item = made[Slot(step, 1, step % 4)]
        assert item["image"].shape == item["sdm"].shape == (1, 16, 12, 8) and item["label"].shape == (16, 12, 8)
        assert (item["image"][0] - item["label"]).abs().mean() < 0.4
        assert np.array_equal(item["sdm"][0].numpy(), signed_distance_map(item["label"].numpy()))


@pytest.mark.parametrize("shape", [(16, 12, 8), (17, 13, 9), (10, 30, 5), (5, 5, 5)])
def test_volumes_smaller_equal_and_larger_than_the_patch(tmp_path, shape):
    image = np.random.default_rng(0).uniform(1, 2, shape).astype(np.float32)
    folder = make_set(tmp_path / "set", train=2, test=1, labeled=1)
    write_case(folder / "case00" / "mri_norm2.h5", image, np.ones(shape, np.uint8))
    for kind in ("none", "d4"):
        made = Patches(volumes(folder, labeled=1), patch_size=(16, 12, 8), augment=kind, seed=0, sdm=False)
        for step in range(8):
            item = made[Slot(step, 0, 0)]
            assert item["image"].shape == (1, 16, 12, 8)
            assert torch.equal(item["image"][0] > 0, item["label"] > 0)  # zeros around both alike
            sides = [min(a, b) for a, b in zip(shape, (16, 12, 8), strict=True)]
            if kind == "none":
                assert item["label"].sum() == np.prod(sides)


def test_a_second_crop_is_drawn_on_its_own_and_moves_the_first_by_nothing(tiny_set):
    one, two = (patches(tiny_set, (8, 8, 8), other=other) for other in (False, True))
    overlap = 0
    for step in range(40):
        a, b = (p[Slot(step, 0, step % 8)] for p in (one, two))
        assert torch.equal(a["image"], b["image"]) and set(a) | {"other_image"} <= set(b)
        assert ("other_label" in b) == ("label" in b) == (step % 8 < 4)  # an unlabeled scan has none in either crop
        overlap += torch.equal(b["image"], b["other_image"])
        if "other_label" in b:
            assert ((b["other_image"][0] > 0.5) == (b["other_label"] > 0)).float().mean() > 0.85  # of the same place
    assert overlap == 0
    batch = collate([two[Slot(0, slot, case)] for slot, case in enumerate((0, 1, 4, 5))])
    assert batch["other_image"].shape == (4, 1, 8, 8, 8) and batch["other_label"].shape == (2, 8, 8, 8)


def test_the_middle_crop_is_the_same_at_every_call(tiny_set):
    made = patches(tiny_set)
    first = made.centre_crop(0)
    made[Slot(0, 0, 0)]
    assert torch.equal(first["image"], made.centre_crop(0)["image"]) and first["image"].shape == (1, 16, 12, 8)
    assert torch.equal(first["image"][0], made.volumes.read(0, (slice(4, 20), slice(5, 17), slice(5, 13)))[0])


def test_labels_stand_first_in_a_batch_and_only_labeled_items_have_one(tiny_set):
    sampler = TwoStreamBatchSampler(4, 4, batch_size=4, labeled_batch=1, seed=0, start=0, iterations=3)
    for batch in make_loader(patches(tiny_set, sdm=True), sampler, workers=0):
        assert batch["image"].shape == (4, 1, 16, 12, 8) and batch["label"].shape == (1, 16, 12, 8)
        assert batch["sdm"].shape == (1, 1, 16, 12, 8)
        assert batch["case"][0] in {f"case0{i}" for i in range(4)} and set(batch["case"][1:]) <= {
            f"case0{i}" for i in range(4, 8)
        }


PUBLISHED = "06SR5RBREL16DQ6M8LWS"
LAYOUTS = ("2018LA_Seg_Training Set/{}/mri_norm2.h5", "{}/mri_norm2.h5", "{}.h5")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_spacing_is_what_file_or_set_declare_and_else_unknown(layout, tmp_path):
    """Whatever the folder is called."""
    name, image = "site2/patient1", np.random.default_rng(0).random((4, 5, 6), np.float32)
    write_case(tmp_path / "data" / layout.format(name), image, None)
    (case,), _ = find_cases(tmp_path / "data", [name], labeled=False)
    assert known_spacing(case) is None
    (tmp_path / "data" / "spacing.txt").write_text(" 0.5, 0.6\n2.0 \n".replace(",", ""))
    assert known_spacing(case) == (0.5, 0.6, 2.0) == read_geometry(case)["spacing"]
    write_case(case.path, image, None, spacing=(1.0, 2.0, 3.0))
    assert known_spacing(case) == (1.0, 2.0, 3.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_published_scans_have_their_published_spacing_in_every_layout(layout, tmp_path):
    write_case(tmp_path / layout.format(PUBLISHED), np.random.default_rng(0).random((4, 5, 6), np.float32), None)
    (case,), _ = find_cases(tmp_path, [PUBLISHED], labeled=False)
    assert known_spacing(case) == (0.625, 0.625, 0.625)
    (tmp_path / "spacing.txt").write_text("1 1 1")
    assert known_spacing(case) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("text", ["", "1 1 0", "1 1 nan", "1 1 mm", "1 1 1 1"])
def test_a_spacing_file_that_holds_no_three_lengths_is_named(text, tmp_path):
    write_case(tmp_path / "a.h5", np.random.default_rng(0).random((4, 5, 6), np.float32), None)
    (tmp_path / "spacing.txt").write_text(text)
    with pytest.raises(CaseError, match=r"whose .*spacing\.txt holds .* where the mm along x, y and z must stand"):
        read_geometry(Case("a", tmp_path / "a.h5", labeled=False))


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (np.diag([2.0, 1, 1]), "no unit vectors but 2, 1, 1 long"),
        (np.diag([1.0, 1, 0]), "no unit vectors but 1, 1, 0 long"),
        ([[1.0, 0, 0], [0, 1, 0.6], [0, 0, 0.8]], "y and z are at 53.13 degrees, as with a tilted gantry"),
    ],
)
def test_a_direction_that_is_none_is_refused(axes, message, tmp_path):
    image = np.random.default_rng(0).random((4, 5, 6), np.float32)
    write_case(tmp_path / "a.h5", image, None, direction=np.ravel(axes))
    with pytest.raises(CaseError, match=message):
        read_geometry(Case("a", tmp_path / "a.h5", labeled=False))
