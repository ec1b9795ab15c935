"""seqio's Evaluator with a switchx model: its predict_fn and score_fn out of plain functions.

    with sharding.use(mesh):
        evaluator.evaluate(
            compute_metrics=True,
            predict_fn=predict_fn(predictor.generate),
            score_fn=score_fn(predictor.score),
        )

for an Evaluator with `seqio.EncDecFeatureConverter(pack=False)`, and a `Predictor` of its lengths.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np

from switchx.data.vocabulary import PAD


class Scored(Protocol):
    """What has a log-likelihood."""

    @property
    def log_likelihood(self) -> float:
        """Of an example's targets."""
        ...


def predict_fn(
    generate: Callable[[Iterable[np.ndarray]], Iterable[np.ndarray]],
) -> Callable[..., list[tuple[int, np.ndarray]]]:
    """From inputs tokens to equally long output tokens, as seqio's Evaluator calls it."""

    def predict(dataset: Any, model_feature_shapes: Any = None) -> list[tuple[int, np.ndarray]]:
        del model_feature_shapes
        indices, examples = _read(dataset)
        outputs = generate(_real(example["encoder_input_tokens"]) for example in examples)
        return list(zip(indices, outputs, strict=True))

    return predict


def score_fn(
    score: Callable[[Iterable[tuple[np.ndarray, np.ndarray]]], Iterable[Scored]],
) -> Callable[..., list[tuple[int, float]]]:
    """From pairs of inputs and targets to log-likelihoods, as seqio's Evaluator calls it."""

    def score_all(dataset: Any, model_feature_shapes: Any = None) -> list[tuple[int, float]]:
        del model_feature_shapes
        indices, examples = _read(dataset)
        pairs = (
            (_real(each["encoder_input_tokens"]), _real(each["decoder_target_tokens"]))
            for each in examples
        )
        scores = [each.log_likelihood for each in score(pairs)]
        return list(zip(indices, scores, strict=True))

    return score_all


def _read(dataset: Any) -> tuple[list[int], list[dict[str, np.ndarray]]]:
    rows = list(dataset.as_numpy_iterator())
    return [int(index) for index, _ in rows], [example for _, example in rows]


def _real(tokens: np.ndarray) -> np.ndarray:
    return tokens[tokens != PAD]
