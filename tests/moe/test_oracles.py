"""MoE blocks as Hugging Face computed them: NLLB-MoE, Mixtral and OLMoE.

`tests/oracles/<case>` has the logits of a model's routers and what became of them, by layer.
Everything here starts from those logits, so that only the softmax and sums can differ.
"""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchx.moe import placement, routing
from switchx.moe.assignment import Tokens
from switchx.moe.balance import router_stats
from switchx.moe.config import MoeConfig
from switchx.moe.layer import MoeLayer

ORACLES = pathlib.Path(__file__).parents[1] / "oracles"
DROPLESS, NLLB = ("mixtral", "olmoe"), ("nllb_moe", "nllb_moe_capacity")


@functools.cache
def oracle(case):
    return dict(np.load(ORACLES / case / "moe.npz"))


@functools.cache
def published(case):
    """The model's own configuration, in Hugging Face's words."""
    return json.loads((ORACLES / case / "config.json").read_text())


def tags(case):
    prefix = "router_logits_"
    return [name.removeprefix(prefix) for name in oracle(case) if name.startswith(prefix)]


def layers(*cases):
    return pytest.mark.parametrize(
        ("case", "tag"), [(case, tag) for case in cases for tag in tags(case)]
    )


def arrays(case, tag):
    """Arrays of one layer by name, [B, T, …], and which tokens count as real."""
    found = {
        name.removesuffix(f"_{tag}"): array
        for name, array in oracle(case).items()
        if name.endswith(f"_{tag}")
    }
    # No decoder of an encoder-decoder is told of its padding.
    rows = found["router_logits"].shape[:2]
    found["mask"] = np.ones(rows, bool)
    if not tag.startswith("dec_"):
        found["mask"] = oracle(case)["attention_mask"].astype(bool)
    assert found["mask"].shape == rows
    return found


def moe_config(case, group_size, **changes):
    """What a user of that model writes."""
    config = published(case)
    num_experts = config.get("num_local_experts") or config["num_experts"]
    fields = {"group_size": group_size, "num_experts": num_experts}
    if case in NLLB:
        before = config["normalize_router_prob_before_dropping"]
        fields |= {
            "router": "gshard",
            "second_expert_policy": config["second_expert_policy"],
            "renormalize": "before_dropping" if before else "after_dropping",
            "router_bias": config["router_bias"],
            "expert_bias": True,
            "priority": "probability" if config["batch_prioritized_routing"] else "choice",
            # Of two choices per token; Hugging Face's is a fraction of the tokens.
            "eval_capacity_factor": config["moe_eval_capacity_token_fraction"] * num_experts / 2,
            "min_capacity": 0,
        }
    else:
        fields |= {
            "router": "top_k",
            "top_k": config["num_experts_per_tok"],
            # Mixtral always does, OLMoE says.
            "renormalize": "before_dropping" if config.get("norm_topk_prob", True) else "none",
            "capacity_factor": None,
            "eval_capacity_factor": None,
            "load_balance_choices": "all",
        }
    return MoeConfig(**(fields | changes))


def close(found, want):
    """Within a few last bits of a float32 between 0 and 1."""
    np.testing.assert_allclose(found, np.reshape(want, np.shape(found)), rtol=0, atol=1e-6)


def same(found, want):
    np.testing.assert_array_equal(found, np.reshape(want, np.shape(found)))


def as_group(array_BTX):
    """All tokens of a batch in one group, [1, B · T, …]."""
    return jnp.asarray(array_BTX.reshape(1, -1, *array_BTX.shape[2:]))


@functools.partial(jax.jit, static_argnames=("router", "after", "options", "slots"))
def route_and_place(logits_GME, mask_GM, *, router, options, slots, after=False):
    routed = getattr(routing, router)(logits_GME, **dict(options))
    placed = placement.place(
        routed.decision,
        mask_GM,
        num_experts=logits_GME.shape[-1],
        renormalize=after,
        **dict(slots),
    )
    return routed, placed


def decide(config, layer, *, capacity, mask=None):
    """The functions that a layer of that configuration calls, on one layer of an oracle."""
    before = config.renormalize == "before_dropping"
    options = {"k": config.top_k, "renormalize": before}
    if config.router == "gshard":
        options = {"policy": config.second_expert_policy, "renormalize": before}
    return route_and_place(
        as_group(layer["router_logits"]),
        as_group(layer["mask"] if mask is None else mask),
        router=config.router,
        options=tuple(options.items()),
        slots=(("capacity", capacity), ("priority", config.priority or "choice")),
        after=config.renormalize == "after_dropping",
    )


def combine_weights(placed, num_tokens):
    """Weight of every expert in every token of a single group, [M, E], from the slots."""
    (token_EC,), (gate_EC,) = np.asarray(placed.token_GEC), np.asarray(placed.gate_GEC)
    combine_ME = np.zeros((num_tokens + 1, len(token_EC)), gate_EC.dtype)
    np.add.at(combine_ME, (token_EC, np.arange(len(token_EC))[:, None]), gate_EC)
    assert not combine_ME[-1].any()  # what empty slots weigh
    return combine_ME[:-1]


def wanted_weights(layer):
    """The same of an oracle, [B, T, E]; where nothing is dropped it is spelled out here."""
    if "combine" in layer:
        return layer["combine"]
    combine_BTE = np.zeros_like(layer["router_logits"])
    np.put_along_axis(combine_BTE, layer["expert_index"], layer["gate"], axis=-1)
    return combine_BTE * layer["mask"][..., None]


# The functions --------------------------------------------------------------------------------


@layers(*DROPLESS)
def test_top_k_is_that_of_mixtral_and_olmoe_and_keeps_everything(case, tag):
    layer = arrays(case, tag)
    tokens = layer["mask"].size
    routed, placed = decide(moe_config(case, tokens), layer, capacity=tokens)
    close(routed.probs_GME, layer["router_probs"])
    same(routed.decision.expert_index_GMK, layer["expert_index"])
    close(routed.decision.gate_GMK, layer["gate"])
    real_BTK = np.broadcast_to(layer["mask"][..., None], layer["gate"].shape)
    same(placed.kept_GMK, real_BTK)
    close(combine_weights(placed, tokens), wanted_weights(layer))


def pooled(case):
    """Arrays of all layers under each other: Hugging Face counts their tokens together."""
    every = [arrays(case, tag) for tag in tags(case)]
    return {name: np.concatenate([layer[name] for layer in every]) for name in every[0]}


@pytest.mark.parametrize("case", DROPLESS)
def test_load_balance_loss_is_that_of_all_layers_pooled(case):
    def loss(layer):
        tokens = layer["mask"].size
        config = moe_config(case, tokens)
        routed, placed = decide(config, layer, capacity=tokens)
        logits_GME, mask_GM = as_group(layer["router_logits"]), as_group(layer["mask"])
        choices = config.load_balance_choices
        stats = router_stats(logits_GME, routed, placed, mask_GM, load_balance_choices=choices)
        return stats.load_balance_loss

    want = oracle(case)["aux_loss"]
    np.testing.assert_allclose(loss(pooled(case)), want, rtol=1e-5)
    # The mean of the layers' own losses, what a sum over RouterStats gives, is another number.
    mean = np.mean([loss(arrays(case, tag)) for tag in tags(case)])
    assert abs(mean / want - 1) > 1e-3


@pytest.mark.parametrize("renormalize", ["before_dropping", "after_dropping"])
@layers(*NLLB)
def test_gshard_and_placement_are_those_of_nllb(case, tag, renormalize):
    """Also with the other setting: what is dropped does not depend on it, and weights follow."""
    layer = arrays(case, tag)
    tokens = layer["mask"].size
    capacity = math.ceil(published(case)["moe_eval_capacity_token_fraction"] * tokens)
    config = moe_config(case, tokens, renormalize=renormalize)
    assert config.capacity(tokens, train=False) == capacity
    routed, placed = decide(config, layer, capacity=capacity)
    close(routed.probs_GME, layer["router_probs"])
    same(routed.decision.expert_index_GMK, layer["expert_index"])
    same(placed.kept_GMK, layer["kept"])

    probs_BTK = np.take_along_axis(layer["router_probs"], layer["expert_index"], axis=-1)
    counted_BTK = probs_BTK * (layer["kept"] if renormalize == "after_dropping" else 1)
    total_BT1 = np.maximum(counted_BTK.sum(-1, keepdims=True), np.finfo(np.float32).eps)
    want_BTE = np.zeros_like(layer["combine"])
    gate_BTK = probs_BTK * layer["kept"] / total_BT1
    np.put_along_axis(want_BTE, layer["expert_index"], gate_BTK, axis=-1)
    if renormalize == moe_config(case, tokens).renormalize:
        close(want_BTE, layer["combine"])
        want_BTE = layer["combine"]
    close(combine_weights(placed, tokens), want_BTE)


@pytest.mark.parametrize("change", ["priority", "capacity", "padding", "renormalize"])
def test_the_oracle_tells_other_semantics_apart(change):
    case, differences = "nllb_moe_capacity", []
    changes = {"priority": {"priority": "choice"}, "renormalize": {"renormalize": "none"}}
    for tag in tags(case):
        layer = arrays(case, tag)
        tokens = layer["mask"].size
        config = moe_config(case, tokens, **changes.get(change, {}))
        capacity = config.capacity(tokens, train=False) + (change == "capacity")
        mask_BT = layer["mask"] | (change == "padding")
        _, placed = decide(config, layer, capacity=capacity, mask=mask_BT)
        weights_BTE = combine_weights(placed, tokens).reshape(layer["combine"].shape)
        differences.append(abs(weights_BTE - layer["combine"])[layer["mask"]].max())
    assert max(differences) > 0.1


# The layer ------------------------------------------------------------------------------------


def transparent(case, layer):
    """Inputs and parameters with the oracle's logits, and experts that write their own number.

    The features of a token are its logits and a 1. Expert e maps every token to unit vector e, so
    that a layer's output is the weight of every expert.
    """
    logits_BTE = layer["router_logits"].astype(np.float64)
    num_experts = logits_BTE.shape[-1]
    one_E1 = np.ones((num_experts, 1))
    router = {"kernel": np.eye(num_experts + 1, num_experts)}
    features_BTE = logits_BTE
    first = np.zeros((num_experts, num_experts + 1, 1))
    first[:, -1] = 1  # the hidden unit sees the constant feature
    wo = np.eye(num_experts, num_experts + 1)[:, None]
    if case in NLLB:
        # Half from the product and half from the bias: relu(1/2 + 1/2) / 2 + 1/2.
        expert = {"wi": first / 2, "wi_bias": one_E1 / 2, "wo": wo / 2, "wo_bias": wo[:, 0] / 2}
        activations = ("relu",)
    else:
        silu_of_1 = 1 / (1 + math.exp(-1))
        expert = {"wi_0": first, "wi_1": first / silu_of_1, "wo": wo}
        activations = ("silu", "linear")
    if published(case).get("router_bias"):
        router["bias"] = np.linspace(-1, 2, num_experts)
        features_BTE = logits_BTE - router["bias"]
    x_BTD = np.concatenate([features_BTE, np.ones((*logits_BTE.shape[:2], 1))], axis=-1)
    return x_BTD, {"router": router, "expert": expert}, activations


def apply(case, layer):
    """Outputs and statistics of a MoeLayer in float64, the whole batch in one group."""
    with jax.enable_x64(True):
        x_BTD, params, activations = transparent(case, layer)
        moe = MoeLayer(
            moe_config(case, layer["mask"].size),
            d_ff=1,
            activations=activations,
            init_scale=1.0,
            capture_router=True,
        )
        tokens = Tokens(jnp.asarray(layer["mask"]))
        y_BTD, stats = jax.jit(moe.apply)({"params": params}, jnp.asarray(x_BTD), tokens)
        assert y_BTD.dtype == stats.logits.dtype == np.float64
        return jax.tree.map(np.asarray, (y_BTD, stats))


@layers(*DROPLESS, *NLLB)
def test_layer(case, tag):
    layer = arrays(case, tag)
    y_BTD, stats = apply(case, layer)
    np.testing.assert_allclose(stats.logits, layer["router_logits"], rtol=0, atol=1e-12)
    assert stats.expert_index.shape == layer["expert_index"].shape
    same(stats.expert_index, layer["expert_index"])
    real_BTK = np.broadcast_to(layer["mask"][..., None], stats.kept.shape)
    kept_BTK = layer.get("kept", real_BTK)
    same(stats.kept, kept_BTK)
    # What a choice weighs if nothing is dropped.
    gate_BTK = layer.get("gate")
    if gate_BTK is None:
        gate_BTK = np.take_along_axis(layer["router_probs"], layer["expert_index"], axis=-1)
        if published(case)["normalize_router_prob_before_dropping"]:
            gate_BTK = gate_BTK / gate_BTK.sum(-1, keepdims=True)
    close(stats.gate, gate_BTK)
    close(y_BTD[..., :-1], wanted_weights(layer))
    assert not y_BTD[..., -1].any()

    # The sums.
    real = layer["mask"]
    num_experts = stats.logits.shape[-1]
    assert stats.num_tokens == real.sum()
    same(stats.num_choices_K, np.full(kept_BTK.shape[-1], real.sum()))
    same(stats.num_dropped_K, (~kept_BTK)[real].sum(0))
    asked = layer["expert_index"][real].reshape(-1)
    same(stats.tokens_per_expert_E, np.bincount(asked, minlength=num_experts))
    confidence = layer["router_probs"][real].max(-1).mean()
    np.testing.assert_allclose(stats.router_confidence, confidence, rtol=1e-6)


@pytest.mark.parametrize("case", DROPLESS)
def test_load_balance_loss_of_a_layer(case):
    _, stats = apply(case, pooled(case))
    np.testing.assert_allclose(stats.load_balance_loss, oracle(case)["aux_loss"], rtol=1e-5)
