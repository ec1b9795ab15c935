"""Routing schemes: pure functions from logits to a decision, and the table of them by name.

Every function takes logits [G, M, E] (groups, tokens of a group, experts) and returns a `Routing`.
`ROUTERS` says of each what it needs and whether a decoder may use it; docs/routing.md compares.
"""

import functools
import heapq
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from switchx.moe.assignment import Assignment, Choice, Mixture, Routing, Tokens

if TYPE_CHECKING:
    from switchx.moe.config import MoeConfig

Logits = Float[Array, "G M E"]
Mask = Bool[Array, "G M"]


# Tokens choose --------------------------------------------------------------------------------


def _choose(
    scores_GME: jax.Array, probs_GME: jax.Array, k: int, *, renormalize: bool = False
) -> Choice:
    """The k experts of the largest scores, weighted by `probs_GME`; ties to the lowest index."""
    # Not `lax.top_k`, for which XLA gathers the scores of all devices.
    left_GME = jax.lax.stop_gradient(scores_GME)
    found = []
    for _ in range(k):
        found.append(jnp.argmax(left_GME, axis=-1, keepdims=True).astype(jnp.int32))
        taken_GME = jax.nn.one_hot(found[-1][..., 0], left_GME.shape[-1], dtype=bool)
        left_GME = jnp.where(taken_GME, -jnp.inf, left_GME)
    expert_index_GMK = jnp.concatenate(found, axis=-1)
    gate_GMK = jnp.take_along_axis(probs_GME, expert_index_GMK, axis=-1)
    if renormalize:
        gate_GMK = normalize(gate_GMK)
    return Choice(expert_index_GMK=expert_index_GMK, gate_GMK=gate_GMK)


def normalize(gate_K: Float[Array, "*tokens K"]) -> Float[Array, "*tokens K"]:
    """Gates divided by their sum over a token's choices."""
    total_1 = jnp.sum(gate_K, axis=-1, keepdims=True)
    return gate_K / jnp.maximum(total_1, jnp.finfo(gate_K.dtype).tiny)


def switch(logits_GME: Logits) -> Routing:
    """Top-1: y = p_i E_i(x), i = argmax p, p = softmax(logits).

    The gate is not renormalised (it would be 1 and carry no gradient to the router); ties go to
    the expert of lowest index. Switch Transformers (arXiv:2101.03961) §2.1, equations 1–2.
    """
    return top_k(logits_GME, 1)


def top_k(
    logits_GME: Logits,
    k: int,
    *,
    renormalize: bool = False,
    rng: jax.Array | None = None,
) -> Routing:
    """The k most probable experts: y = Σ_i g_i E_i(x), with g = p, or p / Σ p if `renormalize`.

    Raw gates as Flaxformer and OLMoE (arXiv:2409.02060) have them, renormalised ones as Mixtral
    (arXiv:2401.04088, §2.1). With `rng` the experts are sampled without replacement in proportion
    to p instead (Gumbel top-k), the "sample softmax" of arXiv:2101.03961, table 11.
    """
    scores_GME = logits_GME
    if rng is not None:
        scores_GME = logits_GME + jax.random.gumbel(rng, logits_GME.shape, logits_GME.dtype)
    probs_GME = jax.nn.softmax(logits_GME)
    return Routing(_choose(scores_GME, probs_GME, k, renormalize=renormalize), probs_GME)


SECOND_EXPERT_POLICIES = ("all", "random", "threshold", "sampling")


def gshard(
    logits_GME: Logits,
    *,
    policy: str = "random",
    threshold: float = 0.5,
    renormalize: bool = True,
    rng: jax.Array | None = None,
) -> Routing:
    """Top-2 with a second expert that is not always asked.

    g_1, g_2 are p of the two, divided by their sum if `renormalize`. The second is asked
    "all": always; "random": with probability min(1, g_2 / threshold), which for 1/2 is GShard's
    2 g_2 > U (arXiv:2006.16668, algorithm 1) and for 0.2 ST-MoE's (arXiv:2202.08906, §2);
    "threshold": where g_2 > threshold; "sampling": always, but drawn from p without the first
    (fairseq's NLLB-MoE). Without `rng`, in evaluation, "random" and "sampling" are "all".
    """
    probs_GME = jax.nn.softmax(logits_GME)
    first_GM = jnp.argmax(logits_GME, axis=-1)
    is_first_GME = jax.nn.one_hot(first_GM, logits_GME.shape[-1], dtype=bool)
    scores_GME = logits_GME
    if policy == "sampling" and rng is not None:
        scores_GME += jax.random.gumbel(rng, logits_GME.shape, logits_GME.dtype)
    second_GM = jnp.argmax(jnp.where(is_first_GME, -jnp.inf, scores_GME), axis=-1)
    expert_index_GMK = jnp.stack([first_GM, second_GM], axis=-1).astype(jnp.int32)
    gate_GMK = jnp.take_along_axis(probs_GME, expert_index_GMK, axis=-1)
    if renormalize:
        gate_GMK = normalize(gate_GMK)
    asked_GM = jnp.ones(first_GM.shape, bool)
    if policy == "random" and rng is not None:
        drawn_GM = jax.random.uniform(rng, first_GM.shape, gate_GMK.dtype)
        asked_GM = gate_GMK[..., 1] > threshold * drawn_GM
    elif policy == "threshold":
        asked_GM = gate_GMK[..., 1] > threshold
    second_GM = jnp.where(asked_GM, expert_index_GMK[..., 1], logits_GME.shape[-1])
    expert_index_GMK = expert_index_GMK.at[..., 1].set(second_GM)
    return Routing(Choice(expert_index_GMK=expert_index_GMK, gate_GMK=gate_GMK), probs_GME)


SCORES = ("softmax", "sigmoid")


def loss_free(
    logits_GME: Logits,
    bias_E: Float[Array, " E"],
    k: int,
    *,
    score: str = "sigmoid",
    renormalize: bool = True,
) -> Routing:
    """The k experts of the largest s_i + b_i, weighted by s_i: balance without a loss.

    s is the sigmoid (or softmax) of the logits; b is state that no gradient reaches and
    `update_bias` moves after every batch. arXiv:2408.15664, §3, equation 3; sigmoid and
    renormalised gates as in DeepSeek-V3 (arXiv:2412.19437), §2.1.2.
    """
    scores_GME = jax.nn.sigmoid(logits_GME) if score == "sigmoid" else jax.nn.softmax(logits_GME)
    bias_E = jax.lax.stop_gradient(bias_E).astype(scores_GME.dtype)
    biased_GME = scores_GME + bias_E[None, None]
    probs_GME = scores_GME
    if score == "sigmoid":
        probs_GME = normalize(scores_GME)
    return Routing(_choose(biased_GME, scores_GME, k, renormalize=renormalize), probs_GME)


def update_bias(
    bias: Float[Array, "*layers E"], tokens_per_expert: Float[Array, "*layers E"], rate: float
) -> Float[Array, "*layers E"]:
    """b_i + u · sign(mean load − load_i): an overloaded expert becomes less attractive.

    arXiv:2408.15664, §3, algorithm 1.
    """
    mean = jnp.mean(tokens_per_expert, axis=-1, keepdims=True)
    return bias + rate * jnp.sign(mean - tokens_per_expert).astype(bias.dtype)


HASHES = ("balanced", "random")


def hash_ids(
    ids_GM: Int[Array, "G M"], num_experts: int, *, vocab_size: int, kind: str, dtype: Any
) -> Routing:
    """The expert that a token's id hashes to; no parameters, gate 1. arXiv:2106.04426, §3.1.

    Args:
      ids_GM: token ids; one outside the vocabulary is routed as the nearest inside.
      num_experts: E.
      vocab_size: ids there are.
      kind: one of `HASHES`, see `hash_table`.
      dtype: of gates and probabilities.
    """
    table_V = jnp.asarray(hash_table(num_experts, vocab_size, kind))
    expert_GM = jnp.take(table_V, ids_GM, mode="clip")
    gate_GMK = jnp.ones((*ids_GM.shape, 1), dtype)
    choice = Choice(expert_index_GMK=expert_GM[..., None], gate_GMK=gate_GMK)
    return Routing(choice, jax.nn.one_hot(expert_GM, num_experts, dtype=dtype))


@functools.lru_cache(maxsize=8)
def hash_table(num_experts: int, vocab_size: int, kind: str) -> np.ndarray:
    """Expert of every token id, int32 [V].

    "random" mixes the id's bits. "balanced" gives each id in turn to the expert with the least
    text so far, arXiv:2106.04426, §3.1, where the share of id v is 1 / (v + 1): SentencePiece
    numbers its pieces by falling frequency, and words follow Zipf's law.
    """
    if kind == "random":
        mixed = np.arange(vocab_size, dtype=np.uint64)
        with np.errstate(over="ignore"):  # splitmix64's finaliser wraps around
            mixed += np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((mixed ^ (mixed >> np.uint64(31))) % np.uint64(num_experts)).astype(np.int32)
    loads = [(0.0, expert) for expert in range(num_experts)]
    table_V = np.empty(vocab_size, np.int32)
    for token in range(vocab_size):
        load, table_V[token] = loads[0]
        heapq.heapreplace(loads, (load + 1 / (token + 1), int(table_V[token])))
    return table_V


def sentence(
    logits_GME: Logits, sequence_GM: Int[Array, "G M"], mask_GM: Mask, k: int, *, renormalize: bool
) -> Routing:
    """One decision per sequence: top-k of the mean of its real tokens' logits.

    The gate is linear, so that is the logit of the mean token: sentence-level routing of
    arXiv:2110.03742, §3. Every token looks at all others of its sequence.

    Args:
      logits_GME: of tokens.
      sequence_GM: number of the token's sequence in its group, in [0, M).
      mask_GM: real tokens.
      k: experts per sequence.
      renormalize: whether the k gates sum to 1.
    """

    def pool(logits_ME: jax.Array, sequence_M: jax.Array, mask_M: jax.Array) -> jax.Array:
        weight_M = mask_M.astype(logits_ME.dtype)
        add = functools.partial(
            jax.ops.segment_sum, segment_ids=sequence_M, num_segments=sequence_M.size
        )
        total_ME = add(jnp.where(mask_M[:, None], logits_ME, 0))
        return (total_ME / jnp.maximum(add(weight_M), 1)[:, None])[sequence_M]

    return top_k(jax.vmap(pool)(logits_GME, sequence_GM, mask_GM), k, renormalize=renormalize)


def no_token_left_behind(
    logits_GME: Logits, mask_GM: Mask, capacity: int, *, passes: int
) -> Routing:
    """Top-1, and a token that finds its expert full tries its next best one, `passes` times.

    In every pass the tokens still without a slot ask, in order, for what earlier passes left.
    Weighted by the probability of the expert that took the token; one that is left behind after
    all keeps its first choice. arXiv:2101.03961, appendix B.
    """
    num_experts = logits_GME.shape[-1]
    probs_GME = jax.nn.softmax(logits_GME)
    wanted_GMK = _choose(logits_GME, probs_GME, min(passes, num_experts)).expert_index_GMK

    def settle(wanted_MK: jax.Array, mask_M: jax.Array) -> jax.Array:
        waiting_M, filled_E, taken_M = mask_M, jnp.zeros(num_experts, jnp.int32), wanted_MK[:, 0]
        for wanted_M in wanted_MK.T:
            asks_ME = jax.nn.one_hot(wanted_M, num_experts, dtype=bool) & waiting_M[:, None]
            rank_ME = filled_E[None] + jnp.cumsum(asks_ME, axis=0, dtype=jnp.int32) - 1
            kept_M = jnp.any(asks_ME & (rank_ME < capacity), axis=1)
            taken_M = jnp.where(kept_M, wanted_M, taken_M)
            waiting_M &= ~kept_M
            filled_E = jnp.minimum(filled_E + jnp.sum(asks_ME, axis=0), capacity)
        return taken_M

    expert_GM1 = jax.vmap(settle)(wanted_GMK, mask_GM)[..., None]
    gate_GM1 = jnp.take_along_axis(probs_GME, expert_GM1, axis=-1)
    return Routing(Choice(expert_index_GMK=expert_GM1, gate_GMK=gate_GM1), probs_GME)


# Balance by transport -------------------------------------------------------------------------


def sinkhorn(logits_GME: Logits, mask_GM: Mask, *, train: bool, iterations: int) -> Routing:
    """S-BASE: top-1 of a transport plan between tokens and experts, weighted by the softmax.

    In training exp(logits) is scaled until every expert has an equal share of the real tokens and
    every token a share of 1, in turn, `iterations` times; the expert is the argmax of that plan.
    In evaluation it is the argmax of the logits. Unified Scaling Laws for Routed Language Models
    (arXiv:2202.01169), §3.1 and appendix B.
    """
    probs_GME = jax.nn.softmax(logits_GME)
    plan_GME = jax.lax.stop_gradient(logits_GME)
    if train:
        real_GM1 = mask_GM[..., None]
        for _ in range(iterations):
            column_G1E = jax.nn.logsumexp(
                jnp.where(real_GM1, plan_GME, -jnp.inf), axis=1, keepdims=True
            )
            # A group of padding has no columns to scale.
            plan_GME -= jnp.where(jnp.isfinite(column_G1E), column_G1E, 0)
            plan_GME -= jax.nn.logsumexp(plan_GME, axis=-1, keepdims=True)
    return Routing(_choose(plan_GME, probs_GME, 1), probs_GME)


def base(logits_GME: Logits, mask_GM: Mask, *, train: bool) -> Routing:
    """BASE: the assignment of equal loads with the largest sum of scores, gate σ(score).

    In training every expert gets at most ceil(n / E) of a group's n real tokens
    (`balanced_assignment`), in evaluation each token its best expert. arXiv:2103.16716, §3.
    """
    probs_GME = jax.nn.softmax(logits_GME)
    scores_GME = jax.lax.stop_gradient(logits_GME)
    if train:
        expert_GM = jax.vmap(balanced_assignment)(scores_GME, mask_GM)
    else:
        expert_GM = jnp.argmax(scores_GME, axis=-1).astype(jnp.int32)
    at_GM1 = jnp.minimum(expert_GM, logits_GME.shape[-1] - 1)[..., None]
    gate_GM1 = jax.nn.sigmoid(jnp.take_along_axis(logits_GME, at_GM1, axis=-1))
    return Routing(Choice(expert_index_GMK=expert_GM[..., None], gate_GMK=gate_GM1), probs_GME)


def balanced_assignment(
    scores_ME: Float[Array, "M E"], mask_M: Bool[Array, " M"]
) -> Int[Array, " M"]:
    """Experts of tokens with loads of at most ceil(n / E), near the largest sum of scores.

    Bertsekas' auction: a token without an expert bids for the one of best score less price as
    much as it prefers it to the second best, plus ε; an expert keeps its highest bids, and its
    price is the lowest of them. The sum is within n ε of the best, ε being 1/64 of the range of
    the scores. Padding gets E.
    """
    num_tokens, num_experts = scores_ME.shape
    if num_experts == 1:
        return jnp.where(mask_M, 0, 1).astype(jnp.int32)
    capacity = -(-jnp.sum(mask_M) // num_experts)
    # What all scores have in common decides nothing, and costs precision; padding bids nothing.
    lowest = jnp.min(scores_ME, where=mask_M[:, None], initial=jnp.inf)
    scores_ME = jnp.where(mask_M[:, None], scores_ME - lowest, 0)
    epsilon = jnp.max(scores_ME) / 64 + 1e-6
    dtype = scores_ME.dtype

    def unfinished(state: tuple[jax.Array, ...]) -> jax.Array:
        expert_M, _, _, rounds = state
        # Never reached by an auction that ends; without an end a step would not return.
        going_on = jnp.any(mask_M & (expert_M == num_experts)) & (rounds < 100 * num_tokens)
        return going_on & jnp.isfinite(epsilon)  # of scores that are nan there is no best

    def auction(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        expert_M, bid_M, price_E, rounds = state
        bidding_M = mask_M & (expert_M == num_experts)
        net_ME = scores_ME - price_E[None]
        (best_M, second_M), wanted_M = jax.lax.top_k(net_ME, 2)[0].T, jnp.argmax(net_ME, axis=-1)
        bid_M = jnp.where(bidding_M, price_E[wanted_M] + best_M - second_M + epsilon, bid_M)
        expert_M = jnp.where(bidding_M, wanted_M.astype(jnp.int32), expert_M)
        # Holders and bidders of each expert side by side, the highest bid first.
        order_M = jnp.lexsort((-bid_M, expert_M))
        sorted_M = expert_M[order_M]
        start_E = jnp.searchsorted(sorted_M, jnp.arange(num_experts + 1))
        rank_M = jnp.arange(num_tokens) - start_E[sorted_M]
        out_M = jnp.zeros(num_tokens, bool).at[order_M].set(rank_M >= capacity)
        last_E = jnp.minimum(start_E[:-1] + capacity - 1, num_tokens - 1)
        full_E = jnp.diff(start_E) >= capacity
        price_E = jnp.where(full_E, bid_M[order_M[last_E]], 0).astype(dtype)
        expert_M = jnp.where(out_M, num_experts, expert_M)
        return expert_M, jnp.where(out_M, 0, bid_M).astype(dtype), price_E, rounds + 1

    start = (
        jnp.full(num_tokens, num_experts, jnp.int32),
        jnp.zeros(num_tokens, dtype),
        jnp.zeros(num_experts, dtype),
        jnp.int32(0),
    )
    return jax.lax.while_loop(unfinished, auction, start)[0]


# Experts choose, and mixtures -----------------------------------------------------------------


def expert_choice(logits_GME: Logits, mask_GM: Mask, capacity: int) -> Routing:
    """Every expert takes the C tokens of its group with the largest p, weighted by p.

    Perfect balance; a token may be taken by any number of experts, or by none. Which tokens are
    taken depends on all others, later ones included. arXiv:2202.09368, §3.2, equation 1.
    """
    num_tokens = logits_GME.shape[1]
    probs_GME = jax.nn.softmax(logits_GME)
    wanted_GEM = jnp.where(mask_GM[..., None], probs_GME, -1).swapaxes(1, 2)
    # Not `lax.top_k`, for which XLA gathers the groups of all devices.
    order_GEM = jnp.argsort(jax.lax.stop_gradient(wanted_GEM), descending=True, stable=True)
    token_GEC = order_GEM[..., :capacity]
    gate_GEC = jnp.take_along_axis(wanted_GEM, token_GEC, axis=-1)
    empty_GEC = gate_GEC < 0
    assignment = Assignment(
        token_GEC=jnp.where(empty_GEC, num_tokens, token_GEC).astype(jnp.int32),
        gate_GEC=jnp.where(empty_GEC, 0, gate_GEC),
    )
    return Routing(assignment, probs_GME)


def soft_moe(logits_GMS: Float[Array, "G M S"], mask_GM: Mask, num_experts: int) -> Routing:
    """Slots are means of tokens, tokens means of slots' outputs; nothing is dropped.

    Logits of every slot s = (e, c): weights of tokens in a slot are their softmax over tokens,
    weights of slots in a token their softmax over slots. arXiv:2308.00951, §2.1, equations 1–3.
    """
    groups, num_tokens, num_slots = logits_GMS.shape
    shape = (groups, num_tokens, num_experts, num_slots // num_experts)
    real_GM1 = mask_GM[..., None]
    dispatch_GMS = jax.nn.softmax(logits_GMS, axis=1, where=real_GM1)
    combine_GMS = jax.nn.softmax(logits_GMS, axis=-1) * real_GM1
    mixture = Mixture(
        dispatch_GMEC=dispatch_GMS.reshape(shape), combine_GMEC=combine_GMS.reshape(shape)
    )
    probs_GMS = jax.nn.softmax(logits_GMS, axis=-1)
    return Routing(mixture, jnp.sum(probs_GMS.reshape(shape), axis=-1))


# The table ------------------------------------------------------------------------------------


class Situation(NamedTuple):
    """What a scheme may use besides logits.

    Attributes:
      tokens: by group, [G, M].
      capacity: slots per expert and group.
      train: whether the choice may differ from evaluation's.
      rng: randomness, in training only.
      bias_E: of `loss_free`.
      vocab_size: of `hash`.
    """

    tokens: Tokens
    capacity: int
    train: bool
    rng: jax.Array | None
    bias_E: jax.Array | None
    vocab_size: int


class Scheme(NamedTuple):
    """A routing scheme.

    Attributes:
      route: configuration, logits and situation → decision.
      gate: what makes the logits: a name in `switchx.moe.gate.GATES`, or None without any.
      causal: whether no token's choice depends on later tokens, so that a decoder may use it.
      fields: the fields of `MoeConfig` beyond the common ones that mean something to it.
      needs: the field of `Tokens` that it cannot do without.
      top_k: choices per token, if the scheme fixes it.
      capacity: which capacities it can work with: "any", "finite", or "absolute".
    """

    route: Callable[["MoeConfig", jax.Array, Situation], Routing]
    gate: str | None = "linear"
    causal: bool = True
    fields: tuple[str, ...] = ()
    needs: str | None = None
    top_k: int | None = None
    capacity: str = "any"


def _top_k(config: "MoeConfig", logits_GME: jax.Array, situation: Situation) -> Routing:
    rng = situation.rng if config.exploration == "sample" else None
    return top_k(logits_GME, config.top_k, renormalize=_before(config), rng=rng)


def _before(config: "MoeConfig", default: bool = False) -> bool:
    """Whether gates are divided by their sum before choices are dropped."""
    return default if config.renormalize is None else config.renormalize == "before_dropping"


def _gshard(config: "MoeConfig", logits_GME: jax.Array, situation: Situation) -> Routing:
    return gshard(
        logits_GME,
        policy=config.second_expert_policy,
        threshold=config.second_expert_threshold,
        renormalize=_before(config, default=True),
        rng=situation.rng,
    )


def _loss_free(config: "MoeConfig", logits_GME: jax.Array, situation: Situation) -> Routing:
    assert situation.bias_E is not None
    return loss_free(
        logits_GME,
        situation.bias_E,
        config.top_k,
        score=config.score,
        renormalize=_before(config, default=config.top_k > 1),
    )


def _hash(config: "MoeConfig", logits_GME: jax.Array, situation: Situation) -> Routing:
    assert situation.tokens.ids is not None
    return hash_ids(
        situation.tokens.ids,
        config.num_experts,
        vocab_size=situation.vocab_size,
        kind=config.hash,
        dtype=logits_GME.dtype,
    )


def _sentence(config: "MoeConfig", logits_GME: jax.Array, situation: Situation) -> Routing:
    assert situation.tokens.sequence is not None
    return sentence(
        logits_GME,
        situation.tokens.sequence,
        situation.tokens.mask,
        config.top_k,
        renormalize=_before(config),
    )


def _no_token_left_behind(
    config: "MoeConfig", logits_GME: jax.Array, situation: Situation
) -> Routing:
    return no_token_left_behind(
        logits_GME, situation.tokens.mask, situation.capacity, passes=config.passes
    )


def _sinkhorn(config: "MoeConfig", logits_GME: jax.Array, situation: Situation) -> Routing:
    return sinkhorn(
        logits_GME,
        situation.tokens.mask,
        train=situation.train,
        iterations=config.sinkhorn_iterations,
    )


_CHOICES = ("top_k", "renormalize", "exploration", "straight_through")

ROUTERS: dict[str, Scheme] = {
    "switch": Scheme(_top_k, fields=("exploration", "straight_through"), top_k=1),
    "top_k": Scheme(_top_k, fields=_CHOICES),
    "gshard": Scheme(
        _gshard,
        fields=("renormalize", "second_expert_policy", "second_expert_threshold"),
        top_k=2,
    ),
    "cosine": Scheme(_top_k, gate="cosine", fields=(*_CHOICES, "cosine_dim")),
    "loss_free": Scheme(_loss_free, fields=("top_k", "renormalize", "score", "bias_update_rate")),
    "hash": Scheme(_hash, gate=None, fields=("hash",), needs="ids", top_k=1),
    "task": Scheme(_top_k, gate="task", fields=(*_CHOICES, "num_tasks"), needs="task_ids"),
    "sentence": Scheme(_sentence, causal=False, fields=("top_k", "renormalize")),
    "no_token_left_behind": Scheme(
        _no_token_left_behind, causal=False, fields=("passes",), top_k=1, capacity="finite"
    ),
    "sinkhorn": Scheme(_sinkhorn, causal=False, fields=("sinkhorn_iterations",), top_k=1),
    "base": Scheme(
        lambda config, logits_GME, situation: base(
            logits_GME, situation.tokens.mask, train=situation.train
        ),
        causal=False,
        top_k=1,
    ),
    "expert_choice": Scheme(
        lambda config, logits_GME, situation: expert_choice(
            logits_GME, situation.tokens.mask, situation.capacity
        ),
        causal=False,
        top_k=1,
        capacity="finite",
    ),
    "soft_moe": Scheme(
        lambda config, logits_GMS, situation: soft_moe(
            logits_GMS, situation.tokens.mask, config.num_experts
        ),
        gate="soft",
        causal=False,
        top_k=1,
        capacity="absolute",
    ),
}
