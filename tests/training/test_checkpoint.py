import errno
import json
import os
import pathlib
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchx import sharding
from switchx.errors import UserError
from switchx.models.t5 import T5
from switchx.training.checkpoint import Checkpointer, find_checkpoint, restore_from
from switchx.training.optimizer import OptimizerConfig, make_optimizer
from switchx.training.state import TrainState, create_state


@pytest.fixture(scope="module")
def plan(config):
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    create, abstract, *_ = create_state(
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
    _, elsewhere, *_ = create_state(
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
        checkpointer.save(at_step(state, step), {}, {"cross_entropy": value})
    checkpointer.close()
    assert steps(tmp_path) == [2, 4, 5]


def test_the_best_is_kept_after_a_restart(plan, tmp_path):
    state, _ = plan
    for step, value in enumerate([3.0, 1.0, 2.0, 2.5, 2.2], start=1):
        checkpointer = Checkpointer(tmp_path, keep=2, keep_best=1)
        checkpointer.save(at_step(state, step), {}, {"cross_entropy": value})
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


def test_a_failed_save_leaves_no_thread_waiting(plan, tmp_path, monkeypatch):
    state, _ = plan
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(at_step(state, 1), {})
    checkpointer.wait()
    before = set(threading.enumerate())
    mkdir = os.mkdir

    def no_more(path, *args, **kwargs):
        if pathlib.Path(path).name.startswith("optimizer."):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr("os.mkdir", no_more)
    with pytest.raises(UserError, match=r"No space left on device.*; step 1 is intact"):
        checkpointer.save(at_step(state, 2), {})
        checkpointer.wait()
    # A process ends when its threads have: these may still finish what they write.
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=60)
        assert not thread.is_alive() or thread.daemon, thread


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
    _, wider, *_ = create_state(
        T5(small_config(d_ff=16)),
        lambda axes: make_optimizer(OptimizerConfig(), axes),
        seed=1,
        mesh=sharding.make_mesh({"data": 1}, jax.devices()[:1]),
    )
    with pytest.raises(UserError, match=r"mlp/wi/kernel is \(10, 14\) there, \(10, 16\) here"):
        restore_from(str(tmp_path), wider, optimizer=False)


def damage(path: pathlib.Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    elif how == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif how == "append":
        path.write_bytes(content + b"x")
    else:
        path.unlink()


@pytest.fixture(scope="module")
def two_steps(plan, tmp_path_factory) -> pathlib.Path:
    state, _ = plan
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    checkpointer = Checkpointer(directory)
    for step in (1, 2):
        checkpointer.save(at_step(state, step), {"batch": step}, {"cross_entropy": 3.0 - step})
    checkpointer.close()
    return directory


def files(checkpoint: pathlib.Path) -> list[str]:
    found = [path for path in checkpoint.rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(checkpoint)) for path in found)


def test_every_file_of_the_items_has_its_checksum(two_steps):
    covered = []
    for item in ("params", "optimizer", "data", "metrics"):
        manifest = json.loads((two_steps / "2" / item / "checksums.json").read_text())
        covered += [f"{item}/{name}" for name in manifest]
    rest = {name.split("/")[-1] for name in set(files(two_steps / "2")) - set(covered)}
    # What orbax writes with the rename itself; neither is needed to restore.
    assert rest == {"checksums.json", "commit_success.txt", "_CHECKPOINT_METADATA"}
    assert any("ocdbt.process_0/d" in name for name in covered)


@pytest.mark.parametrize("how", ["flip", "truncate", "append", "remove"])
def test_whichever_file_is_damaged_the_state_restored_is_one_that_was_saved(
    plan, two_steps, tmp_path, how, capsys
):
    # The files of the optimizer are of the same kinds as those of the parameters.
    state, abstract = plan
    names = files(two_steps / "2")
    arrays = [name for name in names if "/d/" in name]
    kinds = [name for name in names if name not in arrays and not name.startswith("optimizer")]
    for number, name in enumerate([*kinds, arrays[0], arrays[-1]]):
        directory = tmp_path / str(number)
        shutil.copytree(two_steps, directory)
        damage(directory / "2" / name, how)
        restored, position = Checkpointer(directory).restore(abstract)
        step = int(restored.step)
        assert_equal(restored, at_step(state, step))
        assert position == {"batch": step}
        said = capsys.readouterr().out
        if name.endswith(("commit_success.txt", "_CHECKPOINT_METADATA")):
            assert step == 2
        elif how == "remove" and name.endswith("checksums.json"):
            assert step == 2
            assert "no checksums" in said or name.startswith("metrics")
        else:
            assert step == 1, name
            named = f"{name.split('/')[0]}/" if name.endswith("checksums.json") else name
            assert f"checkpoint {directory / '2'} is damaged ({named}" in said
            assert "2.damaged" in said and not (directory / "2").exists()
            assert len(files(directory / "2.damaged")) >= len(names) - 1


def test_a_run_goes_on_after_falling_back(plan, two_steps, tmp_path):
    state, abstract = plan
    directory = tmp_path / "checkpoints"
    shutil.copytree(two_steps, directory)
    for _ in range(2):
        damage(directory / "2" / "data" / "metadata", "flip")
        checkpointer = Checkpointer(directory)
        checkpointer.save(at_step(state, 2), {"batch": 2})
        checkpointer.close()
        assert_equal(Checkpointer(directory).restore(abstract)[0], at_step(state, 2))
    assert sorted(path.name for path in directory.iterdir()) == [
        "1",
        "2",
        "2.damaged",
        "2.damaged1",
    ]


def test_nothing_moves_when_no_checkpoint_is_good(plan, two_steps, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(two_steps, directory)
    damage(directory / "1" / "params" / "_METADATA", "flip")
    shutil.rmtree(directory / "2" / "params")
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"step 2: params is missing; step 1: params/_META"
        ) as e:
            Checkpointer(directory)
        assert "\n" not in str(e.value)
    assert steps(directory) == [1, 2]


def test_an_empty_folder_is_no_checkpoint(plan, two_steps, tmp_path, capsys):
    state, abstract = plan
    directory = tmp_path / "checkpoints"
    shutil.copytree(two_steps, directory)
    (directory / "6").mkdir()
    assert_equal(restore_from(str(directory), abstract, optimizer=True), at_step(state, 2))
    checkpointer = Checkpointer(directory)
    assert checkpointer.latest_step() == 2
    assert "6 is empty and no checkpoint" in capsys.readouterr().out
    checkpointer.save(at_step(state, 6), {})
    checkpointer.close()
    assert Checkpointer(directory).latest_step() == 6


def test_damaged_metrics_of_an_older_checkpoint_are_found(two_steps, tmp_path, capsys):
    directory = tmp_path / "checkpoints"
    shutil.copytree(two_steps, directory)
    (directory / "1" / "metrics" / "metrics").write_text('{"cross_e')
    assert Checkpointer(directory).latest_step() == 2
    assert "1.damaged" in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", [False, True])
def test_another_runs_damaged_checkpoint_is_refused(plan, two_steps, tmp_path, optimizer):
    directory = tmp_path / "checkpoints"
    shutil.copytree(two_steps, directory)
    damage(directory / "2" / "params" / "manifest.ocdbt", "flip")
    with pytest.raises(UserError, match=r"checkpoints/2 is damaged \(params/manifest.ocdbt"):
        restore_from(str(directory), plan[1], optimizer=optimizer)
    assert steps(directory) == [1, 2]


def test_a_checkpoint_without_checksums_is_read_with_a_warning(plan, two_steps, tmp_path, capsys):
    state, abstract = plan
    directory = tmp_path / "checkpoints"
    shutil.copytree(two_steps, directory)
    for manifest in directory.rglob("checksums.json"):
        manifest.unlink()
    assert_equal(Checkpointer(directory).restore(abstract)[0], at_step(state, 2))
    assert "params has no checksums" in capsys.readouterr().out
    # What then cannot be read at all is one line.
    (directory / "2" / "params" / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 cannot be read"):
        Checkpointer(directory).restore(abstract)
    with pytest.raises(UserError, match=r"2 cannot be read"):
        restore_from(str(directory), abstract, optimizer=False)


def test_the_state_of_another_optimizer_is_refused(config, plan, tmp_path):
    state, _ = plan
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(at_step(state, 1), {})
    checkpointer.close()
    adamw = OptimizerConfig(name="adamw", learning_rate=1e-3, schedule="constant")
    _, other, *_ = create_state(
        T5(config),
        lambda axes: make_optimizer(adamw, axes),
        seed=1,
        mesh=sharding.make_mesh({"data": 1}, jax.devices()[:1]),
    )
    with pytest.raises(UserError, match="not that of this OptimizerConfig"):
        restore_from(str(tmp_path), other, optimizer=True)


def test_a_run_directory_may_be_called_by_a_number(tmp_path):
    newest = tmp_path / "2024/checkpoints/12"
    for folder in (newest, newest.with_name("3")):
        (folder / "params").mkdir(parents=True)
    assert find_checkpoint(tmp_path / "2024") == newest
    (newest / "params").rmdir()
    (newest / "data").mkdir()
    assert find_checkpoint(tmp_path / "2024") == newest == find_checkpoint(newest)


def test_no_checkpoint_there(plan, tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        restore_from(str(tmp_path / "nowhere"), plan[1], optimizer=False)
