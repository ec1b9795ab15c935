import dataclasses

import jax
import numpy as np
import pytest

from switchx.inference.evaluation import evaluate, make_eval_step
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
