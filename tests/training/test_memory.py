import jax
import pytest

from switchx import sharding
from switchx.errors import UserError
from switchx.models.t5 import T5
from switchx.training import memory
from switchx.training.lora import LoraConfig
from switchx.training.optimizer import OptimizerConfig, make_optimizer
from switchx.training.state import create_state, num_bytes
from tests.training.conftest import small_config


def estimate(config, mesh: dict[str, int], devices: int, rows: int = 4) -> memory.Memory:
    _, abstract, *_ = create_state(
        T5(config),
        lambda axes: make_optimizer(OptimizerConfig(), axes),
        seed=0,
        mesh=sharding.make_mesh(mesh, jax.devices()[:devices]),
    )
    return memory.estimate(config, abstract, rows=rows, encoder_length=9, decoder_length=7)


def test_state_and_gradients_are_exact():
    config = small_config(moe=None)
    need = estimate(config, {"data": 1}, 1)
    assert need.gradients == 4 * config.num_params
    # Parameters, step, two words of key, and Adafactor's v (nothing here is large enough to be
    # factored: three slots a leaf, two of them placeholders of one float, and a count).
    _, abstract, *_ = create_state(
        T5(config),
        lambda axes: make_optimizer(OptimizerConfig(), axes),
        seed=0,
        mesh=sharding.make_mesh({"data": 1}, jax.devices()[:1]),
    )
    assert need.state == num_bytes(abstract) > 2 * need.gradients
    assert need.weights == need.gradients
    later = max(need.activations + need.dispatch, need.update)
    assert need.total == need.state + need.gradients + later


def test_gradients_are_of_what_is_trained():
    config = small_config()
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])

    def need(**changes):
        plan = create_state(
            T5(config),
            lambda axes: make_optimizer(OptimizerConfig(name="adamw"), axes),
            seed=0,
            mesh=mesh,
            **changes,
        )
        lengths = dict(encoder_length=9, decoder_length=7)
        return memory.estimate(config, plan.abstract, rows=4, trainable=plan.trainable, **lengths)

    experts = 4 * 2 * 5 * 2 * 10 * 14
    part = need(trainable="experts")
    assert part.gradients == experts
    # Two moments, two counts and the step, and two words of key.
    assert part.optimizer == 2 * experts + 4 * 5
    # A [10, 2] and [14, 2], B [2, 14] and [2, 10], for each of five experts in two layers; then
    # the merged experts and their gradients.
    adapters = 4 * 2 * 5 * 2 * (10 + 14) * 2
    lora = need(lora=LoraConfig(rank=2, targets="experts"))
    assert lora.gradients == adapters + 2 * experts
    assert lora.weights == part.weights + adapters + 4  # and the scale
    assert lora.optimizer == 2 * adapters + 4 * 5


def test_experts_are_divided_over_their_axis():
    one = estimate(small_config(), {"expert": 1}, 1)
    five = estimate(small_config(), {"expert": 5}, 5)
    expert_bytes = 2 * 5 * 2 * 10 * 14 * 4
    assert one.gradients - five.gradients == expert_bytes * 4 // 5


def test_activations_grow_with_rows_and_shrink_with_remat():
    deep = dict(num_encoder_layers=6, num_decoder_layers=6)
    kept = estimate(small_config(**deep), {"data": 1}, 1, rows=64).activations
    assert kept > 1.9 * estimate(small_config(**deep), {"data": 1}, 1, rows=32).activations
    again = estimate(small_config(remat="full", **deep), {"data": 1}, 1, rows=64).activations
    assert again < kept / 2


def test_available_is_what_the_machine_has():
    assert 2**20 < memory.available() < 2**50


def test_releasing_memory_does_no_harm(monkeypatch):
    memory.release()
    # A C library without malloc_trim.
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    memory.release()


def test_a_model_beyond_all_devices_is_refused_before_it_is_traced(monkeypatch):
    config = small_config(moe=None)
    need = 8 * config.num_params  # parameters and gradients, float32
    monkeypatch.setattr(memory, "available", lambda: need // jax.device_count() + 1)
    memory.check_parameters(config)
    monkeypatch.setattr(memory, "available", lambda: need // jax.device_count() - 1)
    with pytest.raises(UserError, match=f"{config.num_params:,} parameters needs .* are free"):
        memory.check_parameters(config)
    memory.check_parameters(config, gradients=False)  # half of it
