"""T5X's trees, written down from its own, against ours: every name once, every shape."""

import dataclasses
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchx import configuration
from switchx.errors import UserError
from switchx.experiment import Experiment
from switchx.interop import rules, t5x
from switchx.models.config import ModelConfig
from switchx.models.stacking import unstack_layers
from switchx.models.t5 import T5
from switchx.moe.config import MoeConfig

ROOT = pathlib.Path(__file__).parents[2]

# D d_model, A heads · head_dim, F d_ff, V vocabulary, H heads, E experts, R buckets.
MODEL = {
    "token_embedder/embedding": "VD",
    "encoder/relpos_bias/rel_embedding": "HR",
    "decoder/relpos_bias/rel_embedding": "HR",
    "encoder/encoder_norm/scale": "D",
    "decoder/decoder_norm/scale": "D",
}
UNTIED = {"decoder/logits_dense/kernel": "DV"}
ENCODER_LAYER = {
    "attention/query/kernel": "DA",
    "attention/key/kernel": "DA",
    "attention/value/kernel": "DA",
    "attention/out/kernel": "AD",
    "pre_attention_layer_norm/scale": "D",
    "pre_mlp_layer_norm/scale": "D",
}
DECODER_LAYER = {
    "self_attention/query/kernel": "DA",
    "self_attention/key/kernel": "DA",
    "self_attention/value/kernel": "DA",
    "self_attention/out/kernel": "AD",
    "encoder_decoder_attention/query/kernel": "DA",
    "encoder_decoder_attention/key/kernel": "DA",
    "encoder_decoder_attention/value/kernel": "DA",
    "encoder_decoder_attention/out/kernel": "AD",
    "pre_self_attention_layer_norm/scale": "D",
    "pre_cross_attention_layer_norm/scale": "D",
    "pre_mlp_layer_norm/scale": "D",
}
FEED_FORWARD = {
    "dense": {"mlp/wi/kernel": "DF", "mlp/wo/kernel": "FD"},
    "dense, gated": {"mlp/wi_0/kernel": "DF", "mlp/wi_1/kernel": "DF", "mlp/wo/kernel": "FD"},
    "sparse": {
        "mlp/expert/wi/kernel": "EDF",
        "mlp/expert/wo/kernel": "EFD",
        "mlp/router/router_weights/w/kernel": "DE",
    },
    "sparse, gated": {
        "mlp/expert/wi_0/kernel": "EDF",
        "mlp/expert/wi_1/kernel": "EDF",
        "mlp/expert/wo/kernel": "EFD",
        "mlp/router/router_weights/w/kernel": "DE",
    },
}
FEED_FORWARD["sparse, gated, extra"] = FEED_FORWARD["sparse, gated"] | {
    "extra_mlp/wi_0/kernel": "DF",
    "extra_mlp/wi_1/kernel": "DF",
    "extra_mlp/wo/kernel": "FD",
    "pre_extra_mlp_layer_norm/scale": "D",
}
# By model: d_model, heads, head_dim, d_ff, layers of each stack, tied, feed-forward layers of
# a stack in turn, experts. T5X's own gin files, and the T5X counterpart of those it has not.
SPARSE_4 = [*["dense, gated"] * 3, "sparse, gated"]
ST_MOE = [*["dense, gated"] * 3, "sparse, gated, extra"]
TREES = {
    "expert_choice_base": (768, 12, 64, 2048, 12, False, ["dense, gated", "sparse, gated"], 64),
    "gshard_600b": (1024, 16, 128, 8192, 18, True, ["dense", "sparse"], 2048),
    "openmoe_base": (768, 12, 64, 2048, 12, False, ST_MOE, 16),
    "st_moe_32b": (5120, 64, 128, 20480, 24, False, ST_MOE, 64),
    "st_moe_base": (768, 12, 64, 2048, 12, False, ST_MOE, 16),
    "st_moe_large": (1024, 16, 64, 2816, 27, False, SPARSE_4, 32),
    "switch_base": (768, 12, 64, 3072, 12, True, ["dense", "sparse"], 8),
    "switch_c": (2080, 32, 64, 6144, 15, False, ["sparse"], 2048),
    "switch_large": (1024, 16, 64, 4096, 24, True, ["dense", "sparse"], 128),
    "switch_recall": (64, 4, 16, 128, 2, True, ["dense", "sparse"], 8),
    "switch_tiny": (128, 4, 32, 512, 4, True, ["dense", "sparse"], 8),
    "switch_xxl": (4096, 64, 64, 10240, 24, False, ["dense, gated", "sparse, gated"], 128),
    "t5_1_1_base": (768, 12, 64, 2048, 12, False, ["dense, gated"], 0),
    "t5_1_1_large": (1024, 16, 64, 2816, 24, False, ["dense, gated"], 0),
    "t5_1_1_small": (512, 6, 64, 1024, 8, False, ["dense, gated"], 0),
    "t5_1_1_xl": (2048, 32, 64, 5120, 24, False, ["dense, gated"], 0),
    "t5_1_1_xxl": (4096, 64, 64, 10240, 24, False, ["dense, gated"], 0),
    "t5_base": (768, 12, 64, 3072, 12, True, ["dense"], 0),
    "t5_c": (2080, 32, 64, 6144, 15, False, ["dense"], 0),
    "t5_large": (1024, 16, 64, 4096, 24, True, ["dense"], 0),
    "t5_recall": (64, 4, 16, 128, 2, True, ["dense"], 0),
    "t5_tiny": (128, 4, 32, 512, 4, True, ["dense"], 0),
}


def t5x_tree(
    d_model, heads, head_dim, d_ff, layers, tied, feed_forward, experts, vocab=32128
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of T5X's arrays."""
    sizes = {
        "D": d_model,
        "A": heads * head_dim,
        "F": d_ff,
        "V": vocab,
        "H": heads,
        "E": experts,
        "R": 32,
    }
    names = dict(MODEL) if tied else MODEL | UNTIED
    for stack, layer_names in (("encoder", ENCODER_LAYER), ("decoder", DECODER_LAYER)):
        for layer in range(layers):
            kind = FEED_FORWARD[feed_forward[layer % len(feed_forward)]]
            for name, letters in (layer_names | kind).items():
                names[f"{stack}/layers_{layer}/{name}"] = letters
    return {name: tuple(sizes[letter] for letter in letters) for name, letters in names.items()}


def our_tree(config: ModelConfig):
    """Shapes of our parameters, by path. Tracing 48 layers takes seconds, so scanned first."""
    scanned = dataclasses.replace(config, scan_layers=True)
    tokens = jnp.zeros((1, 1), jnp.int32)
    init = jax.eval_shape(lambda: T5(scanned).init(jax.random.key(0), tokens, tokens))
    tree = nn.unbox(init)["params"]
    if not config.scan_layers:
        tree = jax.eval_shape(lambda params: unstack_layers(params, config), tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_every_model_has_its_tree():
    models = {path.stem for path in (ROOT / "gin_configs/models").glob("*.gin")}
    # T5X's experts are as wide as its dense layers, and none are shared.
    assert set(TREES) == models - {"switch_layers", "olmoe_base", "deepseek_moe_base"}


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("name", TREES)
def test_names_and_shapes_map_one_to_one(name, scan_layers):
    files = [f"gin_configs/models/{name}.gin", "gin_configs/runs/base.gin"]
    config = configuration.build(Experiment, files).model
    config = dataclasses.replace(config, scan_layers=scan_layers)
    theirs, ours = t5x_tree(*TREES[name], vocab=config.vocab_size), our_tree(config)
    found = list(t5x.rules(config))
    assert sorted(rule.ours for rule in found) == sorted(ours)
    assert sorted(their_name for rule in found for their_name in rule.theirs) == sorted(theirs)
    for rule in found:
        assert not rule.transpose
        (shape,) = {theirs[their_name] for their_name in rule.theirs}
        stacked = "/blocks_" in rule.ours
        assert stacked == (scan_layers and "/layers_" in rule.theirs[0])
        assert stacked or len(rule.theirs) == 1
        assert ours[rule.ours] == ((len(rule.theirs), *shape) if stacked else shape)
    assert sum(int(np.prod(shape)) for shape in theirs.values()) == config.num_params


SMALL = ModelConfig(
    vocab_size=11,
    d_model=6,
    d_ff=10,
    num_heads=3,
    head_dim=4,
    num_encoder_layers=5,
    num_decoder_layers=5,
    activations=("gelu", "linear"),
    tie_embeddings=False,
    moe=MoeConfig(num_experts=7),
)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_arrays_arrive_where_they_belong(scan_layers):
    config = dataclasses.replace(SMALL, scan_layers=scan_layers)
    tree = t5x_tree(6, 3, 4, 10, 5, False, ["dense, gated", "sparse, gated"], 7, vocab=11)
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in tree.items()}
    params = rules.read(t5x.rules(config), arrays, our_tree(config), source="checkpoint_1")
    if scan_layers:  # 5 layers are 2 blocks of (dense, sparse) and one more layer
        blocks = params["encoder"]["blocks_0"]["layers_1"]["mlp"]["expert"]["wi_1"]
        np.testing.assert_array_equal(blocks[1], arrays["encoder/layers_3/mlp/expert/wi_1/kernel"])
        last = params["decoder"]["blocks_4"]["layers_0"]["mlp"]["wo"]["kernel"]
        np.testing.assert_array_equal(last, arrays["decoder/layers_4/mlp/wo/kernel"][None])
        params = unstack_layers(params, config)
    back = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        name = name.replace("encoder/final_layer_norm", "encoder/encoder_norm")
        name = name.replace("decoder/final_layer_norm", "decoder/decoder_norm")
        name = name.replace("logits_dense", "decoder/logits_dense")
        name = name.replace("mlp/router/kernel", "mlp/router/router_weights/w/kernel")
        name += "/kernel" if "/expert/" in name else ""
        back[name] = leaf
    assert set(back) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_router_bias():
    config = dataclasses.replace(SMALL, moe=MoeConfig(num_experts=7, router_bias=True))
    found = {rule.ours: rule.theirs for rule in t5x.rules(config)}
    assert set(found) == set(our_tree(config))
    assert found["encoder/layers_1/mlp/router/bias"] == (
        "encoder/layers_1/mlp/router/router_weights/w/bias",
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"router": "loss_free"},
        {"router": "cosine"},
        {"router": "hash"},
        {"num_shared_experts": 2},
        {"expert_bias": True},
    ],
)
def test_what_t5x_does_not_have_is_named(fields):
    config = dataclasses.replace(SMALL, moe=MoeConfig(num_experts=7, **fields))
    with pytest.raises(UserError, match=f"MoeConfig.{next(iter(fields))} = .* T5X has no such"):
        list(t5x.rules(config))
