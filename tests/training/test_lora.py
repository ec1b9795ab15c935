import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import PartitionSpec

from switchx import sharding
from switchx.errors import UserError
from switchx.models.stacking import stack_layers
from switchx.models.t5 import T5
from switchx.training import lora
from switchx.training.lora import LoraConfig
from switchx.training.losses import LossConfig
from switchx.training.optimizer import OptimizerConfig, make_optimizer
from switchx.training.state import create_state, describe_state
from switchx.training.step import make_loss, make_train_step, token_counts
from tests.training.conftest import random_batch, random_params, small_config

ADAMW = OptimizerConfig(name="adamw", learning_rate=0.05, schedule="constant", warmup_steps=0)


def described(config, **changes):
    return describe_state(
        T5(config), lambda axes: make_optimizer(ADAMW, axes), seed=3, lora=LoraConfig(**changes)
    )


def with_adapters(config, params, seed=3, **changes):
    """The parameters with adapters beside them, B no longer zero."""
    shapes = described(config, **changes).shapes.params["adapters"]
    rng = np.random.default_rng(seed)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape)), shapes)
    drawn = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), drawn)
    return {**params, "adapters": {**drawn, "scale": jnp.float32(0.5)}}


def flat(tree) -> dict:
    return {"/".join(path): leaf for path, leaf in traverse_util.flatten_dict(tree).items()}


def test_a_hand_written_merge_and_its_gradients():
    # W [2, 3] + 2 · a bᵀ for rank 1; with the loss Σ M ⊙ W' the gradient of W' is M.
    weight = jnp.arange(6.0).reshape(2, 3)
    a, b = jnp.array([[1.0], [2.0]]), jnp.array([[3.0, 0.0, -1.0]])
    cotangent = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    tree = {"kernel": weight, "adapters": {"scale": jnp.float32(2), "kernel": {"a": a, "b": b}}}
    merged = lora.merge(tree)
    assert set(merged) == {"kernel"}
    np.testing.assert_array_equal(merged["kernel"], [[6.0, 1.0, 0.0], [15.0, 4.0, 1.0]])

    gradient = jax.grad(lambda tree: jnp.sum(cotangent * lora.merge(tree)["kernel"]))(tree)
    # dA = scale · M Bᵀ, dB = scale · Aᵀ M
    np.testing.assert_array_equal(gradient["adapters"]["kernel"]["a"], [[0.0], [12.0]])
    np.testing.assert_array_equal(gradient["adapters"]["kernel"]["b"], [[18.0, 24.0, 30.0]])


def test_parameters_without_adapters_stay_as_they_are(params):
    assert lora.merge(params) is params


def test_what_gets_an_adapter_and_of_which_shape(config):
    shapes = flat(described(config, rank=3).shapes.params["adapters"])
    assert shapes.pop("scale").shape == ()
    owners = {name.rsplit("/", 1)[0] for name in shapes}
    assert owners == {
        name
        for name in flat(random_params(config))
        if ("attention/" in name and name.endswith("kernel")) or "/expert/w" in name
    }
    # Every expert has its own.
    expert = "encoder/layers_1/mlp/expert/wi"
    assert shapes[f"{expert}/a"].shape == (5, 10, 3)
    assert shapes[f"{expert}/b"].shape == (5, 3, 14)
    assert shapes["encoder/layers_0/attention/query/kernel/b"].shape == (3, 12)


def test_axes_are_those_of_the_matrices(config):
    names = flat(described(config).names.params["adapters"])
    expert = "encoder/layers_1/mlp/expert/wi"
    assert names[f"{expert}/a"] == PartitionSpec("expert", "expert_embed", None)
    assert names[f"{expert}/b"] == PartitionSpec("expert", None, "mlp")


def test_a_new_adapter_changes_nothing(config, batch):
    # The law of the first step: the output of the base, to the bit.
    created = jax.jit(described(config).init)()
    base = lora.base(created.params)
    for name, leaf in flat(lora.merge(created.params)).items():
        np.testing.assert_array_equal(leaf, flat(base)[name], err_msg=name)
    a = created.params["adapters"]["encoder"]["layers_1"]["mlp"]["expert"]["wi"]["a"]
    # N(0, 1 / in), and no two experts alike.
    assert 0.5 < float(jnp.std(a)) * np.sqrt(10) < 1.5
    assert not np.array_equal(a[0], a[1])


def test_scanned_and_unrolled_models_merge_alike():
    fields = dict(num_encoder_layers=4, num_decoder_layers=4)
    config = small_config(**fields)
    whole = with_adapters(config, random_params(config))
    merged = stack_layers(lora.merge(whole), config)
    adapters = {"scale": whole["adapters"]["scale"]}
    adapters |= stack_layers(whole["adapters"], config) | adapters
    stacked = {**stack_layers(lora.base(whole), config), "adapters": adapters}
    shapes = described(small_config(scan_layers=True, **fields)).shapes.params
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    for name, leaf in flat(lora.merge(stacked)).items():
        np.testing.assert_allclose(leaf, flat(merged)[name], rtol=1e-6, atol=1e-6)


def test_the_loss_is_that_of_the_merged_parameters(config, params, batch):
    whole = with_adapters(config, params)
    loss = jax.jit(make_loss(T5(config), LossConfig(), train=False))
    counts = token_counts(batch, config.stack_moe)
    value, _ = loss(whole, batch, None, counts)
    merged, _ = loss(lora.merge(whole), batch, None, counts)
    without, _ = loss(params, batch, None, counts)
    assert value == merged != without


@pytest.mark.parametrize("shape", [{"data": 1}, {"expert": 5}], ids=str)
def test_only_adapters_are_trained_on_any_mesh(shape):
    config = small_config(num_heads=2, vocab_size=62, d_ff=12)
    mesh = sharding.make_mesh(shape, jax.devices()[: sum(shape.values())])
    with sharding.use(mesh):
        plan = create_state(
            T5(config),
            lambda axes: make_optimizer(ADAMW, axes),
            seed=3,
            mesh=mesh,
            lora=LoraConfig(rank=2),
        )
        state = plan.create()
        before = jax.device_get(state)
        step = make_train_step(T5(config), LossConfig(), plan.optimizer, trainable=plan.trainable)
        rows = jax.device_put(random_batch(10), sharding.batch_sharding(mesh))
        jitted = jax.jit(step)
        after, metrics = jitted(jitted(state, rows)[0], rows)
    assert float(metrics.grad_norm) > 0
    for name, leaf in flat(lora.base(after.params)).items():
        np.testing.assert_array_equal(leaf, flat(lora.base(before.params))[name], err_msg=name)
    moved, old = flat(after.params["adapters"]), flat(before.params["adapters"])
    assert moved["scale"] == old["scale"]
    for name in moved:
        if name.endswith("attention/query/kernel/b"):
            assert np.abs(moved[name] - old[name]).max() > 0, name
    # Two moments of every adapter, and nothing of the base.
    slots = sum(leaf.size for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim)
    assert slots == 2 * sum(leaf.size for name, leaf in moved.items() if name != "scale")


def test_adapters_have_to_be_trained_and_have_a_place(config):
    def plan(trainable=None, **changes):
        return describe_state(
            T5(config),
            lambda axes: make_optimizer(ADAMW, axes),
            seed=0,
            trainable=trainable,
            lora=LoraConfig(**changes),
        )

    norms = plan(trainable=["adapters", ".*layer_norm/scale"]).trainable
    assert any(path[-2].endswith("layer_norm") for path in norms)
    with pytest.raises(UserError, match="'attention' leaves out the adapters.*add 'adapters'"):
        plan(trainable="attention")
    with pytest.raises(UserError, match="targets = .*names no matrix"):
        plan(targets=".*layer_norm/scale")
    with pytest.raises(UserError, match="LoraConfig.targets = 'atention'.*closest is 'attention'"):
        plan(targets=["atention"])


@pytest.mark.parametrize(
    "changes", [dict(rank=0), dict(alpha=0.0), dict(targets=[]), dict(rank="8")]
)
def test_mistaken_fields(changes):
    with pytest.raises(UserError, match=f"LoraConfig.{next(iter(changes))}"):
        dataclasses.replace(LoraConfig(), **changes)
