"""Runs of several processes with two devices each, which are killed, stopped and started again."""

import contextlib
import json
import multiprocessing
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from switchx.distributed import LOST
from tests.e2e import faults

ROOT = pathlib.Path(__file__).parents[2]
LAST_STEP = 12
HEARTBEAT = 5
FIRST_SLURM_PORT = 2**16 - 2**12
MESH = "{'data': 2, 'expert': 2}"
TIMING = ("tokens_per_second", "step_seconds", "mfu")
# Processes fork from one that has done the imports, and nothing of JAX.
PRELOADED = ["switchx.configuration", "switchx.run", "switchx.scorecard"]


def script(
    log: str, arguments: list[str], task: str, limit: int | None, environment: dict[str, str]
) -> None:
    """What scripts/train.py and scripts/evaluate.py do, printing into `log`."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if limit is not None:
        # Through a pipe: what limits the files of a run does not limit what it says.
        cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=output)
        assert cat.stdin
        output = cat.stdin.fileno()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.chdir(ROOT)
    os.environ.update(environment)
    from switchx import command_line, configuration, predictions, run, scorecard, trained
    from switchx.experiment import Experiment
    from switchx.inference.config import DecodingConfig

    sys.argv = [f"scripts/{task}.py", *arguments]
    if task == "train":
        configuration.main(Experiment, run.train, "")

    def evaluate_and_decode() -> None:
        experiment, _ = configuration.parse(Experiment, configuration.flag_parser(""))
        evaluated = [
            *scorecard.evaluate(experiment, metrics=("loss",)),
            *scorecard.evaluate(
                experiment, tasks=["wn_syn_ant"], metrics=("decoded", "ranked"), num_examples=5
            ),
        ]
        rows = [{"inputs": text} for text in ("one", "two words", "and three")]
        predicted = predictions.predict(
            experiment,
            trained.find_checkpoints(experiment.model_dir)[0],
            DecodingConfig(max_new_tokens=experiment.lengths[1]),
            enumerate(rows),
        )
        for row in [*(each.row for each in evaluated), *predicted]:
            print(json.dumps(row), flush=True)

    if task == "evaluate":
        command_line.run(evaluate_and_decode)


def free_port() -> int:
    """A port that JAX may derive from a SLURM job's number."""
    for port in range(FIRST_SLURM_PORT, 2**16):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


class Hosts:
    """Starts runs in processes of their own, as several hosts would with one command."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        text = folder / "text.txt"
        words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "fat", "rat"]
        rng = np.random.default_rng(0)
        text.write_text("\n".join(" ".join(rng.choice(words, 12)) for _ in range(400)))
        self._arguments = [
            *faults.SMALL,
            f"--gin.TEXT_FILES={text}",
            f"--gin.TOKEN_CACHE_DIR={folder / 'tokens'}",
            f"--gin.TRAIN_STEPS={LAST_STEP}",
            "--gin.CHECKPOINT_PERIOD=4",
            f"--gin.EVAL_PERIOD={LAST_STEP}",
            "--gin.Experiment.num_samples=0",
            f"--heartbeat_seconds={HEARTBEAT}",
        ]

    def start(
        self,
        run: pathlib.Path,
        *bindings: str,
        count: int = 2,
        mesh: str = MESH,
        task: str = "train",
        slurm: bool = False,
        limits: dict[int, int] | None = None,
    ) -> "Started":
        """Begin, or go on, in `count` processes, which find each other by flags or as under SLURM.

        `limits` are bytes of a file, by process.
        """
        port, processes = free_port(), []
        for index in range(count):
            arguments = [
                *self._arguments,
                f"--gin.MODEL_DIR={run}",
                f"--gin.MESH={mesh}",
                *bindings,
            ]
            environment = {}
            if slurm:
                environment = {
                    "SLURM_JOB_ID": str(port - FIRST_SLURM_PORT),
                    "SLURM_STEP_NODELIST": "localhost",
                    "SLURM_NTASKS": str(count),
                    "SLURM_PROCID": str(index),
                    "SLURM_LOCALID": str(index),
                }
            else:
                arguments += [
                    f"--coordinator_address=127.0.0.1:{port}",
                    f"--num_processes={count}",
                    f"--process_id={index}",
                ]
            log = str(run.with_name(f"{run.name}.{index}.log"))
            limit = (limits or {}).get(index)
            process = self._context.Process(
                target=script, args=(log, arguments, task, limit, environment)
            )
            process.start()
            processes.append((process, pathlib.Path(log)))
        return Started(run, processes)


class Started:
    """Processes of one run."""

    def __init__(self, run: pathlib.Path, processes: list[tuple[Any, pathlib.Path]]):
        self._run = run
        self._processes = processes

    def wait_for_step(self, step: int) -> None:
        """Wait until the metrics of `step` are written."""
        self._wait(lambda: any(row["step"] >= step for row in rows(self._run)))

    def wait_for(self, text: str) -> None:
        """Wait until the first one says a text."""
        log = self._processes[0][1]
        self._wait(lambda: log.exists() and text in log.read_text())

    def _wait(self, happened: Callable[[], bool]) -> None:
        while not happened():
            assert all(process.is_alive() for process, _ in self._processes), self.finish()
            time.sleep(0.005)

    def signal(self, index: int, signum: int) -> None:
        """Send a signal to one of them."""
        os.kill(self._processes[index][0].pid, signum)

    def finish(self) -> tuple[list[int], list[str]]:
        """Exit codes and outputs, of all."""
        for process, _ in self._processes:
            process.join(timeout=120)
        assert all(process.exitcode is not None for process, _ in self._processes), "hangs"
        codes = [process.exitcode for process, _ in self._processes]
        return codes, [log.read_text() for _, log in self._processes]


def rows(run: pathlib.Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    found = [json.loads(line) for line in lines]
    return [{key: row[key] for key in row if key not in TIMING} for row in found]


def checkpoints(run: pathlib.Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def assert_same_run(run: pathlib.Path, other: pathlib.Path, rtol: float = 0) -> None:
    for row, same in zip(rows(run), rows(other), strict=True):
        assert (row["step"], row["split"]) == (same["step"], same["split"])
        np.testing.assert_allclose(row["loss"], same["loss"], rtol=rtol)
        assert row["dropped_fraction"] == same["dropped_fraction"]
    leaves, others = (
        saved(each / "checkpoints" / str(LAST_STEP) / "params") for each in (run, other)
    )
    for name, leaf in leaves.items():
        np.testing.assert_allclose(leaf, others[name], rtol=10 * rtol, atol=rtol, err_msg=str(name))


def saved(item: pathlib.Path) -> dict[Any, np.ndarray]:
    """Arrays as they are on disk, whatever devices they were saved from."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(item).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return ocp.tree.to_flat_dict(checkpointer.restore(item, restore_args=as_numpy))


def error_lines(output: str) -> list[str]:
    assert "Traceback" not in output, output
    return [line for line in output.splitlines() if line.startswith("error:")]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    folder = tmp_path_factory.mktemp("hosts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "XLA_FLAGS",
            os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2"),
        )
        yield Hosts(folder)


@pytest.fixture(scope="module")
def unbroken(hosts) -> pathlib.Path:
    run = hosts.folder / "unbroken"
    sampling = ("--gin.Experiment.num_samples=1", "--gin.Experiment.sample_length=2")
    codes, outputs = hosts.start(run, *sampling).finish()
    assert codes == [0, 0], outputs
    assert "4 x cpu of 2 processes" in outputs[0] and "step 12: eval loss" in outputs[0]
    assert not [line for line in outputs[1].splitlines() if "step" in line or "model" in line]
    return run


def test_one_process_writes_the_run_directory_and_all_write_the_checkpoints(unbroken):
    found = [row["step"] for row in rows(unbroken) if row["split"] == "train"]
    assert found == list(range(1, LAST_STEP + 1))
    assert len((unbroken / "samples.jsonl").read_text().splitlines()) == 1
    assert len(list(unbroken.glob("events.out.*"))) == 1
    assert (unbroken / "DONE").exists() and not (unbroken / ".processes").exists()
    manifest = json.loads(
        (unbroken / "checkpoints" / str(LAST_STEP) / "params" / "checksums.json").read_text()
    )
    for process in (0, 1):
        assert any(name.startswith(f"ocdbt.process_{process}/d/") for name in manifest)


def lose(started: Started, killed: int) -> str:
    """Kill one of two processes; what the other one says about it."""
    started.signal(killed, signal.SIGKILL)
    begun = time.monotonic()
    codes, outputs = started.finish()
    assert time.monotonic() - begun < 3 * HEARTBEAT
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] == LOST, outputs
    (line,) = error_lines(outputs[1 - killed])
    assert "start all processes again" in line
    return line


def test_when_one_is_killed_the_other_ends_and_both_go_on_to_the_same_bits(hosts, unbroken):
    run = hosts.folder / "killed"
    started = hosts.start(run)
    started.wait_for_step(5)
    lose(started, 1)
    codes, outputs = hosts.start(run).finish()
    assert codes == [0, 0], outputs
    assert "from step 4" in outputs[0]
    assert_same_run(run, unbroken)


def test_when_the_process_where_all_meet_is_killed_the_other_ends(hosts):
    started = hosts.start(hosts.folder / "headless")
    started.wait_for("directory  ")
    lose(started, 0)


def test_a_signal_to_any_process_saves_and_one_process_goes_on_with_another_mesh(hosts, unbroken):
    run = hosts.folder / "stopped"
    started = hosts.start(run, "--gin.CHECKPOINT_PERIOD=100")
    started.wait_for_step(3)
    started.signal(1, signal.SIGTERM)
    codes, outputs = started.finish()
    assert codes == [128 + signal.SIGTERM] * 2, outputs
    assert "stopped by SIGTERM" in outputs[0] and "same command" in outputs[0]
    (step,) = map(int, checkpoints(run))
    assert 3 < step < LAST_STEP and rows(run)[-1]["step"] == step
    codes, (output,) = hosts.start(run, count=1, mesh="{'data': 2}").finish()
    assert codes == [0] and f"from step {step}" in output, output
    assert_same_run(run, unbroken, rtol=1e-5)


def test_what_one_process_cannot_save_is_not_committed_and_ends_all(hosts):
    run = hosts.folder / "full"
    codes, outputs = hosts.start(run, limits={1: 4096}).finish()
    assert codes == [2, 2], outputs
    for output in outputs:  # TensorStore's threads complain besides
        assert "error: process 1 of 2: checkpoint could not be written" in output
    assert not [name for name in checkpoints(run) if name.isdecimal()]


def test_several_processes_evaluate_and_decode(hosts, unbroken):
    codes, outputs = hosts.start(unbroken, task="evaluate", slurm=True).finish()
    assert codes == [0, 0], outputs
    found = [json.loads(line) for line in outputs[0].splitlines() if line.startswith("{")]
    assert not [line for line in outputs[1].splitlines() if line.startswith("{")]
    evaluated, judged, *decoded = found
    trained = next(row for row in rows(unbroken) if row["split"].startswith("eval/"))
    assert evaluated["loss"] == trained["loss"]
    assert judged["split"] == "validation/wn_syn_ant" and judged["num_examples"] == 5
    assert {"decoded_accuracy", "ranked_accuracy"} < set(judged)
    assert [row["inputs"] for row in decoded] == ["one", "two words", "and three"]
