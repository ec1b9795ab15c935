"""Batches made of token caches: no TensorFlow, and every place of the stream is found at once.

The stream is cut into windows of about `WINDOW_TOKENS` tokens. A window is a function of its
number alone: which examples it has, their noise, and the rows they are packed into. A batch is
consecutive rows of the endless sequence of windows; only a host's own rows are read.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from switchx.batch import Batch
from switchx.data.examples import Drawn, Examples, PairExamples, TextExamples, generator
from switchx.data.objectives import Objective, PrefixLm, SpanCorruption
from switchx.data.packing import BatchWriter, pack, places
from switchx.data.token_cache import TokenCache
from switchx.data.vocabulary import size
from switchx.errors import UserError

if TYPE_CHECKING:
    from switchx.data.pipeline import DataConfig

WINDOW_TOKENS = 2**20
# Fewer examples pack badly; more make a window slow to begin.
WINDOW_EXAMPLES = (64, 16384)
_GOLDEN = 0.6180339887498949
# Of the law from data, seed and position to batches. Raise it with every change that would let a
# resumed run draw other batches than it would have; a test holds the first batches to it.
LAW = 1


@dataclasses.dataclass(frozen=True)
class Member:
    """A task of a mixture: its name, tokens, share and number. A task alone has share 1."""

    name: str
    cache: TokenCache
    rate: float = 1.0
    task_id: int = 0


def examples_of(
    config: "DataConfig", cache: TokenCache, split: str, *, shuffle: bool, seed: int
) -> Examples:
    """The examples of a cached task's split under the configuration's lengths and objective."""
    lengths = config.task_feature_lengths["inputs"], config.task_feature_lengths["targets"]
    key = (seed, cache.info["task"])
    if cache.objective == "supervised":
        inputs, targets = (cache.read(split, field) for field in ("inputs", "targets"))
        return PairExamples(inputs, targets, lengths, shuffle=shuffle, key=key)
    objective: Objective = PrefixLm(*lengths)
    if cache.objective == "span_corruption":
        vocab_size = size(config.vocabulary)
        objective = SpanCorruption(
            lengths[0], vocab_size, config.noise_density, config.mean_span_length
        )
    return TextExamples(cache.read(split, "text"), objective, shuffle=shuffle, key=key)


class Window:
    """Examples of one or more tasks, and the rows they make."""

    def __init__(
        self,
        config: "DataConfig",
        drawn: Sequence[Drawn],
        member: np.ndarray,
        task_ids: Sequence[int],
    ) -> None:
        """`member[i]` is which of `drawn` example i is from; each is used in its own order."""
        self._drawn = drawn
        self._task_ids = task_ids
        self._member = member
        self._index = np.empty(len(member), np.int64)
        lengths = np.empty((2, len(member)), np.int64)
        for i, one in enumerate(drawn):
            mine = member == i
            self._index[mine] = np.arange(len(one.inputs_lengths))
            lengths[:, mine] = one.inputs_lengths, one.targets_lengths
        self._lengths = lengths
        rows: Iterator[Sequence[int]] = ([i] for i in range(len(member)))
        if config.pack:
            row_lengths = (config.task_feature_lengths[key] for key in ("inputs", "targets"))
            pairs = zip(*lengths.tolist(), strict=True)
            rows = pack(pairs, *row_lengths)
        found = list(rows)
        self._counts = np.fromiter(map(len, found), np.int64, len(found))
        self._begins = np.cumsum(self._counts) - self._counts
        self._examples = np.fromiter(itertools.chain.from_iterable(found), np.int64, len(member))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._counts)

    def write(self, writer: BatchWriter, first_row: int, start: int, stop: int) -> None:
        """Write rows start .. stop - 1 into a batch's rows from `first_row` on."""
        if start >= stop:
            return
        counts = self._counts[start:stop]
        examples = self._examples[self._begins[start] : self._begins[start] + counts.sum()]
        rows = first_row + np.arange(stop - start)
        where = places(rows, counts, *self._lengths[:, examples])
        members = self._member[examples]
        for i, drawn in enumerate(self._drawn):
            (mine,) = np.nonzero(members == i)
            if len(mine):
                tokens = drawn.read(self._index[examples[mine]])
                writer.write(where.take(mine), tokens, self._task_ids[i])


class TokenBatches(Iterator[Batch]):
    """An endless iterator of this host's rows of the training batches, from token caches.

    A task is walked in epochs, each a permutation of its own, that follow one another without
    leaving anything out. In a mixture every task repeats on its own, and a window has of each task
    exactly its share (to one example, carried on to the next window), in random order.
    `position` is {'window', 'row', 'data'}: the next row, and a fingerprint of every task.
    """

    def __init__(self, config: "DataConfig", members: Sequence[Member], rows: slice) -> None:
        """`rows` are this host's rows of a global batch."""
        self._config = config
        self._members = members
        self._rows = rows
        self._examples = [
            examples_of(config, member.cache, "train", shuffle=config.shuffle, seed=config.seed)
            for member in members
        ]
        mean = sum(
            member.rate * examples.mean_length
            for member, examples in zip(members, self._examples, strict=True)
        )
        smallest, largest = WINDOW_EXAMPLES
        self._size = int(min(max(WINDOW_TOKENS / max(mean, 1.0), smallest), largest))
        self._number = 0
        self._row = 0
        self._window: Window | None = None

    def __next__(self) -> Batch:
        """This host's rows of the next global batch, as NumPy arrays."""
        lengths = self._config.task_feature_lengths
        writer = BatchWriter(
            self._rows.stop - self._rows.start, lengths["inputs"], lengths["targets"]
        )
        filled = 0  # rows of the global batch
        while filled < self._config.batch_size:
            if self._window is None:
                self._window = self._make(self._number)
            taken = min(len(self._window) - self._row, self._config.batch_size - filled)
            start = max(filled, self._rows.start)
            stop = min(filled + taken, self._rows.stop)
            offset = self._row - filled
            self._window.write(writer, start - self._rows.start, start + offset, stop + offset)
            filled += taken
            self._row += taken
            if self._row == len(self._window):
                self._number, self._row, self._window = self._number + 1, 0, None
        return writer.batch()

    @property
    def fingerprint(self) -> str:
        """Every task with 8 hexadecimal digits that stand for its tokens: 'name=12345678 …'."""
        return " ".join(f"{member.name}={member.cache.fingerprint}" for member in self._members)

    def check(self) -> None:
        """Make the window that is next, so that what is wrong with the data shows now.

        Raises:
          UserError: a task without examples.
        """
        for member, examples in zip(self._members, self._examples, strict=True):
            if not examples.count:
                raise too_small(self._config, member.name, 0)
        self._window = self._make(self._number)
        if len(self._members) == 1:
            rows = 0
            for number in range(self._windows_per_epoch):
                rows += len(self._window if number == self._number else self._make(number))
                if rows >= self._config.batch_size:
                    return
            if not rows:
                raise too_small(self._config, self._members[0].name, rows)
            print(
                f"{self._members[0].name}: {rows} row(s) in all, fewer than BATCH_SIZE = "
                f"{self._config.batch_size}: every batch holds the data "
                f"{self._config.batch_size / rows:.3g} times",
                flush=True,
            )

    def position(self) -> dict[str, Any]:
        """Where the next batch is, as integers and a string that go into JSON."""
        return {"window": self._number, "row": self._row, "law": LAW, "data": self.fingerprint}

    def seek(self, position: Mapping[str, Any]) -> None:
        """Continue exactly as a stream at `position` would. Costs one window wherever it is.

        Raises:
          UserError: not a position of `position()`, one of another `LAW`, or one in other data.
        """
        if set(position) != {"window", "row", "law", "data"}:
            raise UserError(
                f"data position {dict(position)!r} is not one of a token cache (window, row, law, "
                "data): it was saved while the task streamed through TensorFlow or by an older "
                "version; train in a new MODEL_DIR"
            )
        check_position(position, ("window", "row"))
        if position["law"] != LAW:
            raise UserError(
                f"this run drew its batches by version {position['law']!r} of the data's law, and "
                f"this switchx has version {LAW}: go on with the switchx that began it, or train "
                "in a new MODEL_DIR"
            )
        check_same_data(self._config, str(position["data"]), self.fingerprint)
        self._number, self._row = position["window"], position["row"]
        self._window = self._make(self._number)
        if self._row and self._row >= len(self._window):
            raise UserError(
                f"data position {dict(position)!r} is past the end of its window of "
                f"{len(self._window)} rows; it was saved by another version"
            )

    @property
    def _windows_per_epoch(self) -> int:
        return -(-self._examples[0].count // self._size)

    def _make(self, number: int) -> Window:
        if len(self._examples) == 1:
            numbers, member = [self._of_epoch(number)], None
        else:
            numbers = self._of_mixture(number)
            member = np.repeat(np.arange(len(numbers)), [len(each) for each in numbers])
            generator(self._config.seed, "mixture", number).shuffle(member)
        drawn = [
            examples.draw(each, generator(self._config.seed, "noise", one.name, number))
            for examples, each, one in zip(self._examples, numbers, self._members, strict=True)
        ]
        if member is None:
            member = np.zeros(len(numbers[0]), np.int64)
        task_ids = [member.task_id for member in self._members]
        return Window(self._config, drawn, member, task_ids)

    def _of_epoch(self, number: int) -> np.ndarray:
        count = self._examples[0].count
        epoch, window = divmod(number, self._windows_per_epoch)
        first = window * self._size
        return epoch * count + np.arange(first, min(first + self._size, count))

    def _of_mixture(self, number: int) -> list[np.ndarray]:
        # How many examples of a task come before a window is a matter of its share alone. Phases
        # spread the turns of many rare tasks over the windows.
        bounds = [
            [int(n * self._size * member.rate + i * _GOLDEN % 1) for n in (number, number + 1)]
            for i, member in enumerate(self._members)
        ]
        return [np.arange(*each) for each in bounds]


def rows_in_order(
    config: "DataConfig", member: Member, split: str, seed: int
) -> Iterator[tuple[Window, int]]:
    """Every row of a split once, in the data's own order, as a window and a row in it."""
    examples = examples_of(config, member.cache, split, shuffle=False, seed=seed)
    smallest, largest = WINDOW_EXAMPLES
    step = int(min(max(WINDOW_TOKENS / max(examples.mean_length, 1.0), smallest), largest))
    for number, first in enumerate(range(0, examples.count, step)):
        numbers = np.arange(first, min(first + step, examples.count))
        drawn = examples.draw(numbers, generator(seed, "noise", member.name, number))
        window = Window(config, [drawn], np.zeros(len(numbers), np.int64), [member.task_id])
        yield from ((window, row) for row in range(len(window)))


def too_small(config: "DataConfig", name: str, num_rows: int) -> UserError:
    """The error of a task whose epoch makes less than a batch."""
    return UserError(
        f"task {name!r} makes {num_rows} rows of {config.task_feature_lengths} tokens, fewer than "
        f"DataConfig.batch_size = {config.batch_size}; lower it, shorten the lengths or add data"
    )


def check_position(position: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Raise UserError unless the position's values at `keys` are integers from 0 on."""
    for key in keys:
        value = position[key]
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"data position {key!r} = {value!r} must be an integer")
        if value < 0:
            raise UserError(f"data position {key!r} = {value} must be at least 0")


def check_same_data(config: "DataConfig", there: str, here: str) -> None:
    """Raise UserError, naming tasks and their files, unless two fingerprints are the same."""
    if there == here:
        return
    before, now = (
        dict(part.split("=") for part in text.split() if part.count("=") == 1)
        for text in (there, here)
    )
    changed = [name for name in now if before.get(name) != now[name]] or sorted(before)
    own = {task.name: task for task in config.tasks}
    files = ", ".join(str(file) for name in changed for file in getattr(own.get(name), "files", ()))
    raise UserError(
        f"the data of task {', '.join(map(repr, changed))}{files and f' ({files})'} is not what "
        "this run was trained on so far; bring it back, or train on it in a new MODEL_DIR"
    )
