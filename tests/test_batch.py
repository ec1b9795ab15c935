"""`Batch`: a pytree of ten arrays, of NumPy, JAX or shapes alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from switchx.batch import Batch

B, S, T = 3, 7, 5
ENCODER = (
    "encoder_tokens",
    "encoder_segment_ids",
    "encoder_positions",
    "encoder_task_ids",
)
DECODER = (
    "decoder_input_tokens",
    "decoder_target_tokens",
    "decoder_segment_ids",
    "decoder_positions",
    "decoder_task_ids",
)


def fields():
    """Every field with numbers of its own, so that two swapped fields are noticed."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(1, 99, (B, S), dtype=np.int32) for name in ENCODER}
    arrays |= {name: rng.integers(1, 99, (B, T), dtype=np.int32) for name in DECODER}
    arrays["decoder_loss_weights"] = rng.random((B, T), dtype=np.float32)
    return arrays


def test_fields():
    names = [field.name for field in dataclasses.fields(Batch)]
    assert sorted(names) == sorted((*ENCODER, *DECODER, "decoder_loss_weights"))


def test_passes_through_jit_field_by_field():
    arrays = fields()
    doubled = jax.jit(lambda batch: jax.tree.map(lambda x: 2 * x, batch))(Batch(**arrays))
    assert isinstance(doubled, Batch)
    for name, value in arrays.items():
        result = getattr(doubled, name)
        assert isinstance(result, jax.Array) and result.dtype == value.dtype
        np.testing.assert_array_equal(result, 2 * value)


def test_holds_shapes():
    shapes = jax.eval_shape(lambda: Batch(**jax.tree.map(jnp.asarray, fields())))
    assert isinstance(shapes, Batch)
    assert shapes.encoder_tokens.shape == (B, S)
    assert shapes.decoder_loss_weights.shape == (B, T)


def test_may_be_cut_into_microbatches():
    pieces = jax.tree.map(lambda x: np.stack([x, x]), Batch(**fields()))
    assert pieces.encoder_tokens.shape == (2, B, S)
    assert pieces.decoder_positions.shape == (2, B, T)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Batch(**fields()).encoder_tokens = np.zeros((B, S), np.int32)


@pytest.mark.parametrize(
    "wrong",
    [
        {"encoder_tokens": np.zeros((B, S, 1), np.int32)},  # rank
        {"encoder_tokens": np.zeros((B, S), np.float32)},  # dtype
        {"decoder_loss_weights": np.ones((B, T), np.int32)},
        {"decoder_positions": np.zeros((B, S), np.int32)},  # the encoder's length
        {"encoder_segment_ids": np.ones((B + 1, S), np.int32)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_shapes_are_refused_under_the_type_checker(wrong):
    with pytest.raises(TypeCheckError):
        Batch(**(fields() | wrong))
