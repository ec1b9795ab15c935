"""`TrainState`: everything a step changes, and how it is created on a mesh."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from switchx import sharding
from switchx.errors import UserError
from switchx.training import lora as adapters
from switchx.training import optimizer as optimizers
from switchx.training import trainable as subsets
from switchx.training.lora import LoraConfig
from switchx.training.trainable import ADAPTERS, Path


@flax.struct.dataclass
class TrainState:
    """The state of training after `step` updates.

    Attributes:
      step: updates done, skipped ones included; int32 scalar.
      params: parameter tree; with adapters, those under `trainable.ADAPTERS`, see `lora.merge`.
      opt_state: optax state of what is trained of them.
      rng: key data of the run, uint32 words; a step's key is this folded with its number, so a
        resumed run draws what the unbroken one draws.
    """

    step: Any
    params: Any
    opt_state: Any
    rng: Any


class StateShapes(NamedTuple):
    """A state as it is on any devices.

    Attributes:
      init: makes it; to be jitted.
      shapes: its shapes and dtypes.
      names: logical names of the dimensions of its arrays, `PartitionSpec`s.
      optimizer: of its trained parameters.
      trainable: paths of those.
    """

    init: Callable[[], TrainState]
    shapes: TrainState
    names: TrainState
    optimizer: optax.GradientTransformation
    trainable: frozenset[Path]


class StatePlan(NamedTuple):
    """A state that is not there yet.

    Attributes:
      create: makes it, initialised in place on its devices.
      abstract: its shapes, dtypes and shardings, `jax.ShapeDtypeStruct` leaves.
      optimizer: of its trained parameters.
      dropped: sharding rules that did not divide a parameter.
      trainable: paths of the trained parameters.
    """

    create: Callable[[], TrainState]
    abstract: TrainState
    optimizer: optax.GradientTransformation
    dropped: list[sharding.Dropped]
    trainable: frozenset[Path]

    @property
    def trained(self) -> Any:
        """Shapes, dtypes and shardings of the trained parameters."""
        return subsets.split(self.abstract.params, self.trainable)[0]


def describe_state(
    model: nn.Module,
    make_optimizer: Callable[[Any], optax.GradientTransformation],
    *,
    seed: int,
    trainable: str | Sequence[str] | None = None,
    lora: LoraConfig | None = None,
) -> StateShapes:
    """Trace a state, with nothing allocated and no devices needed; arguments as `create_state`.

    Raises:
      UserError: as `trainable.select` and `lora.targets`; adapters that are not trained.
    """

    def init_params() -> Any:
        # The number of tokens changes no parameter; rows keep routing groups whole.
        tokens_BT = jnp.zeros((1, 1), jnp.int32)
        tasks: dict[str, Any] = {"encoder_task_ids": tokens_BT, "decoder_task_ids": tokens_BT}
        return model.init(jax.random.key(seed), tokens_BT, tokens_BT, **tasks)["params"]

    boxed = jax.eval_shape(init_params)
    # Not `nn.unbox`, which would place shapes on the mesh.
    names, shapes = (
        sharding.logical_axes(boxed),
        jax.tree.map(
            lambda leaf: leaf.value, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
        ),
    )
    base_names, base_shapes = names, shapes
    if lora is not None:
        names = {**names, ADAPTERS: adapters.adapter_axes(lora, shapes, names)}
        made = jax.eval_shape(lambda: adapters.create(lora, base_shapes, base_names, seed))
        shapes = {**shapes, ADAPTERS: made}
    if trainable is None:
        trainable = "all" if lora is None else ADAPTERS
    paths = subsets.select(shapes, trainable, "Experiment.trainable")
    if lora is not None and not any(path[0] == ADAPTERS for path in paths):
        raise UserError(
            f"Experiment.trainable = {trainable!r} leaves out the adapters of Experiment.lora; "
            f"add {ADAPTERS!r}, or leave it at None to train them alone"
        )
    optimizer = make_optimizer(names)

    def init() -> TrainState:
        params = nn.unbox(init_params())
        if lora is not None:
            made = adapters.create(lora, base_shapes, base_names, seed)
            params = {**params, ADAPTERS: made}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(subsets.split(params, paths)[0]),
            rng=run_rng(seed),
        )

    trained, _ = subsets.split(shapes, paths)
    state_names = TrainState(
        step=PartitionSpec(),
        params=names,
        opt_state=optimizers.state_axes(optimizer, trained, subsets.split(names, paths)[0]),
        rng=PartitionSpec(),
    )
    return StateShapes(init, jax.eval_shape(init), state_names, optimizer, paths)


def lay_state(
    described: StateShapes, mesh: Mesh, rules: sharding.Rules = sharding.RULES
) -> tuple[TrainState, list[sharding.Dropped]]:
    """The state's shapes, dtypes and shardings on a mesh, and the rules that did not divide it.

    Of the rules those of parameters; what the optimizer keeps of a parameter lies as it does.
    """
    shardings, dropped = sharding.shardings(described.names, described.shapes, mesh, rules)
    abstract = jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spec),
        described.shapes,
        shardings,
    )
    parameters = [
        each._replace(parameter=each.parameter.removeprefix("params/"))
        for each in dropped
        if each.parameter.startswith("params/")
    ]
    return abstract, parameters


def create_state(
    model: nn.Module,
    make_optimizer: Callable[[Any], optax.GradientTransformation],
    *,
    seed: int,
    mesh: Mesh,
    rules: sharding.Rules = sharding.RULES,
    trainable: str | Sequence[str] | None = None,
    lora: LoraConfig | None = None,
) -> StatePlan:
    """Plan a state without allocating it.

    Args:
      model: a model that is initialised with (encoder tokens, decoder tokens).
      make_optimizer: from the tree of logical axis names of the parameters.
      seed: of initialisation and of everything random in training.
      mesh: where the state will live.
      rules: which mesh axis each logical axis lies on.
      trainable: names or patterns of what is trained, see `trainable.select`; None is all of it,
        or with `lora` the adapters alone.
      lora: adds adapters to the parameters.

    Raises:
      UserError: as `describe_state`.
    """
    described = describe_state(model, make_optimizer, seed=seed, trainable=trainable, lora=lora)
    abstract, dropped = lay_state(described, mesh, rules)
    options = None
    if jax.default_backend() == "cpu":
        # XLA's default draws many parameters at once, with 3 GB of random bits for Switch-Base.
        options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    create = jax.jit(described.init, out_shardings=shardings, compiler_options=options)
    return StatePlan(create, abstract, described.optimizer, dropped, described.trainable)


def run_rng(seed: int) -> jax.Array:
    """Key data, uint32 words, of everything random in the training of a run with this seed."""
    return jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 0))


def num_bytes(tree: Any) -> int:
    """Bytes of all leaves of a tree of arrays or shapes, over all devices."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
