"""Examples into rows of fixed lengths, several to a row, and rows into a `Batch`. NumPy only."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from switchx.batch import Batch
from switchx.data.examples import ranges
from switchx.data.objectives import Sides
from switchx.data.span_corruption import Example

Row = Sequence[Example]

# Rows kept open at once. On the instruction tasks at 512/114 one fills 0.88 of the places, 16 fill
# 0.91, and any more no more than that.
OPEN_ROWS = 16


def pack(
    lengths: Iterable[tuple[int, int]],
    inputs_length: int,
    targets_length: int,
    open_rows: int = OPEN_ROWS,
) -> Iterator[list[int]]:
    """Rows, as numbers of examples that fit `inputs_length` and `targets_length` together.

    First fit: an example, given by the lengths of its sides, goes into the oldest open row with
    room for both; when there is none, the oldest row is given out and a new one opened. Every
    example comes out once.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    for number, (inputs, targets) in enumerate(lengths):
        for i, (inputs_room, targets_room) in enumerate(rooms):
            if inputs <= inputs_room and targets <= targets_room:
                rows[i].append(number)
                rooms[i] = (inputs_room - inputs, targets_room - targets)
                break
        else:
            if len(rows) == open_rows:
                yield rows.pop(0)
                rooms.pop(0)
            rows.append([number])
            rooms.append((inputs_length - inputs, targets_length - targets))
        # A full row can take nothing more, and would only age the others.
        while rooms and min(rooms[0]) == 0:
            yield rows.pop(0)
            rooms.pop(0)
    yield from rows


class BatchWriter:
    """Rows of zeros that examples are written into, many at a time.

    Segments are numbered from 1 in each row. Decoder inputs are each segment's targets shifted
    right behind the start id 0.
    """

    def __init__(self, num_rows: int, inputs_length: int, targets_length: int) -> None:
        self._encoder = {key: np.zeros([num_rows, inputs_length], np.int32) for key in _KEYS}
        self._decoder = {key: np.zeros([num_rows, targets_length], np.int32) for key in _KEYS}

    def write(self, places: "Places", tokens: Sides, task_id: int = 0) -> None:
        """Write examples of a task, whose tokens are concatenated in the order of their places."""
        _write(self._encoder, places.rows, places.segments, places.inputs, tokens.inputs, task_id)
        _write(self._decoder, places.rows, places.segments, places.targets, tokens.targets, task_id)

    def batch(self) -> Batch:
        """The finished batch."""
        encoder, decoder = self._encoder, self._decoder
        previous = np.zeros_like(decoder["tokens"])
        previous[:, 1:] = decoder["tokens"][:, :-1]
        previous[decoder["positions"] == 0] = 0
        return Batch(
            encoder_tokens=encoder["tokens"],
            encoder_segment_ids=encoder["segment_ids"],
            encoder_positions=encoder["positions"],
            decoder_input_tokens=previous,
            decoder_target_tokens=decoder["tokens"],
            decoder_segment_ids=decoder["segment_ids"],
            decoder_positions=decoder["positions"],
            decoder_loss_weights=(decoder["segment_ids"] > 0).astype(np.float32),
            encoder_task_ids=encoder["task_ids"],
            decoder_task_ids=decoder["task_ids"],
        )


class Span(NamedTuple):
    """Where each example lies in its row on one side: first column, and tokens."""

    starts: Int[np.ndarray, " examples"]
    lengths: Int[np.ndarray, " examples"]


class Places(NamedTuple):
    """Where examples lie in a batch: row, segment from 1, columns of either side."""

    rows: Int[np.ndarray, " examples"]
    segments: Int[np.ndarray, " examples"]
    inputs: Span
    targets: Span

    def take(self, which: np.ndarray) -> "Places":
        """The places of some of the examples."""
        inputs, targets = (Span(*(part[which] for part in side)) for side in self[2:])
        return Places(self.rows[which], self.segments[which], inputs, targets)


def places(
    rows: np.ndarray, counts: np.ndarray, inputs_lengths: np.ndarray, targets_lengths: np.ndarray
) -> Places:
    """Examples one behind the other: `counts[i]` of them in row `rows[i]`, in order."""
    first = np.repeat(np.cumsum(counts) - counts, counts)

    def span(lengths: np.ndarray) -> Span:
        before = np.cumsum(lengths) - lengths
        return Span(before - before[first], lengths)

    segments = np.arange(len(first)) - first + 1
    return Places(np.repeat(rows, counts), segments, span(inputs_lengths), span(targets_lengths))


def assemble(rows: Sequence[Row], num_rows: int, inputs_length: int, targets_length: int) -> Batch:
    """A `Batch` of `num_rows` rows; rows that are not given are padding, all zeros."""
    writer = BatchWriter(num_rows, inputs_length, targets_length)
    sides = [[example[side] for row in rows for example in row] for side in range(2)]
    if sides[0]:
        lengths = (np.fromiter(map(len, side), np.int64) for side in sides)
        counts = np.fromiter(map(len, rows), np.int64)
        where = places(np.arange(len(rows)), counts, *lengths)
        writer.write(where, Sides(*map(np.concatenate, sides)))
    return writer.batch()


_KEYS = ("tokens", "segment_ids", "positions", "task_ids")


def _write(
    arrays: Mapping[str, np.ndarray],
    rows: np.ndarray,
    segments: np.ndarray,
    span: Span,
    tokens: np.ndarray,
    task_id: int,
) -> None:
    # Where an example's tokens begin in the flat batch, and where in `tokens`.
    begins = rows * arrays["tokens"].shape[1] + span.starts
    positions = ranges(np.zeros_like(span.lengths), span.lengths)
    where = np.repeat(begins, span.lengths) + positions
    arrays["tokens"].ravel()[where] = tokens
    arrays["segment_ids"].ravel()[where] = np.repeat(segments, span.lengths)
    arrays["positions"].ravel()[where] = positions
    if task_id:
        arrays["task_ids"].ravel()[where] = task_id
