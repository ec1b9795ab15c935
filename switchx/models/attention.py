"""Multi-head attention as T5 has it, and its masks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from switchx.models.config import ModelConfig
from switchx.models.layers import Dense
from switchx.sharding import constrain


def attention_mask(
    key_mask_BS: Bool[Array, "B S"],
    query_segment_ids_BT: Int[Array | np.ndarray, "B T"] | None = None,
    key_segment_ids_BS: Int[Array | np.ndarray, "B S"] | None = None,
    *,
    causal: bool = False,
) -> Bool[Array, "B 1 T S"]:
    """Which keys each query may attend: real ones, of its own segment, none that lie ahead.

    Without segment ids only the keys are masked, so queries at padding stay well defined.
    A causal mask needs as many queries as keys. T is 1 where the mask is the same for all queries.
    """
    mask_B1TS = key_mask_BS[:, None, None, :]
    if query_segment_ids_BT is not None and key_segment_ids_BS is not None:
        same_BTS = query_segment_ids_BT[:, :, None] == key_segment_ids_BS[:, None, :]
        mask_B1TS = mask_B1TS & same_BTS[:, None]
    if causal:
        length = key_mask_BS.shape[-1]
        mask_B1TS = mask_B1TS & jnp.tril(jnp.ones((1, 1, length, length), bool))
    return mask_B1TS


class Attention(nn.Module):
    """Multi-head attention without biases and without 1/√head_dim, which is in the query's init.

    Scores, softmax and sums of values are float32 at least. Dropout on the attention weights has
    one mask for all queries, as T5X draws it.
    """

    config: ModelConfig
    train: bool = False

    @nn.compact
    def __call__(
        self,
        queries_BTD: Float[Array, "B T D"],
        keys_BSD: Float[Array, "B S D"],
        mask: Bool[Array, "B 1 #T S"],
        bias: Float[Array, "1 H T S"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attend from `queries_BTD` to `keys_BSD` (the same array for self-attention)."""
        config = self.config
        heads, head_dim, scale = config.num_heads, config.head_dim, config.init_scale

        def project(x: jax.Array, name: str, init_scale: float) -> jax.Array:
            y = Dense(heads * head_dim, ("embed", "heads"), init_scale, name=name)(x)
            y = y.reshape(*x.shape[:-1], heads, head_dim)
            return constrain(y, "batch", None, "heads", None)

        # scale / head_dim: the query's init carries the 1/√head_dim that the scores lack.
        queries_BTHP = project(queries_BTD, "query", scale / head_dim)
        keys_BSHP = project(keys_BSD, "key", scale)
        values_BSHP = project(keys_BSD, "value", scale)

        dtype = jnp.promote_types(config.dtype, jnp.float32)
        scores_BHTS = jnp.einsum(
            "bthp,bshp->bhts", queries_BTHP, keys_BSHP, preferred_element_type=dtype
        )
        if bias is not None:
            scores_BHTS += bias.astype(dtype)
        scores_BHTS = jnp.where(mask, scores_BHTS, jnp.finfo(dtype).min)
        # The softmax is divided by its sum after the values are, which spares passes over [T, S].
        largest_BHT1 = jax.lax.stop_gradient(jnp.max(scores_BHTS, axis=-1, keepdims=True))
        weights_BHTS = jnp.exp(scores_BHTS - largest_BHT1)
        sums_BHT1 = jnp.sum(weights_BHTS, axis=-1, keepdims=True)
        weights_BHTS = nn.Dropout(
            config.dropout_rate, broadcast_dims=(-2,), deterministic=not self.train
        )(weights_BHTS.astype(values_BSHP.dtype))
        y_BHTP = jnp.einsum(
            "bhts,bshp->bhtp", weights_BHTS, values_BSHP, preferred_element_type=dtype
        )
        y_BTHP = jnp.moveaxis(y_BHTP / sums_BHT1, 1, 2).astype(values_BSHP.dtype)
        y_BTA = y_BTHP.reshape(*queries_BTD.shape[:-1], heads * head_dim)
        return Dense(config.d_model, ("heads", "embed"), scale, name="out")(y_BTA)
