"""Losses and statistics of a routing decision, computed once and only from the assignment."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from switchx.moe.assignment import Choice, RouterStats, Slots


def router_stats(
    logits_GME: Float[Array, "G M E"],
    choice: Choice,
    slots: Slots,
    mask_GM: Bool[Array, "G M"],
) -> RouterStats:
    """Sums over the real tokens (`mask_GM`) of everything the losses and the reports need.

    Load balance, per group of n real tokens: n · E Σ_e f_e P_e, where f_e is the share of tokens
    whose first choice is e (before capacity; no gradient) and P_e the mean probability of e.
    Switch Transformers (arXiv:2101.03961) §2.2, equations 4–6, with padding left out.
    Router z: Σ_t logsumexp(logits_t)². ST-MoE (arXiv:2202.08906) §3.3, equation 5.
    """
    dtype = logits_GME.dtype
    num_experts = logits_GME.shape[-1]
    mask_GM1 = mask_GM[..., None].astype(dtype)
    log_probs_GME = jax.nn.log_softmax(logits_GME)
    probs_GME = jnp.exp(log_probs_GME) * mask_GM1

    asks_GMKE = jax.nn.one_hot(choice.expert_index_GMK, num_experts, dtype=dtype)
    asks_GMKE *= mask_GM1[..., None]
    tokens_G = jnp.sum(mask_GM1, axis=(1, 2))
    first_choices_GE = jnp.sum(asks_GMKE[:, :, 0], axis=1)
    fraction_GE = first_choices_GE / jnp.maximum(tokens_G, 1)[:, None]
    # n · E Σ f P = E Σ f (n P), and n P is the plain sum of probabilities.
    load_balance = num_experts * jnp.sum(fraction_GE * jnp.sum(probs_GME, axis=1))

    num_choices = jnp.sum(mask_GM1) * choice.expert_index_GMK.shape[-1]
    log_z_GM = jax.nn.logsumexp(logits_GME, axis=-1)
    return RouterStats(
        num_tokens=jnp.sum(mask_GM1),
        num_choices=num_choices,
        num_dropped=num_choices - jnp.sum(slots.kept_GMK.astype(dtype)),
        load_balance=load_balance,
        router_z=jnp.sum(jnp.square(log_z_GM) * mask_GM1[..., 0]),
        entropy=-jnp.sum(probs_GME * log_probs_GME),
        confidence=jnp.sum(jnp.max(probs_GME, axis=-1)),
        tokens_per_expert_E=jnp.sum(asks_GMKE, axis=(0, 1, 2)),
    )
