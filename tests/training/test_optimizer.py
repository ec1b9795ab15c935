"""Optimizers: literals, a slow loop written from the paper, stacked equals separate, state axes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from switchx.errors import UserError
from switchx.training.optimizer import (
    AdafactorState,
    OptimizerConfig,
    adafactor,
    learning_rate_schedule,
    make_optimizer,
    state_axes,
)

# Sizes differ pairwise. With matrices factored from 5 on, `gate` (4 columns) is not.
L, E, D, F, H, R = 3, 2, 6, 8, 4, 7
AXES = {
    "embedding": ("vocab", "embed"),
    "layers": {
        "wi": ("layers", "expert", "embed", "expert_mlp"),
        "wo": ("expert", "expert_mlp", "layers", "embed"),
        "kernel": PartitionSpec("embed", "layers", "mlp"),
        "gate": ("layers", "embed", None),
        "norm": ("layers", "embed"),
        "bias": PartitionSpec("layers"),  # the second axis has no name
        "expert_bias": ("layers", "expert"),
    },
    "relative": ("relpos_buckets", "heads"),
    "norm": ("embed",),
    "temperature": (),
}
SHAPES = {
    "embedding": (11, D),
    "layers": {
        "wi": (L, E, D, F),
        "wo": (E, F, L, D),
        "kernel": (D, L, 9),
        "gate": (L, D, H),
        "norm": (L, D),
        "bias": (L, 5),
        "expert_bias": (L, E),
    },
    "relative": (R, H),
    "norm": (D,),
    "temperature": (),
}


def trees(count, seed=0, shapes=None):
    """Trees of NumPy numbers of very different sizes, with a few exact zeros."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        x = rng.normal(size=shape) * 10.0 ** rng.uniform(-3, 1)
        return np.asarray(np.where(rng.random(shape) < 0.05, 0, x), np.float32)

    return [
        jax.tree.map(draw, shapes or SHAPES, is_leaf=lambda x: isinstance(x, tuple))
        for _ in range(count)
    ]


def run(optimizer, params, gradients):
    """Parameters after each update, and the last state."""

    @jax.jit
    def update(params, state, gradient):
        steps, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, steps), state

    params, history = jax.tree.map(jnp.asarray, params), []
    state = jax.jit(optimizer.init)(params)
    for gradient in gradients:
        params, state = update(params, state, gradient)
        history.append(params)
    return history, state


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# Schedules


@pytest.mark.parametrize(
    ("fields", "literals"),
    [
        ({}, {0: 0.01, 1: 0.01, 9_999: 0.01, 10_000: 0.01, 40_000: 0.005, 1_000_000: 0.001}),
        ({"learning_rate": 2.0, "warmup_steps": 0}, {0: 2.0, 1: 2.0, 4: 1.0, 16: 0.5}),
        (
            {"learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0},
            {0: 1e-3, 1: 1e-3, 10_000_000: 1e-3},
        ),
        (
            {"schedule": "constant", "warmup_steps": 4},
            {0: 0.0, 1: 0.25, 3: 0.75, 4: 1.0, 5: 1.0, 99: 1.0},
        ),
        (
            {"schedule": "linear", "warmup_steps": 4, "decay_steps": 12, "final_fraction": 0.5},
            {0: 0.0, 2: 0.5, 4: 1.0, 8: 0.75, 12: 0.5, 99: 0.5},
        ),
        ({"schedule": "linear", "warmup_steps": 0, "decay_steps": 4}, {0: 1.0, 1: 0.75, 4: 0.0}),
        (
            {"schedule": "cosine", "warmup_steps": 2, "decay_steps": 10, "learning_rate": 8.0},
            {0: 0.0, 1: 4.0, 2: 8.0, 4: 4 * (1 + 2**-0.5), 6: 4.0, 10: 0.0, 99: 0.0},
        ),
        (
            {"schedule": "cosine", "warmup_steps": 0, "decay_steps": 4, "final_fraction": 0.1},
            {0: 1.0, 2: 0.55, 4: 0.1, 5: 0.1},
        ),
    ],
)
def test_schedules(fields, literals):
    schedule = jax.jit(learning_rate_schedule(OptimizerConfig(**fields)))
    for step, expected in literals.items():
        rate = schedule(jnp.int32(step))
        assert rate.dtype == jnp.float32 and rate.shape == ()
        np.testing.assert_allclose(rate, expected, rtol=1e-6, atol=1e-7, err_msg=f"step {step}")


def test_schedules_take_python_steps():
    np.testing.assert_allclose(learning_rate_schedule(OptimizerConfig())(40_000), 0.005)


# Adafactor


def test_first_steps_by_hand():
    # One 2 x 2 matrix, learning rate 1, no parameter scale, no clipping. Update 1 has decay 0:
    # row means of G² (1 + 4)/2, (9 + 36)/2; column means (1 + 9)/2, (4 + 36)/2; mean 12.5.
    axes = {"w": ("embed", "mlp")}
    optimizer = adafactor(
        1.0,
        axes,
        clip_threshold=None,
        multiply_by_parameter_scale=False,
        min_dim_size_to_factor=2,
    )
    gradient = {"w": np.array([[1.0, 2.0], [3.0, 6.0]], np.float32)}
    start = {"w": np.zeros((2, 2), np.float32)}
    history, state = run(optimizer, start, [gradient])
    np.testing.assert_allclose(state.v_row["w"], [2.5, 22.5], rtol=1e-6)
    np.testing.assert_allclose(state.v_col["w"], [5, 20], rtol=1e-6)
    # This G² has rank one, so the factored V is exact and every step is the sign.
    np.testing.assert_allclose(history[0]["w"], -np.ones((2, 2)), rtol=1e-6)

    # Update 2, gradient 0 but at one place: decay 1 - 2^-0.8.
    gradients = [gradient, {"w": np.array([[4.0, 0.0], [0.0, 0.0]], np.float32)}]
    history, state = run(optimizer, start, gradients)
    decay = 1 - 2**-0.8
    row = decay * np.array([2.5, 22.5]) + (1 - decay) * np.array([8, 0])
    column = decay * np.array([5, 20]) + (1 - decay) * np.array([8, 0])
    np.testing.assert_allclose(state.v_row["w"], row, rtol=1e-6)
    np.testing.assert_allclose(state.v_col["w"], column, rtol=1e-6)
    step = 4 / np.sqrt(row[0] * column[0] / row.mean())
    np.testing.assert_allclose(history[1]["w"], [[-1 - step, -1], [-1, -1]], rtol=1e-6)
    assert int(state.count) == 2 and state.v["w"].shape == (1,)


def test_clipping_and_parameter_scale_by_hand():
    # Unfactored, update 1: U = sign(G) where G is not 0. RMS(U) = sqrt(1/2) is clipped to 1/2 by
    # dividing by sqrt(2). RMS(X) = 5, and 1e-3 for a parameter of zeros. Learning rate 1/10.
    optimizer = adafactor(0.1, {"a": ("embed",), "b": ("embed",)}, clip_threshold=0.5)
    params = {"a": np.array([7.0, 1.0], np.float32), "b": np.zeros(2, np.float32)}
    gradient = {"a": np.array([3.0, 0.0], np.float32), "b": np.array([0.0, -2.0], np.float32)}
    history, state = run(optimizer, params, [gradient])
    np.testing.assert_allclose(history[0]["a"], [7 - 0.5 / 2**0.5, 1], rtol=1e-6)
    np.testing.assert_allclose(history[0]["b"], [0, 1e-4 / 2**0.5], rtol=1e-6)
    np.testing.assert_allclose(state.v["a"], [9, 1e-30], rtol=1e-6)


def slow_adafactor(param, gradients, config):
    """One member (no batch axes) in float64, from Shazeer & Stern 2018, algorithms 4 and 5."""
    x = np.asarray(param, np.float64)
    schedule = learning_rate_schedule(config)
    factored = x.ndim == 2 and min(x.shape) >= config.min_dim_size_to_factor
    row = column = full = mean = 0.0
    for t, g in enumerate(gradients, start=1):
        g = np.asarray(g, np.float64)
        beta = 1 - t**-config.decay_rate
        if factored:
            row = beta * row + (1 - beta) * (g**2 + config.epsilon1).sum(axis=1)
            column = beta * column + (1 - beta) * (g**2 + config.epsilon1).sum(axis=0)
            # The paper's R and C are sums; V = R C / (1ᵀ R).
            full = np.outer(row, column) / row.sum()
        else:
            full = beta * full + (1 - beta) * (g**2 + config.epsilon1)
        u = g / np.sqrt(full)
        if config.clip_threshold is not None:
            u = u / max(1, np.sqrt(np.mean(u**2)) / config.clip_threshold)
        alpha = float(schedule(t - 1))
        if config.multiply_by_parameter_scale:
            alpha *= max(config.epsilon2, np.sqrt(np.mean(x**2)))
        step = alpha * u
        if config.momentum is not None:
            mean = config.momentum * mean + (1 - config.momentum) * step
            step = mean
        x = x - step
    return x


def batch_positions(names, ndim):
    names = (*names, *(None,) * (ndim - len(names)))
    return [i for i, name in enumerate(names) if name in ("layers", "expert")]


def members(names, array):
    """The indices of every member of a stacked parameter."""
    positions = batch_positions(names, array.ndim)
    for index in np.ndindex(*(array.shape[i] for i in positions)):
        full = [slice(None)] * array.ndim
        for position, i in zip(positions, index, strict=True):
            full[position] = i
        yield tuple(full)


CONFIGS = [
    {},
    {
        "clip_threshold": 0.3,
        "decay_rate": 0.6,
        "schedule": "constant",
        "warmup_steps": 2,
        "epsilon2": 0.1,
    },
    {
        "clip_threshold": None,
        "multiply_by_parameter_scale": False,
        "epsilon1": 1e-3,
        "momentum": 0.9,
    },
]


@pytest.mark.parametrize("fields", CONFIGS)
def test_equals_the_slow_loop_of_every_member(fields):
    config = OptimizerConfig(**{"warmup_steps": 3, "min_dim_size_to_factor": 5, **fields})
    params, *gradients = trees(6)
    history, _ = run(make_optimizer(config, AXES), params, gradients)

    def check(path, param):
        names = at(AXES, path)
        actual = np.asarray(at(history[-1], path))
        for index in members(names, param):
            expected = slow_adafactor(
                param[index], [at(gradient, path)[index] for gradient in gradients], config
            )
            scale = np.abs(expected - param[index]).max()
            np.testing.assert_allclose(
                actual[index], expected, rtol=2e-6, atol=2e-5 * scale, err_msg=str(path)
            )

    jax.tree_util.tree_map_with_path(check, params)


def at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


def test_stacked_members_move_as_alone():
    config = OptimizerConfig(warmup_steps=3, min_dim_size_to_factor=5)
    params, *gradients = trees(4)
    history, _ = run(make_optimizer(config, AXES), params, gradients)

    # The same numbers with every member a parameter of its own.
    def unstack(tree):
        separate = {}

        def visit(path, array):
            names = at(AXES, path)
            for number, index in enumerate(members(names, array)):
                separate[jax.tree_util.keystr(path) + str(number)] = array[index]

        jax.tree_util.tree_map_with_path(visit, tree)
        return separate

    separate_axes = {}

    def visit_axes(path, array):
        names = at(AXES, path)
        names = (*names, *(None,) * (array.ndim - len(names)))
        inner = tuple(name for name in names if name not in ("layers", "expert"))
        for number, _ in enumerate(members(names, array)):
            separate_axes[jax.tree_util.keystr(path) + str(number)] = inner

    jax.tree_util.tree_map_with_path(visit_axes, params)
    separate, _ = run(
        make_optimizer(config, separate_axes), unstack(params), [unstack(g) for g in gradients]
    )
    for stacked, alone in zip(history, separate, strict=True):
        stacked = unstack(jax.tree.map(np.asarray, stacked))
        # The arithmetic is the same; XLA sums other layouts in another order, in the last bit.
        assert stacked.keys() == alone.keys()
        for name in stacked:
            one_ulp = np.finfo(np.float32).eps * np.abs(alone[name]).max()
            np.testing.assert_allclose(
                stacked[name], alone[name], rtol=0, atol=2 * one_ulp, err_msg=name
            )


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_equals_optax_on_single_parameters(momentum):
    # The two laws coincide without batch axes. (They differ in which dimensions of three or more
    # are factored, in RMS over a whole stack, and in where weight decay applies.)
    shapes = {"matrix": (D, F), "thin": (H, 9), "vector": (D,)}
    axes = {"matrix": ("embed", "mlp"), "thin": ("heads", "embed"), "vector": ("embed",)}
    params, *gradients = trees(5, shapes=shapes)
    schedule = optax.linear_schedule(0.1, 0.2, 3)
    ours = adafactor(schedule, axes, min_dim_size_to_factor=5, momentum=momentum)
    theirs = optax.adafactor(schedule, min_dim_size_to_factor=5, momentum=momentum)
    for mine, other in zip(
        run(ours, params, gradients)[0], run(theirs, params, gradients)[0], strict=True
    ):
        for name in shapes:
            np.testing.assert_allclose(mine[name], other[name], rtol=2e-6, atol=1e-8)


def test_state_shapes_and_dtypes():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trees(1)[0])
    config = OptimizerConfig(min_dim_size_to_factor=5)
    state = make_optimizer(config, AXES).init(params)
    assert isinstance(state, AdafactorState) and state.count.dtype == jnp.int32
    assert {x.dtype for x in jax.tree.leaves(state[1:])} == {jnp.dtype(jnp.float32)}
    layers = {field: getattr(state, field)["layers"] for field in ("v_row", "v_col", "v")}
    assert layers["v_row"]["wi"].shape == (L, E, D) and layers["v_col"]["wi"].shape == (L, E, F)
    assert layers["v_row"]["wo"].shape == (E, F, L) and layers["v_col"]["wo"].shape == (E, L, D)
    assert layers["v_row"]["kernel"].shape == (D, L)
    assert layers["v_col"]["kernel"].shape == (L, 9)
    assert layers["v"]["gate"].shape == (L, D, H) and layers["v_row"]["gate"].shape == (1,)
    assert layers["v"]["wi"].shape == (1,) and layers["v"]["norm"].shape == (L, D)
    steps, _ = jax.eval_shape(make_optimizer(config, AXES).update, params, state, params)
    assert {x.dtype for x in jax.tree.leaves(steps)} == {jnp.dtype(jnp.bfloat16)}


def test_wrong_axes_and_missing_params():
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"\['b'\] has no logical axes"):
        adafactor(1.0, {"w": ("embed", "mlp")}).init(params)
    with pytest.raises(
        ValueError, match=r"\['w'\] of shape \(2, 3\) has logical axes \('embed',\)"
    ):
        adafactor(1.0, {"w": ("embed",), "b": ("mlp",)}).init(params)
    optimizer = adafactor(1.0, {"w": ("embed", "mlp"), "b": ("mlp",)})
    with pytest.raises(ValueError, match="needs params"):
        optimizer.update(params, optimizer.init(params))


def test_masked_parameters_stay_and_have_no_state():
    params, gradient = trees(2)
    optimizer = make_optimizer(OptimizerConfig(min_dim_size_to_factor=5), AXES)
    labels = {name: "train" if name == "layers" else "freeze" for name in params}
    frozen = optax.partition({"train": optimizer, "freeze": optax.set_to_zero()}, labels)
    plain, _ = run(optimizer, params, [gradient])
    history, state = run(frozen, params, [gradient])
    assert_equal(history[0]["norm"], params["norm"])
    assert_equal(history[0]["layers"], plain[0]["layers"])
    specs = state_axes(frozen, params, AXES)
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(specs)) == 1 + 3 * 7


def test_the_compiled_update_is_in_place():
    shapes = {"experts": (8, 256, 512), "norm": (256,)}
    axes = {"experts": ("expert", "embed", "expert_mlp"), "norm": ("embed",)}
    params, gradient = trees(2, shapes=shapes)
    optimizer = make_optimizer(OptimizerConfig(), axes)

    def update(params, state, gradient):
        steps, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, steps), state

    state = jax.jit(optimizer.init)(params)
    jitted = jax.jit(update, donate_argnums=(0, 1))
    memory = jitted.lower(params, state, gradient).compile().memory_analysis()
    bytes_of = sum(x.nbytes for x in jax.tree.leaves((params, state)))
    assert memory.alias_size_in_bytes == bytes_of
    assert memory.temp_size_in_bytes < 2 * params["experts"].nbytes


# Chains


def test_global_norm_clipping():
    axes = {"w": ("embed",)}
    params = {"w": np.array([1.0, 1.0], np.float32)}
    gradient = {"w": np.array([3.0, 4.0], np.float32)}
    for name in ("adafactor", "adamw"):
        config = OptimizerConfig(
            name=name, clip_norm=1.0, warmup_steps=0, epsilon1=1.0, epsilon=1.0
        )
        clipped, _ = run(make_optimizer(config, axes), params, [gradient])
        without = dataclasses.replace(config, clip_norm=None)
        fifth = {"w": gradient["w"] / 5}
        expected, _ = run(make_optimizer(without, axes), params, [fifth])
        np.testing.assert_allclose(clipped[0]["w"], expected[0]["w"], rtol=1e-6)
        unclipped, _ = run(make_optimizer(without, axes), params, [gradient])
        assert np.abs(unclipped[0]["w"] - clipped[0]["w"]).max() > 1e-3


def test_adamw_by_hand_and_its_decay_mask():
    # Update 1 of Adam is sign(g) (epsilon aside); with gradient 0 only the decay remains.
    config = OptimizerConfig(
        name="adamw", schedule="constant", warmup_steps=0, learning_rate=0.1, weight_decay=0.5
    )
    optimizer = make_optimizer(config, AXES)
    ones = jax.tree.map(np.ones_like, trees(1)[0])
    history, _ = run(optimizer, ones, [jax.tree.map(np.zeros_like, ones)])
    decayed = {"embedding", "wi", "wo", "kernel", "gate"}

    def check(path, after):
        expected = 0.95 if path[-1].key in decayed else 1.0
        np.testing.assert_allclose(after, expected, rtol=1e-6, err_msg=str(path))

    jax.tree_util.tree_map_with_path(check, history[0])
    history, _ = run(optimizer, ones, [ones])
    np.testing.assert_allclose(history[0]["norm"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(history[0]["embedding"], 0.85, rtol=1e-6)


def test_adamw_counts_its_own_steps():
    config = OptimizerConfig(name="adamw", schedule="linear", warmup_steps=2, decay_steps=4)
    params, gradient = {"w": np.zeros(3, np.float32)}, {"w": np.ones(3, np.float32)}
    history, _ = run(make_optimizer(config, {"w": ("embed",)}), params, [gradient] * 5)
    # Rates 0, 1/2, 1, 1/2, 0 and steps of sign(g).
    np.testing.assert_allclose([x["w"][0] for x in history], [0, -0.5, -1.5, -2, -2], rtol=1e-4)


# Axes of the state


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"momentum": 0.9, "clip_norm": 1.0},
        {"name": "adamw"},
        {"name": "adamw", "weight_decay": 0.1, "clip_norm": 1.0},
    ],
)
def test_state_axes_fit_every_leaf(fields):
    config = OptimizerConfig(min_dim_size_to_factor=5, **fields)
    optimizer = make_optimizer(config, AXES)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trees(1)[0])
    state = jax.eval_shape(optimizer.init, params)
    specs = state_axes(optimizer, params, AXES)
    assert jax.tree.structure(specs) == jax.tree.structure(state)
    sizes = {
        ("vocab",): (11,),
        ("layers", "expert", "embed"): (L, E, D),
        ("layers", "expert", "expert_mlp"): (L, E, F),
    }
    named = 0
    for leaf, spec in zip(jax.tree.leaves(state), jax.tree.leaves(specs), strict=True):
        assert isinstance(spec, PartitionSpec)
        if leaf.size > 1:
            assert len(spec) == len(leaf.shape)
            named += 1
        else:
            assert spec == PartitionSpec()
        if tuple(spec) in sizes:
            assert leaf.shape == sizes[tuple(spec)]
    # Four factored parameters with a row and a column each, six others; the scalar has none.
    copies = 2 if config.name == "adamw" else 0 if config.momentum is None else 1
    assert named == 10 * copies + (4 * 2 + 6 if config.name == "adafactor" else 0)


def test_state_axes_by_hand():
    optimizer = make_optimizer(OptimizerConfig(min_dim_size_to_factor=5), AXES)
    specs = state_axes(optimizer, trees(1)[0], AXES)
    spec = PartitionSpec
    assert specs.count == spec()
    assert specs.v_row["layers"]["wi"] == spec("layers", "expert", "embed")
    assert specs.v_col["layers"]["wi"] == spec("layers", "expert", "expert_mlp")
    assert specs.v["layers"]["wi"] == spec()
    assert specs.v_row["layers"]["wo"] == spec("expert", "expert_mlp", "layers")
    assert specs.v_col["layers"]["wo"] == spec("expert", "layers", "embed")
    assert specs.v_row["layers"]["kernel"] == spec("embed", "layers")
    assert specs.v["layers"]["gate"] == spec("layers", "embed", None)
    assert specs.v["layers"]["bias"] == spec("layers", None)
    assert specs.v_row["norm"] == spec() and specs.v["norm"] == spec("embed")


# Configs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adafactr"}, "name = 'adafactr' is unknown; did you mean 'adafactor'?"),
        ({"schedule": "rsqr"}, "schedule = 'rsqr' is unknown; did you mean 'rsqrt'?"),
        ({"schedule": "polynomial"}, "schedule = 'polynomial' is unknown; valid: constant"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0: should be more than 0"),
        ({"learning_rate": float("nan")}, "learning_rate = nan: should be more than 0"),
        ({"warmup_steps": -1}, "warmup_steps = -1: should be 0 or more"),
        ({"schedule": "linear"}, "decay_steps = None: should be more than warmup_steps = 10000"),
        ({"schedule": "cosine", "decay_steps": 10_000}, "decay_steps = 10000: should be more"),
        ({"decay_steps": 5}, "decay_steps = 5: should be left alone: schedule 'rsqrt'"),
        ({"final_fraction": 0.5}, "final_fraction = 0.5: should be left alone"),
        ({"final_fraction": 1.5}, "final_fraction = 1.5: should be in [0, 1]"),
        ({"clip_norm": 0.0}, "clip_norm = 0.0: should be more than 0"),
        ({"clip_threshold": -1.0}, "clip_threshold = -1.0: should be more than 0"),
        ({"decay_rate": 0.0}, "decay_rate = 0.0: should be more than 0"),
        ({"epsilon1": -1.0}, "epsilon1 = -1.0: should be 0 or more"),
        ({"epsilon2": float("inf")}, "epsilon2 = inf: should be 0 or more"),
        ({"min_dim_size_to_factor": 0}, "min_dim_size_to_factor = 0: should be 1 or more"),
        ({"momentum": 1.0}, "momentum = 1.0: should be in [0, 1)"),
        ({"beta2": 1.0}, "beta2 = 1.0: should be in [0, 1)"),
        ({"weight_decay": 0.1}, "weight_decay = 0.1: should be 0 for adafactor"),
        ({"name": "adamw", "momentum": 0.9}, "momentum = 0.9: should be None for adamw"),
        ({"name": "adamw", "weight_decay": -0.1}, "weight_decay = -0.1: should be 0 or more"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(UserError, match=re.escape(f"OptimizerConfig.{message}")) as error:
        OptimizerConfig(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_the_schedule_goes_by_the_step_that_is_given(name):
    # As in a run that takes over an optimizer's state: its moments are old, its schedule is new.
    fields = dict(name=name, learning_rate=0.1, schedule="linear", decay_steps=4)
    config = OptimizerConfig(warmup_steps=2, **fields)
    optimizer = make_optimizer(config, {"w": ("embed",)})
    params = {"w": jnp.ones(3)}
    gradients = {"w": jnp.array([1.0, -2.0, 3.0])}
    state = optimizer.init(params)
    _, state = optimizer.update(gradients, state, params)
    counted, after = optimizer.update(gradients, state, params)
    given, same = optimizer.update(gradients, state, params, step=jnp.int32(1))
    np.testing.assert_array_equal(given["w"], counted["w"])
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, after, same)))
    for step, share in ((0, 0.0), (2, 2.0), (3, 1.0), (4, 0.0)):
        moved, _ = optimizer.update(gradients, state, params, step=jnp.int32(step))
        np.testing.assert_allclose(moved["w"], share * counted["w"], rtol=1e-6)
