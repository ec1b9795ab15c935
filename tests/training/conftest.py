"""A small sparse model, its parameters and batches, drawn from NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from switchx.batch import Batch
from switchx.models.config import ModelConfig
from switchx.models.t5 import T5
from switchx.moe.config import MoeConfig


def small_config(**changes) -> ModelConfig:
    fields = dict(
        vocab_size=61,
        d_model=10,
        d_ff=14,
        num_heads=3,
        head_dim=4,
        num_encoder_layers=2,
        num_decoder_layers=2,
        moe=MoeConfig(num_experts=5, group_size="row", jitter_noise=0.0, min_capacity=1),
    )
    return ModelConfig(**(fields | changes))


def random_params(config: ModelConfig, seed: int = 0):
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes = nn.unbox(jax.eval_shape(T5(config).init, jax.random.key(0), tokens, tokens))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), shapes
    )


def random_batch(rows: int = 8, seed: int = 1, encoder_length: int = 9, decoder_length: int = 7):
    """Rows of different lengths, two examples in each row, padding at the end."""
    rng = np.random.default_rng(seed)

    def side(length: int):
        tokens = rng.integers(1, 61, (rows, length)).astype(np.int32)
        segments = np.ones((rows, length), np.int32)
        segments[:, length // 2 :] = 2
        positions = np.concatenate(
            [np.arange(length // 2), np.arange(length - length // 2)]
        ).astype(np.int32)
        real = np.arange(length) < rng.integers(length // 2 + 1, length + 1, (rows, 1))
        return tokens * real, segments * real, np.tile(positions, (rows, 1)) * real, real

    encoder, encoder_segments, encoder_positions, _ = side(encoder_length)
    inputs, decoder_segments, decoder_positions, real = side(decoder_length)
    targets = rng.integers(1, 61, inputs.shape).astype(np.int32) * real
    return Batch(
        encoder_tokens=encoder,
        encoder_segment_ids=encoder_segments,
        encoder_positions=encoder_positions,
        decoder_input_tokens=inputs,
        decoder_target_tokens=targets,
        decoder_segment_ids=decoder_segments,
        decoder_positions=decoder_positions,
        decoder_loss_weights=real.astype(np.float32),
    )


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    return small_config()


@pytest.fixture(scope="session")
def params(config):
    return random_params(config)


@pytest.fixture(scope="session")
def batch() -> Batch:
    return random_batch()
