"""What may change the next token's logits before one is chosen, each a function of its own.

Definitions are those of Hugging Face's `LogitsProcessor`s of the same names, which
tests/inference/test_processors.py holds against their outputs. A token that may not come has logit
-inf. `tokens_NT` are the decoder's tokens from the start token on, of which the first `length` are
there.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Logits = Float[Array, "N V"]


def temperature(logits_NV: Logits, value: float) -> Logits:
    """Flatter above 1, sharper below."""
    return logits_NV / value


def top_k(logits_NV: Logits, k: int) -> Logits:
    """The k most probable tokens, and those as probable as the last of them."""
    k = min(k, logits_NV.shape[-1])
    least_N1 = jax.lax.top_k(logits_NV, k)[0][:, -1:]
    return jnp.where(logits_NV < least_N1, -jnp.inf, logits_NV)


def top_p(logits_NV: Logits, p: float, min_tokens: int = 1) -> Logits:
    """The most probable tokens that together reach p; nucleus sampling, arXiv:1904.09751 §3.1."""
    order_NV = jnp.argsort(logits_NV, axis=-1)
    sorted_NV = jnp.take_along_axis(logits_NV, order_NV, axis=-1)
    removed_NV = jnp.cumsum(jax.nn.softmax(sorted_NV, axis=-1), axis=-1) <= 1 - p
    return _remove_sorted(logits_NV, order_NV, removed_NV.at[:, -min_tokens:].set(False))


def min_p(logits_NV: Logits, p: float, min_tokens: int = 1) -> Logits:
    """Tokens at least p times as probable as the most probable one; arXiv:2407.01082 §3."""
    probs_NV = jax.nn.softmax(logits_NV, axis=-1)
    removed_NV = probs_NV < p * jnp.max(probs_NV, axis=-1, keepdims=True)
    return _remove(logits_NV, removed_NV, min_tokens)


def typical_p(logits_NV: Logits, mass: float, min_tokens: int = 1) -> Logits:
    """Tokens whose surprise is nearest its expectation, reaching `mass`; arXiv:2202.00666 §4."""
    log_probs_NV = jax.nn.log_softmax(logits_NV, axis=-1)
    distance_NV = jnp.abs(-log_probs_NV - _entropy(log_probs_NV))
    order_NV = jnp.argsort(distance_NV, axis=-1)
    sorted_NV = jnp.take_along_axis(logits_NV, order_NV, axis=-1)
    reached_NV = jnp.cumsum(jax.nn.softmax(sorted_NV, axis=-1), axis=-1)
    last_N1 = jnp.sum(reached_NV < mass, axis=-1, keepdims=True)
    last_N1 = jnp.minimum(last_N1, logits_NV.shape[-1] - 1)
    sorted_NV = jnp.take_along_axis(distance_NV, order_NV, axis=-1)
    removed_NV = sorted_NV > jnp.take_along_axis(sorted_NV, last_N1, axis=-1)
    return _remove_sorted(logits_NV, order_NV, removed_NV.at[:, :min_tokens].set(False))


def epsilon_cutoff(logits_NV: Logits, epsilon: float, min_tokens: int = 1) -> Logits:
    """Tokens of probability epsilon and more; arXiv:2210.15191 §3."""
    return _remove(logits_NV, jax.nn.softmax(logits_NV, axis=-1) < epsilon, min_tokens)


def eta_cutoff(logits_NV: Logits, epsilon: float, min_tokens: int = 1) -> Logits:
    """As `epsilon_cutoff`, with a threshold that falls with the entropy; arXiv:2210.15191 §3."""
    log_probs_NV = jax.nn.log_softmax(logits_NV, axis=-1)
    eta_N1 = jnp.minimum(epsilon, epsilon**0.5 * jnp.exp(-_entropy(log_probs_NV)))
    return _remove(logits_NV, jnp.exp(log_probs_NV) < eta_N1, min_tokens)


def repetition_penalty(
    logits_NV: Logits, tokens_NT: Int[Array, "N T"], length: Int[Array, ""] | int, penalty: float
) -> Logits:
    """Logits of tokens that were there: divided by the penalty, or times it if negative.

    CTRL, arXiv:1909.05858 §4.1, whose divisor would make negative logits more probable.
    """
    return jnp.where(
        _present(tokens_NT, length, logits_NV.shape[-1]), _shrink(logits_NV, penalty), logits_NV
    )


def encoder_repetition_penalty(
    logits_NV: Logits, encoder_tokens_NS: Int[Array, "N S"], penalty: float
) -> Logits:
    """Logits of tokens of the input, the other way round: a penalty on what is not in it."""
    present_NV = _present(encoder_tokens_NS, encoder_tokens_NS.shape[1], logits_NV.shape[-1])
    return jnp.where(present_NV, _shrink(logits_NV, 1 / penalty), logits_NV)


def no_repeat_ngram(
    logits_NV: Logits, tokens_NT: Int[Array, "N T"], length: Int[Array, ""] | int, size: int
) -> Logits:
    """No n-gram of this size twice."""
    return _ban_ngrams(logits_NV, tokens_NT, length, tokens_NT, length, size)


def encoder_no_repeat_ngram(
    logits_NV: Logits,
    tokens_NT: Int[Array, "N T"],
    length: Int[Array, ""] | int,
    encoder_tokens_NS: Int[Array, "N S"],
    size: int,
) -> Logits:
    """No n-gram of this size that is in the input."""
    source_length = encoder_tokens_NS.shape[1]
    return _ban_ngrams(logits_NV, tokens_NT, length, encoder_tokens_NS, source_length, size)


def bad_words(
    logits_NV: Logits,
    tokens_NT: Int[Array, "N T"],
    length: Int[Array, ""] | int,
    sequences: Sequence[Sequence[int]],
) -> Logits:
    """None of these sequences of tokens."""
    for *before, last in sequences:
        end_N = _ends_with(tokens_NT, length, before)
        logits_NV = logits_NV.at[:, last].set(jnp.where(end_N, -jnp.inf, logits_NV[:, last]))
    return logits_NV


def min_length(
    logits_NV: Logits, length: Int[Array, ""] | int, minimum: int, eos_id: int
) -> Logits:
    """No end-of-sequence while fewer than `minimum` tokens are there."""
    ended_N = jnp.where(jnp.asarray(length) < minimum, -jnp.inf, logits_NV[:, eos_id])
    return logits_NV.at[:, eos_id].set(ended_N)


def forced_token(
    logits_NV: Logits, length: Int[Array, ""] | int, position: int, token: int
) -> Logits:
    """This token, where `position` tokens are there."""
    only_V = jnp.full(logits_NV.shape[-1:], -jnp.inf, logits_NV.dtype).at[token].set(0)
    return jnp.where(jnp.asarray(length) == position, only_V[None], logits_NV)


def exponential_decay(
    logits_NV: Logits, length: Int[Array, ""] | int, start: int, factor: float, eos_id: int
) -> Logits:
    """End-of-sequence, likelier with each token after the first `start`: + |x| (factor^n - 1)."""
    excess = jnp.maximum(jnp.asarray(length) - start, 0).astype(logits_NV.dtype)
    end_N = logits_NV[:, eos_id]
    return logits_NV.at[:, eos_id].add(jnp.abs(end_N) * jnp.expm1(excess * math.log(factor)))


def suppress(logits_NV: Logits, tokens: Sequence[int]) -> Logits:
    """None of these tokens."""
    return logits_NV.at[:, jnp.asarray(tokens)].set(-jnp.inf)


def _entropy(log_probs_NV: jax.Array) -> jax.Array:
    terms_NV = jnp.where(jnp.isneginf(log_probs_NV), 0, jnp.exp(log_probs_NV) * log_probs_NV)
    return -jnp.sum(terms_NV, axis=-1, keepdims=True)


def _shrink(logits_NV: jax.Array, penalty: float) -> jax.Array:
    return jnp.where(logits_NV < 0, logits_NV * penalty, logits_NV / penalty)


def _remove(logits_NV: jax.Array, removed_NV: jax.Array, min_tokens: int) -> jax.Array:
    least_N1 = jax.lax.top_k(logits_NV, min_tokens)[0][:, -1:]
    return jnp.where(removed_NV & (logits_NV < least_N1), -jnp.inf, logits_NV)


def _remove_sorted(logits_NV: jax.Array, order_NV: jax.Array, removed_NV: jax.Array) -> jax.Array:
    rows_N1 = jnp.arange(len(logits_NV))[:, None]
    return jnp.where(
        jnp.zeros(logits_NV.shape, bool).at[rows_N1, order_NV].set(removed_NV), -jnp.inf, logits_NV
    )


def _present(tokens_NT: jax.Array, length: jax.Array | int, vocab_size: int) -> Bool[Array, "N V"]:
    # Places that are not filled yet are put outside of the vocabulary, where nothing is set.
    there_1T = (jnp.arange(tokens_NT.shape[1]) < length)[None]
    tokens_NT = jnp.where(there_1T, tokens_NT, vocab_size)
    present_NV = jnp.zeros((len(tokens_NT), vocab_size), bool)
    return present_NV.at[jnp.arange(len(tokens_NT))[:, None], tokens_NT].set(True, mode="drop")


def _ends_with(
    tokens_NT: jax.Array, length: jax.Array | int, end: Sequence[int]
) -> Bool[Array, " N"]:
    """Whether the tokens that are there end with these, and are more than these."""
    if len(end) >= tokens_NT.shape[1]:
        return jnp.zeros(len(tokens_NT), bool)
    start = jnp.asarray(length) - len(end)
    last_NE = jax.lax.dynamic_slice_in_dim(tokens_NT, start, len(end), axis=1)
    return (start > 0) & jnp.all(last_NE == jnp.asarray(end, jnp.int32)[None], axis=1)


def _ban_ngrams(
    logits_NV: jax.Array,
    tokens_NT: jax.Array,
    length: jax.Array | int,
    source_NS: jax.Array,
    source_length: jax.Array | int,
    size: int,
) -> jax.Array:
    """No token that would end an n-gram of the source."""
    places = source_NS.shape[1] - size + 1
    if places < 1 or tokens_NT.shape[1] < size - 1:
        return logits_NV
    start = jnp.asarray(length) - (size - 1)
    prefix_NE = jax.lax.dynamic_slice_in_dim(tokens_NT, start, size - 1, axis=1)
    # A match at place i: the source's tokens i .. i + n - 2 are the decoder's last n - 1.
    match_NI = jnp.arange(places)[None] + size <= source_length
    match_NI = jnp.broadcast_to(match_NI & (start >= 0), (len(source_NS), places))
    for offset in range(size - 1):
        match_NI &= source_NS[:, offset : offset + places] == prefix_NE[:, offset, None]
    banned_NI = jnp.where(match_NI, source_NS[:, size - 1 :], logits_NV.shape[-1])
    rows_N1 = jnp.arange(len(source_NS))[:, None]
    return logits_NV.at[rows_N1, banned_NI].set(-jnp.inf, mode="drop")
