"""Measurements by setting, in the order of the axes' values."""

import pytest

from switchx.report import arms
from switchx.report.sweeps import read_sweep
from switchx.training.selection import Criterion
from tests.report.directories import TASK, write_sweep

METRIC = Criterion("cross_entropy", "lowest")
VALUES = {(2.0, 0): 2.1, (0.5, 1): 2.7, (0.5, 0): 2.5, (2.0, 1): 2.3, (1.0, 0): 9.9}


def found(tmp_path, **more):
    path = write_sweep(tmp_path / "s", VALUES, states={(1.0, 0): "diverged"}, **more)
    return read_sweep(path)


def test_settings_come_by_size_with_the_measurements_of_their_seeds(tmp_path):
    sweep = found(tmp_path)
    measured = arms.measurements(sweep, METRIC, f"eval/{TASK}")
    first, second = arms.arms(sweep, measured)
    assert (first.settings, second.settings) == (
        {"CAPACITY_FACTOR": 0.5},
        {"CAPACITY_FACTOR": 2.0},
    )
    assert {seed: each.value for seed, each in first.by_seed.items()} == {0: 2.5, 1: 2.7}
    assert first.estimate is not None
    assert first.estimate.mean == pytest.approx(2.6)
    assert second.trials == "#1 #4"
    assert second.mean_of(lambda each: each.dropped) == pytest.approx(0.05)
    assert second.mean_of(lambda each: None) is None
    # What diverged is planned, and measured nowhere.
    assert [each.settings["CAPACITY_FACTOR"] for each in arms.planned(sweep)] == [0.5, 1.0, 2.0]


def test_evaluations_add_their_settings(tmp_path):
    sweep = found(tmp_path, evaluations={(0.5, 0, 4.0): 2.4, (0.5, 1, 4.0): 2.8})
    under = arms.evaluations(sweep, METRIC, f"eval/{TASK}")
    assert [each.value for each in under] == [2.8, 2.4]
    (arm,) = arms.arms(sweep, under, sweep.eval_axes)
    assert arm.settings == {"CAPACITY_FACTOR": 0.5, "EVAL_CAPACITY_FACTOR": 4.0}


def test_an_integer_and_the_same_float_are_one_setting(tmp_path):
    path = write_sweep(
        tmp_path / "s",
        {(0.5, 0): 2.5, (0.5, 1): 2.7},
        evaluations={(0.5, 0, 2): 2.4, (0.5, 1, 2.0): 2.8},
    )
    rows = (path / "trials/CAPACITY_FACTOR=0.5-s0-0a1b2c3d/evaluations.jsonl").read_text()
    again = rows.replace('"EVAL_CAPACITY_FACTOR": 2}', '"EVAL_CAPACITY_FACTOR": 2.0}')
    assert again != rows
    (path / "trials/CAPACITY_FACTOR=0.5-s0-0a1b2c3d/evaluations.jsonl").write_text(rows + again)
    sweep = read_sweep(path)
    under = arms.evaluations(sweep, METRIC, f"eval/{TASK}")
    (arm,) = arms.arms(sweep, under, sweep.eval_axes)
    assert [each.value for each in arm.measurements] == [2.4, 2.8]


def test_a_base_is_found_by_its_values(tmp_path):
    sweep = found(tmp_path)
    made = arms.arms(sweep, arms.measurements(sweep, METRIC, f"eval/{TASK}"))
    assert arms.base_of(None, made) is None
    assert arms.base_of("CAPACITY_FACTOR=2.0", made) == {"CAPACITY_FACTOR": 2.0}
    pairs = [arms.Arm({"layers": layers, "lr": 1.0}, ()) for layers in ([1, 2], [1])]
    assert arms.base_of("layers=[1, 2],lr=1", pairs) == {"layers": [1, 2], "lr": 1.0}


def test_differences_are_of_seeds_that_both_have(tmp_path):
    sweep = found(tmp_path)
    first, second = arms.arms(sweep, arms.measurements(sweep, METRIC, f"eval/{TASK}"))
    assert second.minus(first) == {0: pytest.approx(-0.4), 1: pytest.approx(-0.4)}
    alone = arms.Arm({}, [each for each in first.measurements if each.seed == 1])
    assert second.minus(alone) == {1: pytest.approx(-0.4)}
