"""Declarations to seqio: sources, tasks and mixtures on one vocabulary, found by name.

Objects are built for a `DataConfig`, not kept in seqio's global registries, so the same task name
can serve two vocabularies in one process; `register` enters them there for seqio's own tools.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from switchx.data import catalog, corpus, mixtures, preprocessors, vocabulary
from switchx.data.backend import seqio, tf
from switchx.data.glue import GlueTask
from switchx.data.instructions import InstructionTask
from switchx.data.prepared import find_builder
from switchx.data.preprocessors import plain
from switchx.data.tasks import FileTask, TfdsTask
from switchx.data.text_metrics import metric_functions, target_of
from switchx.errors import UserError, closest

if TYPE_CHECKING:
    from switchx.data.pipeline import DataConfig

# Rows cut from one text are neighbours; this many are shuffled before they are batched.
ROW_SHUFFLE_BUFFER = 1000


class MemorySource(seqio.DataSource):
    """A source of examples held in memory: shuffles the whole, and shards by example.

    A shuffled epoch is one permutation of all examples, and a repeated dataset takes a new one
    each time round. A shard is every num_shards-th example of that order.
    """

    def __init__(
        self, splits: Sequence[str], read: Callable[[str], Sequence[corpus.Example]]
    ) -> None:
        """`read` maps a split name to its examples; called once a split, when first used."""
        super().__init__(splits=splits, caching_permitted=False, performs_internal_shuffling=True)
        self._read = read
        self._made: dict[str, Sequence[corpus.Example]] = {}

    def examples(self, split: str) -> Sequence[corpus.Example]:
        """Every example of a split."""
        if split not in self._made:
            self._made[split] = self._read(split)
        return self._made[split]

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """Any number of shards will do."""
        return True

    def list_shards(self, split: str) -> Sequence[str]:
        """One name: sharding is by example."""
        return [split]

    def num_input_examples(self, split: str) -> int:
        """Number of examples of a split."""
        return len(self.examples(split))

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused,
    ) -> tf.data.Dataset:
        """Dataset of dicts of strings, in order or in an order drawn from `seed`."""
        del unused
        examples = self.examples(split)
        columns = {key: tf.constant([e[key] for e in examples]) for key in examples[0]}
        indices = tf.data.Dataset.range(len(examples))
        if shuffle:
            indices = indices.shuffle(len(examples), seed=seed)
        if shard_info and shard_info.num_shards > 1:
            indices = indices.shard(shard_info.num_shards, shard_info.index)
        return indices.map(plain(lambda i: {k: tf.gather(c, i) for k, c in columns.items()}))


def find(config: "DataConfig", name: str | None = None) -> seqio.Task | seqio.Mixture:
    """The task or mixture called `name` (None: the configuration's own), on its vocabulary.

    Names are looked up among the configuration's own tasks, the embedded ones, and whatever
    Python code has put into seqio's registries.

    Raises:
      UserError: unknown name, or anything wrong with the data behind it.
    """
    name = config.mixture_or_task_name if name is None else name
    mixture = catalog.find_mixture(config, name)
    if mixture is not None:
        return _mixture(config, mixture)
    declared = catalog.find_task(config, name)
    if declared is not None:
        return _task(config, declared)
    if name in seqio.MixtureRegistry.names() or name in seqio.TaskRegistry.names():
        found = seqio.get_mixture_or_task(name)
        _check_features(config, found)
        return found
    known = catalog.names(config)
    known |= {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    raise UserError(f"no task or mixture is called {name!r}{closest(name, known)}")


def dataset_version(config: "DataConfig", name: str) -> Any:
    """What the data of a task is, beyond its declaration: TFDS name with version, and its sizes.

    None for tasks whose source has no version. JSON values.
    """
    declared = catalog.find_task(config, name)
    if isinstance(declared, InstructionTask):
        declared = declared.base
    if not isinstance(declared, TfdsTask | GlueTask):
        return None
    info = find_builder(declared.tfds_name, config.tfds_data_dir).info
    sizes = {split: info.splits[split].num_examples for split in sorted(info.splits)}
    return {"name": info.full_name, "examples": sizes}


def token_splits(
    config: "DataConfig", name: str
) -> Iterator[tuple[str, int | None, Iterator[Mapping[str, tuple[np.ndarray, np.ndarray]]]]]:
    """Every split of a task as tokens: its name, its number of examples if known, and the tokens.

    Documents of a text task are under 'text', without EOS; other tasks give the 'inputs' and
    'targets' that their preprocessors make, of any length. Tokens come as
    `switchx.data.token_cache.Writer.add` takes them.

    Raises:
      UserError: a task that is not the same every time, or needs the row's lengths.
    """
    found = find(config, name)
    assert isinstance(found, seqio.Task)
    if _is_text(found):
        feature = seqio.Feature(found.output_features["inputs"].vocabulary, add_eos=False)
        found = found.replace(
            preprocessors=found.preprocessors[:-1], output_features={"text": feature}
        )
    else:
        _check_repeatable(found)
    for split in found.splits:
        # Documents become one each; other preprocessors may cut, join or drop examples.
        total = found.num_input_examples(split)
        yield split, total, _token_chunks(_untrimmed(found, split, seed=0), found.output_features)


def first_lengths(task: seqio.Task, split: str, count: int = 1000) -> dict[str, np.ndarray] | None:
    """Tokens of a split's first examples by feature, before they are cut.

    None for text, of which rows are made, and for tasks that need the lengths of rows.
    """
    if _is_text(task):
        return None
    try:
        examples = list(_untrimmed(task, split, seed=0).take(count).as_numpy_iterator())
    except (UserError, tf.errors.OpError):  # an unreadable file is reported by who reads it all
        return None
    keys = sorted(task.output_features)
    return {key: np.array([len(each[key]) for each in examples], np.int64) for key in keys}


def text_examples(task: seqio.Task, split: str) -> list[corpus.Example]:
    """Every example of a task as text, as its preprocessors leave it before tokens are made.

    Raises:
      UserError: a task whose preprocessors keep no text, or need the lengths of rows.
    """
    found = []
    for example in _untrimmed(task, split, seed=0).as_numpy_iterator():
        if "inputs_pretokenized" not in example or "targets_pretokenized" not in example:
            raise UserError(f"task {task.name!r} keeps no text of its inputs and targets")
        row = {key: _as_text(example[f"{key}_pretokenized"]) for key in ("inputs", "targets")}
        more = {"references", "group", "label"} & set(example)
        found.append(row | {key: _as_text(example[key]) for key in more})
    return found


def _is_text(task: seqio.Task) -> bool:
    return getattr(task.preprocessors[-1], "func", task.preprocessors[-1]) in (
        preprocessors.span_corruption,
        preprocessors.prefix_lm,
    )


def _untrimmed(task: seqio.Task, split: str, seed: int) -> tf.data.Dataset:
    try:
        return task.get_dataset(
            None, split, shuffle=False, seed=seed, try_in_mem_cache=False, num_epochs=1
        )
    except (TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"task {task.name!r} cannot be cached: its preprocessors fail without the lengths of "
            f"rows ({reason}); it streams instead"
        ) from error


def _check_repeatable(task: seqio.Task) -> None:
    split = next(iter(task.splits))
    first, second = (
        [
            [example[key].tolist() for key in task.output_features]
            for example in _untrimmed(task, split, seed).take(100).as_numpy_iterator()
        ]
        for seed in (0, 1)
    )
    if first != second:
        raise UserError(
            f"task {task.name!r} cannot be cached: its preprocessors draw at random, and a cache "
            "would repeat one draw for ever; it streams instead"
        )


def _token_chunks(dataset: tf.data.Dataset, features: Mapping[str, Any]):
    keys = sorted(features)
    groups = dataset.map(plain(lambda example: [example[key] for key in keys])).ragged_batch(1000)
    groups = groups.map(plain(lambda *sides: [(side.values, side.row_lengths()) for side in sides]))
    empty = (np.zeros(0, np.int32), np.zeros(0, np.int64))
    yield dict.fromkeys(keys, empty)
    for sides in groups.prefetch(2).as_numpy_iterator():
        yield dict(zip(keys, sides, strict=True))


def register(config: "DataConfig") -> None:
    """Enter the configuration's task or mixture, with its tasks, into seqio's registries.

    An entry of the same name (another vocabulary's, say) is replaced.
    """
    found = find(config)
    members = found.tasks if isinstance(found, seqio.Mixture) else [found]
    for registry, provider in (
        *((seqio.TaskRegistry, task) for task in members),
        *([(seqio.MixtureRegistry, found)] if isinstance(found, seqio.Mixture) else []),
    ):
        if provider.name in registry.names():
            registry.remove(provider.name)
        registry.add_provider(provider.name, provider)


def _mixture(config: "DataConfig", mixture: mixtures.Mixture) -> seqio.Mixture:
    members, counts = {}, {}
    for name in mixture.tasks:
        members[name] = find(config, name)
        has_train = "train" in members[name].splits
        counts[name] = members[name].num_input_examples("train") if has_train else 0
        if not counts[name] and isinstance(mixture.rates, str):
            raise UserError(
                f"mixture {mixture.name!r}: task {name!r} does not tell its number of examples; "
                "give Mixture.rates as a mapping"
            )
    rates = mixtures.mixing_rates(mixture, counts)
    return seqio.Mixture(mixture.name, [(members[name], rates[name]) for name in mixture.tasks])


def _task(config: "DataConfig", declared: catalog.Declared) -> seqio.Task:
    shared_vocabulary = vocabulary.load(config.vocabulary)
    if isinstance(declared, TfdsTask):
        source, steps = _tfds(config, declared)
    else:
        source, steps = MemorySource(declared.splits, declared.examples), []
    if isinstance(declared, FileTask):
        # Read both sides now: a broken line must not wait for the first evaluation.
        for split in declared.splits:
            source.num_input_examples(split)
    feature = seqio.Feature(shared_vocabulary, add_eos=True)
    features = {"inputs": feature, "targets": feature}
    if declared.objective == "supervised":
        return seqio.Task(
            declared.name,
            source=source,
            output_features=features,
            preprocessors=[
                *steps,
                seqio.preprocessors.tokenize,
                seqio.preprocessors.append_eos_after_trim,
            ],
            postprocess_fn=_postprocess,
            metric_fns=metric_functions(declared.metrics, declared.options),
            # A source in memory is shuffled whole, and an example is one row.
            shuffle_buffer_size=(
                None if source.performs_internal_shuffling else ROW_SHUFFLE_BUFFER
            ),
        )
    return seqio.Task(
        declared.name,
        source=source,
        output_features=features,
        preprocessors=[
            *steps,
            functools.partial(_tokenize_text, shared_vocabulary),
            _objective(config, declared.objective),
        ],
        shuffle_buffer_size=ROW_SHUFFLE_BUFFER,
    )


def _objective(config: "DataConfig", objective: str):
    if objective == "prefix_lm":
        return preprocessors.prefix_lm
    return functools.partial(
        preprocessors.span_corruption,
        noise_density=config.noise_density,
        mean_span_length=config.mean_span_length,
    )


def _tokenize_text(shared_vocabulary: seqio.Vocabulary, dataset: tf.data.Dataset):
    return dataset.map(
        plain(lambda example: {"text": shared_vocabulary.encode_tf(example["text"])}),
        num_parallel_calls=tf.data.AUTOTUNE,
    )


def _postprocess(decoded: str, example: Mapping | None = None, is_target: bool = False, **unused):
    del unused
    if is_target and example is not None and "references" in example:
        keys = {"references", "group", "label"} & set(example)
        return target_of({key: _as_text(example[key]) for key in keys})
    return decoded


def _as_text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _check_features(config: "DataConfig", found: seqio.Task | seqio.Mixture) -> None:
    if set(found.output_features) != {"inputs", "targets"}:
        raise UserError(
            f"task {found.name!r} has features {sorted(found.output_features)}; an encoder-decoder "
            "needs 'inputs' and 'targets'"
        )
    for key, feature in found.output_features.items():
        size = feature.vocabulary.vocab_size
        wanted = vocabulary.size(config.vocabulary)
        if size != wanted:
            raise UserError(
                f"task {found.name!r} has {size} ids in its {key} vocabulary and "
                f"DataConfig.vocabulary = {config.vocabulary!r} has {wanted}; use the same one"
            )


def _tfds(config: "DataConfig", declared: TfdsTask):
    builder = find_builder(declared.tfds_name, config.tfds_data_dir, download=declared.download)
    info = builder.info
    for split, tfds_split in declared.splits.items():
        if tfds_split.split("[")[0].split("+")[0] not in info.splits:
            raise UserError(
                f"TfdsTask.splits[{split!r}] = {tfds_split!r}: {declared.tfds_name!r} has no such "
                f"split{closest(tfds_split, info.splits)}"
            )
    text_fields = {"text": declared.text_field}
    features: Any = info.features
    supervised = declared.objective == "supervised"
    wanted = (
        (*declared.inputs_fields, declared.targets_field) if supervised else text_fields.values()
    )
    for field in wanted:
        if field not in features:
            raise UserError(
                f"{declared.tfds_name!r} has no field {field!r}{closest(field, features)}"
            )
    labels = getattr(features[declared.targets_field], "names", None) if supervised else None
    for option in declared.options or ():
        if labels is not None and option not in labels:
            raise UserError(
                f"TfdsTask.options: {option!r} is no {declared.targets_field!r} of "
                f"{declared.tfds_name!r}{closest(option, labels)}"
            )
    source = seqio.TfdsDataSource(
        declared.tfds_name, tfds_data_dir=config.tfds_data_dir, splits=dict(declared.splits)
    )
    step = (
        functools.partial(_tfds_supervised, declared, features)
        if supervised
        else (functools.partial(_tfds_text, declared.text_field))
    )
    return source, [step]


def _tfds_text(field: str, dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset.map(
        plain(lambda example: {"text": example[field]}), num_parallel_calls=tf.data.AUTOTUNE
    )


def _tfds_supervised(
    declared: TfdsTask, features: Any, dataset: tf.data.Dataset
) -> tf.data.Dataset:
    labels = {key: list(getattr(feature, "names", None) or ()) for key, feature in features.items()}

    def text(example, field):
        value = example[field]
        if labels[field]:
            # TFDS marks a hidden label -1; the T5 text format writes it <unk>.
            names = tf.constant([*labels[field], "<unk>"])
            return tf.gather(
                names, tf.where(value < 0, len(labels[field]), tf.cast(value, tf.int32))
            )
        return value if value.dtype == tf.string else tf.strings.as_string(value)

    def convert(example):
        fields = declared.inputs_fields
        parts = [text(example, field) for field in fields]
        if len(fields) > 1:
            parts = [tf.strings.join([f"{f}: ", p]) for f, p in zip(fields, parts, strict=True)]
        if declared.prefix:
            parts = [tf.constant(declared.prefix), *parts]
        return {
            "inputs": tf.strings.join(parts, separator=" "),
            "targets": text(example, declared.targets_field),
        }

    return dataset.map(plain(convert), num_parallel_calls=tf.data.AUTOTUNE)
