"""Runs that are killed and started again, as a user would: by command line and signals."""

import pathlib
import signal
import subprocess
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.e2e.commands import finish, rows, start

LAST_STEP = 40


def train(directory: pathlib.Path, *bindings: str) -> subprocess.Popen:
    return start(
        "train",
        "--gin_file=gin_configs/switch_tiny.gin",
        f"--gin.MODEL_DIR={directory}",
        f"--gin.TRAIN_STEPS={LAST_STEP}",
        "--gin.EVAL_PERIOD=15",
        "--gin.EVAL_STEPS=2",
        "--gin.CHECKPOINT_PERIOD=7",
        "--gin.BATCH_SIZE=8",
        "--gin.DROPOUT_RATE=0.1",
        "--gin.ModelConfig.d_model=32",
        "--gin.ModelConfig.d_ff=48",
        "--gin.ModelConfig.num_encoder_layers=2",
        "--gin.ModelConfig.num_decoder_layers=2",
        "--gin.Experiment.log_period=3",
        "--gin.Experiment.num_samples=2",
        "--gin.Experiment.sample_length=4",
        *bindings,
    )


def wait_for_step(process: subprocess.Popen, directory: pathlib.Path, step: int) -> None:
    for _ in range(30_000):
        if any(row["step"] >= step for row in rows(directory)):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    raise AssertionError(f"step {step} did not come")


def assert_same_run(directory: pathlib.Path, other: pathlib.Path) -> None:
    assert rows(directory) == rows(other)
    assert (directory / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    with ocp.StandardCheckpointer() as checkpointer:
        for item in ("params", "optimizer"):
            trees = [
                checkpointer.restore(path.absolute() / "checkpoints" / str(LAST_STEP) / item)
                for path in (directory, other)
            ]
            leaves, others = (ocp.tree.to_flat_dict(tree) for tree in trees)
            assert leaves.keys() == others.keys()
            for name, leaf in leaves.items():
                np.testing.assert_array_equal(leaf, others[name], err_msg=str(name))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("unbroken") / "run"
    finish(train(directory))
    return directory


def test_a_run_that_is_killed_is_bitwise_the_unbroken_run(unbroken, tmp_path):
    # Kills by the hundred, at any moment: tests/e2e/faults.py. This one is of the command itself.
    directory = tmp_path / "run"
    process = train(directory)
    wait_for_step(process, directory, 17)
    process.kill()
    process.communicate()
    assert not (directory / "DONE").exists()
    output = finish(train(directory))
    assert "resuming" in output
    assert (directory / "DONE").exists()
    steps = [row["step"] for row in rows(directory) if row["split"] == "train"]
    assert steps == [1, *range(3, LAST_STEP + 1, 3)]
    assert_same_run(directory, unbroken)


def test_a_signal_saves_says_how_to_go_on_and_exits(unbroken, tmp_path):
    directory = tmp_path / "run"
    for signum, step in ((signal.SIGTERM, 10), (signal.SIGINT, 24)):
        process = train(directory)
        wait_for_step(process, directory, step)
        process.send_signal(signum)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 128 + signum
        assert "same command" in output and "Traceback" not in output
        stopped = max(int(path.name) for path in (directory / "checkpoints").iterdir())
        assert step <= stopped < LAST_STEP
    finish(train(directory))
    assert_same_run(directory, unbroken)


def test_a_signal_before_the_first_step_ends_the_process_at_once(tmp_path):
    directory = tmp_path / "run"
    process = train(directory)
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("directory"))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted" in output and "Traceback" not in output
    assert rows(directory) == []


def test_the_operative_configuration_is_kept_with_its_defaults(unbroken):
    text = (unbroken / "config.gin").read_text()
    assert f"TRAIN_STEPS = {LAST_STEP}" in text
    assert "MoeConfig.jitter_noise = 0.01" in text  # bound nowhere
