"""What a task is: the embedded ones by name, and the user's own as `FileTask` and `TfdsTask`.

These are declarations, cheap to make; `switchx.data.registry` turns them into seqio tasks.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from switchx.data import corpus
from switchx.data.text_metrics import METRICS
from switchx.errors import UserError, check_choice, check_range, check_types, closest

OBJECTIVES = ("span_corruption", "prefix_lm", "supervised")


@dataclasses.dataclass(frozen=True)
class EmbeddedTask:
    """A task that ships: prose, or a supervised one with its metrics and label options."""

    name: str
    objective: str
    metrics: tuple[str, ...] = ()
    options: tuple[str, ...] | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits this task has."""
        return corpus.SPLITS if self.objective == "supervised" else ("train", "validation")

    def examples(self, split: str) -> Sequence[corpus.Example]:
        """Every example of a split: 'text', or 'inputs', 'targets' and 'references'."""
        if self.objective == "supervised":
            return corpus.embedded_task(self.name, split)
        return [{"text": text} for text in corpus.embedded_prose(split)]

    def content(self) -> dict[str, Any]:
        """What `examples` depends on: SHA-256 of the files, and what is left out of them."""
        prefix = f"tasks/{self.name}." if self.objective == "supervised" else "prose."
        content = {path: sha for path, sha in corpus.checksums().items() if path.startswith(prefix)}
        return content | ({"held_out_by": "words"} if self.objective == "supervised" else {})


def _supervised(name: str, *metrics: str, options: tuple[str, ...] | None = None) -> EmbeddedTask:
    return EmbeddedTask(name, "supervised", metrics, options)


_SUPERSENSES = tuple(
    "act animal artifact attribute body cognition communication event feeling food group location "
    "motive object person phenomenon plant possession process quantity relation shape state "
    "substance time".split()
)
_PERIODS = ("1790-1849", "1850-1899", "1900-1949", "1950-2021")

EMBEDDED: Mapping[str, EmbeddedTask] = {
    task.name: task
    for task in (
        EmbeddedTask("embedded_span_corruption", "span_corruption"),
        EmbeddedTask("embedded_prefix_lm", "prefix_lm"),
        _supervised("cldr_names", "exact_match", "chrf"),
        _supervised("cmudict_g2p", "exact_match", "phoneme_error_rate"),
        _supervised("date_iso", "exact_match"),
        _supervised("inflection", "exact_match"),
        _supervised("num2words", "exact_match"),
        _supervised("sotu_period", "accuracy", "macro_f1", options=_PERIODS),
        _supervised("wn_define", "rouge_l", "chrf"),
        _supervised("wn_hypernym_nli", "accuracy", options=("no", "yes")),
        _supervised("wn_reverse_dictionary", "exact_match"),
        _supervised("wn_supersense", "accuracy", "macro_f1", options=_SUPERSENSES),
        _supervised("wn_syn_ant", "accuracy", options=("antonyms", "synonyms")),
    )
}


@dataclasses.dataclass(frozen=True)
class FileTask:
    """A task on files of the user's own: JSONL, TSV or CSV with a header line, or plain text.

    `files` and `validation_files` are a path, a glob or a list of either; .gz and .xz are read as
    they are. Without validation files, about `validation_fraction` of the examples is held out by
    content. `format` None goes by the files' extensions. Text objectives read `text_field`,
    supervised ones `inputs_field` and `targets_field`; plain text has no fields. `options` are the
    labels of a classification task: every target must be one of them.

    Raises:
      UserError: from construction on wrong types and values; from `examples` on the files.
    """

    name: str
    files: str | Sequence[str]
    validation_files: str | Sequence[str] | None = None
    validation_fraction: float = 0.02
    format: str | None = None
    objective: str = "span_corruption"
    text_field: str = "text"
    inputs_field: str = "inputs"
    targets_field: str = "targets"
    metrics: str | Sequence[str] = ("exact_match",)
    options: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Check types and values, and freeze the lists."""
        check_types(self)
        check_name(self)
        freeze_strings(self, "files", "metrics")
        if self.validation_files is not None:
            freeze_strings(self, "validation_files")
        check_range(
            self,
            "validation_fraction",
            0 < self.validation_fraction < 1,
            "between 0 and 1, both excluded",
        )
        if self.format is not None:
            check_choice(self, "format", corpus.FORMATS)
        check_choice(self, "objective", OBJECTIVES)
        if self.objective == "supervised" and self.format == "text":
            raise UserError(
                "FileTask.format = 'text' has no inputs and targets; objective 'supervised' needs "
                "'jsonl', 'tsv' or 'csv'"
            )
        check_not_empty(self, "text_field", "inputs_field", "targets_field")
        _check_metrics(self)
        _check_options(self)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits this task has."""
        return ("train", "validation")

    def examples(self, split: str) -> Sequence[corpus.Example]:
        """Every example of a split, read and checked: 'text', or 'inputs' and 'targets'.

        Raises:
          UserError: whatever is wrong with the files, naming the file and the line.
        """
        train_paths = corpus.expand(self.files)
        if self.validation_files is None:
            train, validation = _held_out(self, _stamps(train_paths))
            return train if split == "train" else validation
        paths = train_paths if split == "train" else corpus.expand(self.validation_files)
        return _read(self, _stamps(paths))

    def content(self) -> dict[str, Any]:
        """What `examples` depends on, as JSON: formats and SHA-256 of files, and how to read them.

        Raises:
          UserError: a file that is missing or cannot be read.
        """

        def files(patterns: Sequence[str]) -> list[list[str]]:
            return [
                [self.format or corpus.file_format(path), corpus.checksum(path)]
                for path in corpus.expand(patterns)
            ]

        own = self.validation_files
        found = {
            "files": files(self.files),
            "validation": self.validation_fraction if own is None else files(own),
            "fields": dict(self.fields),
        }
        return found if self.options is None else {**found, "options": list(self.options)}

    @property
    def fields(self) -> Mapping[str, str]:
        """The fields `examples` yields, and what the files call them."""
        if self.objective == "supervised":
            return {"inputs": self.inputs_field, "targets": self.targets_field}
        return {"text": self.text_field}


@dataclasses.dataclass(frozen=True)
class TfdsTask:
    """A task on a TensorFlow Datasets dataset, e.g. 'glue/rte:2.0.0' or 'c4/en:3.1.0'.

    Nothing is downloaded unless `download`; a dataset that is not prepared is an error that says
    how to prepare it. `splits` maps our split names to TFDS splits or slices ('train[:1%]').
    Supervised inputs are one field as it is, or several as "field: text" in order after `prefix`
    (the T5 format); class labels become their names, which `options` must be if they are given.
    """

    name: str
    tfds_name: str
    objective: str = "span_corruption"
    text_field: str = "text"
    inputs_fields: str | Sequence[str] = ("inputs",)
    targets_field: str = "targets"
    prefix: str = ""
    splits: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"train": "train", "validation": "validation"}, hash=False
    )
    metrics: str | Sequence[str] = ("exact_match",)
    options: Sequence[str] | None = None
    download: bool = False

    def __post_init__(self) -> None:
        """Check types and values, and freeze the lists."""
        check_types(self)
        check_name(self)
        check_not_empty(self, "tfds_name", "text_field", "targets_field")
        check_choice(self, "objective", OBJECTIVES)
        freeze_strings(self, "inputs_fields", "metrics")
        check_range(self, "splits", "train" in self.splits, "a mapping with 'train' in it")
        for split, tfds_split in self.splits.items():
            if split not in corpus.SPLITS:
                hint = closest(str(split), corpus.SPLITS)
                raise UserError(f"TfdsTask.splits has the unknown split {split!r}{hint}")
            valid = isinstance(tfds_split, str) and tfds_split
            check_range(self, "splits", bool(valid), "a mapping from splits to TFDS splits")
        object.__setattr__(self, "splits", dict(self.splits))
        _check_metrics(self)
        _check_options(self)


def check_name(config: Any) -> None:
    """Raise UserError unless the field `name` is one that seqio takes."""
    valid = re.fullmatch(r"\w+", config.name) is not None
    check_range(config, "name", valid, "letters, digits and underscores")


def check_not_empty(config: Any, *fields: str) -> None:
    """Raise UserError if one of the string fields is empty."""
    for field in fields:
        check_range(config, field, bool(getattr(config, field)), "a string that is not empty")


def freeze_strings(config: Any, *fields: str) -> None:
    """Turn fields that hold a string or a list of strings into tuples of strings, checked."""
    for field in fields:
        value = getattr(config, field)
        values = (value,) if isinstance(value, str) else tuple(value)
        valid = bool(values) and all(isinstance(item, str) and item for item in values)
        check_range(config, field, valid, "strings that are not empty, at least one")
        object.__setattr__(config, field, values)


def _check_metrics(task: FileTask | TfdsTask) -> None:
    for name in task.metrics:
        if name not in METRICS:
            hint = closest(name, METRICS)
            raise UserError(f"{type(task).__name__}.metrics has the unknown {name!r}{hint}")


def _check_options(task: FileTask | TfdsTask) -> None:
    if task.options is None:
        return
    if task.objective != "supervised":
        raise UserError(
            f"{type(task).__name__}.options are the labels of objective 'supervised', not of "
            f"{task.objective!r}"
        )
    freeze_strings(task, "options")
    several = len(set(task.options)) == len(task.options) >= 2
    check_range(task, "options", several, "at least two labels, none of them twice")


def _stamps(paths: Sequence[pathlib.Path]) -> tuple[tuple[str, int, int], ...]:
    # The cache below must miss when a file changes between two builds in one process.
    return tuple((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in paths)


@functools.lru_cache(maxsize=8)
def _read(task: FileTask, stamps: tuple[tuple[str, int, int], ...]) -> list[corpus.Example]:
    paths = [pathlib.Path(path) for path, _, _ in stamps]
    if task.objective == "supervised":
        for path in paths:
            if (task.format or corpus.file_format(path)) == "text":
                raise UserError(
                    f"file {str(path)!r} is plain text; objective 'supervised' needs JSONL, "
                    "TSV or CSV"
                )
    return corpus.read_files(paths, task.fields, task.format, task.options)


@functools.lru_cache(maxsize=8)
def _held_out(
    task: FileTask, stamps: tuple[tuple[str, int, int], ...]
) -> tuple[list[corpus.Example], list[corpus.Example]]:
    field = "inputs" if task.objective == "supervised" else "text"
    examples = _read(task, stamps)
    try:
        return corpus.hold_out(examples, field, task.validation_fraction)
    except UserError as error:
        files = ", ".join(repr(path) for path in task.files)
        raise UserError(f"{files} (task {task.name!r}): {error}") from error
