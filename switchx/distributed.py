"""Several processes as one run: how they find each other, what they agree on, how they end.

Every process runs the same command and the same steps. JAX connects them; what is added here is
that all end together, with one line, when one of them does: by an error, a signal or `kill -9`.
"""

import argparse
import contextlib
import ctypes
import glob
import importlib.util
import json
import os
import pathlib
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed as _jax_distributed  # the client has no public name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from switchx.errors import UserError

# Nothing is wrong with the run: started again, it goes on (sysexits.h: EX_TEMPFAIL).
LOST = 75
HEARTBEAT_SECONDS = 60
JOIN_SECONDS = 300
_FLAGS = ("coordinator_address", "num_processes", "process_id")
_BEAT_SECONDS = 1
# Network file systems may remember for half a minute that a file was not there.
_SHARED_SECONDS = 40
_FOREVER_MS = 1000 * 365 * 86400 * 1000
_ALIVE, _ENDED, _HOST, _SHARED = (
    f"switchx/{name}" for name in ("alive", "ended", "host", "shared")
)
_AGAIN = "what was saved is intact: start all processes again"

_watch: "_Watch | None" = None


# Joining ----------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a process that is one of several."""
    group = parser.add_argument_group(
        "several processes",
        "one command on every host; SLURM, Open MPI, Kubernetes jobs and TPU pods are detected",
    )
    group.add_argument("--coordinator_address", metavar="HOST:PORT", help="where process 0 runs")
    group.add_argument("--num_processes", type=int, metavar="N", help="how many; 1 detects none")
    group.add_argument("--process_id", type=int, metavar="I", help="which of them this is, from 0")
    group.add_argument(
        "--heartbeat_seconds",
        type=int,
        default=HEARTBEAT_SECONDS,
        metavar="S",
        help="silence after which a process is lost and the others end (default: %(default)s)",
    )


def join(flags: argparse.Namespace) -> None:
    """Connect this process to the others, if there are any. Before any use of JAX's devices.

    Other processes than the first say nothing on standard output from here on.

    Args:
      flags: of `add_flags`.

    Raises:
      UserError: flags that are missing or do not fit, or an environment that does not tell.
    """
    global _watch
    given = {name: getattr(flags, name) for name in _FLAGS if getattr(flags, name) is not None}
    method = launcher(os.environ)
    if flags.num_processes == 1 or (not given and method is None):
        return
    _check_flags(given, method, flags.heartbeat_seconds)
    # Signals are noted by the training loop and agreed on there.
    jax.config.update("jax_enable_preemption_service", False)
    # Where its service is gone, JAX aborts out of a thread of its own: Python's handlers, which
    # run in the main thread, would not see that signal.
    ctypes.CDLL(None).signal(signal.SIGABRT, _ended_by_jax)
    with _ending_while_waiting(given):
        try:
            jax.distributed.initialize(
                **given,
                cluster_detection_method="deactivate" if len(given) == len(_FLAGS) else method,
                initialization_timeout=JOIN_SECONDS + 60,
                # Where this runs out before the watch's own, JAX aborts with a stack trace.
                heartbeat_timeout_seconds=2 * flags.heartbeat_seconds + 60,
            )
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(
                f"could not join the other processes ({method or 'by flags'}, {reason}); give "
                f"{_names(_FLAGS)}, or --num_processes=1 to run alone"
            ) from error
    state = _jax_distributed.global_state
    if state.client is None or state.num_processes == 1:
        return
    if state.process_id:
        sys.stdout = open(os.devnull, "w")
    state.client.key_value_set(f"{_HOST}/{state.process_id}", socket.gethostname())
    wait_for_all("join")
    _watch = _Watch(state.client, state.process_id, state.num_processes, flags.heartbeat_seconds)
    _watch.start()


def launcher(environment: Mapping[str, str]) -> str | None:
    """What started this process as one of several, by JAX's name for it; None if nothing did.

    Decided by variables that the launchers set for such processes only, so that a process on its
    own (in a shell of an allocation, in a container of a cluster) never waits for others.
    """

    def more_than_one(name: str) -> bool:
        return environment.get(name, "").isdecimal() and int(environment[name]) > 1

    if more_than_one("SLURM_NTASKS") and "SLURM_STEP_NODELIST" in environment:
        return "slurm"
    if more_than_one("OMPI_COMM_WORLD_SIZE"):
        return "ompi"
    if "tpu" in environment.get("JAX_PLATFORMS", "tpu") and importlib.util.find_spec("libtpu"):
        if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
            return "gketpu"
        chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
        if chips and "TPU_SKIP_MDS_QUERY" not in environment:
            return "gcetpu"
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
        return "k8s"
    return None


def _check_flags(given: dict[str, Any], method: str | None, heartbeat: int) -> None:
    missing = [name for name in _FLAGS if name not in given]
    if missing and method is None:
        raise UserError(f"{_names(given)} needs {_names(missing)} as well")
    host, _, port = given.get("coordinator_address", "host:1").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"--coordinator_address={given['coordinator_address']}: write HOST:PORT, the host of "
            "process 0 and a free port there"
        )
    count, process = given.get("num_processes", sys.maxsize), given.get("process_id", 0)
    if count < 1:
        raise UserError(f"--num_processes={count} should be at least 1")
    if not 0 <= process < count:
        raise UserError(f"--process_id={process} should be in 0..{count - 1}")
    if heartbeat < 2 * _BEAT_SECONDS:
        raise UserError(f"--heartbeat_seconds={heartbeat} should be at least {2 * _BEAT_SECONDS}")


@contextlib.contextmanager
def _ending_while_waiting(given: dict[str, Any]) -> Iterator[None]:
    """JAX waits where no Python runs, and aborts if nobody comes: end by one line or a signal."""
    where = given.get("coordinator_address", "process 0")
    line = (
        f"not all processes met at {where} within {JOIN_SECONDS} seconds; see whether all were "
        "started, with the same address, and whether this host reaches it"
    )
    giving_up = threading.Timer(JOIN_SECONDS, _exit, (line, LOST))
    giving_up.daemon = True
    giving_up.start()
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        giving_up.cancel()


def _names(flags: Any) -> str:
    return ", ".join(f"--{flag}" for flag in flags)


# Working together -------------------------------------------------------------------------------


def is_first() -> bool:
    """Whether this process is the one that writes and speaks for all."""
    return jax.process_index() == 0


def devices() -> list[Any]:
    """All devices, in the order of their processes: those of one are next to each other."""
    return sorted(jax.devices(), key=lambda device: (device.process_index, device.id))


def wait_for_all(name: str) -> None:
    """Return when every process is here; at once if this is the only one."""
    if client := _jax_distributed.global_state.client:
        client.wait_at_barrier(f"switchx/{name}", _FOREVER_MS)


def row_block(where: NamedSharding, rows: int) -> tuple[int, int]:
    """Which rows of a global batch the devices of this process hold: (block, number of blocks).

    Processes hold the same block where the model is split between them.

    Args:
      where: sharding of arrays whose first dimension is the rows.
      rows: of the global batch.

    Raises:
      UserError: rows that are not one of equal blocks.
    """
    held = {
        index[0].indices(rows)[:2]
        for index in where.addressable_devices_indices_map((rows,)).values()
        if index is not None
    }
    size = sum(stop - start for start, stop in held)
    start, stop = min(held)[0], max(held)[1]
    if stop - start != size or start % size or rows % size:
        raise UserError(
            f"MESH = {dict(where.mesh.shape)} gives process {jax.process_index()} the rows "
            f"{sorted(held)} of {rows}, not one of equal blocks; choose sizes that are multiples "
            f"of the {jax.local_device_count()} devices of a process, or divide them"
        )
    return start // size, rows // size


def place_rows(tree: Any, where: NamedSharding, rows: int) -> Any:
    """Global arrays of `rows` rows, of arrays that hold the `row_block` of this process."""
    return jax.tree.map(
        lambda held: jax.make_array_from_process_local_data(where, held, (rows, *held.shape[1:])),
        tree,
    )


def check_shared(folder: pathlib.Path, name: str) -> None:
    """Check that a folder is the same one for all processes, and made by the first.

    Raises:
      UserError: what the first writes there does not appear here; calls the folder `name`.
    """
    client = _jax_distributed.global_state.client
    if client is None:
        return
    mark = folder / ".processes"
    if is_first():
        token = secrets.token_hex(8)
        mark.write_text(token)
        client.key_value_set(_SHARED, token, allow_overwrite=True)
    wait_for_all("shared")
    token = client.blocking_key_value_get(_SHARED, 1000)
    tries = 10 * _SHARED_SECONDS
    while not (mark.exists() and mark.read_text() == token):
        tries -= 1
        if not tries:
            raise UserError(
                f"{name} = {str(folder)!r} is not the folder that process 0 writes into; put it on "
                "a file system that all hosts share, under the same path"
            )
        time.sleep(0.1)
    wait_for_all("seen")
    if is_first():
        mark.unlink()


class Highest:
    """The highest of the numbers that the processes give at the same step.

    Asked on the devices behind the step and answered a call later, when it is there: no process
    waits for another more than the step itself makes it, and all get the same answer.
    """

    def __init__(self, mesh: Mesh):
        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._shape = (mesh.size,)
        self._highest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._asked: Any = 0

    def __call__(self, number: int) -> int:
        """Give a number; what the last call asked, 0 at first. With one process its own number."""
        if jax.process_count() == 1:
            return number
        given = jax.make_array_from_callback(
            self._shape, self._split, lambda _: np.full(1, number, np.int32)
        )
        answer, self._asked = int(self._asked), self._highest(given)
        return answer


# Ending together --------------------------------------------------------------------------------


def leave() -> None:
    """Wait until all processes are done, and part: what one does later does not end the others."""
    if _watch is not None:
        wait_for_all("leave")
        _watch.leave()
        jax.distributed.shutdown()


def end(message: str, code: int) -> None:
    """Print why this process ends and end it, and the others with the same line and code.

    Returns if there are no others.
    """
    if _watch is not None:
        _watch.end(message, code)


def end_by_bug(error: Exception) -> None:
    """End as `end` does after the traceback of an error that nobody foresaw."""
    if _watch is not None:
        traceback.print_exception(error)
        end(f"{type(error).__name__}: {error}", 1)


def is_lost_contact(error: Exception) -> bool:
    """Whether a computation failed because another process does not take part in it any more."""
    signs = ("gloo", "nccl", "connection", "unavailable", "aborted", "cancelled")
    return _watch is not None and any(sign in str(error).lower() for sign in signs)


def end_without_contact(error: Exception) -> None:
    """End as `end` does after an error that `is_lost_contact`; the watch may know more before."""
    time.sleep(3 * _BEAT_SECONDS)
    reason = str(error).splitlines()[0]
    end(f"lost contact with another process ({reason}); {_AGAIN}", LOST)


class _Watch(threading.Thread):
    """Tells the others that this process is alive, and ends it when one of them has ended.

    Beats are counters in JAX's coordination service, which runs in process 0 and is what all have
    in common when a device waits without end for another. Process 0 compares them with its clock.
    """

    def __init__(self, client: Any, process: int, count: int, heartbeat: int):
        super().__init__(name="watch", daemon=True)
        self._client = client
        self._process, self._count, self._heartbeat = process, count, heartbeat
        self._left = threading.Event()

    def run(self) -> None:
        """Beat, look and listen until `leave`."""
        start = time.monotonic()
        heard = {process: ("", start) for process in range(self._count)}
        while not self._left.is_set():
            try:
                self._client.key_value_increment(f"{_ALIVE}/{self._process}", 1)
                if self._process == 0:
                    self._look(heard)
                notice = self._client.blocking_key_value_get(_ENDED, 1000 * _BEAT_SECONDS)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" in str(error) or self._left.is_set():
                    continue
                _exit(f"process 0 of {self._count}, where all meet, is gone; {_AGAIN}", LOST)
            if notice and not self._left.is_set():
                self._out(*json.loads(notice))

    def leave(self) -> None:
        """Stop: nothing that another process does ends this one any more."""
        self._left.set()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(_ENDED, "", allow_overwrite=True)
        self.join()

    def end(self, message: str, code: int) -> NoReturn:
        """End this process and tell the others why, unless one has ended before."""
        self._left.set()
        message = f"process {self._process} of {self._count}: {message}"
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(_ENDED, json.dumps([message, code]))
        self._out(message, code)

    def _out(self, message: str, code: int) -> NoReturn:
        print(f"error: {message}", file=sys.stderr, flush=True)
        if self._process == 0:
            # The others hear it from the service that runs here, and JAX aborts when that ends.
            time.sleep(2 * _BEAT_SECONDS)
        _exit("", code)

    def _look(self, heard: dict[int, tuple[str, float]]) -> None:
        now = time.monotonic()
        for key, beats in self._client.key_value_dir_get(_ALIVE):
            process = int(key.rpartition("/")[2])
            if beats != heard[process][0]:
                heard[process] = beats, now
        lost = [process for process, (_, last) in heard.items() if now - last > self._heartbeat]
        if lost:
            hosts = dict(self._client.key_value_dir_get(_HOST))
            names = (f"process {process} on {hosts[f'{_HOST}/{process}']}" for process in lost)
            self.end(
                f"nothing heard for {self._heartbeat} seconds from {', '.join(names)}; {_AGAIN}",
                LOST,
            )


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _ended_by_jax(signum: int) -> None:
    _exit(f"JAX gave up (why, see above): usually process 0 or its host is gone; {_AGAIN}", LOST)


def _exit(message: str, code: int) -> NoReturn:
    # At once: an ordinary exit waits for the others, and the main thread for its devices.
    if message:
        print(f"error: {message}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)
