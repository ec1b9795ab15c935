import json

import pytest

from switchx.errors import UserError
from switchx.report import sweep_sections
from switchx.report.page import Figures, Folded, Text
from switchx.report.sweeps import read_sweep
from switchx.report.tables import Table
from switchx.training.selection import Criterion
from tests.report.directories import TASK, write_sweep

# 0.5: mean 2.6; 1: mean 2.3; 2: mean 2.1. Pairs to 0.5: -0.25, -0.35 and -0.4, -0.6.
VALUES = {
    (0.5, 0): 2.5,
    (0.5, 1): 2.7,
    (1.0, 0): 2.25,
    (1.0, 1): 2.35,
    (2.0, 0): 2.1,
    (2.0, 1): 2.1,
}
METRIC = Criterion("cross_entropy", "lowest")
# Of two pairs: t(0.975; 1) = 12.706205, and s / √2 = |a - b| / 2.
T1 = 12.706205


def chapter(path, **more):
    arguments = {"split": None, "base_arm": None, "base": None} | more
    sweep = read_sweep(path)
    return sweep_sections.chapter(sweep, arguments.pop("metric", METRIC), **arguments)


def tables(chapter):
    return {table.name: table for table in chapter.tables()}


def section(chapter, title):
    return next(each.blocks for each in chapter.sections if each.title == title)


def figures_of(blocks):
    return [f for block in blocks if isinstance(block, Figures) for f in block.figures]


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


@pytest.mark.parametrize(
    ("base_arm", "message"),
    [
        ("CAPACITY_FACTOR=3", "no finished trial has it"),
        ("CAPACITY_FACTR=2", "did you mean 'CAPACITY_FACTOR=2'"),
        ("2", "is not NAME=VALUE"),
    ],
)
def test_a_base_that_is_none(tmp_path, base_arm, message):
    with pytest.raises(UserError, match=message):
        chapter(write_sweep(tmp_path / "s", VALUES), base_arm=base_arm)


def test_a_base_that_is_several(tmp_path):
    path = write_sweep(tmp_path / "s", VALUES)
    plan = json.loads((path / "sweep.json").read_text())
    for trial in plan["trials"]:
        trial["settings"]["ROUTER"] = "switch"
    (path / "sweep.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match="3 settings fit; name one of CAPACITY_FACTOR=0.5,ROUTER"):
        chapter(path, base_arm="ROUTER=switch")


def test_the_summary_says_what_was_run_and_what_is_best(tmp_path):
    summary = chapter(write_sweep(tmp_path / "s", VALUES)).summary
    assert summary[0].startswith(
        f"3 settings over CAPACITY_FACTOR, 2 seeds, 6 trials in {tmp_path}/s."
    )
    assert f"lowest cross_entropy on eval/{TASK}" in summary[0]
    assert summary[1].startswith(
        "Best: CAPACITY_FACTOR=2, mean 2.100 (2 seeds, 95 % 2.100 to 2.100)."
    )
    # -0.15 and -0.25 to the next: -0.2 ± 0.635.
    assert "not told apart from the next, CAPACITY_FACTOR=1: difference -0.2000" in summary[1]
    assert summary[1].endswith("Fewer than 3 seeds: no claim.")


def test_the_highest_can_be_best(tmp_path):
    summary = chapter(
        write_sweep(tmp_path / "s", VALUES), metric=Criterion("cross_entropy", "highest")
    ).summary
    assert summary[1].startswith("Best: CAPACITY_FACTOR=0.5, mean 2.600")


STATES = {
    (2.0, 1): "diverged",
    (1.0, 1): "running",
    (3.0, 0): "waiting",
    (3.0, 1): "failed",
    (3.0, 2): "pruned",
}


def test_what_did_not_end_well_is_shown_and_counted_and_in_no_mean(tmp_path):
    path = write_sweep(tmp_path / "s", VALUES, states=STATES)
    # A diverged trial has no number of its own, and a run that fails has no directory at times.
    made = chapter(path)
    assert made.counts == {"done": 4, "running": 1, "diverged": 1, "waiting": 3}
    assert any(
        line.startswith(
            "Diverged: #6 (CAPACITY_FACTOR=2, seed 1) at step 20: the loss is not finite"
        )
        for line in made.summary
    )
    rows = {row[0]: row[4] for row in tables(made)["settings"].rows}
    assert rows == {"0.5": 2, "1": 1, "2": 1}
    assert len(tables(made)["trials"].rows) == 9
    (effect,) = figures_of(section(made, "Cross-entropy against each axis"))
    marks = {row["x"]: row["text"] for row in effect.spec["datasets"]["unfinished"]}
    assert marks == {"1": "○", "2": "✕", "3": "○○○"}
    assert len(effect.spec["datasets"]["points"]) == 4
    curves = figures_of(section(made, "Learning curves"))[0]
    assert [row["end"] for row in curves.spec["datasets"]["ends"]] == ["diverged"]


def test_many_trials_at_one_place_are_counted():
    trials = read_trials(["diverged"] * 5 + ["running"] * 2)
    assert sweep_sections._marks(trials) == "5✕ 2○"
    assert sweep_sections._marks(trials[4:6]) == "✕○"


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


def test_cost_is_what_was_measured(tmp_path):
    made = chapter(write_sweep(tmp_path / "s", VALUES))
    total, step = figures_of(section(made, "Quality against cost"))
    # 0.25 s a step, 20 steps; all cost the same, so the best alone is on the front.
    assert {row["x"] for row in total.spec["datasets"]["points"]} == {5.0}
    assert {row["x"] for row in step.spec["datasets"]["points"]} == {0.25}
    assert step.spec["datasets"]["front"] == [{"x": 0.25, "y": pytest.approx(2.1)}]
    assert step.caption.endswith("On the front: 2.")
    assert len({row["run"] for row in step.spec["datasets"]["points"]}) == 6


def test_configurations_are_compared_with_the_first_trial(tmp_path):
    rows = tables(chapter(write_sweep(tmp_path / "s", VALUES)))["configuration_differences"].rows
    assert ("capacity_factor", "0.5", "1.0", "#3, #4") in rows
    assert ("seed", "0", "1", "#2, #4, #6") in rows


def test_an_empty_sweep_says_so(tmp_path):
    made = chapter(write_sweep(tmp_path / "s", {}))
    assert [each.title for each in made.sections] == ["Trials"]
    assert "nothing to compare yet" in made.summary[-1]


def test_a_sweep_that_only_waits(tmp_path):
    made = chapter(
        write_sweep(tmp_path / "s", {}, states={(1.0, 0): "waiting", (2.0, 0): "waiting"})
    )
    notices = [b for s in made.sections for b in s.blocks if isinstance(b, Text) and b.notice]
    assert len(notices) >= 5 and not made.problems
    assert len(tables(made)["trials"].rows) == 2


def test_a_metric_that_no_row_has_is_named(tmp_path):
    made = chapter(write_sweep(tmp_path / "s", VALUES), metric=Criterion("bleu"))
    assert "no row of any trial has the metric bleu" in made.problems
    assert "settings" not in tables(made) and "trials" in tables(made)


def test_a_sweep_without_axes(tmp_path):
    path = write_sweep(tmp_path / "s", VALUES)
    plan = json.loads((path / "sweep.json").read_text())
    plan["axes"] = []
    for trial in plan["trials"]:
        trial["settings"] = {}
    (path / "sweep.json").write_text(json.dumps(plan))
    made = chapter(path)
    assert tables(made)["settings"].rows[0][3] == 6
    assert isinstance(tables(made)["trials"], Table)
