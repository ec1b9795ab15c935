"""A run's scorecard: its checkpoints evaluated on tasks, as a table, rows and predictions."""

import argparse
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from switchx import distributed, sharding
from switchx.data import eval_tasks, pipeline
from switchx.data.eval_tasks import EvalExample, EvalTask
from switchx.errors import UserError, closest
from switchx.experiment import Experiment, read_experiment
from switchx.inference.evaluation import (
    RANKINGS,
    Judged,
    judge_decoded,
    judge_ranked,
    judge_scored,
    make_eval_step,
)
from switchx.inference.evaluation import evaluate as evaluate_batches
from switchx.inference.predictor import Predictor
from switchx.models.t5 import T5
from switchx.run_directory import put_row
from switchx.trained import Trained, find_checkpoints, load, notes, progress
from switchx.trained import flag_parser as trained_flags
from switchx.training.metrics import summarizer

# What can be asked of a task, in order.
METRICS = ("loss", "decoded", "ranked", "scored")

# The loss in a table; a row has more.
_LOSSES = ("cross_entropy", "perplexity")


def flag_parser(description: str) -> argparse.ArgumentParser:
    """A parser of what scripts/evaluate.py takes; `run` does what they say."""
    parser = trained_flags(
        description,
        "EVAL_STEPS, BATCH_SIZE, MoeConfig.eval_capacity_factor",
        "last (default), best, all or a step",
    )
    parser.add_argument(
        "--tasks", type=_names, default=[], help="names, also of mixtures; default: the run's own"
    )
    parser.add_argument("--split", default="validation", help="default: validation")
    parser.add_argument(
        "--metrics",
        type=_names,
        default=METRICS[:3],
        help=f"of {', '.join(METRICS)}; default: {','.join(METRICS[:3])}",
    )
    parser.add_argument(
        "--num_examples", type=int, help="of each task, for all but loss; default: the whole split"
    )
    parser.add_argument(
        "--rank_by", choices=RANKINGS, default=RANKINGS[0], help="log-likelihood; default: sum"
    )
    return parser


def run(flags: argparse.Namespace, changes: Sequence[str] = ()) -> None:
    """Evaluate a run directory, write into it what was found, and print it as a table."""
    experiment = read_experiment(flags.run_directory, changes)
    evaluated = evaluate(
        experiment,
        checkpoints=find_checkpoints(flags.run_directory, flags.checkpoint),
        tasks=flags.tasks,
        split=flags.split,
        metrics=flags.metrics,
        num_examples=flags.num_examples,
        rank_by=flags.rank_by,
    )
    rows = []
    try:
        for each in evaluated:
            rows.append(each.row)
            if distributed.is_first():
                write(pathlib.Path(flags.run_directory), each)
    finally:
        if rows:
            print(table(rows))


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


class Evaluated(NamedTuple):
    """A task evaluated at a checkpoint.

    Attributes:
      row: as in metrics.jsonl: "step", "split" ("<split>/<task>") and every metric.
      answers: for every example its texts and what the model said; empty if only the loss was
        asked for.
      checkpoint: the folder of the parameters.
    """

    row: dict[str, Any]
    answers: list[dict[str, Any]]
    checkpoint: pathlib.Path


def evaluate(
    experiment: Experiment,
    *,
    checkpoints: Sequence[pathlib.Path] = (),
    tasks: Sequence[str] = (),
    split: str = "validation",
    metrics: Sequence[str] = METRICS,
    num_examples: int | None = None,
    rank_by: str = "sum",
) -> Iterator[Evaluated]:
    """Metrics of checkpoints on tasks, one after the other, all data first.

    Args:
      experiment: of the run. The loss is that of its first `eval_steps` batches of a split (None
        for all of them), as in training: packed, with the capacity of evaluation.
      checkpoints: folders; none for what `load` takes by itself.
      tasks: names, also of mixtures, each of whose tasks is evaluated on its own; none for the
        experiment's.
      split: 'train', 'validation' or 'test'.
      metrics: which of `METRICS`; a task gives those that it has. "loss" is teacher-forced;
        "decoded" judges decoded text, "ranked" the most likely option, "scored" the likelihood of
        the targets, each row by itself.
      num_examples: the first so many of the split for all but the loss; None for all of them.
      rank_by: `evaluation.judge_ranked`'s.

    Raises:
      UserError: an unknown task, split, metric or checkpoint, an empty split, or a metric that no
        task has.
    """
    for name in metrics:
        if name not in METRICS:
            raise UserError(f"--metrics: {name!r} is unknown{closest(name, METRICS)}")
    if num_examples is not None and num_examples < 1:
        raise UserError(f"--num_examples={num_examples} should be at least 1")
    with notes():
        mesh = sharding.make_mesh(experiment.mesh, distributed.devices())
        data = [
            _TaskData.build(experiment, mesh, name, split, metrics, num_examples)
            for name in _expand(experiment.data, tasks)
        ]
    names = [each.name for each in data]
    if not any(each.kinds for each in data):
        raise UserError(
            f"--metrics={','.join(metrics)}: none of {', '.join(names)} has any; they have what "
            "their declarations say (metrics, label options)"
        )
    eval_step = None
    for checkpoint in checkpoints or [None]:
        trained = load(experiment, checkpoint)
        with sharding.use(trained.mesh, experiment.rules):
            eval_step = eval_step or jax.jit(
                make_eval_step(T5(experiment.model), experiment.loss),
                out_shardings=NamedSharding(trained.mesh, PartitionSpec()),
            )
            for each in data:
                if each.kinds:
                    yield each.evaluate(experiment, trained, eval_step, rank_by)


@dataclasses.dataclass(frozen=True)
class _TaskData:
    """A task's batches for the loss and its examples for the rest, as far as they are wanted."""

    name: str
    split: str
    kinds: tuple[str, ...]
    batches: pipeline.EvalBatches | None
    task: EvalTask | None

    @classmethod
    def build(
        cls,
        experiment: Experiment,
        mesh: Mesh,
        name: str,
        split: str,
        metrics: Sequence[str],
        num_examples: int | None,
    ) -> "_TaskData":
        batches, task = None, None
        if "loss" in metrics:
            where = sharding.batch_sharding(mesh)
            block, blocks = distributed.row_block(where, experiment.data.batch_size)
            batches = pipeline.build_eval(
                experiment.data,
                split=split,
                num_batches=experiment.eval_steps,
                task=name,
                process_index=block,
                process_count=blocks,
            )
        if set(metrics) != {"loss"}:
            task = eval_tasks.build(experiment.data, name, split=split, num_examples=num_examples)
        has = {
            "loss": batches is not None,
            "decoded": task is not None and bool(task.metrics),
            "ranked": task is not None and bool(task.options),
            "scored": task is not None,
        }
        kinds = tuple(kind for kind in METRICS if kind in metrics and has[kind])
        return cls(name, split, kinds, batches, task)

    def evaluate(
        self, experiment: Experiment, trained: Trained, eval_step: Any, rank_by: str
    ) -> Evaluated:
        """Everything wanted of the task, by the parameters of one checkpoint."""
        row: dict[str, Any] = {"step": trained.step, "split": f"{self.split}/{self.name}"}
        if "loss" in self.kinds:
            assert self.batches is not None
            rows = experiment.data.batch_size
            where = sharding.batch_sharding(trained.mesh)
            placed = (
                distributed.place_rows(batch, where, rows)
                for batch in progress(self.batches, self.name, "batches")
            )
            sums = evaluate_batches(eval_step, trained.params, placed)
            row |= summarizer(experiment.model)(sums)
        model = predictor(experiment, trained.params, trained.mesh)
        judged = self._judge(model, experiment, rank_by)
        if not judged or self.task is None:
            return Evaluated(row, [], trained.checkpoint)
        row["num_examples"] = len(self.task.examples)
        answers = [_question(example) for example in self.task.examples]
        for each in judged:
            row |= each.metrics
            for answer, said in zip(answers, each.answers, strict=True):
                answer |= said
        for side in ("inputs", "targets"):
            cut = sum(getattr(example, f"cut_{side}") > 0 for example in self.task.examples)
            if cut:
                row[f"num_cut_{side}"] = cut
        return Evaluated(row, answers, trained.checkpoint)

    def _judge(self, predictor: Predictor, experiment: Experiment, rank_by: str) -> list[Judged]:
        task, data, judged = self.task, experiment.data, []

        def show(items: Sequence[Any], what: str) -> Iterable[Any]:
            return progress(items, f"{self.name}, {what}", "examples")

        def decode(tokens: Any) -> str:
            return pipeline.decode_tokens(data, tokens)

        def encode(text: str) -> list[int]:
            return pipeline.encode_text(data, text)

        if task is not None and "decoded" in self.kinds:
            judged.append(judge_decoded(predictor, task, decode, show))
        if task is not None and "ranked" in self.kinds:
            judged.append(judge_ranked(predictor, task, encode, rank_by, show))
        if task is not None and "scored" in self.kinds:
            judged.append(judge_scored(predictor, task, show))
        return judged


def predictor(experiment: Experiment, params: Any, mesh: Mesh) -> Predictor:
    """A model's predictor with the batch size and the lengths of an experiment."""
    return Predictor(experiment.model, params, mesh, experiment.data.batch_size, experiment.lengths)


def _expand(data: pipeline.DataConfig, tasks: Sequence[str]) -> list[str]:
    """The tasks behind names of tasks and mixtures, each once, in order."""
    found: dict[str, None] = {}
    for name in tasks or [data.mixture_or_task_name]:
        named = dataclasses.replace(data, mixture_or_task_name=name)
        found |= dict.fromkeys(pipeline.task_names(named))
    return list(found)


def _question(example: EvalExample) -> dict[str, Any]:
    question: dict[str, Any] = {"inputs": example.inputs_text, "target": example.target}
    if example.cut_inputs:
        question["truncated"] = example.cut_inputs
    return question


class Decoded(NamedTuple):
    """What an evaluation during training says of decoded validation examples.

    Attributes:
      means: "decoded_<metric>", each the mean over the tasks that have it.
      by_task: where there are several tasks, the metrics of each.
    """

    means: dict[str, float]
    by_task: dict[str, dict[str, float]]


def decoded_tasks(experiment: Experiment) -> list[EvalTask]:
    """The examples that every evaluation of a run decodes: `num_decoded_examples` of each task.

    Raises:
      UserError: they are asked for, and no task has metrics; or as `eval_tasks.build`.
    """
    if not experiment.num_decoded_examples:
        return []
    data = experiment.data
    found = [
        eval_tasks.build(
            data, name, split="validation", num_examples=experiment.num_decoded_examples
        )
        for name in pipeline.task_names(data)
    ]
    asked = [task for task in found if task is not None and task.metrics]
    if not asked:
        raise UserError(
            f"Experiment.num_decoded_examples = {experiment.num_decoded_examples}: "
            f"{data.mixture_or_task_name!r} has no task with metrics; set it to 0"
        )
    return asked


def check_metric(experiment: Experiment, asked: Sequence[EvalTask]) -> None:
    """Check that evaluations will have the run's best metric, if it is one of decoded text.

    Raises:
      UserError: no task that is decoded has it.
    """
    if experiment.best_metric.startswith("decoded_"):
        names = {name for task in asked for name in task.measure([""] * len(task.examples))}
        known = [f"decoded_{name}" for name in sorted(names)]
        if experiment.best_metric not in known:
            raise UserError(
                f"Experiment.best_metric = {experiment.best_metric!r}: "
                f"{experiment.data.mixture_or_task_name!r} has no such metric among those of "
                f"{experiment.num_decoded_examples} decoded examples"
                f"{closest(experiment.best_metric, known) if known else ''}"
            )


def decode(experiment: Experiment, params: Any, mesh: Mesh, tasks: Sequence[EvalTask]) -> Decoded:
    """The tasks' metrics of what parameters decode."""
    model = predictor(experiment, params, mesh)
    by_task = {
        task.name: judge_decoded(
            model, task, lambda tokens: pipeline.decode_tokens(experiment.data, tokens)
        ).metrics
        for task in tasks
    }
    values: dict[str, list[float]] = {}
    for metrics in by_task.values():
        for name, value in metrics.items():
            values.setdefault(name, []).append(value)
    means = {name: sum(each) / len(each) for name, each in values.items()}
    return Decoded(means, by_task if len(by_task) > 1 else {})


def describe(metrics: Mapping[str, float]) -> str:
    """Decoded metrics for the end of a line of text."""
    return "".join(f", {name.replace('_', ' ')} {value:.2f}" for name, value in metrics.items())


def write(run_directory: pathlib.Path, evaluated: Evaluated) -> None:
    """Keep what was evaluated in the run directory.

    The row goes into metrics.jsonl as `run_directory.put_row` says, and what the examples were
    answered into predictions/<step>/<task>.<split>.jsonl, in the place of an earlier one.

    Raises:
      UserError: one of them cannot be written.
    """
    if evaluated.answers:
        split, _, task = evaluated.row["split"].partition("/")
        folder = run_directory / "predictions" / evaluated.checkpoint.name
        path = folder / f"{task.replace('/', '-')}.{split}.jsonl"
        lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in evaluated.answers)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text("".join(lines), encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
    lost = put_row(run_directory, evaluated.row).keys() - evaluated.row.keys()
    if lost:
        with notes():
            print(
                f"{evaluated.row['split']}: takes the place of an earlier evaluation of this step, "
                f"which also had {', '.join(sorted(lost))}"
            )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as text: a line each, a column for every metric that one of them has."""
    metrics = [name for name in _LOSSES if any(name in row for row in rows)]
    judged = (name for row in rows for name in row if name.split("_")[0] in METRICS[1:])
    metrics += dict.fromkeys(judged)
    lines = [["task", "split", "step", "examples", *metrics]]
    for row in rows:
        split, _, task = row["split"].partition("/")
        lines.append([task, split, str(row["step"]), str(row.get("num_examples", "-"))])
        for name in metrics:
            digits = 4 if name in _LOSSES else 2
            lines[-1].append(f"{row[name]:.{digits}f}" if name in row else "-")
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    notes = [
        f"{row['split']}: {row[name]} of {row['num_examples']} {name.removeprefix('num_cut_')} "
        "were longer than TASK_FEATURE_LENGTHS and were cut"
        for row in rows
        for name in row
        if name.startswith("num_cut_")
    ]
    text = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([*text, *dict.fromkeys(notes)])
