"""Attention against a loop over queries and keys, and who may see whom."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from switchx.models.attention import Attention, attention_mask
from switchx.models.config import ModelConfig
from switchx.sharding import logical_axes

# Inner width 3 · 4 = 12 is not d_model.
B, T, S, D, HEADS, HEAD_DIM = 2, 5, 7, 6, 3, 4
CONFIG = ModelConfig(vocab_size=11, d_model=D, d_ff=8, num_heads=HEADS, head_dim=HEAD_DIM)


class SelfContained(Attention):
    """Attention to states instead of to keys and values."""

    def __call__(self, queries_BTD, keys_BSD, mask, bias=None):
        return super().__call__(queries_BTD, *self.keys_values(keys_BSD), mask, bias)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def attend(module, params, queries_BTD, keys_BSD, mask, bias=None, rngs=None):
    return module.apply({"params": params}, queries_BTD, keys_BSD, mask, bias, rngs=rngs)


def attend_by_loop(params, queries_BTD, keys_BSD, mask, bias):
    """One query, head and key at a time, in float64; no 1/√head_dim."""
    kernels = {name: np.asarray(params[name]["kernel"], np.float64) for name in params}
    batch, queries, _ = queries_BTD.shape
    mask = np.broadcast_to(mask, (batch, 1, queries, keys_BSD.shape[1]))
    result = np.zeros(queries_BTD.shape)
    for b in range(batch):
        for t in range(queries):
            heads = []
            for h in range(HEADS):
                columns = slice(h * HEAD_DIM, (h + 1) * HEAD_DIM)
                q = np.asarray(queries_BTD[b, t], np.float64) @ kernels["query"][:, columns]
                total, weighted = 0.0, np.zeros(HEAD_DIM)
                for s in np.flatnonzero(mask[b, 0, t]):
                    key = np.asarray(keys_BSD[b, s], np.float64)
                    weight = np.exp(q @ (key @ kernels["key"][:, columns]) + bias[0, h, t, s])
                    total += weight
                    weighted += weight * (key @ kernels["value"][:, columns])
                heads.append(weighted / total)
            result[b, t] = np.concatenate(heads) @ kernels["out"]
    return result


class TestMask:
    def test_keys(self):
        mask = attention_mask(jnp.asarray([[True, True, False], [True, False, False]]))
        np.testing.assert_array_equal(mask, [[[[1, 1, 0]]], [[[1, 0, 0]]]])

    def test_causal(self):
        mask = attention_mask(jnp.asarray([[True, True, False]]), causal=True)
        np.testing.assert_array_equal(mask[0, 0], [[1, 0, 0], [1, 1, 0], [1, 1, 0]])

    def test_segments(self):
        # Two examples and padding; 2 queries of the first, 1 of the second, 1 of padding.
        mask = attention_mask(
            jnp.asarray([[True, True, True, True, False]]),
            jnp.asarray([[1, 1, 2, 0]]),
            jnp.asarray([[1, 2, 2, 2, 0]]),
        )
        np.testing.assert_array_equal(
            mask[0, 0], [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]]
        )

    def test_causal_segments(self):
        segment_ids_BT = jnp.asarray([[1, 1, 2, 2, 0]])
        mask = attention_mask(segment_ids_BT != 0, segment_ids_BT, segment_ids_BT, causal=True)
        np.testing.assert_array_equal(
            mask[0, 0],
            [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]],
        )


class TestAttention:
    def test_equals_loop(self, random_params):
        module = SelfContained(CONFIG)
        queries_BTD, keys_BSD = normal(B, T, D), normal(B, S, D, seed=1)
        bias = normal(1, HEADS, T, S, seed=2)
        mask = np.random.default_rng(3).random((B, 1, T, S)) < 0.6
        mask[..., 0] = True  # no query without a key: the loop would divide by zero
        params = random_params(module, queries_BTD, keys_BSD, jnp.asarray(mask), bias)
        y_BTD = attend(module, params, queries_BTD, keys_BSD, mask, bias)
        expected = attend_by_loop(params, queries_BTD, keys_BSD, mask, np.asarray(bias))
        np.testing.assert_allclose(y_BTD, expected, rtol=1e-4, atol=1e-5)

    def test_without_bias_and_with_one_mask_for_all_queries(self, random_params):
        module = SelfContained(CONFIG)
        queries_BTD, keys_BSD = normal(B, T, D), normal(B, S, D, seed=1)
        mask = np.arange(S) < np.asarray([[[[4]]], [[[6]]]])
        params = random_params(module, queries_BTD, keys_BSD, jnp.asarray(mask))
        y_BTD = attend(module, params, queries_BTD, keys_BSD, mask)
        no_bias = np.zeros((1, HEADS, T, S))
        expected = attend_by_loop(params, queries_BTD, keys_BSD, mask, no_bias)
        np.testing.assert_allclose(y_BTD, expected, rtol=1e-4, atol=1e-5)

    def test_no_attention_across_segments(self, random_params):
        module = SelfContained(CONFIG)
        segment_ids_BS = jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 3, 3, 3]])
        mask = attention_mask(segment_ids_BS != 0, segment_ids_BS, segment_ids_BS)
        x_BSD, other_BSD = normal(B, S, D), normal(B, S, D, seed=1)
        params = random_params(module, x_BSD, x_BSD, mask)
        y_BSD = attend(module, params, x_BSD, x_BSD, mask)
        for segment in (1, 2, 3):
            inside_BS = np.asarray(segment_ids_BS) == segment
            changed_BSD = jnp.where(inside_BS[..., None], x_BSD, other_BSD)
            changed_y_BSD = attend(module, params, changed_BSD, changed_BSD, mask)
            np.testing.assert_array_equal(changed_y_BSD[inside_BS], y_BSD[inside_BS])
            real_BS = (np.asarray(segment_ids_BS) != 0) & ~inside_BS
            assert np.all(np.any(changed_y_BSD[real_BS] != y_BSD[real_BS], axis=-1))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_queries_without_keys_are_finite(self, random_params, dtype):
        module = SelfContained(dataclasses.replace(CONFIG, dtype=dtype))
        x_BSD = normal(B, S, D).astype(dtype)
        mask = jnp.zeros((B, 1, S, S), bool).at[0].set(True)
        params = random_params(module, x_BSD, x_BSD, mask)

        @jax.jit
        def value_and_gradient(x_BSD):
            def loss(x_BSD):
                return jnp.sum(module.apply({"params": params}, x_BSD, x_BSD, mask) ** 2)

            return jax.value_and_grad(loss)(x_BSD)

        value, gradient_BSD = value_and_gradient(x_BSD)
        assert np.isfinite(value) and np.all(np.isfinite(gradient_BSD.astype(np.float32)))

    def test_scores_and_softmax_of_bfloat16_are_float32(self, random_params):
        module = SelfContained(dataclasses.replace(CONFIG, dtype="bfloat16"))
        x_BSD, mask = normal(B, S, D).astype(jnp.bfloat16), jnp.ones((B, 1, 1, S), bool)
        params = random_params(module, x_BSD, x_BSD, mask)
        jaxpr = jax.make_jaxpr(lambda p, x: module.apply({"params": p}, x, x, mask))(params, x_BSD)
        assert jaxpr.out_avals[0].dtype == jnp.bfloat16
        assert f"f32[{B},{HEADS},{S},{S}] = exp " in str(jaxpr)
        y_BSD = attend(module, params, x_BSD, x_BSD, mask).astype(np.float32)
        exact_BSD = attend(SelfContained(CONFIG), params, *[x_BSD.astype(np.float32)] * 2, mask)
        np.testing.assert_allclose(y_BSD, exact_BSD, rtol=0.05, atol=0.05)

    def test_dropout_takes_keys_from_all_queries_of_a_head(self, random_params):
        # With a query kernel of zeros all queries weigh the keys alike, 1/S each: with one mask
        # for all queries they still agree.
        config = dataclasses.replace(CONFIG, dropout_rate=0.5)
        x_BSD, mask = normal(B, S, D), jnp.ones((B, 1, 1, S), bool)
        params = random_params(SelfContained(config), x_BSD, x_BSD, mask)
        params["query"]["kernel"] *= 0
        y_BSD = attend(SelfContained(config), params, x_BSD, x_BSD, mask)
        rngs = {"dropout": jax.random.key(0)}
        dropped_BSD = attend(
            SelfContained(config, train=True), params, x_BSD, x_BSD, mask, None, rngs
        )
        first_B1D = np.asarray(dropped_BSD)[:, :1]
        np.testing.assert_allclose(dropped_BSD, np.broadcast_to(first_B1D, (B, S, D)), rtol=1e-5)
        assert np.abs(dropped_BSD - y_BSD).max() > 0.01

    def test_names_axes_and_dtypes(self):
        module = SelfContained(dataclasses.replace(CONFIG, dtype="bfloat16"))
        x_BSD, mask = jnp.zeros((B, S, D), jnp.bfloat16), jnp.ones((B, 1, 1, S), bool)
        boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), x_BSD, x_BSD, mask))["params"]
        inward, outward = {"kernel": P("embed", "heads")}, {"kernel": P("heads", "embed")}
        assert logical_axes(boxed) == {
            "query": inward,
            "key": inward,
            "value": inward,
            "out": outward,
        }
        shapes = jax.tree.map(lambda leaf: leaf.shape, nn.unbox(boxed))
        assert shapes["query"]["kernel"] == (D, HEADS * HEAD_DIM)
        assert shapes["out"]["kernel"] == (HEADS * HEAD_DIM, D)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(boxed))

    def test_initial_spread(self):
        # The query's variance carries the 1 / head_dim that the scores lack.
        config = dataclasses.replace(CONFIG, d_model=64, num_heads=16, head_dim=9, init_scale=0.3)
        x_BSD, mask = jnp.ones((1, 1, 64)), jnp.ones((1, 1, 1, 1), bool)
        init = jax.jit(SelfContained(config).init)
        params = nn.unbox(init(jax.random.key(0), x_BSD, x_BSD, mask))["params"]
        deviations = {name: np.std(params[name]["kernel"]) for name in params}
        np.testing.assert_allclose(deviations["query"], (0.3 / 64 / 9) ** 0.5, rtol=0.05)
        np.testing.assert_allclose(deviations["key"], (0.3 / 64) ** 0.5, rtol=0.05)
        np.testing.assert_allclose(deviations["value"], (0.3 / 64) ** 0.5, rtol=0.05)
        np.testing.assert_allclose(deviations["out"], (0.3 / 144) ** 0.5, rtol=0.05)
