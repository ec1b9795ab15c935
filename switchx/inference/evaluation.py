"""Evaluation: teacher-forced sums over a split, and answers judged by a task's metrics."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from switchx.batch import Batch
from switchx.data.eval_tasks import EvalTask
from switchx.errors import UserError
from switchx.inference.predictor import Predictor, Score
from switchx.models.t5 import T5
from switchx.training.losses import LossConfig
from switchx.training.metrics import Sums
from switchx.training.step import make_loss, token_counts

RANKINGS = ("sum", "mean")
# Shows the progress of a loop: (items, what they are) to the items.
Show = Callable[[Sequence[Any], str], Iterable[Any]]


def make_eval_step(model: T5, loss_config: LossConfig) -> Callable[[Any, Batch], Sums]:
    """The function from (params, batch) to sums: no dropout, no jitter, eval capacity factor."""
    loss = make_loss(model, loss_config, train=False)

    def eval_step(params: Any, batch: Batch) -> Sums:
        return loss(params, batch, None, token_counts(batch, model.config.stack_moe))[1]

    return eval_step


def evaluate(
    eval_step: Callable[[Any, Batch], Sums], params: Any, batches: Iterable[Batch]
) -> Sums:
    """Add up `eval_step` over all batches, on the device; at least one batch is needed."""
    total: Sums | None = None
    for batch in batches:
        sums = eval_step(params, batch)
        total = sums if total is None else total + sums
    assert total is not None, "no batches to evaluate on"
    return total


class Judged(NamedTuple):
    """What a task's metrics say of a model.

    Attributes:
      metrics: "<kind>_<metric>" to a number; kinds are "decoded", "ranked" and "scored".
      answers: for every example, what the model said, as JSON values.
    """

    metrics: dict[str, float]
    answers: list[dict[str, Any]]


def _silent(items: Sequence[Any], what: str) -> Iterable[Any]:
    del what
    return items


def judge_decoded(
    predictor: Predictor, task: EvalTask, to_text: Callable[[np.ndarray], str], show: Show = _silent
) -> Judged:
    """The task's metrics on decoded predictions; `to_text` makes text of tokens up to EOS."""
    inputs = [example.inputs for example in task.examples]
    tokens = predictor.generate(show(inputs, "decoding"), task_id=task.task_id)
    texts = [to_text(each) for each in tokens]
    metrics = {f"decoded_{name}": value for name, value in task.measure(texts).items()}
    return Judged(metrics, [{"prediction": text} for text in texts])


def judge_ranked(
    predictor: Predictor,
    task: EvalTask,
    encode: Callable[[str], Sequence[int]],
    by: str = "sum",
    show: Show = _silent,
) -> Judged:
    """The task's metrics on the most likely of its options (rank classification).

    Args:
      predictor: of the model.
      task: one with `options`.
      encode: makes tokens of an option, EOS included.
      by: "sum" takes the option with the highest log-likelihood, as T5 and FLAN do; "mean"
        divides it by the option's number of tokens. The first of equals.
      show: progress.

    Raises:
      UserError: an option that is longer than a decoder row.
    """
    assert task.options, f"{task.name} has no options"
    options = [np.asarray(encode(option), np.int32) for option in task.options]
    for text, tokens in zip(task.options, options, strict=True):
        if len(tokens) > predictor.lengths[1]:
            raise UserError(
                f"option {text!r} of task {task.name!r} has {len(tokens)} tokens, more than "
                f"TASK_FEATURE_LENGTHS['targets'] = {predictor.lengths[1]}"
            )
    pairs = [(example.inputs, option) for example in task.examples for option in options]
    scores = list(predictor.score(show(pairs, "ranking"), task_id=task.task_id))
    answers, ranked = [], []
    for first in range(0, len(scores), len(options)):
        several = scores[first : first + len(options)]
        best = int(np.argmax([_rank(each, by) for each in several]))
        ranked.append(task.options[best])
        found = (each.log_likelihood for each in several)
        answers.append(
            {"ranked": ranked[-1], "log_likelihoods": dict(zip(task.options, found, strict=True))}
        )
    metrics = {f"ranked_{name}": value for name, value in task.measure(ranked).items()}
    return Judged(metrics, answers)


def judge_scored(predictor: Predictor, task: EvalTask, show: Show = _silent) -> Judged:
    """Mean log-likelihood of the targets by themselves, and the task's metrics of scores.

    "scored_log_likelihood" is per example, "scored_perplexity" per target token: packing, batch
    mates and capacity have no part in them.
    """
    pairs = [(example.inputs, example.targets) for example in task.examples]
    scores = list(predictor.score(show(pairs, "scoring"), task_id=task.task_id))
    found = [each.log_likelihood for each in scores]
    count = sum(each.num_tokens for each in scores)
    metrics = {
        "log_likelihood": sum(found) / len(found),
        "perplexity": float(np.exp(min(-sum(found) / max(count, 1), 700.0))),
        **task.measure_scores(found),
    }
    answers = [
        {"target_log_likelihood": each.log_likelihood, "target_tokens": each.num_tokens}
        for each in scores
    ]
    return Judged({f"scored_{name}": value for name, value in metrics.items()}, answers)


def _rank(score: Score, by: str) -> float:
    return score.log_likelihood / (max(score.num_tokens, 1) if by == "mean" else 1)
