import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchx import sharding
from switchx.inference import scoring
from switchx.inference.config import DecodingConfig
from switchx.inference.decoder import dropless
from switchx.inference.decoding import generate
from switchx.inference.scoring import score
from switchx.models.t5 import T5
from switchx.moe.config import MoeConfig
from tests.training.conftest import random_params, small_config

VOCABULARY = 61


@pytest.fixture(scope="module")
def trained():
    config = small_config(scale_logits=False)
    return config, random_params(config, seed=4)


def rows(lengths, width: int, seed: int) -> np.ndarray:
    tokens = np.random.default_rng(seed).integers(2, VOCABULARY, (len(lengths), width))
    return np.where(np.arange(width) < np.array(lengths)[:, None], tokens, 0).astype(np.int32)


INPUTS, TARGETS = rows((7, 1, 4, 7), 7, seed=1), rows((5, 3, 1, 0), 5, seed=2)


def slow_score(config, params, inputs: np.ndarray, targets: np.ndarray) -> float:
    """One row, no padding in it, a softmax at a time."""
    inputs, targets = inputs[inputs != 0][None], targets[targets != 0]
    shifted = np.append(0, targets[:-1])[None].astype(np.int32)
    logits = T5(dropless(config)).apply({"params": params}, inputs, shifted).logits
    return sum(
        float(jnp.log(jax.nn.softmax(logits[0, t])[token])) for t, token in enumerate(targets)
    )


def test_a_score_is_the_sum_over_the_slow_loop(trained):
    found = score(*trained, INPUTS, TARGETS)
    expected = [slow_score(*trained, INPUTS[i], TARGETS[i]) for i in range(3)]
    np.testing.assert_allclose(found.log_likelihood[:3], expected, rtol=2e-5)
    assert found.log_likelihood[3] == 0
    assert found.num_tokens.tolist() == [5, 3, 1, 0]


def test_a_uniform_model_scores_by_length_alone():
    config = small_config(tie_embeddings=False)
    params = random_params(config, seed=4)
    params["logits_dense"] = {"kernel": jnp.zeros((10, VOCABULARY))}
    found = score(config, params, INPUTS, TARGETS)
    np.testing.assert_allclose(
        found.log_likelihood, -np.log(VOCABULARY) * np.array([5, 3, 1, 0]), rtol=1e-6
    )


def test_neither_padding_nor_batch_mates_change_a_score(trained):
    together = score(*trained, INPUTS, TARGETS)
    for i in range(3):
        wide = np.zeros((1, 12), np.int32), np.zeros((1, 9), np.int32)
        for padded, tokens in zip(wide, (INPUTS, TARGETS), strict=True):
            padded[0, : tokens.shape[1]] = tokens[i]
        alone = score(*trained, *wide)
        np.testing.assert_allclose(alone.log_likelihood[0], together.log_likelihood[i], rtol=1e-5)


def test_positions_come_in_chunks_that_change_nothing(trained, monkeypatch):
    whole = score(*trained, INPUTS, TARGETS)
    monkeypatch.setattr(scoring, "AUTOMATIC_CHUNK_ELEMENTS", 4 * VOCABULARY * 2)
    chunked = jax.jit(score.__wrapped__, static_argnums=0)(*trained, INPUTS, TARGETS)
    np.testing.assert_allclose(chunked.log_likelihood, whole.log_likelihood, rtol=1e-6)
    np.testing.assert_array_equal(chunked.is_greedy, whole.is_greedy)


def test_what_greedy_decoding_says_is_greedy(trained):
    decoding = DecodingConfig(max_new_tokens=5)
    said = np.asarray(generate(*trained, jnp.asarray(INPUTS), decoding).tokens[:, 0])
    found = score(*trained, INPUTS, said)
    assert found.is_greedy.tolist() == [True] * 4
    other = said.copy()
    other[:, 2] = (other[:, 2] + 1) % VOCABULARY
    assert not score(*trained, INPUTS, other).is_greedy.any()
    # The most probable path is at least as probable as any other of its first tokens.
    assert (found.log_likelihood > score(*trained, INPUTS, other).log_likelihood).sum() >= 3


def test_a_mesh_changes_nothing():
    moe = MoeConfig(num_experts=4, group_size="row", min_capacity=1)
    config = small_config(scale_logits=False, moe=moe)
    params = random_params(config, seed=4)
    one = score(config, params, INPUTS, TARGETS)
    mesh = sharding.make_mesh({"data": 2, "expert": 2}, jax.devices()[:4])
    with sharding.use(mesh):
        where = sharding.batch_sharding(mesh)
        placed = (jax.device_put(tokens, where) for tokens in (INPUTS, TARGETS))
        many = score(config, params, *placed)
    np.testing.assert_allclose(many.log_likelihood, one.log_likelihood, rtol=1e-5)
    assert many.log_likelihood.sharding.is_fully_replicated
