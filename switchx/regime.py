"""`Regime`: stages of fine-tuning, each a run directory, each from where the one before ended.

Single-task, multi-task instruction, and the one followed by the other are regimes of one or two
stages (Flan-MoE, arXiv:2305.14705, compares them).
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from switchx import distributed, scorecard, sharding
from switchx.data import pipeline
from switchx.errors import UserError, check_choice, check_range, check_types
from switchx.experiment import MAY_CHANGE, Experiment, check_fits, plan_state
from switchx.run import train
from switchx.run_directory import RunDirectory
from switchx.training.checkpoint import find_checkpoint
from switchx.training.selection import best_checkpoint, evaluations, numbers

STARTS = ("best", "last")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run of a regime, or several that start from the same checkpoint.

    Attributes:
      name: of its folder.
      experiment: the run; its `model_dir` is the regime's to say, and in later stages its
        `initial_checkpoint_path`.
      tasks: tasks or mixtures, each with a run of its own, in a folder of that name; None is
        what the experiment names.

    Raises:
      UserError: a field of the wrong type, or a name that is no folder's.
    """

    name: str
    experiment: Experiment
    tasks: Sequence[str] | None = None

    def __post_init__(self):
        check_types(self)
        valid = re.fullmatch(r"\w[\w.-]*", self.name) is not None
        check_range(self, "name", valid, "letters, digits, '_', '-' and '.'")
        if self.tasks is not None:
            several = not isinstance(self.tasks, str) and all(self.tasks) and bool(self.tasks)
            check_range(self, "tasks", several, "a list of tasks, or None")
            check_range(self, "tasks", len(set(self.tasks)) == len(self.tasks), "different tasks")
            object.__setattr__(self, "tasks", tuple(self.tasks))


@dataclasses.dataclass(frozen=True)
class Regime:
    """Stages in order.

    Attributes:
      stages: only the last may have several tasks.
      model_dir: folder of the stages' folders (MODEL_DIR).
      start: which checkpoint of a stage the next one starts from: the "best" by its experiment's
        `best_metric`, or the "last".

    Raises:
      UserError: a field of the wrong type, or stages that cannot follow one another.
    """

    stages: Sequence[Stage] = ()
    model_dir: str = "runs/regime"
    start: str = "best"

    def __post_init__(self):
        check_types(self)
        check_choice(self, "start", STARTS)
        check_range(self, "model_dir", bool(self.model_dir), "a path")
        if not self.stages:
            raise UserError(
                "Regime.stages is empty; give --gin_file=gin_configs/runs/finetune_single.gin, "
                "finetune_instruction.gin or finetune_combined.gin"
            )
        names = [stage.name for stage in self.stages]
        for stage in self.stages:
            if not isinstance(stage, Stage):
                raise UserError(f"Regime.stages has {stage!r}, which is no Stage")
            if names.count(stage.name) > 1:
                raise UserError(f"Regime.stages has two called {stage.name!r}; rename one")
        for stage in self.stages[:-1]:
            if stage.tasks is not None and len(stage.tasks) > 1:
                raise UserError(
                    f"Stage.tasks of {stage.name!r} has {len(stage.tasks)} tasks, and the next "
                    "stage starts from one; only the last stage may have several"
                )
        for stage in self.stages:
            run = stage.experiment
            if run.eval_period % run.checkpoint_period:
                raise UserError(
                    f"EVAL_PERIOD = {run.eval_period} of stage {stage.name!r} is not a multiple of "
                    f"CHECKPOINT_PERIOD = {run.checkpoint_period}: the checkpoint of the best "
                    "evaluation might not be saved; set both to the same"
                )
            if not run.keep_best_checkpoints:
                raise UserError(
                    f"Experiment.keep_best_checkpoints = 0 in stage {stage.name!r}; keep 1 or more"
                )
        object.__setattr__(self, "stages", tuple(self.stages))


class Outcome(NamedTuple):
    """What a run of a regime ended with.

    Attributes:
      stage: its name.
      task: what was trained on.
      directory: of the run.
      steps: done.
      metric: the name of what the best was chosen by.
      best: evaluation at the best checkpoint, a row of metrics.jsonl.
      checkpoint: the best.
    """

    stage: str
    task: str
    directory: pathlib.Path
    steps: int
    metric: str
    best: dict[str, float]
    checkpoint: pathlib.Path


def run(regime: Regime, config_gin: str = "") -> list[Outcome]:
    """Run all stages, or go on where an earlier call stopped; finished runs stay as they are.

    Args:
      regime: what to run.
      config_gin: as `run.train`, for every run.

    Raises:
      UserError: what can be seen before any work is raised before any; else as `run.train`.
      Interrupted: as `run.train`.
    """
    check(regime)
    print(describe(regime), flush=True)
    outcomes: list[Outcome] = []
    start: str | None = None
    for stage in regime.stages:
        for experiment in runs(regime, stage):
            if start is not None:
                experiment = dataclasses.replace(experiment, initial_checkpoint_path=start)
            print(f"\n--- {stage.name}: {experiment.data.mixture_or_task_name}", flush=True)
            train(experiment, config_gin)
            distributed.wait_for_all(f"stage {experiment.model_dir}")
            outcomes.append(_outcome(stage, experiment))
        checkpoints = outcomes[-1].directory / "checkpoints"
        last = find_checkpoint(checkpoints).name
        name = outcomes[-1].checkpoint.name if regime.start == "best" else last
        start = str(checkpoints / name)
    print(f"\n{table(outcomes)}", flush=True)
    return outcomes


def runs(regime: Regime, stage: Stage) -> Iterator[Experiment]:
    """The experiments of a stage, each with its directory."""
    folder = pathlib.Path(regime.model_dir) / stage.name
    if stage.tasks is None:
        yield dataclasses.replace(stage.experiment, model_dir=str(folder))
        return
    for task in stage.tasks:
        data = dataclasses.replace(stage.experiment.data, mixture_or_task_name=task)
        yield dataclasses.replace(stage.experiment, data=data, model_dir=str(folder / task))


def check(regime: Regime) -> None:
    """Check all stages before the first begins; nothing but token caches is written.

    Raises:
      UserError: no checkpoint to start from, an unknown task, data that is missing or broken,
        parameters that do not exist, what does not fit, or directories that hold other runs.
    """
    root = pathlib.Path(regime.model_dir)
    if (root / "config.json").exists():
        raise UserError(
            f"MODEL_DIR = {regime.model_dir!r} holds a run; a regime needs a folder for the "
            "directories of its runs: choose another"
        )
    first = regime.stages[0].experiment.initial_checkpoint_path
    if first is not None:
        find_checkpoint(pathlib.Path(first))
    for stage in regime.stages:
        for experiment in runs(regime, stage):
            mesh = sharding.make_mesh(experiment.mesh, distributed.devices())
            check_fits(experiment, mesh)
            if experiment.trainable is not None or experiment.lora is not None:
                with sharding.use(mesh, experiment.rules):
                    plan_state(experiment, mesh)
            directory = RunDirectory(experiment.model_dir, writes=False)
            # Where a stage starts from is known when the one before has ended.
            may_change = (*MAY_CHANGE, "initial_checkpoint_path")
            directory.check_free(experiment, may_change=may_change)
            if not directory.done:
                pipeline.build_train(experiment.data)
                pipeline.build_eval(experiment.data, num_batches=1)
                scorecard.check_metric(experiment, scorecard.decoded_tasks(experiment))


def describe(regime: Regime) -> str:
    """The stages in order, for the terminal."""
    lines = [f"{len(regime.stages)} stage(s) in {regime.model_dir}"]
    source = regime.stages[0].experiment.initial_checkpoint_path or "new parameters"
    for number, stage in enumerate(regime.stages, 1):
        for experiment in runs(regime, stage):
            state = "from"
            if RunDirectory(experiment.model_dir, writes=False).done:
                state = "complete, was from"
            best = experiment.criterion
            patience = ""
            if experiment.early_stopping_patience is not None:
                patience = f", or {experiment.early_stopping_patience} evaluations without a better"
            lines.append(
                f"  {number}. {stage.name}: {experiment.data.mixture_or_task_name}, "
                f"{experiment.train_steps} steps{patience}; {state} {source}; "
                f"best by {best.best} {best.metric}"
            )
        source = f"the {regime.start} checkpoint of {stage.name}"
    return "\n".join(lines)


def table(outcomes: Sequence[Outcome]) -> str:
    """The best evaluation of every run, for the terminal."""
    rows = [("stage", "task", "steps", "best at", "by", "cross-entropy", "accuracy", "checkpoint")]
    for each in outcomes:
        best = each.best
        rows.append(
            (
                each.stage,
                each.task,
                str(each.steps),
                str(int(best["step"])),
                f"{each.metric} {best[each.metric]:.4f}",
                f"{best['cross_entropy']:.4f}",
                f"{best['accuracy']:.2%}",
                str(each.checkpoint),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _outcome(stage: Stage, experiment: Experiment) -> Outcome:
    directory = pathlib.Path(experiment.model_dir)
    task = experiment.data.mixture_or_task_name
    found = evaluations(directory / "metrics.jsonl", f"eval/{task}")
    checkpoint = best_checkpoint(directory / "checkpoints", experiment.criterion)
    for row in found:
        experiment.criterion.check(row)
    best = next((row for row in found if row["step"] == int(checkpoint.name)), None)
    if best is None:
        raise UserError(
            f"{directory / 'metrics.jsonl'} has no evaluation of step {checkpoint.name}, whose "
            "checkpoint is the best; remove the run directory to train again"
        )
    return Outcome(
        stage=stage.name,
        task=task,
        directory=directory,
        steps=max(row["step"] for row in found),
        metric=experiment.best_metric,
        best=numbers(best),
        checkpoint=checkpoint,
    )
