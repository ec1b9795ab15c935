"""Routers, which choose experts for tokens, and the placement of choices into expert slots."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from switchx.moe.assignment import Choice, Slots

Router = Callable[[jax.Array], Choice]


def switch(logits_GME: Float[Array, "G M E"]) -> Choice:
    """Top-1 routing: the most probable expert, weighted by its probability.

    The gate is not renormalised (it would be 1 and carry no gradient to the router); ties go to
    the expert of lowest index. Switch Transformers (arXiv:2101.03961) §2.1, equations 1–2.
    """
    probs_GME = jax.nn.softmax(logits_GME)
    expert_index_GMK = jnp.argmax(probs_GME, axis=-1, keepdims=True).astype(jnp.int32)
    return Choice(
        expert_index_GMK=expert_index_GMK,
        gate_GMK=jnp.take_along_axis(probs_GME, expert_index_GMK, axis=-1),
    )


ROUTERS: dict[str, Router] = {"switch": switch}


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


def place(choice: Choice, mask_GM: Bool[Array, "G M"], *, num_experts: int, capacity: int) -> Slots:
    """Give each choice the next free slot of its expert, until the expert's slots are full.

    Within a group all first choices come before any second choice, and each of those in token
    order (GShard, arXiv:2006.16668, algorithm 1). Tokens outside `mask_GM` take no slot.
    """

    def place_group(expert_index_MK: jax.Array, mask_M: jax.Array) -> tuple[jax.Array, ...]:
        num_tokens, top_k = expert_index_MK.shape
        num_choices, num_slots = num_tokens * top_k, num_experts * capacity
        # [K, M]: first choices first.
        expert_Q = expert_index_MK.T.reshape(num_choices)
        asks_QE = expert_Q[:, None] == jnp.arange(num_experts)[None]
        asks_QE &= jnp.tile(mask_M, top_k)[:, None]
        rank_QE = jnp.cumsum(asks_QE.astype(jnp.int32), axis=0)
        rank_Q = jnp.sum(jnp.where(asks_QE, rank_QE, 0), axis=1) - 1  # -1 for padding
        kept_Q = (rank_Q >= 0) & (rank_Q < capacity)
        slot_Q = jnp.where(kept_Q, expert_Q * capacity + rank_Q, num_slots)
        slot_MK = slot_Q.reshape(top_k, num_tokens).T
        choice_S = jnp.full((num_slots,), num_choices, jnp.int32)
        choice_S = choice_S.at[slot_MK.reshape(num_choices)].set(
            jnp.arange(num_choices, dtype=jnp.int32), mode="drop"
        )
        return choice_S.reshape(num_experts, capacity), slot_MK

    choice_GEC, slot_GMK = jax.vmap(place_group)(choice.expert_index_GMK, mask_GM)
    return Slots(choice_GEC=choice_GEC, slot_GMK=slot_GMK)
