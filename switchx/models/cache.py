"""What a decoder keeps of the tokens it has seen, so that each next one costs a single step."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from switchx.models.config import ModelConfig
from switchx.models.stacking import segments
from switchx.sharding import constrain


@flax.struct.dataclass
class LayerCache:
    """Keys and values of a layer's attention, in static shapes.

    They lie as products with one query want them, so that no step copies them. Of a row's R
    sequences (beams, samples) each is one of N = B * R rows; they share the encoder's states.
    Layers that a scan repeats are stacked along a leading axis; `layer` is one's place there.

    Attributes:
      self_keys: [N, H, P, T] of decoded tokens, and of those to come.
      self_values: [N, H, T, P].
      cross_keys: [B, H, P, S] of encoder states.
      cross_values: [B, H, S, P].
    """

    self_keys: Float[Array, "*L N H P T"]
    self_values: Float[Array, "*L N H T P"]
    cross_keys: Float[Array, "*L B H P S"]
    cross_values: Float[Array, "*L B H S P"]

    def append(
        self,
        layer: jax.Array | None,
        start: int | jax.Array,
        keys_NtHP: jax.Array,
        values_NtHP: jax.Array,
    ) -> "LayerCache":
        """With a layer's keys and values of the tokens from place `start` on."""
        keys_NHPt, values_NHtP = _lie(keys_NtHP, values_NtHP)
        return dataclasses.replace(
            self,
            self_keys=_write(self.self_keys, keys_NHPt, layer, (0, 0, 0, start)),
            self_values=_write(self.self_values, values_NHtP, layer, (0, 0, start, 0)),
        )

    def keep(
        self, layer: jax.Array | None, keys_BSHP: jax.Array, values_BSHP: jax.Array
    ) -> "LayerCache":
        """With a layer's keys and values of the encoder states."""
        keys_BHPS, values_BHSP = _lie(keys_BSHP, values_BSHP)
        # Else XLA keeps them as they are and transposes them at every step.
        keys_BHPS, values_BHSP = jax.lax.optimization_barrier((keys_BHPS, values_BHSP))
        return dataclasses.replace(
            self,
            cross_keys=_write(self.cross_keys, keys_BHPS, layer, (0, 0, 0, 0)),
            cross_values=_write(self.cross_values, values_BHSP, layer, (0, 0, 0, 0)),
        )

    def decoded(self, layer: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """A layer's keys and values [N, T, H, P] of all tokens, and of those to come."""
        return _stand(self.self_keys, self.self_values, layer)

    def encoded(self, layer: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """A layer's keys and values [B, S, H, P] of the encoder states."""
        return _stand(self.cross_keys, self.cross_values, layer)


@flax.struct.dataclass
class Cache:
    """The layers of a decoder, as its modules have them, and how many tokens they have seen.

    Attributes:
      layers: of every layer, or of every place in the patterns that scans repeat.
      length: [] int32.
    """

    layers: tuple[LayerCache, ...]
    length: Int[Array, ""]

    @property
    def room(self) -> int:
        """Most tokens it can hold."""
        return self.layers[0].self_keys.shape[-1]

    def select(self, sequence_N: Int[Array, " N"]) -> "Cache":
        """The decoded tokens of these sequences, each of which is of the row it stands in."""
        layers = tuple(
            dataclasses.replace(
                layer,
                self_keys=jnp.take(layer.self_keys, sequence_N, axis=-4),
                self_values=jnp.take(layer.self_values, sequence_N, axis=-4),
            )
            for layer in self.layers
        )
        return dataclasses.replace(self, layers=layers)


def empty_cache(
    config: ModelConfig, batch: int, *, sequences: int, length: int, source_length: int
) -> Cache:
    """A cache for `length` tokens of `sequences` sequences of each row."""
    heads, head_dim, rows = config.num_heads, config.head_dim, batch * sequences

    def zeros(*shape: int) -> jax.Array:
        stacked = [None] * (len(shape) - 4)
        names = *stacked, "batch", "heads", None, None
        return constrain(jnp.zeros(shape, config.dtype), *names)

    stacks: list[tuple[int, ...]] = [()] * config.num_decoder_layers
    if config.scan_layers:
        found = segments(config.decoder_sparse)
        stacks = [(segment.repeats,) for segment in found for _ in segment.pattern]
    layers = tuple(
        LayerCache(
            self_keys=zeros(*stack, rows, heads, head_dim, length),
            self_values=zeros(*stack, rows, heads, length, head_dim),
            cross_keys=zeros(*stack, batch, heads, head_dim, source_length),
            cross_values=zeros(*stack, batch, heads, source_length, head_dim),
        )
        for stack in stacks
    )
    return Cache(layers, jnp.int32(0))


def _lie(keys_NtHP: jax.Array, values_NtHP: jax.Array) -> tuple[jax.Array, jax.Array]:
    return keys_NtHP.transpose(0, 2, 3, 1), values_NtHP.transpose(0, 2, 1, 3)


def _stand(
    keys: jax.Array, values: jax.Array, layer: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    if layer is not None:
        keys, values = (
            jax.lax.dynamic_index_in_dim(each, layer, keepdims=False) for each in (keys, values)
        )
    return keys.transpose(0, 3, 1, 2), values.transpose(0, 2, 1, 3)


def _write(
    stored: jax.Array,
    new: jax.Array,
    layer: jax.Array | None,
    start: tuple[int | jax.Array, ...],
) -> jax.Array:
    if layer is None:
        return jax.lax.dynamic_update_slice(stored, new, start)
    return jax.lax.dynamic_update_slice(stored, new[None], (layer, *start))
