"""Means, intervals and paired differences by hand; axes, and what stands along the edge."""

import json

import pytest

from switchx.report import comparisons
from switchx.report.page import Folded
from tests.report.chapters import VALUES, chapter, figures_of, section, tables
from tests.report.directories import write_sweep

# Of two pairs: t(0.975; 1) = 12.706205, and s / √2 = |a - b| / 2.
T1 = 12.706205


def test_means_and_paired_differences_by_hand(tmp_path):
    found = tables(chapter(write_sweep(tmp_path / "s", VALUES)))
    rows = found["settings"].rows
    assert [row[0] for row in rows] == ["0.5", "1", "2"]
    assert [row[1] for row in rows] == pytest.approx([2.6, 2.3, 2.1])
    assert rows[0][2:5] == (pytest.approx(2.6 - T1 * 0.1), pytest.approx(2.6 + T1 * 0.1), 2)
    assert [row[-1] for row in rows] == ["#1 #2", "#3 #4", "#5 #6"]
    rows = found["differences"].rows
    assert [row[0] for row in rows] == ["1", "2"]
    assert [row[1] for row in rows] == pytest.approx([-0.3, -0.5])
    assert rows[1][2:5] == (pytest.approx(-0.5 - T1 * 0.1), pytest.approx(-0.5 + T1 * 0.1), 2)
    assert rows[1][-2:] == ("#5 #6", "#1 #2")


def test_another_base(tmp_path):
    path = write_sweep(tmp_path / "s", VALUES)
    rows = tables(chapter(path, base_arm="CAPACITY_FACTOR=2"))["differences"].rows
    assert [(row[0], row[1]) for row in rows] == [
        ("0.5", pytest.approx(0.5)),
        ("1", pytest.approx(0.2)),
    ]


def test_many_trials_at_one_place_are_counted():
    trials = read_trials(["diverged"] * 5 + ["running"] * 2)
    assert comparisons._marks(trials) == "5✕ 2○"
    assert comparisons._marks(trials[4:6]) == "✕○"


def read_trials(states):
    class Of:
        def __init__(self, state):
            self.state = state

    return [Of(state) for state in states]


def test_evaluations_are_a_further_axis(tmp_path):
    evaluations = {
        (level, seed, other): 3 - level / 10 + seed / 100 - other / 50
        for level in (0.5, 2.0)
        for seed in (0, 1)
        for other in (1.0, 4.0)
    }
    path = write_sweep(tmp_path / "s", VALUES, evaluations=evaluations)
    made = chapter(path)
    blocks = section(made, "Evaluated under other settings")
    first, second, _ = figures_of(blocks)
    assert first.title == "Cross-entropy against CAPACITY_FACTOR"
    assert {row["series"] for row in first.spec["datasets"]["points"]} == {"1", "4"}
    assert second.title == "Cross-entropy against EVAL_CAPACITY_FACTOR"
    rows = tables(made)["evaluations_settings"].rows
    assert [(row[0], row[1], row[2]) for row in rows] == [
        ("0.5", "1", pytest.approx(2.935)),
        ("0.5", "4", pytest.approx(2.875)),
        ("2", "1", pytest.approx(2.785)),
        ("2", "4", pytest.approx(2.725)),
    ]
    assert len(tables(made)["evaluations"].rows) == 8
    assert any(isinstance(block, Folded) for block in blocks)
    # What training measured stays what it was.
    assert tables(made)["settings"].rows[0][1] == pytest.approx(2.6)
    dropped = figures_of(section(made, "Quality against dropped tokens"))
    assert {row["x"] for row in dropped[2].spec["datasets"]["points"]} == {0.01, 0.04}
    # In the order of the axes: to the first evaluation of the base.
    rows = tables(chapter(path, base_arm="CAPACITY_FACTOR=2.0"))["evaluations_differences"].rows
    assert [(row[0], row[1]) for row in rows] == [("0.5", "1"), ("0.5", "4"), ("2", "4")]


def test_two_axes_are_coloured_and_three_are_small_multiples(tmp_path):
    path = write_sweep(tmp_path / "s", VALUES)
    plan = json.loads((path / "sweep.json").read_text())
    plan["axes"] = ["CAPACITY_FACTOR", "A", "B"]
    for index, trial in enumerate(plan["trials"]):
        trial["settings"] |= {"A": index % 2} | ({"B": "x"} if index < 4 else {})
    (path / "sweep.json").write_text(json.dumps(plan))
    titles = [
        f.title for f in figures_of(section(chapter(path), "Cross-entropy against each axis"))
    ]
    assert titles[:2] == [
        "Cross-entropy against CAPACITY_FACTOR, B = x",
        "Cross-entropy against CAPACITY_FACTOR, B = –",
    ]
    plan["axes"] = ["CAPACITY_FACTOR", "A"]
    for trial in plan["trials"]:
        trial["settings"].pop("B", None)
    (path / "sweep.json").write_text(json.dumps(plan))
    found = figures_of(section(chapter(path), "Cross-entropy against each axis"))
    assert [figure.title[22:] for figure in found] == ["CAPACITY_FACTOR", "A"]
    assert {row["series"] for row in found[0].spec["datasets"]["points"]} == {"0", "1"}


def test_without_a_base_differences_are_to_the_first_trial_wherever_its_value_stands(tmp_path):
    evaluations = {(level, 0, 4.0): 2 + level for level in (2.0, 0.5)}
    path = write_sweep(tmp_path / "s", {(2.0, 0): 2.1, (0.5, 0): 2.5}, evaluations=evaluations)
    found = tables(chapter(path))
    assert [row[:2] for row in found["differences"].rows] == [("0.5", pytest.approx(0.4))]
    (row,) = found["evaluations_differences"].rows
    assert row[:3] == ("0.5", "4", pytest.approx(-1.5))
