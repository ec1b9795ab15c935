"""The encoder-decoder: against NumPy, and everything that must not change its numbers."""

import dataclasses
import functools

import flax.errors
import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from switchx.models.config import ModelConfig
from switchx.models.layers import relative_position_buckets
from switchx.models.stacking import stack_layers
from switchx.models.t5 import T5, Stack, output_head
from switchx.moe.assignment import Tokens
from switchx.moe.config import MoeConfig
from switchx.moe.routing import ROUTERS

B, S, T, V, D, E = 3, 8, 6, 37, 10, 5
DROPLESS = MoeConfig(
    num_experts=E, capacity_factor=None, eval_capacity_factor=None, jitter_noise=0.0
)
# Rows compete for slots two by two or alone, and some go without.
TIGHT = MoeConfig(
    num_experts=E,
    capacity_factor=0.5,
    eval_capacity_factor=0.5,
    min_capacity=0,
    group_size="row",
    jitter_noise=0.0,
)
DENSE = ModelConfig(
    vocab_size=V,
    d_model=D,
    d_ff=12,
    num_heads=3,
    head_dim=4,
    num_encoder_layers=2,
    num_decoder_layers=2,
    dtype="float64",
)
SPARSE = dataclasses.replace(DENSE, moe=DROPLESS)
GATED = dataclasses.replace(
    SPARSE, activations=("gelu", "linear"), tie_embeddings=False, scale_logits=False
)
ONE = jnp.zeros((1, 1), jnp.int32)


@pytest.fixture(autouse=True)
def x64():
    """Everything in 64 bits, so that equal means equal to ten digits."""
    with jax.enable_x64(True):
        yield


def tokens(length, seed=0, rows=B):
    generator = np.random.default_rng(seed)
    return jnp.asarray(generator.integers(1, V, (rows, length)), jnp.int32)


def real(length, *lengths):
    """Mask of rows that hold this many tokens and then padding."""
    return jnp.arange(length)[None] < jnp.asarray(lengths)[:, None]


@functools.partial(jax.jit, static_argnames=("model", "train", "capture_router"))
def apply(model, params, encoder_tokens, decoder_tokens, rngs=None, **inputs):
    variables = {"params": params}
    return model.apply(variables, encoder_tokens, decoder_tokens, rngs=rngs, **inputs)


def assert_close(actual, expected, tolerance=1e-10):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def assert_trees_close(actual, expected, tolerance=1e-9):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, tolerance)


class NumpyT5:
    """One source and one target without padding, in plain NumPy; no capacity."""

    def __init__(self, params, config):
        self.params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        self.config = config

    def norm(self, params, x):
        root = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + self.config.layer_norm_epsilon)
        return x / root * params["scale"]

    def attention(self, params, queries, keys, bias):
        def heads(x, name):
            return (x @ params[name]["kernel"]).reshape(len(x), -1, self.config.head_dim)

        q, k, v = heads(queries, "query"), heads(keys, "key"), heads(keys, "value")
        weights = np.exp(np.einsum("thp,shp->hts", q, k) + bias)
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("hts,shp->thp", weights, v).reshape(len(q), -1) @ params["out"]["kernel"]

    def feed_forward(self, kernels, x):
        if "wi" in kernels:
            return np.maximum(x @ kernels["wi"], 0) @ kernels["wo"]
        a, b = x @ kernels["wi_0"], x @ kernels["wi_1"]
        a = a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))) / 2
        return (a * b) @ kernels["wo"]

    def mlp(self, params, x):
        if "router" not in params:
            return self.feed_forward({name: params[name]["kernel"] for name in params}, x)
        rows = []
        for token in x:
            odds = np.exp(token @ params["router"]["kernel"])
            expert = odds.argmax()
            kernels = {name: kernel[expert] for name, kernel in params["expert"].items()}
            rows.append(odds[expert] / odds.sum() * self.feed_forward(kernels, token))
        return np.stack(rows)

    def stack(self, params, x, encoded=None):
        decoder = encoded is not None
        name = "self_attention" if decoder else "attention"
        buckets = relative_position_buckets(
            len(x), len(x), bidirectional=not decoder, num_buckets=32, max_distance=128
        )
        bias = params["relpos_bias"]["rel_embedding"][:, buckets]
        if decoder:
            bias = np.where(np.tri(len(x), dtype=bool), bias, -np.inf)
        for layer in range(sum(name.startswith("layers_") for name in params)):
            p = params[f"layers_{layer}"]
            h = self.norm(p[f"pre_{name}_layer_norm"], x)
            x = x + self.attention(p[name], h, h, bias)
            if decoder:
                h = self.norm(p["pre_cross_attention_layer_norm"], x)
                x = x + self.attention(p["encoder_decoder_attention"], h, encoded, 0)
            x = x + self.mlp(p["mlp"], self.norm(p["pre_mlp_layer_norm"], x))
        return self.norm(params["final_layer_norm"], x)

    def __call__(self, source, target):
        table = self.params["token_embedder"]["embedding"]
        encoded = self.stack(self.params["encoder"], table[np.asarray(source)])
        decoded = self.stack(self.params["decoder"], table[np.asarray(target)], encoded)
        if self.config.scale_logits:
            decoded = decoded / np.sqrt(self.config.d_model)
        head = table.T
        if not self.config.tie_embeddings:
            head = self.params["logits_dense"]["kernel"]
        return encoded, decoded, decoded @ head


@pytest.mark.parametrize("config", [DENSE, SPARSE, GATED], ids=["dense", "sparse", "gated-untied"])
def test_equals_numpy(config, random_params):
    model = T5(config)
    params = random_params(model, ONE, ONE)
    encoder_tokens, decoder_tokens = tokens(S), tokens(T, seed=1)
    lengths = {"encoder": (8, 5, 1), "decoder": (2, 6, 4)}
    output = apply(
        model,
        params,
        encoder_tokens,
        decoder_tokens,
        encoder_mask=real(S, *lengths["encoder"]),
        decoder_mask=real(T, *lengths["decoder"]),
    )
    by_hand = NumpyT5(params, config)
    for row, (s, t) in enumerate(zip(*lengths.values(), strict=True)):
        encoded, decoded, logits = by_hand(encoder_tokens[row, :s], decoder_tokens[row, :t])
        assert_close(output.encoded[row, :s], encoded)
        assert_close(output.decoded[row, :t], decoded)
        assert_close(output.logits[row, :t], logits)
    assert output.logits.shape == (B, T, V)


# Every router that a decoder may use.
CAUSAL = [name for name, scheme in ROUTERS.items() if scheme.causal]


class TestCausality:
    """Position t of the decoder is a function of the positions up to t."""

    @staticmethod
    def jacobian(config, causal, random_params):
        """|d output_t / d input_s| summed over widths, [T, T], of one row through a stack."""
        stack = Stack(config, config.decoder_sparse, causal=causal)
        rng = np.random.default_rng(0)
        x_1TD, encoded_1SD = rng.normal(size=(1, T, D)), rng.normal(size=(1, S, D))
        x_1TD, encoded_1SD, projection_D = map(
            jnp.asarray, (x_1TD, encoded_1SD, rng.normal(size=D))
        )
        cross = (encoded_1SD, jnp.ones((1, 1, 1, S), bool)) if causal else ()
        known = Tokens(jnp.ones((1, T), bool), tokens(T, rows=1), None, jnp.zeros((1, T), int))
        arguments = (known, *cross)
        params = random_params(stack, x_1TD, *arguments, train=False)

        def project(x_1TD, params):
            y_1TD, _, stats = stack.apply({"params": params}, x_1TD, *arguments, train=False)
            return y_1TD[0] @ projection_D, stats

        jacobian, stats = jax.jit(jax.jacrev(project, has_aux=True))(x_1TD, params)
        return np.abs(jacobian).sum(axis=(1, 3)), stats

    @pytest.mark.parametrize("router", CAUSAL)
    @pytest.mark.parametrize("moe", [DROPLESS, TIGHT], ids=["dropless", "tight"])
    def test_by_gradient(self, router, moe, random_params):
        top_k = {} if "top_k" not in ROUTERS[router].fields else {"top_k": 2}
        moe = dataclasses.replace(moe, router=router, **top_k)
        jacobian, stats = self.jacobian(
            dataclasses.replace(DENSE, moe=moe, sparse_every=1), True, random_params
        )
        np.testing.assert_array_equal(jacobian > 0, np.tri(T, dtype=bool))
        assert (stats[0].num_dropped_K.sum() > 0) == (moe.capacity_factor is not None)

    def test_the_encoder_is_not_causal(self, random_params):
        jacobian, _ = self.jacobian(SPARSE, False, random_params)
        assert np.all(jacobian > 0)

    @pytest.mark.parametrize("router", CAUSAL)
    def test_no_slot_is_lost_to_a_later_token(self, router, random_params):
        # What a gradient cannot see: a token that takes another's slot.
        top_k = {} if "top_k" not in ROUTERS[router].fields else {"top_k": 2}
        moe = dataclasses.replace(TIGHT, router=router, **top_k)
        model = T5(dataclasses.replace(DENSE, moe=moe, sparse_every=1))
        tasks = {"encoder_task_ids": ONE, "decoder_task_ids": ONE}
        params = random_params(model, ONE, ONE, **tasks)
        encoder_tokens, decoder_tokens = tokens(S), tokens(T, seed=1)
        masks = {"encoder_mask": real(S, S, S, S), "decoder_mask": real(T, T, T, T)}
        for stack, length in (("encoder", S), ("decoder", T)):
            masks[f"{stack}_task_ids"] = jnp.zeros((B, length), int)
        output = apply(model, params, encoder_tokens, decoder_tokens, **masks)
        assert sum(stats.num_dropped_K.sum() for stats in output.router["decoder"]) > 0
        for first in range(1, T):
            changed = decoder_tokens.at[:, first:].set(tokens(T, seed=2)[:, first:])
            logits = apply(model, params, encoder_tokens, changed, **masks).logits
            np.testing.assert_array_equal(logits[:, :first], output.logits[:, :first])
            assert np.all(logits[:, first:] != output.logits[:, first:])


class TestPackingAndPadding:
    def test_two_examples_in_a_row_equal_two_rows(self, random_params):
        model = T5(SPARSE)
        params = random_params(model, ONE, ONE)
        (a, b, c, d, e, f, g), (p, q, r, s, t) = np.asarray(tokens(7, rows=1))[0], range(1, 6)
        output = apply(
            model,
            params,
            jnp.asarray([[a, b, c, d, e, f, g, 9], [a, b, c, *[9] * 5], [d, e, f, g, *[9] * 4]]),
            jnp.asarray([[p, q, r, s, t, 9], [p, q, *[9] * 4], [r, s, t, *[9] * 3]]),
            encoder_segment_ids=jnp.asarray(
                [[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, *[0] * 5], [1, 1, 1, 1, *[0] * 4]]
            ),
            decoder_segment_ids=jnp.asarray(
                [[1, 1, 2, 2, 2, 0], [1, 1, *[0] * 4], [1, 1, 1, *[0] * 3]]
            ),
        )
        assert_close(output.encoded[0, :3], output.encoded[1, :3])
        assert_close(output.encoded[0, 3:7], output.encoded[2, :4])
        assert_close(output.logits[0, :2], output.logits[1, :2])
        assert_close(output.logits[0, 2:5], output.logits[2, :3])
        assert output.router["encoder"][0].num_tokens == 7 + 3 + 4
        assert output.router["decoder"][0].num_tokens == 5 + 2 + 3

    def test_what_is_in_the_padding_changes_nothing(self, random_params):
        # Tight: padding must not take slots either.
        model = T5(dataclasses.replace(DENSE, moe=TIGHT, sparse_every=1))
        params = random_params(model, ONE, ONE)
        encoder_mask, decoder_mask = real(S, 8, 5, 2), real(T, 3, 6, 1)
        masks = {"encoder_mask": encoder_mask, "decoder_mask": decoder_mask}
        encoder_tokens, decoder_tokens = tokens(S), tokens(T, seed=1)
        output = apply(model, params, encoder_tokens, decoder_tokens, **masks)
        other = apply(
            model,
            params,
            jnp.where(encoder_mask, encoder_tokens, tokens(S, seed=2)),
            jnp.where(decoder_mask, decoder_tokens, tokens(T, seed=3)),
            **masks,
        )
        assert sum(stats.num_dropped_K.sum() for stats in output.router["encoder"]) > 0
        assert_close(other.encoded[encoder_mask], output.encoded[encoder_mask])
        assert_close(other.logits[decoder_mask], output.logits[decoder_mask])
        assert_trees_close(other.router, output.router)

    def test_masks_come_from_segment_ids_or_are_full(self, random_params):
        model = T5(SPARSE)
        params = random_params(model, ONE, ONE)
        inputs = (model, params, tokens(S), tokens(T, seed=1))

        def counts(output):
            return [output.router[stack][0].num_tokens for stack in ("encoder", "decoder")]

        assert counts(apply(*inputs)) == [B * S, B * T]
        encoder_mask, decoder_mask = real(S, 8, 5, 2), real(T, 3, 6, 1)
        masked = apply(*inputs, encoder_mask=encoder_mask, decoder_mask=decoder_mask)
        segmented = apply(
            *inputs,
            encoder_segment_ids=encoder_mask.astype(jnp.int64),
            decoder_segment_ids=decoder_mask.astype(jnp.int64),
        )
        assert counts(masked) == counts(segmented) == [8 + 5 + 2, 3 + 6 + 1]
        assert_close(segmented.logits[decoder_mask], masked.logits[decoder_mask])
        assert_trees_close(segmented.router, masked.router)


PATTERNS = {
    "mixed": {"num_encoder_layers": 4},
    "bottom": {"num_encoder_layers": 4, "sparse_layout": "bottom"},
    "irregular": {"num_encoder_layers": 5, "encoder_sparse_layers": (1, 3, 4)},
}


def objective(y, stats):
    losses = (layer.load_balance_loss + layer.router_z_loss for layer in stats)
    return jnp.sum(jnp.sin(y)) + sum(losses), (y, stats)


@functools.partial(jax.jit, static_argnames="config")
def encoder_gradients(config, params, x_BSD):
    def loss(params, x_BSD):
        stack = Stack(config, config.encoder_sparse, causal=False)
        known = Tokens(jnp.ones((B, S), bool))
        y_BSD, _, stats = stack.apply({"params": params}, x_BSD, known, train=True)
        return objective(y_BSD, stats)

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x_BSD)


@functools.partial(jax.jit, static_argnames="config")
def model_gradients(config, params, encoder_tokens, decoder_tokens):
    def loss(params):
        variables = {"params": params}
        output = T5(config).apply(variables, encoder_tokens, decoder_tokens, train=True)
        return objective(output.logits, output.router["encoder"] + output.router["decoder"])

    return jax.value_and_grad(loss, has_aux=True)(params)


def pattern_config(name, **fields):
    return dataclasses.replace(DENSE, moe=TIGHT, **PATTERNS[name], **fields)


@pytest.fixture(scope="module")
def unrolled(random_params):
    """Parameters, input and result of the plain encoder, by the name of the pattern."""

    @functools.cache
    def compute(name):
        config = pattern_config(name)
        params = random_params(T5(config), ONE, ONE)["encoder"]
        x_BSD = jnp.asarray(np.random.default_rng(0).normal(size=(B, S, D)))
        return params, x_BSD, encoder_gradients(config, params, x_BSD)

    return compute


class TestScanAndRemat:
    """Layers compiled once or one by one, kept or computed again: the same numbers."""

    @pytest.mark.parametrize(
        ("name", "scan_layers", "remat"),
        [
            ("mixed", False, "full"),
            ("mixed", True, "none"),
            ("bottom", True, "full"),
            ("irregular", True, "dots"),
        ],
    )
    def test_encoder(self, unrolled, name, scan_layers, remat):
        params, x_BSD, ((loss, (y_BSD, stats)), (gradients, x_gradient)) = unrolled(name)
        # Everything learns, and something was dropped.
        assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(gradients))
        assert sum(layer.num_dropped_K.sum() for layer in stats) > 0
        config = pattern_config(name, scan_layers=scan_layers, remat=remat)
        if scan_layers:
            params, gradients = (self.stack_encoder(tree, name) for tree in (params, gradients))
        result = encoder_gradients(config, params, x_BSD)
        expected = (loss, (y_BSD, stats)), (gradients, x_gradient)
        assert_trees_close(result, expected)

    def stack_encoder(self, layers, name):
        # `stack_layers` wants a decoder: the encoder's twin stands in.
        config = pattern_config(name)
        twin = dataclasses.replace(
            config,
            num_decoder_layers=config.num_encoder_layers,
            decoder_sparse_layers=config.encoder_sparse_layers,
        )
        return stack_layers({"encoder": layers, "decoder": layers}, twin)["encoder"]

    def test_model(self, random_params):
        config = dataclasses.replace(
            pattern_config("mixed"), num_encoder_layers=1, num_decoder_layers=4
        )
        params = random_params(T5(config), ONE, ONE)
        inputs = (tokens(S), tokens(T, seed=1))
        (loss, aux), gradients = model_gradients(config, params, *inputs)
        assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(gradients))
        params, gradients = stack_layers(params, config), stack_layers(gradients, config)
        config = dataclasses.replace(config, scan_layers=True, remat="full")
        result = model_gradients(config, params, *inputs)
        assert_trees_close(result, ((loss, aux), gradients))


class TestRouterStatistics:
    """Six encoder layers, two blocks of dense, sparse, sparse; one sparse decoder layer."""

    CONFIG = dataclasses.replace(
        SPARSE,
        num_encoder_layers=6,
        encoder_sparse_layers=(1, 2, 4, 5),
        num_decoder_layers=1,
        decoder_sparse_layers=(0,),
        moe=dataclasses.replace(DROPLESS, router_bias=True, jitter_noise=0.3),
        scan_layers=True,
    )

    def params(self, random_params, change):
        """Parameters stacked for the scan, after `change` of each leaf of the layers by name."""
        params = random_params(T5(dataclasses.replace(self.CONFIG, scan_layers=False)), ONE, ONE)
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: change([part.key for part in path], leaf), params
        )
        return stack_layers(params, self.CONFIG)

    def test_one_for_each_sparse_layer_in_order_of_depth(self, random_params):
        # A bias sends every token of the n-th sparse layer to expert n.
        names = {"encoder": ["layers_1", "layers_2", "layers_4", "layers_5"]}
        names["decoder"] = ["layers_0"]

        def send(path, leaf):
            if path[-2:] == ["router", "bias"]:
                return 100 * np.eye(E, dtype=np.float32)[names[path[0]].index(path[1])]
            return leaf

        params = self.params(random_params, send)
        output = apply(T5(self.CONFIG), params, tokens(S), tokens(T), capture_router=True)
        assert set(output.router) == {"encoder", "decoder"}
        for stack, length in (("encoder", S), ("decoder", T)):
            assert len(output.router[stack]) == len(names[stack])
            for n, stats in enumerate(output.router[stack]):
                np.testing.assert_array_equal(stats.tokens_per_expert_E, B * length * np.eye(E)[n])
                assert stats.num_tokens.shape == ()
                assert stats.logits.shape == (B, length, E)
                assert stats.expert_index.shape == (B, length, 1)
                assert stats.gate.shape == stats.kept.shape == (B, length, 1)

    def test_every_layer_draws_its_own_noise(self, random_params):
        # Layers that add nothing and have equal routers see equal inputs: only noise differs.
        kernel = np.random.default_rng(0).normal(size=(D, E)).astype(np.float32)

        def silence(path, leaf):
            if path[-2:] == ["router", "kernel"]:
                return kernel
            if path[-1] in ("scale", "bias"):
                return np.full_like(leaf, path[-1] == "scale")
            return np.zeros_like(leaf) if {"out", "wo"} & set(path) else leaf

        params = self.params(random_params, silence)
        inputs = (T5(self.CONFIG), params, tokens(S), tokens(T))
        quiet = [stats.logits for stats in apply(*inputs, capture_router=True).router["encoder"]]
        rngs = {"jitter": jax.random.key(0)}
        output = apply(*inputs, rngs, train=True, capture_router=True)
        noisy = [stats.logits for stats in output.router["encoder"]]
        for n in range(4):
            assert_close(quiet[n], quiet[0])
            assert np.abs(noisy[n] - quiet[0]).max() > 0.1
            for m in range(n):
                assert np.abs(noisy[n] - noisy[m]).max() > 0.1

    def test_dense_models_have_none_and_tokens_are_kept_on_demand(self):
        def fields(config):
            model = T5(config)
            output = model.init_with_output(jax.random.key(0), ONE, ONE)[0]
            return {name: [vars(s) for s in stack] for name, stack in output.router.items()}

        assert jax.eval_shape(lambda: fields(DENSE)) == {"encoder": [], "decoder": []}
        layers = jax.eval_shape(lambda: fields(SPARSE))
        assert len(layers["encoder"]) == len(layers["decoder"]) == 1
        for name in ("logits", "expert_index", "gate", "kept"):
            assert layers["encoder"][0][name] is None


class TestHead:
    @pytest.mark.parametrize("tie", [True, False])
    def test_matrix(self, tie, random_params):
        model = T5(dataclasses.replace(DENSE, tie_embeddings=tie))
        params = random_params(model, ONE, ONE)
        embedding_VD = params["token_embedder"]["embedding"]
        if tie:
            assert "logits_dense" not in params
            expected_VD = embedding_VD
        else:
            assert params["logits_dense"]["kernel"].shape == (D, V)
            expected_VD = params["logits_dense"]["kernel"].T
        np.testing.assert_array_equal(output_head(params), expected_VD)
        decoded_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)))

        @jax.jit
        def logits(params, decoded_BTD):
            return model.apply({"params": params}, decoded_BTD, method="logits")

        assert_close(logits(params, decoded_BTD), np.asarray(decoded_BTD) @ expected_VD.T)


def test_features_encode_and_decode_are_the_parts_of_the_whole(random_params):
    model = T5(SPARSE)
    params = random_params(model, ONE, ONE)
    encoder_tokens, decoder_tokens, encoder_mask = tokens(S), tokens(T, seed=1), real(S, 8, 5, 2)
    masks = {"encoder_mask": encoder_mask, "decoder_mask": real(T, T, T, T)}
    whole = apply(model, params, encoder_tokens, decoder_tokens, **masks)

    @jax.jit
    def in_parts(params):
        variables = {"params": params}
        features = model.apply(
            variables, encoder_tokens, decoder_tokens, **masks, method="features"
        )
        encoded_BSD = model.apply(
            variables, encoder_tokens, encoder_mask=encoder_mask, method="encode"
        )
        decoded_BTD, stats = model.apply(
            variables, decoder_tokens, encoded_BSD, encoder_mask=encoder_mask, method="decode"
        )
        logits_BTV = model.apply(variables, decoded_BTD, method="logits")
        return features, encoded_BSD, decoded_BTD, stats, logits_BTV

    features, encoded_BSD, decoded_BTD, stats, logits_BTV = in_parts(params)
    assert features.logits is None
    assert_trees_close(features.replace(logits=whole.logits), whole)
    assert_close(encoded_BSD, whole.encoded)
    assert_close(decoded_BTD, whole.decoded)
    assert_trees_close(stats, whole.router["decoder"])
    assert_close(logits_BTV, whole.logits)


class TestDtype:
    @pytest.mark.parametrize(
        ("dtype", "wide"),
        [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")],
    )
    @pytest.mark.parametrize("config", [SPARSE, GATED], ids=["tied", "untied"])
    def test_activations_have_it_and_the_rest_is_wide(self, config, dtype, wide):
        model = T5(dataclasses.replace(config, dtype=dtype))

        def dtypes():
            output, variables = model.init_with_output(jax.random.key(0), tokens(S), tokens(T))
            leaves = {
                "logits": output.logits,
                "activations": (output.decoded, output.encoded),
                "router": jax.tree.leaves(output.router),
                "params": jax.tree.leaves(variables),
            }
            seen.update(
                {name: {leaf.dtype for leaf in jax.tree.leaves(x)} for name, x in leaves.items()}
            )

        seen = {}
        with jax.enable_x64(dtype == "float64"):
            jax.eval_shape(dtypes)
        assert seen == {
            "logits": {jnp.dtype(wide)},
            "activations": {jnp.dtype(dtype)},
            "router": {jnp.dtype(wide)},
            "params": {jnp.dtype("float32")},
        }

    def test_narrow_is_near_wide(self, random_params):
        config = dataclasses.replace(DENSE, num_encoder_layers=1, num_decoder_layers=1)
        params = random_params(T5(config), ONE, ONE)
        inputs = (tokens(S), tokens(T, seed=1))
        exact = apply(T5(config), params, *inputs).logits
        for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.1)):
            model = T5(dataclasses.replace(config, dtype=dtype))
            error = np.abs(apply(model, params, *inputs).logits - exact).max()
            assert 0 < error < tolerance * np.abs(exact).max()


def random_draws(jaxpr: jax.extend.core.Jaxpr) -> int:
    """How many arrays of random bits a program draws."""
    total = sum(equation.primitive.name == "random_bits" for equation in jaxpr.eqns)
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for nested in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(nested, jax.extend.core.ClosedJaxpr):
                    nested = nested.jaxpr
                if isinstance(nested, jax.extend.core.Jaxpr):
                    total += random_draws(nested)
    return total


class TestRandomness:
    ONE_LAYER = dataclasses.replace(DENSE, num_encoder_layers=1, num_decoder_layers=1)
    JITTERED = dataclasses.replace(
        ONE_LAYER, sparse_every=1, moe=dataclasses.replace(DROPLESS, jitter_noise=0.01)
    )

    @staticmethod
    def trace(config, *streams, train=True):
        """The traced program, given keys for these streams only."""
        model = T5(config)
        params = nn.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), ONE, ONE)))
        rngs = {stream: jax.random.key(1) for stream in streams}
        return jax.make_jaxpr(lambda p: model.apply(p, ONE, ONE, train=train, rngs=rngs))(params)

    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            (ONE_LAYER, 0),
            # Encoder: embedding; attention weights, attention, hidden, feed-forward; output: 6.
            # Decoder: the same, and weights and output of the cross-attention: 8.
            (dataclasses.replace(ONE_LAYER, dropout_rate=0.1), 14),
            # Sparse layers: no dropout on hidden units unless experts have their own rate.
            (dataclasses.replace(JITTERED, dropout_rate=0.1), 12 + 2),
            (JITTERED, 2),
            (
                dataclasses.replace(
                    JITTERED, moe=dataclasses.replace(DROPLESS, expert_dropout_rate=0.4)
                ),
                2,
            ),
        ],
        ids=["none", "dropout", "dropout-jitter", "jitter", "expert-dropout"],
    )
    def test_draws(self, config, expected):
        assert random_draws(self.trace(config, "dropout", "jitter").jaxpr) == expected
        assert random_draws(self.trace(config, train=False).jaxpr) == 0

    @pytest.mark.parametrize(
        ("config", "stream"),
        [
            (dataclasses.replace(ONE_LAYER, dropout_rate=0.1), "dropout"),
            (JITTERED, "jitter"),
            (dataclasses.replace(JITTERED, scan_layers=True), "jitter"),
        ],
        ids=["dropout", "jitter", "scanned"],
    )
    def test_only_the_streams_in_use_are_needed(self, config, stream):
        self.trace(config, stream)
        with pytest.raises(flax.errors.InvalidRngError, match=stream):
            self.trace(config)

    def test_a_key_decides(self, random_params):
        model = T5(dataclasses.replace(self.JITTERED, dropout_rate=0.3))
        params = random_params(model, ONE, ONE)
        inputs = (model, params, tokens(S), tokens(T, seed=1))
        keys = [jax.random.key(n, impl="rbg") for n in (0, 0, 1)]  # faster to compile
        rngs = [{"dropout": key, "jitter": key} for key in keys]
        first, again, other = (apply(*inputs, keys, train=True).logits for keys in rngs)
        np.testing.assert_array_equal(first, again)
        assert np.any(first != other)


def test_parameter_names():
    # T5X's names, which its checkpoints have.
    shapes = nn.unbox(jax.eval_shape(lambda: T5(GATED).init(jax.random.key(0), ONE, ONE)))["params"]
    assert set(shapes) == {"token_embedder", "encoder", "decoder", "logits_dense"}
    assert set(shapes["encoder"]) == {"layers_0", "layers_1", "relpos_bias", "final_layer_norm"}
    assert set(shapes["decoder"]) == set(shapes["encoder"])
    assert set(shapes["encoder"]["layers_0"]) == {
        "attention",
        "mlp",
        "pre_attention_layer_norm",
        "pre_mlp_layer_norm",
    }
    assert set(shapes["decoder"]["layers_1"]) == {
        "self_attention",
        "encoder_decoder_attention",
        "mlp",
        "pre_self_attention_layer_norm",
        "pre_cross_attention_layer_norm",
        "pre_mlp_layer_norm",
    }
    assert set(shapes["encoder"]["layers_0"]["mlp"]) == {"wi_0", "wi_1", "wo"}
    assert set(shapes["encoder"]["layers_1"]["mlp"]) == {"router", "expert"}
