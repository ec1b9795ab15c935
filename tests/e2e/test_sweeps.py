"""A sweep that ships, at its smallest, by command line: unbroken, and killed twice."""

import json
import os
import pathlib
import signal
import subprocess
import time

import pytest

from tests.e2e.commands import finish, rows, start

FILES = ("gin_configs/sweeps/capacity_factor.gin", "gin_configs/sweeps/minute.gin")
FLAGS = (
    "--gin.TRAIN_STEPS=30",
    "--gin.Sweep.bindings={'TRAIN_STEPS': %TRAIN_STEPS, 'EVAL_PERIOD': 10, "
    "'CHECKPOINT_PERIOD': 10, 'EVAL_STEPS': 2, 'Experiment.log_period': 5}",
    "--max_parallel=2",
)


def sweep(folder: pathlib.Path) -> subprocess.Popen:
    return start("sweep", *FILES, *FLAGS, f"--gin.MODEL_DIR={folder}")


def wait_for(condition):
    deadline = time.monotonic() + 200
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def trial_processes(folder: pathlib.Path) -> dict[str, int]:
    """The processes of a sweep's trials, by the trial's name."""
    found = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        if "scripts/trial.py" in " ".join(words) and str(folder) in words[-2]:
            found[pathlib.Path(words[-2]).name] = int(path.parent.name)
    return found


def results(folder: pathlib.Path) -> dict[str, list[dict]]:
    """What every trial measured, without the clock, by its arm."""
    return {
        path.name: rows(path) + rows(path, "evaluations.jsonl")
        for path in sorted(folder.glob("trials/*"))
    }


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("unbroken")
    output = finish(sweep(folder))
    assert output.count(" done: cross_entropy ") == 2
    return folder


def test_every_trial_is_evaluated_with_every_capacity(unbroken):
    found = results(unbroken)
    assert len(found) == 2
    for each in found.values():
        evaluated = [row for row in each if "settings" in row]
        capacities = [row["settings"]["EVAL_CAPACITY_FACTOR"] for row in evaluated]
        assert capacities in ([0.5, 2.0, 4.0], [1.0, 2.0, 4.0])
        # More room in evaluation drops less.
        dropped = [row["dropped_fraction"] for row in evaluated]
        assert dropped == sorted(dropped, reverse=True)
        assert dropped[0] > dropped[-1]


def test_what_is_done_is_not_run_again(unbroken):
    before = {path: path.stat().st_mtime_ns for path in unbroken.glob("trials/*/metrics.jsonl")}
    output = finish(sweep(unbroken))
    assert "starts" not in output
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_killed_sweeps_and_trials_end_with_the_same_numbers(unbroken, tmp_path):
    folder = tmp_path / "killed"
    process = sweep(folder)
    wait_for(lambda: list(folder.glob("trials/*/checkpoints/10")))
    trials = trial_processes(folder)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # They save and end when their sweep is gone.
    wait_for(lambda: not trial_processes(folder))
    assert trials and not list(folder.glob("trials/*/DONE"))

    process = sweep(folder)
    name, trial = next(iter(wait_for(lambda: trial_processes(folder)).items()))
    wait_for(
        lambda: json.loads((folder / f"trials/{name}/trial.json").read_text())["attempts"] == 2
    )
    os.kill(trial, signal.SIGKILL)
    output = finish(process)
    assert f"{name} fails, and is tried again: ended by SIGKILL" in output
    assert results(folder) == results(unbroken)


def test_a_mistake_is_one_line(tmp_path):
    axis = "--gin.train/Grid.values={'CAPACITY_FACTR': [1.0]}"
    process = start("sweep", FILES[0], axis, f"--gin.MODEL_DIR={tmp_path / 'none'}")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    assert output.strip().count("\n") == 0
    assert "did you mean 'CAPACITY_FACTOR'" in output
    assert not (tmp_path / "none").exists()
