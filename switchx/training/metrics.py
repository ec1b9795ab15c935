"""Metrics as sums and counts on the device, as means on the host, and where they are written."""

import functools
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[attr-defined]
from tensorboardX.summary import scalar

from switchx.models.config import ModelConfig
from switchx.moe.assignment import RouterStats
from switchx.moe.config import MoeConfig
from switchx.run_directory import JsonLines
from switchx.training.losses import CrossEntropySums

# The statistics of a sparse layer that are written for every layer on its own.
ROUTER_METRICS = (
    "load_balance_loss",
    "router_z_loss",
    "dropped_fraction",
    "max_violation",
    "router_entropy",
    "router_confidence",
)


@flax.struct.dataclass
class Sums:
    """What a forward pass adds up over its batch. Batches and microbatches add leaf by leaf.

    Attributes:
      tokens: cross-entropy, z-loss, correct predictions and count of target tokens.
      router: "encoder" and "decoder" of sparse models: `RouterStats` stacked over sparse layers.
      num_tokens: real tokens of both sides, padding excluded.
      num_positions: positions of both sides, padding included.
    """

    tokens: CrossEntropySums
    router: dict[str, RouterStats]
    num_tokens: Any
    num_positions: Any

    def __add__(self, other: "Sums") -> "Sums":
        return jax.tree.map(jnp.add, self, other)


def stack_stats(router: Mapping[str, tuple[RouterStats, ...]]) -> dict[str, RouterStats]:
    """Per-layer statistics → one struct per stack with a leading layer axis; dense stacks go."""
    return {
        stack: jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        for stack, layers in router.items()
        if layers
    }


def summarize(
    sums: Sums,
    *,
    stack_moe: Mapping[str, MoeConfig] | None = None,
    layer_names: Mapping[str, tuple[str, ...]] | None = None,
) -> dict[str, Any]:
    """Means per token of the whole batch, as plain Python numbers.

    ``loss`` is what training minimises: cross_entropy + z_loss + α · load_balance_loss +
    c · router_z_loss + i · importance_loss, the last three summed over the sparse layers as in
    the paper (arXiv:2101.03961, §2.2). `by_layer` holds each layer's own, where a
    load_balance_loss of 1 is perfect balance; `expert_load` the share of tokens each expert was
    asked for.

    Args:
      sums: of one batch or of many, on host or device.
      stack_moe: has the weights α, c and i of each stack; None adds nothing to the loss.
      layer_names: names of the sparse layers of each stack, e.g. {"encoder": ("encoder/1",)}.
    """
    sums = jax.device_get(sums)
    weight = float(sums.tokens.weight)
    count = max(weight, 1.0)
    cross_entropy = float(sums.tokens.cross_entropy) / count
    z_loss = float(sums.tokens.z_loss) / count
    summary: dict[str, Any] = {
        "loss": cross_entropy + z_loss,
        "cross_entropy": cross_entropy,
        "perplexity": math.exp(min(cross_entropy, 700.0)),
        "accuracy": float(sums.tokens.correct) / count,
        "z_loss": z_loss,
        "num_targets": int(weight) if math.isfinite(weight) else weight,
        "num_tokens": int(sums.num_tokens),
        "fill": float(sums.num_tokens) / float(sums.num_positions),
    }
    if not sums.router:
        return summary
    stacks = sums.router.values()
    balance = sum(float(np.sum(stats.load_balance_loss)) for stats in stacks)
    router_z = sum(float(np.sum(stats.router_z_loss)) for stats in stacks)
    choices = sum(float(np.sum(stats.num_choices_K)) for stats in stacks)
    dropped = sum(float(np.sum(stats.num_dropped_K)) for stats in stacks)
    tokens = sum(float(np.sum(stats.num_tokens)) for stats in stacks)
    entropy = sum(float(np.sum(stats.entropy)) for stats in stacks)
    for stack, moe in (stack_moe or {}).items():
        stats = sums.router[stack]
        summary["loss"] += moe.load_balance_weight * float(np.sum(stats.load_balance_loss))
        summary["loss"] += moe.router_z_weight * float(np.sum(stats.router_z_loss))
        summary["loss"] += moe.importance_weight * float(np.sum(stats.importance_loss))
    summary |= {
        "load_balance_loss": balance,
        "router_z_loss": router_z,
        "dropped_fraction": dropped / max(choices, 1.0),
        "router_entropy": entropy / max(tokens, 1.0),
        "expert_load": {},
        "by_layer": {},
    }
    for stack, stats in sums.router.items():
        for index in range(len(stats.num_tokens)):
            name = layer_names[stack][index] if layer_names else f"{stack}/{index}"
            load = np.asarray(stats.expert_load)[index]
            summary["expert_load"][name] = [round(float(share), 6) for share in load]
            summary["by_layer"][name] = {
                metric: float(np.asarray(getattr(stats, metric))[index])
                for metric in ROUTER_METRICS
            }
            by_rank = np.asarray(stats.dropped_fraction_by_rank)[index]
            if len(by_rank) > 1:
                summary["by_layer"][name]["dropped_fraction_by_rank"] = by_rank.tolist()
    return summary


def summarizer(model: ModelConfig) -> Callable[[Any], dict[str, Any]]:
    """`summarize` with a model's weights of the router losses and names of its sparse layers."""
    names = {
        stack: tuple(f"{stack}/{layer}" for layer, sparse in enumerate(pattern) if sparse)
        for stack, pattern in (
            ("encoder", model.encoder_sparse),
            ("decoder", model.decoder_sparse),
        )
    }
    return functools.partial(
        summarize,
        stack_moe=model.stack_moe,
        layer_names=names,
    )


class MetricsWriter:
    """Appends rows to metrics.jsonl and the same numbers to TensorBoard.

    On opening, both forget everything after `last_step` (see `JsonLines`).
    """

    def __init__(self, directory: pathlib.Path, *, last_step: int):
        self._rows = JsonLines(directory / "metrics.jsonl", last_step=last_step)
        # Not SummaryWriter: its thread dies of a full disk or of a clock that is set back, and
        # then training waits for it without end.
        self._events = EventsWriter(str(directory / "events"), f".{os.getpid()}")
        if last_step:
            start = SessionLog(status=SessionLog.START)
            self._write_event(Event(step=last_step + 1, session_log=start))

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Write one row: `split` is "train" or "eval/<task>"."""
        self._rows.write({"step": step, "split": split, **values})
        scalars = (scalar(f"{split}/{name}", value) for name, value in _flatten(values))
        summary = Summary(value=[value for each in scalars for value in each.value])
        self._write_event(Event(step=step, summary=summary))

    def close(self) -> None:
        """Close both."""
        self._rows.close()
        self._events.close()

    def _write_event(self, event: Event) -> None:
        event.wall_time = time.time()  # what TensorBoard shows beside the steps
        self._events.write_event(event)
        self._events.flush()


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    flat: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat += _flatten(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            flat += [(f"{prefix}{name}/{index}", item) for index, item in enumerate(value)]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat.append((prefix + name, float(value)))
    return flat
