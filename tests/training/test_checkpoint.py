import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchx import sharding
from switchx.errors import UserError
from switchx.models.t5 import T5
from switchx.training.checkpoint import BEST_METRIC, Checkpointer, restore_from
from switchx.training.optimizer import OptimizerConfig, make_optimizer
from switchx.training.state import TrainState, create_state


@pytest.fixture(scope="module")
def plan(config):
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    create, abstract, _ = create_state(
        T5(config), lambda axes: make_optimizer(OptimizerConfig(), axes), seed=1, mesh=mesh
    )
    return create(), abstract


def at_step(state: TrainState, step: int) -> TrainState:
    params = jax.tree.map(lambda leaf: leaf + step, state.params)
    return TrainState(step=jnp.int32(step), params=params, opt_state=state.opt_state, rng=state.rng)


def assert_equal(state: TrainState, other: TrainState) -> None:
    leaves, others = jax.tree.leaves(state), jax.tree.leaves(other)
    for leaf, same in zip(leaves, others, strict=True):
        np.testing.assert_array_equal(leaf, same)


def steps(directory: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir())


def test_round_trip_is_bitwise(plan, tmp_path):
    state, abstract = plan
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    assert checkpointer.latest_step() is None
    checkpointer.save(at_step(state, 7), {"epoch": 2, "batch": 5})
    checkpointer.close()
    restored, position = Checkpointer(tmp_path / "checkpoints").restore(abstract)
    assert position == {"epoch": 2, "batch": 5}
    assert_equal(restored, at_step(state, 7))
    assert jax.tree.structure(restored) == jax.tree.structure(state)


def test_restores_to_another_sharding(config, plan, tmp_path):
    state, _ = plan
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(at_step(state, 1), {})
    checkpointer.close()
    mesh = sharding.make_mesh({"expert": 5}, jax.devices()[:5])
    _, elsewhere, _ = create_state(
        T5(config),
        lambda axes: make_optimizer(OptimizerConfig(), axes),
        seed=1,
        mesh=mesh,
    )
    restored, _ = Checkpointer(tmp_path).restore(elsewhere)
    assert_equal(restored, at_step(state, 1))
    expert = restored.params["encoder"]["layers_1"]["mlp"]["expert"]["wi"]
    assert [shard.data.shape for shard in expert.addressable_shards] == [(1, 10, 14)] * 5


def test_keeps_the_latest_and_the_best(plan, tmp_path):
    state, _ = plan
    checkpointer = Checkpointer(tmp_path, keep=2, keep_best=1)
    for step, value in enumerate([3.0, 1.0, 2.0, 2.5, 2.2], start=1):
        checkpointer.save(at_step(state, step), {}, {BEST_METRIC: value})
    checkpointer.close()
    assert steps(tmp_path) == [2, 4, 5]


def test_half_written_checkpoints_are_removed_and_never_restored(plan, tmp_path):
    state, abstract = plan
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(at_step(state, 1), {})
    checkpointer.close()
    (tmp_path / "2.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.latest_step() == 1
    assert_equal(checkpointer.restore(abstract)[0], at_step(state, 1))
    assert steps(tmp_path) == [1]


def test_a_full_disk_is_one_line_that_names_the_last_good_step(plan, tmp_path, monkeypatch):
    state, abstract = plan
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(at_step(state, 1), {})
    checkpointer.wait()
    usage = os.statvfs(tmp_path)
    free = type("Usage", (), {"free": 10, "total": usage.f_blocks, "used": 0})()
    monkeypatch.setattr("switchx.training.checkpoint.shutil.disk_usage", lambda path: free)
    with pytest.raises(UserError, match=r"MiB are free; step 1 is intact") as error:
        checkpointer.save(at_step(state, 2), {})
    assert "\n" not in str(error.value)
    assert_equal(Checkpointer(tmp_path).restore(abstract)[0], at_step(state, 1))


@pytest.mark.parametrize("where", [".", "checkpoints", "checkpoints/3"])
def test_parameters_of_another_run(plan, tmp_path, where):
    state, abstract = plan
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    for step in (2, 3):
        checkpointer.save(at_step(state, step), {})
    checkpointer.close()
    loaded = restore_from(str(tmp_path / where), abstract, optimizer=False)
    leaves = zip(
        jax.tree.leaves(loaded.params), jax.tree.leaves(at_step(state, 3).params), strict=True
    )
    for leaf, same in leaves:
        np.testing.assert_array_equal(leaf, same)
    everything = restore_from(str(tmp_path / where), abstract, optimizer=True)
    assert_equal(everything, at_step(state, 3))


def test_parameters_that_do_not_fit_are_named(plan, tmp_path):
    from tests.training.conftest import small_config

    state, _ = plan
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(at_step(state, 1), {})
    checkpointer.close()
    _, wider, _ = create_state(
        T5(small_config(d_ff=16)),
        lambda axes: make_optimizer(OptimizerConfig(), axes),
        seed=1,
        mesh=sharding.make_mesh({"data": 1}, jax.devices()[:1]),
    )
    with pytest.raises(UserError, match=r"mlp/wi/kernel is \(10, 14\) there, \(10, 16\) here"):
        restore_from(str(tmp_path), wider, optimizer=False)


def test_a_checkpoint_with_a_missing_file_is_named(plan, tmp_path):
    state, abstract = plan
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(at_step(state, 4), {})
    checkpointer.close()
    shutil.rmtree(tmp_path / "4" / "params")
    with pytest.raises(UserError, match=r"4 cannot be read .* remove that folder"):
        Checkpointer(tmp_path).restore(abstract)


def test_the_state_of_another_optimizer_is_refused(config, plan, tmp_path):
    state, _ = plan
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(at_step(state, 1), {})
    checkpointer.close()
    adamw = OptimizerConfig(name="adamw", learning_rate=1e-3, schedule="constant")
    _, other, _ = create_state(
        T5(config),
        lambda axes: make_optimizer(adamw, axes),
        seed=1,
        mesh=sharding.make_mesh({"data": 1}, jax.devices()[:1]),
    )
    with pytest.raises(UserError, match="not that of this OptimizerConfig"):
        restore_from(str(tmp_path), other, optimizer=True)


def test_no_checkpoint_there(plan, tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        restore_from(str(tmp_path / "nowhere"), plan[1], optimizer=False)
