"""Moving tokens to expert slots and back. The assignment says where; nothing is decided here.

Backends with one meaning. `gather` costs O(tokens · d_model) for any group size: rows are gathered
both ways, and no floating-point scatter appears in the backward pass (`rows`). `einsum` multiplies
by one-hot masks [M, E, C]: quadratic in the group size, obviously right. `grouped` has no slots and
drops nothing: rows sorted by expert. `mixture` is what a soft mixture of tokens needs. Products
with gates and sums over a token's choices are taken in the gates' dtype (at least float32), slots
keep the activations' dtype.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from switchx.moe.assignment import Assignment, Grouping, Mixture
from switchx.moe.rows import from_slots, to_slots, weigh


def _tables(assignment: Assignment) -> tuple[jax.Array, jax.Array | None]:
    groups, num_experts, capacity = assignment.token_GEC.shape
    return assignment.token_GEC.reshape(groups, num_experts * capacity), assignment.slot_GMK


def gather_dispatch(
    x_GMD: Float[Array, "G M D"], assignment: Assignment
) -> Float[Array, "G E C D"]:
    """Copy tokens into their slots, by row gathers."""
    # vmap, never one flat token axis: per-group indices keep the gather local to a shard.
    x_GSD = jax.vmap(lambda x, *tables: to_slots(x, *tables, x.shape[0]))(
        x_GMD, *_tables(assignment)
    )
    return x_GSD.reshape(*assignment.token_GEC.shape, x_GMD.shape[-1])


def gather_combine(
    y_GECD: Float[Array, "G E C D"], assignment: Assignment, num_tokens: int
) -> Float[Array, "G M D"]:
    """Sum each token's expert outputs, weighted by its gates, by row gathers."""
    gate_GS = assignment.gate_GEC.reshape(y_GECD.shape[0], -1)
    weighted_GSD = weigh(y_GECD.reshape(*gate_GS.shape, y_GECD.shape[-1]), gate_GS)
    y_GMD = jax.vmap(lambda y, *tables: from_slots(y, *tables, num_tokens))(
        weighted_GSD, *_tables(assignment)
    )
    return y_GMD.astype(y_GECD.dtype)


def _one_hot_tokens(assignment: Assignment, num_tokens: int, dtype: Any) -> jax.Array:
    # A token one past the end has no one-hot: empty slots are all zeros.
    return jax.nn.one_hot(assignment.token_GEC, num_tokens, axis=1, dtype=dtype)


def einsum_dispatch(
    x_GMD: Float[Array, "G M D"], assignment: Assignment
) -> Float[Array, "G E C D"]:
    """Copy tokens into their slots, by multiplication with a one-hot mask."""
    mask_GMEC = _one_hot_tokens(assignment, x_GMD.shape[1], x_GMD.dtype)
    return jnp.einsum("gmec,gmd->gecd", mask_GMEC, x_GMD)


def einsum_combine(
    y_GECD: Float[Array, "G E C D"], assignment: Assignment, num_tokens: int
) -> Float[Array, "G M D"]:
    """Sum each token's expert outputs, weighted by its gates, by one-hot multiplication."""
    gate_GEC = assignment.gate_GEC
    gates_GMEC = _one_hot_tokens(assignment, num_tokens, gate_GEC.dtype) * gate_GEC[:, None]
    y_GMD = jnp.einsum("gmec,gecd->gmd", gates_GMEC, y_GECD.astype(gate_GEC.dtype))
    return y_GMD.astype(y_GECD.dtype)


def grouped_dispatch(x_GMD: Float[Array, "G M D"], grouping: Grouping) -> Float[Array, "N D"]:
    """Copy tokens into the rows of their experts."""
    x_TD = x_GMD.reshape(-1, x_GMD.shape[-1])
    row_TK = grouping.row_GMK.reshape(x_TD.shape[0], -1)
    return cast(jax.Array, to_slots(x_TD, grouping.token_N, row_TK, x_TD.shape[0]))


def grouped_combine(y_ND: Float[Array, "N D"], grouping: Grouping) -> Float[Array, "G M D"]:
    """Sum the rows of each token's choices, weighted by its gates."""
    groups, num_tokens, top_k = grouping.row_GMK.shape
    row_TK = grouping.row_GMK.reshape(-1, top_k)
    y_TD = from_slots(weigh(y_ND, grouping.gate_N), grouping.token_N, row_TK, groups * num_tokens)
    return cast(jax.Array, y_TD).reshape(groups, num_tokens, -1).astype(y_ND.dtype)


def mixture_dispatch(x_GMD: Float[Array, "G M D"], mixture: Mixture) -> Float[Array, "G E C D"]:
    """Weighted means of tokens."""
    dtype = mixture.dispatch_GMEC.dtype
    slots_GECD = jnp.einsum("gmec,gmd->gecd", mixture.dispatch_GMEC, x_GMD.astype(dtype))
    return slots_GECD.astype(x_GMD.dtype)


def mixture_combine(
    y_GECD: Float[Array, "G E C D"], mixture: Mixture, num_tokens: int
) -> Float[Array, "G M D"]:
    """Weighted means of slots' outputs."""
    dtype = mixture.combine_GMEC.dtype
    y_GMD = jnp.einsum("gmec,gecd->gmd", mixture.combine_GMEC, y_GECD.astype(dtype))
    return y_GMD.astype(y_GECD.dtype)


class Dispatcher(NamedTuple):
    """A backend: tokens to slots, and slots back to so many tokens."""

    dispatch: Callable[[jax.Array, Any], jax.Array]
    combine: Callable[[jax.Array, Any, int], jax.Array]


DISPATCHERS: dict[str, Dispatcher] = {
    "gather": Dispatcher(gather_dispatch, gather_combine),
    "einsum": Dispatcher(einsum_dispatch, einsum_combine),
}
BACKENDS = ("auto", *DISPATCHERS, "grouped")
MIXTURE = Dispatcher(mixture_dispatch, mixture_combine)
