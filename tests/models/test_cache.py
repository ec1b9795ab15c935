import jax.numpy as jnp
import numpy as np
import pytest

from switchx.models.cache import empty_cache
from switchx.models.config import ModelConfig

B, R, T, S, HEADS, HEAD_DIM = 2, 3, 5, 7, 2, 4


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_what_is_written_is_read_at_its_place(scan_layers):
    config = ModelConfig(
        vocab_size=11,
        d_model=6,
        d_ff=8,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        num_decoder_layers=4,
        scan_layers=scan_layers,
    )
    cache = empty_cache(config, B, sequences=R, length=T, source_length=S)
    assert cache.room == T and cache.length == 0
    assert len(cache.layers) == (1 if scan_layers else 4)
    place = jnp.int32(2) if scan_layers else None
    keys, values = normal(B * R, 2, HEADS, HEAD_DIM), normal(B * R, 2, HEADS, HEAD_DIM, seed=1)
    states = normal(B, S, HEADS, HEAD_DIM, seed=2), normal(B, S, HEADS, HEAD_DIM, seed=3)
    layer = cache.layers[0].append(place, jnp.int32(1), keys, values).keep(place, *states)
    for found, written in zip(layer.decoded(place), (keys, values), strict=True):
        np.testing.assert_array_equal(found[:, 1:3], written)
        assert not np.asarray(found[:, 3:]).any() and not np.asarray(found[:, 0]).any()
    for found, written in zip(layer.encoded(place), states, strict=True):
        np.testing.assert_array_equal(found, written)
    if scan_layers:
        assert not any(np.asarray(found).any() for found in layer.decoded(jnp.int32(1)))

    order = jnp.asarray([2, 0, 0, 4, 5, 3])
    chosen = cache.__class__((layer,), cache.length).select(order).layers[0]
    np.testing.assert_array_equal(chosen.decoded(place)[0][:, 1:3], keys[order])
    np.testing.assert_array_equal(chosen.encoded(place)[0], states[0])
