"""From choices to expert slots: capacity, who comes first, and the two tables of an assignment."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from switchx.moe import routing
from switchx.moe.assignment import Assignment, Choice, Grouping
from switchx.moe.rows import to_slots

PRIORITIES = ("choice", "token", "probability")


def capacity(
    group_tokens: int,
    *,
    num_experts: int,
    top_k: int,
    capacity_factor: float | None,
    min_capacity: int = 0,
    expert_capacity: int | None = None,
) -> int:
    """Slots per expert in a group: ``max(ceil(K · factor · M / E), min_capacity)``, at most M.

    An absolute `expert_capacity` replaces the formula, as in Hugging Face.

    The paper's capacity (arXiv:2101.03961 §2.2, equation 3) times the choices per token K, so
    that a factor of 1 has room for every choice of a balanced router whatever K is. More than M
    slots could never fill: a token asks an expert once. ``None`` means dropless: M slots.
    """
    if expert_capacity is not None:
        return min(expert_capacity, group_tokens)
    if capacity_factor is None:
        return group_tokens
    # Rounding first: 1.1 * 80 / 8 is 11.000000000000002 in floating point.
    balanced = math.ceil(round(top_k * capacity_factor * group_tokens / num_experts, 6))
    return min(max(balanced, min_capacity, 1), group_tokens)


def place(
    choice: Choice,
    mask_GM: Bool[Array, "G M"],
    *,
    num_experts: int,
    capacity: int,
    priority: str = "choice",
    confidence_GM: Float[Array, "G M"] | None = None,
    renormalize: bool = False,
) -> Assignment:
    """Give each choice the next free slot of its expert, until the expert's slots are full.

    Who comes first within a group is `priority`: "choice": all first choices before any second
    one, and each of those in token order (GShard, arXiv:2006.16668, algorithm 1); "token": all
    choices of a token before those of the next, so that later tokens take nothing from earlier
    ones; "probability": as "choice", but tokens in order of `confidence_GM`, the router's largest
    probability, or without it of their first gate (batch-priority routing, arXiv:2106.05974, §3).
    Tokens outside `mask_GM` take no slot. With `renormalize` the
    gates that found a slot are divided by their sum.
    """
    _, num_tokens, top_k = choice.expert_index_GMK.shape

    if confidence_GM is None:
        confidence_GM = choice.gate_GMK[..., 0]

    def place_group(
        expert_index_MK: jax.Array, gate_MK: jax.Array, confidence_M: jax.Array, mask_M: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        queue_Q = _queue(confidence_M, mask_M, top_k, priority)
        asked_MK = jnp.where(mask_M[:, None], expert_index_MK, num_experts)
        choice_EC, slot_MK = fill(asked_MK, queue_Q, num_experts, capacity)
        if renormalize:
            gate_MK = routing.normalize(jnp.where(slot_MK < num_experts * capacity, gate_MK, 0))
        gate_S1: Any = to_slots(
            gate_MK.reshape(-1, 1),
            choice_EC.reshape(-1),
            slot_MK.reshape(-1, 1),
            num_tokens * top_k,
        )
        return choice_EC // top_k, gate_S1.reshape(num_experts, capacity), slot_MK

    token_GEC, gate_GEC, slot_GMK = jax.vmap(place_group)(
        choice.expert_index_GMK, choice.gate_GMK, confidence_GM, mask_GM
    )
    return Assignment(token_GEC=token_GEC, gate_GEC=gate_GEC, slot_GMK=slot_GMK)


def renormalize(choice: Choice, kept_GMK: Bool[Array, "G M K"]) -> Choice:
    """The same choices with gates that sum to 1 over those that are kept; 0 for the others."""
    gate_GMK = routing.normalize(jnp.where(kept_GMK, choice.gate_GMK, 0))
    return Choice(expert_index_GMK=choice.expert_index_GMK, gate_GMK=gate_GMK)


def group(choice: Choice, mask_GM: Bool[Array, "G M"], *, num_experts: int) -> Grouping:
    """Sort all choices by expert, for any number of them an expert has."""
    groups, num_tokens, top_k = choice.expert_index_GMK.shape
    num_rows = choice.expert_index_GMK.size
    asked_N = jnp.where(mask_GM[..., None], choice.expert_index_GMK, num_experts).reshape(-1)
    sorted_N, choice_N = jax.lax.sort_key_val(asked_N, jnp.arange(num_rows, dtype=jnp.int32))
    _, row_N = jax.lax.sort_key_val(choice_N, jnp.arange(num_rows, dtype=jnp.int32))
    made_N = sorted_N < num_experts
    choice_N = jnp.where(made_N, choice_N, num_rows)
    row_N = jnp.where(asked_N < num_experts, row_N, num_rows)
    gate_N1: Any = to_slots(choice.gate_GMK.reshape(-1, 1), choice_N, row_N[:, None], num_rows)
    start_E = jnp.searchsorted(sorted_N, jnp.arange(num_experts + 1))
    return Grouping(
        token_N=jnp.where(made_N, choice_N // top_k, groups * num_tokens),
        gate_N=gate_N1.reshape(-1),
        sizes_E=jnp.diff(start_E).astype(jnp.int32),
        row_GMK=row_N.reshape(choice.expert_index_GMK.shape),
    )


def _queue(
    confidence_M: jax.Array, mask_M: jax.Array, top_k: int, priority: str
) -> Int[Array, " Q"]:
    """Choices (token · K + rank) in the order in which they are served."""
    tokens_M, ranks_K = jnp.arange(mask_M.size), jnp.arange(top_k)
    if priority == "token":
        return (tokens_M[:, None] * top_k + ranks_K[None]).reshape(-1)
    if priority == "probability":
        confidence_M = jax.lax.stop_gradient(confidence_M)
        tokens_M = jnp.argsort(jnp.where(mask_M, -confidence_M, jnp.inf), stable=True)
    return (tokens_M[None] * top_k + ranks_K[:, None]).reshape(-1)


def fill(
    asked_MK: jax.Array, queue_Q: jax.Array, num_experts: int, capacity: int
) -> tuple[Int[Array, "E C"], Int[Array, "M K"]]:
    """Serve a queue: the choice in every slot (Q if empty) and the slot of every choice.

    `asked_MK` has `num_experts` where nothing is asked; such a choice gets slot E · C.

    A stable sort by expert, which costs the same for any number of experts; a cumulative sum of
    one-hots costs E times as much.
    """
    num_choices = queue_Q.size
    asked_Q = asked_MK.reshape(-1)[queue_Q]
    sorted_Q, order_Q = jax.lax.sort_key_val(asked_Q, queue_Q)
    start_E = jnp.searchsorted(sorted_Q, jnp.arange(num_experts + 1))
    # Slot c of expert e has the c-th choice of e's stretch of the sorted queue.
    place_EC = start_E[:-1, None] + jnp.arange(capacity)[None]
    filled_EC = place_EC < start_E[1:, None]
    choice_EC = jnp.where(filled_EC, order_Q.at[place_EC].get(mode="clip"), num_choices)
    # And a choice has the slot of its rank in that stretch.
    rank_Q = jnp.arange(num_choices) - start_E[sorted_Q]
    kept_Q = (sorted_Q < num_experts) & (rank_Q < capacity)
    slot_Q = jnp.where(kept_Q, sorted_Q * capacity + rank_Q, num_experts * capacity)
    _, slot_Q = jax.lax.sort_key_val(order_Q, slot_Q)
    return choice_EC.astype(jnp.int32), slot_Q.reshape(asked_MK.shape).astype(jnp.int32)
