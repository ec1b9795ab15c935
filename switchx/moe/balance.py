"""Losses and statistics of a routing decision, computed once and only from the assignment."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from switchx.moe.assignment import (
    Assignment,
    Choice,
    Dropless,
    Mixture,
    RouterStats,
    Routing,
)

LOAD_BALANCE_CHOICES = ("first", "all")


def router_stats(
    logits_GME: Float[Array, "G M _"] | None,
    routing: Routing,
    placed: Assignment | Dropless | Mixture,
    mask_GM: Bool[Array, "G M"],
    *,
    load_balance_choices: str = "first",
) -> RouterStats:
    """Sums over the real tokens (`mask_GM`) of everything the losses and the reports need.

    Load balance, per group of n real tokens: n · E Σ_e f_e P_e, where f_e is the share of tokens
    whose first choice is e (before capacity; no gradient) and P_e the mean probability of e.
    Switch Transformers (arXiv:2101.03961) §2.2, equations 4–6, with padding left out. With more
    choices than one, f counts the "first" of each token (GShard, arXiv:2006.16668, §2.2; Mesh
    TensorFlow) or "all" of them (Flaxformer, Mixtral: K at uniform routing).
    Importance, per group: n · CV²(I), I_e being the sum of gates of e over the group's tokens.
    Outrageously Large Neural Networks (arXiv:1701.06538) §4, equations 6–7.
    Router z: Σ_t logsumexp(logits_t)², 0 without logits. ST-MoE (arXiv:2202.08906) §3.3,
    equation 5.
    """
    probs_GME = routing.probs_GME
    dtype, num_experts = probs_GME.dtype, probs_GME.shape[-1]
    mask_GM1 = mask_GM[..., None].astype(dtype)
    tokens_G = jnp.sum(mask_GM1, axis=(1, 2))
    num_tokens = jnp.sum(tokens_G)
    probs_GME = probs_GME * mask_GM1

    asked_GE, importance_GE, num_choices_K, num_dropped_K = _demand(routing, placed, mask_GM)
    counted_GE = asked_GE
    if load_balance_choices == "first" and isinstance(routing.decision, Choice):
        counted_GE = _count(routing.decision.expert_index_GMK[..., :1], mask_GM, num_experts, dtype)
    fraction_GE = jax.lax.stop_gradient(counted_GE) / jnp.maximum(tokens_G, 1)[:, None]
    # n · E Σ f P = E Σ f (n P), and n P is the plain sum of probabilities.
    load_balance = num_experts * jnp.sum(fraction_GE * jnp.sum(probs_GME, axis=1))

    router_z = jnp.zeros((), dtype)
    if logits_GME is not None:
        log_z_GM = jax.nn.logsumexp(logits_GME, axis=-1)
        router_z = jnp.sum(jnp.square(log_z_GM) * mask_GM1[..., 0]).astype(dtype)

    observed_GME = jax.lax.stop_gradient(probs_GME)
    return RouterStats(
        num_tokens=num_tokens,
        num_choices_K=num_choices_K,
        num_dropped_K=num_dropped_K,
        load_balance=load_balance,
        importance=jnp.sum(tokens_G * _squared_variation(importance_GE)),
        router_z=router_z,
        entropy=-jnp.sum(jax.scipy.special.xlogy(observed_GME, observed_GME)),
        confidence=jnp.sum(jnp.max(observed_GME, axis=-1)),
        tokens_per_expert_E=jnp.sum(asked_GE, axis=0),
    )


def _demand(
    routing: Routing, placed: Assignment | Dropless | Mixture, mask_GM: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Choices per expert, gates per expert, choices by rank, and how many of them were dropped."""
    decision, dtype = routing.decision, routing.probs_GME.dtype
    num_experts = routing.probs_GME.shape[-1]
    num_tokens = jnp.sum(mask_GM, dtype=dtype)
    if isinstance(decision, Mixture):
        weight_GE = jnp.sum(decision.combine_GMEC, axis=(1, 3))
        return weight_GE, weight_GE, num_tokens[None], jnp.zeros((1,), dtype)
    assert not isinstance(placed, Mixture)
    if isinstance(decision, Assignment):
        filled_GEC = decision.token_GEC < mask_GM.shape[1]

        def reached(token_EC: jax.Array, mask_M: jax.Array) -> jax.Array:
            taken_M = jnp.zeros(mask_M.shape, bool).at[token_EC.reshape(-1)].set(True, mode="drop")
            return jnp.sum(taken_M & mask_M, dtype=dtype)

        dropped = num_tokens - jnp.sum(jax.vmap(reached)(decision.token_GEC, mask_GM))
        load_GE = jnp.sum(filled_GEC, axis=-1, dtype=dtype)
        return load_GE, jnp.sum(decision.gate_GEC, axis=-1), num_tokens[None], dropped[None]
    made_GMK = (decision.expert_index_GMK < num_experts) & mask_GM[..., None]
    dropped_GMK = made_GMK & ~placed.kept_GMK
    gate_GMK = jnp.where(made_GMK, decision.gate_GMK, 0)
    return (
        _count(decision.expert_index_GMK, mask_GM, num_experts, dtype),
        _count(decision.expert_index_GMK, mask_GM, num_experts, dtype, gate_GMK),
        jnp.sum(made_GMK, axis=(0, 1), dtype=dtype),
        jnp.sum(dropped_GMK, axis=(0, 1), dtype=dtype),
    )


def _count(
    expert_index_GMK: jax.Array,
    mask_GM: jax.Array,
    num_experts: int,
    dtype: jnp.dtype,
    weight_GMK: jax.Array | None = None,
) -> Float[Array, "G E"]:
    """Real tokens' choices of each expert, or the sum of their weights."""
    asks_GMKE = jax.nn.one_hot(expert_index_GMK, num_experts, dtype=bool)
    asks_GMKE &= mask_GM[:, :, None, None]
    weights = 1 if weight_GMK is None else weight_GMK[..., None]
    return jnp.sum(jnp.where(asks_GMKE, weights, 0), axis=(1, 2), dtype=dtype)


def _squared_variation(x_GE: jax.Array) -> jax.Array:
    square_G = jnp.square(jnp.mean(x_GE, axis=-1))
    # Nothing but padding: no variation, and a gradient of 0 instead of 0 / 0.
    safe_G = jnp.where(square_G > 0, square_G, 1)
    return jnp.where(square_G > 0, jnp.var(x_GE, axis=-1) / safe_G, 0)
