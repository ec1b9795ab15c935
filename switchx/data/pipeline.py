"""From a task's name to batches: packed, deterministic, split over hosts, with a position.

Tasks with a token cache are read from it (`token_batches`), and the embedded tasks, `FileTask` and
`FactsTask` always have one. Others stream from seqio through tf.data (`seqio_batches`); only then
TensorFlow is imported, by the first `build_*` call.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from switchx.batch import Batch
from switchx.data import (
    catalog,
    seqio_batches,
    text_metrics,
    token_batches,
    tokenization,
    truncation,
)
from switchx.data import vocabulary as vocabularies
from switchx.data.corpus import Example
from switchx.data.facts import FactsTask
from switchx.data.instructions import InstructionTask
from switchx.data.mixtures import Mixture, mixing_rates
from switchx.data.packing import BatchWriter
from switchx.data.prefetch import Prefetcher, Seekable
from switchx.data.seqio_batches import FEATURES, SeqioBatches, batched
from switchx.data.span_corruption import EOS, MEAN_SPAN_LENGTH, NOISE_DENSITY, span_lengths
from switchx.data.tasks import FileTask, TfdsTask, check_not_empty
from switchx.data.token_batches import Member, TokenBatches, Window
from switchx.errors import UserError, check_range, check_types, closest

__all__ = [
    "Batches",
    "DataConfig",
    "EvalBatches",
    "Prefetcher",
    "build_eval",
    "build_train",
    "cache",
    "decode_tokens",
    "examples",
    "label_options",
    "metric_functions",
    "metric_names",
    "splits",
    "vocabulary_size",
]

T = TypeVar("T")

# Span corruption of evaluation text is the same in every run, whatever the run's own seed.
EVAL_SEED = 0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on and in which shape.

    `task_feature_lengths` are tokens per row, EOS included; `batch_size` is rows of the global
    batch. `tasks` declares tasks and mixtures beyond the embedded ones. `noise_density` and
    `mean_span_length` (tokens) are span corruption's, for every task that uses it.
    `token_cache_dir` is the folder of the token caches (macro TOKEN_CACHE_DIR); None is
    $XDG_CACHE_HOME/switchx or ~/.cache/switchx.

    `templates` is a JSON file of instruction templates beside those that ship, and
    `evaluation_template` the one of the splits other than 'train', e.g. 'plain+options'
    (`switchx.data.instructions`).

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
    tasks: Sequence[FileTask | TfdsTask | FactsTask | Mixture] = ()
    tfds_data_dir: str | None = None
    token_cache_dir: str | None = None
    templates: str | None = None
    evaluation_template: str | None = None
    noise_density: float = NOISE_DENSITY
    mean_span_length: float = MEAN_SPAN_LENGTH

    def __post_init__(self) -> None:
        """Check types and ranges; freeze the lists."""
        check_types(self)
        check_not_empty(self, "mixture_or_task_name", "vocabulary")
        for folder in ("tfds_data_dir", "token_cache_dir"):
            check_range(self, folder, getattr(self, folder) != "", "a folder, or None")
        for field in ("templates", "evaluation_template"):
            check_range(self, field, getattr(self, field) != "", "not empty, or None")
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
            if not isinstance(task, FileTask | TfdsTask | FactsTask | Mixture):
                raise UserError(
                    f"DataConfig.tasks has {task!r}, which is not a FileTask, TfdsTask, FactsTask "
                    "or Mixture"
                )
        names = [task.name for task in self.tasks]
        for name in names:
            if name in catalog.NAMES:
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
    """Ids of a text, EOS included; <extra_id_0> is a sentinel unless the vocabulary is bytes."""
    ids, _ = vocabularies.encode(config.vocabulary, [text])
    return [*ids.tolist(), EOS]


def task_names(config: DataConfig) -> tuple[str, ...]:
    """The task of a configuration, or the tasks of its mixture, in order.

    Raises:
      UserError: unknown name, or a mixture in a mixture.
    """
    return tuple(_task_names(config, config.mixture_or_task_name)[0])


def splits(config: DataConfig, task: str) -> tuple[str, ...]:
    """Names of a task's splits.

    Raises:
      UserError: unknown name.
    """
    declared = catalog.find_task(config, task)
    found = _find(config, task) if declared is None else declared
    return tuple(found.splits)


def label_options(config: DataConfig, task: str) -> tuple[str, ...] | None:
    """The labels of a classification task, in an order that is always the same; None for others.

    Raises:
      UserError: unknown name.
    """
    declared = catalog.find_task(config, task)
    if declared is None:
        _find(config, task)
        return None
    found = getattr(declared, "options", None)
    return None if found is None else tuple(found)


def metric_functions(config: DataConfig, task: str) -> tuple[text_metrics.Metric, ...]:
    """The metrics of a task, from (targets, predictions) to scores by name.

    The targets are what `text_metrics.target_of` makes of `examples`; of a task that Python code
    has registered, what its postprocessor makes of them.

    Raises:
      UserError: unknown name.
    """
    declared = catalog.find_task(config, task)
    if declared is None:
        return tuple(_find(config, task).metric_fns)
    return tuple(text_metrics.metric_functions(declared.metrics, label_options(config, task)))


def metric_names(config: DataConfig, task: str) -> tuple[str, ...]:
    """Names of the functions that `metric_functions` returns.

    Raises:
      UserError: unknown name.
    """
    return tuple(metric.__name__ for metric in metric_functions(config, task))


def examples(config: DataConfig, task: str, split: str) -> Sequence[Example]:
    """Every example of a split as text, in the order of `build_eval`, not cut.

    'inputs' and 'targets' (a language-modelling task: 'text'), 'references' where several answers
    are accepted, 'group' or 'label' where a metric needs them. TensorFlow is imported only for
    tasks that come from TFDS or seqio.

    Raises:
      UserError: unknown name or split; whatever is wrong with the data.
    """
    check_split(task, split, splits(config, task))
    declared = catalog.find_task(config, task)
    if declared is None or isinstance(declared, TfdsTask):
        from switchx.data import registry

        return registry.text_examples(_find(config, task), split)
    return declared.examples(split)


def knows_tasks(config: DataConfig) -> bool:
    """Whether batches say whose task a token is: not where a mixture streams through seqio."""
    names = task_names(config)
    return len(names) == 1 or all(tokenization.has_cache(config, name) for name in names)


class Batches(Seekable, Protocol):
    """An endless iterator of this host's rows of the training batches."""

    @property
    def fingerprint(self) -> str:
        """Every task with digits that stand for its data: 'name=12345678 …'."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """Itself."""
        ...

    def check(self) -> None:
        """Make the batch that is next, so that what is wrong with the data shows now."""
        ...


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

    This host gets rows process_index * n .. + n - 1 of each global batch (n = batch_size /
    process_count). The global batches, and a position, are the same for any number of hosts.

    Raises:
      UserError: unknown task, missing or broken data, lengths that the objective cannot fill,
        fewer rows than a batch.
    """
    host = _host_rows(config, process_index, process_count)
    members = _cached(config, config.mixture_or_task_name)
    if members is not None:
        # A task of rate 0 is there to be evaluated.
        members = [member for member in members if member.rate > 0]
        for member in members:
            check_split(member.name, "train", member.cache.splits)
            _check_cut(config, member, "train")
            _say_held_out(config, member)
        batches: Batches = TokenBatches(config, members, host)
    else:
        provider = _provider(config, "train", config.mixture_or_task_name)
        names = [task.name for task in _members(provider)]
        print(
            f"{', '.join(names)}: streaming through TensorFlow; scripts/cache.py with the flags of "
            "this run makes token caches, which are faster",
            flush=True,
        )
        prints = [f"{name}={tokenization.content_fingerprint(config, name)}" for name in names]
        for task in _members(provider):
            _check_cut_of_stream(config, task, "train")
        batches = SeqioBatches(config, provider, host, fingerprint=" ".join(prints))
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
    name = config.mixture_or_task_name if task is None else task
    members = _cached(config, name)
    if members is not None:
        check_split(name, split, sorted({s for m in members for s in m.cache.splits}))
        members = sorted(members, key=lambda member: member.name)
        members = [member for member in members if split in member.cache.splits]
        for member in members:
            _check_cut(config, member, split)
        parts = [
            token_batches.rows_in_order(config, member, split, EVAL_SEED) for member in members
        ]
        made = (
            _written(config, rows, host) for rows in batched(_in_turn(parts), config.batch_size)
        )
    else:
        provider = _provider(config, split, name)
        found = [member for member in _members(provider) if split in member.splits]
        for member in found:
            _check_cut_of_stream(config, member, split)
        parts = [seqio_batches.rows_in_order(config, member, split, EVAL_SEED) for member in found]
        made = (
            seqio_batches.batch_of(config, rows, host)
            for rows in batched(_in_turn(parts), config.batch_size)
        )
    batches = itertools.islice(made, num_batches)
    first = next(batches, None)
    if first is None:
        raise UserError(f"split {split!r} of task {name!r} has no row to evaluate on")
    return EvalBatches(itertools.chain([first], batches))


def cache(config: DataConfig) -> None:
    """Make the token caches of the configuration's task, or of its mixture's tasks.

    What is there and fits is kept. One line each says where it is.

    Raises:
      UserError: unknown task, missing or broken data, a task that cannot be cached.
    """
    for name in _task_names(config, config.mixture_or_task_name)[0]:
        tokenization.make(config, name)


def _task_names(config: DataConfig, name: str) -> tuple[list[str], Mixture | None]:
    """The tasks behind a name, and the mixture that gives their rates if it is one.

    Only what is neither declared nor cached is looked up in seqio's registries.
    """
    declared = catalog.find_mixture(config, name)
    if declared is not None:
        for task in declared.tasks:
            if not tokenization.is_known(config, task):
                _find(config, task)
        return list(declared.tasks), declared
    if tokenization.is_known(config, name):
        return [name], None
    found = _find(config, name)
    if _members(found) == [found]:
        return [name], None
    rates = {task.name: float(found.get_rate(task)) for task in _members(found)}
    return list(rates), Mixture("registered", list(rates), rates=rates)


def _cached(config: DataConfig, name: str) -> list[Member] | None:
    """The tasks behind a name with their caches and shares; None if one of them must stream."""
    names, mixture = _task_names(config, name)
    for task in names:
        if tokenization.objective(config, task) == "span_corruption":
            _check_lengths(config)
    if not all(tokenization.has_cache(config, task) for task in names):
        return None
    caches = {task: tokenization.find(config, task) for task in names}
    rates = {name: 1.0}
    if mixture is not None:
        counts = {
            task: cache.num_examples("train") if "train" in cache.splits else 0
            for task, cache in caches.items()
        }
        rates = mixing_rates(mixture, counts)
    # Numbered in the mixture that is trained on, also where one of its tasks is evaluated alone.
    order = _task_names(config, config.mixture_or_task_name)[0]
    return [
        Member(task, cache, rates[task], order.index(task) if task in order else 0)
        for task, cache in caches.items()
    ]


def _check_cut(config: DataConfig, member: Member, split: str) -> None:
    if member.cache.objective != "supervised":
        return
    _check_label_lengths(config, member.name)
    lengths = {feature: member.cache.read(split, feature).lengths for feature in FEATURES}
    truncation.report(config, member.name, split, lengths)


def _check_cut_of_stream(config: DataConfig, task: Any, split: str) -> None:
    from switchx.data import registry

    _check_label_lengths(config, task.name)
    lengths = registry.first_lengths(task, split)
    if lengths is not None:
        truncation.report(config, task.name, split, lengths, sampled=True)


def _check_label_lengths(config: DataConfig, name: str) -> None:
    declared = catalog.find_task(config, name)
    options = None if declared is None else label_options(config, name)
    if options is not None:
        truncation.check_labels(config, name, options)


def _say_held_out(config: DataConfig, member: Member) -> None:
    declared = catalog.find_task(config, member.name)
    declared = declared.base if isinstance(declared, InstructionTask) else declared
    if isinstance(declared, FileTask) and declared.validation_files is None:
        kept, held_out = map(member.cache.num_examples, ("train", "validation"))
        what = "examples" if declared.objective == "supervised" else "pieces"
        truncation.say(
            f"{member.name}: {kept:,} {what} to train on, {held_out:,} held out by content for "
            "validation"
        )
    if isinstance(declared, FactsTask):
        truncation.say(
            f"{member.name}: validation asks for the {declared.num_facts:,} facts that are trained "
            "on: it measures recall of what was seen"
        )


def _find(config: DataConfig, name: str) -> Any:
    from switchx.data import registry
    from switchx.data.backend import BUILD_LOCK

    with BUILD_LOCK:
        return registry.find(config, name)


def _provider(config: DataConfig, split: str, name: str) -> Any:
    provider = _find(config, name)
    check_split(name, split, provider.splits)
    return provider


def _members(provider: Any) -> list[Any]:
    return list(getattr(provider, "tasks", [provider]))


def check_split(name: str, split: str, splits: Iterable[str]) -> None:
    """Raise UserError unless a task has the split."""
    if split not in splits:
        raise UserError(f"task {name!r} has no split {split!r}{closest(split, splits)}")


def _check_lengths(config: DataConfig) -> None:
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


def _written(config: DataConfig, rows: Sequence[tuple[Window, int]], host: slice) -> Batch:
    """A host's rows of a global batch, each a window and a row in it."""
    lengths = (config.task_feature_lengths[key] for key in FEATURES)
    writer = BatchWriter(host.stop - host.start, *lengths)
    for i, (window, row) in enumerate(rows[host]):
        window.write(writer, i, row, row + 1)
    return writer.batch()


def _in_turn(parts: Sequence[Iterator[T]]) -> Iterator[T]:
    parts = list(parts)
    while parts:
        for part in list(parts):
            row = next(part, None)
            if row is None:
                parts.remove(part)
            else:
                yield row


def _check_integer(key: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{key} = {value!r} must be an integer")
    if value < minimum:
        raise UserError(f"{key} = {value} must be at least {minimum}")
