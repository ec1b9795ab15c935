"""The MoE layer: against a loop over tokens, its invariants, and its configuration."""

import dataclasses
import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from switchx.errors import UserError
from switchx.moe.assignment import Tokens
from switchx.moe.config import MoeConfig
from switchx.moe.experts import ACTIVATIONS
from switchx.moe.layer import MoeLayer
from switchx.sharding import logical_axes

B, T, D, E, F = 4, 9, 6, 5, 7
# Two rows to a group: G = 2, M = 18. Capacity ceil(0.7 · 18 / 5) = 3 in training, ceil(18 / 5) = 4
# otherwise.
GROUPS, TRAIN_CAPACITY, EVAL_CAPACITY = 2, 3, 4
CONFIG = MoeConfig(
    num_experts=E,
    capacity_factor=0.7,
    eval_capacity_factor=1.0,
    min_capacity=0,
    group_size=20,
    jitter_noise=0.0,
)
DROPLESS = dataclasses.replace(CONFIG, capacity_factor=None, eval_capacity_factor=None)


def make_layer(config=CONFIG, activations=("relu",), d_ff=F, **modes):
    return MoeLayer(config, d_ff, activations, init_scale=0.1, **modes)


def inputs(dtype=np.float32):
    """Tokens and a mask with padding at the ends of the rows and in the middle of one."""
    x_BTD = np.random.default_rng(0).normal(size=(B, T, D)).astype(dtype)
    mask_BT = np.arange(T)[None] < np.asarray([9, 6, 8, 9])[:, None]
    mask_BT[3, 2] = False
    return x_BTD, mask_BT


def everyone():
    return np.ones((B, T), bool)


def random_params(layer, seed=1):
    """Parameters of the layer's shapes, drawn by NumPy."""
    x_BTD, mask_BT = inputs()
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x_BTD, Tokens(jnp.asarray(mask_BT)))[
        "params"
    ]
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: np.asarray(
            rng.normal(0, leaf.shape[-2:][0] ** -0.5 if leaf.shape else 1, leaf.shape), np.float32
        ),
        nn.unbox(shapes),
    )


@functools.partial(jax.jit, static_argnums=0)
def apply(layer, params, x_BTD, mask_BT, rngs=None):
    return layer.apply({"params": params}, x_BTD, Tokens(jnp.asarray(mask_BT)), rngs=rngs)


def assert_trees_close(actual, expected, **tolerance):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


def largest_array(compiled):
    """Elements of the largest array of a compiled program."""
    shapes = re.findall(r"\b(?:f32|s32|u32|pred|s64|s8)\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.parametrize("dispatch", ["gather", "einsum"])
def test_no_mask_of_tokens_by_experts_by_capacity_in_the_compiled_program(dispatch):
    tokens, experts, width, hidden = 256, 8, 6, 7
    config = dataclasses.replace(
        CONFIG, num_experts=experts, capacity_factor=1.25, group_size=tokens, dispatch=dispatch
    )
    layer = make_layer(config, d_ff=hidden, train=True)
    x_BTD, known = jnp.ones((1, tokens, width)), Tokens(jnp.ones((1, tokens), bool))

    def loss(params, x_BTD):
        y_BTD, stats = layer.apply({"params": params}, x_BTD, known)
        return jnp.sum(y_BTD**2) + stats.load_balance_loss + stats.router_z_loss

    params = nn.unbox(layer.init(jax.random.key(0), x_BTD, known))["params"]
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, x_BTD).compile()
    mask = tokens * experts * config.capacity(tokens, train=True)
    slots = experts * config.capacity(tokens, train=True) * hidden
    assert (largest_array(compiled) >= mask) == (dispatch == "einsum")
    if dispatch == "gather":
        assert largest_array(compiled) <= max(slots, tokens * experts)


def activation(name, x):
    tanh_argument = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    return {
        "relu": np.maximum(x, 0),
        "gelu": x * (1 + np.tanh(tanh_argument)) / 2,
        "silu": x / (1 + np.exp(-x)),
        "linear": x,
    }[name]


def layer_by_loop(params, x_BTD, mask_BT, activations, capacity):
    """Token after token in float64: choose an expert, take a slot if there is one, compute."""
    names = ["wi"] if len(activations) == 1 else [f"wi_{i}" for i in range(len(activations))]
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    tokens_ND, mask_N = x_BTD.reshape(-1, D).astype(np.float64), mask_BT.reshape(-1)
    y_ND = np.zeros_like(tokens_ND)
    kept_N = np.zeros(len(tokens_ND), bool)
    for n, token in enumerate(tokens_ND):
        if n % (len(tokens_ND) // GROUPS) == 0:
            filled = [0] * E  # a new group
        if not mask_N[n]:
            continue
        exponentials = np.exp(token @ params["router"]["kernel"])
        e = np.argmax(exponentials)
        if filled[e] == capacity:
            continue
        filled[e] += 1
        kept_N[n] = True
        hidden = np.ones(F)
        for name, function in zip(names, activations, strict=True):
            hidden = hidden * activation(function, token @ params["expert"][name][e])
        gate = exponentials[e] / exponentials.sum()
        y_ND[n] = gate * (hidden @ params["expert"]["wo"][e])
    return y_ND.reshape(x_BTD.shape), kept_N.reshape(mask_BT.shape)


class TestAgainstLoop:
    @pytest.mark.parametrize("dispatch", ["gather", "einsum"])
    @pytest.mark.parametrize(
        ("activations", "train"),
        [
            (("relu",), True),
            (("relu",), False),
            (("gelu", "linear"), True),
            (("silu", "linear"), False),
            (("gelu", "silu", "linear"), False),
        ],
    )
    def test_equals_loop(self, activations, train, dispatch):
        config = dataclasses.replace(CONFIG, dispatch=dispatch)
        layer = make_layer(config, activations, train=train)
        params = random_params(layer)
        x_BTD, mask_BT = inputs()
        y_BTD, stats = apply(layer, params, x_BTD, mask_BT)
        capacity = TRAIN_CAPACITY if train else EVAL_CAPACITY
        expected, kept_BT = layer_by_loop(params, x_BTD, mask_BT, activations, capacity)
        np.testing.assert_allclose(y_BTD, expected, rtol=1e-4, atol=1e-5)
        assert y_BTD.dtype == jnp.float32
        assert stats.num_tokens == mask_BT.sum() == 31
        assert stats.num_dropped_K.sum() == (mask_BT & ~kept_BT).sum() > 0

    def test_training_drops_more_than_evaluation(self):
        params = random_params(make_layer())
        dropped = [
            apply(make_layer(train=train), params, *inputs())[1].num_dropped_K.sum()
            for train in (True, False)
        ]
        assert dropped[0] > dropped[1] > 0

    def test_dropped_tokens_and_padding_are_exactly_zero(self):
        layer = make_layer(capture_router=True, train=True)
        x_BTD, mask_BT = inputs()
        y_BTD, stats = apply(layer, random_params(layer), x_BTD, mask_BT)
        zero_BT = np.all(np.asarray(y_BTD) == 0, axis=-1)
        np.testing.assert_array_equal(zero_BT, ~np.asarray(stats.kept)[..., 0])
        assert (zero_BT & mask_BT).sum() == stats.num_dropped_K.sum() > 0

    def test_backends_agree_in_all_gradients(self):
        x_BTD, mask_BT = inputs()
        params = random_params(make_layer(train=True))

        @functools.partial(jax.jit, static_argnums=0)
        def gradients(dispatch, params, x_BTD, mask_BT):
            layer = make_layer(dataclasses.replace(CONFIG, dispatch=dispatch), train=True)

            def loss(params, x_BTD):
                y_BTD, _ = layer.apply({"params": params}, x_BTD, Tokens(jnp.asarray(mask_BT)))
                return jnp.sum(jnp.square(y_BTD - 1))

            return jax.grad(loss, (0, 1))(params, x_BTD)

        gather, einsum = (gradients(name, params, x_BTD, mask_BT) for name in ("gather", "einsum"))
        assert_trees_close(gather, einsum, rtol=1e-5, atol=1e-5)
        # Every parameter learns, the router too: its gate multiplies the output.
        assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(gather[0]))
        # What got no slot has no gradient.
        _, kept_BT = layer_by_loop(params, x_BTD, mask_BT, ("relu",), TRAIN_CAPACITY)
        gradient_BTD = np.asarray(gather[1])
        np.testing.assert_array_equal(np.any(gradient_BTD != 0, axis=-1), kept_BT)


class TestRandomness:
    """With one expert the gate is 1, so only the expert's own input reaches the output."""

    ALONE = dataclasses.replace(DROPLESS, num_experts=1, group_size="row", jitter_noise=0.3)

    def test_jitter_touches_the_router_only_and_only_in_training(self):
        x_BTD, mask_BT = inputs()
        modes = {
            train: make_layer(self.ALONE, train=train, capture_router=True)
            for train in (False, True)
        }
        params = random_params(modes[False])
        rngs = {"jitter": jax.random.key(3)}
        y_BTD, stats = apply(modes[False], params, x_BTD, mask_BT)  # no rng needed
        noisy_y_BTD, noisy_stats = apply(modes[True], params, x_BTD, mask_BT, rngs)
        np.testing.assert_array_equal(noisy_y_BTD, y_BTD)
        assert np.abs(noisy_stats.logits - stats.logits).max() > 0.01
        expected = x_BTD @ np.asarray(params["router"]["kernel"])
        np.testing.assert_allclose(stats.logits, expected, rtol=1e-5, atol=1e-5)
        # Another key, other noise.
        other = apply(modes[True], params, x_BTD, mask_BT, {"jitter": jax.random.key(4)})[1]
        assert np.any(other.logits != noisy_stats.logits)

    def test_jitter_multiplies_each_element_by_1_plus_minus_epsilon(self):
        # Input 1 and kernel 1 at width 1: the logits are the factors themselves.
        layer = make_layer(self.ALONE, d_ff=2, train=True, capture_router=True)
        params = {
            "router": {"kernel": jnp.ones((1, 1))},
            "expert": {"wi": jnp.ones((1, 1, 2)), "wo": jnp.ones((1, 2, 1))},
        }
        rngs = {"jitter": jax.random.key(0)}
        _, stats = apply(layer, params, jnp.ones((16, 32, 1)), jnp.ones((16, 32), bool), rngs)
        factors = np.asarray(stats.logits)
        assert 0.7 <= factors.min() < 0.72 and 1.28 < factors.max() <= 1.3
        assert abs(factors.mean() - 1) < 0.05
        assert len(np.unique(factors)) > 500

    def test_expert_dropout_on_hidden_units_and_only_in_training(self):
        # Identity experts and positive input: hidden units are the input.
        config = dataclasses.replace(self.ALONE, jitter_noise=0.0, expert_dropout_rate=0.75)
        params = {
            "router": {"kernel": jnp.ones((D, 1))},
            "expert": {"wi": jnp.eye(D)[None], "wo": jnp.eye(D)[None]},
        }
        x_BTD, mask_BT = np.abs(inputs()[0]) + 0.1, everyone()
        y_BTD, _ = apply(make_layer(config, d_ff=D), params, x_BTD, mask_BT)
        np.testing.assert_allclose(y_BTD, x_BTD, rtol=1e-6)
        layer = make_layer(config, d_ff=D, train=True)
        y_BTD, _ = apply(layer, params, x_BTD, mask_BT, {"dropout": jax.random.key(0)})
        kept_BTD = np.asarray(y_BTD) != 0
        np.testing.assert_allclose(y_BTD, np.where(kept_BTD, 4 * x_BTD, 0), rtol=1e-6)
        assert 0.1 < kept_BTD.mean() < 0.4


class TestPrecision:
    def test_the_router_of_a_bfloat16_model_is_float32(self):
        layer = make_layer(capture_router=True)
        params = random_params(layer)
        x_BTD, mask_BT = inputs(jnp.bfloat16)
        y_BTD, stats = apply(layer, params, x_BTD, mask_BT)
        assert y_BTD.dtype == jnp.bfloat16
        assert all(
            leaf.dtype == jnp.float32
            for leaf in jax.tree.leaves(stats)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
        )
        # Products of the rounded input with the unrounded kernel.
        expected = x_BTD.astype(np.float64) @ params["router"]["kernel"].astype(np.float64)
        np.testing.assert_allclose(stats.logits, expected, rtol=1e-5, atol=1e-6)
        exact, _ = apply(layer, params, x_BTD.astype(np.float32), mask_BT)
        np.testing.assert_allclose(y_BTD.astype(np.float32), exact, rtol=0.1, atol=0.03)

    def test_float64(self):
        layer = make_layer(capture_router=True)
        params = random_params(layer)
        x_BTD, mask_BT = inputs(np.float64)
        with jax.enable_x64(True):
            y_BTD, stats = apply(layer, params, x_BTD, mask_BT)
        assert y_BTD.dtype == stats.logits.dtype == stats.load_balance.dtype == jnp.float64
        expected, _ = layer_by_loop(params, x_BTD, mask_BT, ("relu",), EVAL_CAPACITY)
        np.testing.assert_allclose(y_BTD, expected, rtol=1e-12, atol=1e-12)


class TestInvariance:
    def test_renaming_experts_renames_their_statistics_and_nothing_else(self):
        layer = make_layer()
        params, order = random_params(layer), np.asarray([3, 0, 4, 1, 2])
        renamed = {
            "router": {"kernel": params["router"]["kernel"][:, order]},
            "expert": {name: kernel[order] for name, kernel in params["expert"].items()},
        }
        y_BTD, stats = apply(layer, params, *inputs())
        renamed_y_BTD, renamed_stats = apply(layer, renamed, *inputs())
        np.testing.assert_allclose(renamed_y_BTD, y_BTD, rtol=1e-5, atol=1e-6)
        tokens_per_expert_E = stats.tokens_per_expert_E
        assert len(np.unique(tokens_per_expert_E)) > 2
        np.testing.assert_array_equal(renamed_stats.tokens_per_expert_E, tokens_per_expert_E[order])
        stats, renamed_stats = (
            s.replace(tokens_per_expert_E=tokens_per_expert_E) for s in (stats, renamed_stats)
        )
        assert_trees_close(renamed_stats, stats, rtol=1e-5)

    @pytest.mark.parametrize(
        ("group_size", "order"),
        [("row", [2, 0, 3, 1]), (9, [2, 0, 3, 1]), (3, [1, 3, 2, 0]), (18, [2, 3, 0, 1])],
    )
    def test_groups_do_not_see_each_other(self, group_size, order):
        # Whole groups change places: rows, thirds of rows, or pairs of rows.
        layer = make_layer(dataclasses.replace(CONFIG, group_size=group_size), train=True)
        params, (x_BTD, mask_BT) = random_params(layer), inputs()
        y_BTD, stats = apply(layer, params, x_BTD, mask_BT)
        moved_y_BTD, moved_stats = apply(layer, params, x_BTD[order], mask_BT[order])
        np.testing.assert_allclose(moved_y_BTD, y_BTD[np.asarray(order)], rtol=1e-5, atol=1e-6)
        assert_trees_close(moved_stats, stats, rtol=1e-5)
        assert stats.num_dropped_K.sum() > 0

    def test_what_is_in_the_padding_changes_nothing(self):
        layer = make_layer()
        params, (x_BTD, mask_BT) = random_params(layer), inputs()
        other_x_BTD = np.where(mask_BT[..., None], x_BTD, 7.0).astype(np.float32)
        first, second = (apply(layer, params, x, mask_BT) for x in (x_BTD, other_x_BTD))
        assert_trees_close(second, first, rtol=1e-6)

    def test_dropless_tokens_do_not_see_each_other(self):
        layer = make_layer(DROPLESS)
        params, (x_BTD, _) = random_params(layer), inputs()
        y_BTD, stats = apply(layer, params, x_BTD, everyone())
        assert stats.num_dropped_K.sum() == 0
        alone_BTD, _ = apply(layer, params, x_BTD.reshape(B * T, 1, D), everyone().reshape(-1, 1))
        np.testing.assert_allclose(alone_BTD.reshape(B, T, D), y_BTD, rtol=1e-5, atol=1e-6)


GROUPED = {
    "switch": {},
    "top_k": {"top_k": 3, "renormalize": "after_dropping"},
    "gshard": {
        "second_expert_policy": "threshold",
        "second_expert_threshold": 0.4,
        "renormalize": "after_dropping",
    },
    "loss_free": {"top_k": 2},
    "cosine": {"top_k": 2},
}


@pytest.mark.parametrize("router", GROUPED)
@pytest.mark.parametrize("expert_bias", [False, True])
def test_dropless_rows_equal_dropless_slots(router, expert_bias):
    x_BTD, mask_BT = inputs()
    fields = {"router": router, "expert_bias": expert_bias, **GROUPED[router]}

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(layer, params, x_BTD):
        def loss(params, x_BTD):
            known = Tokens(jnp.asarray(mask_BT))
            y_BTD, stats = layer.apply({"params": params}, x_BTD, known)
            return jnp.sum(jnp.square(y_BTD - 1)) + stats.load_balance_loss, (y_BTD, stats)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x_BTD)

    layers = {
        dispatch: make_layer(
            dataclasses.replace(DROPLESS, dispatch=dispatch, **fields), ("silu", "linear")
        )
        for dispatch in ("grouped", "gather", "auto")
    }
    params = random_params(layers["gather"])
    found = {name: gradients(layer, params, x_BTD) for name, layer in layers.items()}
    assert_trees_close(found["grouped"], found["gather"], rtol=2e-4, atol=2e-5)
    # One device and nothing to drop: "auto" is "grouped".
    assert_trees_close(found["auto"], found["grouped"], rtol=0, atol=0)
    assert found["grouped"][0][1][1].num_dropped_K.sum() == 0


class TestExperts:
    def test_shared_experts_see_every_token_with_weight_1(self):
        config = dataclasses.replace(CONFIG, num_shared_experts=2)
        layer = make_layer(config, train=True)
        params, (x_BTD, mask_BT) = random_params(layer), inputs()
        assert params["shared_expert"]["wi"].shape == (1, D, 2 * F)
        y_BTD, _ = apply(layer, params, x_BTD, mask_BT)
        routed = {name: params[name] for name in ("router", "expert")}
        routed_BTD, _ = apply(make_layer(train=True), routed, x_BTD, mask_BT)
        hidden = np.maximum(x_BTD @ params["shared_expert"]["wi"][0], 0)
        expected = routed_BTD + hidden @ params["shared_expert"]["wo"][0]
        np.testing.assert_allclose(y_BTD, expected, rtol=1e-4, atol=1e-5)

    def test_experts_may_have_widths_and_activations_of_their_own(self):
        config = dataclasses.replace(CONFIG, expert_d_ff=3, expert_activations=("silu", "linear"))
        layer = make_layer(config)
        params, (x_BTD, mask_BT) = random_params(layer), inputs()
        shapes = {name: leaf.shape for name, leaf in params["expert"].items()}
        assert shapes == {"wi_0": (E, D, 3), "wi_1": (E, D, 3), "wo": (E, 3, D)}
        same = make_layer(activations=("silu", "linear"), d_ff=3)
        ours, theirs = (apply(each, params, x_BTD, mask_BT)[0] for each in (layer, same))
        np.testing.assert_array_equal(ours, theirs)


def test_straight_through_the_router_learns_from_every_expert():
    # The output is that of the K; the router's gradient is that of Σ_e p_e E_e(x) with the
    # experts' outputs held fixed, which reaches experts without a slot too.
    fields = {"router": "top_k", "top_k": 2, "dispatch": "gather"}
    config = dataclasses.replace(CONFIG, straight_through=True, **fields)
    layer, plain = (
        make_layer(each, train=True)
        for each in (config, dataclasses.replace(config, straight_through=False))
    )
    params, (x_BTD, mask_BT) = random_params(layer), inputs()
    x_BTD, params = jax.tree.map(jnp.asarray, (x_BTD, params))
    known = Tokens(jnp.asarray(mask_BT))
    cotangent_BTD = np.random.default_rng(7).normal(size=x_BTD.shape)

    def loss(layer):
        def total(params):
            return jnp.sum(layer.apply({"params": params}, x_BTD, known)[0] * cotangent_BTD)

        return jax.value_and_grad(total)(params)

    (value, gradient), (plain_value, plain_gradient) = loss(layer), loss(plain)
    np.testing.assert_allclose(value, plain_value, rtol=1e-5)
    assert_trees_close(gradient["expert"], plain_gradient["expert"], rtol=1e-4, atol=1e-6)
    outputs_EBTD = np.stack(
        [
            np.maximum(x_BTD @ params["expert"]["wi"][e], 0) @ params["expert"]["wo"][e]
            for e in range(E)
        ]
    )

    def dense(kernel):
        probs_BTE = jax.nn.softmax(x_BTD @ kernel) * mask_BT[..., None]
        return jnp.einsum("bte,ebtd,btd->", probs_BTE, outputs_EBTD, cotangent_BTD)

    expected = jax.grad(dense)(params["router"]["kernel"])
    np.testing.assert_allclose(gradient["router"]["kernel"], expected, rtol=1e-3, atol=1e-4)
    assert np.abs(plain_gradient["router"]["kernel"] - expected).max() > 0.1


def test_routers_that_need_more_than_states_say_so():
    x_BTD, mask_BT = map(jnp.asarray, inputs())
    for router, what in (("hash", "the ids of the tokens"), ("task", "the task of every token")):
        layer = make_layer(dataclasses.replace(CONFIG, router=router))
        with pytest.raises(UserError, match=f"MoeConfig.router = '{router}' needs {what}"):
            layer.init(jax.random.key(0), x_BTD, Tokens(mask_BT))
    layer = make_layer(dataclasses.replace(CONFIG, router="sentence", group_size=3))
    with pytest.raises(UserError, match="group_size = 3: router 'sentence' needs whole rows"):
        layer.init(jax.random.key(0), x_BTD, Tokens(mask_BT))


def test_route_padding_makes_padding_ordinary_tokens():
    x_BTD, mask_BT = inputs()
    routed = make_layer(dataclasses.replace(CONFIG, route_padding=True))
    params = random_params(routed)
    padded = apply(routed, params, x_BTD, mask_BT)
    ordinary = apply(make_layer(), params, x_BTD, everyone())
    assert_trees_close(padded, ordinary, rtol=1e-6)
    y_BTD, stats = padded
    assert stats.num_tokens == B * T
    assert np.any(np.asarray(y_BTD)[~mask_BT] != 0)
    # The slots that padding took are missed by others.
    masked_y_BTD, _ = apply(make_layer(), params, x_BTD, mask_BT)
    lost_BT = np.all(np.asarray(y_BTD) == 0, -1) & np.any(np.asarray(masked_y_BTD) != 0, -1)
    assert lost_BT.any()


@pytest.mark.parametrize("group_size", [20, 3, "row"])
def test_capture_router(group_size):
    config = dataclasses.replace(CONFIG, group_size=group_size)
    layer = make_layer(config, capture_router=True)
    params, (x_BTD, mask_BT) = random_params(layer), inputs()
    y_BTD, stats = apply(layer, params, x_BTD, mask_BT)
    assert stats.logits.shape == (B, T, E)
    assert stats.expert_index.shape == stats.gate.shape == stats.kept.shape == (B, T, 1)
    logits_BTE = x_BTD @ params["router"]["kernel"]
    exponentials_BTE = np.exp(logits_BTE)
    np.testing.assert_allclose(stats.logits, logits_BTE, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(stats.expert_index[..., 0], logits_BTE.argmax(-1))
    gate_BT = exponentials_BTE.max(-1) / exponentials_BTE.sum(-1)
    np.testing.assert_allclose(stats.gate[..., 0], gate_BT, rtol=1e-5)
    assert stats.kept.dtype == bool and stats.kept.sum() == 31 - stats.num_dropped_K.sum()
    # The same without it, but for the fields per token.
    plain_y_BTD, plain = apply(make_layer(config), params, x_BTD, mask_BT)
    np.testing.assert_array_equal(plain_y_BTD, y_BTD)
    assert plain.logits is plain.expert_index is plain.gate is plain.kept is None


class TestParameters:
    @pytest.mark.parametrize(
        ("activations", "names"), [(("relu",), ["wi"]), (("gelu", "linear"), ["wi_0", "wi_1"])]
    )
    def test_names_shapes_and_axes(self, activations, names):
        config = dataclasses.replace(CONFIG, router_bias=True)
        layer = make_layer(config, activations)
        x_BTD, mask_BT = inputs()
        known = Tokens(jnp.asarray(mask_BT))
        boxed = jax.eval_shape(layer.init, jax.random.key(0), x_BTD, known)["params"]
        shapes = jax.tree.map(lambda leaf: leaf.shape, nn.unbox(boxed))
        assert shapes == {
            "router": {"kernel": (D, E), "bias": (E,)},
            "expert": {"wo": (E, F, D)} | {name: (E, D, F) for name in names},
        }
        assert logical_axes(boxed) == {
            "router": {"kernel": P("embed", "experts"), "bias": P("experts")},
            "expert": {"wo": P("expert", "mlp", "expert_embed")}
            | {name: P("expert", "expert_embed", "mlp") for name in names},
        }
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(boxed))

    def test_router_bias_is_added_to_the_logits(self):
        biased = make_layer(dataclasses.replace(CONFIG, router_bias=True), capture_router=True)
        params = random_params(biased)
        params["router"]["bias"] = np.arange(E, dtype=np.float32)
        without = {"router": {"kernel": params["router"]["kernel"]}, "expert": params["expert"]}
        _, stats = apply(biased, params, *inputs())
        _, unbiased = apply(make_layer(capture_router=True), without, *inputs())
        np.testing.assert_allclose(
            stats.logits - unbiased.logits, np.broadcast_to(np.arange(E), (B, T, E)), atol=1e-5
        )
        assert np.any(stats.expert_index != unbiased.expert_index)

    def test_initial_spread(self):
        # Variance init_scale / fan_in, of each expert on its own; the router N(0, 0.02²).
        width, hidden = 64, 256
        layer = MoeLayer(MoeConfig(num_experts=4), hidden, ("relu",), init_scale=0.1)
        arguments = (jnp.ones((1, 1, width)), Tokens(jnp.ones((1, 1), bool)))
        params = nn.unbox(jax.jit(layer.init)(jax.random.key(0), *arguments))["params"]
        for name, fan_in in (("wi", width), ("wo", hidden)):
            kernel = np.asarray(params["expert"][name])
            np.testing.assert_allclose(kernel.std(axis=(1, 2)), (0.1 / fan_in) ** 0.5, rtol=0.03)
            assert np.abs(kernel).max() < 2.5 * (0.1 / fan_in) ** 0.5  # truncated
            assert np.abs(kernel[0] - kernel[1]).mean() > 0.5 * kernel.std()
        np.testing.assert_allclose(np.std(params["router"]["kernel"]), 0.02, rtol=0.2)


def test_every_activation_makes_an_expert():
    x = np.linspace(-3, 3, 13)
    for name, function in ACTIVATIONS.items():
        np.testing.assert_allclose(
            function(jnp.asarray(x, jnp.float32)), activation(name, x), atol=1e-6, err_msg=name
        )
