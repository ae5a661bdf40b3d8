"""Figures of run folders, of slices and of the framework."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, make_set
from PIL import Image

import test_la
import train_dtml
from dataloaders.cases import Case, case_file, read_case
from dataloaders.lists import lists_of
from evaluation.figures import ComparedCase, MapsRow, as_png, draw_comparison, draw_maps
from evaluation.graphs import draw_labels
from methods.base import by_name
from tools import framework, pictures
from utils.errors import UserError

# -- figures --


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the set, the tested runs dtml and supervised, and the run dtc, which was not tested."""
    folder = tmp_path_factory.mktemp("figures")
    data = make_set(folder / "set")
    for method in ("dtml", "supervised", "dtc"):
        args = ["--method", method, "--data", str(data), "--runs", str(folder), "--name", method, "--iterations", "3"]
        train_dtml.main([*args, *TINY])
    for method in ("dtml", "supervised"):
        test_la.main(["--checkpoint", str(folder / method), "--stride", "16", "16", "16", "--threads", "1"])
    (folder / "begun").mkdir()
    (folder / "begun" / "scalars.csv").write_text("iteration,loss/total\n")
    return folder


def draw(folder: Path, figure: str, *args: str) -> Path:
    out = folder / "figure.png"
    out.unlink(missing_ok=True)
    pictures.main([figure, *args, "--out", str(out), "--dpi", "60"])
    return out


def test_figures_are_drawn_from_run_folders(runs, tmp_path):
    dtml, supervised, dtc = (str(runs / name) for name in ("dtml", "supervised", "dtc"))
    heights = []
    for args in (
        ["figure2", dtml], ["figure2", dtc, "--cases", "case08"], ["figure2", supervised, "--slice", "5"],
        ["figure3", f"{dtml}:sdm", supervised], ["figure3", dtml, f"{dtml}:mean", "--cases", "case09", "--palette"],
        ["curves", dtml, dtc, "--titles", "one", "two"],
        ["differences", f"{dtml}/test", supervised, f"{dtml}:sdm"],
    ):  # fmt: skip
        with Image.open(draw(tmp_path, *args)) as picture:
            assert 300 < picture.width < 520 and picture.height > 60
            heights.append(picture.height)
            assert np.asarray(picture.convert("L")).std() > 10
    assert heights[3] > 1.5 * heights[4]  # two scans, and one
    assert draw(tmp_path, "labels", dtml, f"{supervised}/test").is_file()


def test_figure_2_shows_what_the_network_says_of_the_slice(runs):
    """On a scan no larger than the patch there is one window, so the maps are the method's own."""
    from methods import restore
    from utils.checkpoint import load_checkpoint

    method = restore(load_checkpoint(runs / "dtml")).eval()
    image = np.random.default_rng(0).standard_normal((16, 16, 16)).astype(np.float32)
    result = pictures.maps_of_slice(method, image, 5, (16, 16, 16), 1)
    with torch.no_grad():
        expected = method.maps(torch.from_numpy(image)[None, None])
    assert list(result) == ["p", "m", "z"]
    for name, values in result.items():
        assert values == pytest.approx(expected[name][0, ..., 5].numpy(), abs=1e-5)


def test_a_class_has_one_grey_in_the_labels_of_all_rows():
    """The first row shows both classes, the second the first alone."""
    image, label = np.random.default_rng(0).random((8, 8)), np.zeros((8, 8), int)
    label[2:4], both = 1, label.copy()
    both = np.where(np.arange(8)[:, None] > 5, 2, label)
    figure = draw_maps([MapsRow(name, image, y, {}, (1, 1, 1)) for name, y in (("a", both), ("b", label))])
    greys = [axes.images[0].to_rgba(np.array([[1.0]]))[0, 0, 0] for axes in figure.axes[1::2]]
    assert len(greys) == 2 and greys[0] == greys[1] == pytest.approx(0.5, abs=0.01)


def test_figure_2_of_several_classes_says_which_map_is_of_which_class():
    """The maps z are blue inside, with the bar that says so."""
    tensors = by_name(p=torch.rand(1, 2, 8, 8, 8), z=torch.rand(1, 2, 8, 8, 8))
    maps = {name: x[0, ..., 4].numpy() for name, x in tensors.items()}
    figure = draw_maps([MapsRow("a", np.random.default_rng(0).random((8, 8)), None, maps, (1, 1, 1))])
    shown = {axes.get_title(): axes.images[0].get_cmap().name for axes in figure.axes if axes.get_title()}
    assert list(shown) == ["image", "p, class 1", "p, class 2", "z, class 1", "z, class 2"]
    assert list(shown.values()) == ["gray", "gray", "gray", "coolwarm", "coolwarm"]
    (bar,) = (axes for axes in figure.axes if not axes.get_title())
    assert [label.get_text() for label in bar.get_xticklabels()] == ["-1 inside", "0", "1 outside"]


def test_the_dice_of_figure_3_is_the_mean_over_the_classes_in_prediction_or_label(runs, monkeypatch):
    """The label has class 1 alone, the prediction class 3 too; class 2 is in neither and counts in no mean."""
    label = read_case(Case("case09", case_file(runs / "set", "case09"), True))[1]
    wrong, drawn = label.copy(), []
    wrong[:2] = 3
    monkeypatch.setattr(pictures, "read_prediction", lambda *_: wrong)
    monkeypatch.setattr(pictures, "draw_comparison", lambda compared, *_: drawn.extend(compared))
    pictures.figure3([str(runs / "dtml")], pictures.Options(cases=["case09"]))
    assert [text for _, text in drawn[0].predictions.values()] == ["Dice 50.0"]


def test_scale_has_a_point_for_each_scan_without_and_with_normalization(tmp_path):
    """Each the mean over its runs, at the SD of the volume, which is measured once and then read."""
    data = make_set(tmp_path / "set")
    names = lists_of(data)[1]
    for name, dice in {"plain-seed1": 0.5, "plain-seed2": 0.7, "scaled-seed1": 0.9}.items():
        (tmp_path / name).mkdir()
        lines = [f"{case},seg,all,{dice + i / 100}" for i, case in enumerate(names)]
        (tmp_path / name / "cases.csv").write_text("\n".join(["case,output,component,dice", *lines, ""]))
    paths = [str(tmp_path / name) for name in ("plain-seed*", "scaled-seed*")]
    pictures.scale(paths, pictures.Options(titles=["8"], data=str(data)))
    sds = [read_case(Case(n, case_file(data, n), labeled=True))[0].astype(float).std() for n in names]
    (axes,) = pictures.scale(paths, pictures.Options(titles=["8"])).axes
    lines, *dots = axes.collections
    assert axes.get_title() == "8" and len(lines.get_segments()) == len(names) and len(dots) == 2
    for points, first in zip(dots, (60, 90), strict=True):
        x, y = np.asarray(points.get_offsets()).T
        assert x == pytest.approx(sds, abs=1e-4) and y == pytest.approx([first + i for i in range(len(names))])


def test_lines_of_the_picture_labels_stand_around_their_number_of_labeled_scans():
    """Ten methods with 8 labels do not move the two with 16 aside."""
    lines = {str(i): {8: [80.0 + i], **({16: [90.0 + i]} if i < 2 else {})} for i in range(10)}
    (axes,) = draw_labels(lines).axes
    places = np.concatenate([line.get_xdata() for line in axes.lines])
    few, many = places[places < 12], places[places > 12]
    assert len(few) == 10 and len(many) == 2 and len(set(places)) == 12
    assert [few.mean(), many.mean()] == pytest.approx([8, 16])


def test_labels_has_a_dot_for_each_run_and_a_line_through_the_means(tmp_path):
    """Runs are grouped by what their manifests state; a bar of one SD needs three runs."""
    dices = {"vnet-8-seed1": 0.5, "vnet-8-seed2": 0.6, "vnet-8-seed3": 0.8, "vnet-16-seed1": 0.9, "vnet-16-seed2": 0.7}
    for name, dice in dices.items():
        (tmp_path / name).mkdir()
        lines = ["case,output,component,dice", f"a,seg,all,{dice - 0.05}", f"b,seg,all,{dice + 0.05}", ""]
        (tmp_path / name / "cases.csv").write_text("\n".join(lines))
        (tmp_path / name / "manifest.json").write_text(json.dumps({"options": {"labeled": int(name.split("-")[1])}}))
    (axes,) = pictures.labels([f"{tmp_path}/vnet-*:seg"], pictures.Options(titles=["V-Net"])).axes
    assert axes.get_legend_handles_labels()[1] == ["V-Net"]
    assert axes.lines[0].get_xydata() == pytest.approx(np.array([[8, 190 / 3], [16, 80]]))
    dots, _, more = (np.asarray(collection.get_offsets()) for collection in axes.collections)
    assert dots == pytest.approx(np.array([[8, 50], [8, 60], [8, 80]]))
    assert more == pytest.approx(np.array([[16, 90], [16, 70]]))
    (bar,) = axes.collections[1].get_segments()
    assert bar[:, 1] == pytest.approx([190 / 3 - np.std([50, 60, 80], ddof=1), 190 / 3 + np.std([50, 60, 80], ddof=1)])
    (tmp_path / "vnet-8-seed1" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="states no number of labeled scans"):
        pictures.labels([f"{tmp_path}/vnet-*:seg"], pictures.Options())


def test_differences_are_each_scan_s_and_their_mean(tmp_path):
    dices = {"one": (0.5, 0.6, 0.7), "two": (0.55, 0.66, 0.72), "three": (0.4, 0.7, 0.7)}
    for name, values in dices.items():
        lines = [f"{case},seg,all,{value}" for case, value in zip("abcdef", 2 * values, strict=True)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["case,output,component,dice", *lines, ""]))
    paths = [str(tmp_path / f"{name}.csv") for name in ("one", "two", "three")]
    (axes,) = pictures.differences(paths, pictures.Options(titles=["usual", "better", "other"])).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["better", "other"]
    assert axes.get_xlabel().startswith("Dice % above usual")
    scans = [[xy[0] for xy in dots.get_offsets()] for dots in axes.collections]
    assert scans[0] == pytest.approx([5, 6, 2, 5, 6, 2]) and scans[1] == pytest.approx([13 / 3])
    assert scans[2] == pytest.approx([-10, 10, 0, -10, 10, 0]) and scans[3] == pytest.approx([0], abs=1e-9)
    bars = [line for line in axes.lines if line.get_linewidth() == 2.5]
    assert [bar.get_color() for bar in bars] == ["#0072b2", "0.25"]
    assert 2 <= bars[0].get_xdata()[0] < 13 / 3 < bars[0].get_xdata()[1] <= 7
    assert axes.get_xlabel().endswith("(scans only, one run each)")
    (axes,) = pictures.differences([paths[0], str(tmp_path / "t*.csv")], pictures.Options()).axes  # two and three
    assert [xy[0] for xy in axes.collections[0].get_offsets()] == pytest.approx([-2.5, 8, 1, -2.5, 8, 1])
    assert axes.get_xlabel().endswith("(scans, and the runs of the row)")
    for name, values in dices.items():
        lines = [f"{case},seg,all,{value}" for case, value in zip("abc", values, strict=True)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["case,output,component,dice", *lines, ""]))
    (axes,) = pictures.differences(paths, pictures.Options(titles=["usual", "better", "other"])).axes
    assert axes.get_xlabel().endswith("(none: too few scans)")


def test_curves_show_the_unlabeled_loss_of_every_method_and_its_weight():
    """Of DTML lambda and the consistency, of DTML+ w and the losses of its pseudo-labels, at the logged values."""
    half = Path(__file__).parent.parent / "results" / "half"
    figure = pictures.curves([str(half / "dtml-16-seed1337"), str(half / "plus-8-seed1340")], pictures.Options())
    lines = [{line.get_label(): line for line in axes.lines if line.get_label()[0] != "_"} for axes in figure.axes]
    dtml, plus = ({tag: line for panel in lines[i::2] for tag, line in panel.items()} for i in (0, 1))
    assert {"lambda", "loss/consistency"} <= set(dtml) and "w" not in dtml
    assert {"w", "loss/pseudo_seg", "loss/pseudo_mask"} <= set(plus) and "lambda" not in plus
    assert plus["w"].get_ydata()[-1] == pytest.approx(0.5)
    colours = [line.get_color() for line in lines[3].values()]
    assert len(colours) == len(set(colours)) == 4


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["figure3", "{runs}/dtc"], r"cannot read .*/dtc/test/cases\.csv: .*Run test_la.py --checkpoint .*/dtc, which"),
        (["figure3", "{runs}/typo"], "cannot read .*typo/cases.csv"),
        (["figure3", "{runs}/dtml:teacher"], "no output teacher, only seg, sdm, mean"),
        (["figure3", "{runs}/dtml", "--cases", "nobody"], "nobody is not in .*set"),
        (["figure2", "{runs}/dtml", "{runs}/dtc"], "of one run"),
        (["figure2", "{runs}/nowhere"], "nowhere"),
        (["figure2", "{runs}/dtml", "--slice", "18"], "slices 0 to 17"),
        (["figure3", "{runs}/dtml", "--titles", "a", "b"], "--titles must give 1"),
        (["curves", "{runs}/set"], "Give run folders"),
        (["curves", "{runs}/dtml", "{runs}/dtml"], "Give each once"),
        (["curves", "{runs}/begun"], "scalars.csv: it has no rows yet"),
        (["differences", "{runs}/dtml/test"], "two runs or more"),
        (["differences", "{runs}/dtml/test", "{runs}/dtc/test"], "cannot read"),
        (["figure4", "{runs}/dtml"], "figure4"),
    ],
)
def test_mistakes_are_named(args, says, runs, tmp_path):
    with pytest.raises(UserError, match=says):
        draw(tmp_path, *(word.format(runs=runs) for word in args))
    assert not list(tmp_path.iterdir())


def test_the_framework_is_drawn(tmp_path):
    framework.main([str(tmp_path / "framework.png")])
    assert Image.open(tmp_path / "framework.png").size == (1600, 700)


@pytest.mark.parametrize(("shape", "patch"), [((1, 24, 20), "1 16 16"), ((120, 1, 20), "16 1 16")])
def test_slices_that_are_a_line_of_voxels_are_drawn(shape, patch, tmp_path):
    """Sagittal and coronal scans of one slice have x-y slices of one voxel's width."""
    data = make_set(tmp_path / "set", shape=shape)
    halvings = " ".join("0" if side == "1" else "4" for side in patch.split())
    argv = ["--data", str(data), *TINY, "--labeled", "2", "--batch-size", "2", "--iterations", "1", "--device", "cpu"]
    argv += ["--patch-size", *patch.split(), "--halvings", *halvings.split(), "--augment", "none"]
    argv += ["--picture-every", "1"]
    train_dtml.main([*argv, "--runs", str(tmp_path), "--name", "run"])
    test_la.main(["--checkpoint", str(tmp_path / "run"), "--device", "cpu", "--stride", *patch.split()])
    drawn = list((tmp_path / "run" / "pictures").glob("*.png"))
    assert drawn
    for picture in drawn:
        assert max(Image.open(picture).size) < 2**14
    image = np.random.default_rng(0).random(shape[:2])
    half = np.arange(max(shape[:2])).reshape(shape[:2]) > 9
    label = np.broadcast_to(half[..., None], shape).astype(np.uint8)
    volume = np.broadcast_to(image[..., None], shape)
    for thick in (20.0, 1.0, 0.1):
        spacing = [thick if side == 1 else 1.0 for side in shape]
        compared = ComparedCase("one", volume, label, 0, {"run": (label, "")}, spacing)
        for figure in (draw_maps([MapsRow("one", image, half, {"p": half * 1.0}, spacing)]),
                       draw_comparison([compared], 0, 0)):  # fmt: skip
            width, height = Image.open(io.BytesIO(as_png(figure, 50, palette=False))).size
            assert 30 < height < 6 * width
