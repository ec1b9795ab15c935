"""A split of a supervised task as evaluation asks it: inputs, what counts as right, and metrics.

Tasks of `catalog` are texts (read without TensorFlow, but for TFDS). Those that Python code has put
into seqio's registry come with their own postprocessors and metric functions; for both the numbers
are those of seqio's Evaluator.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from switchx.data import catalog, pipeline, text_metrics, tokenization
from switchx.data import vocabulary as vocabularies
from switchx.data.span_corruption import EOS
from switchx.errors import UserError

if TYPE_CHECKING:
    from switchx.data.pipeline import DataConfig

Metric = Callable[..., Mapping[str, float]]
_SIDES = ("inputs", "targets")


@dataclasses.dataclass(frozen=True)
class EvalExample:
    """One question: texts, their token ids with EOS cut to the lengths of a row, the target.

    `target` is what the task's metrics take: accepted answers, or what a postprocessor makes.
    `cut_inputs` and `cut_targets` are how many tokens were cut off.
    """

    inputs_text: str
    inputs: np.ndarray
    targets_text: str
    targets: np.ndarray
    target: Any
    cut_inputs: int
    cut_targets: int


@dataclasses.dataclass(frozen=True)
class EvalTask:
    """Examples of a split in the data's own order, and how answers to them are judged.

    Attributes:
      name, split: whose.
      examples: at least one.
      options: the labels of a classification task, or None.
      metrics: functions of (targets, predictions), by name to numbers.
      score_metrics: functions of (targets, scores), the targets' log-likelihoods.
      postprocess: from a decoded text and the number of its example to what `metrics` take.
      task_id: its number in the mixture that was trained on, for routing by task.
    """

    name: str
    split: str
    examples: Sequence[EvalExample]
    options: tuple[str, ...] | None
    metrics: Sequence[Metric]
    score_metrics: Sequence[Metric] = ()
    postprocess: Callable[[str, int], Any] = lambda text, index: text
    task_id: int = 0

    def measure(self, texts: Sequence[str]) -> dict[str, float]:
        """Every metric of decoded texts, one for each example."""
        predictions = [self.postprocess(text, index) for index, text in enumerate(texts)]
        return self._measure(self.metrics, predictions)

    def measure_scores(self, scores: Sequence[float]) -> dict[str, float]:
        """Every score metric of the log-likelihoods of the targets."""
        return self._measure(self.score_metrics, scores)

    def _measure(self, metrics: Sequence[Metric], answers: Sequence[Any]) -> dict[str, float]:
        targets = [example.target for example in self.examples]
        found: dict[str, float] = {}
        for metric in metrics:
            for name, value in metric(targets, answers).items():
                found[name] = float(value)
        return found


def build(
    config: "DataConfig", name: str, *, split: str, num_examples: int | None = None
) -> EvalTask | None:
    """The first `num_examples` examples (None: all) of a task's split; None for text objectives.

    Raises:
      UserError: unknown task, no such split, no example in it, or data that cannot be read.
    """
    if tokenization.objective(config, name) != "supervised":
        return None
    names = pipeline.task_names(config)
    read = _from_seqio if catalog.find_task(config, name) is None else _from_texts
    task = read(config, name, split, num_examples)
    if not task.examples:
        raise UserError(f"split {split!r} of task {name!r} has no example to evaluate on")
    return dataclasses.replace(task, task_id=names.index(name) if name in names else 0)


def _from_texts(config: "DataConfig", name: str, split: str, num_examples: int | None) -> EvalTask:
    examples = pipeline.examples(config, name, split)[:num_examples]
    sides = [_encode(config, [example[side] for example in examples]) for side in _SIDES]
    return EvalTask(
        name,
        split,
        [
            _example(config, (example["inputs"], inputs), (example["targets"], targets), target)
            for example, inputs, targets, target in zip(
                examples, *sides, map(text_metrics.target_of, examples), strict=True
            )
        ],
        pipeline.label_options(config, name),
        pipeline.metric_functions(config, name),
    )


def _encode(config: "DataConfig", texts: Sequence[str]) -> list[np.ndarray]:
    if not texts:
        return []
    tokens, lengths = vocabularies.encode(config.vocabulary, texts)
    return [np.append(part, EOS) for part in np.split(tokens, np.cumsum(lengths)[:-1])]


def _example(
    config: "DataConfig",
    inputs: tuple[str, np.ndarray],
    targets: tuple[str, np.ndarray],
    target: Any,
) -> EvalExample:
    sides = []
    for side, (_, tokens) in zip(_SIDES, (inputs, targets), strict=True):
        length = config.task_feature_lengths[side]
        if len(tokens) > length:
            cut, tokens = len(tokens) - length, np.append(tokens[: length - 1], tokens[-1])
        else:
            cut = 0
        sides.append((np.asarray(tokens, np.int32), cut))
    (inputs_ids, cut_inputs), (targets_ids, cut_targets) = sides
    return EvalExample(
        inputs[0], inputs_ids, targets[0], targets_ids, target, cut_inputs, cut_targets
    )


def _from_seqio(config: "DataConfig", name: str, split: str, num_examples: int | None) -> EvalTask:
    from switchx.data import registry
    from switchx.data.backend import BUILD_LOCK

    pipeline.check_split(name, split, pipeline.splits(config, name))
    with BUILD_LOCK:
        task: Any = registry.find(config, name)
        dataset = task.get_dataset(
            config.task_feature_lengths,
            split,
            shuffle=False,
            seed=pipeline.EVAL_SEED,
            num_epochs=1,
            try_in_mem_cache=False,
        )
    raw = list(itertools.islice(dataset.as_numpy_iterator(), num_examples))

    def text(example: Mapping[str, Any], side: str) -> str:
        found = example.get(f"{side}_pretokenized")
        if found is None:
            return vocabularies.decode(config.vocabulary, example[side])
        return found.decode("utf-8") if isinstance(found, bytes) else str(found)

    def judged(decoded: str, index: int, is_target: bool = False) -> Any:
        return task.postprocess_fn(decoded, example=raw[index], is_target=is_target)

    examples = []
    for index, example in enumerate(raw):
        inputs, targets = ((text(example, side), example[side]) for side in _SIDES)
        examples.append(_example(config, inputs, targets, judged(targets[0], index, True)))
    return EvalTask(
        name,
        split,
        examples,
        pipeline.label_options(config, name),
        task.predict_metric_fns,
        task.score_metric_fns,
        judged,
    )
