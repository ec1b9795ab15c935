"""What a training step needs, estimated before anything is allocated, and what there is."""

import contextlib
import ctypes
from typing import Any, NamedTuple

import jax
import psutil

from switchx.errors import UserError
from switchx.models.config import ModelConfig
from switchx.moe.config import group_shape


class Memory(NamedTuple):
    """Bytes on one device."""

    state: int
    gradients: int
    update: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def estimate(
    config: ModelConfig, state: Any, *, rows: int, encoder_length: int, decoder_length: int
) -> Memory:
    """Estimate of a training step on one device.

    State and gradients are exact (gradients are as large as the parameters, in float32). The
    update needs two temporaries of the largest parameter: before and after clipping.
    Activations count what the backward pass keeps of every layer, or with `remat` of every
    layer's input and of one whole layer, plus one chunk of logits and its gradient.

    Args:
      config: of the model.
      state: abstract `TrainState` with shardings.
      rows: rows of a microbatch on this device.
      encoder_length: tokens of an encoder row.
      decoder_length: tokens of a decoder row.
    """
    size = 2 if config.dtype == "bfloat16" else 4
    width, inner = config.d_model, config.num_heads * config.head_dim

    def hidden(branches: int, d_ff: int) -> int:
        return (2 * branches + (branches > 1)) * d_ff

    def feed_forward(stack: str, length: int, sparse: bool) -> int:
        dense = rows * length * hidden(len(config.activations), config.d_ff) * size
        if not sparse:
            return dense
        moe = config.stack_moe[stack]
        inner = hidden(
            len(moe.expert_activations or config.activations), moe.expert_d_ff or config.d_ff
        )
        groups, group_tokens = group_shape(rows, length, moe.group_size)
        slots = groups * moe.num_experts * moe.capacity(group_tokens, train=True)
        shared = rows * length * moe.num_shared_experts * inner
        router = rows * length * moe.num_experts * 4 * 4
        experts = (slots * (2 * width + inner) + shared) * size
        return experts + router + dense * config.extra_mlp

    def attention(queries: int, keys: int) -> int:
        projections = rows * (2 * queries + 2 * keys) * inner * size
        return projections + 3 * rows * config.num_heads * queries * keys * 4

    def stack(name: str, length: int, sparse: tuple[bool, ...], cross: int) -> int:
        norms = (2 + bool(cross)) * 2 * rows * length * width * size
        attend = attention(length, length) + (attention(length, cross) if cross else 0)
        layers = [norms + attend + feed_forward(name, length, each) for each in sparse]
        if config.remat == "full":
            return len(sparse) * rows * length * width * size + max(layers)
        return sum(layers)

    logits = 3 * min(rows * decoder_length * config.vocab_size, 2**24) * 4
    activations = (
        stack("encoder", encoder_length, config.encoder_sparse, 0)
        + stack("decoder", decoder_length, config.decoder_sparse, encoder_length)
        + logits
    )
    return Memory(
        state=_bytes_per_device(state),
        gradients=_bytes_per_device(state.params),
        update=2 * max(map(_bytes_per_device, jax.tree.leaves(state.params))),
        activations=activations,
    )


def check_parameters(config: ModelConfig) -> None:
    """Check that parameters and gradients have a place, before anything is traced or allocated.

    They are the least that training needs, spread over all devices.

    Raises:
      UserError: more than all devices can hold.
    """
    count, have = jax.device_count(), available()
    need = 2 * 4 * config.num_params
    if need > count * have:
        raise UserError(
            f"a model of {config.num_params:,} parameters needs {need / count / 2**30:,.1f} GiB on "
            f"each of {count} device(s) for parameters and gradients alone, and "
            f"{have / 2**30:.1f} GiB are free; lower d_model, d_ff, the layers or num_experts"
        )


def available() -> int:
    """Bytes that one device can hold: an accelerator's limit, or this machine's free memory."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return psutil.virtual_memory().available // jax.local_device_count()


def release() -> None:
    """Return to the system what was freed but kept by the C library, where it is glibc.

    Compiling a training step leaves hundreds of MB behind, and the step allocates anew.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _bytes_per_device(tree: Any) -> int:
    total = 0
    for leaf in jax.tree.leaves(tree):
        elements = 1
        for size in leaf.sharding.shard_shape(leaf.shape):
            elements *= size
        total += elements * leaf.dtype.itemsize
    return total
