"""Greedy search and sampling: a sequence grows by one token a step, whatever the others do."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from switchx.inference import processors
from switchx.inference.config import DecodingConfig
from switchx.inference.decoder import Decoder
from switchx.models.cache import Cache


class Sampled(NamedTuple):
    """Sequences under way.

    Attributes:
      tokens_NT: from the start token on; the first `length` are there, and padding after the end.
      length: [] tokens of every sequence, the start token included.
      done_N: whether a sequence has ended.
      scores_N: log-probability of the tokens chosen, as what they were chosen from has it.
      keys_N: of random draws; None in greedy search.
      cache: of all tokens but the last.
    """

    tokens_NT: Int[Array, "N T"]
    length: Int[Array, ""]
    done_N: Bool[Array, " N"]
    scores_N: Float[Array, " N"]
    keys_N: jax.Array | None
    cache: Cache


def start(decoder: Decoder, prompt_NP: Int[Array, "N P"], keys_N: jax.Array | None) -> Sampled:
    """The prompt, which begins with the start token, and the first token after it."""
    rows, prompt_length = prompt_NP.shape
    config = decoder.decoding
    room = config.max_new_tokens
    logits_NV, cache = decoder.start(prompt_NP, prompt_length + room - 1)
    state = Sampled(
        tokens_NT=jnp.pad(prompt_NP, ((0, 0), (0, room)), constant_values=config.pad_token_id),
        length=jnp.int32(prompt_length),
        done_N=jnp.zeros(rows, bool),
        scores_N=jnp.zeros(rows, logits_NV.dtype),
        keys_N=keys_N,
        cache=cache,
    )
    return _choose(decoder, state, logits_NV, prompt_length)


def step(decoder: Decoder, state: Sampled, prompt_length: int) -> Sampled:
    """One more token of every sequence that has not ended."""
    last_N1 = jax.lax.dynamic_slice_in_dim(state.tokens_NT, state.length - 1, 1, axis=1)
    logits_NV, cache = decoder.extend(last_N1[:, 0], state.cache, ~state.done_N)
    return _choose(decoder, state._replace(cache=cache), logits_NV, prompt_length)


def unfinished(state: Sampled) -> Bool[Array, ""]:
    """Whether there is a step to take."""
    return (state.length < state.tokens_NT.shape[1]) & ~jnp.all(state.done_N)


def _choose(decoder: Decoder, state: Sampled, logits_NV: jax.Array, prompt_length: int) -> Sampled:
    config = decoder.decoding
    logits_NV = decoder.process(logits_NV, state.tokens_NT, state.length, prompt_length)
    if state.keys_N is None:
        next_N = _largest(logits_NV)
    else:
        logits_NV = cut_off(logits_NV, config)
        keys_N = jax.vmap(lambda key: jax.random.fold_in(key, state.length))(state.keys_N)
        next_N = jax.vmap(jax.random.categorical)(keys_N, logits_NV)
    chosen_N = jnp.take_along_axis(logits_NV, next_N[:, None], axis=-1)[:, 0]
    gained_N = chosen_N - jax.nn.logsumexp(logits_NV, axis=-1)
    next_N = jnp.where(state.done_N, config.pad_token_id, next_N).astype(jnp.int32)
    done_N = state.done_N
    if config.eos_token_id is not None:
        done_N |= next_N == config.eos_token_id
    return state._replace(
        tokens_NT=jax.lax.dynamic_update_slice(state.tokens_NT, next_N[:, None], (0, state.length)),
        length=state.length + 1,
        done_N=done_N,
        scores_N=state.scores_N + jnp.where(state.done_N, 0, gained_N),
    )


def _largest(logits_NV: jax.Array) -> jax.Array:
    """`argmax`, which XLA on CPU does in one slow pass, in two fast ones."""
    vocab_size = logits_NV.shape[-1]
    is_largest_NV = logits_NV == jnp.max(logits_NV, axis=-1, keepdims=True)
    place_NV = jnp.where(is_largest_NV, jnp.arange(vocab_size, dtype=jnp.int32)[None], vocab_size)
    # Of logits that are not numbers the last token.
    return jnp.minimum(jnp.min(place_NV, axis=-1), vocab_size - 1)


def cut_off(logits_NV: Float[Array, "N V"], config: DecodingConfig) -> Float[Array, "N V"]:
    """The logits that a token is drawn from."""
    x = logits_NV
    if config.temperature != 1:
        x = processors.temperature(x, config.temperature)
    if config.top_k is not None:
        x = processors.top_k(x, config.top_k)
    if config.top_p is not None and config.top_p < 1:
        x = processors.top_p(x, config.top_p)
    if config.min_p is not None:
        x = processors.min_p(x, config.min_p)
    if config.typical_p is not None and config.typical_p < 1:
        x = processors.typical_p(x, config.typical_p)
    if config.epsilon_cutoff is not None:
        x = processors.epsilon_cutoff(x, config.epsilon_cutoff)
    if config.eta_cutoff is not None:
        x = processors.eta_cutoff(x, config.eta_cutoff)
    return x
