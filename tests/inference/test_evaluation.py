import dataclasses

import jax
import numpy as np
import pytest

from switchx.data.eval_tasks import EvalExample, EvalTask
from switchx.data.text_metrics import METRICS
from switchx.errors import UserError
from switchx.inference.evaluation import (
    evaluate,
    judge_decoded,
    judge_ranked,
    judge_scored,
    make_eval_step,
)
from switchx.inference.predictor import Predictor, Score
from switchx.models.t5 import T5
from switchx.training.losses import LossConfig
from switchx.training.metrics import summarize
from tests.training.conftest import random_batch, random_params, small_config


@pytest.fixture(scope="module")
def setting():
    config = small_config(dropout_rate=0.5)
    return config, random_params(config)


def test_a_split_is_the_sum_of_its_batches_whatever_their_size(setting):
    config, params = setting
    step = jax.jit(make_eval_step(T5(config), LossConfig()))
    whole = random_batch(rows=8)
    pieces = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 2], whole) for i in range(0, 8, 2)]
    expected, found = summarize(step(params, whole)), summarize(evaluate(step, params, pieces))
    assert found["num_targets"] == expected["num_targets"]
    for name in ("cross_entropy", "accuracy", "load_balance_loss", "dropped_fraction"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


def test_evaluation_uses_its_own_capacity_and_no_dropout(setting):
    config, params = setting
    tight = dataclasses.replace(config.moe, capacity_factor=4.0, eval_capacity_factor=0.3)
    batch = random_batch()

    def dropped(moe):
        model = T5(dataclasses.replace(config, moe=moe))
        sums = jax.jit(make_eval_step(model, LossConfig()))(params, batch)
        return summarize(sums)["dropped_fraction"]

    assert dropped(tight) > 0.3
    assert dropped(dataclasses.replace(tight, eval_capacity_factor=None)) == 0.0


class Fake(Predictor):
    """Says what it is told to, by the first token of the inputs."""

    def __init__(self, said=None, likely=None):
        for name, value in (("said", said), ("likely", likely), ("lengths", (4, 3))):
            object.__setattr__(self, name, value)

    def generate(self, inputs, *, task_id):
        return (np.array(self.said[tokens[0]]) for tokens in inputs)

    def score(self, pairs, *, task_id):
        for inputs, targets in pairs:
            yield Score(self.likely[inputs[0], targets[0]], len(targets), False)


def letters(tokens) -> str:
    return "".join(chr(token) for token in tokens if token > 1)


def question(number: int, target: str) -> EvalExample:
    targets = np.array([*map(ord, target), 1])
    return EvalExample(str(number), np.array([number, 1]), target, targets, [target], 0, 0)


TASK = EvalTask(
    "letters",
    "test",
    [question(1, "a"), question(2, "b"), question(3, "a")],
    ("a", "bb"),
    [METRICS["exact_match"]],
    [lambda targets, scores: {"lowest": min(scores)}],
    lambda text, index: text if index else text.lower(),
)


def test_decoded_text_is_postprocessed_and_judged():
    said = {1: [ord("A"), 1, 0], 2: [ord("B"), 1, 0], 3: [ord("a"), 1, 0]}
    judged = judge_decoded(Fake(said), TASK, letters)
    # The first one is put in lower case, the second is not.
    assert judged.metrics == {"decoded_exact_match": pytest.approx(200 / 3)}
    assert judged.answers == [{"prediction": text} for text in ("A", "B", "a")]


def test_the_most_likely_option_counts():
    likely = {(1, ord("a")): -2.0, (1, ord("b")): -3.0, (2, ord("a")): -5.0}
    likely |= {(2, ord("b")): -4.0, (3, ord("a")): -1.0, (3, ord("b")): -1.0}

    def encode(text: str) -> list[int]:
        return [*map(ord, text), 1]

    by_sum = judge_ranked(Fake(likely=likely), TASK, encode)
    assert [answer["ranked"] for answer in by_sum.answers] == ["a", "bb", "a"]
    assert by_sum.answers[0]["log_likelihoods"] == {"a": -2.0, "bb": -3.0}
    assert by_sum.metrics == {"ranked_exact_match": pytest.approx(200 / 3)}
    # Means of 2 and of 3 tokens: -1 and -1, -2.5 and -1.33, -0.5 and -0.33.
    by_mean = judge_ranked(Fake(likely=likely), TASK, encode, by="mean")
    assert [answer["ranked"] for answer in by_mean.answers] == ["a", "bb", "bb"]
    with pytest.raises(UserError, match="option 'bb' of task 'letters' has 4 tokens, more than"):
        judge_ranked(Fake(likely=likely), TASK, lambda text: [5, *encode(text)])


def test_targets_are_scored_one_by_one():
    likely = {(1, ord("a")): -1.0, (2, ord("b")): -2.0, (3, ord("a")): -6.0}
    judged = judge_scored(Fake(likely=likely), TASK)
    assert judged.metrics == {
        "scored_log_likelihood": -3.0,
        "scored_perplexity": pytest.approx(np.exp(9 / 6)),  # 9 nats over 3 x 2 tokens
        "scored_lowest": -6.0,
    }
    assert judged.answers[1] == {"target_log_likelihood": -2.0, "target_tokens": 2}
