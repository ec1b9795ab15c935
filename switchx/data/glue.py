"""GLUE and SuperGLUE as text, in T5's formats, under T5's names and with T5's metrics.

A format is a pure function from an example, as TFDS has it but in plain Python, to the rows that
are made of it: 'inputs', 'targets', 'references' (one a line), and what a metric needs besides:
'group' (MultiRC, ReCoRD) or 'label' (Winograd schemas). Source: Raffel et al. 2020, section 2.4
and appendix D, and the tasks of the t5 package.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from switchx.data.corpus import Example
from switchx.errors import UserError

# The target of an example whose label is hidden.
HIDDEN = "<unk>"


def sentences(
    benchmark: str, labels: Sequence[str], keys: Sequence[str], example: Mapping[str, Any]
) -> list[Example]:
    """'benchmark key: text key: text', and the label's name."""
    parts = [benchmark, *(f"{key}: {example[key]}" for key in keys)]
    return [_row(" ".join(parts), _label(labels, example["label"]))]


def stsb(example: Mapping[str, Any]) -> list[Example]:
    """STS-B: the similarity, 0 to 5, rounded to the next fifth, e.g. '3.8'."""
    # Halves to the even side in float32, as T5 rounds.
    fifths = np.round(np.float32(example["label"]) * np.float32(5))
    texts = f"sentence1: {example['sentence1']} sentence2: {example['sentence2']}"
    return [_row(f"stsb {texts}", f"{fifths / 5:.1f}")]


def diagnostic_rte(labels: Sequence[str], example: Mapping[str, Any]) -> list[Example]:
    """AX-b: its two sentences are RTE's premise and hypothesis."""
    renamed = {"premise": example["sentence1"], "hypothesis": example["sentence2"]}
    renamed["label"] = example["label"]
    return sentences("rte", labels, ("hypothesis", "premise"), renamed)


def multirc(labels: Sequence[str], example: Mapping[str, Any]) -> list[Example]:
    """MultiRC: one answer of a question, its markup removed. The group is the question."""
    (row,) = sentences("multirc", labels, ("question", "answer", "paragraph"), example)
    text = re.sub(r"</?b>", "", row["inputs"].replace("<br>", " "))
    return [{**row, "inputs": text, "group": str(example["idx"]["question"])}]


def record(example: Mapping[str, Any]) -> list[Example]:
    """ReCoRD: a row for every answer of a query; highlights become sentences of the passage.

    The group is passage and query: metrics score a query once, by its first row.
    """
    passage = re.sub(r"""([.?!"'])\n@highlight\n""", r"\1 ", example["passage"])
    passage = passage.replace("\n@highlight\n", ". ")
    entities = ", ".join(example["entities"])
    inputs = f"record query: {example['query']} entities: {entities} passage: {passage}"
    answers = list(example["answers"]) or [HIDDEN]
    references = "\n".join(" ".join(answer.split()) for answer in answers)
    group = f"{example['idx']['passage']}-{example['idx']['query']}"
    return [
        {"inputs": inputs, "targets": answer, "references": references, "group": group}
        for answer in answers
    ]


def wsc(example: Mapping[str, Any], *, train: bool) -> list[Example]:
    """Winograd schema: '*pronoun*' in the text, and the noun that is said to be its referent.

    For training only where it is. The label says so in evaluation: 'True', 'False' or '<unk>'.

    Raises:
      UserError: the pronoun is not where the example says.
    """
    if train and example["label"] != 1:
        return []
    inputs = f"wsc: {_marked(example['text'], example['span2_text'], example['span2_index'])}"
    row = _row(inputs, example["span1_text"])
    return [row if train else {**row, "label": _label(("False", "True"), example["label"])}]


def _marked(text: str, pronoun: str, index: int) -> str:
    words = text.strip().split(" ")
    # Two of the data set's examples have the next word, or punctuation with the pronoun.
    for place in (index, index + 1):
        word = words[place] if place < len(words) else ""
        rest = word.removeprefix(pronoun)
        if word.startswith(pronoun) and not rest[:1].isalnum():
            words[place] = f"*{pronoun}* {rest}" if rest else f"*{pronoun}*"
            return " ".join(words)
    raise UserError(f"Winograd schema: no {pronoun!r} at word {index} of {text[:80]!r}")


def _row(inputs: str, targets: str) -> dict[str, str]:
    return {"inputs": inputs, "targets": targets, "references": " ".join(targets.split())}


def _label(labels: Sequence[str], label: int) -> str:
    return HIDDEN if label == -1 else labels[label]


@dataclasses.dataclass(frozen=True)
class GlueTask:
    """A task of GLUE or SuperGLUE: its TFDS data set, format, metrics and label options.

    `splits` are TFDS's by ours, `num_train` the rows of training data (Raffel et al.'s weights).
    Examples are read into memory, with TensorFlow.
    """

    name: str
    tfds_name: str
    rows: Callable[[Mapping[str, Any]], list[Example]]
    metrics: tuple[str, ...]
    options: tuple[str, ...] | None
    tfds_splits: tuple[tuple[str, str], ...]
    num_train: int = 0
    data_dir: str | None = None
    objective: str = "supervised"

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits this task has."""
        return tuple(split for split, _ in self.tfds_splits)

    def examples(self, split: str) -> list[Example]:
        """Every row of a split, in the data set's own order.

        Raises:
          UserError: the data set is not prepared.
        """
        import tensorflow_datasets as tfds
        import tqdm

        from switchx.data.prepared import find_builder

        builder = find_builder(self.tfds_name, self.data_dir)
        wanted = dict(self.tfds_splits)[split]
        if wanted not in builder.info.splits:
            raise UserError(f"{self.tfds_name!r} has no split {wanted!r} on this machine")
        dataset: Iterable[Any] = tfds.as_numpy(builder.as_dataset(split=wanted))
        total = builder.info.splits[wanted].num_examples
        with tqdm.tqdm(dataset, self.name, total, leave=False, disable=None) as bar:
            return [row for example in bar for row in self.rows(_plain(example))]

    def content(self) -> dict[str, Any]:
        """What `examples` depends on, as JSON: the data set and its splits, under this format."""
        return {"glue": self.name, "tfds": self.tfds_name, "splits": dict(self.tfds_splits)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    return value.item() if isinstance(value, np.generic) else value


_ALL = (("train", "train"), ("validation", "validation"), ("test", "test"))
_TEST = (("test", "test"),)
_TRUTH = ("False", "True")
_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")
_PAIR = ("sentence1", "sentence2")


def _matched(kind: str) -> tuple[tuple[str, str], ...]:
    return (("validation", f"validation_{kind}"), ("test", f"test_{kind}"))


def _glue(
    name: str,
    labels: tuple[str, ...],
    keys: Sequence[str],
    metrics: Sequence[str],
    num_train: int = 0,
    *,
    splits: tuple[tuple[str, str], ...] = _ALL,
    benchmark: str | None = None,
    config: str | None = None,
) -> GlueTask:
    rows = functools.partial(sentences, benchmark or name, labels, keys)
    tfds_name = f"glue/{config or name}:2.0.0"
    return GlueTask(f"glue_{name}_v002", tfds_name, rows, tuple(metrics), labels, splits, num_train)


def _super_glue(
    name: str,
    rows: Callable[..., list[Example]],
    labels: tuple[str, ...] | None,
    metrics: Sequence[str],
    num_train: int = 0,
    *,
    splits: tuple[tuple[str, str], ...] = _ALL,
    config: str | None = None,
) -> GlueTask:
    return GlueTask(
        f"super_glue_{name}",
        f"super_glue/{config or name.removesuffix('_v102')}:1.0.2",
        rows if labels is None else functools.partial(rows, labels),
        tuple(metrics),
        labels,
        splits,
        num_train,
    )


def _fields(benchmark: str, *keys: str) -> Callable[..., list[Example]]:
    def rows(labels: Sequence[str], example: Mapping[str, Any]) -> list[Example]:
        return sentences(benchmark, labels, keys, example)

    return rows


_MNLI = ("hypothesis", "premise")
TASKS: Mapping[str, GlueTask] = {
    task.name: task
    for task in (
        _glue("cola", ("unacceptable", "acceptable"), ["sentence"], ["matthews_corrcoef"], 8551),
        _glue("sst2", ("negative", "positive"), ["sentence"], ["accuracy"], 67349),
        _glue("mrpc", ("not_equivalent", "equivalent"), _PAIR, ["f1", "accuracy"], 3668),
        _glue(
            "qqp",
            ("not_duplicate", "duplicate"),
            ("question1", "question2"),
            ["f1", "accuracy"],
            363849,
        ),
        GlueTask(
            "glue_stsb_v002",
            "glue/stsb:2.0.0",
            stsb,
            ("pearson_corrcoef", "spearman_corrcoef"),
            None,
            _ALL,
            5749,
        ),
        _glue(
            "mnli",
            _NLI,
            _MNLI,
            ["accuracy"],
            392702,
            splits=(("train", "train"), *_matched("matched")),
        ),
        *(
            _glue(
                f"mnli_{kind}",
                _NLI,
                _MNLI,
                ["accuracy"],
                splits=_matched(kind),
                benchmark="mnli",
                config="mnli",
            )
            for kind in ("matched", "mismatched")
        ),
        _glue("qnli", _ENTAILMENT, ("question", "sentence"), ["accuracy"], 104743),
        _glue("rte", _ENTAILMENT, _PAIR, ["accuracy"], 2490),
        _glue("wnli", ("not_entailment", "entailment"), _PAIR, ["accuracy"], 635),
        _glue("ax", _NLI, _MNLI, [], splits=_TEST, benchmark="mnli"),
        _super_glue(
            "boolq_v102", _fields("boolq", "passage", "question"), _TRUTH, ["accuracy"], 9427
        ),
        _super_glue(
            "cb_v102",
            _fields("cb", *_MNLI),
            ("entailment", "contradiction", "neutral"),
            ["mean_multiclass_f1", "accuracy"],
            250,
        ),
        _super_glue(
            "copa_v102",
            _fields("copa", "choice1", "choice2", "premise", "question"),
            ("choice1", "choice2"),
            ["accuracy"],
            400,
        ),
        _super_glue("multirc_v102", multirc, _TRUTH, ["multirc"], 27243),
        _super_glue("record_v102", record, None, ["record"], 138854),
        _super_glue("rte_v102", _fields("rte", *_MNLI), _ENTAILMENT, ["accuracy"], 2490),
        _super_glue("wic_v102", _fields("wic", *_PAIR, "word"), _TRUTH, ["accuracy"], 5428),
        _super_glue(
            "wsc_v102_simple_train",
            functools.partial(wsc, train=True),
            None,
            [],
            259,
            splits=_ALL[:1],
            config="wsc.fixed",
        ),
        _super_glue(
            "wsc_v102_simple_eval",
            functools.partial(wsc, train=False),
            None,
            ["wsc"],
            splits=_ALL[1:],
            config="wsc.fixed",
        ),
        _super_glue("axb_v102", diagnostic_rte, _ENTAILMENT, [], splits=_TEST),
        _super_glue("axg_v102", _fields("rte", *_MNLI), _ENTAILMENT, [], splits=_TEST),
    )
}
