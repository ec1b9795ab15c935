import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchx.inference.decoding import EOS_ID, PAD_ID, dropless, greedy
from switchx.models.t5 import T5
from tests.training.conftest import random_params, small_config

LENGTH = 6


@pytest.fixture(scope="module")
def trained():
    # Scaled up so that the most probable token changes from step to step.
    config = small_config(scale_logits=False)
    return config, random_params(config, seed=4)


def slow_greedy(config, params, row: np.ndarray) -> list[int]:
    """One row at a time, no padding in it, full logits of the teacher-forced model."""
    apply = jax.jit(T5(dropless(config)).apply)
    tokens, length = np.zeros((1, LENGTH + 1), np.int32), 0
    real = row[row != PAD_ID][None]
    while length < LENGTH and (length == 0 or tokens[0, length] != EOS_ID):
        logits = apply({"params": params}, real, tokens).logits
        length += 1
        tokens[0, length] = np.argmax(logits[0, length - 1])
    return tokens[0, 1:].tolist()


def test_greedy_is_the_slow_loop_for_every_row_whatever_its_batch_mates(trained):
    config, params = trained
    tokens = np.random.default_rng(2).integers(2, 61, (4, 9)).astype(np.int32)
    tokens[1, 5:] = PAD_ID
    tokens[3, 2:] = PAD_ID
    together = greedy(config, params, jnp.asarray(tokens), max_length=LENGTH)
    expected = [slow_greedy(config, params, row) for row in tokens]
    np.testing.assert_array_equal(together, expected)
    assert len({tuple(row) for row in expected}) > 1


def test_after_end_of_sequence_there_is_only_padding():
    config = small_config(tie_embeddings=False, scale_logits=False)
    params = random_params(config, seed=4)
    # A head that ends a sequence wherever the state's first unit is positive, else says 7.
    head = np.zeros((10, 61), np.float32)
    head[0, EOS_ID], head[0, 7] = 1, -1
    params["logits_dense"] = {"kernel": jnp.asarray(head)}
    tokens = np.random.default_rng(2).integers(2, 61, (16, 5)).astype(np.int32)
    decoded = np.asarray(greedy(config, params, jnp.asarray(tokens), max_length=LENGTH))
    ended = decoded == EOS_ID
    assert ended.any()
    for row in decoded[ended.any(axis=1)]:
        end = row.tolist().index(EOS_ID)
        assert row[:end].tolist() == [7] * end
        assert row[end + 1 :].tolist() == [PAD_ID] * (LENGTH - end - 1)


def test_dropless_has_room_for_every_routing():
    config = dropless(small_config())
    assert config.moe.eval_capacity_factor is None and config.moe.group_size == "row"
    dense = small_config(moe=None)
    assert dropless(dense) == dense
