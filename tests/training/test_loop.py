import itertools
import os
import pathlib
import signal

import jax.numpy as jnp
import pytest

from switchx.training import loop
from switchx.training.state import TrainState


class Log:
    """Stands for step, reporter, hooks and save; writes down the order of everything."""

    def __init__(self, stop_at: int | None = None):
        self.events: list[tuple] = []
        self.stop = loop.StopSignals()
        self.stop_at = stop_at

    def step(self, state: TrainState, batch: int):
        number = int(state.step) + 1
        self.events.append(("step", number, batch))
        if number == self.stop_at:
            self.stop.received = signal.SIGTERM
        state = TrainState(step=jnp.int32(number), params={}, opt_state=(), rng=state.rng)
        return state, f"metrics {number}"

    def report(self, step, metrics):
        self.events.append(("report", step, metrics))

    def restart_clock(self):
        self.events.append(("clock",))

    def hook(self, name):
        return lambda step, state: self.events.append((name, step, int(state.step)))


def run(log: Log, *, first: int, last: int, hooks=(), **options):
    state = TrainState(
        step=jnp.int32(first), params={}, opt_state=(), rng=jnp.zeros((2,), jnp.uint32)
    )
    return loop.train(
        state,
        log.step,
        itertools.count(first),
        last_step=last,
        reporter=log,
        hooks=hooks,
        save=log.hook("save"),
        stop=log.stop,
        **options,
    )


def test_metrics_come_one_step_late_and_before_every_hook():
    log = Log()
    state = run(log, first=0, last=4, hooks=[loop.Hook(3, log.hook("evaluate"))])
    assert int(state.step) == 4
    assert log.events == [
        ("step", 1, 0),
        ("step", 2, 1),
        ("report", 1, "metrics 1"),
        ("step", 3, 2),
        ("report", 2, "metrics 2"),
        ("report", 3, "metrics 3"),
        ("evaluate", 3, 3),
        ("clock",),
        ("step", 4, 3),
        ("report", 4, "metrics 4"),
        ("evaluate", 4, 4),  # the last step, whatever the period
        ("clock",),
    ]


def test_a_signal_saves_after_the_step_and_ends():
    log = Log(stop_at=2)
    with pytest.raises(loop.Interrupted) as interrupted:
        run(log, first=0, last=9)
    assert interrupted.value.signum == signal.SIGTERM and interrupted.value.step == 2
    assert log.events[-2:] == [("report", 2, "metrics 2"), ("save", 2, 2)]
    assert ("step", 3, 2) not in log.events


def test_a_signal_in_the_last_step_is_too_late():
    log = Log(stop_at=3)
    assert int(run(log, first=0, last=3).step) == 3


def test_hooks_that_have_seen_enough_end_it_with_a_saved_state():
    log = Log()
    hooks = [loop.Hook(2, log.hook("evaluate"))]
    state = run(log, first=0, last=9, hooks=hooks, enough=lambda: len(log.events) > 9)
    assert int(state.step) == 4
    assert log.events[-3:] == [
        ("report", 4, "metrics 4"),
        ("evaluate", 4, 4),
        ("save", 4, 4),
    ]


def test_nothing_to_do():
    log = Log()
    run(log, first=5, last=5)
    assert log.events == []


def test_signals_are_noted_then_restored():
    before = signal.getsignal(signal.SIGTERM)
    with loop.StopSignals().caught() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_ctrl_c_is_not_caught():
    with loop.StopSignals().caught():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_loop_reads_in_one_sitting():
    assert len(pathlib.Path(loop.__file__).read_text().splitlines()) < 200
