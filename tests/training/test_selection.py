import json
import math

import pytest

from switchx.errors import UserError
from switchx.training.selection import Criterion, Patience, best_checkpoint, evaluations, numbers

ROW = {
    "step": 4,
    "split": "eval/mine",
    "cross_entropy": 2.5,
    "accuracy": 0.25,
    "mine": {"exact_match": 0.5},
    "expert_load": {"encoder/1": [0.5, 0.5]},
    "by_layer": {"encoder/1": {"dropped_fraction": 0.0}},
}


def test_numbers_are_found_at_any_depth():
    assert numbers(ROW) == {
        "step": 4.0,
        "cross_entropy": 2.5,
        "accuracy": 0.25,
        "mine/exact_match": 0.5,
        "by_layer/encoder/1/dropped_fraction": 0.0,
    }


@pytest.mark.parametrize(
    ("metric", "best"),
    [
        ("cross_entropy", "lowest"),
        ("loss", "lowest"),
        ("router_z_loss", "lowest"),
        ("perplexity", "lowest"),
        ("mine/phoneme_error_rate", "lowest"),
        ("dropped_fraction", "lowest"),
        ("accuracy", "highest"),
        ("mine/exact_match", "highest"),
        ("rouge_l", "highest"),
    ],
)
def test_the_direction_goes_by_the_name(metric, best):
    assert Criterion(metric).best == best
    other = "lowest" if best == "highest" else "highest"
    assert Criterion(metric, other).best == other


def test_a_higher_score_is_better():
    assert Criterion().score(ROW) == -2.5
    assert Criterion("mine/exact_match").score(ROW) == 0.5
    assert Criterion("accuracy").score({"accuracy": math.nan}) == -math.inf
    assert Criterion("accuracy").score({"accuracy": None}) == -math.inf


@pytest.mark.parametrize(
    ("metric", "hint"),
    [
        ("acuracy", "did you mean 'accuracy'"),
        ("mine/exact_mach", "did you mean 'mine/exact_match'"),
    ],
)
def test_a_misspelt_metric_names_the_closest(metric, hint):
    Criterion("mine/exact_match").check(ROW)
    with pytest.raises(UserError, match=f"best_metric = '{metric}' .*{hint}"):
        Criterion(metric).check(ROW)


def test_patience_counts_evaluations_without_a_better_one():
    patience = Patience(Criterion("accuracy"), 2)
    values = [0.9, 0.1, 0.3, 0.3, 0.4, math.nan, 0.4]
    seen = []
    for step, value in enumerate(values):
        patience.note(step, {"accuracy": value})
        seen.append((patience.best_step, patience.waited, patience.exhausted))
    # That of step 0 is no result of training; an equal one is not better.
    assert seen == [
        (None, 0, False),
        (1, 0, False),
        (2, 0, False),
        (2, 1, False),
        (4, 0, False),
        (4, 1, False),
        (4, 2, True),
    ]
    forever = Patience(Criterion("accuracy"), None)
    for step in range(1, 9):
        forever.note(step, {"accuracy": 0.5})
    assert not forever.exhausted


def test_evaluations_are_rows_of_their_split_up_to_a_step(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert evaluations(file, "eval/mine") == []
    rows = [{"step": step, "split": "eval/mine"} for step in (1, 2, 3)]
    lines = [*map(json.dumps, rows), json.dumps({"step": 1, "split": "train"}), '{"step": 4, "spl']
    file.write_text("\n".join(lines))
    assert evaluations(file, "eval/mine") == rows
    assert evaluations(file, "eval/mine", last_step=2) == rows[:2]


def test_the_best_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no checkpoint of an evaluated step"):
        best_checkpoint(tmp_path, Criterion())
    for step, value in ((2, 3.0), (10, 1.0), (20, 1.0), (30, 2.0), (40, None)):
        (tmp_path / str(step) / "metrics").mkdir(parents=True)
        values = {} if value is None else {"cross_entropy": value, "accuracy": value / 10}
        (tmp_path / str(step) / "metrics" / "metrics").write_text(json.dumps(values))
    (tmp_path / "50.damaged").mkdir()
    assert best_checkpoint(tmp_path, Criterion()).name == "10"
    assert best_checkpoint(tmp_path, Criterion("accuracy")).name == "2"
    (tmp_path / "10" / "metrics" / "metrics").write_text("[1]")
    with pytest.raises(UserError, match="is not a JSON object"):
        best_checkpoint(tmp_path, Criterion())
