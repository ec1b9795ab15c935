import dataclasses

import jax
import numpy as np
import pytest

from switchx.inference.config import PAD_ID
from switchx.inference.decoder import dropless
from switchx.models.t5 import T5
from tests.inference.test_decoding import LENGTH, rows
from tests.training.conftest import random_params, small_config


def test_dropless_has_room_for_every_routing():
    config = dropless(small_config())
    assert config.moe.eval_capacity_factor is None and config.moe.group_size == "row"
    dense = small_config(moe=None)
    assert dropless(dense) == dense


@pytest.mark.parametrize("router", ["top_k", "hash", "loss_free"])
def test_steps_with_a_cache_are_the_whole_decoder_for_every_kind_of_router(router):
    changes = {"router": router, **({"top_k": 2} if router in ("top_k", "loss_free") else {})}
    config = small_config()
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, **changes))
    params, model = random_params(config, seed=4), T5(dropless(config))
    variables, tasks = {"params": params}, np.zeros((4, 9), np.int32)
    mask = rows() != PAD_ID
    tokens = np.random.default_rng(3).integers(2, 61, (4, LENGTH)).astype(np.int32)

    @jax.jit
    def whole(tokens):
        encoded = model.apply(
            variables, rows(), encoder_mask=mask, encoder_task_ids=tasks, method="encode"
        )
        states, _ = model.apply(
            variables,
            tokens,
            encoded,
            encoder_mask=mask,
            decoder_task_ids=tasks[:, :LENGTH],
            method="decode",
        )
        return encoded, states

    encoded, expected = whole(tokens)
    start = jax.jit(
        lambda first: model.apply(
            variables,
            first,
            encoded,
            encoder_mask=mask,
            length=LENGTH,
            task_ids=tasks[:, :2],
            method="start",
        )
    )
    extend = jax.jit(
        lambda token, cache: model.apply(
            variables, token, cache, encoder_mask=mask, task_ids=tasks[:, :1], method="extend"
        )
    )
    states, cache = start(tokens[:, :2])
    found = [states]
    for place in range(2, LENGTH):
        states, cache = extend(tokens[:, place : place + 1], cache)
        found.append(states)
    assert cache.length == LENGTH
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, rtol=1e-4, atol=1e-5)
