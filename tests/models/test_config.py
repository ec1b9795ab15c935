"""`ModelConfig`: sizes to the digit, costs to the multiply-add, layouts, JSON, bad values."""

import dataclasses
import functools
import json
import math
import re

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import pytest

from switchx.errors import UserError
from switchx.models.config import ModelConfig, read_config
from switchx.models.t5 import T5
from switchx.moe.config import MoeConfig


def t5(depth, d_model, d_ff, num_heads, **fields):
    """A T5 with as many encoder as decoder layers."""
    return ModelConfig(
        num_encoder_layers=depth,
        num_decoder_layers=depth,
        d_model=d_model,
        d_ff=d_ff,
        num_heads=num_heads,
        **fields,
    )


def t5_1_1(depth, d_model, d_ff, num_heads):
    return t5(
        depth,
        d_model,
        d_ff,
        num_heads,
        activations=("gelu", "linear"),
        tie_embeddings=False,
        scale_logits=False,
    )


def switch(depth, d_model, d_ff, num_heads, num_experts, **fields):
    return t5(depth, d_model, d_ff, num_heads, moe=MoeConfig(num_experts=num_experts), **fields)


def st_moe(d_model, d_ff, num_heads, num_experts, **fields):
    """ST-MoE as its paper has it: 27 layers, every fourth sparse."""
    return switch(27, d_model, d_ff, num_heads, num_experts, sparse_every=4, **GEGLU, **fields)


GEGLU = {"activations": ("gelu", "linear"), "tie_embeddings": False}
SWITCH_C = {"sparse_every": 1, "tie_embeddings": False}  # every layer sparse
# Published sizes; the embedding has 32,128 rows.
ZOO = {
    "T5-Base 1.0": (t5(12, 768, 3072, 12), 222_903_552),
    "T5-Large 1.0": (t5(24, 1024, 4096, 16), 737_668_096),
    "T5-Small 1.1": (t5_1_1(8, 512, 1024, 6), 76_961_152),
    "T5-Base 1.1": (t5_1_1(12, 768, 2048, 12), 247_577_856),
    "T5-Large 1.1": (t5_1_1(24, 1024, 2816, 16), 783_150_080),
    "T5-XL 1.1": (t5_1_1(24, 2048, 5120, 32), 2_849_757_184),
    "T5-XXL 1.1": (t5_1_1(24, 4096, 10240, 64), 11_135_332_352),
    "Switch-Base-8": (switch(12, 768, 3072, 12, 8), 619_339_008),
    "Switch-Base-16": (switch(12, 768, 3072, 12, 16), 1_072_397_568),
    "Switch-Base-32": (switch(12, 768, 3072, 12, 32), 1_978_514_688),
    "Switch-Base-64": (switch(12, 768, 3072, 12, 64), 3_790_748_928),
    "Switch-Base-128": (switch(12, 768, 3072, 12, 128), 7_415_217_408),
    "Switch-Base-256": (switch(12, 768, 3072, 12, 256), 14_664_154_368),
    "Switch-Base-128, table 9": (switch(12, 768, 2048, 12, 128, **GEGLU), 7_439_891_712),
    "Switch-Large-128": (switch(24, 1024, 4096, 16, 128), 26_309_291_008),
    "Switch-XXL": (switch(24, 4096, 10240, 64, 128, **GEGLU), 394_675_073_024),
    "Switch-C": (switch(15, 2080, 6144, 32, 2048, **SWITCH_C), 1_571_375_798_688),
    "Switch-C, 30 heads": (switch(15, 2080, 6144, 30, 2048, **SWITCH_C), 1_571_327_875_360),
    "Dense-L": (t5(27, 1024, 2816, 16, **GEGLU), 872_818_688),
    "ST-MoE-L": (st_moe(1024, 2816, 16, 32), 4_091_291_648),
    "ST-MoE-32B": (st_moe(5120, 20480, 64, 64, head_dim=128), 268_727_141_376),
    "tokens_choose_base of Flaxformer": (
        switch(12, 768, 2048, 12, 64, sparse_every=4, **GEGLU),
        2_031_500_544,
    ),
    "tokens_choose_tiny of Flaxformer": (switch(2, 32, 64, 6, 8, **GEGLU), 2_462_976),
}


@functools.cache
def parameter_shapes(config):
    tokens = jnp.zeros((1, 1), jnp.int32)
    init = jax.eval_shape(lambda: T5(config).init(jax.random.key(0), tokens, tokens))
    return nn.unbox(init)["params"]


def size(shapes):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


class TestNumParams:
    @pytest.mark.parametrize("name", ZOO)
    def test_published_models(self, name):
        config, expected = ZOO[name]
        assert config.num_params == expected

    @pytest.mark.parametrize("name", ZOO)
    def test_equals_the_scanned_module(self, name):
        config, expected = ZOO[name]
        config = dataclasses.replace(config, scan_layers=True)
        assert size(parameter_shapes(config)) == expected

    # Tracing 48 layers takes seconds: one of each kind.
    @pytest.mark.parametrize("name", ["T5-Base 1.0", "T5-Small 1.1", "Switch-Base-8", "Switch-C"])
    def test_equals_the_unrolled_module(self, name):
        config, expected = ZOO[name]
        assert size(parameter_shapes(config)) == expected

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"tie_embeddings": False},
            {"activations": ("gelu", "silu", "linear")},
            {"relative_attention_num_buckets": 8},
            {"encoder_sparse_layers": (0, 2), "decoder_sparse_layers": ()},
            {"moe": MoeConfig(num_experts=3, router_bias=True)},
            {"moe": None},
        ],
        ids=lambda fields: next(iter(fields), "sparse"),
    )
    def test_every_field_that_changes_the_size(self, fields):
        config = ModelConfig(
            vocab_size=37,
            d_model=6,
            d_ff=10,
            num_heads=3,
            head_dim=4,
            num_encoder_layers=5,
            num_decoder_layers=2,
            moe=MoeConfig(num_experts=7),
        )
        config = dataclasses.replace(config, **fields)
        assert config.num_params == size(parameter_shapes(config))

    def test_active(self):
        # Dense twin and 12 routers of 768 × 128: 222,903,552 + 1,179,648.
        # And all parameters less 127 of 128 experts in 12 layers: 2 · 768 · 3072 each.
        config, total = ZOO["Switch-Base-128"]
        assert config.num_active_params == 224_083_200
        assert config.num_active_params == total - 12 * 127 * 2 * 768 * 3072
        dense = ZOO["T5-Base 1.0"][0]
        assert dense.num_active_params == dense.num_params


def matmul_flops(jaxpr: jax.extend.core.Jaxpr) -> int:
    """2 per multiply-add of every matrix product, in all that the jaxpr calls; scans repeat."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracting, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = math.prod(left[dimension] for dimension in contracting)
            total += 2 * equation.outvars[0].aval.size * inner
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for nested in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(nested, jax.extend.core.ClosedJaxpr):
                    nested = nested.jaxpr
                if isinstance(nested, jax.extend.core.Jaxpr):
                    total += repeats * matmul_flops(nested)
    return total


# Giga-FLOPs of a sequence that the papers print: Switch, table 9, and ST-MoE.
PUBLISHED_FLOPS = {
    "T5-Base 1.0": 124,
    "Switch-Base-128": 124,
    "Switch-Base-128, table 9": 124,
    "T5-Large 1.0": 425,
    "Switch-Large-128": 425,
    "T5-XXL 1.1": 6300,
    "Switch-XXL": 6300,
    "Switch-C": 890,
    "ST-MoE-32B": 20200,
}
ROW = (512, 114)


def kernel_flops(config: ModelConfig) -> dict[str, int]:
    """FLOPs of a row in every kernel of the real module, by what the kernel belongs to."""
    source, target = ROW
    flops = {"projections": 0, "routers": 0, "head": 0}
    shapes = parameter_shapes(dataclasses.replace(config, scan_layers=True))
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        path, size = jax.tree_util.keystr(path, simple=True, separator="/"), leaf.size
        is_cross = re.search("encoder_decoder_attention/(key|value)", path) is not None
        is_decoder = path.startswith(("decoder", "logits_dense")) and not is_cross
        tokens = target if is_decoder else source
        kind = "projections"
        if path == "token_embedder/embedding":
            kind, tokens = "head", target if config.tie_embeddings else 0
        elif path == "logits_dense/kernel":
            kind = "head"
        elif "/router/" in path:
            kind = "routers"
        elif "/expert/" in path:
            size //= config.moe.num_experts
        elif not path.endswith("kernel"):
            continue
        flops[kind] += 2 * tokens * size
    return flops


def attention_flops(config: ModelConfig) -> int:
    """Scores and weighted sums: 2 · 2 · queries · keys · heads · head_dim for each attention."""
    source, target = ROW
    pairs = config.num_encoder_layers * source * source
    pairs += config.num_decoder_layers * (target * target + target * source)
    return 4 * config.num_heads * config.head_dim * pairs


class TestFlops:
    @pytest.mark.parametrize("name", ZOO)
    def test_equals_the_kernels_of_the_real_modules(self, name):
        config = ZOO[name][0]
        expected = sum(kernel_flops(config).values()) + attention_flops(config)
        assert config.flops_per_sequence(*ROW) == expected
        assert config.flops_per_token(*ROW) == expected / 626

    @pytest.mark.parametrize("name", PUBLISHED_FLOPS)
    def test_published_models(self, name):
        # The papers count neither attention scores nor the output head nor routers.
        config = dataclasses.replace(ZOO[name][0], moe=None)
        head = 2 * 114 * config.d_model * config.vocab_size
        ours = (config.flops_per_sequence(*ROW) - attention_flops(config) - head) / 1e9
        assert ours == pytest.approx(PUBLISHED_FLOPS[name], rel=0.1)

    def test_t5_base_as_the_papers_count_by_hand(self):
        # 12 layers of 768² = 589,824: 4 of them in an attention, 8 in a feed-forward layer.
        encoder = 512 * 12 * (4 + 8) * 589_824
        decoder = 114 * 12 * (4 + 2 + 8) * 589_824 + 512 * 12 * 2 * 589_824  # k, v of the source
        assert 2 * (encoder + decoder) == 124_061_220_864
        assert kernel_flops(ZOO["T5-Base 1.0"][0])["projections"] == 124_061_220_864

    def test_the_counter_counts(self):
        # 3 scanned steps of [2, 4] × [4, 4] in a nested function: 3 · 2 · 2 · 4 · 4.
        def step(x, _):
            return jax.jit(jnp.matmul)(x, jnp.ones((4, 4))), None

        jaxpr = jax.make_jaxpr(lambda x: jax.lax.scan(step, x, length=3))(jnp.ones((2, 4)))
        assert matmul_flops(jaxpr.jaxpr) == 192

    # 3 rows of 8 and 12 tokens, 4 experts: capacity 6 and 9 fills every slot.
    SPARSE = MoeConfig(num_experts=4, capacity_factor=1.0, eval_capacity_factor=1.0, min_capacity=0)

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"activations": ("gelu", "linear"), "tie_embeddings": False},
            {"moe": SPARSE},
            {"moe": SPARSE, "scan_layers": True, "activations": ("gelu", "linear")},
            {"moe": SPARSE, "sparse_every": 1, "decoder_sparse_layers": (1,)},
        ],
        ids=["dense", "gated-untied", "sparse", "sparse-gated-scanned", "mostly-sparse"],
    )
    def test_equals_the_module(self, fields):
        config = ModelConfig(
            vocab_size=37,
            d_model=6,
            d_ff=10,
            num_heads=3,
            head_dim=5,
            num_encoder_layers=4,
            num_decoder_layers=2,
            **fields,
        )
        rows, encoder_length, decoder_length = 3, 8, 12
        encoder_tokens = jax.ShapeDtypeStruct((rows, encoder_length), jnp.int32)
        decoder_tokens = jax.ShapeDtypeStruct((rows, decoder_length), jnp.int32)
        jaxpr = jax.make_jaxpr(
            lambda params, *tokens: T5(config).apply({"params": params}, *tokens)
        )(parameter_shapes(config), encoder_tokens, decoder_tokens)
        expected = rows * config.flops_per_sequence(encoder_length, decoder_length)
        assert matmul_flops(jaxpr.jaxpr) == expected

    @pytest.mark.parametrize("factor", [1.25, 2.0, None], ids=str)
    def test_capacity_padding_is_what_the_module_computes_beyond(self, factor):
        moe = MoeConfig(
            num_experts=5,
            eval_capacity_factor=factor,
            min_capacity=0,
            group_size="row",
            dispatch="gather",
        )
        config = ModelConfig(
            vocab_size=37,
            d_model=6,
            d_ff=10,
            num_heads=3,
            head_dim=5,
            num_encoder_layers=4,
            num_decoder_layers=2,
            activations=("gelu", "linear"),
            moe=moe,
        )
        rows, lengths = 3, (8, 12)
        tokens = [jax.ShapeDtypeStruct((rows, length), jnp.int32) for length in lengths]
        jaxpr = jax.make_jaxpr(
            lambda params, *tokens: T5(config).apply({"params": params}, *tokens)
        )(parameter_shapes(config), *tokens)
        # Slots of an expert: ceil(factor · 8 / 5) and ceil(factor · 12 / 5); dropless: 8 and 12.
        slots = {1.25: (2, 3), 2.0: (4, 5), None: lengths}[factor]
        empty = 2 * rows * (5 * slots[0] - 8) + 1 * rows * (5 * slots[1] - 12)
        expected = rows * config.flops_per_sequence(*lengths) + empty * 2 * 3 * 6 * 10
        assert matmul_flops(jaxpr.jaxpr) == expected

    def test_xla_counts_the_same_and_the_elementwise_rest(self):
        config = ModelConfig(
            vocab_size=1024,
            d_model=256,
            d_ff=768,
            num_heads=3,
            num_encoder_layers=2,
            num_decoder_layers=1,
        )
        rows, lengths = 2, (64, 48)
        tokens = [jax.ShapeDtypeStruct((rows, length), jnp.int32) for length in lengths]
        forward = jax.jit(lambda params, *tokens: T5(config).apply({"params": params}, *tokens))
        lowered = forward.lower(parameter_shapes(config), *tokens)
        ours = rows * config.flops_per_sequence(*lengths)
        assert 1 <= lowered.cost_analysis()["flops"] / ours < 1.03

    def test_by_hand(self):
        # One layer each, widths 2, inner 3 · 5 = 15, d_ff 7, V 11; 4 source and 1 target token.
        config = ModelConfig(
            vocab_size=11,
            d_model=2,
            d_ff=7,
            num_heads=3,
            head_dim=5,
            num_encoder_layers=1,
            num_decoder_layers=1,
        )
        encoder = 4 * (4 * 2 * 15) + 2 * 4 * 4 * 15 + 4 * (2 * 2 * 7)  # 480 + 480 + 112
        decoder = 4 * 2 * 15 + 2 * 15 + 2 * 2 * 7  # 120 + 30 + 28
        cross = 2 * (1 + 4) * 2 * 15 + 2 * 1 * 4 * 15  # q, o of 1 and k, v of 4: 300 + 120
        head = 2 * 11
        flops = 2 * (encoder + decoder + cross + head)
        assert config.flops_per_sequence(4, 1) == flops == 3384
        assert config.flops_per_token(4, 1) == flops / 5

    def test_experts_cost_a_router_only(self):
        dense, sparse = ZOO["T5-Base 1.0"][0], ZOO["Switch-Base-128"][0]
        routers = 2 * 768 * 128 * (6 * 512 + 6 * 114)
        difference = sparse.flops_per_sequence(512, 114) - dense.flops_per_sequence(512, 114)
        assert difference == routers


class TestLayout:
    @pytest.mark.parametrize(
        ("depth", "fields", "expected"),
        [
            (12, {}, [1, 3, 5, 7, 9, 11]),
            (12, {"sparse_every": 1}, list(range(12))),
            (12, {"sparse_every": 3}, [2, 5, 8, 11]),
            (12, {"sparse_every": 4, "sparse_layout": "bottom"}, [0, 1, 2]),
            (12, {"sparse_every": 4, "sparse_layout": "middle"}, [4, 5, 6]),
            (12, {"sparse_every": 4, "sparse_layout": "top"}, [9, 10, 11]),
            (27, {"sparse_every": 4}, [3, 7, 11, 15, 19, 23]),
            (5, {}, [1, 3]),
            (5, {"sparse_layout": "bottom"}, [0, 1]),
            (5, {"sparse_layout": "middle"}, [1, 2]),
            (5, {"sparse_layout": "top"}, [3, 4]),
            (3, {"sparse_every": 3, "sparse_layout": "top"}, [2]),
        ],
    )
    def test_both_stacks(self, depth, fields, expected):
        config = t5(depth, 768, 3072, 12, moe=MoeConfig(), **fields)
        sparse = tuple(layer in expected for layer in range(depth))
        assert config.encoder_sparse == config.decoder_sparse == sparse

    def test_stacks_of_different_depth(self):
        config = ModelConfig(num_encoder_layers=4, num_decoder_layers=2, moe=MoeConfig())
        assert config.encoder_sparse == (False, True, False, True)
        assert config.decoder_sparse == (False, True)

    def test_explicit_layers_replace_the_layout_of_their_stack(self):
        config = t5(4, 768, 3072, 12, moe=MoeConfig(), encoder_sparse_layers=[0, 3])
        assert config.encoder_sparse == (True, False, False, True)
        assert config.decoder_sparse == (False, True, False, True)
        config = dataclasses.replace(config, decoder_sparse_layers=())
        assert config.decoder_sparse == (False,) * 4

    def test_dense_models_have_none(self):
        config = t5(4, 768, 3072, 12, encoder_sparse_layers=(1,))
        assert config.encoder_sparse == config.decoder_sparse == (False,) * 4


class TestJson:
    @pytest.mark.parametrize(
        "config",
        [
            ModelConfig(),
            ModelConfig(moe=MoeConfig(capacity_factor=None, group_size="row")),
            ModelConfig(
                moe=MoeConfig(num_experts=3, group_size=17),
                activations=("gelu", "linear"),
                encoder_sparse_layers=(0, 5),
                decoder_sparse_layers=(),
                dtype="bfloat16",
                layer_norm_epsilon=1e-7,
            ),
        ],
    )
    def test_round_trip(self, config):
        again = ModelConfig.from_json(config.to_json())
        assert again == config
        assert hash(again) == hash(config)  # lists are tuples again

    def test_every_field_is_written(self):
        written = json.loads(ModelConfig(moe=MoeConfig()).to_json())
        assert set(written) == {field.name for field in dataclasses.fields(ModelConfig)}
        assert set(written["moe"]) == {field.name for field in dataclasses.fields(MoeConfig)}

    def test_missing_fields_take_their_defaults(self):
        assert ModelConfig.from_json('{"d_model": 512}') == ModelConfig(d_model=512)
        assert ModelConfig.from_json('{"moe": {}}') == ModelConfig(moe=MoeConfig())
        assert ModelConfig.from_json('{"moe": null}') == ModelConfig()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"d_modell": 512}', "ModelConfig has no field 'd_modell'; did you mean 'd_model'?"),
            (
                '{"moe": {"num_expert": 8}}',
                "MoeConfig has no field 'num_expert'; did you mean 'num_experts'?",
            ),
            ('{"d_model": 512', "is not JSON"),
            ("[1, 2]", "one JSON object"),
            ('{"moe": 8}', "moe"),
            ('{"moe": ["num_experts"]}', "moe"),
            ('{"d_model": 0}', "ModelConfig.d_model = 0"),
            ('{"moe": {"num_experts": 0}}', "MoeConfig.num_experts = 0"),
        ],
    )
    def test_unreadable(self, text, message):
        with pytest.raises(UserError) as error:
            ModelConfig.from_json(text)
        assert message.lower() in str(error.value).lower()


def construct(config_class, **fields):
    """As outside of the test run, where no type checker stands before the class's own checks."""
    config = object.__new__(config_class)
    getattr(config_class.__init__, "__wrapped__", config_class.__init__)(config, **fields)
    return config


class TestBadValues:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            *(
                ({field: 0}, f"{field} = 0: should be at least 1")
                for field in (
                    "vocab_size",
                    "d_model",
                    "d_ff",
                    "num_heads",
                    "head_dim",
                    "num_encoder_layers",
                    "num_decoder_layers",
                    "sparse_every",
                )
            ),
            ({"num_heads": -12}, "num_heads = -12: should be at least 1"),
            ({"activations": ()}, "activations = ()"),
            (
                {"activations": ("gellu", "linear")},
                "activations = ('gellu', 'linear'): 'gellu' is unknown; did you mean 'gelu'?",
            ),
            ({"relative_attention_num_buckets": 30}, "relative_attention_num_buckets = 30"),
            ({"relative_attention_num_buckets": 0}, "relative_attention_num_buckets = 0"),
            ({"relative_attention_max_distance": 16}, "relative_attention_max_distance = 16"),
            ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon = 0.0: should be positive"),
            ({"dropout_rate": 1.0}, "dropout_rate = 1.0: should be in [0, 1)"),
            ({"dropout_rate": -0.1}, "dropout_rate = -0.1"),
            ({"dropout_rate": float("nan")}, "dropout_rate = nan"),
            ({"init_scale": 0.0}, "init_scale = 0.0: should be positive"),
            ({"sparse_layout": "botom"}, "sparse_layout = 'botom' is unknown; did you mean"),
            ({"dtype": "bf16"}, "dtype = 'bf16' is unknown"),
            ({"remat": "ful"}, "remat = 'ful' is unknown; did you mean 'full'?"),
            ({"encoder_sparse_layers": (12,)}, "encoder_sparse_layers = (12,): should be inc"),
            ({"encoder_sparse_layers": (3, 1)}, "encoder_sparse_layers = (3, 1)"),
            ({"encoder_sparse_layers": (1, 1)}, "encoder_sparse_layers = (1, 1)"),
            ({"decoder_sparse_layers": (-1,)}, "decoder_sparse_layers = (-1,)"),
            (
                {"num_decoder_layers": 2, "decoder_sparse_layers": [2]},
                "decoder_sparse_layers = (2,): should be increasing layer numbers below 2",
            ),
        ],
        ids=str,
    )
    def test_are_named(self, fields, message):
        with pytest.raises(UserError) as error:
            ModelConfig(**fields)
        assert str(error.value).startswith(f"ModelConfig.{message}")

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"d_model": 768.0}, "d_model = 768.0: a float, should be int"),
            ({"d_model": True}, "d_model = True: a bool, should be int"),
            ({"dropout_rate": "0.1"}, "dropout_rate = '0.1': a str, should be float"),
            ({"activations": "relu"}, "activations = 'relu': a str, should be"),
            ({"activations": ("relu", 3)}, "activations = ('relu', 3): a tuple, should be"),
            ({"encoder_sparse_layers": (1, "2")}, "encoder_sparse_layers = (1, '2')"),
            ({"encoder_sparse_layers": 3}, "encoder_sparse_layers = 3: a int, should be"),
            ({"tie_embeddings": 1}, "tie_embeddings = 1: a int, should be bool"),
            ({"moe": {"num_experts": 8}}, "moe = {'num_experts': 8}: a dict, should be"),
        ],
        ids=str,
    )
    def test_of_the_wrong_type_are_named(self, fields, message):
        for _ in range(5):  # an element drawn at random is not a check
            with pytest.raises(UserError) as error:
                construct(ModelConfig, **fields)
            assert str(error.value).startswith(f"ModelConfig.{message}")

    def test_an_integer_is_a_number(self):
        assert construct(ModelConfig, init_scale=1, dropout_rate=0).init_scale == 1

    def test_lists_become_tuples(self):
        config = ModelConfig(activations=["gelu", "linear"], encoder_sparse_layers=[1, 2])
        assert config.activations == ("gelu", "linear")
        assert config.encoder_sparse_layers == (1, 2)
        assert isinstance(hash(config), int)


class TestReadConfig:
    CONFIG = ModelConfig(d_model=48, moe=MoeConfig(num_experts=3, expert_capacity=5))

    @pytest.fixture
    def run(self, tmp_path):
        (tmp_path / "checkpoints/7/params").mkdir(parents=True)
        (tmp_path / "model.json").write_text(self.CONFIG.to_json())
        return tmp_path

    def test_from_a_run_or_a_checkpoint_in_it(self, run):
        for path in (run, run / "checkpoints", run / "checkpoints/7"):
            assert read_config(str(path)) == self.CONFIG

    def test_what_changes_no_parameter_may_be_set(self, run):
        config = read_config(
            str(run), dropout_rate=0.2, expert_dropout_rate=0.4, dtype="bfloat16", remat="full"
        )
        assert (config.dropout_rate, config.dtype, config.remat) == (0.2, "bfloat16", "full")
        assert config.moe == dataclasses.replace(self.CONFIG.moe, expert_dropout_rate=0.4)
        (run / "model.json").write_text(ModelConfig().to_json())
        assert read_config(str(run), expert_dropout_rate=0.4) == ModelConfig()

    def test_sparse_layers_of_both_stacks_change(self, run):
        decoder = MoeConfig(num_experts=2, top_k=2, router="top_k")
        own = dataclasses.replace(self.CONFIG, decoder_moe=decoder)
        (run / "model.json").write_text(own.to_json())
        changes = dict(
            capacity_factor=1.5,
            eval_capacity_factor=3.0,
            load_balance_weight=0.0,
            group_size="row",
            expert_dropout_rate=0.4,
        )
        config = read_config(str(run), **changes)
        # A factor replaces an absolute capacity; nothing else changes.
        expected = dataclasses.replace(self.CONFIG.moe, expert_capacity=None, **changes)
        assert config.moe == expected
        assert config.decoder_moe == dataclasses.replace(decoder, **changes)
        assert read_config(str(run), group_size=64).moe.expert_capacity == 5

    def test_a_capacity_that_is_a_parameter_stays(self, run):
        soft = dataclasses.replace(
            self.CONFIG,
            moe=MoeConfig(num_experts=3, router="soft_moe", expert_capacity=5),
            decoder_moe=MoeConfig(num_experts=3),
        )
        (run / "model.json").write_text(soft.to_json())
        with pytest.raises(UserError, match="EVAL_CAPACITY_FACTOR = 2.0: router 'soft_moe' has"):
            read_config(str(run), eval_capacity_factor=2.0)

    def test_mistakes(self, tmp_path):
        with pytest.raises(UserError, match="INITIAL_CHECKPOINT_PATH is not set"):
            read_config(None)
        with pytest.raises(UserError, match="has no model.json; give a run directory"):
            read_config(str(tmp_path))
        for content in (b"{", b"\xff", b"[" * 100_000, b"[]", b'{"d_mode": 3}'):
            (tmp_path / "model.json").write_bytes(content)
            with pytest.raises(UserError, match=f"in {tmp_path}: .*(JSON|utf-8|d_model)"):
                read_config(str(tmp_path))
