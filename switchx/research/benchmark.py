"""Benchmarks: what training, decoding and the data cost on this machine, a JSON object a case.

CPU-seconds are those of all threads of this process. On a shared machine they move less than
wall-clock seconds, so they are what runs are compared by.
"""

import argparse
import contextlib
import json
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from switchx import sharding
from switchx.batch import Batch
from switchx.data import pipeline
from switchx.errors import UserError, closest
from switchx.experiment import Experiment, check_fits, plan_state
from switchx.inference.config import DecodingConfig
from switchx.inference.decoding import generate
from switchx.research import moe_benchmark
from switchx.run import compile_step
from switchx.training.losses import cross_entropy
from switchx.training.state import TrainState

CASES = pathlib.Path("gin_configs/bench")


def case_file(name: str) -> str:
    """Gin file of a named case.

    Raises:
      UserError: there is no such case.
    """
    folder = pathlib.Path(__file__).parents[2] / CASES
    known = sorted(path.stem for path in folder.glob("*.gin"))
    if name not in known:
        raise UserError(f"there is no case {name!r}{closest(name, known)}")
    return str(CASES / f"{name}.gin")


class Prepared(NamedTuple):
    """A compiled training step, what it takes, and how long tracing and compiling took."""

    step: Any
    state: TrainState
    batch: Batch
    compile_seconds: float


def prepare(experiment: Experiment) -> Prepared:
    """Compile the training step of an experiment, with a new state and a batch of random tokens.

    Its data is only asked for shapes; compiled programs of earlier processes are not looked up.
    """
    mesh = sharding.make_mesh(experiment.mesh)
    check_fits(experiment, mesh)
    with sharding.use(mesh, experiment.rules):
        plan = plan_state(experiment, mesh)
        start = time.perf_counter()
        step = compile_step(experiment, plan, mesh)
        seconds = time.perf_counter() - start
        batch = jax.device_put(random_batch(experiment), sharding.batch_sharding(mesh))
        return Prepared(step, plan.create(), batch, seconds)


def train(experiment: Experiment, *, steps: int, warmup: int = 2) -> dict[str, Any]:
    """Compile the training step of an experiment and time it on one batch of random tokens.

    Args:
      experiment: as `train.py` would run it; its data is only asked for shapes.
      steps: timed steps.
      warmup: steps before those.

    Returns:
      cpu_seconds_per_step, step_seconds and page_faults_per_step (minor ones), medians;
      compile_seconds, tracing included; peak_rss_mb of the process in MiB; xla_flops of a step on
      all devices as XLA counts them (None where it does not; a scan's body counts once);
      model_flops, three times the analytic forward pass; tokens_per_second of encoder and decoder
      together; temp_mb, what the compiled step needs beside its arguments, and donated_mb, what
      it overwrites instead of allocating anew, MiB; loss after the last step; num_params.
    """
    step, state, batch, compile_seconds = prepare(experiment)
    seconds, cpu_seconds, page_faults, loss = [], [], [], float("nan")
    for _ in range(warmup + steps):
        start, cpu_start, faults = time.perf_counter(), time.process_time(), _page_faults()
        state, metrics = step(state, batch)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
        page_faults.append(_page_faults() - faults)
        tokens = metrics.sums.tokens
        loss = float(tokens.cross_entropy / tokens.weight)
    step_seconds = statistics.median(seconds[warmup:])
    flops = (step.cost_analysis() or {}).get("flops")
    memory = step.memory_analysis()
    return {
        "cpu_seconds_per_step": round(statistics.median(cpu_seconds[warmup:]), 4),
        "step_seconds": round(step_seconds, 4),
        "compile_seconds": round(compile_seconds, 2),
        "page_faults_per_step": round(statistics.median(page_faults[warmup:])),
        "peak_rss_mb": peak_rss_mb(),
        "temp_mb": round(memory.temp_size_in_bytes / 2**20) if memory else None,
        "donated_mb": round(memory.alias_size_in_bytes / 2**20) if memory else None,
        "xla_flops": flops and flops * jax.device_count(),
        "model_flops": experiment.train_flops,
        "tokens_per_second": round(
            experiment.data.batch_size * sum(experiment.lengths) / step_seconds, 1
        ),
        "loss": round(loss, 4),
        "num_params": experiment.model.num_params,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "steps": steps,
    }


def data(experiment: Experiment, *, steps: int, warmup: int = 2) -> dict[str, Any]:
    """Draw training batches and time it.

    Args:
      experiment: whose `data` to draw.
      steps: timed batches.
      warmup: batches before those.

    Returns:
      tokens_per_second, tokens_per_cpu_second: real tokens, inputs and targets, over all
      batches; fill: share of the positions that hold real tokens; build_seconds to the first
      batch; peak_rss_mb of the process in MiB.
    """
    start = time.perf_counter()
    batches = pipeline.build_train(experiment.data)
    for _ in range(warmup):
        next(batches)
    build_seconds = time.perf_counter() - start
    start, cpu_start = time.perf_counter(), time.process_time()
    tokens = positions = 0
    for _ in range(steps):
        batch = next(batches)
        for segment_ids in (batch.encoder_segment_ids, batch.decoder_segment_ids):
            tokens += int(np.count_nonzero(segment_ids))
            positions += segment_ids.size
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {
        "tokens_per_second": round(tokens / seconds),
        "tokens_per_cpu_second": round(tokens / cpu_seconds),
        "fill": round(tokens / positions, 4),
        "build_seconds": round(build_seconds, 2),
        "peak_rss_mb": peak_rss_mb(),
        "steps": steps,
    }


def loss(experiment: Experiment, *, steps: int, warmup: int = 2) -> dict[str, Any]:
    """The output head and its loss, with gradients: fused in chunks, and as autodiff has it.

    Args:
      experiment: whose decoder rows, width and vocabulary to use, without padding.
      steps: timed calls.
      warmup: calls before those.

    Returns:
      For "fused" (`switchx.training.losses`) and "plain" (log-softmax of all logits, differentiated
      by JAX): cpu_seconds, the median, and temp_mb, what the compiled function needs beside its
      arguments and results, MiB.
    """
    model, rows, length = experiment.model, experiment.data.batch_size, experiment.lengths[1]
    generator = np.random.default_rng(experiment.seed)
    hidden_BTD = generator.standard_normal((rows, length, model.d_model), np.float32)
    head_VD = generator.standard_normal((model.vocab_size, model.d_model), np.float32)
    targets_BT = jnp.asarray(generator.integers(0, model.vocab_size, (rows, length)), jnp.int32)
    weights_BT = jnp.ones((rows, length))

    def fused(hidden_BTD: jax.Array, head_VD: jax.Array) -> jax.Array:
        z_loss = experiment.loss.z_loss
        return cross_entropy(
            hidden_BTD, head_VD, targets_BT, weights_BT, z_loss=z_loss, label_smoothing=0.0
        )[0]

    def plain(hidden_BTD: jax.Array, head_VD: jax.Array) -> jax.Array:
        logits_BTV = jnp.einsum("btd,vd->btv", hidden_BTD, head_VD)
        log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
        target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
        return jnp.sum(log_z_BT - target_BT + experiment.loss.z_loss * jnp.square(log_z_BT))

    figures: dict[str, Any] = {}
    arguments = jax.device_put((hidden_BTD * model.d_model**-0.5, head_VD))
    for function in (fused, plain):
        jitted = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))
        compiled = jitted.lower(*arguments).compile()
        cpu_seconds = []
        for _ in range(warmup + steps):
            start = time.process_time()
            jax.block_until_ready(compiled(*arguments))
            cpu_seconds.append(time.process_time() - start)
        memory = compiled.memory_analysis()
        figures[function.__name__] = {
            "cpu_seconds": round(statistics.median(cpu_seconds[warmup:]), 4),
            "temp_mb": round(memory.temp_size_in_bytes / 2**20) if memory else None,
        }
    return {**figures, "tokens": rows * length, "steps": steps}


def decode(experiment: Experiment, *, steps: int, warmup: int = 1) -> dict[str, Any]:
    """Greedy decoding with a cache, encoder included, of a batch of random tokens.

    No sequence ends before it has as many tokens as a decoder row.

    Args:
      experiment: whose model, batch and lengths to use, with new parameters.
      steps: timed calls.
      warmup: calls before those.

    Returns:
      cpu_seconds and seconds of a call, medians; tokens_per_cpu_second and tokens_per_second, of
      new tokens; first_token_cpu_seconds, of a call for a single token, which is mostly the
      encoder; cpu_milliseconds_per_step, of the others; compile_seconds; num_params.
    """
    mesh = sharding.make_mesh(experiment.mesh)
    check_fits(experiment, mesh)
    rows, length = experiment.data.batch_size, experiment.lengths[1]
    with sharding.use(mesh, experiment.rules):
        params = plan_state(experiment, mesh).create().params
        tokens = jax.device_put(
            random_batch(experiment).encoder_tokens, sharding.batch_sharding(mesh)
        )
        found = {}
        for new in (1, length):
            decoding = DecodingConfig(max_new_tokens=new, eos_token_id=None)
            seconds, cpu_seconds = [], []
            for _ in range(warmup + steps + 1):
                start, cpu_start = time.perf_counter(), time.process_time()
                jax.block_until_ready(generate(experiment.model, params, tokens, decoding))
                seconds.append(time.perf_counter() - start)
                cpu_seconds.append(time.process_time() - cpu_start)
            timed = slice(warmup + 1, None)
            found[new] = statistics.median(cpu_seconds[timed]), statistics.median(seconds[timed])
            compile_seconds = seconds[0]
    cpu, wall = found[length]
    return {
        "cpu_seconds": round(cpu, 4),
        "seconds": round(wall, 4),
        "tokens_per_cpu_second": round(rows * length / cpu, 1),
        "tokens_per_second": round(rows * length / wall, 1),
        "first_token_cpu_seconds": round(found[1][0], 4),
        "cpu_milliseconds_per_step": round(1e3 * (cpu - found[1][0]) / max(length - 1, 1), 3),
        "compile_seconds": round(compile_seconds, 2),
        "num_params": experiment.model.num_params,
        "steps": steps,
    }


BENCHMARKS: dict[str, Callable[..., dict[str, Any]]] = {
    "train": train,
    "data": data,
    "loss": loss,
    "decode": decode,
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what to measure, of which case, how often: `what`, `gin_file`, `cases` and `steps`."""
    parser.add_argument("what", choices=sorted([*BENCHMARKS, "moe"]))
    parser.add_argument(
        "--cases",
        type=moe_benchmark.case_names,
        default="cpu_e8,cpu_e32,cpu_e128,cpu_base,decode",
        help=f"of moe, with commas: {', '.join(moe_benchmark.CASES)}",
    )
    parser.add_argument("--plot", help="of moe: an SVG file of how the cases grow")
    parser.add_argument("--case", dest="gin_file", action="append", type=case_file)
    parser.add_argument("--steps", type=positive_steps, default=5, help="timed steps or batches")


def run(parser: argparse.ArgumentParser, experiment: Callable[[], Experiment]) -> None:
    """Add the flags to a parser and measure what the command line asks for.

    `experiment` makes the experiment out of the same command line, where one is measured.
    """
    add_flags(parser)
    flags, _ = parser.parse_known_args()
    if flags.what == "moe":
        moe_benchmark.report(flags.cases, steps=flags.steps, plot=flags.plot)
    else:
        report(flags.what, experiment(), steps=flags.steps)


def report(what: str, experiment: Experiment, *, steps: int) -> None:
    """Measure one of `BENCHMARKS` and print its figures as a line of JSON."""
    with contextlib.redirect_stdout(sys.stderr):
        figures = BENCHMARKS[what](experiment, steps=steps)
    print(json.dumps(figures))


def positive_steps(text: str) -> int:
    """A number of steps from the command line.

    Raises:
      UserError: not an integer, or less than 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--steps={text}: should be an integer, 1 or more")
    return int(text)


def peak_rss_mb() -> int:
    """Largest resident memory of this process so far, MiB."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(size / 2**20) if sys.platform == "darwin" else round(size / 2**10)


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def random_batch(experiment: Experiment) -> Batch:
    """A batch without padding, one example a row, of tokens drawn evenly."""
    generator = np.random.default_rng(experiment.seed)
    rows = experiment.data.batch_size
    sides = {}
    for side, length in zip(("encoder", "decoder"), experiment.lengths, strict=True):
        sides[f"{side}_segment_ids"] = np.ones((rows, length), np.int32)
        positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
        sides[f"{side}_positions"] = positions
        sides[f"{side}_task_ids"] = np.zeros((rows, length), np.int32)

    def tokens(length: int) -> np.ndarray:
        shape = (rows, length)
        return generator.integers(2, experiment.model.vocab_size, shape, dtype=np.int32)

    encoder_length, decoder_length = experiment.lengths
    targets = tokens(decoder_length)
    inputs = np.roll(targets, 1, axis=1)
    inputs[:, 0] = 0
    return Batch(
        encoder_tokens=tokens(encoder_length),
        decoder_input_tokens=inputs,
        decoder_target_tokens=targets,
        decoder_loss_weights=np.ones((rows, decoder_length), np.float32),
        **sides,
    )
