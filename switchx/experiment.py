"""`Experiment`: everything a configuration fills, and the checks across its parts."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from switchx import sharding
from switchx.data import pipeline
from switchx.data.pipeline import DataConfig
from switchx.data.tokenization import user_cache
from switchx.errors import UserError, check_choice, check_range, check_types, parse_json
from switchx.models.config import ModelConfig, read_config
from switchx.models.t5 import T5
from switchx.moe.config import MoeConfig, check_whole_rows, group_shape
from switchx.reconstruction import change, reconstruct
from switchx.training import trainable
from switchx.training.lora import LoraConfig
from switchx.training.losses import LossConfig
from switchx.training.optimizer import OptimizerConfig, make_optimizer
from switchx.training.selection import DIRECTIONS, Criterion
from switchx.training.state import StatePlan, create_state

# A continued run may differ from its beginning in these: none changes what a step computes.
MAY_CHANGE = (
    "train_steps",
    "eval_period",
    "eval_first",
    "eval_steps",
    "checkpoint_period",
    "log_period",
    "num_samples",
    "sample_length",
    "num_decoded_examples",
    "keep_checkpoints",
    "keep_best_checkpoints",
    "best_metric",
    "best_direction",
    "early_stopping_patience",
    "model_dir",
    "data.token_cache_dir",
    "on_nonfinite",
    "mesh",
    "sharding_rules",
    "compilation_cache_dir",
)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One training run.

    Attributes:
      model, data, optimizer, loss: the parts.
      model_dir: the run directory (macro MODEL_DIR).
      train_steps: updates in all, of this run (TRAIN_STEPS).
      eval_period: steps between evaluations (EVAL_PERIOD); the last step is evaluated too.
      eval_first: evaluate before the first step of a new run as well.
      eval_steps: batches per evaluation, None for the whole split (EVAL_STEPS).
      checkpoint_period: steps between checkpoints (CHECKPOINT_PERIOD); the last is saved too.
      keep_checkpoints, keep_best_checkpoints: how many of the latest, and of the best among
        those of evaluated steps.
      best_metric: what is compared to find the best: any number in an evaluation's row of
        metrics.jsonl, "outer/inner" for nested ones.
      best_direction: "lowest" or "highest"; None goes by the metric's name, see
        `selection.Criterion`.
      early_stopping_patience: end after so many evaluations in a row without a better one; None
        for never.
      initial_checkpoint_path: run directory or checkpoint whose parameters a new run starts
        from (INITIAL_CHECKPOINT_PATH).
      initial_optimizer: take its optimizer state as well. Steps, and with them the learning-rate
        schedule, begin at 0 in any case.
      trainable: names or patterns of the parameters that are trained, see
        `training.trainable.select`; None is all of them, or with `lora` the adapters alone.
      lora: adapters beside the parameters; None for none.
      seed: of parameters, dropout and jitter (RANDOM_SEED; the data has its own).
      num_microbatches: pieces a batch is cut into to save memory (NUM_MICROBATCHES).
      mesh: devices along (data, fsdp, expert, model); -1 takes the rest (MESH).
      sharding_rules: changes to `sharding.RULES`: logical axis → mesh axis, axes or None.
      compilation_cache_dir: where compiled programs are kept for the next start, None for
        switchx/compiled in the user's cache (COMPILATION_CACHE_DIR).
      log_period: steps between rows of training metrics.
      log_norms: add parameter and update norms, by parameter, to those rows.
      on_nonfinite: "stop" or "skip" when a loss or gradient is not finite.
      num_samples: validation examples decoded at every evaluation, 0 for none.
      sample_length: tokens decoded of each.
      num_decoded_examples: validation examples of each task that every evaluation decodes and
        judges by the task's metrics ("decoded_<metric>" in its row), 0 for none.
    """

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    model_dir: str = "runs/experiment"
    train_steps: int = 1000
    eval_period: int = 100
    eval_first: bool = False
    eval_steps: int | None = 20
    checkpoint_period: int = 100
    keep_checkpoints: int = 3
    keep_best_checkpoints: int = 1
    best_metric: str = "cross_entropy"
    best_direction: str | None = None
    early_stopping_patience: int | None = None
    initial_checkpoint_path: str | None = None
    initial_optimizer: bool = False
    trainable: str | Sequence[str] | None = None
    lora: LoraConfig | None = None
    seed: int = 0
    num_microbatches: int = 1
    mesh: dict[str, int] = dataclasses.field(default_factory=lambda: {"data": -1})
    sharding_rules: dict[str, Any] = dataclasses.field(default_factory=dict)
    compilation_cache_dir: str | None = None
    log_period: int = 10
    log_norms: bool = False
    on_nonfinite: str = "stop"
    num_samples: int = 4
    sample_length: int = 32
    num_decoded_examples: int = 0

    def __post_init__(self):
        check_types(self)
        for field in (
            "train_steps",
            "eval_period",
            "checkpoint_period",
            "keep_checkpoints",
            "num_microbatches",
            "log_period",
            "sample_length",
        ):
            check_range(self, field, getattr(self, field) >= 1, "at least 1")
        check_range(
            self, "eval_steps", self.eval_steps is None or self.eval_steps >= 1, "positive or None"
        )
        check_range(self, "seed", 0 <= self.seed < 2**32, "in [0, 2**32)")
        for field in ("num_samples", "num_decoded_examples", "keep_best_checkpoints"):
            check_range(self, field, getattr(self, field) >= 0, "0 or more")
        check_choice(self, "on_nonfinite", ("stop", "skip"))
        check_range(self, "model_dir", bool(self.model_dir), "a path")
        folder = self.compilation_cache_dir
        check_range(self, "compilation_cache_dir", folder is None or bool(folder), "a path or None")
        check_range(self, "mesh", bool(self.mesh), "one axis or more, as in {'data': -1}")
        _ = self.rules
        check_range(self, "best_metric", bool(self.best_metric), "a metric")
        if self.best_direction is not None:
            check_choice(self, "best_direction", DIRECTIONS)
        patience = self.early_stopping_patience
        valid = patience is None or patience >= 1
        check_range(self, "early_stopping_patience", valid, "at least 1, or None")
        if patience is not None and self.eval_period % self.checkpoint_period:
            raise UserError(
                f"EVAL_PERIOD = {self.eval_period} is not a multiple of CHECKPOINT_PERIOD = "
                f"{self.checkpoint_period}: Experiment.early_stopping_patience waits for the best "
                "evaluation, and its checkpoint would not be saved; set both to the same"
            )
        trainable.check_patterns(self.trainable, "Experiment.trainable")
        if self.trainable is not None and not isinstance(self.trainable, str):
            object.__setattr__(self, "trainable", tuple(self.trainable))
        if self.lora is not None and self.initial_optimizer:
            raise UserError(
                "Experiment.initial_optimizer with Experiment.lora: adapters are new, there is no "
                "optimizer state of them to keep; set one of the two only"
            )
        if self.initial_optimizer and self.initial_checkpoint_path is None:
            raise UserError("Experiment.initial_optimizer needs INITIAL_CHECKPOINT_PATH")

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of an encoder row and of a decoder row."""
        lengths = self.data.task_feature_lengths
        return lengths["inputs"], lengths["targets"]

    @property
    def criterion(self) -> Criterion:
        """Which evaluation is the best."""
        return Criterion(self.best_metric, self.best_direction)

    @property
    def rules(self) -> sharding.Rules:
        """Which mesh axis each logical axis lies on."""
        return sharding.change_rules(self.sharding_rules)

    @property
    def train_flops(self) -> float:
        """Model FLOPs of a training step: three times the forward pass of every row."""
        return 3 * self.data.batch_size * self.model.flops_per_sequence(*self.lengths)


def read_experiment(run_directory: str, changes: Sequence[str] = ()) -> Experiment:
    """The experiment that a run directory holds, out of its config.json; gin is not run.

    A directory that `convert.py` wrote has a model.json only: its experiment is the defaults
    around that model, with the vocabulary beside it.

    Args:
      run_directory: what MODEL_DIR was, wherever it lies now.
      changes: FIELD=VALUE, as `reconstruction.change` takes them.

    Raises:
      UserError: no run directory; a file in it that cannot be read; changes that do not fit.
    """
    folder = pathlib.Path(run_directory)
    recorded, model, vocabulary = (
        folder / name for name in ("config.json", "model.json", "vocabulary.model")
    )
    if not recorded.is_file() and not model.is_file():
        what = "has neither a config.json nor a model.json" if folder.is_dir() else "is no folder"
        raise UserError(f"{run_directory!r} {what}; give a run directory, as train.py makes them")
    if not recorded.is_file():
        if not vocabulary.is_file() and not any("vocabulary=" in each for each in changes):
            raise UserError(
                f"{run_directory!r} has no vocabulary.model; name the vocabulary that the model "
                "was trained with by --gin.DataConfig.vocabulary=..."
            )
        data = DataConfig(vocabulary=str(vocabulary))
        experiment = Experiment(model=read_config(run_directory), data=data)
    else:
        try:
            values = parse_json(recorded.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{recorded} cannot be read: {reason}") from None
        experiment = reconstruct(Experiment, values, str(recorded))
    return change(dataclasses.replace(experiment, model_dir=run_directory), changes)


def plan_state(experiment: Experiment, mesh: Mesh) -> StatePlan:
    """`create_state` of an experiment's model, optimizer and seed, and of what it trains."""
    return create_state(
        T5(experiment.model),
        lambda axes: make_optimizer(experiment.optimizer, axes),
        seed=experiment.seed,
        mesh=mesh,
        rules=experiment.rules,
        trainable=experiment.trainable,
        lora=experiment.lora,
    )


def use_compilation_cache(experiment: Experiment) -> None:
    """Keep compiled programs for later processes, unless jax is told where by the environment.

    A damaged entry is a warning, and compiled again.
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        folder = experiment.compilation_cache_dir
        path = pathlib.Path(folder).expanduser() if folder else user_cache() / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(path))


def check_fits(experiment: Experiment, mesh: Mesh) -> None:
    """Check what depends on several parts of the configuration at once, before any work.

    Raises:
      UserError: the vocabulary does not fit the model, or rows, routing groups or widths do not
        divide over microbatches and devices.
    """
    model, data = experiment.model, experiment.data
    vocabulary = pipeline.vocabulary_size(data)
    if vocabulary > model.vocab_size:
        raise UserError(
            f"ModelConfig.vocab_size = {model.vocab_size} is too small for vocabulary "
            f"{data.vocabulary!r} with {vocabulary} ids; set vocab_size to {vocabulary} or more, "
            "or DataConfig.vocabulary to the one the model was made for"
        )
    if model.dtype == "float64" and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise UserError("ModelConfig.dtype = 'float64' needs JAX_ENABLE_X64=1 in the environment")
    rows, shards = data.batch_size, sharding.batch_shards(mesh)
    pieces = experiment.num_microbatches
    if rows % pieces:
        raise UserError(
            f"BATCH_SIZE = {rows} is not divisible by NUM_MICROBATCHES = {pieces}; "
            f"{_near_multiples(rows, pieces)} are"
        )
    if rows // pieces % shards:
        raise UserError(
            f"BATCH_SIZE = {rows} in {pieces} microbatch(es) is not divisible by the {shards} "
            f"data x fsdp x expert devices of MESH = {dict(mesh.shape)}; "
            f"{_near_multiples(rows, pieces * shards)} are"
        )
    for name, field in (("heads", "num_heads"), ("mlp", "d_ff"), ("vocab", "vocab_size")):
        size = getattr(model, field)
        sharding.check_divides(name, f"ModelConfig.{field}", size, mesh, experiment.rules)
    lengths: dict[str, int] = dict(zip(("encoder", "decoder"), experiment.lengths, strict=True))
    for moe in dict.fromkeys(model.stack_moe.values()):
        field = "ModelConfig.moe.num_experts"
        sharding.check_divides("expert", field, moe.num_experts, mesh, experiment.rules)
        if moe.router == "task":
            _check_tasks(experiment, moe)
        rows_of = [lengths[stack] for stack, each in model.stack_moe.items() if each == moe]
        if _groups_fit(experiment, rows_of, moe.group_size, shards):
            for length in rows_of:
                check_whole_rows(moe, group_shape(rows, length, moe.group_size)[1], length)
            continue
        divisors = [n for n in range(1, rows // pieces + 1) if rows // pieces % n == 0]
        sizes = {n * length for length in rows_of for n in divisors}
        fits = [size for size in sorted(sizes) if _groups_fit(experiment, rows_of, size, shards)]
        raise UserError(
            f"MoeConfig.group_size = {moe.group_size}: routing groups of so many tokens do "
            f"not divide over {pieces} microbatch(es) x {shards} device(s) with BATCH_SIZE = "
            f"{rows} and TASK_FEATURE_LENGTHS = {data.task_feature_lengths}; what fits: "
            f"{', '.join(['row', *map(str, fits[:8])])}"
        )


def _check_tasks(experiment: Experiment, moe: MoeConfig) -> None:
    tasks = pipeline.task_names(experiment.data)
    if moe.num_tasks < len(tasks):
        raise UserError(
            f"MoeConfig.num_tasks = {moe.num_tasks}: the mixture "
            f"{experiment.data.mixture_or_task_name!r} has {len(tasks)} tasks; set {len(tasks)}"
        )
    if not pipeline.knows_tasks(experiment.data):
        raise UserError(
            f"MoeConfig.router = 'task': the mixture {experiment.data.mixture_or_task_name!r} "
            "streams without saying whose task a token is; make token caches first "
            "(scripts/cache.py with the flags of this run)"
        )


def _groups_fit(
    experiment: Experiment, lengths: Sequence[int], group_size: int | str, shards: int
) -> bool:
    """Whether groups are the same in a microbatch as in the batch, and divide over devices."""
    rows, pieces = experiment.data.batch_size, experiment.num_microbatches
    for length in lengths:
        try:
            whole = group_shape(rows, length, group_size)
            piece = group_shape(rows // pieces, length, group_size)
        except UserError:
            return False
        if whole[1] != piece[1] or piece[0] % shards:
            return False
    return True


def _near_multiples(value: int, factor: int) -> str:
    below = value // factor * factor
    return " and ".join(str(each) for each in (below, below + factor) if each > 0)
