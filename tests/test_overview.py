import jax

from switchx import sharding
from switchx.models.t5 import T5
from switchx.overview import overview
from switchx.training.optimizer import OptimizerConfig, make_optimizer
from switchx.training.state import create_state
from tests.test_experiment import EXPERIMENT


def text(monkeypatch, free: int) -> str:
    monkeypatch.setattr("switchx.training.memory.available", lambda: free)
    mesh = sharding.make_mesh({"data": 2}, jax.devices()[:2])
    plan = create_state(
        T5(EXPERIMENT.model),
        lambda axes: make_optimizer(OptimizerConfig(), axes),
        seed=0,
        mesh=mesh,
    )
    return overview(EXPERIMENT, plan, mesh)


def test_one_screen_says_what_will_run(monkeypatch):
    screen = text(monkeypatch, free=64 * 2**30)
    assert len(screen.splitlines()) <= 11
    assert f"{EXPERIMENT.model.num_params:,} in all" in screen
    assert f"{EXPERIMENT.model.num_active_params:,} per token" in screen
    assert "6+6 layers with 6 experts, router switch, capacity factor 1.25 (eval 2.0)" in screen
    assert "24 rows of 128 + 30 tokens" in screen
    assert "mesh 2 data\n" in screen
    assert "64.00 GiB free" in screen and "MORE THAN" not in screen


def test_too_much_memory_is_loud(monkeypatch):
    assert "MORE THAN THERE IS" in text(monkeypatch, free=2**30)
