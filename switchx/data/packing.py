"""Examples into rows of fixed lengths, several to a row, and rows into a `Batch`. NumPy only."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from switchx.batch import Batch
from switchx.data.span_corruption import Example

# Rows kept open at once. More fill better (0.80 with 1, 0.92 with 16, on the instruction tasks at
# 512/114) and hold more examples back; a row that stays open long is no more random than the data.
OPEN_ROWS = 16

Row = Sequence[Example]


def pack(
    examples: Iterable[Example],
    inputs_length: int,
    targets_length: int,
    open_rows: int = OPEN_ROWS,
) -> Iterator[Row]:
    """Rows of examples that fit `inputs_length` and `targets_length` tokens together.

    First fit: an example goes into the oldest open row with room for both its sides; when there
    is none, the oldest row is given out and a new one opened. Every example comes out once.
    """
    rows: list[list[Example]] = []
    rooms: list[tuple[int, int]] = []
    for example in examples:
        inputs, targets = len(example.inputs), len(example.targets)
        for i, (inputs_room, targets_room) in enumerate(rooms):
            if inputs <= inputs_room and targets <= targets_room:
                rows[i].append(example)
                rooms[i] = (inputs_room - inputs, targets_room - targets)
                break
        else:
            if len(rows) == open_rows:
                yield rows.pop(0)
                rooms.pop(0)
            rows.append([example])
            rooms.append((inputs_length - inputs, targets_length - targets))
        # A full row can take nothing more, and would only age the others.
        while rooms and min(rooms[0]) == 0:
            yield rows.pop(0)
            rooms.pop(0)
    yield from rows


def assemble(rows: Sequence[Row], num_rows: int, inputs_length: int, targets_length: int) -> Batch:
    """A `Batch` of `num_rows` rows; rows that are not given are padding, all zeros.

    Segments are numbered from 1 in each row. Decoder inputs are each segment's targets shifted
    right behind the start id 0.
    """
    encoder = {key: np.zeros([num_rows, inputs_length], np.int32) for key in _KEYS}
    decoder = {key: np.zeros([num_rows, targets_length], np.int32) for key in (*_KEYS, "previous")}
    for i, row in enumerate(rows):
        _write(encoder, i, [example.inputs for example in row])
        _write(decoder, i, [example.targets for example in row])
    decoder["previous"][:, 1:] = decoder["tokens"][:, :-1]
    decoder["previous"][decoder["positions"] == 0] = 0
    return Batch(
        encoder_tokens=encoder["tokens"],
        encoder_segment_ids=encoder["segment_ids"],
        encoder_positions=encoder["positions"],
        decoder_input_tokens=decoder["previous"],
        decoder_target_tokens=decoder["tokens"],
        decoder_segment_ids=decoder["segment_ids"],
        decoder_positions=decoder["positions"],
        decoder_loss_weights=(decoder["segment_ids"] > 0).astype(np.float32),
    )


_KEYS = ("tokens", "segment_ids", "positions")


def _write(arrays: dict[str, np.ndarray], i: int, sequences: Sequence[np.ndarray]) -> None:
    start = 0
    for segment, tokens in enumerate(sequences, start=1):
        end = start + len(tokens)
        arrays["tokens"][i, start:end] = tokens
        arrays["segment_ids"][i, start:end] = segment
        arrays["positions"][i, start:end] = np.arange(len(tokens))
        start = end
