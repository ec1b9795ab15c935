import argparse
import signal

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from switchx import distributed
from switchx.errors import UserError

# What several processes do together: tests/e2e/test_hosts.py.

SLURM = {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "node[001-002]", "SLURM_PROCID": "1"}


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, None),
        (SLURM, "slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),  # a shell of an allocation
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),  # the batch script itself
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "ompi"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # any container of a cluster
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "k8s"),
    ],
)
def test_a_launcher_is_known_by_what_it_sets_for_one_of_several(environment, name):
    assert distributed.launcher({"JAX_PLATFORMS": "cpu", **environment}) == name


@pytest.mark.parametrize(
    ("hosts", "platforms", "name"),
    [("a,b", "tpu", "gketpu"), ("a,b", "cpu", None), ("localhost", "tpu", None)],
)
def test_a_tpu_pod_has_more_than_one_worker(monkeypatch, hosts, platforms, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: module == "libtpu")
    monkeypatch.setattr("glob.glob", lambda pattern: [])
    environment = {"TPU_WORKER_HOSTNAMES": hosts, "JAX_PLATFORMS": platforms}
    assert distributed.launcher(environment) == name


def flags(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    distributed.add_flags(parser)
    return parser.parse_args(arguments)


ADDRESS = "--coordinator_address=node1:1234"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([ADDRESS], "--coordinator_address needs --num_processes, --process_id as well"),
        (["--process_id=0"], "--process_id needs --coordinator_address, --num_processes"),
        (["--coordinator_address=node1", "--num_processes=2", "--process_id=0"], "HOST:PORT"),
        ([ADDRESS, "--num_processes=0", "--process_id=0"], "should be at least 1"),
        ([ADDRESS, "--num_processes=2", "--process_id=2"], r"--process_id=2 should be in 0\.\.1"),
        (
            [ADDRESS, "--num_processes=2", "--process_id=1", "--heartbeat_seconds=1"],
            "--heartbeat_seconds=1 should be at least 2",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused_before_anything_waits(monkeypatch, arguments, message):
    monkeypatch.setattr(distributed, "launcher", lambda environment: None)
    with pytest.raises(UserError, match=message) as error:
        distributed.join(flags(*arguments))
    assert "\n" not in str(error.value)


def test_what_jax_cannot_find_out_is_one_line_with_the_flags_to_give(monkeypatch):
    # Open MPI 5 does not say where its first process is.
    monkeypatch.setattr(distributed, "launcher", lambda environment: "ompi")
    handler = signal.getsignal(signal.SIGINT)

    def initialize(**arguments):
        assert arguments["cluster_detection_method"] == "ompi"
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(
        UserError, match=r"could not join .*\(ompi, .*coordinator_address.*--process_id"
    ):
        distributed.join(flags())
    assert signal.getsignal(signal.SIGINT) == handler


@pytest.mark.parametrize("arguments", [[], ["--num_processes=1"]])
def test_a_process_on_its_own_joins_nothing(monkeypatch, arguments, tmp_path):
    found = None if not arguments else "slurm"
    monkeypatch.setattr(distributed, "launcher", lambda environment: found)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("joins"))
    distributed.join(flags(*arguments))
    assert distributed.is_first()
    # Nothing to wait for, to agree on or to end.
    distributed.wait_for_all("here")
    distributed.check_shared(tmp_path / "nowhere", "MODEL_DIR")
    distributed.leave()
    distributed.end("message", 2)
    distributed.end_by_bug(ValueError("message"))
    assert not distributed.is_lost_contact(jax.errors.JaxRuntimeError("Gloo: Connection closed"))


def test_one_process_answers_itself_at_once():
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "model"))
    highest = distributed.Highest(mesh)
    assert [highest(number) for number in (0, 15, 0)] == [0, 15, 0]


def test_several_processes_are_answered_a_call_later(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "model"))
    highest = distributed.Highest(mesh)
    assert [highest(number) for number in (0, 15, 0, 2)] == [0, 0, 15, 0]


class Split:
    """Stands for the sharding of six or eight rows as one of several processes sees it."""

    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))

    def __init__(self, *held: slice):
        self._held = held

    def addressable_devices_indices_map(self, shape):
        return {number: (rows,) for number, rows in enumerate(self._held)}


@pytest.mark.parametrize(
    ("held", "rows", "block"),
    [
        ([slice(None)], 6, (0, 1)),
        ([slice(None), slice(None)], 6, (0, 1)),  # the model is split, not the rows
        ([slice(4, 6), slice(6, 8)], 8, (1, 2)),
        ([slice(4, 6), slice(4, 6)], 8, (2, 4)),
    ],
)
def test_a_process_reads_the_rows_its_devices_hold(held, rows, block):
    assert distributed.row_block(Split(*held), rows) == block  # type: ignore[arg-type]


@pytest.mark.parametrize("held", [[slice(0, 2), slice(4, 6)], [slice(2, 4), slice(4, 6)]])
def test_rows_that_are_no_block_are_refused(held):
    with pytest.raises(UserError, match=r"gives process 0 the rows \[\(.*of 8"):
        distributed.row_block(Split(*held), 8)  # type: ignore[arg-type]


def test_placed_rows_are_the_rows():
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    rows = np.arange(16).reshape(8, 2)
    placed = distributed.place_rows({"x": rows}, NamedSharding(mesh, PartitionSpec("data")), 8)
    np.testing.assert_array_equal(placed["x"], rows)
    assert [shard.data.shape for shard in placed["x"].addressable_shards] == [(1, 2)] * 8


def test_devices_of_a_process_are_next_to_each_other(monkeypatch):
    class Device:
        def __init__(self, number: int, process: int):
            self.id, self.process_index = number, process

    scattered = [Device(number, process) for number, process in enumerate((0, 1, 0, 1))]
    monkeypatch.setattr(jax, "devices", lambda: scattered)
    assert [device.id for device in distributed.devices()] == [0, 2, 1, 3]
