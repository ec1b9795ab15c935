"""The objectives on many rows of equal length at once, in NumPy.

The laws are those of `switchx.data.span_corruption`, which says them for one row. An objective
draws its noise first and applies it later, so that lengths are known before tokens are read.
Letters: R rows, N tokens of a row, K spans.
"""

import dataclasses
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Int

from switchx.data.span_corruption import EOS, noise_counts, span_lengths


class Sides(NamedTuple):
    """Inputs and targets of rows, concatenated, EOS included."""

    inputs: Int[np.ndarray, " inputs"]
    targets: Int[np.ndarray, " targets"]


class Objective(Protocol):
    """Rows of raw tokens to inputs and targets."""

    @property
    def raw_length(self) -> int:
        """Tokens of a full row."""
        ...

    def draw(self, num_rows: int, length: int, rng: np.random.Generator) -> np.ndarray:
        """Noise of rows of `length` >= 2 tokens; its first axis is the rows'."""
        ...

    def lengths(self, noise: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets tokens of each row, EOS included, both [R]."""
        ...

    def apply(self, rows_RN: np.ndarray, noise: np.ndarray) -> Sides:
        """Inputs and targets of rows, under the noise that was drawn for them."""
        ...


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
    """T5's span corruption. Noise is the lengths of kept and noise spans in turn, [R, 2 K]."""

    inputs_length: int
    vocab_size: int
    noise_density: float
    mean_span_length: float

    @property
    def raw_length(self) -> int:
        """Tokens of a full row."""
        return span_lengths(
            self.inputs_length, self.noise_density, self.mean_span_length
        ).raw_tokens_length

    def draw(self, num_rows: int, length: int, rng: np.random.Generator) -> np.ndarray:
        """Two uniformly random compositions a row: of its kept and of its noise tokens."""
        num_noise, num_spans = noise_counts(length, self.noise_density, self.mean_span_length)
        kept_RK = random_compositions(num_rows, length - num_noise, num_spans, rng)
        noise_RK = random_compositions(num_rows, num_noise, num_spans, rng)
        return np.stack([kept_RK, noise_RK], axis=2).reshape(num_rows, 2 * num_spans)

    def lengths(self, noise: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The same for every row of a length."""
        num_noise, num_spans = noise_counts(length, self.noise_density, self.mean_span_length)
        inputs, targets = length - num_noise + num_spans + 1, num_noise + num_spans + 1
        return np.full(len(noise), inputs), np.full(len(noise), targets)

    def apply(self, rows_RN: np.ndarray, noise: np.ndarray) -> Sides:
        """Every span of one kind leaves a sentinel, counting down from the last id."""
        num_rows, length = rows_RN.shape
        num_spans = noise.shape[1] // 2
        mask_RN = noise_mask(noise)
        ends = noise.cumsum(axis=1, dtype=np.int64) + length * np.arange(num_rows)[:, None]
        noise_starts = ends[:, 0::2]
        kept_starts = ends[:, 1::2] - noise[:, 0::2] - noise[:, 1::2]
        sentinels = self.vocab_size - 1 - np.arange(num_spans)
        return Sides(
            _hide(rows_RN, mask_RN, noise_starts, sentinels),
            _hide(rows_RN, ~mask_RN, kept_starts, sentinels),
        )


@dataclasses.dataclass(frozen=True)
class PrefixLm:
    """Prefix language modelling. Noise is the number of target tokens of each row, [R, 1]."""

    inputs_length: int
    targets_length: int

    @property
    def raw_length(self) -> int:
        """Tokens of a full row."""
        return self.inputs_length

    def draw(self, num_rows: int, length: int, rng: np.random.Generator) -> np.ndarray:
        """Uniform in 1 .. min(length, targets_length) - 1."""
        return rng.integers(1, min(length, self.targets_length), (num_rows, 1))

    def lengths(self, noise: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The two parts of a row, each with EOS."""
        return length - noise[:, 0] + 1, noise[:, 0] + 1

    def apply(self, rows_RN: np.ndarray, noise: np.ndarray) -> Sides:
        """Rows cut in two; EOS ends both parts."""
        num_rows, length = rows_RN.shape
        cut_R1 = length - noise
        column_RN = np.arange(length + 1)[None]
        with_eos = np.full((num_rows, length + 1), EOS, rows_RN.dtype)
        with_eos[:, :length] = rows_RN
        targets = with_eos[column_RN >= cut_R1]
        np.put_along_axis(with_eos, cut_R1, EOS, axis=1)
        return Sides(with_eos[column_RN <= cut_R1], targets)


def random_compositions(
    num_rows: int, total: int, parts: int, rng: np.random.Generator
) -> Int[np.ndarray, "R parts"]:
    """Rows of uniformly random positive integers, `parts` of them, that sum to `total`."""
    bounds = np.empty((num_rows, parts + 1), np.int32)
    bounds[:, 0], bounds[:, -1] = 0, total
    if 1 < parts < total:
        # The places of the smallest of total - 1 random keys are a uniform choice of cuts.
        keys = rng.random((num_rows, total - 1))
        cuts = np.argpartition(keys, parts - 2, axis=1)[:, : parts - 1]
        bounds[:, 1:-1] = np.sort(cuts, axis=1) + 1
    elif parts > 1:
        bounds[:, 1:-1] = np.arange(1, parts)
    return np.diff(bounds, axis=1)


def noise_mask(noise: Int[np.ndarray, "R spans"]) -> Bool[np.ndarray, "R N"]:
    """True on noise tokens, given the lengths of kept and noise spans in turn."""
    pattern = np.zeros(noise.shape, bool)
    pattern[:, 1::2] = True
    return np.repeat(pattern.ravel(), noise.ravel()).reshape(len(noise), -1)


def _hide(
    rows_RN: np.ndarray, hidden_RN: np.ndarray, starts: np.ndarray, sentinels: np.ndarray
) -> np.ndarray:
    num_rows = len(rows_RN)
    tokens = rows_RN.copy()
    tokens.ravel()[starts] = sentinels
    chosen = ~hidden_RN
    chosen.ravel()[starts] = True
    kept = tokens[chosen].reshape(num_rows, -1)
    out = np.full((num_rows, kept.shape[1] + 1), EOS, kept.dtype)
    out[:, :-1] = kept
    return out.ravel()
