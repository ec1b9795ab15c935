"""A trial's file, and what ends a trial before it trains; whole trials are in tests/e2e."""

import dataclasses
import json

import pytest

from switchx.errors import UserError
from switchx.research import trial as trials
from switchx.research.sweep import Sweep, arms, make_trials
from switchx.training.loop import Interrupted
from switchx.training.progress import Diverged


def made():
    sweep = Sweep(base=["gin_configs/switch_tiny.gin"], seeds=[7])
    return next(make_trials(sweep, arms(sweep)))[0]


def test_a_trial_is_read_as_it_was_written(tmp_path):
    trial = made()
    trials.write(tmp_path / "deep" / "folder", trial)
    assert trials.read(tmp_path / "deep" / "folder") == trial


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "has no trial.json"), ("{", "cannot be read"), ('{"name": "a"}', "of this version")],
)
def test_a_damaged_file_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "trial.json").write_text(text)
    with pytest.raises(UserError, match=message):
        trials.read(tmp_path)


def test_a_value_of_another_type_is_named(tmp_path):
    trials.write(tmp_path, made())
    text = (tmp_path / "trial.json").read_text()
    (tmp_path / "trial.json").write_text(text.replace('"attempts": 0', '"attempts": "x"'))
    with pytest.raises(UserError, match=r"trial.json: Trial.attempts = 'x'.*; remove it"):
        trials.read(tmp_path)


def test_files_that_changed_since_are_refused(tmp_path):
    trials.write(tmp_path, dataclasses.replace(made(), hash="0" * 64))
    with pytest.raises(UserError, match="switch_tiny.gin changed since the sweep began"):
        trials.run(tmp_path)
    ended = trials.read(tmp_path)
    assert (ended.state, ended.attempts) == ("failed", 1)
    assert "changed since" in ended.error
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (Diverged("step 3: loss is nan"), "diverged"),
        (UserError("no such task"), "failed"),
        (Interrupted(15, 3), "stopped"),
        (ValueError("a\nbug"), "failed"),
    ],
)
def test_how_it_ended_is_written_down(tmp_path, monkeypatch, error, state):
    def fail(*_):
        raise error

    monkeypatch.setattr(trials, "train", fail)
    trials.write(tmp_path, dataclasses.replace(made(), seconds=100.0))
    with pytest.raises(type(error)):
        trials.run(tmp_path)
    ended = trials.read(tmp_path)
    assert ended.state == state
    assert ended.seconds > 100
    assert "\n" not in ended.error
    assert state == "stopped" or str(error).split()[-1] in ended.error


def test_the_checkpoint_is_evaluated_with_every_setting(tmp_path, monkeypatch):
    asked = []

    class Row:
        row = {"step": 5, "split": "validation/task", "cross_entropy": 1.5}

    monkeypatch.setattr(trials, "train", lambda *_: None)
    monkeypatch.setattr(trials, "find_checkpoints", lambda folder: ["last"])
    monkeypatch.setattr(
        trials, "read_experiment", lambda folder, changes: asked.append(changes) or folder
    )
    monkeypatch.setattr(trials.scorecard, "evaluate", lambda *_, **__: [Row])
    settings = [{"EVAL_CAPACITY_FACTOR": 2.0}, {"EVAL_CAPACITY_FACTOR": 4.0, "EVAL_STEPS": 3}]
    trials.write(tmp_path, dataclasses.replace(made(), eval_settings=settings))
    trials.run(tmp_path)
    assert asked == [["EVAL_CAPACITY_FACTOR=2.0"], ["EVAL_CAPACITY_FACTOR=4.0", "EVAL_STEPS=3"]]
    rows = list(map(json.loads, (tmp_path / "evaluations.jsonl").read_text().splitlines()))
    assert [row["settings"] for row in rows] == settings
    assert all(row["cross_entropy"] == 1.5 for row in rows)
    assert trials.read(tmp_path).state == "done"
