"""A trace of training steps for xprof, and where their time goes."""

import argparse
import collections
import pathlib
import re
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

from switchx import configuration
from switchx.errors import UserError
from switchx.experiment import Experiment
from switchx.research import benchmark


class Operations(NamedTuple):
    """Operations of one kind: how often they ran and how long they took in all, seconds."""

    kind: str
    count: int
    seconds: float


def profile(
    experiment: Experiment, folder: str, *, steps: int, warmup: int = 2
) -> list[Operations]:
    """Trace steps of an experiment on one batch of random tokens.

    Args:
      experiment: as `train.py` would run it; its data is only asked for shapes.
      folder: where the trace goes, in a new plugins/profile/TIME/.
      steps: traced steps.
      warmup: steps before those.

    Returns:
      XLA's operations by kind, the longest first, over all devices and threads.

    Raises:
      UserError: `folder` is a file.
    """
    if pathlib.Path(folder).is_file():
        raise UserError(f"--out={folder} is a file; name a folder")
    step, state, batch, _ = benchmark.prepare(experiment)
    for _ in range(warmup):
        state, _ = step(state, batch)
    jax.block_until_ready(state)
    with jax.profiler.trace(folder):
        for number in range(steps):
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                state, _ = step(state, batch)
        jax.block_until_ready(state)
    return operations(max(pathlib.Path(folder).glob("plugins/profile/*/*.xplane.pb")))


def operations(trace: pathlib.Path) -> list[Operations]:
    """XLA's operations in a trace by kind: their names without numbers."""
    counts: collections.Counter[str] = collections.Counter()
    nanoseconds: collections.Counter[str] = collections.Counter()
    for plane in ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                stats: dict[str, Any] = dict(event.stats)
                if "hlo_op" in stats:
                    kind = re.sub(r"[.\d]+$", "", str(stats["hlo_op"]))
                    counts[kind] += 1
                    nanoseconds[kind] += int(event.duration_ns)
    return [Operations(kind, counts[kind], n / 1e9) for kind, n in nanoseconds.most_common()]


def table(found: list[Operations], *, steps: int, rows: int = 20) -> str:
    """The longest operations, a line each: milliseconds a step, share, count a step, kind."""
    total = sum(each.seconds for each in found)
    lines = [f"{'ms a step':>10} {'share':>6} {'a step':>7}  operation"]
    for kind, count, seconds in found[:rows]:
        share = seconds / max(total, 1e-12)
        lines.append(f"{1e3 * seconds / steps:10.3f} {share:6.1%} {count / steps:7.1f}  {kind}")
    return "\n".join(lines)


def run(parser: argparse.ArgumentParser) -> None:
    """Add the flags to a parser of gin files and profile what the command line asks for."""
    parser.add_argument("--out", default="profile", help="folder of the trace")
    parser.add_argument("--steps", type=benchmark.positive_steps, default=5, help="traced steps")
    flags, _ = parser.parse_known_args()
    experiment = configuration.parse(Experiment, parser)[0]
    print(table(profile(experiment, flags.out, steps=flags.steps), steps=flags.steps))
    print(f"trace in {flags.out}; to look at it: pip install xprof; xprof --logdir {flags.out}")
