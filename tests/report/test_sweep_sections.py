import json

import pytest

from switchx.errors import UserError
from switchx.report.page import Text
from switchx.report.tables import Table
from switchx.training.selection import Criterion
from tests.report.chapters import STATES, VALUES, chapter, figures_of, section, tables
from tests.report.directories import TASK, write_sweep


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
