"""Scoring: the log-likelihood of given targets."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from switchx.inference.config import PAD_ID
from switchx.inference.decoder import dropless
from switchx.models.config import ModelConfig
from switchx.models.t5 import T5, output_head
from switchx.sharding import constrain
from switchx.training.losses import AUTOMATIC_CHUNK_ELEMENTS


class Scores(NamedTuple):
    """What a model gives each row's targets.

    Attributes:
      log_likelihood: [B] sum of the log-probabilities of the target tokens, natural logarithm.
      num_tokens: [B] target tokens, end-of-sequence included.
      is_greedy: [B] whether each of them is the most probable token after those before it.
    """

    log_likelihood: Any
    num_tokens: Any
    is_greedy: Any


@functools.partial(jax.jit, static_argnames=("config",))
def score(
    config: ModelConfig,
    params: Any,
    encoder_tokens: Int[Array, "B S"],
    target_tokens: Int[Array, "B T"],
    *,
    encoder_task_ids: Int[Array, "B S"] | None = None,
) -> Scores:
    """log p(targets | inputs) of every row by itself.

    Padding (token 0) may follow inputs and targets, and a row may be nothing else. Routing drops
    nothing, so that a row's score depends neither on its batch mates nor on padding. A row's task
    is that of its first token.

    Returns:
      Scores, float32 at least; a row without targets has log-likelihood 0.
    """
    batch, length = target_tokens.shape
    decoder_task_ids = None
    if encoder_task_ids is not None:
        decoder_task_ids = jnp.broadcast_to(encoder_task_ids[:, :1], (batch, length))
    is_target_BT = target_tokens != PAD_ID
    output: Any = T5(dropless(config)).apply(
        {"params": params},
        encoder_tokens,
        jnp.pad(target_tokens[:, :-1], ((0, 0), (1, 0)), constant_values=PAD_ID),
        encoder_mask=encoder_tokens != PAD_ID,
        decoder_mask=is_target_BT,
        encoder_task_ids=encoder_task_ids,
        decoder_task_ids=decoder_task_ids,
        method="features",
    )
    head_VD = output_head(params).astype(output.decoded.dtype)
    dtype = jnp.promote_types(output.decoded.dtype, jnp.float32)

    def at_position(column: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        state_BD, target_B = column
        logits_BV = jnp.einsum("bd,vd->bv", state_BD, head_VD, preferred_element_type=dtype)
        chosen_B = jnp.take_along_axis(logits_BV, target_B[:, None], axis=1)[:, 0]
        log_probability_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=1)
        return log_probability_B, jnp.argmax(logits_BV, axis=1) == target_B

    # A few positions at a time: the logits of all of them may not fit.
    positions = max(1, AUTOMATIC_CHUNK_ELEMENTS // (batch * head_VD.shape[0]))
    columns = jnp.swapaxes(output.decoded, 0, 1), target_tokens.T
    log_probability_TB, is_best_TB = jax.lax.map(at_position, columns, batch_size=positions)
    scores = Scores(
        jnp.sum(log_probability_TB.T, axis=1, where=is_target_BT),
        jnp.sum(is_target_BT, axis=1, dtype=jnp.int32),
        jnp.all(is_best_TB.T, axis=1, where=is_target_BT),
    )
    return jax.tree.map(lambda each_B: constrain(each_B, None), scores)  # for every process
