"""Layers as a scan sees them: repeating segments, and parameters stacked or named by layer."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from switchx.models.config import ModelConfig


class Segment(NamedTuple):
    """A pattern of (sparse or dense) layers that repeats, beginning at `first_layer`."""

    first_layer: int
    pattern: tuple[bool, ...]
    repeats: int


def segments(sparse: tuple[bool, ...]) -> tuple[Segment, ...]:
    """Split a stack into repeating patterns, always taking the longest stretch that repeats.

    A 12-layer stack with every other layer sparse is one segment of 6 (dense, sparse) blocks;
    27 layers with every fourth sparse are 6 blocks of 4 and then one of 3.
    """
    found: list[Segment] = []
    start = 0
    while start < len(sparse):
        rest = sparse[start:]
        best = Segment(start, rest, 1)
        covered = 0
        for period in range(1, len(rest) // 2 + 1):
            repeats = 1
            while rest[repeats * period : (repeats + 1) * period] == rest[:period]:
                repeats += 1
            if repeats > 1 and repeats * period > covered:
                best, covered = Segment(start, rest[:period], repeats), repeats * period
        found.append(best)
        start += len(best.pattern) * best.repeats
    return tuple(found)


def sparse_layers(config: ModelConfig, stack: str) -> list[tuple[tuple[str, ...], list[int]]]:
    """Where the parameters of a stack's sparse layers are: path, and the layers stacked there."""
    sparse = config.encoder_sparse if stack == "encoder" else config.decoder_sparse
    if not config.scan_layers:
        return [((f"layers_{n}",), [n]) for n, is_sparse in enumerate(sparse) if is_sparse]
    return [
        (
            (f"blocks_{first}", f"layers_{index}"),
            [first + index + repeat * len(pattern) for repeat in range(repeats)],
        )
        for first, pattern, repeats in segments(sparse)
        for index, is_sparse in enumerate(pattern)
        if is_sparse
    ]


def stack_layers(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Parameters named by layer (`scan_layers=False`) → stacked by block (`scan_layers=True`)."""

    def stack(layers: dict[str, Any], sparse: tuple[bool, ...]) -> dict[str, Any]:
        layers = dict(layers)
        for first, pattern, repeats in segments(sparse):
            block = {}
            for index in range(len(pattern)):
                numbers = range(first + index, first + len(pattern) * repeats, len(pattern))
                same = [layers.pop(f"layers_{number}") for number in numbers]
                block[f"layers_{index}"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *same)
            layers[f"blocks_{first}"] = block
        return layers

    return _convert(params, config, stack)


def unstack_layers(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Parameters stacked by block → named by layer; the inverse of `stack_layers`."""

    def unstack(layers: dict[str, Any], sparse: tuple[bool, ...]) -> dict[str, Any]:
        layers = dict(layers)
        for first, pattern, repeats in segments(sparse):
            block = layers.pop(f"blocks_{first}")
            for index in range(len(pattern)):
                for repeat in range(repeats):
                    number = first + repeat * len(pattern) + index
                    layers[f"layers_{number}"] = jax.tree.map(
                        lambda leaf, repeat=repeat: leaf[repeat], block[f"layers_{index}"]
                    )
        return layers

    return _convert(params, config, unstack)


def _convert(params: Mapping[str, Any], config: ModelConfig, change: Any) -> dict[str, Any]:
    encoder = change(params["encoder"], config.encoder_sparse)
    decoder = change(params["decoder"], config.decoder_sparse)
    return {**params, "encoder": encoder, "decoder": decoder}
