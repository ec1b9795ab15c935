"""What a training step needs, estimated before anything is allocated, and what there is."""

import contextlib
import ctypes
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import psutil

from switchx.errors import UserError
from switchx.models.config import ModelConfig
from switchx.models.stacking import segments
from switchx.moe.config import group_shape
from switchx.training import lora
from switchx.training import trainable as subsets
from switchx.training.trainable import Path


class Memory(NamedTuple):
    """Bytes on one device, by what they are.

    Attributes:
      weights: the parameters.
      optimizer: its state, the step and the random key.
      gradients: of what is trained, in float32, all of them at once: an update waits until they
        are known to be finite. With adapters, also the matrices they are merged into and the
        gradients of these.
      activations: the most that the backward pass keeps at one time, the exchange left out.
      dispatch: of the same moment, tokens in the slots of experts and what is computed there.
      update: temporaries of the optimizer, when the activations are gone.
    """

    weights: int
    optimizer: int
    gradients: int
    activations: int
    dispatch: int
    update: int

    @property
    def state(self) -> int:
        """What stays between steps."""
        return self.weights + self.optimizer

    @property
    def total(self) -> int:
        """The most at one time: with activations, or with the update's temporaries."""
        later = max(self.activations + self.dispatch, self.update)
        return self.state + self.gradients + later


def estimate(
    config: ModelConfig,
    state: Any,
    *,
    rows: int,
    encoder_length: int,
    decoder_length: int,
    trainable: frozenset[Path] | None = None,
    model_devices: int = 1,
    expert_devices: int = 1,
) -> Memory:
    """Estimate of a training step on one device.

    State and gradients are exact (gradients are as large as what is trained, in float32). The
    update needs two temporaries of the largest trained parameter. Activations are what the
    backward pass finds of all layers, or with `remat` what is saved of every unit (a block of a
    scan, or a layer) and all of the largest, which is computed again; then what one attention
    needs in float32, and one chunk of logits with its gradient.

    Args:
      config: of the model.
      state: abstract `TrainState` with shardings.
      rows: rows of a microbatch on this device.
      encoder_length: tokens of an encoder row.
      decoder_length: tokens of a decoder row.
      trainable: paths of the parameters that are trained; None is all.
      model_devices: devices of mesh axis `model`, which share heads and hidden units.
      expert_devices: devices of mesh axis `expert`, each of which a dropless layer has room for.
    """
    sizes = {"encoder": (encoder_length, 0), "decoder": (decoder_length, encoder_length)}
    saved, units, scores = 0, [_Bytes(0, 0)], 0
    for name, (length, cross) in sizes.items():
        devices = (model_devices, expert_devices)
        layer = functools.partial(_layer, config, name, rows, length, cross, devices)
        sparse = config.encoder_sparse if name == "encoder" else config.decoder_sparse
        inputs = rows * length * config.d_model * _size(config)
        for pattern, repeats in _units(config, sparse):
            whole = _add(layer(each, "none") for each in pattern)
            if config.remat == "none":
                units[0] = _add([units[0], *[whole] * repeats])
                continue
            kept = _add(layer(each, config.remat) for each in pattern)
            saved += repeats * (inputs + sum(kept))
            units.append(whole)
        queries = max(length, cross)
        heads = config.num_heads // model_devices
        scores = max(scores, 2 * rows * heads * length * queries * 4)
    largest = max(units, key=sum)
    logits = 2 * min(rows * decoder_length * config.vocab_size, 2**24) * 4
    weights = _bytes_per_device(state.params)
    trained = state.params if trainable is None else subsets.split(state.params, trainable)[0]
    merged = lora.adapted(state.params)
    return Memory(
        weights=weights,
        optimizer=_bytes_per_device(state) - weights,
        gradients=_bytes_per_device(trained) + 2 * _bytes_per_device(merged),
        activations=saved + largest.activations + max(scores, logits),
        dispatch=largest.dispatch,
        update=2 * max(map(_bytes_per_device, jax.tree.leaves(trained))),
    )


class _Bytes(NamedTuple):
    activations: int
    dispatch: int


def _add(parts: Iterable[_Bytes]) -> _Bytes:
    return _Bytes(*map(sum, zip(*parts, strict=True)))


def _size(config: ModelConfig) -> int:
    return jnp.dtype(config.dtype).itemsize


def _units(config: ModelConfig, sparse: tuple[bool, ...]) -> list[tuple[tuple[bool, ...], int]]:
    """What is computed again at once, and how often there is such a thing."""
    if config.scan_layers:
        return [(segment.pattern, segment.repeats) for segment in segments(sparse)]
    return [((each,), 1) for each in sparse]


def _layer(
    config: ModelConfig,
    stack: str,
    rows: int,
    length: int,
    cross: int,
    devices: tuple[int, int],
    sparse: bool,
    remat: str,
) -> _Bytes:
    """What the backward pass finds of a layer, with "none", "dots" or "full" recomputed."""
    if remat == "full":
        return _Bytes(0, 0)
    model_devices, expert_devices = devices
    size, tokens, width = _size(config), rows * length, config.d_model
    inner = config.num_heads * config.head_dim // model_devices
    heads = config.num_heads // model_devices

    def hidden(activations: Sequence[str], d_ff: int) -> int:
        # Matmuls' outputs; what activations make of them; their product.
        branches = len(activations)
        found = branches if remat == "dots" else 2 * branches + (branches > 1)
        return found * d_ff // model_devices

    def attention(keys: int) -> int:
        projections = (2 * tokens + 2 * rows * keys) * inner + tokens * width
        return projections + (rows * heads * length * keys if remat == "none" else 0)

    elements = attention(length) + (attention(cross) if cross else 0)
    if remat == "none":  # inputs of sub-layers, before and after their norms
        elements += (2 + bool(cross)) * 2 * tokens * width
    dense = tokens * (hidden(config.activations, config.d_ff) + width)
    if not sparse:
        return _Bytes((elements + dense) * size, 0)
    moe = config.stack_moe[stack]
    inside = hidden(moe.expert_activations or config.activations, moe.expert_d_ff or config.d_ff)
    elements += tokens * moe.num_shared_experts * inside + dense * config.extra_mlp
    if remat == "dots":  # the experts' matmuls have a batch dimension
        return _Bytes(elements * size, 0)
    groups, group_tokens = group_shape(rows, length, moe.group_size)
    slots = groups * moe.num_experts * moe.capacity(group_tokens, train=True)
    if moe.backend(train=True) == "grouped":
        slots = expert_devices * tokens * moe.num_choices
    router = tokens * moe.num_experts * 4 * 2
    return _Bytes(elements * size + router, slots * (2 * width + inside) * size)


def check_parameters(config: ModelConfig, *, gradients: bool = True) -> None:
    """Check that parameters and gradients have a place, before anything is traced or allocated.

    They are the least that training needs, spread over all devices; without `gradients`, where
    not all is trained, the parameters are.

    Raises:
      UserError: more than all devices can hold.
    """
    count, have = jax.device_count(), available()
    need = (2 if gradients else 1) * 4 * config.num_params
    if need > count * have:
        raise UserError(
            f"a model of {config.num_params:,} parameters needs {need / count / 2**30:,.1f} GiB on "
            f"each of {count} device(s) for parameters{' and gradients' * gradients} alone, and "
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
