"""The mesh, the logical-axis rules as data, and the helpers that attach names to arrays.

Parameters and activations name their dimensions (`axes`, `constrain`); `RULES` says which mesh
axis each name lies on. Models never mention a mesh axis.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from switchx.errors import UserError, closest

MESH_AXES = ("data", "fsdp", "expert", "model")
# Rows of a batch are split over these: every device works on tokens. Devices along `fsdp` also
# share out the parameters, those along `expert` the experts, and tokens travel between them.
BATCH_AXES = ("data", "fsdp", "expert")

Rules = Mapping[str, str | tuple[str, ...] | None]

# Logical axis → mesh axis or axes.
RULES: Rules = {
    # activations
    "batch": BATCH_AXES,
    "group": BATCH_AXES,
    "group_within_expert": ("data", "fsdp"),
    # parameters (activations of these widths too)
    "expert": "expert",
    "vocab": "model",
    "heads": "model",
    "mlp": "model",
    "embed": "fsdp",
    "expert_embed": "fsdp",
    "norm": None,  # vectors are too small to share out
    "layers": None,
    "experts": None,  # the router's output: every device needs all logits of its tokens
    "relpos_buckets": None,
}
# Dimensions that are split to save memory alone, and stay whole where they do not divide.
SHARED_OUT = ("embed", "expert_embed")
_FIELD = "Experiment.sharding_rules"


def change_rules(changes: Mapping[str, Any]) -> Rules:
    """`RULES` with some of them changed.

    Raises:
      UserError: a logical axis or a mesh axis that does not exist.
    """
    rules = dict(RULES)
    for name, where in changes.items():
        if name not in RULES:
            raise UserError(f"{_FIELD}: unknown logical axis {name!r}{closest(name, RULES)}")
        rules[name] = tuple(where) if isinstance(where, list) else where
        for axis in _mesh_axes(rules[name]):
            if axis not in MESH_AXES:
                raise UserError(
                    f"{_FIELD}: {name!r} lies on unknown mesh axis {axis!r}"
                    f"{closest(str(axis), MESH_AXES)}"
                )
        if len(set(_mesh_axes(rules[name]))) < len(_mesh_axes(rules[name])):
            raise UserError(
                f"{_FIELD}: {name!r} lies on a mesh axis twice, {where!r}; name it once"
            )
    return rules


def make_mesh(shape: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh with axes (data, fsdp, expert, model) over all devices, or over `devices`.

    On TPU neighbours in the mesh are neighbours on the chips' network, `model` before the others.

    Args:
      shape: size of each axis; a missing axis is 1, and at most one axis is -1, which takes
        the devices that are left.
      devices: defaults to `jax.devices()`.

    Raises:
      UserError: unknown axis, more than one -1, or sizes whose product is not the device count.
    """
    devices = list(jax.devices() if devices is None else devices)
    for name in shape:
        if name not in MESH_AXES:
            raise UserError(f"MESH: unknown axis {name!r}{closest(name, MESH_AXES)}")
    sizes = [shape.get(name, 1) for name in MESH_AXES]
    if any(type(size) is not int or size == 0 or size < -1 for size in sizes):  # no bool
        raise UserError(f"MESH = {dict(shape)}: sizes are positive integers, or -1 for the rest")
    if sizes.count(-1) > 1:
        raise UserError(f"MESH = {dict(shape)}: only one axis may be -1")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"MESH = {dict(shape)} does not fill {len(devices)} "
            f"{devices[0].platform} device(s); sizes must multiply to {len(devices)}, or use -1"
        )
    if devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(grid, MESH_AXES)
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES)


def batch_shards(mesh: Mesh | None = None) -> int:
    """Into how many parts the rows of a batch are split, on a mesh or that in `use`."""
    sizes = jax.sharding.get_abstract_mesh().shape if mesh is None else mesh.shape
    return math.prod(sizes.get(axis, 1) for axis in BATCH_AXES)


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules = RULES) -> Iterator[None]:
    """Make the mesh and the rules known to every `constrain` traced inside."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(rules.items())):
        yield


def num_devices() -> int:
    """Devices of the mesh in `use`; 1 outside."""
    return math.prod(jax.sharding.get_abstract_mesh().shape.values())


def platform() -> str:
    """What the devices of the mesh in `use` are, "cpu", "gpu" or "tpu"; outside, jax's default.

    The devices may be described only, as for compilation ahead of time.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def axes(init: Callable[..., Any], names: tuple[str | None, ...]) -> Callable[..., Any]:
    """Initializer whose parameter carries the logical names of its dimensions."""
    return nn.with_logical_partitioning(init, names)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Say how an activation lies on the mesh, by logical name; nothing outside `use`."""
    return nn.with_logical_constraint(x, names)


def gather(kernel: jax.Array, *names: str | None) -> jax.Array:
    """A parameter whole along the dimensions that are `SHARED_OUT`, for use in a product.

    Said aloud, because XLA otherwise sometimes gathers activations instead.
    """
    return constrain(kernel, *_whole(names))


def place(*names: str | None) -> PartitionSpec:
    """Where an array lies on the mesh in `use`, by logical name; whole along `SHARED_OUT`."""
    return nn.logical_to_mesh_axes(_whole(names)) or PartitionSpec()


def _whole(names: Sequence[str | None]) -> list[str | None]:
    return [None if name in SHARED_OUT else name for name in names]


def logical_axes(boxed: Any) -> Any:
    """Tree of `PartitionSpec`s of logical names for boxed parameters, as `module.init` gives."""
    return nn.get_partition_spec(boxed)


class Dropped(NamedTuple):
    """A rule that does not divide a parameter: the dimension is split less than it says."""

    parameter: str
    logical_axis: str
    size: int
    mesh_axes: tuple[str, ...]
    devices: int

    @property
    def rule(self) -> str:
        """What does not divide by what."""
        where = f"{' x '.join(self.mesh_axes)} = {self.devices}"
        return f"{self.logical_axis} = {self.size} does not divide by {where}"

    def __str__(self) -> str:
        return f"{self.parameter}: {self.rule}"


def shardings(
    names: Any, shapes: Any, mesh: Mesh, rules: Rules = RULES
) -> tuple[Any, list[Dropped]]:
    """Where arrays lie: a tree of `NamedSharding`s, and the rules that had to be dropped.

    Args:
      names: tree of `PartitionSpec`s of logical names.
      shapes: tree of the arrays, or of their shapes and dtypes.
      mesh: the devices.
      rules: which mesh axis each name lies on.

    Raises:
      UserError: two dimensions of one array lie on the same mesh axis, or a dimension does not
        divide by its mesh axis; of `SHARED_OUT`, which only saves memory, the rule is dropped.
    """
    dropped: list[Dropped] = []
    is_names = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
    specs = jax.tree.map_with_path(
        lambda path, spec, leaf: _lay(
            jax.tree_util.keystr(path, simple=True, separator="/"),
            (*spec, *[None] * (len(leaf.shape) - len(spec))),
            leaf.shape,
            mesh,
            rules,
            dropped,
        ),
        names,
        shapes,
        is_leaf=is_names,
    )
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_names), dropped


def _lay(
    parameter: str,
    names: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mesh,
    rules: Rules,
    dropped: list[Dropped],
) -> PartitionSpec:
    """Mesh axes of each dimension of one array; appends what had to be dropped."""
    places: list[str | tuple[str, ...] | None] = []
    taken: dict[str, str] = {}
    for name, size in zip(names, shape, strict=True):
        wanted = _mesh_axes(rules[name]) if name else ()
        for axis in wanted:
            if axis in taken and mesh.shape[axis] > 1:
                raise UserError(
                    f"{_FIELD}: {taken[axis]!r} and {name!r}, two dimensions of {parameter}, "
                    f"both lie on mesh axis {axis!r}; change the rule of one"
                )
            taken[axis] = str(name)
        axes = _dividing(wanted, size, mesh)
        if axes != wanted:
            devices = math.prod(mesh.shape[axis] for axis in wanted)
            if name not in SHARED_OUT:
                raise UserError(
                    f"MESH = {dict(mesh.shape)}: {name!r} = {size} of {parameter} does not divide "
                    f"by mesh axis {' x '.join(wanted)} = {devices}, on which the rules put it; "
                    f"what fits: {_divisors(size, devices)}"
                )
            dropped.append(Dropped(parameter, str(name), size, wanted, devices))
        places.append(axes[0] if len(axes) == 1 else axes or None)
    return PartitionSpec(*places)


def check_divides(name: str, field: str, size: int, mesh: Mesh, rules: Rules) -> None:
    """Check that a dimension divides by the mesh axes that a logical axis lies on.

    Raises:
      UserError: it does not; calls the dimension `field`.
    """
    axes = _mesh_axes(rules[name])
    devices = math.prod(mesh.shape[axis] for axis in axes)
    if size % devices:
        raise UserError(
            f"{field} = {size} is not divisible by the {devices} devices of mesh axis "
            f"{' x '.join(map(repr, axes))}, on which the rules put {name!r}; "
            f"what fits: {_divisors(size, devices)}"
        )


def _divisors(size: int, most: int) -> str:
    """The largest few numbers of devices that a size divides by."""
    return ", ".join([str(n) for n in range(1, most + 1) if size % n == 0][-8:])


def _mesh_axes(where: Any) -> tuple[Any, ...]:
    if where is None:
        return ()
    return where if isinstance(where, tuple) else (where,)


def _dividing(wanted: tuple[str, ...], size: int, mesh: Mesh) -> tuple[str, ...]:
    """As many of the mesh axes, in order, as a dimension divides by."""
    axes: tuple[str, ...] = ()
    for axis in wanted:
        if size % math.prod(mesh.shape[each] for each in (*axes, axis)) == 0:
            axes += (axis,)
    return axes


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose first dimension is the rows of a batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))
