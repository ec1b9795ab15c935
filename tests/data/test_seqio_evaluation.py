import dataclasses

import jax
import numpy as np
import pytest

from switchx import sharding
from switchx.data import eval_tasks, pipeline, registry
from switchx.data.backend import seqio
from switchx.data.pipeline import DataConfig
from switchx.data.seqio_evaluation import predict_fn, score_fn
from switchx.inference.evaluation import judge_decoded, judge_scored
from switchx.inference.predictor import Predictor
from tests.training.conftest import random_params, small_config

LENGTHS = {"inputs": 48, "targets": 12}
NUM_EXAMPLES = 11


def config(name: str) -> DataConfig:
    return DataConfig(mixture_or_task_name=name, vocabulary="bytes", task_feature_lengths=LENGTHS)


def mean_score(targets, scores):
    return {"mean_score": float(np.mean(scores)), "first": float(targets[0][0] == "a")}


def evaluator(name: str):
    return seqio.Evaluator(
        mixture_or_task_name=name,
        feature_converter=seqio.EncDecFeatureConverter(pack=False),
        eval_split="test",
        sequence_length=LENGTHS,
        num_examples=NUM_EXAMPLES,
        logger_cls=[],
    )


def upper(inputs):
    """Answers that are right now and then: half of each input, in capitals if it is long."""
    for tokens in inputs:
        answer = np.zeros(LENGTHS["targets"], np.int32)
        answer[: len(tokens) // 8] = tokens[: len(tokens) // 8] - 32 * (len(tokens) > 30)
        yield answer


@pytest.mark.parametrize("name", ["wn_reverse_dictionary", "cldr_names", "wn_syn_ant"])
def test_the_numbers_are_those_of_seqio(name):
    data = config(name)
    task = eval_tasks.build(data, name, split="test", num_examples=NUM_EXAMPLES)
    answers = upper(example.inputs for example in task.examples)
    found = task.measure([pipeline.decode_tokens(data, answer) for answer in answers])
    registry.register(data)
    asked = evaluator(name)
    metrics, _ = asked.evaluate(compute_metrics=True, predict_fn=predict_fn(upper))
    assert metrics.result()[name] == pytest.approx(found)
    del asked
    # What comes from seqio's registry is judged by seqio's own functions, without an Evaluator.
    from_registry = eval_tasks._from_seqio(data, name, "test", NUM_EXAMPLES)
    for mine, theirs in zip(task.examples, from_registry.examples, strict=True):
        for field in dataclasses.fields(mine):
            if not field.name.startswith("cut"):  # seqio does not tell
                np.testing.assert_array_equal(
                    getattr(mine, field.name), getattr(theirs, field.name)
                )
    assert from_registry.measure([example.targets_text for example in task.examples])
    seqio.TaskRegistry.remove(name)


def test_a_model_under_the_evaluator_of_seqio():
    name = "seqio_evaluation_of_a_model"
    data = config(name)
    members = registry.find(config("cldr_names"))
    task = members.replace(name=name, metric_fns=[*members.metric_fns, mean_score])
    seqio.TaskRegistry.add_provider(name, task)
    # Without the ids of sentinels, which the byte vocabularies write differently.
    model = small_config(vocab_size=259, scale_logits=False)
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    predictor = Predictor(model, random_params(model, seed=4), mesh, 4, tuple(LENGTHS.values()))
    asked = eval_tasks.build(data, name, split="test", num_examples=NUM_EXAMPLES)
    with sharding.use(mesh):
        functions = {
            "predict_fn": predict_fn(predictor.generate),
            "score_fn": score_fn(predictor.score),
        }
        theirs = evaluator(name)
        metrics, _ = theirs.evaluate(compute_metrics=True, **functions)
        scores = metrics.result()[name]
        decoded = judge_decoded(predictor, asked, lambda t: pipeline.decode_tokens(data, t))
        scored = judge_scored(predictor, asked)
    del theirs
    mine = {
        name.partition("_")[2]: value
        for name, value in (decoded.metrics | scored.metrics).items()
        if name not in ("scored_log_likelihood", "scored_perplexity")
    }
    assert scores == pytest.approx(mine, rel=1e-5)
    assert scores["mean_score"] == pytest.approx(scored.metrics["scored_log_likelihood"], rel=1e-5)
    seqio.TaskRegistry.remove(name)
