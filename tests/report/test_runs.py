import json
import math

import pytest

from switchx.report import runs
from tests.report.directories import (
    TASK,
    eval_row,
    train_row,
    write_analysis,
    write_rows,
    write_run,
)


def test_a_whole_run(tmp_path):
    run = runs.read_run(write_run(tmp_path / "a", final=2.0))
    assert (run.state, run.last_step, run.problems) == ("done", 20, ())
    assert run.splits == [f"eval/{TASK}"] and run.task == TASK
    assert run.curve("cross_entropy", f"eval/{TASK}") == [(10, 3.0), (20, 2.0)]
    assert run.layers() == ["encoder/1", "decoder/1"]
    assert (run.last(f"eval/{TASK}") or {})["step"] == 20
    assert runs.metric_names([run]) >= {"loss", "cross_entropy", "dropped_fraction"}


def test_step_time_leaves_out_the_period_that_compiles(tmp_path):
    write_run(tmp_path / "a")
    rows = [
        train_row(step, 1.0, step_seconds=s)
        for step, s in ((1, 9.0), (5, 0.5), (9, 0.7), (20, 0.3))
    ]
    write_rows(tmp_path / "a/metrics.jsonl", rows)
    run = runs.read_run(tmp_path / "a")
    assert run.step_seconds == 0.5
    assert run.training_seconds == 10.0
    for row, dropped in zip(rows, (0.5, 0.25, 0.25, 0.2), strict=True):
        row["dropped_fraction"] = dropped
    write_rows(tmp_path / "a/metrics.jsonl", [*rows, eval_row(20, 3.0, dropped=0.9)])
    assert runs.read_run(tmp_path / "a").training_dropped == pytest.approx(0.3)
    write_rows(tmp_path / "a/metrics.jsonl", rows[:1])
    assert runs.read_run(tmp_path / "a").step_seconds == 9.0


def test_of_equal_step_and_split_the_last_row_counts(tmp_path):
    write_run(tmp_path / "a")
    write_rows(
        tmp_path / "a/metrics.jsonl", [eval_row(7, 3.0), train_row(3, 4.0), eval_row(7, 2.5)]
    )
    assert runs.read_run(tmp_path / "a").curve("cross_entropy", f"eval/{TASK}") == [(7, 2.5)]


def test_an_empty_directory_names_what_is_missing(tmp_path):
    run = runs.read_run(tmp_path)
    assert run.state == "empty" and run.rows == [] and run.step_seconds is None
    assert set(run.problems) == {
        f"{name} is missing" for name in ("metrics.jsonl", "config.json", "versions.json")
    }
    assert not runs.is_run(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert runs.is_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("config.json", b"{", "config.json is not JSON"),
        ("config.json", b"[1]", "config.json is not a JSON object"),
        ("versions.json", b"\xff\xfe", "versions.json is not JSON"),
        ("metrics.jsonl", b"", "metrics.jsonl is empty"),
        (
            "metrics.jsonl",
            b'{"step": 1, "split": "train"}\n{"step": 2, "sp',
            "the last line is cut off",
        ),
        (
            "metrics.jsonl",
            b'x\n[]\n{"step": "1"}\n{"step": true}\n{"step": -1}\n',
            "line 1, 2, 3 and 2 more",
        ),
        ("metrics.jsonl", b'{"step": 1, "split": 3}\n{"step": 1}\n', "no JSON row in line 1"),
        ("metrics.jsonl", b"[" * 100_000, "the last line is cut off"),
        ("samples.jsonl", b"nothing\n", "samples.jsonl: no JSON row in line 1"),
    ],
    ids=lambda value: value.decode("latin-1")[:12] if isinstance(value, bytes) else None,
)
def test_what_is_broken_is_named_and_the_rest_is_read(tmp_path, name, content, problem):
    write_run(tmp_path / "a")
    (tmp_path / "a" / name).write_bytes(content)
    run = runs.read_run(tmp_path / "a")
    assert any(problem in each for each in run.problems), run.problems
    assert name == "config.json" or run.config is not None
    assert name == "metrics.jsonl" or run.last_step == 20


def test_a_directory_in_the_place_of_a_file(tmp_path):
    write_run(tmp_path / "a")
    (tmp_path / "a/metrics.jsonl").unlink()
    (tmp_path / "a/metrics.jsonl").mkdir()
    assert any(
        "metrics.jsonl cannot be read" in each for each in runs.read_run(tmp_path / "a").problems
    )


def test_numbers_that_are_not_finite_are_gaps(tmp_path):
    write_run(tmp_path / "a", done=False)
    rows = [json.dumps(train_row(1, 2.0)), '{"step": 2, "loss": NaN}', '{"step": 3, "loss": 1e999}']
    rows += ['{"step": 4, "loss": null, "grad_norm": 1%s}' % ("0" * 400)]
    (tmp_path / "a/metrics.jsonl").write_text("\n".join(rows) + "\n")
    run = runs.read_run(tmp_path / "a")
    assert run.curve("loss", "train") == [(1, 2.0), (2, None), (3, None), (4, None)]
    assert run.state == "diverged"


@pytest.mark.parametrize(
    ("trial", "done", "expected"),
    [("pruned", True, "pruned"), (None, True, "done"), (None, False, "unfinished")],
)
def test_states(tmp_path, trial, done, expected):
    write_run(tmp_path / "a", done=done)
    if trial:
        (tmp_path / "a/trial.json").write_text(json.dumps({"state": trial}))
    assert runs.read_run(tmp_path / "a").state == expected


def test_the_latest_analysis_is_read(tmp_path):
    write_analysis(write_run(tmp_path / "a"))
    (tmp_path / "a/router_analysis/3").mkdir()
    (tmp_path / "a/router_analysis/3/summary.json").write_text("{}")
    (tmp_path / "a/router_analysis/notes").mkdir()
    run = runs.read_run(tmp_path / "a")
    assert run.analysis is not None and run.analysis["tokens"] == 4321
    (tmp_path / "a/router_analysis/20/summary.json").write_text("{}")
    run = runs.read_run(tmp_path / "a")
    assert run.analysis is None and "router_analysis/20/summary.json has no layers" in run.problems


def test_evaluations_without_settings_are_counted(tmp_path):
    write_run(tmp_path / "a")
    rows = [eval_row(20, 2.0) | {"settings": {"X": 1}}, eval_row(20, 1.5) | {"settings": {"X": 1}}]
    write_rows(tmp_path / "a/evaluations.jsonl", [*rows, eval_row(20, 3.0)])
    run = runs.read_run(tmp_path / "a")
    assert [row["cross_entropy"] for row in run.evaluations] == [1.5]
    assert "evaluations.jsonl: 1 row(s) without settings" in run.problems


def test_values_of_a_row():
    row = {"a": 2, "b": {"c": 0.5}, "d": True, "e": None, "f/g": 3.0}
    names = ("a", "b", "b/c", "d", "e", "f/g", "none", "b/none")
    found = {name: runs.metric_value(row, name) for name in names}
    assert {name: each for name, each in found.items() if each is not None} == {
        "a": 2.0,
        "b/c": 0.5,
        "f/g": 3.0,
    }


def test_flatten_and_shares():
    assert runs.flatten({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}
    assert runs.shares([1, 0.5]) == [1.0, 0.5]
    for other in (None, [], ["1"], [None], [True], {"a": 1}):
        assert runs.shares(other) is None
    assert math.isfinite(sum(runs.shares([0.25, 0.75]) or []))
