"""Several classes: each is treated as one class alone would be, and the whole goes from labels to tables."""

import itertools
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from conftest import TINY, csv_rows, load, make_set, weights, write_case
from matplotlib.colors import to_hex
from medpy.metric import binary
from scipy import ndimage

import test_la
import train_dtml
from dataloaders.cases import Case, CaseError, read_case
from evaluation import scores, slices
from evaluation.rows import read_row
from losses.sdm import signed_distance_map
from losses.terms import dice_loss, hard_dice, probabilities, seg_loss
from methods import METHODS, restore
from methods.ss_net import Separator
from networks.backbone import Backbone
from networks.critics import MapCritic
from tools import check, command_line, pictures
from utils.early_options import renamed
from utils.errors import UserError
from utils.masks import label_map, largest_components
from utils.options import fill
from utils.resample import downsample_label

SEVERAL = [name for name, kind in METHODS.items() if kind.multiclass]
SHAPE = (24, 22, 18)


def make_class_set(folder: Path, classes: int = 2) -> Path:
    """The balls of conftest, each cut into parts along x that differ in brightness: classes 1 to `classes`."""
    make_set(folder)
    for path in sorted(folder.glob("*/mri_norm2.h5")):
        with h5py.File(path, "r+") as f:
            if "label" not in f:
                continue
            part = 1 + np.arange(SHAPE[0])[:, None, None] * classes // SHAPE[0]
            label = f["label"][:] * part.astype(np.uint8)
            f["label"][...] = label
            f["image"][...] = f["image"][:] + 2 * label
    return folder


@pytest.fixture
def label() -> torch.Tensor:
    return torch.randint(4, (2, 6, 5, 4), generator=torch.Generator().manual_seed(0))


def random_logits(channels: int) -> torch.Tensor:
    return torch.randn(2, channels, 6, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(channels))


def test_dice_loss_is_the_mean_of_what_each_class_has_alone(label):
    p = random_logits(3).sigmoid()
    alone = [dice_loss(p[:, c : c + 1], (label == c + 1).to(torch.uint8)) for c in range(3)]
    assert dice_loss(p, label).item() == pytest.approx(sum(alone).item() / 3)


def test_training_dice_is_that_of_the_predicted_classes(label):
    """A class can be the most likely one without a probability above one half."""
    x = random_logits(4)
    predicted, p = x.argmax(dim=1), probabilities(x, 3)
    assert ((predicted > 0) & (p <= 0.5).all(dim=1)).any()
    scores = [binary.dc((predicted == c).numpy(), (label == c).numpy()) for c in (1, 2, 3)]
    assert hard_dice(p, label).item() == pytest.approx(np.mean(scores))


def test_softmax_has_the_background_for_a_channel_more(label):
    x = random_logits(4)
    p = probabilities(x, 3)
    torch.testing.assert_close(p, torch.softmax(x, 1)[:, 1:])
    picked = -torch.log_softmax(x, 1).gather(1, label[:, None]).mean()
    assert seg_loss(x, label, 3).item() == pytest.approx(0.5 * (picked + dice_loss(p, label)).item())


def test_sigmoids_are_one_binary_problem_for_each_class(label):
    x = random_logits(3)
    p = probabilities(x, 3)
    torch.testing.assert_close(p, x.sigmoid())
    of_each = [seg_loss(x[:, c : c + 1], (label == c + 1).to(torch.uint8)) for c in range(3)]
    assert seg_loss(x, label, 3).item() == pytest.approx(sum(of_each).item() / 3)


def test_label_map_takes_the_likeliest_and_background_takes_what_is_left():
    assert label_map(torch.tensor([0.5, 0.5001]).view(1, 2, 1, 1)).flatten().tolist() == [0, 1]
    p = torch.tensor([[0.4, 0.4, 0.9, 0.1], [0.3, 0.1, 0.95, 0.2]]).view(2, 4, 1, 1)
    assert label_map(p).flatten().tolist() == [1, 0, 2, 0]
    x = random_logits(4)[0]
    torch.testing.assert_close(label_map(torch.softmax(x, 0)[1:]).long(), x.argmax(0))


def test_downsampling_keeps_what_fills_half_of_a_cell_and_names_its_most_frequent_class():
    label = torch.randint(4, (6, 8, 4), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    pooled = downsample_label(label, 2)
    for cell in itertools.product(range(3), range(4), range(2)):
        counts = np.bincount(label[tuple(slice(2 * i, 2 * i + 2) for i in cell)].flatten(), minlength=4)
        expected = 1 + counts[1:].argmax() if counts[1:].sum() >= 4 else 0
        assert pooled[cell].item() == expected
    binary_label = (label > 1).to(torch.uint8)
    torch.testing.assert_close(downsample_label(2 * binary_label, 2), 2 * downsample_label(binary_label, 2))


def test_largest_component_of_each_class():
    label = np.random.default_rng(0).choice(4, (20, 18, 16), p=(0.7, 0.1, 0.1, 0.1)).astype(np.uint8)
    kept = largest_components(label, 3)
    for c in (1, 2, 3):
        result, _ = ndimage.label(label == c, np.ones((3, 3, 3)))
        assert (kept == c).sum() == np.bincount(result.ravel())[1:].max()
        assert not (kept == c)[label != c].any()


WITH_SOFTMAX = [(name, True) for name in SEVERAL if hasattr(METHODS[name].Options, "softmax")]


@pytest.mark.parametrize(("name", "softmax"), [*((name, False) for name in SEVERAL), *WITH_SOFTMAX])
def test_the_classes_names_mean_nothing(name, softmax):
    """Classes 1 and 2 swapped, in the labels, in the maps and in the heads: the same loss, to rounding."""
    kind = METHODS[name]
    args = {"classes": 3, "softmax": softmax, "filters": 2, "k": 10.0, "passes": 2}
    torch.manual_seed(0)
    method = kind(fill(kind.Options, args), iterations=10).double()
    image = torch.randn(4, 1, 16, 16, 16, dtype=torch.float64)
    label = torch.randint(4, (2, 16, 16, 16))
    swapped = torch.tensor([0, 2, 1, 3])[label]

    def loss(label: torch.Tensor) -> float:
        sdm = np.stack([[signed_distance_map(one == c) for c in (1, 2, 3)] for one in label.numpy()])
        batch = {"image": image, "label": label, "sdm": torch.from_numpy(sdm).double(), "case": list("abcd")}
        torch.manual_seed(1)
        return method(batch, 9).total.item()

    before, other = loss(label), loss(swapped)
    with torch.no_grad():
        for critic in (m for m in method.modules() if isinstance(m, MapCritic)):
            critic.map.weight.copy_(critic.map.weight[:, [1, 0, 2]].clone())
        for separator in (m for m in method.modules() if isinstance(m, Separator)):
            for attention in (separator.w, separator.v):
                attention[1], attention[2] = attention[2], attention[1]
        for network in (m for m in method.modules() if isinstance(m, Backbone)):
            for head in network.heads.values():
                first = len(head[0].weight) - 3
                order = [*range(first), first + 1, first, first + 2]
                head[0].weight.copy_(head[0].weight[order].clone())
                head[0].bias.copy_(head[0].bias[order].clone())
    assert loss(swapped) == pytest.approx(before, rel=1e-9)
    assert abs(other - before) > 1e-6


@pytest.mark.parametrize("name", [name for name, softmax in WITH_SOFTMAX if softmax])
def test_several_classes_have_a_softmax_unless_told_otherwise(name):
    def options(*flags: str):
        return command_line.read_options(["--method", name, "--data", "set", "--labeled", "8", *flags])[1]

    assert not options().softmax and options("--softmax").softmax and options("--classes", "3").softmax
    assert not options("--classes", "3", "--no-softmax").softmax
    image = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))

    def sums(softmax: bool | None) -> torch.Tensor:
        """Of the classes' probabilities, which exclude each other only in a softmax."""
        torch.manual_seed(0)
        kind = METHODS[name]
        method = kind(fill(kind.Options, {"classes": 3, "filters": 2, "softmax": softmax}), iterations=10).eval()
        with torch.no_grad():
            return method.predict(image, ("seg",)).sum(dim=1)

    assert sums(None).equal(sums(True)) and sums(True).max() <= 1 + 1e-6 < sums(False).max()


def test_an_early_checkpoint_of_several_classes_has_sigmoids():
    kind = METHODS["dtml-plus"]
    method = kind(fill(kind.Options, {"classes": 2, "filters": 2, "softmax": False}), iterations=10)
    early = {"method": "dtml-plus", "classes": 2, "filters": 2, "iterations": 10}  # without --softmax
    state = {"file": "last.pt", "method": method.state_dict(), "options": renamed(early)}
    assert all(torch.equal(weight, method.state_dict()[key]) for key, weight in restore(state).state_dict().items())


def test_from_labels_to_tables(tmp_path, capsys):
    """Trains and tests: predictions hold 0 to 2, and every figure is medpy's of that class."""
    data, run = make_class_set(tmp_path / "set"), tmp_path / "run"
    flags = [*TINY, "--method", "supervised", "--classes", "2", "--iterations", "40", "--lr", "0.1", "--lr-steps"]
    where = ["--data", str(data), "--runs", str(tmp_path), "--name", "run", "--picture-every", "40"]
    train_dtml.main([*flags, "--filters", "4", *where])
    assert len(list((run / "pictures").glob("*.png"))) == 1
    capsys.readouterr()
    args = ["--threads", "1", "--stride", "8", "8", "8", "--save", "all", "--report"]
    test_la.main(["--checkpoint", str(run), *args])
    out, printed = run / "test", capsys.readouterr().out
    rows = csv_rows(out / "cases.csv")
    assert len(rows) == 2 * 2 * 3 and [row["class"] for row in rows[:3]] == ["1", "2", "mean"]
    seen = set()
    for row in rows:
        if row["component"] == "largest":
            continue
        path = out / "predictions" / row["output"] / f"{row['case']}.nii.gz"
        prediction = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).transpose(2, 1, 0)
        seen |= set(np.unique(prediction).tolist())
        label = read_case(Case(row["case"], data / row["case"] / "mri_norm2.h5", True, 2))[1]
        dice = [binary.dc(prediction == c, label == c) for c in (1, 2)]
        expected = np.mean(dice) if row["class"] == "mean" else dice[int(row["class"]) - 1]
        assert float(row["dice"]) == pytest.approx(expected, abs=1e-6)
    assert seen == {0, 1, 2}
    assert "| output | component | class | scans | Dice %" in printed and printed.count("| mean |") >= 2
    page = (out / "report.html").read_text()
    assert '<td class="word">mean</td>' in page and '<option value="0">seg, all, mean</option>' in page
    assert all(f"{name}: Dice % " in page for name in ("1", "2", "mean"))
    means = {r["case"]: float(r["dice"]) for r in rows if (r["component"], r["class"]) == ("all", "mean")}
    assert read_row(f"{out}:seg", "dice", "all") == means


def test_tables_pictures_and_figures_name_the_classes_as_the_checkpoint_does(tmp_path, monkeypatch, capsys):
    data, run, titles = make_class_set(tmp_path / "set"), tmp_path / "run", []
    (data / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "left", "2": "right"}}))
    monkeypatch.setattr(slices, "slice_picture", lambda *args: titles.append(args[4]) or np.zeros((4, 4, 3), np.uint8))
    where = ["--data", str(data), "--runs", str(tmp_path), "--name", "run", "--picture-every", "1"]
    train_dtml.main([*TINY, "--method", "supervised", "--iterations", "1", *where])
    assert titles == ["case00, iteration 1, classes 1 left, 2 right"]
    (data / "dataset.json").unlink()
    capsys.readouterr()
    args = ["--threads", "1", "--stride", "16", "16", "16", "--save", "all", "--report"]
    test_la.main(["--checkpoint", str(run), *args])
    named = ["1 left", "2 right", "mean"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| seg | all |")]
    assert [line.split("|")[3].strip() for line in lines] == named
    assert [row["class"] for row in csv_rows(run / "test" / "cases.csv")[:3]] == ["1", "2", "mean"]  # as data
    page = (run / "test" / "report.html").read_text()
    for name in named:
        assert page.count(f'<td class="word">{name}</td>') == 2 + 4 and f"seg, all, {name}</option>" in page
    figure = pictures.figure3([str(run)], pictures.Options(cases=["case08"]))
    (key,) = figure.legends
    assert [text.get_text() for text in key.get_texts()] == ["left", "right"]
    assert [to_hex(patch.get_facecolor()) for patch in key.get_patches()] == list(slices.COLOURS[:2])
    figure = pictures.figure2([str(run)], pictures.Options(cases=["case08"]))
    assert [text.get_text() for text in figure.texts][-1] == "classes: 1 left, 2 right"


def test_a_scan_that_lacks_a_class_has_no_mean_distance_and_is_counted():
    label = np.zeros((8, 8, 8), np.uint8)
    label[1:4, 1:4, 1:4], label[5:7, 5:7, 5:7] = 1, 2
    result = np.where(label == 1, label, 0)
    one, two, mean = scores.class_scores(result, label, 2, (1.0, 1.0, 2.0))
    assert (one["dice"], two["dice"], mean["dice"]) == (1, 0, 0.5)
    assert np.isnan(two["hd95"]) and np.isnan(mean["hd95"]) and one["hd95"] == 0
    diagonal, in_mm = 8 * 3**0.5, 8 * 6**0.5  # of 8 x 8 x 8 voxels, of 1 x 1 x 2 mm
    assert (two["hd95_penalised"], two["asd_mm_penalised"]) == pytest.approx((diagonal, in_mm))
    assert (mean["hd95_penalised"], mean["asd_mm_penalised"]) == pytest.approx((diagonal / 2, in_mm / 2))
    assert (mean["voxels"], mean["label_voxels"]) == (0, 8)
    rows = [{"case": "a", "output": "seg", "component": "all", **score} for score in (one, two, mean)]
    lines = scores.table(rows).splitlines()
    assert [line.split("|")[-4:-1] for line in lines[2:]] == [[" 0 ", " 0 ", " 0 "], *2 * [[" 1 ", " 0 ", " 0 "]]]
    assert len({line.count("|") for line in lines}) == 1


def test_a_class_that_is_in_neither_map_is_in_no_mean_and_counted_apart():
    label = np.zeros((8, 8, 8), np.uint8)
    label[1:4, 1:4, 1:4] = 1
    result = np.roll(label, 1, axis=0)
    one, two, mean = scores.class_scores(result, label, 2, None)
    assert all(np.isnan(two[name]) for name in ("dice", "jaccard", "asd", "hd95", "hd95_penalised", "asd_mm"))
    names = ("dice", "jaccard", "asd", "hd95", "hd95_penalised", "voxels", "label_voxels")
    assert [mean[name] for name in names] == [one[name] for name in names] and one["hd95"] == 1
    rows = [{"case": "a", "output": "seg", "component": "all", **score} for score in (one, two, mean)]
    lines = [[cell.strip() for cell in line.split("|")[4:-1]] for line in scores.table(rows).splitlines()[2:]]
    assert [line[-3:] for line in lines] == [["0", "0", "0"], ["0", "0", "1"], ["0", "0", "0"]]
    assert lines[1][:4] == ["1", "- (0 of 1)", "- (0 of 1)", "- (0 of 1)"]
    nothing = scores.class_scores(np.zeros_like(label), np.zeros_like(label), 2, (1.0, 1.0, 1.0))[-1]
    assert np.isnan(nothing["dice"]) and nothing["voxels"] == 0


def test_values_beyond_the_classes_are_named(tmp_path):
    write_case(tmp_path / "a.h5", np.random.rand(4, 4, 4), np.full((4, 4, 4), 255, np.uint8))
    with pytest.raises(CaseError, match=r"holds 255 where only 0 to 2 may stand; 255 marks the atrium"):
        read_case(Case("a", tmp_path / "a.h5", True, 2))
    write_case(tmp_path / "b.h5", np.random.rand(4, 4, 4), np.full((4, 4, 4), 1.5))
    with pytest.raises(CaseError, match=r"holds 1.5 where only 0 to 2 may stand$"):
        read_case(Case("b", tmp_path / "b.h5", True, 2))


def test_a_set_that_names_its_classes_needs_no_flag(tmp_path, capsys):
    """The same run, in the same folder, as with --classes; check takes as many, and suggests a command without it."""
    data = make_class_set(tmp_path / "set")
    flags = ["--data", str(data), *TINY, "--method", "supervised", "--iterations", "1"]
    with pytest.raises(UserError, match="--classes 2 takes them all"):
        train_dtml.main([*flags, "--runs", str(tmp_path / "unnamed")])
    train_dtml.main([*flags, "--runs", str(tmp_path / "chosen"), "--classes", "2"])
    (data / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "left": 1, "right": 2, "all": [1, 2]}}))
    train_dtml.main([*flags, "--runs", str(tmp_path / "named")])
    chosen, named = (next((tmp_path / parent).glob("*/*/last.pt")).parent for parent in ("chosen", "named"))
    assert chosen.relative_to(tmp_path / "chosen") == named.relative_to(tmp_path / "named")
    assert load(named)["options"]["classes"] == 2 and "classes     1 left, 2 right\n" in (named / "log.txt").read_text()
    expected = weights(chosen)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(named).items())

    capsys.readouterr()
    check.main([str(data), "--labeled", "4", "--memory", "1"])
    out = capsys.readouterr().out
    assert "0 errors" in out and "left" in out and "train_dtml.py" in out and "--classes" not in out
    with pytest.raises(UserError, match=r"Give --classes as named below, fix(.|\n)*where only 0 and 1 may stand"):
        train_dtml.main([*flags, "--runs", str(tmp_path / "one"), "--classes", "1"])
    with pytest.raises(UserError, match="--classes 2: this method knows one class"):
        train_dtml.main([*flags, "--runs", str(tmp_path / "one"), "--method", "asdnet"])

    (data / "dataset.json").write_text(json.dumps({"labels": {"left": 1, "middle": 2, "right": 3}}))
    train_dtml.main(["--resume", str(named)])  # finished, and what it was is not looked up again
    with pytest.raises(UserError, match="--classes 3, but the largest value in the labels of the labeled cases is 2"):
        train_dtml.main([*flags, "--runs", str(tmp_path / "three")])


def test_one_distance_map_for_each_class(tmp_path):
    """The batch that DTC gets: channel c is the map of class c + 1 of its own crop."""
    data = make_class_set(tmp_path / "set")
    seen = {}

    class Spy(METHODS["dtc"]):
        def forward(self, batch, iteration):
            seen.update(batch)
            return super().forward(batch, iteration)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "dtc", Spy)
        flags = [*TINY, "--method", "dtc", "--classes", "2", "--iterations", "1"]
        train_dtml.main(["--data", str(data), "--runs", str(tmp_path), *flags])
    assert seen["sdm"].shape == (2, 2, 16, 16, 16)
    for label, maps in zip(seen["label"].numpy(), seen["sdm"].numpy(), strict=True):
        for c in (1, 2):
            np.testing.assert_array_equal(maps[c - 1], signed_distance_map(label == c))
    assert F.one_hot(seen["label"].long(), 3).sum(dim=(0, 1, 2, 3)).min() > 0
