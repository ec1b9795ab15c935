"""Building blocks against NumPy and against their own definitions."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from switchx.models.config import ModelConfig
from switchx.models.layers import (
    Dense,
    Mlp,
    RelativePositionBias,
    RMSNorm,
    TokenEmbedder,
    dropout,
    relative_position_buckets,
)
from switchx.sharding import logical_axes

B, T, D, F, V = 2, 5, 6, 7, 37
CONFIG = ModelConfig(vocab_size=V, d_model=D, d_ff=F, num_heads=3, head_dim=4)


def boxed_params(module, *arguments):
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *arguments))["params"]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class TestRMSNorm:
    def test_by_hand(self):
        # Mean square (1 + 49) / 2 = 25, so 1/5 and 7/5, times the scale. The mean stays.
        y = RMSNorm(1e-6).apply(
            {"params": {"scale": jnp.asarray([1.0, 2.0])}}, jnp.asarray([1.0, 7])
        )
        np.testing.assert_allclose(y, [0.2, 2.8], rtol=1e-6)

    def test_epsilon_is_inside_the_root(self):
        # Mean square 1e-6 and epsilon 3e-6: 1e-3 / sqrt(4e-6) = 1/2.
        params = {"scale": jnp.ones(2)}
        y = RMSNorm(3e-6).apply({"params": params}, jnp.asarray([1e-3, -1e-3]))
        np.testing.assert_allclose(y, [0.5, -0.5], rtol=1e-5)
        np.testing.assert_array_equal(RMSNorm(3e-6).apply({"params": params}, jnp.zeros(2)), [0, 0])

    @pytest.mark.parametrize("shape", [(D,), (B, D), (B, T, D)])
    def test_normalises_the_last_axis(self, shape):
        x, scale_D = 3 * normal(*shape), normal(D, seed=1)
        y = RMSNorm(1e-2).apply({"params": {"scale": scale_D}}, jnp.asarray(x))
        mean_square = np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True)
        np.testing.assert_allclose(y, x / np.sqrt(mean_square + 1e-2) * scale_D, rtol=1e-5)

    def test_statistics_of_bfloat16_are_float32(self):
        # Rounded to bfloat16 once, at the end, but for a few elements on the edge of float32.
        x = normal(50, 64).astype(jnp.bfloat16)
        y = RMSNorm(1e-6).apply({"params": {"scale": jnp.ones(64)}}, jnp.asarray(x))
        assert y.dtype == jnp.bfloat16
        exact = x.astype(np.float64)
        exact /= np.sqrt(np.mean(exact**2, axis=-1, keepdims=True) + 1e-6)
        assert np.mean(np.asarray(y) == exact.astype(jnp.bfloat16)) > 0.99


class TestTokenEmbedder:
    def test_takes_rows(self, random_params):
        tokens_BT = jnp.asarray([[3, 0, 36, 3, 1], [7, 7, 2, 5, 0]])
        module = TokenEmbedder(CONFIG)
        params = random_params(module, tokens_BT)
        y_BTD = module.apply({"params": params}, tokens_BT)
        np.testing.assert_array_equal(y_BTD, params["embedding"][np.asarray(tokens_BT)])

    def test_is_a_gather(self, random_params):
        tokens_BT = jnp.zeros((B, T), jnp.int32)
        module = TokenEmbedder(CONFIG)
        params = random_params(module, tokens_BT)
        text = str(jax.make_jaxpr(lambda p: module.apply({"params": p}, tokens_BT))(params))
        assert "gather" in text and "dot_general" not in text
        assert f"{B},{T},{V}" not in text  # no one-hot

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_dtype_and_axes(self, dtype):
        module = TokenEmbedder(dataclasses.replace(CONFIG, dtype=dtype))
        tokens_BT = jnp.zeros((B, T), jnp.int32)
        y_BTD, variables = jax.eval_shape(
            lambda: module.init_with_output(jax.random.key(0), tokens_BT)
        )
        assert y_BTD.dtype == dtype and y_BTD.shape == (B, T, D)
        assert nn.unbox(variables)["params"]["embedding"].dtype == jnp.float32
        assert logical_axes(variables["params"]) == {"embedding": P("vocab", "embed")}


class TestDense:
    def test_equals_numpy(self, random_params):
        module = Dense(F, ("embed", "mlp"), 0.1)
        for shape in ((D,), (T, D), (B, T, D)):
            x = jnp.asarray(normal(*shape))
            params = random_params(module, x)
            assert list(params) == ["kernel"]  # no bias
            y = module.apply({"params": params}, x)
            np.testing.assert_allclose(y, np.asarray(x) @ params["kernel"], rtol=1e-5, atol=1e-6)

    def test_names_and_dtypes(self):
        module = Dense(F, ("embed", "mlp"), 0.1)
        x = jnp.zeros((T, D), jnp.bfloat16)
        y, variables = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), x))
        assert y.dtype == jnp.bfloat16
        assert nn.unbox(variables)["params"]["kernel"].dtype == jnp.float32
        assert logical_axes(variables["params"]) == {"kernel": P("embed", "mlp")}

    def test_initial_spread(self):
        # Truncated normal of variance 0.1 / 64.
        module = Dense(256, ("embed", "mlp"), 0.1)
        params = nn.unbox(jax.jit(module.init)(jax.random.key(0), jnp.ones((1, 64))))["params"]
        np.testing.assert_allclose(np.std(params["kernel"]), (0.1 / 64) ** 0.5, rtol=0.03)
        assert np.abs(params["kernel"]).max() < 2.5 * (0.1 / 64) ** 0.5


class TestMlp:
    @pytest.mark.parametrize(
        ("activations", "hidden"),
        [
            (("relu",), lambda x, p: np.maximum(x @ p["wi"]["kernel"], 0)),
            (
                ("relu", "linear"),
                lambda x, p: np.maximum(x @ p["wi_0"]["kernel"], 0) * (x @ p["wi_1"]["kernel"]),
            ),
            (
                ("gelu", "linear"),
                lambda x, p: gelu(x @ p["wi_0"]["kernel"]) * (x @ p["wi_1"]["kernel"]),
            ),
        ],
        ids=("relu", "gated relu", "gated gelu"),
    )
    def test_equals_numpy(self, random_params, activations, hidden):
        module = Mlp(dataclasses.replace(CONFIG, activations=activations))
        x_BTD = jnp.asarray(normal(B, T, D))
        params = random_params(module, x_BTD)
        y_BTD = module.apply({"params": params}, x_BTD)
        expected = hidden(np.asarray(x_BTD), params) @ params["wo"]["kernel"]
        np.testing.assert_allclose(y_BTD, expected, rtol=1e-4, atol=1e-5)

    def test_axes(self):
        module = Mlp(dataclasses.replace(CONFIG, activations=("gelu", "linear")))
        boxed = boxed_params(module, jnp.zeros((B, T, D)))
        assert logical_axes(boxed) == {
            "wi_0": {"kernel": P("embed", "mlp")},
            "wi_1": {"kernel": P("embed", "mlp")},
            "wo": {"kernel": P("mlp", "embed")},
        }

    def test_dropout_is_on_the_hidden_units_of_a_whole_row_and_only_in_training(self):
        # Identity kernels and positive input: the output is the hidden units.
        config = dataclasses.replace(CONFIG, d_ff=D, dropout_rate=0.75)
        params = {"wi": {"kernel": jnp.eye(D)}, "wo": {"kernel": jnp.eye(D)}}
        x_BTD = jnp.abs(jnp.asarray(normal(64, T, D))) + 0.1
        np.testing.assert_allclose(Mlp(config).apply({"params": params}, x_BTD), x_BTD, rtol=1e-6)
        rngs = {"dropout": jax.random.key(0)}
        y_BTD = np.asarray(Mlp(config, train=True).apply({"params": params}, x_BTD, rngs=rngs))
        kept_BTD = y_BTD != 0
        np.testing.assert_allclose(y_BTD, np.where(kept_BTD, 4 * x_BTD, 0), rtol=1e-6)
        np.testing.assert_array_equal(kept_BTD, np.broadcast_to(kept_BTD[:, :1], (64, T, D)))
        assert 0.15 < kept_BTD.mean() < 0.35


def gelu(x):
    """The tanh form."""
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


def test_dropout_draws_one_mask_for_all_positions_of_a_row():
    config = dataclasses.replace(CONFIG, dropout_rate=0.5)
    ones_BTD = jnp.ones((B, T, 64))
    y_BTD = np.asarray(
        dropout(config, True).apply({}, ones_BTD, rngs={"dropout": jax.random.key(0)})
    )
    assert set(np.unique(y_BTD)) == {0, 2}
    np.testing.assert_array_equal(y_BTD, np.broadcast_to(y_BTD[:, :1], y_BTD.shape))
    assert np.any(y_BTD[0] != y_BTD[1])
    np.testing.assert_array_equal(dropout(config, False).apply({}, ones_BTD), ones_BTD)


def bucket_by_law(distance, bidirectional, num_buckets, max_distance):
    """T5's law for one key at `distance` after the query, without a logarithm.

    Bucket n + floor(log(d / n) / log(max / n) · m) for n exact and m further buckets is the
    largest n + k with (d / n)^m >= (max / n)^k, that is d^m n^k >= max^k n^m in integers.
    """
    first = 0
    if bidirectional:
        num_buckets //= 2
        first = num_buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = num_buckets // 2
    if distance < exact:
        return first + distance
    more = num_buckets - exact
    k = 0
    while k + 1 < more and (
        distance**more * exact ** (k + 1) >= max_distance ** (k + 1) * exact**more
    ):
        k += 1
    return first + exact + k


class TestRelativePositionBuckets:
    @pytest.mark.parametrize(
        ("distance", "bidirectional", "expected"),
        [
            (0, True, 0),
            (-1, True, 1),
            (1, True, 17),  # keys ahead have the upper half
            (-7, True, 7),
            (7, True, 23),
            (-8, True, 8),  # 8 + 8 log(8/8) / log(128/8)
            (8, True, 24),
            (-15, True, 9),  # 8 + ⌊1.81⌋
            (-16, True, 10),  # 8 + 8 · 1/4
            (-32, True, 12),  # 8 + 8 · 2/4
            (64, True, 30),  # 16 + 8 + 8 · 3/4
            (-127, True, 15),
            (-128, True, 15),
            (-500, True, 15),
            (500, True, 31),
            (0, False, 0),
            (1, False, 0),  # all keys ahead, which causal attention never sees
            (500, False, 0),
            (-1, False, 1),
            (-7, False, 7),
            (-8, False, 8),
            (-15, False, 15),
            (-16, False, 16),
            (-20, False, 17),  # 16 + ⌊16 · 0.2231 / 2.0794⌋
            (-127, False, 31),  # 16 + ⌊15.94⌋
            (-128, False, 31),
            (-500, False, 31),
        ],
    )
    def test_by_hand(self, distance, bidirectional, expected):
        buckets_TS = relative_position_buckets(
            501, 501, bidirectional=bidirectional, num_buckets=32, max_distance=128
        )
        query = 0 if distance > 0 else 500
        assert buckets_TS[query, query + distance] == expected

    @pytest.mark.parametrize("bidirectional", [True, False])
    @pytest.mark.parametrize(
        ("num_buckets", "max_distance"), [(32, 128), (8, 20), (16, 100), (64, 1000), (4, 3)]
    )
    def test_equals_law(self, num_buckets, max_distance, bidirectional):
        # One query before and after all keys: every distance up to 600 both ways.
        ahead, behind = (
            relative_position_buckets(
                *lengths,
                bidirectional=bidirectional,
                num_buckets=num_buckets,
                max_distance=max_distance,
            )
            for lengths in ((1, 601), (601, 1))
        )
        law = (bidirectional, num_buckets, max_distance)
        assert ahead[0].tolist() == [bucket_by_law(d, *law) for d in range(601)]
        assert behind[:, 0].tolist() == [bucket_by_law(-d, *law) for d in range(601)]

    def test_depends_on_the_distance_only(self):
        buckets_TS = relative_position_buckets(
            5, 9, bidirectional=True, num_buckets=32, max_distance=128
        )
        assert buckets_TS.shape == (5, 9) and buckets_TS.dtype == np.int32
        for offset in range(-4, 9):
            assert len(set(np.diagonal(buckets_TS, offset))) == 1
        assert len(set(np.diagonal(buckets_TS[::-1]))) > 1


class TestRelativePositionBias:
    @pytest.mark.parametrize("bidirectional", [True, False])
    def test_looks_buckets_up(self, random_params, bidirectional):
        module = RelativePositionBias(CONFIG, bidirectional=bidirectional)
        params = random_params(module, 4, 9)
        assert params["rel_embedding"].shape == (3, 32)
        bias = np.asarray(jax.jit(lambda p: module.apply({"params": p}, 4, 9))(params))
        assert bias.shape == (1, 3, 4, 9)
        for head, query, key in np.ndindex(3, 4, 9):
            bucket = bucket_by_law(key - query, bidirectional, 32, 128)
            assert bias[0, head, query, key] == params["rel_embedding"][head, bucket]

    def test_dtype_and_axes(self):
        module = RelativePositionBias(
            dataclasses.replace(CONFIG, dtype="bfloat16"), bidirectional=True
        )
        bias, variables = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), 4, 9))
        assert bias.dtype == jnp.bfloat16
        assert logical_axes(variables["params"]) == {"rel_embedding": P("heads", "relpos_buckets")}


def test_the_law_is_the_logarithm():
    # The integer form above against the formula as printed, away from its boundaries.
    for distance in (9, 11, 20, 33, 50, 90, 126):
        formula = 8 + math.floor(8 * math.log(distance / 8) / math.log(128 / 8))
        assert bucket_by_law(-distance, True, 32, 128) == formula
