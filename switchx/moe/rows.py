"""Rows to slots and back: two linear maps, each the other's transpose, that never scatter floats.

A table of tokens by slot and one of slots by token say the same thing in both directions, so the
gradient of either map is the other one: gathers of rows, both ways. Where only the first table is
known, because a token may be in any number of slots, the way back adds rows up.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def take(table_ND: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of a table by index; zeros where the index is one past the end."""
    return table_ND.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def weigh(y_SD: Float[Array, "*S D"], gate_S: Float[Array, "*S"]) -> Float[Array, "*S D"]:
    """Rows times their gates, in the gates' dtype.

    The gates' gradient is written as a product of matrices: of a single group, XLA's reduction
    takes thirty times as long on CPU.
    """
    return y_SD.astype(gate_S.dtype) * gate_S[..., None]


def _weigh_forward(y_SD, gate_S):
    return weigh(y_SD, gate_S), (y_SD, gate_S)


def _weigh_backward(residuals, grad_SD):
    y_SD, gate_S = residuals
    grad_gate_S = jnp.einsum("...d,...d->...", grad_SD, y_SD.astype(gate_S.dtype))
    return (grad_SD * gate_S[..., None]).astype(y_SD.dtype), grad_gate_S


weigh.defvjp(_weigh_forward, _weigh_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def to_slots(
    x_MD: Float[Array, "M D"],
    token_S: Int[Array, " S"],
    slot_MK: Int[Array, "M K"] | None,
    num_tokens: int,
) -> Float[Array, "S D"]:
    """Slot s gets the row of its token; empty slots (token M) get zeros."""
    return take(x_MD, token_S)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def from_slots(
    y_SD: Float[Array, "S D"],
    token_S: Int[Array, " S"],
    slot_MK: Int[Array, "M K"] | None,
    num_tokens: int,
) -> Float[Array, "M D"]:
    """Every one of `num_tokens` tokens gets the sum of its slots' rows."""
    if slot_MK is None:
        zeros_MD = jnp.zeros((num_tokens, y_SD.shape[-1]), y_SD.dtype)
        return zeros_MD.at[token_S].add(y_SD, mode="drop")
    # One gather a choice: the sum is taken as rows arrive, nothing is written out by choice.
    y_MD = take(y_SD, slot_MK[:, 0])
    for slot_M in slot_MK.T[1:]:
        y_MD += take(y_SD, slot_M)
    return y_MD


def _to_slots_forward(x_MD, token_S, slot_MK, num_tokens):
    return to_slots(x_MD, token_S, slot_MK, num_tokens), (token_S, slot_MK)


def _to_slots_backward(num_tokens, tables, grad_SD):
    return from_slots(grad_SD, *tables, num_tokens), None, None


def _from_slots_forward(y_SD, token_S, slot_MK, num_tokens):
    return from_slots(y_SD, token_S, slot_MK, num_tokens), (token_S, slot_MK)


def _from_slots_backward(num_tokens, tables, grad_MD):
    return to_slots(grad_MD, *tables, num_tokens), None, None


to_slots.defvjp(_to_slots_forward, _to_slots_backward)
from_slots.defvjp(_from_slots_forward, _from_slots_backward)
