"""Quality against what was measured of the trials, by hand."""

import pytest

from switchx.report import trades
from switchx.report.page import Text
from switchx.report.sweeps import read_sweep
from tests.report.chapters import METRIC, VALUES, chapter, figures_of, section
from tests.report.directories import write_sweep


def test_cost_is_what_was_measured(tmp_path):
    made = chapter(write_sweep(tmp_path / "s", VALUES))
    total, step = figures_of(section(made, "Quality against cost"))
    # 0.25 s a step, 20 steps; all cost the same, so the best alone is on the front.
    assert {row["x"] for row in total.spec["datasets"]["points"]} == {5.0}
    assert {row["x"] for row in step.spec["datasets"]["points"]} == {0.25}
    assert step.spec["datasets"]["front"] == [{"x": 0.25, "y": pytest.approx(2.1)}]
    assert step.caption.endswith("On the front: 2.")
    assert len({row["run"] for row in step.spec["datasets"]["points"]}) == 6


def test_drops_are_those_of_the_row_and_of_training(tmp_path):
    evaluations = {(0.5, 0, 4.0): 2.4}
    made = chapter(write_sweep(tmp_path / "s", VALUES, evaluations=evaluations))
    trained, ended, under = figures_of(section(made, "Quality against dropped tokens"))
    # Written: 0.06 + step / 1000 in training, 0.1 / capacity factor at the end, 0.04 under 4.
    assert all(0.061 <= row["x"] <= 0.08 for row in trained.spec["datasets"]["points"])
    assert {row["x"] for row in ended.spec["datasets"]["points"]} == {0.2, 0.1, 0.05}
    assert [row["x"] for row in under.spec["datasets"]["points"]] == [0.04]


def test_what_nothing_was_dropped_of_is_said(tmp_path):
    (notice,) = trades.drops(read_sweep(write_sweep(tmp_path / "s", {})), [], [], METRIC)
    assert isinstance(notice, Text) and notice.notice and "dense models" in notice.text
