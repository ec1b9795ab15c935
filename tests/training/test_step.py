import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from switchx.models.t5 import T5
from switchx.moe.config import MoeConfig
from switchx.training.losses import LossConfig
from switchx.training.metrics import summarize
from switchx.training.optimizer import OptimizerConfig, make_optimizer
from switchx.training.state import TrainState, describe_state
from switchx.training.step import make_loss, make_train_step, token_counts
from switchx.training.trainable import select, split
from tests.training.conftest import random_batch, random_params, small_config

LOSS = LossConfig(z_loss=1e-3)


def state_of(params, optimizer) -> TrainState:
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(params),
        rng=jax.random.key_data(jax.random.key(3)),
    )


def update(config, params, batch, **options):
    optimizer = optax.sgd(0.1)
    step = make_train_step(T5(config), LOSS, optimizer, **options)
    return jax.jit(step)(state_of(params, optimizer), batch)


def test_loss_is_composed_of_the_models_own_outputs(config, params, batch):
    # The obvious way: full logits, per-token softmax, means over real tokens, layers summed.
    model = T5(config)
    output = model.apply(
        {"params": params},
        batch.encoder_tokens,
        batch.decoder_input_tokens,
        encoder_segment_ids=batch.encoder_segment_ids,
        decoder_segment_ids=batch.decoder_segment_ids,
    )
    logits = np.asarray(output.logits, np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    target_logit = np.take_along_axis(logits, batch.decoder_target_tokens[..., None], -1)[..., 0]
    weights = batch.decoder_loss_weights
    cross_entropy = ((log_z - target_logit) * weights).sum() / weights.sum()
    z_loss = (1e-3 * log_z**2 * weights).sum() / weights.sum()
    layers = [*output.router["encoder"], *output.router["decoder"]]
    balance = sum(float(stats.load_balance_loss) for stats in layers)
    router_z = sum(float(stats.router_z_loss) for stats in layers)
    expected = cross_entropy + z_loss + 1e-2 * balance + 1e-3 * router_z

    device_batch = jax.tree.map(jnp.asarray, batch)
    value, sums = make_loss(model, LOSS, train=False)(
        params, device_batch, None, token_counts(device_batch, config.stack_moe)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    summary = summarize(sums, stack_moe=config.stack_moe)
    np.testing.assert_allclose(summary["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(summary["cross_entropy"], cross_entropy, rtol=1e-5)
    accuracy = ((logits.argmax(-1) == batch.decoder_target_tokens) * weights).sum() / weights.sum()
    np.testing.assert_allclose(summary["accuracy"], accuracy, rtol=1e-6)
    assert summary["num_targets"] == weights.sum()
    real = (batch.encoder_segment_ids != 0).sum() + (batch.decoder_segment_ids != 0).sum()
    assert summary["num_tokens"] == real


@pytest.mark.parametrize("num_microbatches", [2, 4, 8])
def test_microbatches_equal_one_batch(config, params, batch, num_microbatches):
    # Rows have different numbers of real tokens, so a mean of means would differ.
    whole, whole_metrics = update(config, params, batch)
    pieces, metrics = update(config, params, batch, num_microbatches=num_microbatches)
    for leaf, other in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(whole_metrics.grad_norm, metrics.grad_norm, rtol=1e-5)
    for leaf, other in zip(
        jax.tree.leaves(whole_metrics.sums), jax.tree.leaves(metrics.sums), strict=True
    ):
        np.testing.assert_allclose(leaf, other, rtol=1e-5)


def test_padding_rows_change_nothing(config, params, batch):
    padded = jax.tree.map(lambda leaf: np.concatenate([leaf, np.zeros_like(leaf)]), batch)
    state, metrics = update(config, params, batch)
    padded_state, padded_metrics = update(config, params, padded)
    for leaf, other in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(padded_state.params), strict=True
    ):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics.grad_norm, padded_metrics.grad_norm, rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(config, params, batch, value):
    optimizer = optax.adam(0.1)
    step = jax.jit(make_train_step(T5(config), LOSS, optimizer))
    state, metrics = step(state_of(params, optimizer), batch)
    assert metrics.finite
    broken = dict(state.params)
    broken["token_embedder"] = {
        "embedding": state.params["token_embedder"]["embedding"].at[:, 0].set(value)
    }
    state = TrainState(step=state.step, params=broken, opt_state=state.opt_state, rng=state.rng)
    after, metrics = step(state, batch)
    assert not metrics.finite
    assert int(after.step) == 2
    before_leaves = jax.tree.leaves((state.params, state.opt_state))
    for leaf, old in zip(
        jax.tree.leaves((after.params, after.opt_state)), before_leaves, strict=True
    ):
        np.testing.assert_array_equal(leaf, old)


def test_dropout_and_jitter_depend_on_the_step_and_on_nothing_else(batch):
    from tests.training.conftest import random_params, small_config

    config = small_config(dropout_rate=0.3)
    params = random_params(config)
    optimizer = optax.sgd(0.0)
    step = jax.jit(make_train_step(T5(config), LOSS, optimizer))
    state = state_of(params, optimizer)
    first, second = step(state, batch), step(state, batch)
    assert float(first[1].grad_norm) == float(second[1].grad_norm)
    later = step(first[0], batch)
    assert float(later[1].grad_norm) != float(first[1].grad_norm)


def test_norms_are_reported_by_name_on_request(config, params, batch):
    _, metrics = update(config, params, batch, log_norms=True)
    name = "encoder/layers_1/mlp/expert/wi"
    kernel = params["encoder"]["layers_1"]["mlp"]["expert"]["wi"]
    np.testing.assert_allclose(metrics.norms["param"][name], np.linalg.norm(kernel), rtol=1e-5)
    total = np.sqrt(sum(float(norm) ** 2 for norm in metrics.norms["update"].values()))
    np.testing.assert_allclose(total, 0.1 * float(metrics.grad_norm), rtol=1e-5)


def test_route_padding_counts_padding_in_the_normaliser(config, batch):
    import dataclasses

    moe = dataclasses.replace(config.moe, route_padding=True)
    padded = token_counts(batch, {"encoder": moe, "decoder": config.moe})
    assert padded["encoder"] == batch.encoder_tokens.size
    assert padded["decoder"] == (batch.decoder_segment_ids != 0).sum()
    assert (
        token_counts(batch, config.stack_moe)["encoder"] == (batch.encoder_segment_ids != 0).sum()
    )


@pytest.mark.parametrize("scan_layers", [False, True])
def test_biases_of_loss_free_layers_move_against_their_load(config, batch, scan_layers):
    import dataclasses

    from tests.training.conftest import random_params

    moe = MoeConfig(
        num_experts=5, router="loss_free", top_k=2, group_size="row", bias_update_rate=0.25
    )
    config = dataclasses.replace(
        config, moe=moe, num_encoder_layers=4, sparse_every=2, scan_layers=scan_layers
    )
    params = random_params(config)
    state, metrics = update(config, params, batch)
    loads_LE = np.asarray(metrics.sums.router["encoder"].tokens_per_expert_E)
    moved = np.sign(loads_LE.mean(axis=1, keepdims=True) - loads_LE) * 0.25
    assert loads_LE.shape == (2, 5) and len(np.unique(loads_LE)) > 2
    if scan_layers:
        path = ("encoder", "blocks_0", "layers_1", "mlp", "balance_bias")
        found = [(path, moved)]
    else:
        paths = [("encoder", f"layers_{n}", "mlp", "balance_bias") for n in (1, 3)]
        found = list(zip(paths, moved, strict=True))
    for path, expected in found:
        before, after = params, state.params
        for name in path:
            before, after = before[name], after[name]
        np.testing.assert_allclose(after - before, expected, rtol=1e-5, atol=1e-6)
    # In pieces the loads add up to the same.
    pieces, _ = update(config, params, batch, num_microbatches=4)
    for one, other in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(pieces.params), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


ADAMW = OptimizerConfig(
    name="adamw", learning_rate=0.1, schedule="constant", warmup_steps=0, weight_decay=0.5
)


@functools.cache
def partly_trained(patterns: str, router: str = "switch"):
    """A compiled step that trains some of the parameters, its optimizer and their paths."""
    config = small_config(
        moe=MoeConfig(num_experts=5, group_size="row", min_capacity=1, router=router)
    )
    params = random_params(config)
    trainable = select(params, patterns, "trainable")
    axes = describe_state(T5(config), lambda _: optax.sgd(0.1), seed=0).names.params
    optimizer = make_optimizer(ADAMW, axes)
    step = make_train_step(T5(config), LOSS, optimizer, trainable=trainable)
    state = dataclasses.replace(
        state_of(params, optax.identity()), opt_state=optimizer.init(split(params, trainable)[0])
    )
    return jax.jit(step).lower(state, random_batch()).compile(), state, trainable


@pytest.mark.parametrize("patterns", ["attention", "experts", "router_frozen"])
def test_frozen_parameters_keep_every_bit_and_cost_no_state(batch, patterns):
    # The biases of loss_free move without a gradient, and must not where routers are frozen.
    step, state, trainable = partly_trained(patterns, router="loss_free")
    after = state
    for _ in range(2):
        after, _ = step(after, batch)
    before, moved = (dict(traverse_util.flatten_dict(each.params)) for each in (state, after))
    assert before.keys() == moved.keys()
    for path, leaf in before.items():
        same = np.array_equal(np.asarray(leaf), np.asarray(moved[path]))
        assert same or path in trainable, path
        # AdamW's step or its decay moves every trained parameter.
        assert not same or path not in trainable, path
    slots = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert slots == 2 * sum(before[path].size for path in trainable)


def test_frozen_parameters_have_no_gradient():
    # Of the last norm alone the backward pass is the output head's; a step of everything is three
    # times a forward pass, and cannot be had for less.
    def flops(patterns):
        return partly_trained(patterns)[0].cost_analysis()["flops"]

    assert flops("decoder/final_layer_norm/scale") < 0.65 * flops("all")
    assert flops("attention") < 0.95 * flops("all")


def test_what_is_trained_moves_as_if_all_were(config, params, batch):
    # SGD couples no two parameters.
    everything, _ = update(config, params, batch)
    trainable = select(params, "experts", "trainable")
    optimizer = optax.sgd(0.1)
    step = make_train_step(T5(config), LOSS, optimizer, trainable=trainable, num_microbatches=2)
    part, _ = jax.jit(step)(state_of(params, optimizer), batch)
    for path in trainable:
        one, other = (traverse_util.flatten_dict(each.params)[path] for each in (part, everything))
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
