"""From a task's name to batches: packed, deterministic, split over hosts, with a position.

Importing this module is cheap. TensorFlow and seqio are imported by the first `build_*` call,
which may be made in a background thread while JAX compiles.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from switchx.batch import Batch
from switchx.data import packing
from switchx.data import vocabulary as vocabularies
from switchx.data.mixtures import EMBEDDED as EMBEDDED_MIXTURES
from switchx.data.mixtures import Mixture
from switchx.data.packing import Row
from switchx.data.prefetch import Prefetcher
from switchx.data.span_corruption import MEAN_SPAN_LENGTH, NOISE_DENSITY, Example, span_lengths
from switchx.data.tasks import EMBEDDED as EMBEDDED_TASKS
from switchx.data.tasks import FileTask, TfdsTask, check_not_empty
from switchx.errors import UserError, check_range, check_types, closest

__all__ = [
    "Batches",
    "DataConfig",
    "EvalBatches",
    "Prefetcher",
    "build_eval",
    "build_train",
    "decode_tokens",
    "vocabulary_size",
]

FEATURES = ("inputs", "targets")
# Span corruption of evaluation text is the same in every run, whatever the run's own seed.
EVAL_SEED = 0
TRANSFER_SIZE = 64


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on and in which shape.

    `task_feature_lengths` are tokens per row, EOS included; `batch_size` is rows of the global
    batch. `tasks` declares tasks and mixtures beyond the embedded ones. `noise_density` and
    `mean_span_length` (tokens) are span corruption's, for every task that uses it.

    Raises:
      UserError: a value of the wrong type or out of range.
    """

    mixture_or_task_name: str = "embedded_span_corruption"
    task_feature_lengths: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {"inputs": 512, "targets": 114}, hash=False
    )
    vocabulary: str = "spm32k"
    batch_size: int = 8
    pack: bool = True
    shuffle: bool = True
    seed: int = 0
    tasks: Sequence[FileTask | TfdsTask | Mixture] = ()
    tfds_data_dir: str | None = None
    noise_density: float = NOISE_DENSITY
    mean_span_length: float = MEAN_SPAN_LENGTH

    def __post_init__(self) -> None:
        """Check types and ranges; freeze the lists."""
        check_types(self)
        check_not_empty(self, "mixture_or_task_name", "vocabulary")
        check_range(self, "tfds_data_dir", self.tfds_data_dir != "", "a folder, or None")
        lengths = self.task_feature_lengths
        for key, length in lengths.items():
            if key not in FEATURES:
                raise UserError(
                    f"DataConfig.task_feature_lengths has key {key!r}{closest(str(key), FEATURES)}"
                )
            _check_integer(f"DataConfig.task_feature_lengths[{key!r}]", length, 2)
        for key in FEATURES:
            check_range(self, "task_feature_lengths", key in lengths, f"a mapping with {key!r}")
        object.__setattr__(self, "task_feature_lengths", dict(lengths))
        check_range(self, "batch_size", self.batch_size >= 1, "at least 1")
        check_range(self, "seed", 0 <= self.seed < 2**31, "at least 0 and below 2**31")
        check_range(
            self,
            "noise_density",
            0 < self.noise_density < 1,
            "between 0 and 1, both excluded",
        )
        check_range(self, "mean_span_length", self.mean_span_length >= 1, "at least 1")
        self._check_tasks()

    def _check_tasks(self) -> None:
        for task in self.tasks:
            if not isinstance(task, FileTask | TfdsTask | Mixture):
                raise UserError(
                    f"DataConfig.tasks has {task!r}, which is not a FileTask, TfdsTask or Mixture"
                )
        names = [task.name for task in self.tasks]
        for name in names:
            if name in EMBEDDED_TASKS or name in EMBEDDED_MIXTURES:
                raise UserError(f"DataConfig.tasks hides the embedded {name!r}; rename the entry")
            if names.count(name) > 1:
                raise UserError(f"DataConfig.tasks has two entries called {name!r}; rename one")
        object.__setattr__(self, "tasks", tuple(self.tasks))


def vocabulary_size(config: DataConfig) -> int:
    """Number of ids of the configuration's vocabulary, sentinels included."""
    return vocabularies.size(config.vocabulary)


def decode_tokens(config: DataConfig, ids: Sequence[int] | np.ndarray) -> str:
    """Text of ids up to the first EOS, with sentinels readable as <extra_id_0>."""
    return vocabularies.decode(config.vocabulary, ids)


def encode_text(config: DataConfig, text: str) -> list[int]:
    """Ids of a text, EOS included; sentinels may be written as `decode_tokens` does."""
    return vocabularies.encode(config.vocabulary, text)


def task_names(config: DataConfig) -> tuple[str, ...]:
    """The task of a configuration, or the tasks of its mixture, in order.

    Raises:
      UserError: unknown name, or anything wrong with the data behind it.
    """
    return tuple(member.name for member in _members(_provider(config, "train")))


class Batches(Iterator[Batch]):
    """An endless iterator of this host's rows of the training batches.

    A task is walked in epochs, each a dataset of its own with a seed derived from the
    configuration's seed and the epoch's number: another order, other noise. The rows at the end
    of an epoch that do not fill a batch are dropped. A mixture is one endless epoch 0, in which
    every task repeats on its own. `position` is {'epoch', 'batch'}: batches taken in this epoch.
    """

    def __init__(self, config: DataConfig, provider: Any, rows: slice) -> None:
        """`provider` is the seqio task or mixture; `rows` this host's rows of a global batch."""
        self._config = config
        self._provider = provider
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
        return _batch(self._config, rows, self._rows)

    def check(self) -> None:
        """Make the batch that is next, so that what is wrong with the data shows now.

        Raises:
          UserError: the data cannot be read, or an epoch is less than a batch.
        """
        self._iterator = self._open()
        rows = next(self._iterator, None)
        self._iterator = self._iterator if rows is None else itertools.chain([rows], self._iterator)

    def position(self) -> dict[str, int]:
        """Where the next batch is, as integers that go into JSON."""
        return {"epoch": self._epoch, "batch": self._batch}

    def seek(self, position: Mapping[str, int]) -> None:
        """Continue exactly as a stream at `position` would. Skips within one epoch only.

        Raises:
          UserError: not a position of `position()`. A position past the end of its epoch (the
            data shrank since) is an error at the next batch.
        """
        if set(position) != {"epoch", "batch"}:
            raise UserError(f"data position {dict(position)!r} must have keys 'batch' and 'epoch'")
        for key, value in position.items():
            _check_integer(f"data position {key!r}", value, 0)
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
        batches = _batched(_rows(self._config, examples), self._config.batch_size)
        first = next(batches, [])
        if len(first) < self._config.batch_size:
            raise self._too_small(len(first))
        batches = itertools.chain([first], batches)
        for _ in range(self._batch):
            if len(next(batches, ())) < self._config.batch_size:
                raise UserError(
                    f"data position {self.position()} is past the end of "
                    f"{self._provider.name!r}; the data changed since it was saved"
                )
        return (rows for rows in batches if len(rows) == self._config.batch_size)

    def _too_small(self, num_rows: int) -> UserError:
        config = self._config
        return UserError(
            f"task {self._provider.name!r} makes {num_rows} rows of "
            f"{config.task_feature_lengths} tokens, fewer than DataConfig.batch_size = "
            f"{config.batch_size}; lower it, shorten the lengths or add data"
        )


class EvalBatches:
    """The same batches every time it is iterated, made once and kept in memory.

    The last batch is filled up with rows of zeros, whose loss weights are 0.
    """

    def __init__(self, batches: Iterator[Batch]) -> None:
        """`batches` is walked once, as far as iteration asks for."""
        self._made: list[Batch] = []
        self._source = batches

    def __iter__(self) -> Iterator[Batch]:
        """Every batch in order, as NumPy arrays."""
        index = 0
        while True:
            if index == len(self._made):
                batch = next(self._source, None)
                if batch is None:
                    return
                self._made.append(batch)
            yield self._made[index]
            index += 1


def build_train(config: DataConfig, *, process_index: int = 0, process_count: int = 1) -> Batches:
    """The endless stream of training batches, of which this host gets its block of rows.

    Every host walks the whole global stream and keeps rows process_index * n .. + n - 1 of each
    batch (n = batch_size / process_count), so the global batches, and a position, are the same
    for any number of hosts.

    Raises:
      UserError: unknown task, missing or broken data, lengths that the objective cannot fill,
        fewer rows than a batch.
    """
    host = _host_rows(config, process_index, process_count)
    provider = _provider(config, "train")
    batches = Batches(config, provider, host)
    batches.check()
    return batches


def build_eval(
    config: DataConfig,
    *,
    split: str = "validation",
    num_batches: int | None = None,
    task: str | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> EvalBatches:
    """The first `num_batches` batches of a split (None: all), in the data's own order.

    A mixture gives its tasks' rows in turn, one each; `task` picks one task by name. Noise does
    not depend on the configuration's seed.

    Raises:
      UserError: as `build_train`; no such split; an empty split.
    """
    if num_batches is not None:
        _check_integer("num_batches", num_batches, 1)
    host = _host_rows(config, process_index, process_count)
    provider = _provider(config, split, task)
    parts = [
        _rows(config, _examples(config, member, split, shuffle=False, num_epochs=1, seed=EVAL_SEED))
        for member in _members(provider)
        if split in member.splits
    ]
    batches = itertools.islice(_batched(_in_turn(parts), config.batch_size), num_batches)
    first = next(batches, None)
    if first is None:
        raise UserError(f"split {split!r} of task {provider.name!r} has no row to evaluate on")
    return EvalBatches(_batch(config, rows, host) for rows in itertools.chain([first], batches))


def _provider(config: DataConfig, split: str, name: str | None = None) -> Any:
    from switchx.data import registry
    from switchx.data.backend import BUILD_LOCK

    with BUILD_LOCK:
        provider = registry.find(config, name)
    if split not in provider.splits:
        raise UserError(
            f"task {provider.name!r} has no split {split!r}{closest(split, provider.splits)}"
        )
    _check_lengths(config, provider)
    return provider


def _check_lengths(config: DataConfig, provider: Any) -> None:
    from switchx.data import preprocessors

    for member in _members(provider):
        objectives = {getattr(step, "func", step) for step in member.preprocessors}
        if preprocessors.span_corruption in objectives:
            inputs, targets = (config.task_feature_lengths[key] for key in FEATURES)
            needed = span_lengths(inputs, config.noise_density, config.mean_span_length)
            if targets < needed.targets_length:
                raise UserError(
                    f"DataConfig.task_feature_lengths: span corruption of {inputs} inputs makes "
                    f"{needed.targets_length} targets, more than 'targets': {targets}; set "
                    f"'targets': {needed.targets_length}"
                )


def _host_rows(config: DataConfig, process_index: int, process_count: int) -> slice:
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not in 0..{process_count - 1}")
    if config.batch_size % process_count:
        raise UserError(
            f"DataConfig.batch_size = {config.batch_size} does not divide over {process_count} "
            "hosts; use a multiple"
        )
    rows = config.batch_size // process_count
    return slice(process_index * rows, (process_index + 1) * rows)


def _epoch_seed(seed: int, epoch: int) -> int:
    # seqio counts up from this seed for each step of a pipeline, so seeds must not be neighbours.
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0] >> 2)


def _members(provider: Any) -> list[Any]:
    return list(getattr(provider, "tasks", [provider]))


def _examples(
    config: DataConfig,
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


def _rows(config: DataConfig, examples: Iterator[Example]) -> Iterator[Row]:
    if config.pack:
        return packing.pack(examples, *(config.task_feature_lengths[key] for key in FEATURES))
    return ([example] for example in examples)


def _batched(rows: Iterator[Row], batch_size: int) -> Iterator[Sequence[Row]]:
    while batch := list(itertools.islice(rows, batch_size)):
        yield batch


def _in_turn(parts: Sequence[Iterator[Row]]) -> Iterator[Row]:
    parts = list(parts)
    while parts:
        for part in list(parts):
            row = next(part, None)
            if row is None:
                parts.remove(part)
            else:
                yield row


def _batch(config: DataConfig, rows: Sequence[Row], host: slice) -> Batch:
    lengths = (config.task_feature_lengths[key] for key in FEATURES)
    return packing.assemble(rows[host], host.stop - host.start, *lengths)


def _check_integer(key: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{key} = {value!r} must be an integer")
    if value < minimum:
        raise UserError(f"{key} = {value} must be at least {minimum}")
