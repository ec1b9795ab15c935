"""A model as searches see it: logits of the next token, and the cache that they come from."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from switchx.inference import processors
from switchx.inference.config import PAD_ID, DecodingConfig
from switchx.models.cache import Cache
from switchx.models.config import ModelConfig
from switchx.models.t5 import T5
from switchx.moe.config import MoeConfig
from switchx.moe.routing import ROUTERS


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


class Decoder(NamedTuple):
    """Parameters and inputs that stay the same while a batch is decoded.

    N sequences are decoded, `decoding.sequences` of each row one after the other. A row's task is
    that of its first token.
    """

    config: ModelConfig
    decoding: DecodingConfig
    params: Any
    encoder_tokens_BS: Int[Array, "B S"]
    encoder_task_ids_BS: Int[Array, "B S"] | None = None

    @property
    def num_sequences(self) -> int:
        """N."""
        return len(self.encoder_tokens_BS) * self.decoding.sequences

    def start(self, tokens_NT: Int[Array, "N T"], room: int) -> tuple[Float[Array, "N V"], Cache]:
        """Logits after the first tokens, and a cache for `room` tokens with these in it."""
        encoder_mask = self.encoder_tokens_BS != PAD_ID
        encoded_BSD = self._apply(
            "encode",
            self.encoder_tokens_BS,
            encoder_mask=encoder_mask,
            encoder_task_ids=self.encoder_task_ids_BS,
        )
        decoded_NTD, cache = self._apply(
            "start",
            tokens_NT,
            encoded_BSD,
            encoder_mask=encoder_mask,
            length=room,
            task_ids=self._task_ids(tokens_NT),
        )
        return self._apply("logits", decoded_NTD[:, -1:])[:, 0], cache

    def extend(
        self, tokens_N: Int[Array, " N"], cache: Cache, wanted_N: jax.Array
    ) -> tuple[Float[Array, "N V"], Cache]:
        """Logits after one more token of each sequence; undefined where they are not wanted."""
        tokens_N1 = tokens_N[:, None]
        decoded_N1D, cache = self._apply(
            "extend",
            tokens_N1,
            cache,
            encoder_mask=self.encoder_tokens_BS != PAD_ID,
            decoder_mask=wanted_N[:, None],
            task_ids=self._task_ids(tokens_N1),
        )
        return self._apply("logits", decoded_N1D)[:, 0], cache

    def process(
        self,
        scores_NV: Float[Array, "N V"],
        tokens_NT: Int[Array, "N T"],
        length: Int[Array, ""] | int,
        prompt_length: int,
    ) -> Float[Array, "N V"]:
        """Scores of next tokens after all processors that are no sampling, in Hugging Face's order.

        Args:
          scores_NV: logits, or log-probabilities in beam search.
          tokens_NT: the decoder's tokens from the start token on, of which `length` are there.
          length: see `tokens_NT`.
          prompt_length: tokens that were given, the start token included.
        """
        config, x = self.decoding, scores_NV
        source_NS = jnp.repeat(self.encoder_tokens_BS, config.sequences, axis=0)
        if config.dropless:
            # Padding is no part of the input; Hugging Face counts it.
            source_NS = jnp.where(source_NS == PAD_ID, x.shape[-1], source_NS)
        if config.encoder_repetition_penalty is not None:
            x = processors.encoder_repetition_penalty(
                x, source_NS, config.encoder_repetition_penalty
            )
        if config.repetition_penalty is not None:
            x = processors.repetition_penalty(x, tokens_NT, length, config.repetition_penalty)
        if config.no_repeat_ngram_size is not None:
            x = processors.no_repeat_ngram(x, tokens_NT, length, config.no_repeat_ngram_size)
        if config.encoder_no_repeat_ngram_size is not None:
            x = processors.encoder_no_repeat_ngram(
                x, tokens_NT, length, source_NS, config.encoder_no_repeat_ngram_size
            )
        eos_id = config.eos_token_id
        words = [word for word in config.bad_words_ids if tuple(word) != (eos_id,)]
        x = processors.bad_words(x, tokens_NT, length, words)
        if config.min_new_tokens and eos_id is not None:
            x = processors.min_length(x, length, prompt_length + config.min_new_tokens, eos_id)
        if config.forced_bos_token_id is not None:
            x = processors.forced_token(x, length, prompt_length, config.forced_bos_token_id)
        if config.forced_eos_token_id is not None:
            last = prompt_length + config.max_new_tokens - 1
            x = processors.forced_token(x, length, last, config.forced_eos_token_id)
        if config.exponential_decay_length_penalty is not None and eos_id is not None:
            start, factor = config.exponential_decay_length_penalty
            x = processors.exponential_decay(x, length, prompt_length + int(start), factor, eos_id)
        if config.suppress_tokens:
            x = processors.suppress(x, config.suppress_tokens)
        if config.begin_suppress_tokens:
            # After a forced first token the second is the first to choose.
            forced = config.forced_bos_token_id is not None and prompt_length == 1
            first = jnp.asarray(length) == prompt_length + forced
            x = jnp.where(first, processors.suppress(x, config.begin_suppress_tokens), x)
        return x

    def _apply(self, method: str, *arguments: Any, **options: Any) -> Any:
        config = dropless(self.config) if self.decoding.dropless else self.config
        return T5(config).apply({"params": self.params}, *arguments, method=method, **options)

    def _task_ids(self, tokens_NT: jax.Array) -> jax.Array | None:
        if self.encoder_task_ids_BS is None:
            return None
        first_N1 = jnp.repeat(self.encoder_task_ids_BS[:, :1], self.decoding.sequences, axis=0)
        return jnp.broadcast_to(first_N1, tokens_NT.shape)
