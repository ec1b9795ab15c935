"""Decoding: target tokens out of a trained model."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from switchx.models.config import ModelConfig
from switchx.models.t5 import T5, output_head
from switchx.moe.config import MoeConfig
from switchx.moe.routing import ROUTERS
from switchx.sharding import constrain

PAD_ID = 0
EOS_ID = 1


def dropless(config: ModelConfig) -> ModelConfig:
    """The same model with room for any routing, so that no row depends on its batch mates.

    Experts that choose keep their capacity, and mixtures their slots, within each row.
    """

    def alone(moe: MoeConfig | None) -> MoeConfig | None:
        if moe is None:
            return None
        if ROUTERS[moe.router].capacity != "any":
            return dataclasses.replace(moe, group_size="row")
        room: dict[str, Any] = {"eval_capacity_factor": None, "expert_capacity": None}
        return dataclasses.replace(moe, group_size="row", **room)

    return dataclasses.replace(config, moe=alone(config.moe), decoder_moe=alone(config.decoder_moe))


@functools.partial(jax.jit, static_argnames=("config", "max_length"))
def greedy(
    config: ModelConfig,
    params: Any,
    encoder_tokens: Int[Array, "B S"],
    *,
    encoder_task_ids: Int[Array, "B S"] | None = None,
    max_length: int,
) -> Int[Array, "B T"]:
    """The most probable token at every step, until end-of-sequence or `max_length` tokens.

    The decoder runs over the whole prefix at each step: simple, and exactly the teacher-forced
    model. Routing drops nothing, and padding (token 0) of the inputs is masked, so a row's
    result does not depend on the rest of the batch. A row's task is that of its first token.

    Returns:
      Tokens [B, max_length], int32: after end-of-sequence only padding.
    """
    model = T5(dropless(config))
    variables = {"params": params}
    encoder_mask = encoder_tokens != PAD_ID
    encoded = model.apply(
        variables,
        encoder_tokens,
        encoder_mask=encoder_mask,
        encoder_task_ids=encoder_task_ids,
        method="encode",
    )
    batch = encoder_tokens.shape[0]
    decoder_task_ids = None
    if encoder_task_ids is not None:
        decoder_task_ids = jnp.broadcast_to(encoder_task_ids[:, :1], (batch, max_length))
    head_VD = output_head(params)

    def unfinished(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        position, _, done_B = carry
        return (position < max_length) & ~jnp.all(done_B)

    def append(
        carry: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        position, tokens_BT, done_B = carry
        # Later positions hold padding, which a causal decoder cannot see.
        decoded_BTD, _ = model.apply(
            variables,
            tokens_BT[:, :-1],
            encoded,
            encoder_mask=encoder_mask,
            decoder_task_ids=decoder_task_ids,
            method="decode",
        )
        state_BD = jax.lax.dynamic_index_in_dim(decoded_BTD, position, axis=1, keepdims=False)
        logits_BV = state_BD @ head_VD.astype(state_BD.dtype).T
        next_B = jnp.where(done_B, PAD_ID, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)
        tokens_BT = jax.lax.dynamic_update_index_in_dim(tokens_BT, next_B, position + 1, axis=1)
        return position + 1, tokens_BT, done_B | (next_B == EOS_ID)

    start = (
        jnp.int32(0),
        jnp.full((batch, max_length + 1), PAD_ID, jnp.int32),
        jnp.zeros((batch,), bool),
    )
    _, tokens_BT, _ = jax.lax.while_loop(unfinished, append, start)
    return constrain(tokens_BT[:, 1:], None, None)  # every process reads all of them
