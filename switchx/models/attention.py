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


def cached_mask(start: Int[Array, ""], queries: int, keys: int) -> Bool[Array, "1 1 T S"]:
    """Causal mask of queries whose first stands at `start`, on a cache of `keys` positions."""
    query_T1 = start + jnp.arange(queries)[:, None]
    return (jnp.arange(keys)[None, :] <= query_T1)[None, None]


class Attention(nn.Module):
    """Multi-head attention without biases and without 1/√head_dim, which is in the query's init.

    Scores, softmax and sums of values are float32 at least. Dropout on the attention weights has
    one mask for all queries, as T5X draws it.
    """

    config: ModelConfig
    train: bool = False

    def setup(self):
        """Declare the four projections."""
        config = self.config
        inner, scale = config.num_heads * config.head_dim, config.init_scale
        # scale / head_dim: the query's init carries the 1/√head_dim that the scores lack.
        self.query = Dense(inner, ("embed", "heads"), scale / config.head_dim)
        self.key = Dense(inner, ("embed", "heads"), scale)
        self.value = Dense(inner, ("embed", "heads"), scale)
        self.out = Dense(config.d_model, ("heads", "embed"), scale)
        self.dropout = nn.Dropout(
            config.dropout_rate, broadcast_dims=(-2,), deterministic=not self.train
        )

    def keys_values(
        self, x_BSD: Float[Array, "B S D"]
    ) -> tuple[Float[Array, "B S H P"], Float[Array, "B S H P"]]:
        """What may be attended to."""
        return self._heads(self.key(x_BSD)), self._heads(self.value(x_BSD))

    def __call__(
        self,
        queries_BTD: Float[Array, "B T D"],
        keys_BSHP: Float[Array, "B S H P"],
        values_BSHP: Float[Array, "B S H P"],
        mask: Bool[Array, "#B 1 #T S"],
        bias: Float[Array, "1 H T S"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attend from `queries_BTD` to `keys_values`."""
        config = self.config
        queries_BTHP = self._heads(self.query(queries_BTD))
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
        weights_BHTS = self.dropout(weights_BHTS.astype(values_BSHP.dtype))
        y_BHTP = jnp.einsum(
            "bhts,bshp->bhtp", weights_BHTS, values_BSHP, preferred_element_type=dtype
        )
        y_BTHP = jnp.moveaxis(y_BHTP / sums_BHT1, 1, 2).astype(values_BSHP.dtype)
        y_BTA = y_BTHP.reshape(*queries_BTD.shape[:-1], config.num_heads * config.head_dim)
        return self.out(y_BTA)

    def _heads(self, x_BTA: jax.Array) -> jax.Array:
        config = self.config
        x_BTHP = x_BTA.reshape(*x_BTA.shape[:-1], config.num_heads, config.head_dim)
        return constrain(x_BTHP, "batch", None, "heads", None)
