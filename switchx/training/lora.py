"""Low-rank adapters (LoRA): a small tree beside the parameters, added to them in use.

Hu et al. 2021 (arXiv:2106.09685), §4.1: W + (alpha / rank) · A B, with A random, B zero at first
and W frozen. A tree of parameters holds them under `trainable.ADAPTERS`, so that one tree is
trained, saved and restored; `merge` makes the parameters of the model of it, in training as on
export.
"""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import PartitionSpec

from switchx.errors import UserError, check_range, check_types
from switchx.training import trainable
from switchx.training.optimizer import BIAS_AXES, inner_axes
from switchx.training.trainable import ADAPTERS, Path


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which matrices get an adapter, and how large.

    Attributes:
      rank: r of A [in, r] and B [r, out]; 4 to 8 suffice in arXiv:2106.09685, §7.2.
      alpha: the product is multiplied by alpha / rank, so that a learning rate holds for any rank.
      targets: names of `trainable.GROUPS` or patterns of paths; of what they name, matrices get an
        adapter: every layer of a scanned stack and every expert its own.

    Raises:
      UserError: a field of the wrong type or out of range.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str | Sequence[str] = ("attention", "experts")

    def __post_init__(self):
        check_types(self)
        check_range(self, "rank", self.rank >= 1, "at least 1")
        check_range(self, "alpha", 0 < self.alpha < math.inf, "positive")
        trainable.check_patterns(self.targets, "LoraConfig.targets")
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))


def targets(config: LoraConfig, params: Any, axes: Any) -> dict[Path, tuple[str | None, ...]]:
    """Paths of the matrices that get an adapter, with the names of their axes.

    Args:
      config: which.
      params: shapes of the model's parameters, nested dicts.
      axes: logical names of their axes, a tree of `PartitionSpec`s.

    Raises:
      UserError: the patterns name no parameter, or no matrix.
    """
    flat: dict[Any, Any] = dict(traverse_util.flatten_dict(params))
    names: dict[Any, Any] = dict(traverse_util.flatten_dict(axes))
    found = {}
    for path in sorted(trainable.select(params, config.targets, "LoraConfig.targets")):
        ndim = len(flat[path].shape)
        own = (*names[path], *(None,) * (ndim - len(names[path])))
        matrix = ndim >= 2 and {ndim - 2, ndim - 1} <= set(inner_axes(own))
        if matrix and not any(name in BIAS_AXES for name in own):
            found[path] = own
    if not found:
        raise UserError(
            f"LoraConfig.targets = {config.targets!r} names no matrix, and only matrices have "
            "adapters; 'attention', 'ffn' and 'experts' do"
        )
    return found


def create(config: LoraConfig, params: Any, axes: Any, seed: int) -> dict[str, Any]:
    """Adapters of a model's parameters, float32: with them it computes what it does without.

    {"scale": alpha / rank, <path of a matrix>: {"a": [..., in, rank], "b": [..., rank, out]}},
    nested; axes before the last two are those of the matrix. A is N(0, 1 / in), B is zero. The
    draw of a matrix depends on the seed and on its path alone. Arguments as `targets`.
    """
    shapes: dict[Any, Any] = dict(traverse_util.flatten_dict(params))
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(ADAPTERS.encode()))
    adapters: dict[Any, Any] = {("scale",): jnp.float32(config.alpha / config.rank)}
    for path in targets(config, params, axes):
        *batch, rows, columns = shapes[path].shape
        own = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
        a = jax.random.normal(own, (*batch, rows, config.rank), jnp.float32) / math.sqrt(rows)
        adapters[*path, "a"] = a
        adapters[*path, "b"] = jnp.zeros((*batch, config.rank, columns), jnp.float32)
    return traverse_util.unflatten_dict(adapters)


def adapter_axes(config: LoraConfig, params: Any, axes: Any) -> dict[str, Any]:
    """Logical names of the axes of what `create` makes: those of the matrices, none for ranks."""
    found: dict[Any, Any] = {("scale",): PartitionSpec()}
    for path, (*batch, row, column) in targets(config, params, axes).items():
        found[*path, "a"] = PartitionSpec(*batch, row, None)
        found[*path, "b"] = PartitionSpec(*batch, None, column)
    return traverse_util.unflatten_dict(found)


def merge(params: Any) -> Any:
    """The parameters of the model: W + scale · A B wherever there is an adapter; else as given."""
    if ADAPTERS not in params:
        return params
    flat: dict[Any, Any] = dict(traverse_util.flatten_dict(base(params)))
    adapters: dict[Any, Any] = dict(traverse_util.flatten_dict(params[ADAPTERS]))
    scale = adapters.pop(("scale",))
    for path in sorted({path[:-1] for path in adapters}):
        product = adapters[*path, "a"] @ adapters[*path, "b"]
        flat[path] = flat[path] + scale.astype(product.dtype) * product
    return traverse_util.unflatten_dict(flat)


def adapted(params: Any) -> list[Any]:
    """The matrices, or their shapes, that have an adapter; none where there are no adapters."""
    flat: dict[Any, Any] = dict(traverse_util.flatten_dict(params))
    return [flat[path[1:-1]] for path in sorted(flat) if path[0] == ADAPTERS and path[-1] == "a"]


def base(params: Any) -> dict[str, Any]:
    """A parameter tree without adapters."""
    return {name: tree for name, tree in params.items() if name != ADAPTERS}
