"""What test_la.py does on request: some of the scans alone; ASSD, the relative volume error and NSD."""

import csv
import json
import math

import h5py
import numpy as np
import pytest
from conftest import TINY, csv_rows, make_set
from medpy.metric import binary
from test_metrics import blob

import test_la
import train_dtml
from evaluation.metrics import segmentation_metrics
from evaluation.scores import class_scores, table
from methods import METHODS
from utils.errors import UserError

BOTH = ("assd", "rve")
SPACINGS = [(1.0, 1.0, 1.0), (0.625, 0.8, 2.5)]


# -- the metrics --


@pytest.mark.parametrize("spacing", SPACINGS)
def test_assd_and_rve_are_medpys_bit_for_bit(spacing):
    for seed in range(3):
        a, b = blob(seed), blob(seed + 50) | blob(seed)
        for one, other in ((a, b), (b, a)):
            result = segmentation_metrics(one, other, spacing, more=BOTH)
            assert result["assd"] == float(binary.assd(one, other))
            assert result["assd_mm"] == float(binary.assd(one, other, spacing))
            assert result["rve"] == float(binary.ravd(one, other))


def test_empty_masks_score_the_diagonal_and_have_no_volume_error_without_a_label():
    empty, full = np.zeros((6, 7, 8), np.uint8), np.zeros((6, 7, 8), np.uint8)
    full[1:4, 1:4, 1:4] = 1
    (no_prediction,) = class_scores(empty, full, 1, (1, 1, 2), more=BOTH)
    (no_label,) = class_scores(full, empty, 1, (1, 1, 2), more=BOTH)
    (neither,) = class_scores(empty, empty, 1, None, more=BOTH)
    assert no_prediction["rve"] == -1 and math.isnan(no_label["rve"]) and math.isnan(no_prediction["assd"])
    assert no_prediction["assd_penalised"] == math.hypot(6, 7, 8) == no_label["assd_penalised"]
    assert no_prediction["assd_mm_penalised"] == math.hypot(6, 7, 16)
    assert all(math.isnan(neither[name]) for name in ("assd", "assd_mm", "assd_mm_penalised", "rve"))
    rows = [{"output": "seg", "component": "all", **scores} for scores in (no_prediction, no_label)]
    assert "| 9.22 (0 of 2) |" not in table(rows) and "| 12.21 (0 of 2) |" in table(rows)
    assert "| -100.00 (1 of 2) |" in table(rows)


# -- the script --


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("request")
    args = [*TINY, "--iterations", "1", "--method", "supervised", "--unlabeled", "0"]
    train_dtml.main(["--data", str(make_set(folder / "set")), "--runs", str(folder), "--name", "run", *args])
    return folder


@pytest.fixture(autouse=True)
def bright(monkeypatch):
    """The network predicts what is bright, in noise: the ball and some more."""
    monkeypatch.setattr(METHODS["supervised"], "predict", lambda self, image, outputs: (image - 0.7).sigmoid())


def score(trained, out, *args):
    where = ["--out", str(out)] if out else []
    test_la.main(["--checkpoint", str(trained / "run"), *where, "--stride", "16", "16", "16", "--threads", "1", *args])
    out = out or trained / "run" / "test-cases"
    return csv_rows(out / "cases.csv"), json.loads((out / "test.json").read_text())


def test_metrics_on_request_are_columns_more_and_nothing_else_changes(trained, tmp_path, capsys):
    usual, about = score(trained, tmp_path / "usual")
    before = capsys.readouterr().out
    rows, told = score(trained, tmp_path / "more", "--metrics", "assd", "rve")
    text = capsys.readouterr().out
    more = {"assd", "assd_mm", "assd_penalised", "assd_mm_penalised", "rve"}
    assert set(rows[0]) - set(usual[0]) == more and set(usual[0]) <= set(rows[0])
    assert [{k: v for k, v in row.items() if k not in more} for row in rows] == usual
    assert told["metrics"] == ["assd", "rve"] and "metrics" not in about
    assert "ASSD" not in before and "RVE" not in before
    assert "| 95HD mm | ASSD voxel | ASSD mm | RVE % | no prediction |" in text
    chosen = [row for row in rows if row["component"] == "all"]
    for row in chosen:
        volumes = int(row["voxels"]), int(row["label_voxels"])
        assert float(row["rve"]) == pytest.approx((volumes[0] - volumes[1]) / volumes[1], abs=1e-6)
        assert float(row["assd"]) > 0
    line = next(line for line in text.splitlines() if "| seg | all |" in line)
    assert f"| {100 * np.mean([float(row['rve']) for row in chosen]):.2f} |" in line
    with pytest.raises(UserError, match=r"'asd' must be one of assd, rve. Did you mean assd\?"):
        score(trained, tmp_path / "other", "--metrics", "asd")


def test_nsd_is_a_column_more_and_nothing_else_changes(trained, tmp_path, capsys):
    usual, about = score(trained, tmp_path / "usual")
    capsys.readouterr()
    rows, told = score(trained, tmp_path / "nsd", "--nsd-tolerance", "1.5", "--report")
    text = capsys.readouterr().out
    assert [{k: v for k, v in row.items() if k != "nsd"} for row in rows] == usual
    assert told["nsd_tolerance_mm"] == 1.5 and "nsd_tolerance_mm" not in about
    values = [float(row["nsd"]) for row in rows if row["component"] == "all"]
    assert all(0 < value < 1 for value in values)
    assert "at most 1.5 mm" in text and "| 95HD mm | NSD % | no prediction |" in text
    assert f"| {100 * np.mean(values):.2f} |" in next(line for line in text.splitlines() if "| seg | all |" in line)
    assert "NSD %" in (tmp_path / "nsd" / "report.html").read_text()


def test_a_tolerance_without_a_spacing_is_refused(trained, tmp_path):
    data = make_set(tmp_path / "set")
    with h5py.File(data / "case09" / "mri_norm2.h5", "a") as f:
        del f.attrs["spacing"]
    with pytest.raises(UserError, match=r"--nsd-tolerance 2 is in mm, and the spacing of case09 is not known"):
        score(trained, tmp_path / "out", "--data", str(data), "--nsd-tolerance", "2")
    assert not (tmp_path / "out").exists()
    (data / "spacing.txt").write_text("1 1 2")
    assert "nsd" in score(trained, tmp_path / "out", "--data", str(data), "--nsd-tolerance", "2")[0][0]
    with pytest.raises(UserError, match="-1 must be at least 0"):
        score(trained, tmp_path / "other", "--nsd-tolerance=-1")


def test_some_cases_are_tested_alone_and_the_test_of_all_stays(trained, tmp_path):
    score(trained, trained / "run" / "test")
    before = (trained / "run" / "test" / "cases.csv").read_bytes()
    rows, about = score(trained, None, "--cases", "case09")
    whole = list(csv.DictReader(before.decode().splitlines()))
    assert rows == [row for row in whole if row["case"] == "case09"] != [] and about["cases"] == ["case09"]
    assert (trained / "run" / "test" / "cases.csv").read_bytes() == before
    rows, _ = score(trained, tmp_path / "both", "--cases", "case09", "case08", "case09")
    assert rows == whole
    with pytest.raises(UserError) as caught:
        score(trained, tmp_path / "none", "--cases", "case9", "case08", "elephant", "case00")
    assert str(caught.value).splitlines() == [
        "--cases: 3 of 4 not among the 2 test scans:", "  case9. Did you mean case09?", "  elephant.",
        "  case00 is in train.list, and the checkpoint was trained on it.",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"  case09 is in test.list: --scans test has it\."):
        score(trained, tmp_path / "none", "--cases", "case09", "--scans", "held-out")
    with pytest.raises(UserError, match=r"  case07 is in train.list: --scans held-out has it\."):
        score(trained, tmp_path / "none", "--cases", "case07")
    assert not (tmp_path / "none").exists()
