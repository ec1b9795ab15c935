"""`train`: an `Experiment` becomes a run directory."""

import concurrent.futures
import contextlib
import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from switchx import distributed, scorecard, sharding
from switchx.batch import Batch
from switchx.data import pipeline
from switchx.data.eval_tasks import EvalTask
from switchx.errors import UserError
from switchx.experiment import (
    MAY_CHANGE,
    Experiment,
    check_fits,
    plan_state,
    use_compilation_cache,
)
from switchx.inference.config import DecodingConfig
from switchx.inference.decoding import generate
from switchx.inference.evaluation import evaluate, make_eval_step
from switchx.models.t5 import T5
from switchx.overview import overview
from switchx.run_directory import JsonLines, Nowhere, RunDirectory, versions
from switchx.training import lora, memory
from switchx.training.checkpoint import Checkpointer, restore_from
from switchx.training.loop import Hook, Interrupted, StopSignals
from switchx.training.loop import train as train_loop
from switchx.training.metrics import MetricsWriter, summarizer
from switchx.training.optimizer import learning_rate_schedule
from switchx.training.progress import Progress
from switchx.training.selection import Patience, evaluations, numbers
from switchx.training.state import StatePlan, TrainState
from switchx.training.step import make_train_step


def train(experiment: Experiment, config_gin: str = "") -> dict[str, Any]:
    """Run an experiment to its last step, or go on where an earlier call stopped.

    Several processes call it with the same experiment; the first of them writes the directory,
    and all of them the checkpoints.

    Args:
      experiment: what to run.
      config_gin: text for config.gin, if gin made the experiment.

    Returns:
      The last evaluation's metrics; empty if the run was already complete.

    Raises:
      UserError: the configuration, the data or the directory does not allow it.
      Interrupted: SIGINT or SIGTERM to any process during training, after saving.
    """
    mesh = sharding.make_mesh(experiment.mesh, distributed.devices())
    check_fits(experiment, mesh)
    whole = experiment.trainable is None and experiment.lora is None
    memory.check_parameters(experiment.model, gradients=whole)
    use_compilation_cache(experiment)
    directory = RunDirectory(experiment.model_dir, writes=distributed.is_first())
    try:
        directory.check_free(experiment, may_change=MAY_CHANGE)
        distributed.check_shared(directory.path, "MODEL_DIR")
        with sharding.use(mesh, experiment.rules):
            return _Run(experiment, directory, mesh).run(config_gin)
    finally:
        directory.close()


def compile_step(experiment: Experiment, plan: StatePlan, mesh: Mesh) -> Any:
    """The compiled training step of an experiment: (state, batch) to (state, metrics).

    The state is donated. Call it under `sharding.use(mesh)`.
    """
    step = make_train_step(
        T5(experiment.model),
        experiment.loss,
        plan.optimizer,
        trainable=plan.trainable,
        num_microbatches=experiment.num_microbatches,
        log_norms=experiment.log_norms,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, plan.abstract)
    # Every process reads all metrics.
    everywhere = NamedSharding(mesh, PartitionSpec())
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, everywhere))
    encoder_length, decoder_length = experiment.lengths
    rows, where = experiment.data.batch_size, sharding.batch_sharding(mesh)
    fields = {
        field.name: jax.ShapeDtypeStruct(
            (rows, encoder_length if field.name.startswith("encoder") else decoder_length),
            np.float32 if field.name.endswith("weights") else np.int32,
            sharding=where,
        )
        for field in dataclasses.fields(Batch)
    }
    compiled = jitted.lower(plan.abstract, Batch(**fields)).compile()
    memory.release()
    return compiled


class _Run:
    """The parts of a run, built in the order of the data, and the hooks that tie them."""

    def __init__(self, experiment: Experiment, directory: RunDirectory, mesh: Mesh):
        self.experiment = experiment
        self.directory = directory
        self.mesh = mesh
        self.model = T5(experiment.model)
        self.summarize = summarizer(experiment.model)
        self.task = experiment.data.mixture_or_task_name
        self.evaluated: dict[str, Any] = {}
        self.evaluated_step = -1
        self.patience = Patience(experiment.criterion, experiment.early_stopping_patience)

    def run(self, config_gin: str) -> dict[str, Any]:
        """Train to the last step."""
        experiment, directory = self.experiment, self.directory
        self.checkpointer = Checkpointer(
            directory.checkpoints,
            keep=experiment.keep_checkpoints,
            keep_best=experiment.keep_best_checkpoints,
            criterion=experiment.criterion,
        )
        if self.checkpointer.latest_step() is None and directory.done:
            raise UserError(
                f"MODEL_DIR = {str(directory.path)!r} holds a complete run whose checkpoints are "
                "gone; choose another MODEL_DIR, or remove it to train again"
            )
        first_step = self.checkpointer.latest_step() or 0
        metrics = directory.path / "metrics.jsonl"
        for row in evaluations(metrics, f"eval/{self.task}", last_step=first_step):
            self.patience.note(row["step"], row)
        if directory.done and first_step >= experiment.train_steps:
            print(f"{directory.path} is complete at step {first_step}; raise TRAIN_STEPS to go on")
            return {}
        if directory.done and self.patience.exhausted:
            print(
                f"{directory.path} is complete: stopped early at step {first_step}; raise "
                "Experiment.early_stopping_patience to go on"
            )
            return {}

        with concurrent.futures.ThreadPoolExecutor(1, "data") as builder:
            # TensorFlow's import and graph building take as long as initialisation: overlap.
            building = builder.submit(self._build_data)
            plan = plan_state(experiment, self.mesh)
            print(overview(experiment, plan, self.mesh), flush=True)
            state, position = self._initial_state(plan)
            if int(state.step) > experiment.train_steps:
                raise UserError(
                    f"TRAIN_STEPS = {experiment.train_steps} is not beyond step {int(state.step)}, "
                    "where this run goes on; it counts from the beginning of the run"
                )
            batches, self.eval_batches, self.sample_batch, self.asked = building.result()
            distributed.wait_for_all("data")
            self._write_descriptions(config_gin)
            compiled = compile_step(experiment, plan, self.mesh)
            distributed.wait_for_all("step")
        first_step = int(state.step)
        if position:
            batches.seek(position)
        self.batches = pipeline.Prefetcher(batches, self._place)
        self.samples = self.writer = Nowhere()
        if distributed.is_first():
            # A run that begins keeps nothing, not even an evaluation before its first step.
            kept = -1 if position is None else first_step
            self.samples = JsonLines(directory.path / "samples.jsonl", last_step=kept)
            self.writer = MetricsWriter(directory.path, last_step=kept)
        self.progress = Progress(
            self.writer,
            self.summarize,
            learning_rate_schedule(experiment.optimizer),
            first_step=first_step,
            last_step=experiment.train_steps,
            log_period=experiment.log_period,
            flops_per_step=experiment.train_flops,
            on_nonfinite=experiment.on_nonfinite,
        )
        directory.set_done(False)
        # Before this there is nothing to save, and a signal may end the process where it stands.
        with StopSignals(distributed.Highest(self.mesh)).caught() as stop:
            self._train(state, compiled, stop)
        return self.evaluated

    def _train(self, state: TrainState, compiled: Any, stop: StopSignals) -> None:
        experiment, directory = self.experiment, self.directory
        with contextlib.ExitStack() as opened:
            # Each is closed whatever the others raise: a full disk fails at closing, too.
            for part in (self.samples, self.writer, self.batches, self.progress):
                opened.callback(part.close)
            try:
                if experiment.eval_first and not int(state.step):
                    self._evaluate(0, state)
                    self.progress.restart_clock()
                # It was exhausted before, if the end came between the last save and DONE.
                if not self.patience.exhausted:
                    train_loop(
                        state,
                        compiled,
                        self.batches,
                        last_step=experiment.train_steps,
                        reporter=self.progress,
                        hooks=[
                            Hook(experiment.eval_period, self._evaluate),
                            Hook(experiment.checkpoint_period, self._save),
                        ],
                        save=self._save,
                        stop=stop,
                        enough=lambda: self.patience.exhausted,
                    )
                if self.patience.exhausted:
                    best = experiment.criterion
                    self.progress.say(
                        f"stopped early: {self.patience.waited} evaluations since the {best.best} "
                        f"{best.metric}, at step {self.patience.best_step}"
                    )
                self.checkpointer.close()
                directory.set_done(True)
            except Interrupted as interrupted:
                self.checkpointer.wait()
                self.progress.close()
                print(f"{interrupted}; saved in {directory.path}. Run the same command to go on.")
                raise
            except Exception:
                # Whatever ended training, the save that it found under way is finished.
                with contextlib.suppress(UserError):
                    self.checkpointer.wait()
                raise

    # Building -------------------------------------------------------------------------------

    def _build_data(
        self,
    ) -> tuple[pipeline.Batches, Iterable[Batch], Batch | None, list[EvalTask]]:
        experiment = self.experiment
        where = sharding.batch_sharding(self.mesh)
        block, blocks = distributed.row_block(where, experiment.data.batch_size)
        batches = pipeline.build_train(experiment.data, process_index=block, process_count=blocks)
        eval_batches = pipeline.build_eval(
            experiment.data,
            num_batches=experiment.eval_steps,
            process_index=block,
            process_count=blocks,
        )
        sample = None
        if experiment.num_samples:
            data = dataclasses.replace(
                experiment.data, pack=False, batch_size=experiment.num_samples
            )
            sample = next(iter(pipeline.build_eval(data, num_batches=1)))
        asked = scorecard.decoded_tasks(experiment)
        scorecard.check_metric(experiment, asked)
        return batches, eval_batches, sample, asked

    def _initial_state(self, plan: StatePlan) -> tuple[TrainState, dict[str, int] | None]:
        experiment = self.experiment
        if self.checkpointer.latest_step() is not None:
            state, position = self.checkpointer.restore(plan.abstract)
            print(f"resuming {self.directory.path} from step {int(state.step)}", flush=True)
            return state, position
        if experiment.initial_checkpoint_path is None:
            return plan.create(), None
        loaded = restore_from(
            experiment.initial_checkpoint_path,
            plan.abstract,
            optimizer=experiment.initial_optimizer,
        )
        what = "parameters and optimizer" if experiment.initial_optimizer else "parameters"
        print(f"starting from the {what} of {experiment.initial_checkpoint_path}", flush=True)
        state = plan.create()
        # Adapters are those of this run.
        state = dataclasses.replace(state, params=state.params | loaded.params)
        if experiment.initial_optimizer:
            state = dataclasses.replace(state, opt_state=loaded.opt_state)
        return state, None

    def _place(self, batch: Batch) -> Batch:
        where = sharding.batch_sharding(self.mesh)
        return distributed.place_rows(batch, where, self.experiment.data.batch_size)

    def _write_descriptions(self, config_gin: str) -> None:
        # Only now that the data is good: a mistaken path must not claim the directory.
        self.directory.write_json("config.json", dataclasses.asdict(self.experiment))
        if config_gin:
            self.directory.write_text("config.gin", config_gin)
        self.directory.write_text("model.json", self.experiment.model.to_json() + "\n")
        now = versions(jax.devices(), self.mesh.shape)
        if (self.directory.path / "versions.json").exists():
            before = self.directory.read_json("versions.json")
            packages = before.get("packages", {}) if isinstance(before, dict) else {}
            changed = [
                f"{name} {old} -> {now['packages'].get(name)}"
                for name, old in packages.items()
                if old != now["packages"].get(name)
            ]
            if changed:
                print(f"versions changed since this run began: {', '.join(changed)}")
        self.directory.write_json("versions.json", now)

    # Hooks ----------------------------------------------------------------------------------

    def _evaluate(self, step: int, state: TrainState) -> None:
        state = dataclasses.replace(state, params=lora.merge(state.params))
        if not hasattr(self, "eval_step"):
            self.eval_step = jax.jit(
                make_eval_step(self.model, self.experiment.loss),
                out_shardings=NamedSharding(self.mesh, PartitionSpec()),
            )
        placed = map(self._place, self.eval_batches)
        summary = self.summarize(evaluate(self.eval_step, state.params, placed))
        decoded = scorecard.decode(self.experiment, state.params, self.mesh, self.asked)
        summary |= decoded.means
        self.writer.write(step, f"eval/{self.task}", summary)
        self.experiment.criterion.check(summary)
        self.evaluated, self.evaluated_step = summary, step
        self.patience.note(step, summary)
        text = (
            f"step {step}: eval loss {summary['loss']:.4f}, "
            f"cross-entropy {summary['cross_entropy']:.4f}, "
            f"perplexity {summary['perplexity']:.2f}, accuracy {summary['accuracy']:.2%}"
        )
        if "dropped_fraction" in summary:
            text += f", dropped {summary['dropped_fraction']:.2%}"
        self.progress.say(text + scorecard.describe(decoded.means))
        for task, metrics in decoded.by_task.items():
            self.writer.write(step, f"eval/{task}", metrics)
            self.progress.say(f"step {step}: {task}{scorecard.describe(metrics)}")
        if self.sample_batch is not None:
            self._write_samples(step, state)

    def _write_samples(self, step: int, state: TrainState) -> None:
        batch = self.sample_batch
        assert batch is not None
        predictions = jax.device_get(
            generate(
                self.experiment.model,
                state.params,
                batch.encoder_tokens,
                DecodingConfig(
                    max_new_tokens=min(self.experiment.sample_length, self.experiment.lengths[1])
                ),
                encoder_task_ids=batch.encoder_task_ids,
            ).tokens[:, 0]
        )
        data = self.experiment.data
        for row in range(len(predictions)):
            self.samples.write(
                {
                    "step": step,
                    "inputs": pipeline.decode_tokens(data, batch.encoder_tokens[row]),
                    "target": pipeline.decode_tokens(data, batch.decoder_target_tokens[row]),
                    "prediction": pipeline.decode_tokens(data, predictions[row]),
                }
            )

    def _save(self, step: int, state: TrainState) -> None:
        metrics = None
        if self.evaluated_step == step:
            found = {name: x for name, x in numbers(self.evaluated).items() if math.isfinite(x)}
            metrics = found if self.experiment.best_metric in found else None
        self.checkpointer.save(state, self.batches.position(), metrics)
