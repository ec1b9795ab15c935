"""Decoding: target tokens out of a trained model, one step per token.

`generate` is one compiled program; `stream` gives the tokens as they are made.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from switchx.errors import UserError
from switchx.inference import beam_search, sampling
from switchx.inference.config import DecodingConfig
from switchx.inference.decoder import Decoder
from switchx.models.config import ModelConfig
from switchx.sharding import constrain


class Generated(NamedTuple):
    """What `generate` returns for each row, the best sequence first in beam search.

    Attributes:
      tokens: [B, R, max_new_tokens] int32, without start token and prompt; after
        end-of-sequence only padding.
      scores: [B, R] log-probability of the tokens; in beam search over length^length_penalty.
    """

    tokens: Int[Array, "B R T"]
    scores: Float[Array, "B R"]


@functools.partial(jax.jit, static_argnames=("config", "decoding"))
def generate(
    config: ModelConfig,
    params: Any,
    encoder_tokens: Int[Array, "B S"],
    decoding: DecodingConfig,
    *,
    encoder_task_ids: Int[Array, "B S"] | None = None,
    prompt: Int[Array, "B P"] | None = None,
    rng: jax.Array | None = None,
    row_ids: Int[Array, " B"] | None = None,
) -> Generated:
    """Decode every row, until all have ended or have `max_new_tokens` tokens.

    With `decoding.dropless` a row's result depends on nothing but the row: padding (token 0) of
    the inputs is masked, and no expert is ever full.

    Args:
      config, params: the model.
      encoder_tokens: inputs, padded with 0.
      decoding: how tokens are chosen.
      encoder_task_ids: the task of every token, for routing by task; a row's first counts.
      prompt: tokens that every result begins with, after the start token.
      rng: key, for sampling.
      row_ids: what a row's random draws depend on, besides `rng`; its number by default.
    """
    decoding.check_ids(config.vocab_size)
    decoder = Decoder(config, decoding, params, encoder_tokens, encoder_task_ids)
    prompt_NP = _prompt(decoder, prompt)
    length = prompt_NP.shape[1]
    if decoding.num_beams > 1:
        beams = jax.lax.while_loop(
            functools.partial(beam_search.unfinished, decoder),
            lambda state: beam_search.step(decoder, state, length),
            beam_search.start(decoder, prompt_NP),
        )
        tokens_BRT, scores_BR = beams.finished_BRT, beams.finished_scores_BR
    else:
        keys_N = _keys(decoder, rng, row_ids)
        sampled = jax.lax.while_loop(
            sampling.unfinished,
            lambda state: sampling.step(decoder, state, length),
            sampling.start(decoder, prompt_NP, keys_N),
        )
        rows = len(encoder_tokens), decoding.sequences
        tokens_BRT = sampled.tokens_NT.reshape(*rows, -1)
        scores_BR = sampled.scores_N.reshape(rows)
    wanted = decoding.num_return_sequences
    # Every process reads all of them.
    return Generated(
        constrain(tokens_BRT[:, :wanted, length:], None, None, None),
        constrain(scores_BR[:, :wanted], None, None),
    )


def stream(
    config: ModelConfig,
    params: Any,
    encoder_tokens: Int[Array, "B S"],
    decoding: DecodingConfig,
    **inputs: Any,
) -> Iterator[Int[np.ndarray, "B R"]]:
    """The tokens that `generate` gives, step by step as they are made, padding where one ended.

    Raises:
      UserError: beam search, which may change its mind.
    """
    if decoding.num_beams > 1:
        raise UserError("DecodingConfig.num_beams: only without beams can tokens be streamed")
    state, length = _start(config, params, encoder_tokens, decoding, **inputs)
    while True:
        tokens_N = jax.device_get(state.tokens_NT[:, int(state.length) - 1])
        yield tokens_N.reshape(len(encoder_tokens), -1)
        if not sampling.unfinished(state):
            return
        task_ids = inputs.get("encoder_task_ids")
        state = _step(config, params, encoder_tokens, decoding, state, int(length), task_ids)


@functools.partial(jax.jit, static_argnames=("config", "decoding"))
def _start(config, params, encoder_tokens, decoding, **inputs):
    decoding.check_ids(config.vocab_size)
    decoder = Decoder(config, decoding, params, encoder_tokens, inputs.get("encoder_task_ids"))
    prompt_NP = _prompt(decoder, inputs.get("prompt"))
    keys_N = _keys(decoder, inputs.get("rng"), inputs.get("row_ids"))
    return sampling.start(decoder, prompt_NP, keys_N), prompt_NP.shape[1]


@functools.partial(
    jax.jit, static_argnames=("config", "decoding", "prompt_length"), donate_argnames="state"
)
def _step(config, params, encoder_tokens, decoding, state, prompt_length, task_ids):
    decoder = Decoder(config, decoding, params, encoder_tokens, task_ids)
    return sampling.step(decoder, state, prompt_length)


def _prompt(decoder: Decoder, prompt: jax.Array | None) -> jax.Array:
    """The start token and the prompt, of every sequence."""
    start = decoder.decoding.decoder_start_token_id
    prompt_NP = jnp.full((decoder.num_sequences, 1), start, jnp.int32)
    if prompt is None:
        return prompt_NP
    given_NP = jnp.repeat(jnp.asarray(prompt, jnp.int32), decoder.decoding.sequences, axis=0)
    return jnp.concatenate([prompt_NP, given_NP], axis=1)


def _keys(decoder: Decoder, rng: jax.Array | None, row_ids: jax.Array | None) -> jax.Array | None:
    """A key of its own for each sequence, that does not depend on the other rows."""
    if not decoder.decoding.do_sample:
        return None
    if rng is None:
        raise UserError(
            "DecodingConfig.do_sample needs a key: generate(..., rng=jax.random.key(0))"
        )
    rows = jnp.arange(len(decoder.encoder_tokens_BS)) if row_ids is None else row_ids
    of_row = jax.vmap(lambda row: jax.random.fold_in(rng, row))(rows)
    number = jnp.arange(decoder.decoding.sequences)
    keys_BR = jax.vmap(lambda key: jax.vmap(lambda n: jax.random.fold_in(key, n))(number))(of_row)
    return keys_BR.reshape(-1)
