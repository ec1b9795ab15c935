"""Beam search: the best few sequences of each row, extended and compared.

Candidates are the 2R best extensions of a row's R open sequences; those among the first R that end
are finished, and the R best others stay open. A finished sequence's score is its log-probability
over length^length_penalty. Rules, order and limits are those of Hugging Face's `generate`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from switchx.inference.config import DecodingConfig
from switchx.inference.decoder import Decoder
from switchx.models.cache import Cache

# What no sequence can score: stands for "there is none".
_NONE = -1e9


class Beams(NamedTuple):
    """Sequences under way, best first.

    Attributes:
      tokens_BRT: open sequences, from the start token on; the first `length` are there.
      length: [] tokens of every open sequence, the start token included.
      scores_BR: log-probabilities of open sequences.
      finished_BRT, finished_scores_BR, is_finished_BR: sequences that ended.
      hopeful_B: whether an open sequence may still beat a finished one.
      open: [] whether any candidate of the last step did not end.
      cache: of all tokens but the last.
    """

    tokens_BRT: Int[Array, "B R T"]
    length: Int[Array, ""]
    scores_BR: Float[Array, "B R"]
    finished_BRT: Int[Array, "B R T"]
    finished_scores_BR: Float[Array, "B R"]
    is_finished_BR: Bool[Array, "B R"]
    hopeful_B: Bool[Array, " B"]
    open: Bool[Array, ""]
    cache: Cache


def start(decoder: Decoder, prompt_NP: Int[Array, "N P"]) -> Beams:
    """The prompt, which begins with the start token, and the first token after it."""
    config = decoder.decoding
    batch, beams, prompt_length = (
        len(decoder.encoder_tokens_BS),
        config.num_beams,
        prompt_NP.shape[1],
    )
    logits_NV, cache = decoder.start(prompt_NP, prompt_length + config.max_new_tokens - 1)
    tokens_NT = jnp.pad(
        prompt_NP, ((0, 0), (0, config.max_new_tokens)), constant_values=config.pad_token_id
    )
    tokens_BRT = tokens_NT.reshape(batch, beams, -1)
    none_BR = jnp.full((batch, beams), _NONE, logits_NV.dtype)
    state = Beams(
        tokens_BRT=tokens_BRT,
        length=jnp.int32(prompt_length),
        # The sequences of a row are still one and the same: only the first counts.
        scores_BR=none_BR.at[:, 0].set(0),
        finished_BRT=tokens_BRT,
        finished_scores_BR=none_BR,
        is_finished_BR=jnp.zeros((batch, beams), bool),
        hopeful_B=jnp.ones(batch, bool),
        open=jnp.bool_(True),
        cache=cache,
    )
    return _choose(decoder, state, logits_NV, prompt_length)


def step(decoder: Decoder, state: Beams, prompt_length: int) -> Beams:
    """One more token of every open sequence."""
    last_BR = jax.lax.dynamic_index_in_dim(
        state.tokens_BRT, state.length - 1, axis=2, keepdims=False
    )
    wanted_BR = jnp.broadcast_to(state.hopeful_B[:, None], last_BR.shape)
    logits_NV, cache = decoder.extend(last_BR.reshape(-1), state.cache, wanted_BR.reshape(-1))
    return _choose(decoder, state._replace(cache=cache), logits_NV, prompt_length)


def unfinished(decoder: Decoder, state: Beams) -> Bool[Array, ""]:
    """Whether there is a step to take."""
    more = jnp.any(state.hopeful_B) & state.open
    if decoder.decoding.early_stopping is True:
        more &= ~jnp.all(state.is_finished_BR)
    return more & (state.length < state.tokens_BRT.shape[2])


def _choose(decoder: Decoder, state: Beams, logits_NV: jax.Array, prompt_length: int) -> Beams:
    config = decoder.decoding
    batch, beams, room = state.tokens_BRT.shape
    log_probs_NV = jax.nn.log_softmax(logits_NV, axis=-1)
    log_probs_NV = decoder.process(
        log_probs_NV, state.tokens_BRT.reshape(-1, room), state.length, prompt_length
    )
    vocab_size = logits_NV.shape[-1]
    total_BRV = log_probs_NV.reshape(batch, beams, -1) + state.scores_BR[..., None]
    # Q = 2R candidates: enough that R stay open however many end.
    scores_BQ, place_BQ = jax.lax.top_k(total_BRV.reshape(batch, -1), 2 * beams)
    beam_BQ, token_BQ = place_BQ // vocab_size, (place_BQ % vocab_size).astype(jnp.int32)
    tokens_BQT = _rows(state.tokens_BRT, beam_BQ)
    tokens_BQT = jax.lax.dynamic_update_slice(tokens_BQT, token_BQ[..., None], (0, 0, state.length))
    length = state.length + 1
    ends_BQ = jnp.broadcast_to(length == room, token_BQ.shape)
    if config.eos_token_id is not None:
        ends_BQ |= token_BQ == config.eos_token_id

    open_BQ = scores_BQ + jnp.where(ends_BQ, jnp.asarray(_NONE, scores_BQ.dtype), 0)
    scores_BR, kept_BR = jax.lax.top_k(open_BQ, beams)
    first_N1 = jnp.arange(batch)[:, None] * beams
    sequence_N = (first_N1 + jnp.take_along_axis(beam_BQ, kept_BR, axis=1)).reshape(-1)

    finished = _finish(config, state, scores_BQ, tokens_BQT, ends_BQ, length - prompt_length)
    finished_BRT, finished_scores_BR, is_finished_BR = finished
    best_length = length - prompt_length
    if config.early_stopping == "never" and config.length_penalty > 0:
        best_length = config.max_new_tokens
    best_B = scores_BR[:, 0] / best_length**config.length_penalty
    worst_BR = jnp.where(is_finished_BR, jnp.min(finished_scores_BR, axis=1, keepdims=True), _NONE)
    return state._replace(
        tokens_BRT=_rows(tokens_BQT, kept_BR),
        length=length,
        scores_BR=scores_BR,
        finished_BRT=finished_BRT,
        finished_scores_BR=finished_scores_BR,
        is_finished_BR=is_finished_BR,
        hopeful_B=state.hopeful_B & jnp.any(best_B[:, None] > worst_BR, axis=1),
        open=~jnp.all(ends_BQ),
        cache=state.cache.select(sequence_N),
    )


def _finish(
    config: DecodingConfig,
    state: Beams,
    scores_BQ: jax.Array,
    tokens_BQT: jax.Array,
    ends_BQ: jax.Array,
    length: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best finished sequences after a step: tokens, scores, and which there are."""
    beams = config.num_beams
    ended_BQ = ends_BQ & (jnp.arange(2 * beams) < beams)[None]
    allowed_B1 = state.hopeful_B[:, None]
    if config.early_stopping is True:
        allowed_B1 &= ~jnp.all(state.is_finished_BR, axis=1, keepdims=True)
    # Added up, not chosen between: the scores of sequences that do not count keep their order.
    scores_BQ = scores_BQ / length**config.length_penalty
    scores_BQ += jnp.where(ended_BQ, 0, _NONE) + jnp.where(allowed_B1, 0, _NONE)
    tokens = jnp.concatenate([state.finished_BRT, tokens_BQT], axis=1)
    scores = jnp.concatenate([state.finished_scores_BR, scores_BQ], axis=1)
    ended = jnp.concatenate([state.is_finished_BR, ended_BQ], axis=1)
    scores_BR, kept_BR = jax.lax.top_k(scores, beams)
    return _rows(tokens, kept_BR), scores_BR, jnp.take_along_axis(ended, kept_BR, axis=1)


def _rows(tokens_BQT: jax.Array, kept_BR: jax.Array) -> jax.Array:
    return jnp.take_along_axis(tokens_BQT, kept_BR[..., None], axis=1)
