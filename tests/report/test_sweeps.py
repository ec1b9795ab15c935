import json
import shutil

import pytest

from switchx.report import sweeps
from tests.report.directories import write_run, write_sweep

VALUES = {(0.5, 0): 2.5, (0.5, 1): 2.7, (2.0, 0): 2.1, (2.0, 1): 2.2}


def test_a_whole_sweep(tmp_path):
    sweep = sweeps.read_sweep(write_sweep(tmp_path / "s", VALUES, evaluations={(0.5, 0, 4.0): 2.4}))
    assert (sweep.name, sweep.axes, sweep.problems) == ("s", ("CAPACITY_FACTOR",), ())
    assert sweep.eval_axes == ("EVAL_CAPACITY_FACTOR",)
    assert (sweep.metric.metric, sweep.metric.best) == ("cross_entropy", "lowest")
    assert [
        (t.number, (t.settings or {})["CAPACITY_FACTOR"], t.seed, t.state) for t in sweep.trials
    ] == [
        (1, 0.5, 0, "done"),
        (2, 0.5, 1, "done"),
        (3, 2.0, 0, "done"),
        (4, 2.0, 1, "done"),
    ]


def test_a_trial_without_a_directory_waits(tmp_path):
    path = write_sweep(tmp_path / "s", VALUES, states={(3.0, 0): "waiting"})
    assert [trial.state for trial in sweeps.read_sweep(path).trials][-1] == "waiting"


def test_what_is_broken_is_named_and_the_rest_is_read(tmp_path):
    path = write_sweep(tmp_path / "s", VALUES)
    first, second, third, _ = sorted((path / "trials").iterdir())
    (first / "trial.json").write_text('{"state": "do')
    (second / "metrics.jsonl").unlink()
    (third / "trial.json").unlink()
    write_run(path / "trials" / "stranger")
    (path / "trials" / "note.txt").write_text("")
    sweep = sweeps.read_sweep(path)
    assert len(sweep.trials) == 5
    assert [trial.state for trial in sweep.trials] == ["done"] * 5
    assert sweep.trials[4].settings is None
    text = "\n".join(sweep.problems)
    assert f"trials/{first.name}: trial.json is not JSON" in text
    assert f"trials/{second.name}: metrics.jsonl is missing" in text
    assert f"trials/{third.name}: no trial.json" in text
    assert "trials/stranger is not listed in sweep.json" in text
    assert "trials/stranger: nothing tells its settings" not in text


def test_entries_and_trials_that_say_nothing_are_told(tmp_path):
    path = write_sweep(tmp_path / "s", VALUES)
    plan = json.loads((path / "sweep.json").read_text())
    plan["trials"] += [{"seed": 3}, 7]
    (path / "sweep.json").write_text(json.dumps(plan))
    first, *_ = sorted((path / "trials").iterdir())
    (first / "trial.json").write_text("{}")
    sweep = sweeps.read_sweep(path)
    assert len(sweep.trials) == 4
    assert "sweep.json: 2 of its trials have no valid name; left out" in sweep.problems
    assert f"trials/{first.name}: trial.json says nothing" in sweep.problems
    assert not any("no trial.json" in problem for problem in sweep.problems)


def test_what_an_earlier_configuration_left_in_the_folder_is_in_no_mean(tmp_path):
    path = write_sweep(tmp_path / "s", VALUES)
    plan = json.loads((path / "sweep.json").read_text())
    plan["trials"] = [each for each in plan["trials"] if each["seed"] == 1]
    (path / "sweep.json").write_text(json.dumps(plan))
    sweep = sweeps.read_sweep(path)
    assert [trial.settings is None for trial in sweep.trials] == [False, False, True, True]
    assert sum("of an earlier configuration" in problem for problem in sweep.problems) == 2


@pytest.mark.parametrize("content", [None, "{", '{"trials": 3, "axes": "X", "metric": 1}'])
def test_without_a_plan_the_trials_tell(tmp_path, content):
    path = write_sweep(tmp_path / "s", VALUES)
    (path / "sweep.json").unlink()
    if content is not None:
        (path / "sweep.json").write_text(content)
    sweep = sweeps.read_sweep(path)
    assert sweeps.is_sweep(path)
    assert (sweep.axes, sweep.metric.metric) == (("CAPACITY_FACTOR",), "cross_entropy")
    assert sorted(t.seed for t in sweep.trials if t.seed is not None) == [0, 0, 1, 1]
    assert sweep.problems


def test_an_empty_sweep(tmp_path):
    path = write_sweep(tmp_path / "s", {})
    sweep = sweeps.read_sweep(path)
    assert sweep.trials == ()
    shutil.rmtree(path)
    assert not sweeps.is_sweep(path)


def test_names_that_leave_the_sweep_are_no_trials(tmp_path):
    path = write_sweep(tmp_path / "s", VALUES)
    plan = json.loads((path / "sweep.json").read_text())
    plan["trials"] = [{"name": "../../x"}, {"name": ".."}, 3, {"name": ""}, plan["trials"][0]]
    (path / "sweep.json").write_text(json.dumps(plan))
    assert [trial.name for trial in sweeps.read_sweep(path).trials][0] == plan["trials"][4]["name"]


def test_levels_are_in_order_and_labels_short():
    settings = [{"X": 10}, {"X": 2.5}, {"X": "b"}, {"X": None}, {"Y": 1}, {"X": 2.5}, {"X": "a"}]
    assert sweeps.levels(settings, "X") == [2.5, 10, "b", None, "a"]
    assert [sweeps.level(v) for v in (2.0, 1e-4, 0.123456789, "b", None, [1, "c"])] == [
        "2",
        "0.0001",
        "0.123457",
        "b",
        "null",
        '[1, "c"]',
    ]
    assert sweeps.label({"X": 2.0, "Z": "q"}, ["X", "Y", "Z"]) == "2 · – · q"
    assert sweeps.description({"X": 2.0, "Z": "q"}) == "X=2, Z=q"
    assert sweeps.key({"a": 1, "b": 2}) == sweeps.key({"b": 2, "a": 1})


def test_the_result_of_a_regime_is_its_last_run(tmp_path):
    path = write_sweep(tmp_path / "s", {(0.5, 0): 2.5})
    (folder,) = (path / "trials").iterdir()
    trial = json.loads((folder / "trial.json").read_text()) | {"run_directory": "single"}
    shutil.rmtree(folder)
    write_run(folder / "single", final=1.75)
    (folder / "trial.json").write_text(json.dumps(trial))
    sweep = sweeps.read_sweep(path)
    (found,) = sweep.trials
    assert sweep.problems == ()
    assert found.state == "done"
    assert found.run.path == folder / "single"
    assert found.run.rows[-1]["cross_entropy"] == 1.75


def test_settings_are_shown_with_a_dash_where_an_axis_is_absent():
    settings = [{"lr": 0.5}, {"lr": 0.25, "router": "switch"}]
    assert sweeps.shown_levels(settings, ["lr"]) == ["0.25", "0.5"]
    assert sweeps.shown_levels(settings, ["router"]) == ["switch", "–"]
    assert sweeps.cells(settings[0], ["router", "lr"]) == [None, "0.5"]
