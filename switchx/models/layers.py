"""Building blocks: dense projection, RMSNorm, token embedding, MLP, relative position bias."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from switchx.models.config import ModelConfig
from switchx.moe.experts import ACTIVATIONS
from switchx.sharding import axes, gather


def truncated_normal(scale: float) -> nn.initializers.Initializer:
    """Truncated normal of variance scale / fan_in (arXiv:2101.03961, §2.4)."""
    return nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal")


class Dense(nn.Module):
    """Bias-free projection of the last axis: kernel [in, out], float32, applied in `x`'s dtype."""

    features: int
    names: tuple[str, str]
    init_scale: float

    @nn.compact
    def __call__(self, x: Float[Array, "*rows in"]) -> Float[Array, "*rows out"]:
        """Project."""
        kernel = self.param(
            "kernel",
            axes(truncated_normal(self.init_scale), self.names),
            (x.shape[-1], self.features),
            jnp.float32,
        )
        # As a matrix: for the gradient of the kernel, XLA on CPU transposes more axes than two by
        # copying, and loses its fast matmul.
        y = x.reshape(-1, x.shape[-1]) @ gather(kernel.astype(x.dtype), *self.names)
        return y.reshape(*x.shape[:-1], self.features)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a scale and no bias, as T5; statistics in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Normalise the last axis."""
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        scale_D = self.param(
            "scale", axes(nn.initializers.ones, ("norm",)), (x.shape[-1],), jnp.float32
        )
        wide = x.astype(dtype)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        scale = jnp.expand_dims(scale_D.astype(dtype), range(x.ndim - 1))
        return (wide * jax.lax.rsqrt(mean_square + self.epsilon) * scale).astype(x.dtype)


class TokenEmbedder(nn.Module):
    """Token embedding by gather, N(0, 1); in tied models also the output head."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens_BT: Int[Array | np.ndarray, "B T"]) -> Float[Array, "B T D"]:
        """Rows of the embedding in the activations' dtype."""
        embedding_VD = self.param(
            "embedding",
            axes(nn.initializers.normal(1.0), ("vocab", "embed")),
            (self.config.vocab_size, self.config.d_model),
            jnp.float32,
        )
        embedding_VD = gather(embedding_VD, "vocab", "embed")
        return jnp.take(embedding_VD, tokens_BT, axis=0).astype(self.config.dtype)


class OutputHead(nn.Module):
    """Output head of untied models: logits of every token, in float32 at least."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Project to the vocabulary, accumulating in float32 at least."""
        kernel_DV = self.param(
            "kernel",
            axes(truncated_normal(self.config.init_scale), ("embed", "vocab")),
            (self.config.d_model, self.config.vocab_size),
            jnp.float32,
        )
        kernel_DV = gather(kernel_DV, "embed", "vocab")
        dtype = jnp.promote_types(x_BTD.dtype, jnp.float32)
        return jnp.einsum(
            "btd,dv->btv", x_BTD, kernel_DV.astype(x_BTD.dtype), preferred_element_type=dtype
        )


class Mlp(nn.Module):
    """Dense feed-forward layer, plain or gated; the experts' dense counterpart."""

    config: ModelConfig
    train: bool = False

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """``f(x wi) wo``, or ``f(x wi_0) * g(x wi_1) * … wo``."""
        config, scale = self.config, self.config.init_scale
        hidden_BTF = None
        for index, activation in enumerate(config.activations):
            name = "wi" if len(config.activations) == 1 else f"wi_{index}"
            branch_BTF = Dense(config.d_ff, ("embed", "mlp"), scale, name=name)(x_BTD)
            branch_BTF = ACTIVATIONS[activation](branch_BTF)
            hidden_BTF = branch_BTF if hidden_BTF is None else hidden_BTF * branch_BTF
        hidden_BTF = dropout(config, self.train)(hidden_BTF)
        return Dense(config.d_model, ("mlp", "embed"), scale, name="wo")(hidden_BTF)


def dropout(config: ModelConfig, train: bool) -> nn.Dropout:
    """Dropout at the model's rate with one mask for all positions of a row, as T5X draws it."""
    return nn.Dropout(config.dropout_rate, broadcast_dims=(-2,), deterministic=not train)


def relative_position_buckets(
    query_length: int, key_length: int, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
    """Bucket of every (query, key) pair, int32 [query_length, key_length].

    Half of the buckets of a direction are exact distances, the other half grows logarithmically
    up to `max_distance`; farther keys share the last. Raffel et al. (arXiv:1910.10683) §2.1.
    The logarithm is taken in float32 and truncated, which decides the bucket at the boundaries.
    """
    distance = np.arange(key_length)[None, :] - np.arange(query_length)[:, None]
    bucket = np.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        bucket += (distance > 0) * num_buckets
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    num_exact = num_buckets // 2
    log_ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(num_exact))
    log_range = np.float32(np.log(max_distance / num_exact))
    far = num_exact + (log_ratio / log_range * (num_buckets - num_exact)).astype(np.int32)
    far = np.minimum(far, num_buckets - 1)
    return (bucket + np.where(distance < num_exact, distance, far)).astype(np.int32)


class RelativePositionBias(nn.Module):
    """Learned bias of attention scores by relative position, one table per stack."""

    config: ModelConfig
    bidirectional: bool

    @nn.compact
    def __call__(
        self, query_length: int, key_length: int, start: jax.Array | None = None
    ) -> Float[Array, "1 H T S"]:
        """Bias for every head and (query, key) pair; the first query stands at `start`, else 0."""
        config = self.config
        table_HR = self.param(
            "rel_embedding",
            axes(
                nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
                ("heads", "relpos_buckets"),
            ),
            (config.num_heads, config.relative_attention_num_buckets),
            jnp.float32,
        )
        buckets_TS: np.ndarray | jax.Array = relative_position_buckets(
            query_length if start is None else key_length,
            key_length,
            bidirectional=self.bidirectional,
            num_buckets=config.relative_attention_num_buckets,
            max_distance=config.relative_attention_max_distance,
        )
        if start is not None:
            buckets_TS = jax.lax.dynamic_slice_in_dim(jnp.asarray(buckets_TS), start, query_length)
        return table_HR[:, buckets_TS][None].astype(config.dtype)
