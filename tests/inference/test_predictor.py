import jax
import numpy as np
import pytest

from switchx import sharding
from switchx.inference.predictor import Predictor
from switchx.moe.config import MoeConfig
from tests.training.conftest import random_params, small_config

LENGTHS = (9, 6)


def predictor(num_rows: int, devices: int) -> Predictor:
    moe = MoeConfig(num_experts=4, group_size="row", min_capacity=1)
    config = small_config(scale_logits=False, moe=moe)
    mesh = sharding.make_mesh({"data": devices}, jax.devices()[:devices])
    return Predictor(config, random_params(config, seed=4), mesh, num_rows, LENGTHS)


def examples(count: int) -> tuple[list, list]:
    rng = np.random.default_rng(0)
    inputs, targets = (
        [rng.integers(2, 61, rng.integers(1, length + 1)).tolist() for _ in range(count)]
        for length in LENGTHS
    )
    return inputs, targets


@pytest.mark.parametrize("count", [0, 1, 4, 7])
def test_any_number_of_examples_in_any_batches_on_any_mesh(count):
    inputs, targets = examples(count)
    found = []
    for model in (predictor(4, devices=1), predictor(8, devices=4)):
        with sharding.use(model.mesh):
            said = [tokens.tolist() for tokens in model.generate(inputs)]
            scores = list(model.score(zip(inputs, targets, strict=True)))
        assert len(said) == len(scores) == count
        assert all(len(tokens) == LENGTHS[1] for tokens in said)
        assert [score.num_tokens for score in scores] == list(map(len, targets))
        found.append((said, [score.log_likelihood for score in scores]))
    (said, scores), (said_on_four, scores_on_four) = found
    assert said == said_on_four
    assert scores == pytest.approx(scores_on_four, rel=1e-5)


def test_what_does_not_fit_is_an_error():
    model = predictor(4, devices=1)
    with sharding.use(model.mesh), pytest.raises(ValueError):
        list(model.generate([[2] * (LENGTHS[0] + 1)]))
