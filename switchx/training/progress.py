"""What a person watching a run sees: one screen at the start, one live line, the rows written."""

import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from tqdm import tqdm

from switchx import distributed
from switchx.errors import UserError
from switchx.run_directory import Nowhere
from switchx.training.metrics import MetricsWriter
from switchx.training.step import StepMetrics

# Dense matmul peak, FLOP/s, bfloat16 without sparsity: vendors' data sheets.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_flops(device: Any) -> float | None:
    """Peak FLOP/s of a device, None where it is not known (CPUs)."""
    kind = str(device.device_kind)
    matches = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


class Diverged(UserError):
    """A loss or gradient that is not finite ended training."""


class Progress:
    """Reporter that writes metrics, keeps a live line on a terminal and guards against NaN.

    Args:
      writer: gets a row every `log_period` steps.
      summarize: `StepMetrics.sums` → means per token.
      learning_rate: by number of updates done before the step.
      first_step, last_step: of this call of the loop.
      log_period: steps between rows.
      flops_per_step: model FLOPs of a training step, for MFU.
      on_nonfinite: "stop" raises at the first step whose loss or gradient is not finite;
        "skip" counts and goes on. Either way that step's update was not applied.
    """

    def __init__(
        self,
        writer: MetricsWriter | Nowhere,
        summarize: Callable[[Any], dict[str, Any]],
        learning_rate: Callable[[int], Any],
        *,
        first_step: int,
        last_step: int,
        log_period: int,
        flops_per_step: float,
        on_nonfinite: str,
    ):
        self._writer = writer
        self._summarize = summarize
        self._learning_rate = learning_rate
        self._host = jax.local_devices(backend="cpu")[0]
        self._log_period = log_period
        self._flops_per_step = flops_per_step
        self._on_nonfinite = on_nonfinite
        peak = peak_flops(jax.devices()[0])
        self._peak = peak * jax.device_count() if peak else None
        self._steps = self._tokens = self._skipped = 0
        self._seconds = 0.0
        self._clock = time.monotonic()
        terminal = shutil.get_terminal_size((110, 24))
        self._bar = tqdm(
            total=last_step,
            initial=first_step,
            unit="step",
            # Quiet where stderr is not a terminal, and in all processes but one.
            disable=None if distributed.is_first() else True,
            # Not dynamic: tqdm draws nothing on a terminal that reports no size.
            ncols=terminal.columns,
            nrows=terminal.lines,
            file=sys.stderr,
        )

    def report(self, step: int, metrics: StepMetrics) -> None:
        """Write, show and check one step's metrics.

        Raises:
          Diverged: loss or gradients not finite under the policy "stop".
        """
        metrics = jax.device_get(metrics)
        now = time.monotonic()
        self._seconds += now - self._clock
        self._clock = now
        self._steps += 1
        self._tokens += int(metrics.sums.num_tokens)
        summary = self._summarize(metrics.sums)
        if not metrics.finite:
            self._handle_nonfinite(step, summary, float(metrics.grad_norm))
        rate = self._tokens / max(self._seconds, 1e-9)
        if step == 1 or step % self._log_period == 0:
            self._write(step, summary, metrics, rate)
        self._bar.update(1)
        if not self._bar.disable:
            self._bar.set_postfix_str(self._line(summary, rate), refresh=False)

    def restart_clock(self) -> None:
        """Leave the time spent in hooks out of the rates."""
        self._clock = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line above the live one."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """End the live line."""
        self._bar.close()

    def _write(
        self, step: int, summary: Mapping[str, Any], metrics: StepMetrics, rate: float
    ) -> None:
        step_seconds = self._seconds / self._steps
        mfu = self._flops_per_step / step_seconds / self._peak if self._peak else None
        row = dict(summary)
        # On the host's own device, where it need not wait for the step that is running.
        with jax.default_device(self._host):
            learning_rate = float(self._learning_rate(step - 1))
        row |= {
            "learning_rate": learning_rate,
            "grad_norm": float(metrics.grad_norm),
            "update_skipped": not bool(metrics.finite),
            "tokens_per_second": round(rate, 1),
            "step_seconds": round(step_seconds, 6),
            "mfu": mfu,
        }
        if metrics.norms:
            row["norms"] = jax.tree.map(float, metrics.norms)
        self._writer.write(step, "train", row)
        self._steps = self._tokens = 0
        self._seconds = 0.0

    def _line(self, summary: Mapping[str, Any], rate: float) -> str:
        parts = [f"loss {summary['loss']:.3f}", f"{rate:,.0f} tokens/s"]
        if self._peak and self._seconds:
            step_seconds = self._seconds / self._steps
            parts.append(f"MFU {self._flops_per_step / step_seconds / self._peak:.1%}")
        if "dropped_fraction" in summary:
            parts.append(f"dropped {summary['dropped_fraction']:.1%}")
        if self._skipped:
            parts.append(f"skipped {self._skipped}")
        return ", ".join(parts)

    def _handle_nonfinite(self, step: int, summary: Mapping[str, Any], grad_norm: float) -> None:
        parts = {name: summary[name] for name in ("cross_entropy", "z_loss")}
        parts |= {
            f"{name} of {layer}": values[name]
            for layer, values in summary.get("by_layer", {}).items()
            for name in ("load_balance_loss", "router_z_loss")
        }
        parts["grad_norm"] = grad_norm
        bad = next(
            (f"{name} is {value}" for name, value in parts.items() if not math.isfinite(value)),
            "the loss is not finite",
        )
        self._skipped += 1
        if self._on_nonfinite == "stop":
            raise Diverged(
                f"step {step}: {bad}; the update was not applied. "
                "Lower LEARNING_RATE, clip gradients, or set Experiment.on_nonfinite = 'skip'"
            )
        self.say(f"step {step}: {bad}; update skipped ({self._skipped} so far)")
