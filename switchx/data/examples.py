"""The examples of a cached task as an endless numbered sequence, readable at any place. NumPy only.

Example number n is in epoch n // count, and every epoch is a permutation of its own, drawn from
the seed, the task's name and the epoch's number. So nothing needs to be read to continue anywhere.
"""

import functools
import hashlib
from typing import Protocol

import numpy as np
from jaxtyping import Int

from switchx.data.objectives import Objective, Sides
from switchx.data.span_corruption import EOS
from switchx.data.token_cache import Ragged

# A longer document gives one random window an epoch, so that a book does not drown the rest.
MAX_DOCUMENT_TOKENS = 65536


class Drawn(Protocol):
    """Some examples: their lengths, and their tokens once they are asked for."""

    inputs_lengths: Int[np.ndarray, " examples"]
    targets_lengths: Int[np.ndarray, " examples"]

    def read(self, which: Int[np.ndarray, " chosen"]) -> Sides:
        """Tokens of the chosen ones, in the order asked for."""
        ...


class Examples(Protocol):
    """A task's examples."""

    count: int
    mean_length: float

    def draw(self, numbers: Int[np.ndarray, " examples"], rng: np.random.Generator) -> Drawn:
        """The examples of these numbers; `rng` draws what is random within an example."""
        ...


def generator(*parts: int | str) -> np.random.Generator:
    """A random generator of its own for each combination of parts, the same in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def ranges(starts: np.ndarray, lengths: np.ndarray) -> Int[np.ndarray, " total"]:
    """The integers of starts[i] .. starts[i] + lengths[i] - 1 for every i, one after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total)


class PairExamples:
    """Inputs and targets as they are, cut to the lengths of a row.

    An example that ends in EOS still does when it is cut, as in seqio's append_eos_after_trim.
    """

    def __init__(
        self,
        inputs: Ragged,
        targets: Ragged,
        limits: tuple[int, int],
        *,
        shuffle: bool,
        key: tuple[int | str, ...],
    ) -> None:
        """`limits` are the most inputs and targets tokens; `key` is what orders are drawn from."""
        self._sides = inputs, targets
        self._limits = limits
        self._order = _Orders(len(inputs.offsets) - 1, shuffle, (*key, "examples"))
        self.count = self._order.count
        self.mean_length = sum(
            float(np.minimum(side.lengths, limit).mean()) if self.count else 0.0
            for side, limit in zip(self._sides, limits, strict=True)
        )

    def draw(self, numbers: np.ndarray, rng: np.random.Generator) -> "_DrawnPairs":
        """The examples of these numbers. Nothing in them is random."""
        del rng
        return _DrawnPairs(*self._sides, self._limits, self._order.items(numbers))


class _DrawnPairs:
    def __init__(
        self, inputs: Ragged, targets: Ragged, limits: tuple[int, int], items: np.ndarray
    ) -> None:
        self._sides = inputs, targets
        self._items = items
        self.inputs_lengths, self.targets_lengths = (
            np.minimum(side.offsets[items + 1] - side.offsets[items], limit)
            for side, limit in zip(self._sides, limits, strict=True)
        )

    def read(self, which: np.ndarray) -> Sides:
        items = self._items[which]
        return Sides(
            _cut(self._sides[0], items, self.inputs_lengths[which]),
            _cut(self._sides[1], items, self.targets_lengths[which]),
        )


def _cut(side: Ragged, items: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    tokens = side.tokens[ranges(side.offsets[items], lengths)]
    ends = side.offsets[items + 1]
    is_cut = lengths < ends - side.offsets[items]
    if is_cut.any():
        last = (np.cumsum(lengths) - 1)[is_cut]
        ended = side.tokens[ends[is_cut] - 1] == EOS
        tokens[last[ended]] = EOS
    return tokens


class TextExamples:
    """Rows of a language-modelling objective.

    An epoch's documents are put in an order, one after the other, and cut into rows of the
    objective's raw length; the rows have an order of their own, because neighbours are of one
    document. What is left over is one shorter row, unless it is a single token.
    """

    def __init__(
        self,
        documents: Ragged,
        objective: Objective,
        *,
        shuffle: bool,
        key: tuple[int | str, ...],
        max_document_tokens: int = MAX_DOCUMENT_TOKENS,
    ) -> None:
        """`key` is what orders and windows are drawn from."""
        self._documents = documents
        self._objective = objective
        self._key = key
        lengths = documents.lengths
        # Windows of one document are equally long, so that every epoch has as many rows.
        self._num_windows = np.maximum(-(-lengths // max_document_tokens), 1)
        self._lengths = lengths // self._num_windows
        self._total = int(self._lengths.sum())
        self._raw = objective.raw_length
        count = self._total // self._raw + (self._total % self._raw >= 2)
        self._documents_order = _Orders(len(lengths), shuffle, (*key, "documents"))
        self._rows_order = _Orders(count, shuffle, (*key, "rows"))
        self._layout = functools.lru_cache(maxsize=2)(self._make_layout)
        self.count = count
        self.mean_length = float(self._raw)

    def draw(self, numbers: np.ndarray, rng: np.random.Generator) -> "_DrawnText":
        """The rows of these numbers, with their noise."""
        rows = self._rows_order.items(numbers)
        starts, lengths, counts = [], [], []
        # Numbers go up, so those of one epoch are neighbours.
        for epoch in np.unique(numbers // self.count) if len(numbers) else ():
            in_epoch = rows[numbers // self.count == epoch]
            for found, more in zip(
                (starts, lengths, counts), self._pieces(int(epoch), in_epoch), strict=True
            ):
                found.append(more)
        pieces = (np.concatenate(part) if part else _NONE for part in (starts, lengths, counts))
        row_lengths = np.minimum(self._total - rows * self._raw, self._raw)
        return _DrawnText(self._documents.tokens, self._objective, row_lengths, *pieces, rng=rng)

    def _make_layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Where each document begins in the cache, and ends in the epoch, in its order."""
        rng = generator(*self._key, "windows", epoch)
        starts = self._documents.offsets[:-1]
        (long,) = np.nonzero(self._num_windows > 1)
        if len(long):
            starts = starts.copy()
            windows, lengths = self._num_windows[long], self._lengths[long]
            slack = self._documents.lengths[long] - windows * lengths
            starts[long] += rng.integers(0, windows) * lengths + rng.integers(0, slack + 1)
        order = self._documents_order.order(epoch)
        return starts[order], np.cumsum(self._lengths[order])

    def _pieces(self, epoch: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The stretches of the cache that rows are made of: starts, lengths, number of each row."""
        starts, ends = self._layout(epoch)
        low = rows * self._raw
        high = np.minimum(low + self._raw, self._total)
        first = np.searchsorted(ends, low, side="right")
        last = np.searchsorted(ends, high, side="left")
        counts = last - first + 1
        documents = ranges(first, counts)
        begins = ends[documents] - self._lengths[self._documents_order.order(epoch)[documents]]
        low, high = np.repeat(low, counts), np.repeat(high, counts)
        from_, to = np.maximum(low, begins), np.minimum(high, ends[documents])
        return starts[documents] + from_ - begins, to - from_, counts


class _DrawnText:
    def __init__(
        self,
        tokens: np.ndarray,
        objective: Objective,
        row_lengths: np.ndarray,
        piece_starts: np.ndarray,
        piece_lengths: np.ndarray,
        piece_counts: np.ndarray,
        *,
        rng: np.random.Generator,
    ) -> None:
        self._tokens = tokens
        self._objective = objective
        self._row_lengths = row_lengths
        self._piece_starts, self._piece_lengths = piece_starts, piece_lengths
        self._piece_counts = piece_counts
        self._first_piece = np.cumsum(piece_counts) - piece_counts
        self.inputs_lengths = np.zeros(len(row_lengths), np.int64)
        self.targets_lengths = np.zeros(len(row_lengths), np.int64)
        # Rows of one length are corrupted together: full ones, and an epoch's last.
        self._noise: dict[int, np.ndarray] = {}
        self._place = np.zeros(len(row_lengths), np.int64)
        for length in map(int, np.unique(row_lengths)):
            same = row_lengths == length
            noise = self._noise[length] = objective.draw(int(same.sum()), length, rng)
            self._place[same] = np.arange(len(noise))
            self.inputs_lengths[same], self.targets_lengths[same] = objective.lengths(noise, length)

    def read(self, which: np.ndarray) -> Sides:
        lengths = self._row_lengths[which]
        if len(self._noise) == 1:
            return self._read_equal(which)
        # Rows of one length at a time, put where they were asked for.
        sides = [
            np.empty(all_lengths[which].sum(), self._tokens.dtype)
            for all_lengths in (self.inputs_lengths, self.targets_lengths)
        ]
        for length in np.unique(lengths):
            same = lengths == length
            for side, found, each in zip(
                sides,
                self._read_equal(which[same]),
                (self.inputs_lengths[which], self.targets_lengths[which]),
                strict=True,
            ):
                side[ranges((np.cumsum(each) - each)[same], each[same])] = found
        return Sides(*sides)

    def _read_equal(self, which: np.ndarray) -> Sides:
        pieces = ranges(self._first_piece[which], self._piece_counts[which])
        places = ranges(self._piece_starts[pieces], self._piece_lengths[pieces])
        length = int(self._row_lengths[which[0]]) if len(which) else next(iter(self._noise))
        rows_RN = self._tokens[places].reshape(len(which), length)
        return self._objective.apply(rows_RN, self._noise[length][self._place[which]])


_NONE = np.zeros(0, np.int64)


class _Orders:
    """A permutation of `count` items for every epoch."""

    def __init__(self, count: int, shuffle: bool, key: tuple[int | str, ...]) -> None:
        self.count = count
        self._shuffle = shuffle
        self._key = key
        self.order = functools.lru_cache(maxsize=2)(self._draw)

    def _draw(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(self.count)
        return generator(*self._key, epoch).permutation(self.count)

    def items(self, numbers: np.ndarray) -> np.ndarray:
        """The item of each number: that of its place in its epoch."""
        epochs, places = np.divmod(numbers, max(self.count, 1))
        items = np.empty(len(numbers), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            items[here] = self.order(int(epoch))[places[here]]
        return items
