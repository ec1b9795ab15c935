"""The T5 encoder-decoder, dense or with Switch layers."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from switchx.models.attention import Attention, attention_mask, cached_mask
from switchx.models.cache import Cache, LayerCache, empty_cache
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


class Context(NamedTuple):
    """What every layer of a stack gets besides its input.

    Attributes:
      tokens: the tokens that the input stands for.
      self_mask, bias: of self-attention.
      cross_mask: of cross-attention, None in an encoder.
      encoded_BSD: encoder states; None in an encoder, and where a cache has their keys.
      start: place of the first token in a cache.
    """

    tokens: Tokens
    self_mask: Bool[Array, "#B 1 _ S"]
    bias: Float[Array, "1 H T S"]
    cross_mask: Bool[Array, "B 1 _ S"] | None = None
    encoded_BSD: Float[Array, "B S D"] | None = None
    start: Int[Array, ""] | int = 0


class T5Layer(nn.Module):
    """One pre-norm layer: self-attention, cross-attention in a decoder, feed-forward."""

    config: ModelConfig
    sparse: bool
    train: bool
    capture_router: bool

    @nn.compact
    def __call__(
        self,
        x_NTD: Float[Array, "N T D"],
        cache: LayerCache | None,
        repeat: Int[Array, ""] | None,
        context: Context,
    ) -> tuple[Float[Array, "N T D"], LayerCache | None, Stats]:
        """The layer's output, the cache with its keys and, if sparse, what its router did.

        `repeat` is the layer's number among those that a scan stacks, None without a scan.
        """
        config, train = self.config, self.train
        is_decoder = context.cross_mask is not None

        def norm(name: str) -> RMSNorm:
            return RMSNorm(config.layer_norm_epsilon, name=f"pre_{name}_layer_norm")

        x_NTD = constrain(x_NTD, "batch", None, None)
        name = "self_attention" if is_decoder else "attention"
        h_NTD = norm(name)(x_NTD)
        attention = Attention(config, train, name=name)
        keys, values = attention.keys_values(h_NTD)
        if cache is not None:
            cache = cache.append(repeat, context.start, keys, values)
            keys, values = cache.decoded(repeat)
        h_NTD = attention(h_NTD, keys, values, context.self_mask, context.bias)
        x_NTD += dropout(config, train)(h_NTD)

        if context.cross_mask is not None:
            h_NTD = norm("cross_attention")(x_NTD)
            attention = Attention(config, train, name="encoder_decoder_attention")
            if context.encoded_BSD is not None:
                keys, values = attention.keys_values(context.encoded_BSD)
                cache = cache and cache.keep(repeat, keys, values)
            else:
                assert cache is not None
                keys, values = cache.encoded(repeat)
            # A row's sequences are so many more queries.
            queries = h_NTD.reshape(keys.shape[0], -1, h_NTD.shape[-1])
            h_NTD = attention(queries, keys, values, context.cross_mask).reshape(h_NTD.shape)
            x_NTD += dropout(config, train)(h_NTD)

        h_NTD, stats = norm("mlp")(x_NTD), ()
        if self.sparse:
            h_NTD, layer_stats = MoeLayer(
                config.stack_moe["decoder" if is_decoder else "encoder"],
                config.d_ff,
                tuple(config.activations),
                config.init_scale,
                config.vocab_size,
                train,
                self.capture_router,
                name="mlp",
            )(h_NTD, context.tokens)
            stats = (layer_stats,)
        else:
            h_NTD = Mlp(config, train, name="mlp")(h_NTD)
        x_NTD += dropout(config, train)(h_NTD)
        if self.sparse and config.extra_mlp:
            h_NTD = Mlp(config, train, name="extra_mlp")(norm("extra_mlp")(x_NTD))
            x_NTD += dropout(config, train)(h_NTD)
        return x_NTD, cache, stats


_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def _remat(module: type[nn.Module], policy: str, *, prevent_cse: bool) -> type[nn.Module]:
    if policy == "none":
        return module
    return nn.remat(module, policy=_REMAT_POLICIES[policy], prevent_cse=prevent_cse)


# A cache for each of some layers, or None for each.
Caches = tuple[LayerCache | None, ...]


class Block(nn.Module):
    """Consecutive layers, the unit that is scanned and rematerialised."""

    config: ModelConfig
    pattern: tuple[bool, ...]
    train: bool
    capture_router: bool

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "N T D"], Caches],
        repeat: Int[Array, ""],
        context: Context,
    ) -> tuple[tuple[Float[Array, "N T D"], Caches], Stats]:
        """Apply the layers in order, for the `repeat`-th time."""
        x_NTD, caches = carry
        stats: Stats = ()
        kept = []
        for index, sparse in enumerate(self.pattern):
            layer = T5Layer(
                self.config, sparse, self.train, self.capture_router, name=f"layers_{index}"
            )
            x_NTD, cache, layer_stats = layer(x_NTD, caches[index], repeat, context)
            kept.append(cache)
            stats += layer_stats
        return (x_NTD, tuple(kept)), stats


class Stack(nn.Module):
    """Encoder or decoder: layers, their shared position bias, and the final norm."""

    config: ModelConfig
    sparse: tuple[bool, ...]
    causal: bool

    @nn.compact
    def __call__(
        self,
        x_NTD: Float[Array, "N T D"],
        tokens: Tokens,
        encoded_BSD: Float[Array, "B S D"] | None = None,
        cross_mask: Bool[Array, "B 1 _ S"] | None = None,
        cache: Cache | None = None,
        *,
        train: bool,
        capture_router: bool = False,
    ) -> tuple[Float[Array, "N T D"], Cache | None, Stats]:
        """Final states after norm and dropout, the cache, the statistics of every sparse layer.

        With a cache the tokens follow those that are in it.
        """
        config = self.config
        mode = {"train": train, "capture_router": capture_router}
        length = x_NTD.shape[1]
        bias = RelativePositionBias(config, bidirectional=not self.causal, name="relpos_bias")
        if cache is None:
            sequence = tokens.sequence
            self_mask = attention_mask(tokens.mask, sequence, sequence, causal=self.causal)
            context = Context(tokens, self_mask, bias(length, length), cross_mask, encoded_BSD)
        else:
            context = Context(
                tokens,
                cached_mask(cache.length, length, cache.room),
                bias(length, cache.room, cache.length),
                cross_mask,
                encoded_BSD,
                cache.length,
            )
        x_NTD = dropout(config, train)(x_NTD)
        stats: Stats = ()
        caches: Caches = () if cache is None else cache.layers
        kept: Caches = ()
        if config.scan_layers:
            for segment in segments(self.sparse):
                places = slice(len(kept), len(kept) + len(segment.pattern))
                here = caches[places] or (None,) * len(segment.pattern)
                (x_NTD, here), segment_stats = self._scan(segment, (x_NTD, here), context, mode)
                kept += here
                stats += segment_stats
        else:
            for number, sparse in enumerate(self.sparse):
                module = _remat(T5Layer, config.remat, prevent_cse=True)
                layer = module(config, sparse=sparse, name=f"layers_{number}", **mode)
                here = caches[number] if caches else None
                x_NTD, here, layer_stats = layer(x_NTD, here, None, context)
                kept += (here,)
                stats += layer_stats
        if cache is not None:
            cache = Cache(tuple(each for each in kept if each), cache.length + length)
        x_NTD = RMSNorm(config.layer_norm_epsilon, name="final_layer_norm")(x_NTD)
        return dropout(config, train)(x_NTD), cache, stats

    def _scan(
        self,
        segment: Segment,
        carry: tuple[jax.Array, Caches],
        context: Context,
        mode: dict[str, bool],
    ) -> tuple[tuple[jax.Array, Caches], Stats]:
        # Inside a scan nothing is shared with the forward pass, so CSE cannot undo remat.
        scanned = nn.scan(
            _remat(Block, self.config.remat, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True, "jitter": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=segment.repeats,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        name = f"blocks_{segment.first_layer}"
        block = scanned(self.config, pattern=segment.pattern, name=name, **mode)
        carry, stacked = block(carry, jnp.arange(segment.repeats), context)
        stats = tuple(
            jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], layer_stats)
            for repeat in range(segment.repeats)
            for layer_stats in stacked
        )
        return carry, stats


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
        encoded_BSD, _, encoder_stats = self.encoder(
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
        decoded_BTD, _, stats = self.decoder(
            self.token_embedder(decoder_input_tokens),
            tokens,
            encoded_BSD,
            cross_mask,
            train=train,
            capture_router=capture_router,
        )
        return self._scale(decoded_BTD), stats

    def start(
        self,
        tokens_NT: Int[Input, "N T"],
        encoded_BSD: Float[Array, "B S D"],
        *,
        encoder_mask: Shaped[Input, "B S"],
        length: int,
        task_ids: Int[Input, "N T"] | None = None,
    ) -> tuple[Float[Array, "N T D"], Cache]:
        """Decoder states of the first tokens, and a cache with them and the encoder states.

        Args:
          tokens_NT: decoder inputs; N is B, or a multiple of it for several sequences of a row.
          encoded_BSD: of `encode`.
          encoder_mask: True or nonzero on real tokens of the encoder.
          length: most tokens that the cache shall hold.
          task_ids: the task of every token, for routing by task.
        """
        batch, source_length, _ = encoded_BSD.shape
        sequences = tokens_NT.shape[0] // batch
        cache = empty_cache(
            self.config, batch, sequences=sequences, length=length, source_length=source_length
        )
        return self._cached(tokens_NT, None, encoder_mask, task_ids, cache, encoded_BSD)

    def extend(
        self,
        tokens_NT: Int[Input, "N T"],
        cache: Cache,
        *,
        encoder_mask: Shaped[Input, "B S"],
        decoder_mask: Shaped[Input, "N T"] | None = None,
        task_ids: Int[Input, "N T"] | None = None,
    ) -> tuple[Float[Array, "N T D"], Cache]:
        """Decoder states of the tokens that follow those in the cache, and the cache with them.

        Where `decoder_mask` is not True the result is of no use, and no expert is asked.
        """
        return self._cached(tokens_NT, decoder_mask, encoder_mask, task_ids, cache, None)

    def _cached(
        self,
        tokens_NT: Input,
        decoder_mask: Input | None,
        encoder_mask: Input,
        task_ids: Input | None,
        cache: Cache,
        encoded_BSD: jax.Array | None,
    ) -> tuple[jax.Array, Cache]:
        decoded_NTD, extended, _ = self.decoder(
            self.token_embedder(tokens_NT),
            _tokens(tokens_NT, decoder_mask, None, task_ids),
            encoded_BSD,
            attention_mask(jnp.asarray(encoder_mask) != 0),
            cache,
            train=False,
        )
        assert extended is not None
        return self._scale(decoded_NTD), extended

    def _scale(self, decoded_BTD: jax.Array) -> jax.Array:
        return decoded_BTD * self.config.d_model**-0.5 if self.config.scale_logits else decoded_BTD

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
