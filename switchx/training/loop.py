"""The loop: batches in, a trained state out. Everything periodic is a hook."""

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from switchx.training.state import TrainState
from switchx.training.step import StepMetrics


@runtime_checkable
class Reporter(Protocol):
    """Receives the metrics of every step, in order, while the device works on a later one."""

    def report(self, step: int, metrics: StepMetrics) -> None:
        """Take the metrics of a step. May raise to end training."""

    def restart_clock(self) -> None:
        """Called after hooks have run: the time since the last report was not training."""


class Hook(NamedTuple):
    """Something done with the state after every `period` steps and after the last one."""

    period: int
    run: Callable[[int, TrainState], None]


class Interrupted(Exception):
    """Training was asked to stop and has saved; `signum` is the signal that asked."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.signum = signum
        self.step = step


class StopSignals:
    """SIGINT and SIGTERM, noted at once and acted on between steps. A second one is not caught.

    Args:
      agree: from a number to the highest that any process gave at the same step.
    """

    def __init__(self, agree: Callable[[int], int] = lambda signum: signum):
        self.received: int | None = None
        self._agree = agree

    def agreed(self) -> int | None:
        """The signal that ends training after this step on every process; called at each step."""
        return self._agree(self.received or 0) or None

    def _note(self, signum: int, frame: Any) -> None:
        self.received = signum
        signal.signal(signum, signal.SIG_DFL if signum == signal.SIGTERM else _interrupt)

    @contextlib.contextmanager
    def caught(self) -> Iterator["StopSignals"]:
        """Catch the signals inside the block."""
        signals = (signal.SIGINT, signal.SIGTERM)
        previous = {signum: signal.signal(signum, self._note) for signum in signals}
        try:
            yield self
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def train(
    state: TrainState,
    train_step: Callable[[TrainState, Any], tuple[TrainState, StepMetrics]],
    batches: Iterator[Any],
    *,
    last_step: int,
    reporter: Reporter,
    hooks: Sequence[Hook],
    save: Callable[[int, TrainState], None],
    stop: StopSignals,
    enough: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Update `state` until it has made `last_step` steps, or until hooks have seen enough.

    Metrics are reported one step late, so that the host never waits for a device that has
    nothing to do; before a hook or a save they are reported first.

    Args:
      state: donated to `train_step`.
      train_step: compiled.
      batches: on their devices.
      last_step: counted from the beginning of the run, not of this call.
      reporter: see `Reporter`.
      hooks: run in order.
      save: called when training ends early.
      stop: set by signals.
      enough: asked after hooks have run; ends training with a saved state.

    Raises:
      Interrupted: a signal came, to any process; the state after the last step is saved.
    """
    step = int(state.step)
    pending: tuple[int, StepMetrics] | None = None
    while step < last_step:
        state, metrics = train_step(state, next(batches))
        step += 1
        stopped = stop.agreed()
        if pending:
            reporter.report(*pending)
        pending = (step, metrics)

        due = [hook for hook in hooks if step % hook.period == 0 or step == last_step]
        if due or stopped:
            reporter.report(*pending)
            pending = None
            for hook in due:
                hook.run(step, state)
            if due and step < last_step and enough():
                save(step, state)
                return state
            if stopped and step < last_step:
                save(step, state)
                raise Interrupted(stopped, step)
            reporter.restart_clock()
    return state
