"""Moving tokens to expert slots and back. The assignment says where; nothing is decided here.

Two backends with one meaning. `gather` costs O(tokens · d_model) for any group size: rows are
gathered both ways, and because `Slots` holds both directions of the matching, the transpose of
each gather is the inverse gather, so no floating-point scatter appears in the backward pass.
`einsum` multiplies by one-hot masks [M, E, C]: quadratic in the group size, obviously right.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from switchx.moe.assignment import Choice, Slots


def _rows(table_ND: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of a table by index; zeros where the index is one past the end (unmatched)."""
    return table_ND.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _to_slots(x_MD: jax.Array, choice_S: Int[Array, " S"], slot_MK: Int[Array, "M K"]) -> jax.Array:
    """Slot s gets the token of its choice; empty slots get zeros. [M, D] → [S, D]."""
    return _rows(x_MD, choice_S // slot_MK.shape[-1])


def _to_slots_forward(x_MD, choice_S, slot_MK):
    return _to_slots(x_MD, choice_S, slot_MK), slot_MK


def _to_slots_backward(slot_MK, grad_SD):
    return _rows(grad_SD, slot_MK).sum(axis=1), None, None


_to_slots.defvjp(_to_slots_forward, _to_slots_backward)


@jax.custom_vjp
def _from_slots(
    y_SD: jax.Array, choice_S: Int[Array, " S"], slot_MK: Int[Array, "M K"]
) -> jax.Array:
    """Each choice gets the row of its slot; choices without one get zeros. [S, D] → [M, K, D]."""
    return _rows(y_SD, slot_MK)


def _from_slots_forward(y_SD, choice_S, slot_MK):
    return _from_slots(y_SD, choice_S, slot_MK), choice_S


def _from_slots_backward(choice_S, grad_MKD):
    return _rows(grad_MKD.reshape(-1, grad_MKD.shape[-1]), choice_S), None, None


_from_slots.defvjp(_from_slots_forward, _from_slots_backward)


def gather_dispatch(x_GMD: Float[Array, "G M D"], slots: Slots) -> Float[Array, "G E C D"]:
    """Copy tokens into their slots, by row gathers."""
    groups, num_experts, capacity = slots.choice_GEC.shape
    choice_GS = slots.choice_GEC.reshape(groups, num_experts * capacity)
    # vmap, never one flat token axis: per-group indices keep the gather local to a shard.
    x_GSD = jax.vmap(_to_slots)(x_GMD, choice_GS, slots.slot_GMK)
    return x_GSD.reshape(groups, num_experts, capacity, x_GMD.shape[-1])


def gather_combine(
    y_GECD: Float[Array, "G E C D"], slots: Slots, choice: Choice
) -> Float[Array, "G M D"]:
    """Sum each token's expert outputs, weighted by its gates, by row gathers.

    The products are taken in the gates' dtype (at least float32), the sum returned in `y`'s.
    """
    groups, num_experts, capacity, width = y_GECD.shape
    y_GSD = y_GECD.reshape(groups, num_experts * capacity, width)
    choice_GS = slots.choice_GEC.reshape(groups, num_experts * capacity)
    y_GMKD = jax.vmap(_from_slots)(y_GSD, choice_GS, slots.slot_GMK)
    weighted_GMKD = y_GMKD.astype(choice.gate_GMK.dtype) * choice.gate_GMK[..., None]
    return weighted_GMKD.sum(axis=2).astype(y_GECD.dtype)


def _one_hot_slots(slots: Slots, dtype: jnp.dtype) -> Float[Array, "G M K E C"]:
    _, num_experts, capacity = slots.choice_GEC.shape
    # An index one past the end has no one-hot: dropped choices are all zeros.
    mask_GMKS = jax.nn.one_hot(slots.slot_GMK, num_experts * capacity, dtype=dtype)
    return mask_GMKS.reshape(*slots.slot_GMK.shape, num_experts, capacity)


def einsum_dispatch(x_GMD: Float[Array, "G M D"], slots: Slots) -> Float[Array, "G E C D"]:
    """Copy tokens into their slots, by multiplication with a one-hot mask."""
    return jnp.einsum("gmkec,gmd->gecd", _one_hot_slots(slots, x_GMD.dtype), x_GMD)


def einsum_combine(
    y_GECD: Float[Array, "G E C D"], slots: Slots, choice: Choice
) -> Float[Array, "G M D"]:
    """Sum each token's expert outputs, weighted by its gates, by one-hot multiplication."""
    gates_GMKEC = _one_hot_slots(slots, choice.gate_GMK.dtype)
    gates_GMKEC *= choice.gate_GMK[..., None, None]
    y_GMD = jnp.einsum("gmkec,gecd->gmd", gates_GMKEC, y_GECD.astype(choice.gate_GMK.dtype))
    return y_GMD.astype(y_GECD.dtype)


class Dispatcher(NamedTuple):
    """A backend: tokens to slots, and slots back to tokens."""

    dispatch: Callable[[jax.Array, Slots], jax.Array]
    combine: Callable[[jax.Array, Slots, Choice], jax.Array]


DISPATCHERS: dict[str, Dispatcher] = {
    "gather": Dispatcher(gather_dispatch, gather_combine),
    "einsum": Dispatcher(einsum_dispatch, einsum_combine),
}
