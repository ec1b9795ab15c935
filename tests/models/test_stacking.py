"""Segments of repeating layers, and parameters stacked by block or named by layer."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchx.models.config import ModelConfig
from switchx.models.stacking import Segment, segments, stack_layers, unstack_layers
from switchx.models.t5 import T5
from switchx.moe.config import MoeConfig


def pattern(text):
    """(dense, sparse) for `-x`."""
    return tuple(letter == "x" for letter in text)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("-x" * 6, [(0, "-x", 6)]),
        ("---x" * 6 + "---", [(0, "---x", 6), (24, "-", 3)]),
        ("------", [(0, "-", 6)]),
        ("xxx", [(0, "x", 3)]),
        ("xxx---", [(0, "x", 3), (3, "-", 3)]),
        ("--xx--", [(0, "-", 2), (2, "x", 2), (4, "-", 2)]),
        ("x--x--xx", [(0, "x--", 2), (6, "x", 2)]),
        ("-x-xx", [(0, "-x", 2), (4, "x", 1)]),
        ("-", [(0, "-", 1)]),
        # Two layers of period 1 or six of period 3: the longer stretch.
        ("--x--x", [(0, "--x", 2)]),
        # The same stretch with period 1 or 2: the shorter period.
        ("----", [(0, "-", 4)]),
    ],
)
def test_segments(layers, expected):
    expected = tuple(Segment(first, pattern(text), repeats) for first, text, repeats in expected)
    assert segments(pattern(layers)) == expected


@pytest.mark.parametrize("depth", range(1, 10))
def test_segments_cover_every_stack_in_order(depth):
    for sparse in itertools.product((False, True), repeat=depth):
        covered = ()
        for segment in segments(sparse):
            assert segment.first_layer == len(covered)
            covered += segment.pattern * segment.repeats
        assert covered == sparse


def test_segments_of_no_layers():
    assert segments(()) == ()


CONFIGS = {
    "mixed": {"num_encoder_layers": 4, "num_decoder_layers": 2},
    "bottom": {"num_encoder_layers": 2, "num_decoder_layers": 4, "sparse_layout": "bottom"},
    "irregular": {
        "num_encoder_layers": 5,
        "num_decoder_layers": 3,
        "encoder_sparse_layers": (1, 3, 4),
        "decoder_sparse_layers": (0,),
    },
    "dense": {"num_encoder_layers": 3, "num_decoder_layers": 1, "moe": None},
    "gated": {
        "num_encoder_layers": 2,
        "num_decoder_layers": 4,
        "activations": ("gelu", "linear"),
        "tie_embeddings": False,
    },
}


def make_config(name, *, scan_layers):
    config = ModelConfig(
        vocab_size=11,
        d_model=6,
        d_ff=7,
        num_heads=3,
        head_dim=4,
        moe=MoeConfig(num_experts=5),
        scan_layers=scan_layers,
    )
    return dataclasses.replace(config, **CONFIGS[name])


TOKENS = jnp.zeros((1, 1), jnp.int32)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trips_between_the_trees_of_the_two_models(name, random_params):
    config = make_config(name, scan_layers=False)
    by_layer = random_params(T5(config), TOKENS, TOKENS)
    by_block = random_params(T5(dataclasses.replace(config, scan_layers=True)), TOKENS, TOKENS)
    # The names and shapes are those of the other model, the values come back.
    stacked, unstacked = stack_layers(by_layer, config), unstack_layers(by_block, config)
    shapes = functools.partial(jax.tree.map, np.shape)
    assert shapes(stacked) == shapes(by_block)
    assert shapes(unstacked) == shapes(by_layer)
    assert_same(unstack_layers(stacked, config), by_layer)
    assert_same(stack_layers(unstacked, config), by_block)


def test_each_layer_has_its_place(random_params):
    # "-x-xx": layers 0, 2 and 1, 3 are stacked in order, layer 4 is a block of one.
    config = make_config("irregular", scan_layers=False)
    params = random_params(T5(config), TOKENS, TOKENS)
    layers, blocks = params["encoder"], stack_layers(params, config)["encoder"]

    def query(tree):
        return np.asarray(tree["attention"]["query"]["kernel"])

    np.testing.assert_array_equal(
        query(blocks["blocks_0"]["layers_0"]),
        np.stack([query(layers["layers_0"]), query(layers["layers_2"])]),
    )
    np.testing.assert_array_equal(
        query(blocks["blocks_0"]["layers_1"]),
        np.stack([query(layers["layers_1"]), query(layers["layers_3"])]),
    )
    np.testing.assert_array_equal(
        query(blocks["blocks_4"]["layers_0"])[0], query(layers["layers_4"])
    )
    # What belongs to no layer stays.
    assert blocks["relpos_bias"] is layers["relpos_bias"]
    assert blocks["final_layer_norm"] is layers["final_layer_norm"]


def test_the_given_tree_is_left_alone(random_params):
    config = make_config("mixed", scan_layers=False)
    params = random_params(T5(config), TOKENS, TOKENS)
    names = sorted(params["encoder"])
    stack_layers(params, config)
    assert sorted(params["encoder"]) == names


def test_a_scanned_program_does_not_grow_with_depth():
    def program(num_layers):
        config = ModelConfig(
            vocab_size=16,
            d_model=6,
            d_ff=10,
            num_heads=2,
            head_dim=3,
            num_encoder_layers=num_layers,
            num_decoder_layers=num_layers,
            scan_layers=True,
            moe=MoeConfig(num_experts=3, jitter_noise=0.0),
        )
        model, tokens = T5(config), jnp.ones((1, 5), jnp.int32)
        params = jax.eval_shape(lambda: nn.unbox(model.init(jax.random.key(0), tokens, tokens)))

        def loss(params):
            return jnp.sum(model.apply(params, tokens, tokens).logits)

        return len(jax.jit(jax.grad(loss)).lower(params).as_text())

    assert program(24) < 1.01 * program(4)
