"""Span corruption and prefix language modelling as laws on one row of tokens, in NumPy.

Source: Raffel et al. 2020 (https://arxiv.org/abs/1910.10683), sections 3.1.4 and 3.3. The
TensorFlow form of the same laws, many rows at a time, is `switchx.data.preprocessors`.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from switchx.errors import UserError

NOISE_DENSITY = 0.15
MEAN_SPAN_LENGTH = 3.0
NUM_SENTINELS = 100
EOS = 1


class NoiseCounts(NamedTuple):
    """How many tokens of a row are noise, and in how many spans."""

    num_noise: int
    num_spans: int


class SpanLengths(NamedTuple):
    """Raw tokens to take per row, and the targets length they turn into (EOS included)."""

    raw_tokens_length: int
    targets_length: int


class Example(NamedTuple):
    """One row's inputs and targets, each ending in EOS."""

    inputs: Int[np.ndarray, " S"]
    targets: Int[np.ndarray, " T"]


def noise_counts(
    length: int,
    noise_density: float = NOISE_DENSITY,
    mean_span_length: float = MEAN_SPAN_LENGTH,
) -> NoiseCounts:
    """Noise tokens and noise spans of a row of `length` tokens (at least 2).

    num_noise = round(length * density) within [1, length - 1]; num_spans = round(num_noise / mean)
    but at least 1 and no more than there are tokens of either kind to start one with. Halves
    round to even.
    """
    if length < 2:
        raise ValueError(f"a row of {length} tokens has no room for a noise and a kept token")
    num_noise = min(max(round(length * noise_density), 1), length - 1)
    num_spans = max(round(num_noise / mean_span_length), 1)
    return NoiseCounts(num_noise, min(num_spans, num_noise, length - num_noise))


def span_lengths(
    inputs_length: int,
    noise_density: float = NOISE_DENSITY,
    mean_span_length: float = MEAN_SPAN_LENGTH,
) -> SpanLengths:
    """The most raw tokens whose corrupted inputs fill `inputs_length`, and their targets' length.

    A row of n tokens becomes n - num_noise + num_spans + 1 inputs and num_noise + num_spans + 1
    targets (one sentinel a span, one EOS): 568 raw tokens become 512 and 114.

    Raises:
      UserError: inputs_length cannot hold the shortest row, or needs more than 100 sentinels.
    """
    _check_noise(noise_density, mean_span_length)

    def inputs_of(length: int) -> int:
        num_noise, num_spans = noise_counts(length, noise_density, mean_span_length)
        return length - num_noise + num_spans + 1

    length = 2
    if inputs_of(length) > inputs_length:
        raise UserError(
            f"inputs length {inputs_length} is too short for span corruption; use at least 3"
        )
    # One more raw token adds at most one input token, so the first misfit ends the search.
    while inputs_of(length + 1) <= inputs_length:
        length += 1
    num_noise, num_spans = noise_counts(length, noise_density, mean_span_length)
    if num_spans > NUM_SENTINELS:
        raise UserError(
            f"inputs length {inputs_length} needs {num_spans} sentinels a row and the vocabulary "
            f"has {NUM_SENTINELS}; shorten inputs or raise the mean span length"
        )
    return SpanLengths(length, num_noise + num_spans + 1)


def noise_mask(
    length: int,
    rng: np.random.Generator,
    noise_density: float = NOISE_DENSITY,
    mean_span_length: float = MEAN_SPAN_LENGTH,
) -> Bool[np.ndarray, " N"]:
    """True on noise tokens. Kept and noise spans alternate, beginning with a kept one.

    The lengths of either kind are a uniformly random composition of their sum.
    """
    num_noise, num_spans = noise_counts(length, noise_density, mean_span_length)
    kept = _random_composition(length - num_noise, num_spans, rng)
    noise = _random_composition(num_noise, num_spans, rng)
    lengths = np.stack([kept, noise], axis=1).reshape(-1)
    return np.repeat(np.tile([False, True], num_spans), lengths)


def apply_mask(
    tokens: Int[np.ndarray, " N"], mask: Bool[np.ndarray, " N"], vocab_size: int
) -> Example:
    """Split a row by its noise mask: every hidden span leaves one sentinel, EOS ends both sides.

    Inputs keep the tokens outside the mask, targets those inside. The i-th sentinel of either
    side is id vocab_size - 1 - i, so a target's sentinel names the span it fills.
    """
    return Example(
        _hide(tokens, mask, vocab_size),
        _hide(tokens, ~mask, vocab_size),
    )


def corrupt(
    tokens: Int[np.ndarray, " N"],
    rng: np.random.Generator,
    vocab_size: int,
    noise_density: float = NOISE_DENSITY,
    mean_span_length: float = MEAN_SPAN_LENGTH,
) -> Example:
    """Span corruption of one row of at least 2 tokens."""
    mask = noise_mask(len(tokens), rng, noise_density, mean_span_length)
    return apply_mask(tokens, mask, vocab_size)


def split_prefix(
    tokens: Int[np.ndarray, " N"], rng: np.random.Generator, targets_length: int
) -> Example:
    """Prefix language modelling: a row cut in two at a random point.

    The number of target tokens is uniform in 1 .. min(N, targets_length) - 1, which leaves room
    for EOS; where targets_length >= N this is the uniform split of the T5 paper's prefix LM.
    """
    num_targets = int(rng.integers(1, min(len(tokens), targets_length)))
    cut = len(tokens) - num_targets
    return Example(np.append(tokens[:cut], EOS), np.append(tokens[cut:], EOS))


def _check_noise(noise_density: float, mean_span_length: float) -> None:
    if not 0.0 < noise_density < 1.0:
        raise UserError(f"noise density {noise_density!r} must be between 0 and 1, both excluded")
    if not mean_span_length >= 1.0:
        raise UserError(f"mean span length {mean_span_length!r} must be at least 1")


def _random_composition(
    total: int, parts: int, rng: np.random.Generator
) -> Int[np.ndarray, " parts"]:
    """Uniformly random positive integers, `parts` of them, that sum to `total`."""
    cuts = np.sort(rng.choice(total - 1, size=parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]).astype(np.int64))


def _hide(
    tokens: Int[np.ndarray, " N"], hidden: Bool[np.ndarray, " N"], vocab_size: int
) -> Int[np.ndarray, " S"]:
    starts = hidden & ~np.concatenate([[False], hidden[:-1]])
    sentinels = vocab_size - np.cumsum(starts)
    kept = np.where(starts, sentinels, tokens)[starts | ~hidden]
    return np.append(kept, EOS).astype(tokens.dtype)
