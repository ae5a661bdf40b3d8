"""The page about a tested run: its figures are those of cases.csv, it needs nothing else, and a browser shows it."""

import base64
import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import csv_rows, write_case
from PIL import Image
from skimage.draw import polygon2mask

from evaluation.metrics import segmentation_metrics, with_penalties
from evaluation.predictions import read_scores
from evaluation.scores import as_csv, class_scores, table
from evaluation.slices import COLOURS
from tools import report_page
from tools.report_scans import MOST_BYTES, jpeg_slices, outline
from utils.errors import UserError
from utils.run_folder import write_json

SHAPE, SPACING = (40, 32, 12), (1.0, 1.0, 2.0)
WILD = "<b>x&'\"</script>"  # a case may be called anything that a file can
OUTPUTS = ("seg", "sdm")


def ball(centre: tuple[float, float, float], radius: float) -> np.ndarray:
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
    return (((grid - centre) * (1, 1, 2)) ** 2).sum(-1) < radius**2


def write_rows(test: Path, rows: list[dict[str, Any]]) -> None:
    with open(test / "cases.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def make_test(folder: Path, names: list[str], classes: int = 1, saved: str = "largest", **geometry: object) -> Path:
    """A test folder as test_la.py leaves it, of predictions that are worse from case to case; beside it, `set`."""
    rows: list[dict[str, Any]] = []
    rng = np.random.default_rng(0)
    for i, name in enumerate(names):
        label = ball((20, 16, 6), 9).astype(np.uint8)
        if classes > 1:
            label[20:] *= 2
        write_case(
            folder / "set" / f"{name.replace('/', '_')}.h5", rng.random(SHAPE, np.float32), label, spacing=SPACING,
            **geometry,
        )  # fmt: skip
        for output in OUTPUTS:
            mask = label * ball((20 + i, 16, 6), 9 - i)
            for component in ("all", "largest"):
                metrics = with_penalties(segmentation_metrics(mask, label, SPACING), SHAPE, SPACING)
                counts = {"voxels": int((mask > 0).sum()), "label_voxels": int((label > 0).sum())}
                where = {"case": name, "shape": "x".join(map(str, SHAPE)), "output": output, "component": component}
                rows.append({**where, **metrics, **counts})
            if saved != "none":
                path = folder / "run" / "test" / "predictions" / output / f"{name}.nii.gz"
                path.parent.mkdir(parents=True, exist_ok=True)
                sitk.WriteImage(sitk.GetImageFromArray(mask.transpose(2, 1, 0)), str(path))
    test = folder / "run" / "test"
    test.mkdir(parents=True, exist_ok=True)
    write_rows(test, rows)
    write_json(test / "test.json", {"data": str(folder / "set"), "saved": saved, "iteration": 7, "commit": "<i>abc"})
    write_json(
        folder / "run" / "manifest.json", {"options": {"method": "dtml", "labeled": 4, "seed": 1}, "checksums": {}}
    )
    return test


class Page(HTMLParser):
    """The tables by id, every address, all text outside of scripts, and the script's data."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.edges: list[str] = []
        self.chosen: list[str] = []
        self._table, self._cell, self._script, self._edge, self.json = "", False, False, False, ""
        self.feed(text)
        self.data = json.loads(self.json)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        result = dict(attributes)
        self.tags.append(tag)
        self.addresses += [str(result[name]) for name in ("src", "href", "action", "data", "poster") if name in result]
        if tag == "table":
            self._table = result.get("id") or f"bars{len(self.tables)}"
            self.tables[self._table] = []
        elif tag == "tr" and self._table:
            self.tables[self._table].append([])
        elif tag in ("td", "th") and self._table:
            self.tables[self._table][-1].append("")
            self._cell = True
        elif tag == "img":
            self.images.append(result)
        elif tag == "option" and "selected" in result:
            self.chosen.append(str(result["value"]))
        self._edge = tag == "b" and str(result.get("class")).startswith(("edge", "end"))
        self._script = tag == "script" and result.get("type") == "application/json"

    def handle_endtag(self, tag: str) -> None:
        self._edge = False
        self._cell &= tag not in ("td", "th")
        self._script = False
        if tag == "table":
            self._table = ""

    def handle_data(self, text: str) -> None:
        if self._script:
            self.json += text
        elif self._cell:
            self.tables[self._table][-1][-1] += text
        self.texts.append(text)
        if self._edge:
            self.edges.append(text)
            self._edge = False


def shown_first_of(page: Page) -> list[str]:
    """The names of the scans that the page shows before the reader chooses."""
    return [page.data[int(place)]["name"] for place in page.chosen]


def parse(test: Path) -> Page:
    return Page(report_page.write_report(test).read_text(encoding="utf-8"))


@pytest.fixture
def test(tmp_path: Path) -> Path:
    return make_test(tmp_path, ["case0", "case1", "case2"])


def test_every_figure_of_the_page_is_that_of_cases_csv(test):
    page, rows = parse(test), csv_rows(test / "cases.csv")
    _, *lines = page.tables["cases"]
    assert len(lines) == len(rows) == 12
    for line, row in zip(lines, rows, strict=True):
        assert line[:3] == [row["case"], row["output"], row["component"]]
        scale = {"dice": 100, "jaccard": 100}
        names = ("dice", "jaccard", "asd", "hd95", "asd_mm", "hd95_mm")
        assert [float(cell) for cell in line[3:9]] == pytest.approx(
            [scale.get(name, 1) * float(row[name]) for name in names], abs=0.0051
        )
        assert line[9:] == [row["voxels"], row["label_voxels"]]


def test_the_means_are_those_of_test_la_and_an_empty_prediction_is_the_lowest(tmp_path):
    test = make_test(tmp_path, [f"case{i}" for i in range(10)], saved="none")  # the last has no voxel left
    page = parse(test)
    lines = [line.strip("| ").split(" | ") for line in table(read_scores(test)).splitlines()]
    assert page.tables["means"] == [lines[0], *lines[2:]] and len(lines) == 2 + 2 * len(OUTPUTS)
    assert all("(9 of 10; these alone " in line[5] and line[-3:] == ["1", "0", "0"] for line in lines[2:])
    empty = next(line for line in page.tables["cases"] if line[0] == "case9")
    assert empty[3] == "0.00" and empty[5:9] == ["-"] * 4
    bars = report_page.write_report(test).read_text(encoding="utf-8").split("every scan, the lowest Dice first")[1]
    assert bars.index(">case9<") < bars.index('width:100.0%"></i></td><td>-<') < bars.index(">case8<")


def test_every_metric_is_printed_as_by_test_la(tmp_path):
    test = make_test(tmp_path, ["case0", "case1"], saved="none")
    write_json(test / "test.json", {"data": "set", "scans": "validation", "nsd_tolerance_mm": 1.0, "metrics": ["rve"]})
    rows = [
        {"case": f"case{i}", "output": "seg", "component": "all", **scores}
        for i in range(2)
        for scores in class_scores(ball((20, 16, 6), 9 - i), ball((20, 16, 6), 8), 1, SPACING, 1.0, ("assd", "rve"))
    ]
    (test / "cases.csv").write_text(as_csv(rows))
    page = parse(test)
    markdown = [line.strip("| ").split(" | ") for line in table(rows).splitlines()]
    assert page.tables["means"] == [markdown[0], markdown[2]] and {"ASSD mm", "RVE %"} <= {*markdown[0]}
    assert page.tables["cases"][1][page.tables["cases"][0].index("RVE %")] == f"{100 * rows[0]['rve']:.2f}"
    told = " ".join(page.texts)
    assert "2 validation scans of set" in told and "RVE is the relative" in told and "at most 1 mm" in told


def test_a_scan_with_nothing_to_find_stands_last_and_is_neither_worst_nor_best(tmp_path):
    test = make_test(tmp_path, ["case0", "case1", "case2"])
    rows = csv_rows(test / "cases.csv")
    nothing = {name: "nan" for name in rows[0] if name not in ("case", "shape", "output", "component")}
    nothing |= {"voxels": "0", "label_voxels": "0"}
    write_rows(test, [row | (nothing if row["case"] == "case1" else {}) for row in rows])
    page = parse(test)
    assert [one["name"] for one in page.data] == ["case2", "case0", "case1"]
    assert shown_first_of(page) == ["case2", "case0"]
    bars = [rows for name, rows in page.tables.items() if name.startswith("bars")]
    assert all([row[0] for row in rows[1:]] == ["case2", "case0", "case1"] for rows in bars)
    assert all(line[-3:] == ["0", "0", "1"] and "(2 of 3)" in line[3] for line in page.tables["means"][1:])


def test_it_needs_nothing_but_itself(test):
    text = report_page.write_report(test).read_text(encoding="utf-8")
    page = Page(text)
    assert page.addresses and all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text)
    assert "default-src 'none'" in text and "fetch(" not in text
    assert all(image.get("alt") for image in page.images)


def test_what_files_are_called_is_text_on_the_page(tmp_path):
    test = make_test(tmp_path, ["case0", WILD.replace("/", "_")])
    page = parse(test)
    assert WILD.replace("/", "_") in {x["name"] for x in page.data}
    assert page.tables["cases"][-1][0] == WILD.replace("/", "_")
    assert page.tags.count("b") == str(report_page.DEFINITIONS).count("<b>") + 2 * 6  # and the letters of two boxes
    assert page.tags.count("script") == 2 and "<i>abc" in page.texts


def test_slices_contours_and_surfaces_are_those_of_the_scan(test):
    page = parse(test)
    one = page.data[2]
    pictures = [Image.open(io.BytesIO(base64.b64decode(text))) for text in one["slices"]]
    assert len(pictures) == SHAPE[2] and {p.width / p.height for p in pictures} == {SHAPE[0] / SHAPE[1]}
    label = ball((20, 16, 6), 9)
    for z, path in enumerate(one["contours"]["label"][0]):
        lines = [np.array([p.split() for p in part.split("L")], float) for part in re.findall(r"M([^Z]+)Z", path)]
        drawn = sum((polygon2mask(SHAPE[:2], line - 0.5) for line in lines), np.zeros(SHAPE[:2], bool))
        assert (drawn != label[..., z]).sum() <= 0.03 * label[..., z].sum()
    for part in (one["surfaces"][0][0], one["surfaces"][1][0]):
        vertices = np.frombuffer(base64.b64decode(part["vertices"]), "<i2").reshape(-1, 3) / 32767
        faces = np.frombuffer(base64.b64decode(part["faces"]), "<u2").reshape(-1, 3)
        a, b, c = (vertices[faces[:, i]] for i in range(3))
        radius = np.ptp(vertices[:, 0]) / 2
        assert (a * np.cross(b, c)).sum() / 6 == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.15)


def test_every_scan_can_be_chosen_the_lowest_dice_first(tmp_path):
    names = [f"case{i}" for i in range(6)]
    page = parse(make_test(tmp_path, names))
    assert [one["name"] for one in page.data] == names[::-1]  # the predictions get worse
    assert shown_first_of(page) == ["case5", "case0"]
    rows = {row[0]: row for row in page.tables["cases"][1:] if row[1:3] == ["seg", "largest"]}
    for one in page.data:
        assert one["line"].startswith(f"Dice % {rows[one['name']][3]}, ")
        assert len(one["slices"]) == SHAPE[2] == len(one["contours"]["label"][0]) and one["size"] == list(SHAPE[:2])
    listed = [text for text in page.texts if re.fullmatch(r"case\d, Dice [\d.]+", text)]
    assert listed == [f"{one['name']}, Dice {rows[one['name']][3]}" for one in page.data] * 2


def test_the_figures_of_a_scan_name_its_classes(tmp_path):
    test = make_test(tmp_path, ["one"], classes=2)
    rows = []
    for row in csv_rows(test / "cases.csv"):
        first = {name: row.pop(name) for name in ("case", "shape", "output", "component")}
        rows += [{**first, "class": c, **row} for c in ("1", "2", "mean")]
    write_rows(test, rows)
    write_json(test / "test.json", {**json.loads((test / "test.json").read_text()), "class_names": {"1": "head <of>"}})
    text = report_page.write_report(test).read_text(encoding="utf-8")
    assert re.search(r"head &lt;of&gt;: Dice % [\d.]+, 95HD voxel [\d.]+; 2: Dice % [\d.]+, .*; mean: Dice %", text)
    key = re.search(r"Classes: .*</p>", text)
    assert key and re.findall(r"background:(#\w+)", key[0]) == list(COLOURS[:2])
    assert "</span>1 head &lt;of&gt;, " in key[0]


def test_the_page_of_a_run_is_the_same_from_any_folder(test, monkeypatch, tmp_path, capsys):
    """The test states the checkpoint as it was given, relative to another folder."""
    write_json(test / "test.json", {**json.loads((test / "test.json").read_text()), "checkpoint": "runs/run"})
    monkeypatch.chdir(tmp_path)
    report_page.main([str(test.parent)])
    assert capsys.readouterr().out.strip() == str(test / "report.html")
    text = (test / "report.html").read_text(encoding="utf-8")
    assert "<h1>Test of run</h1>" in text and "dtml, 4 labeled scans, seed 1, iteration 7" in text


def test_slices_keep_to_their_bytes():
    image = np.random.default_rng(0).random((300, 200, 20), np.float32)
    sides = []
    for most_bytes in (2_000_000, 400_000, 100_000):
        files = [base64.b64decode(text) for text in jpeg_slices(image, (1.0, 1.0, 3.0), most_bytes)]
        assert len(files) == 20 and sum(map(len, files)) < 1.05 * most_bytes  # a sample of them is measured
        sides.append(Image.open(io.BytesIO(files[0])).height)
    assert sides[0] > sides[1] > sides[2]


def test_letters_stand_at_the_edges_where_the_direction_is_known(tmp_path):
    assert parse(make_test(tmp_path / "unknown", ["case0"])).edges == []
    test = make_test(tmp_path / "known", ["case0"], direction=(-1.0, 0, 0, 0, -1, 0, 0, 0, 1))  # RAS
    page = parse(test)
    assert page.edges == ["R", "L", "A", "P", "I", "S"]
    (one,) = page.data
    assert one["letters"] == {"left": "R", "right": "L", "top": "A", "bottom": "P"} and one["ends"] == ["I", "S"]
    assert any("letters at the edges" in text for text in page.texts)
    with h5py.File(tmp_path / "known" / "set" / "case0.h5") as f:
        image, label = f["image"][()][::-1, ::-1], f["label"][()][::-1, ::-1]
    assert one["slices"] == jpeg_slices(image, SPACING, MOST_BYTES)
    assert one["contours"]["label"][0] == [outline(label[..., z]) for z in range(SHAPE[2])]


def test_without_predictions_or_with_one_scan(tmp_path):
    page = parse(make_test(tmp_path / "none", ["case0", "case1"], saved="none"))
    assert page.data == [] and any("no predictions" in text for text in page.texts)
    assert [one["name"] for one in parse(make_test(tmp_path / "one", ["only"])).data] == ["only"]


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda test: (test / "cases.csv").unlink(), "Run test_la.py"),
        (lambda test: (test / "cases.csv").write_text("a,b\n1,2\n"), "no cases.csv"),
        (lambda test: shutil.rmtree(test / "predictions"), "Run test_la.py"),
        (lambda test: (test / "predictions" / "seg" / "case0.nii.gz").write_bytes(b"no"), "cannot read"),
        (lambda test: shutil.rmtree(test.parent.parent / "set"), "--data"),
    ],
)
def test_what_is_missing_is_named(harm: Callable[[Path], Any], says, test):
    harm(test)
    with pytest.raises(UserError, match=says):
        report_page.main([str(test)])
    assert not list(test.glob("*.html"))
