"""The T5 encoder-decoder, dense or with Switch layers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from switchx.models.attention import Attention, attention_mask
from switchx.models.config import ModelConfig
from switchx.models.layers import (
    Mlp,
    OutputHead,
    RelativePositionBias,
    RMSNorm,
    TokenEmbedder,
    dropout,
)
from switchx.models.stacking import Segment, segments
from switchx.moe.assignment import RouterStats, Tokens
from switchx.moe.layer import MoeLayer
from switchx.sharding import constrain

Stats = tuple[RouterStats, ...]
Input = jax.Array | np.ndarray


@flax.struct.dataclass
class T5Output:
    """Everything a forward pass computes.

    Attributes:
      logits: [B, T, V] at least float32; None from `T5.features`.
      decoded: [B, T, D] input of the output head, already scaled where the config scales logits.
      encoded: [B, S, D] final encoder states.
      router: "encoder" and "decoder", each with the `RouterStats` of its sparse layers in order.
    """

    logits: Any
    decoded: Any
    encoded: Any
    router: dict[str, Stats]


class T5Layer(nn.Module):
    """One pre-norm layer: self-attention, cross-attention in a decoder, feed-forward."""

    config: ModelConfig
    sparse: bool
    train: bool
    capture_router: bool

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        tokens: Tokens,
        self_mask: Bool[Array, "B 1 _ T"],
        bias: Float[Array, "1 H T T"],
        encoded_BSD: Float[Array, "B S D"] | None = None,
        cross_mask: Bool[Array, "B 1 _ S"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Stats]:
        """The layer's output and, if it is sparse, what its router did."""
        config, train = self.config, self.train
        is_decoder = encoded_BSD is not None

        def norm(name: str) -> RMSNorm:
            return RMSNorm(config.layer_norm_epsilon, name=f"pre_{name}_layer_norm")

        x_BTD = constrain(x_BTD, "batch", None, None)
        name = "self_attention" if is_decoder else "attention"
        h_BTD = norm(name)(x_BTD)
        h_BTD = Attention(config, train, name=name)(h_BTD, h_BTD, self_mask, bias)
        x_BTD += dropout(config, train)(h_BTD)

        if encoded_BSD is not None and cross_mask is not None:
            h_BTD = norm("cross_attention")(x_BTD)
            attention = Attention(config, train, name="encoder_decoder_attention")
            x_BTD += dropout(config, train)(attention(h_BTD, encoded_BSD, cross_mask))

        h_BTD, stats = norm("mlp")(x_BTD), ()
        if self.sparse:
            h_BTD, layer_stats = MoeLayer(
                config.stack_moe["decoder" if is_decoder else "encoder"],
                config.d_ff,
                tuple(config.activations),
                config.init_scale,
                config.vocab_size,
                train,
                self.capture_router,
                name="mlp",
            )(h_BTD, tokens)
            stats = (layer_stats,)
        else:
            h_BTD = Mlp(config, train, name="mlp")(h_BTD)
        x_BTD += dropout(config, train)(h_BTD)
        if self.sparse and config.extra_mlp:
            h_BTD = Mlp(config, train, name="extra_mlp")(norm("extra_mlp")(x_BTD))
            x_BTD += dropout(config, train)(h_BTD)
        return x_BTD, stats


_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def _remat(module: type[nn.Module], policy: str, *, prevent_cse: bool) -> type[nn.Module]:
    if policy == "none":
        return module
    return nn.remat(module, policy=_REMAT_POLICIES[policy], prevent_cse=prevent_cse)


class Block(nn.Module):
    """Consecutive layers, the unit that is scanned and rematerialised."""

    config: ModelConfig
    pattern: tuple[bool, ...]
    train: bool
    capture_router: bool

    @nn.compact
    def __call__(self, x_BTD, *context) -> tuple[Float[Array, "B T D"], Stats]:
        """Apply the layers in order; `context` is what every layer gets besides `x`."""
        stats: Stats = ()
        for index, sparse in enumerate(self.pattern):
            x_BTD, layer_stats = T5Layer(
                self.config, sparse, self.train, self.capture_router, name=f"layers_{index}"
            )(x_BTD, *context)
            stats += layer_stats
        return x_BTD, stats


class Stack(nn.Module):
    """Encoder or decoder: layers, their shared position bias, and the final norm."""

    config: ModelConfig
    sparse: tuple[bool, ...]
    causal: bool

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        tokens: Tokens,
        encoded_BSD: Float[Array, "B S D"] | None = None,
        cross_mask: Bool[Array, "B 1 _ S"] | None = None,
        *,
        train: bool,
        capture_router: bool = False,
    ) -> tuple[Float[Array, "B T D"], Stats]:
        """Final states, after norm and dropout, and the statistics of every sparse layer."""
        config = self.config
        mode = {"train": train, "capture_router": capture_router}
        length = x_BTD.shape[1]
        sequence = tokens.sequence
        self_mask = attention_mask(tokens.mask, sequence, sequence, causal=self.causal)
        bias = RelativePositionBias(config, bidirectional=not self.causal, name="relpos_bias")(
            length, length
        )
        x_BTD = dropout(config, train)(x_BTD)
        context = (tokens, self_mask, bias, encoded_BSD, cross_mask)
        stats: Stats = ()
        if config.scan_layers:
            for segment in segments(self.sparse):
                x_BTD, segment_stats = self._scan(segment, x_BTD, context, mode)
                stats += segment_stats
        else:
            for layer, sparse in enumerate(self.sparse):
                module = _remat(T5Layer, config.remat, prevent_cse=True)
                layer = module(config, sparse=sparse, name=f"layers_{layer}", **mode)
                x_BTD, layer_stats = layer(x_BTD, *context)
                stats += layer_stats
        x_BTD = RMSNorm(config.layer_norm_epsilon, name="final_layer_norm")(x_BTD)
        return dropout(config, train)(x_BTD), stats

    def _scan(
        self, segment: Segment, x_BTD: jax.Array, context: tuple[Any, ...], mode: dict[str, bool]
    ) -> tuple[jax.Array, Stats]:
        # Inside a scan nothing is shared with the forward pass, so CSE cannot undo remat.
        scanned = nn.scan(
            _remat(Block, self.config.remat, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True, "jitter": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=segment.repeats,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        name = f"blocks_{segment.first_layer}"
        block = scanned(self.config, pattern=segment.pattern, name=name, **mode)
        x_BTD, stacked = block(x_BTD, *context)
        stats = tuple(
            jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], layer_stats)
            for repeat in range(segment.repeats)
            for layer_stats in stacked
        )
        return x_BTD, stats


class T5(nn.Module):
    """T5 encoder-decoder (arXiv:1910.10683); with `config.moe` a Switch Transformer.

    Random streams in training: `dropout`, and `jitter` for sparse models. Masks are True on real
    tokens and default to where the segment ids are not 0, or to everywhere without those.
    Segment ids number the examples of a packed row; no attention crosses them.
    """

    config: ModelConfig

    def setup(self):
        """Declare the embedding, the two stacks and, if untied, the output head."""
        config = self.config
        self.token_embedder = TokenEmbedder(config)
        self.encoder = Stack(config, config.encoder_sparse, causal=False)
        self.decoder = Stack(config, config.decoder_sparse, causal=True)
        if not config.tie_embeddings:
            self.logits_dense = OutputHead(config)

    def __call__(
        self,
        encoder_tokens: Int[Input, "B S"],
        decoder_input_tokens: Int[Input, "B T"],
        *,
        train: bool = False,
        **inputs: Any,
    ) -> T5Output:
        """Teacher-forced forward pass with logits. Arguments are those of `features`."""
        output = self.features(encoder_tokens, decoder_input_tokens, train=train, **inputs)
        return dataclasses.replace(output, logits=self.logits(output.decoded))

    def features(
        self,
        encoder_tokens: Int[Input, "B S"],
        decoder_input_tokens: Int[Input, "B T"],
        *,
        encoder_mask: Shaped[Input, "B S"] | None = None,
        decoder_mask: Shaped[Input, "B T"] | None = None,
        encoder_segment_ids: Int[Input, "B S"] | None = None,
        decoder_segment_ids: Int[Input, "B T"] | None = None,
        encoder_task_ids: Int[Input, "B S"] | None = None,
        decoder_task_ids: Int[Input, "B T"] | None = None,
        train: bool = False,
        capture_router: bool = False,
    ) -> T5Output:
        """Teacher-forced forward pass up to the output head; `logits` is None.

        Args:
          encoder_tokens: source tokens.
          decoder_input_tokens: target tokens shifted right, starting with 0.
          encoder_mask, decoder_mask: True or nonzero on real tokens.
          encoder_segment_ids, decoder_segment_ids: examples of a packed row, 0 on padding.
          encoder_task_ids, decoder_task_ids: the task of every token, for routing by task.
          train: dropout, jitter and the training capacity factor.
          capture_router: keep the router's decision for every token in `router`.
        """
        tokens = _tokens(encoder_tokens, encoder_mask, encoder_segment_ids, encoder_task_ids)
        encoded_BSD, encoder_stats = self.encoder(
            self.token_embedder(encoder_tokens),
            tokens,
            train=train,
            capture_router=capture_router,
        )
        decoded_BTD, decoder_stats = self.decode(
            decoder_input_tokens,
            encoded_BSD,
            encoder_mask=tokens.mask,
            decoder_mask=decoder_mask,
            encoder_segment_ids=encoder_segment_ids,
            decoder_segment_ids=decoder_segment_ids,
            decoder_task_ids=decoder_task_ids,
            train=train,
            capture_router=capture_router,
        )
        router = {"encoder": encoder_stats, "decoder": decoder_stats}
        return T5Output(logits=None, decoded=decoded_BTD, encoded=encoded_BSD, router=router)

    def encode(
        self,
        encoder_tokens: Int[Input, "B S"],
        *,
        encoder_mask: Shaped[Input, "B S"] | None = None,
        encoder_task_ids: Int[Input, "B S"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Final encoder states, for decoding."""
        tokens = _tokens(encoder_tokens, encoder_mask, None, encoder_task_ids)
        return self.encoder(self.token_embedder(encoder_tokens), tokens, train=False)[0]

    def decode(
        self,
        decoder_input_tokens: Int[Input, "B T"],
        encoded_BSD: Float[Array, "B S D"],
        *,
        encoder_mask: Shaped[Input, "B S"],
        decoder_mask: Shaped[Input, "B T"] | None = None,
        encoder_segment_ids: Int[Input, "B S"] | None = None,
        decoder_segment_ids: Int[Input, "B T"] | None = None,
        decoder_task_ids: Int[Input, "B T"] | None = None,
        train: bool = False,
        capture_router: bool = False,
    ) -> tuple[Float[Array, "B T D"], Stats]:
        """Decoder states ready for the output head, and the decoder's router statistics."""
        tokens = _tokens(decoder_input_tokens, decoder_mask, decoder_segment_ids, decoder_task_ids)
        cross_mask = attention_mask(
            jnp.asarray(encoder_mask) != 0, decoder_segment_ids, encoder_segment_ids
        )
        decoded_BTD, stats = self.decoder(
            self.token_embedder(decoder_input_tokens),
            tokens,
            encoded_BSD,
            cross_mask,
            train=train,
            capture_router=capture_router,
        )
        if self.config.scale_logits:
            decoded_BTD *= self.config.d_model**-0.5
        return decoded_BTD, stats

    def logits(self, decoded_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Output head, accumulated in float32 at least."""
        if not self.config.tie_embeddings:
            return self.logits_dense(decoded_BTD)
        head_VD = output_head(nn.unbox(self.variables["params"])).astype(decoded_BTD.dtype)
        dtype = jnp.promote_types(decoded_BTD.dtype, jnp.float32)
        return jnp.einsum("btd,vd->btv", decoded_BTD, head_VD, preferred_element_type=dtype)


def output_head(params: Mapping[str, Any]) -> Float[Array, "V D"]:
    """The matrix that turns `T5Output.decoded` into logits, out of a parameter tree."""
    if "logits_dense" in params:
        return params["logits_dense"]["kernel"].T
    return params["token_embedder"]["embedding"]


def _tokens(
    ids: Input, mask: Input | None, segment_ids: Input | None, task_ids: Input | None
) -> Tokens:
    if mask is None:
        mask = jnp.ones(ids.shape, bool) if segment_ids is None else segment_ids
    optional = (None if each is None else jnp.asarray(each) for each in (segment_ids, task_ids))
    return Tokens(jnp.asarray(mask) != 0, jnp.asarray(ids), *optional)
