"""What a run says of itself."""

import torch

from methods.base import Losses
from utils.report import Report


def losses(live: float) -> Losses:
    one = torch.tensor(1.0)
    return Losses(one, {"mask": one}, {"lambda": 0.1}, {"live_gradient/sdm": torch.tensor(live)})


def test_an_output_without_a_live_gradient_is_warned_of_once(tmp_path, capsys):
    with Report(tmp_path, start=0, iterations=4, log_every=1) as report:
        for iteration, live in enumerate((0.01, 0.0, 0.0, 0.002)):
            report.iteration(iteration, losses(live), lr=0.01)
    lines = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "warning" in line]
    assert len(lines) == 1 and "live_gradient/sdm is 0 at iteration 1" in lines[0]
    assert "live_gradient/sdm is 0" in capsys.readouterr().err


def test_only_every_nth_iteration_and_the_last_are_logged(tmp_path):
    with Report(tmp_path, start=0, iterations=7, log_every=3) as report:
        for iteration in range(7):
            report.iteration(iteration, losses(0.5), lr=0.01)
    rows = (tmp_path / "scalars.csv").read_text().splitlines()
    assert rows[0] == "iteration,loss/total,loss/mask,lambda,lr,live_gradient/sdm"
    assert [row.split(",")[0] for row in rows[1:]] == ["2", "5", "6"]
