"""Batches streamed from seqio through tf.data: tasks that have no token cache.

Importing this module is cheap; TensorFlow and seqio are imported by the first dataset.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from switchx.batch import Batch
from switchx.data import packing
from switchx.data.packing import Row
from switchx.data.span_corruption import Example
from switchx.data.token_batches import check_position, check_same_data, too_small
from switchx.errors import UserError

if TYPE_CHECKING:
    from switchx.data.pipeline import DataConfig

T = TypeVar("T")

FEATURES = ("inputs", "targets")
TRANSFER_SIZE = 64


class SeqioBatches(Iterator[Batch]):
    """An endless iterator of this host's rows of the training batches.

    A task is walked in epochs, each a dataset of its own with a seed derived from the
    configuration's seed and the epoch's number: another order, other noise. The rows at the end
    of an epoch that do not fill a batch are dropped. A mixture is one endless epoch 0, in which
    every task repeats on its own. `position` is {'epoch', 'batch', 'data'}: batches taken in this
    epoch, and a fingerprint of every task.
    """

    def __init__(
        self, config: "DataConfig", provider: Any, rows: slice, *, fingerprint: str
    ) -> None:
        """`provider` is the seqio task or mixture; `rows` this host's rows of a global batch."""
        self._config = config
        self._provider = provider
        self.fingerprint = fingerprint
        self._rows = rows
        self._epoch = 0
        self._batch = 0
        self._iterator: Iterator[Sequence[Row]] | None = None

    def __next__(self) -> Batch:
        """This host's rows of the next global batch, as NumPy arrays."""
        if self._iterator is None:
            self._iterator = self._open()
        rows = next(self._iterator, None)
        if rows is None:
            self._epoch, self._batch, self._iterator = self._epoch + 1, 0, None
            return next(self)
        self._batch += 1
        return batch_of(self._config, rows, self._rows)

    def check(self) -> None:
        """Make the batch that is next, so that what is wrong with the data shows now.

        Raises:
          UserError: the data cannot be read, or an epoch is less than a batch.
        """
        self._iterator = self._open()
        rows = next(self._iterator, None)
        self._iterator = self._iterator if rows is None else itertools.chain([rows], self._iterator)

    def position(self) -> dict[str, Any]:
        """Where the next batch is, as integers and a string that go into JSON."""
        return {"epoch": self._epoch, "batch": self._batch, "data": self.fingerprint}

    def seek(self, position: Mapping[str, Any]) -> None:
        """Continue exactly as a stream at `position` would. Reads its epoch up to there again.

        Raises:
          UserError: not a position of `position()`, or one in other data. A position past the end
            of its epoch is an error at the next batch.
        """
        if set(position) != {"epoch", "batch", "data"}:
            raise UserError(
                f"data position {dict(position)!r} is not one of a stream through TensorFlow "
                "(epoch, batch, data): it was saved with a token cache or by an older version; set "
                "TOKEN_CACHE_DIR to the folder of the cache, or train in a new MODEL_DIR"
            )
        check_position(position, ("epoch", "batch"))
        check_same_data(self._config, str(position["data"]), self.fingerprint)
        self._epoch, self._batch = position["epoch"], position["batch"]
        self._iterator = None

    def _open(self) -> Iterator[Sequence[Row]]:
        examples = _examples(
            self._config,
            self._provider,
            "train",
            shuffle=self._config.shuffle,
            # seqio's mixtures have no common epoch: every task repeats on its own.
            num_epochs=None if _members(self._provider) != [self._provider] else 1,
            seed=_epoch_seed(self._config.seed, self._epoch),
        )
        batches = batched(packed(self._config, examples), self._config.batch_size)
        first = next(batches, [])
        if len(first) < self._config.batch_size:
            raise too_small(self._config, self._provider.name, len(first))
        batches = itertools.chain([first], batches)
        for _ in range(self._batch):
            if len(next(batches, ())) < self._config.batch_size:
                raise UserError(
                    f"data position {self.position()} is past the end of "
                    f"{self._provider.name!r}; the data changed since it was saved"
                )
        return (rows for rows in batches if len(rows) == self._config.batch_size)


def _epoch_seed(seed: int, epoch: int) -> int:
    # seqio counts up from this seed for each step of a pipeline, so seeds must not be neighbours.
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0] >> 2)


def _members(provider: Any) -> list[Any]:
    return list(getattr(provider, "tasks", [provider]))


def _examples(
    config: "DataConfig",
    provider: Any,
    split: str,
    *,
    shuffle: bool,
    num_epochs: int | None,
    seed: int,
) -> Iterator[Example]:
    """Tokenised examples, trimmed to the configuration's lengths."""
    from switchx.data.backend import BUILD_LOCK, tf
    from switchx.data.preprocessors import plain

    with BUILD_LOCK:
        dataset = provider.get_dataset(
            sequence_length=config.task_feature_lengths,
            split=split,
            shuffle=shuffle,
            seed=seed,
            num_epochs=num_epochs,
            # The in-memory cache of seqio would freeze the first epoch's order.
            try_in_mem_cache=False,
        )
    # Crossing into Python costs much the same for one example as for many.
    groups = dataset.map(plain(lambda example: [example[key] for key in FEATURES]))
    groups = groups.ragged_batch(TRANSFER_SIZE)
    groups = groups.map(plain(lambda *sides: [(side.values, side.row_splits) for side in sides]))
    options = tf.data.Options()
    options.deterministic = True
    try:
        for sides in groups.prefetch(2).with_options(options).as_numpy_iterator():
            yield from map(Example, *(np.split(values, splits[1:-1]) for values, splits in sides))
    except (tf.errors.NotFoundError, tf.errors.DataLossError) as error:
        reason = error.message.split("\n")[0]
        raise UserError(f"data of task {provider.name!r} cannot be read: {reason}") from error


def packed(config: "DataConfig", examples: Iterator[Example]) -> Iterator[Row]:
    """Rows of examples, several to a row if the configuration packs."""
    if not config.pack:
        return ([example] for example in examples)
    held: dict[int, Example] = {}

    def lengths() -> Iterator[tuple[int, int]]:
        for number, example in enumerate(examples):
            held[number] = example
            yield len(example.inputs), len(example.targets)

    row_lengths = (config.task_feature_lengths[key] for key in FEATURES)
    return ([held.pop(i) for i in row] for row in packing.pack(lengths(), *row_lengths))


def batched(rows: Iterator[T], batch_size: int) -> Iterator[Sequence[T]]:
    """Rows in groups of `batch_size`; the last may be smaller."""
    while batch := list(itertools.islice(rows, batch_size)):
        yield batch


def batch_of(config: "DataConfig", rows: Sequence[Row], host: slice) -> Batch:
    """A host's rows of a global batch."""
    lengths = (config.task_feature_lengths[key] for key in FEATURES)
    return packing.assemble(rows[host], host.stop - host.start, *lengths)


def rows_in_order(config: "DataConfig", task: Any, split: str, seed: int) -> Iterator[Row]:
    """Every row of a seqio task's split once, in the data's own order."""
    examples = _examples(config, task, split, shuffle=False, num_epochs=1, seed=seed)
    return packed(config, examples)
