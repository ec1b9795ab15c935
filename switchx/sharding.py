"""The mesh, the logical-axis rules as data, and the helpers that attach names to arrays.

Parameters and activations name their dimensions (`axes`, `constrain`); `RULES` says which mesh
axis each name lies on. Models never mention a mesh axis.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from switchx.errors import UserError, closest

MESH_AXES = ("data", "expert", "model")

# Logical axis → mesh axis or axes. The batch is split over data and expert devices together:
# every device works on tokens, and expert parallelism is an exchange between them.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    # activations
    ("batch", ("data", "expert")),
    ("group", ("data", "expert")),
    ("group_within_expert", "data"),
    # parameters (activations of these widths too)
    ("expert", "expert"),
    ("vocab", "model"),
    ("heads", "model"),
    ("mlp", "model"),
    ("embed", None),
    ("layers", None),
    ("experts", None),  # the router's output: every device needs all logits of its tokens
    ("relpos_buckets", None),
)


def make_mesh(shape: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh with axes (data, expert, model) over all devices, or over `devices`.

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
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES)


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["expert"]


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[None]:
    """Make the mesh and the rules known to every `constrain` traced inside."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
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


def logical_axes(boxed: Any) -> Any:
    """Tree of `PartitionSpec`s of logical names for boxed parameters, as `module.init` gives."""
    return nn.get_partition_spec(boxed)


def shardings(names: Any, mesh: Mesh) -> Any:
    """Tree of `NamedSharding`s for a tree of `PartitionSpec`s of logical names, by `RULES`."""
    rules = dict(RULES)

    def sharding(spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(rules[name] if name else None for name in spec)))

    return jax.tree.map(sharding, names, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose first dimension is the rows of a batch."""
    return NamedSharding(mesh, PartitionSpec(("data", "expert")))
