"""Optimizers: schedules, Adafactor by logical axes, AdamW, and the axes of their states."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from switchx.errors import check_choice, check_range, check_types

# Every index of these axes is a parameter of its own: one layer of a scanned stack, one expert.
BATCH_AXES = ("layers", "expert")

# A matrix with one of these axes is a table of biases, not a linear map: it takes no weight decay.
BIAS_AXES = ("relpos_buckets",)

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer, its learning-rate schedule, and its constants.

    The defaults are those of T5 and Switch Transformers pre-training: Adafactor with learning rate
    1 / sqrt(max(step, 10,000)). Fine-tuning as T5 does it: `learning_rate=1e-3`,
    `schedule='constant'`, `warmup_steps=0`.

    Attributes:
      name: 'adafactor' or 'adamw'.
      learning_rate: peak of the schedule; for 'rsqrt' the numerator. Under Adafactor with
        `multiply_by_parameter_scale` it is relative to the size of each parameter.
      schedule: 'rsqrt', 'constant', 'linear' or 'cosine', see `learning_rate_schedule`.
      warmup_steps: rsqrt: steps at the constant rate learning_rate / sqrt(warmup_steps), with no
        ramp, as T5 has it. Others: steps of a linear ramp from 0.
      decay_steps: linear and cosine only, which need it: the step, counted from 0 and warm-up
        included, at which the decay ends.
      final_fraction: linear and cosine only: share of the learning rate that is left from
        `decay_steps` on.
      clip_norm: largest global norm of the gradients, or None for no clipping. The norm couples
        all parameters, unlike Adafactor's own clipping.
      decay_rate: Adafactor: exponent c of the second-moment decay 1 - t^-c at update t = 1, 2, ….
      clip_threshold: Adafactor: largest RMS of a parameter's unscaled update, or None.
      multiply_by_parameter_scale: Adafactor: steps relative to the RMS of the parameter.
      epsilon1: Adafactor: added to squared gradients.
      epsilon2: Adafactor: least parameter RMS that scales a step.
      min_dim_size_to_factor: Adafactor: smaller matrices keep a full second moment.
      momentum: Adafactor: decay of a running mean of the steps (a full copy of the parameters in
        float32), or None.
      weight_decay: AdamW: decoupled weight decay, multiplied by the learning rate.
      beta1: AdamW: decay of the first moment.
      beta2: AdamW: decay of the second moment.
      epsilon: AdamW: added to the root of the second moment.

    Raises:
      UserError: a field has the wrong type or is out of range; `decay_steps` is missing where it is
        needed; or `decay_steps`, `final_fraction`, `weight_decay` or `momentum` is set where it has
        no effect. The other constants of the optimizer that is not chosen are ignored.
    """

    name: str = "adafactor"
    learning_rate: float = 1.0
    schedule: str = "rsqrt"
    warmup_steps: int = 10_000
    decay_steps: int | None = None
    final_fraction: float = 0.0
    clip_norm: float | None = None
    decay_rate: float = 0.8
    clip_threshold: float | None = 1.0
    multiply_by_parameter_scale: bool = True
    epsilon1: float = 1e-30
    epsilon2: float = 1e-3
    min_dim_size_to_factor: int = 128
    momentum: float | None = None
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self):
        """Check types, ranges, and fields that would silently do nothing."""
        check_types(self)
        check_choice(self, "name", ("adafactor", "adamw"))
        check_choice(self, "schedule", ("rsqrt", "constant", "linear", "cosine"))
        for field in ("learning_rate", "clip_norm", "clip_threshold", "decay_rate"):
            value = getattr(self, field)
            check_range(self, field, value is None or 0 < value < math.inf, "more than 0")
        for field in ("weight_decay", "epsilon", "epsilon1", "epsilon2"):
            check_range(self, field, 0 <= getattr(self, field) < math.inf, "0 or more")
        for field in ("beta1", "beta2", "momentum"):
            value = getattr(self, field)
            check_range(self, field, value is None or 0 <= value < 1, "in [0, 1)")
        check_range(self, "final_fraction", 0 <= self.final_fraction <= 1, "in [0, 1]")
        check_range(self, "warmup_steps", self.warmup_steps >= 0, "0 or more")
        check_range(self, "min_dim_size_to_factor", self.min_dim_size_to_factor >= 1, "1 or more")
        if self.schedule in ("linear", "cosine"):
            check_range(
                self,
                "decay_steps",
                self.decay_steps is not None and self.decay_steps > self.warmup_steps,
                f"more than warmup_steps = {self.warmup_steps} for schedule {self.schedule!r}",
            )
        else:
            only = f"left alone: schedule {self.schedule!r} has no end of decay"
            check_range(self, "decay_steps", self.decay_steps is None, only)
            check_range(self, "final_fraction", self.final_fraction == 0, only)
        if self.name == "adafactor":
            only = "0 for adafactor, which has no weight decay here; adamw has"
            check_range(self, "weight_decay", self.weight_decay == 0, only)
        else:
            check_range(self, "momentum", self.momentum is None, "None for adamw: set beta1")


def learning_rate_schedule(config: OptimizerConfig) -> Callable[[Any], Float[Array, ""]]:
    """Learning rate (float32 scalar) as a function of the step: the number of updates before it.

    The first update is step 0, as in T5X and optax. With peak r, w warm-up steps:

    - rsqrt: r / sqrt(max(step, w, 1)): constant for w steps, then falling (T5, arXiv:1910.10683
      §3.1.2).
    - constant, linear, cosine: r · step / w while step < w (so that the update of step 0 is zero,
      as in optax), then r, or a straight line or half a cosine from r at step w down to
      final_fraction · r at step `decay_steps`, and that from there on.
    """
    rate, warmup = config.learning_rate, config.warmup_steps
    steps = (config.decay_steps or 0) - warmup
    if config.schedule == "rsqrt":
        return lambda step: rate / jnp.sqrt(jnp.maximum(step, max(warmup, 1)).astype(jnp.float32))
    if config.schedule == "constant":
        after = optax.constant_schedule(rate)
    elif config.schedule == "linear":
        final = rate * config.final_fraction
        after = optax.linear_schedule(rate, final, steps)
    else:
        after = optax.cosine_decay_schedule(rate, steps, alpha=config.final_fraction)
    if warmup:
        after = optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), after], [warmup])
    return lambda step: jnp.asarray(after(step), jnp.float32)


def make_optimizer(config: OptimizerConfig, axes: Any) -> optax.GradientTransformationExtraArgs:
    """The optax transformation that `config` describes, its own step count included.

    Args:
      config: the optimizer and its constants.
      axes: nested dicts like the parameters; each leaf a tuple or `PartitionSpec` of the
        logical names of a parameter's axes, e.g. ``('expert', 'embed', 'expert_mlp')`` or
        ``('layers', 'embed')``. `BATCH_AXES` are special, see `adafactor`.

    `update` needs the parameters. It takes the `step` that the learning rate is of, and without it
    counts: the two differ in a run that takes over another's optimizer state, whose moments go on
    while its schedule begins. AdamW decays linear maps and embeddings only: not the leaves
    with fewer than two axes beside `BATCH_AXES` (norm scales, biases) nor those with one of
    `BIAS_AXES` (relative position biases).
    """
    schedule = learning_rate_schedule(config)
    if config.name == "adafactor":
        optimizer = adafactor(
            schedule,
            axes,
            decay_rate=config.decay_rate,
            clip_threshold=config.clip_threshold,
            multiply_by_parameter_scale=config.multiply_by_parameter_scale,
            epsilon1=config.epsilon1,
            epsilon2=config.epsilon2,
            min_dim_size_to_factor=config.min_dim_size_to_factor,
            momentum=config.momentum,
        )
    else:
        names = _by_path(axes)
        decays = optax.add_decayed_weights(
            config.weight_decay,
            mask=lambda params: _map(lambda _, names: _decays(names), names, params),
        )
        moments = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)
        optimizer = optax.chain(moments, decays, _scale_by_schedule(schedule))
    if config.clip_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def _scale_by_schedule(
    schedule: Callable[[Any], Float[Array, ""]],
) -> optax.GradientTransformationExtraArgs:
    """Times minus the learning rate, of `step` if it is given and else of the count so far."""

    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: Any, params: Any = None, *, step: Any = None, **unused: Any
    ) -> tuple[Any, optax.ScaleByScheduleState]:
        rate = schedule(state.count if step is None else step)
        updates = jax.tree.map(lambda leaf: -rate.astype(leaf.dtype) * leaf, updates)
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, optax.ScaleByScheduleState(count=count)

    return optax.GradientTransformationExtraArgs(init, update)


class AdafactorState(NamedTuple):
    """State of `adafactor`, float32 but for the count.

    The three trees are like the parameters; where a parameter does not use one, it holds a
    placeholder of shape [1], because checkpoints can store that and not an absence.

    Attributes:
      count: int32 scalar, updates so far.
      v_row: mean of squared gradients over the last axis that is not a batch axis.
      v_col: mean over the axis before it.
      v: second moment of parameters that are not factored.
    """

    count: Int[Array, ""]
    v_row: Any
    v_col: Any
    v: Any


def adafactor(
    learning_rate: float | Callable[[Any], Any],
    axes: Any,
    *,
    decay_rate: float = 0.8,
    clip_threshold: float | None = 1.0,
    multiply_by_parameter_scale: bool = True,
    epsilon1: float = 1e-30,
    epsilon2: float = 1e-3,
    min_dim_size_to_factor: int = 128,
    momentum: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adafactor as T5 uses it, which treats every layer and every expert as its own parameter.

    Shazeer & Stern 2018 (arXiv:1804.04235), algorithms 4 and 5. With gradient G, parameter X,
    update t = 1, 2, …, β = 1 - t^-decay_rate, learning rate ρ at step t - 1:

        V ← β V + (1 - β) (G² + ε1)              full, or factored: row means R, column means C
        U = G / sqrt(V)                          factored: V = R Cᵀ / mean(R)
        U ← U / max(1, RMS(U) / clip_threshold)
        step = -ρ max(ε2, RMS(X)) U              without parameter scale: -ρ U
        momentum: M ← momentum · M + (1 - momentum) · step, and M is the step

    Means, RMS and factoring run over the axes that are not in `BATCH_AXES`, so that a stack of
    layers or experts moves as its members would alone. (optax.adafactor takes the two
    largest axes, whichever they are, and one RMS for a whole leaf, which couples the members. It
    is the same law for a single matrix without batch axes.) A parameter is factored if exactly
    two other axes remain and both have at least `min_dim_size_to_factor` elements. An axis that
    merely counts experts, such as the output of a router [D, E], must not be named 'expert'.

    Args:
      learning_rate: ρ, or a function of `update`'s `step`, by default the updates so far.
      axes: nested dicts of tuples or `PartitionSpec`s of logical names, see `make_optimizer`.
      decay_rate: exponent of the second-moment decay.
      clip_threshold: largest RMS of U, or None.
      multiply_by_parameter_scale: whether steps are relative to the size of X.
      epsilon1: added to squared gradients.
      epsilon2: least RMS(X) that scales a step.
      min_dim_size_to_factor: matrices with a smaller side keep the full V.
      momentum: decay of the mean of steps, kept in float32, or None.

    Returns:
      A transformation of gradients to steps, computed in float32 and returned in the dtypes of
      the parameters. Its state is an `AdafactorState`, with optax's for a mean behind it if there
      is momentum.

    Raises:
      ValueError: at `init` or `update`, if a parameter has no axes or not as many as dimensions,
        or if `update` is called without parameters.
    """
    names = _by_path(axes)

    def init(params: Any) -> AdafactorState:
        def second_moment(field: str) -> Any:
            def zeros(leaf: Any, leaf_names: Axes) -> Array:
                shapes = _state_shapes(leaf.shape, leaf_names, min_dim_size_to_factor)
                return jnp.zeros(shapes.get(field, (1,)), jnp.float32)

            return _map(zeros, names, params)

        return AdafactorState(
            count=jnp.zeros((), jnp.int32),
            v_row=second_moment("v_row"),
            v_col=second_moment("v_col"),
            v=second_moment("v"),
        )

    def update(
        updates: Any, state: Any, params: Any = None, *, step: Any = None, **unused: Any
    ) -> tuple[Any, AdafactorState]:
        if params is None:
            raise ValueError("adafactor: update(gradients, state, params) needs params")
        decay = 1.0 - (state.count + 1).astype(jnp.float32) ** -decay_rate
        when = state.count if step is None else step
        rate = learning_rate(when) if callable(learning_rate) else learning_rate

        def running_mean(old: Any, new: Array) -> Array:
            return decay * old + (1.0 - decay) * new

        def update_leaf(
            gradient: Any, leaf_names: Axes, param: Any, v_row: Any, v_col: Any, v: Any
        ) -> tuple[Array, Array, Array, Array]:
            step = jnp.asarray(gradient, jnp.float32)
            if "v" in _state_shapes(param.shape, leaf_names, min_dim_size_to_factor):
                square = jnp.square(step)
                v = running_mean(v, square + epsilon1)
                step = step * jax.lax.rsqrt(v)
                size = _mean(square / v, leaf_names)
            else:
                # Every mean squares for itself, or XLA on CPU would write G² and U² out, at twice
                # the cost of reading G again: hence the barrier, and U² as (G / column) · G.
                row, column = inner_axes(leaf_names)
                again = jax.lax.optimization_barrier(step)
                # The mean of G² + ε1, added last: a pure mean of squares needs no array of them.
                v_row = running_mean(v_row, jnp.mean(jnp.square(step), axis=column) + epsilon1)
                v_col = running_mean(v_col, jnp.mean(jnp.square(again), axis=row) + epsilon1)
                # `column` comes after `row`, so dropping it leaves `row` where it was.
                row_mean = jnp.mean(v_row, axis=row, keepdims=True)
                by_row = jnp.expand_dims(row_mean / v_row, column)
                by_column = jnp.expand_dims(1 / v_col, row)
                size = jnp.mean(step * by_column * step, axis=column, keepdims=True) * by_row
                size = jnp.mean(size, axis=row, keepdims=True)
                step = step * jnp.sqrt(by_row) * jnp.sqrt(by_column)
            scale = rate
            if multiply_by_parameter_scale:
                param_rms = jnp.sqrt(_mean(jnp.square(jnp.asarray(param, jnp.float32)), leaf_names))
                scale = scale * jnp.maximum(param_rms, epsilon2)
            if clip_threshold is not None:
                scale = scale / jnp.maximum(1.0, jnp.sqrt(size) / clip_threshold)
            return (-scale * step).astype(param.dtype), v_row, v_col, v

        moved = _map(update_leaf, names, updates, params, state.v_row, state.v_col, state.v)
        steps, v_row, v_col, v = jax.tree.transpose(
            jax.tree.structure(updates), jax.tree.structure((0, 0, 0, 0)), moved
        )
        count = jnp.asarray(optax.safe_increment(state.count))
        return steps, AdafactorState(count=count, v_row=v_row, v_col=v_col, v=v)

    optimizer = optax.GradientTransformationExtraArgs(init, update)
    if momentum is None:
        return optimizer
    mean = optax.ema(momentum, debias=False, accumulator_dtype=jnp.float32)
    return optax.chain(optimizer, mean)


def state_axes(optimizer: optax.GradientTransformation, params: Any, axes: Any) -> Any:
    """Logical axes of an optimizer's state: the tree of `optimizer.init(params)`.

    An array of the state whose path ends in a parameter's path has that parameter's axes;
    Adafactor's `v_row` and `v_col` have them less the axis they are means over. Counts and
    placeholders have none. Works for any chain of optax transformations that keep their moments
    in trees like the parameters. Nothing is computed: `params` may be `ShapeDtypeStruct`s.

    Returns:
      A tree with `PartitionSpec`s of logical names as leaves (tuples could not be told from the
      tuples of which optax builds its states).

    Raises:
      ValueError: an array of the state belongs to a parameter but has none of those shapes, or
        `axes` does not fit `params`.
    """
    names = _by_path(axes)
    known = _map(lambda leaf, leaf_names: (leaf.shape, leaf_names), names, params)
    known = _by_path(known, is_leaf=lambda x: isinstance(x, tuple))

    def find(path: tuple, leaf: Any) -> PartitionSpec:
        for start in range(len(path) + 1):
            if path[start:] in known:
                break
        else:
            return PartitionSpec()
        shape, leaf_names = known[path[start:]]
        field = getattr(path[start - 1], "name", None) if start else None
        if field in ("v_row", "v_col") and len(inner_axes(leaf_names)) == 2:
            row, column = inner_axes(leaf_names)
            dropped = column if field == "v_row" else row
            shape = (*shape[:dropped], *shape[dropped + 1 :])
            leaf_names = (*leaf_names[:dropped], *leaf_names[dropped + 1 :])
        if leaf.shape == shape:
            return PartitionSpec(*leaf_names)
        if leaf.size <= 1:
            return PartitionSpec()
        where = jax.tree_util.keystr(path)
        raise ValueError(f"optimizer state {where} has shape {leaf.shape}, its parameter {shape}")

    return jax.tree_util.tree_map_with_path(find, jax.eval_shape(optimizer.init, params))


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple | PartitionSpec)


def _by_path(tree: Any, is_leaf: Callable[[Any], bool] = _is_axes) -> dict[tuple, Any]:
    """Leaves of a tree by their key paths."""
    return dict(jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0])


def _map(function: Callable, names: dict[tuple, Any], tree: Any, *trees: Any) -> Any:
    """`function(leaf, its axis names, *leaves of the other trees)` over the leaves of a tree.

    Axes are looked up by path, not by structure, so that a tree in which `optax.masked` or
    `optax.partition` left out some parameters is still served.
    """

    def call(path: tuple, leaf: Any, *leaves: Any) -> Any:
        where = jax.tree_util.keystr(path)
        if path not in names:
            raise ValueError(f"parameter {where} has no logical axes")
        leaf_names, ndim = names[path], jnp.ndim(leaf)
        if isinstance(leaf_names, PartitionSpec):
            # A specification may leave out trailing axes without a name.
            leaf_names = (*leaf_names, *(None,) * (ndim - len(leaf_names)))
        if len(leaf_names) != ndim:
            shape = jnp.shape(leaf)
            raise ValueError(f"parameter {where} of shape {shape} has logical axes {leaf_names}")
        return function(leaf, leaf_names, *leaves)

    return jax.tree_util.tree_map_with_path(call, tree, *trees)


def inner_axes(names: Axes) -> tuple[int, ...]:
    """Positions of the axes that are not `BATCH_AXES`."""
    return tuple(i for i, name in enumerate(names) if name not in BATCH_AXES)


def _decays(names: Axes) -> bool:
    """Whether AdamW's weight decay applies."""
    return len(inner_axes(names)) >= 2 and not any(name in BIAS_AXES for name in names)


def _state_shapes(
    shape: tuple[int, ...], names: Axes, min_dim_size_to_factor: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of the second moments that Adafactor keeps for a parameter, by field."""
    inner = inner_axes(names)
    if len(inner) != 2 or any(shape[axis] < min_dim_size_to_factor for axis in inner):
        return {"v": shape}
    row, column = inner
    return {
        "v_row": (*shape[:column], *shape[column + 1 :]),
        "v_col": (*shape[:row], *shape[row + 1 :]),
    }


def _mean(x: Array, names: Axes) -> Array:
    """Mean over the axes that are not batch axes, which are kept with size 1."""
    return jnp.mean(x, axis=inner_axes(names), keepdims=True)
