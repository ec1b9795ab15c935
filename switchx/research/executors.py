"""Where trials run: processes of this machine, Ray's workers, or SLURM's jobs.

An executor starts a command and gives back a job that can be asked how it is and told to stop; the
command is the same everywhere, and all that a trial leaves is in its folder. More than one machine
needs that folder, and the working directory, on a disk that all of them have.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from switchx.errors import UserError
from switchx.research.trial import PARENT

# Between SIGTERM, which saves, and SIGKILL.
GRACE_SECONDS = 120.0

NAMES = ("local", "ray", "slurm", "submitit_local")


class Job(Protocol):
    """A command that was started."""

    def poll(self) -> int | None:
        """Its exit code once it has ended, negative for a signal; None before."""
        ...

    def stop(self) -> None:
        """Ask it to save and end; `poll` tells when it has."""
        ...


class Executor(Protocol):
    """A place for jobs.

    Attributes:
      max_parallel: how many it takes at a time.
    """

    max_parallel: int

    def start(self, command: Sequence[str], log: pathlib.Path) -> Job:
        """Start a command whose output is appended to a file."""
        ...

    def close(self) -> None:
        """Let go of what was taken; jobs have ended."""
        ...


def make(
    name: str, max_parallel: int | None, folder: pathlib.Path, options: Mapping[str, Any]
) -> Executor:
    """The executor called `name`, one of `NAMES`.

    Args:
      max_parallel: jobs at a time; None is one a GPU, or one on a machine without; 64 of SLURM.
      folder: of the sweep, for what an engine writes down.
      options: of a job, as the engine names them: Ray's num_cpus, num_gpus, resources; submitit's
        slurm_partition, gpus_per_node, timeout_min, ….

    Raises:
      UserError: an engine that is not installed, or does not take the options.
    """
    if name == "local":
        if options:
            raise UserError(
                f"--option={min(options)}: this machine's processes take none; give "
                "--executor=ray or --executor=slurm"
            )
        return Local(max_parallel)
    if name == "ray":
        return Ray(max_parallel, options)
    cluster = "slurm" if name == "slurm" else "local"
    return Submitit(cluster, max_parallel, folder / "submitit", options)


class Local:
    """Processes of this machine: its GPUs, or else its cores, are dealt out to them."""

    def __init__(self, max_parallel: int | None = None):
        """Count what there is.

        Raises:
          UserError: more jobs than cores.
        """
        cores, gpus = _cores(), _gpus()
        self.max_parallel = max_parallel or len(gpus) or 1
        if self.max_parallel > len(cores):
            raise UserError(
                f"--max_parallel={self.max_parallel}: this machine has {len(cores)} cores; give "
                "that or less"
            )
        self._places = [
            (cores[number :: self.max_parallel], gpus[number :: self.max_parallel])
            for number in range(self.max_parallel)
        ]
        self._shared = bool(gpus) and len(gpus) < self.max_parallel
        if self._shared:
            self._places = [
                (mine, [gpus[number % len(gpus)]]) for number, (mine, _) in enumerate(self._places)
            ]
        self._jobs: list[_Process | None] = [None] * self.max_parallel

    def start(self, command: Sequence[str], log: pathlib.Path) -> Job:
        """As `Executor`."""
        free = next(
            number for number, job in enumerate(self._jobs) if job is None or job.poll() is not None
        )
        cores, gpus = self._places[free]
        environment = {PARENT: str(os.getpid())}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        if self._shared:
            environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        job = _Process(command, log, environment)
        # The threads that it will start take theirs from it. Only Linux can say so.
        with contextlib.suppress(ProcessLookupError, AttributeError):
            os.sched_setaffinity(job.pid, cores)
        self._jobs[free] = job
        return job

    def close(self) -> None:
        """As `Executor`; nothing is held."""


class _Process:
    """A command as a process of this machine."""

    def __init__(self, command: Sequence[str], log: pathlib.Path, environment: Mapping[str, str]):
        with open(log, "ab") as file:
            # In a session of its own: a Ctrl-C goes to the sweep, which then says who stops.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._killer: threading.Timer | None = None

    def poll(self) -> int | None:
        code = self._process.poll()
        if code is not None and self._killer is not None:
            self._killer.cancel()
        return code

    def stop(self) -> None:
        if self.poll() is None and self._killer is None:
            self._process.terminate()
            self._killer = threading.Timer(GRACE_SECONDS, self._process.kill)
            self._killer.daemon = True
            self._killer.start()

    def wait(self) -> int:
        # In steps: Ray's cancelling is an exception that no system call is woken for.
        while (code := self.poll()) is None:
            time.sleep(0.1)
        return code


def run_command(command: Sequence[str], log: str, folder: str) -> int:
    """Run a command to its end on whatever machine this is; SIGTERM is passed on to it.

    Returns:
      Its exit code.
    """
    os.chdir(folder)
    job = _Process(command, pathlib.Path(log), {PARENT: str(os.getpid())})
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: job.stop())
        # Ray cancels by it; what a script starts with & ignores it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return job.wait()
    except BaseException:
        # Ray ends a task that is cancelled by an exception in its main thread.
        job.stop()
        job.wait()
        raise


class Ray:
    """Ray's workers: of the cluster at RAY_ADDRESS, or else of one made on this machine."""

    def __init__(self, max_parallel: int | None, options: Mapping[str, Any]):
        """Connect, or start.

        Raises:
          UserError: Ray is not installed, does not take the options, or has no place for a job.
        """
        try:
            import ray
        except ImportError:
            raise _missing("ray", "ray") from None
        self._ray: Any = ray
        try:
            self._ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
            # A trial that fails is tried again by the sweep, which counts.
            self._run = self._ray.remote(max_retries=0, **options)(run_command)
        except (TypeError, ValueError, ConnectionError) as error:
            raise UserError(f"Ray: {' '.join(str(error).split())}") from None
        there = self._ray.cluster_resources()
        kind, option = ("GPU", "num_gpus") if options.get("num_gpus") else ("CPU", "num_cpus")
        fitting = there.get(kind, 0) / (options.get(option) or 1)
        # A cluster may grow; this machine does not, and its jobs would wait for ever.
        if fitting < 1 and "RAY_ADDRESS" not in os.environ:
            self.close()
            raise UserError(
                f"--option={option}={options.get(option, 1)}: this machine has "
                f"{there.get(kind, 0):g}; give less, or RAY_ADDRESS of a cluster"
            )
        self.max_parallel = max_parallel or max(int(fitting), 1)

    def start(self, command: Sequence[str], log: pathlib.Path) -> Job:
        """As `Executor`."""
        reference = self._run.remote(list(command), str(log.absolute()), os.getcwd())
        return _RayJob(self._ray, reference)

    def close(self) -> None:
        """As `Executor`."""
        self._ray.shutdown()


class _RayJob:
    def __init__(self, ray: Any, reference: Any):
        self._ray, self._reference = ray, reference

    def poll(self) -> int | None:
        done, _ = self._ray.wait([self._reference], timeout=0)
        if not done:
            return None
        try:
            return self._ray.get(self._reference)
        except self._ray.exceptions.TaskCancelledError:
            return -signal.SIGTERM
        except self._ray.exceptions.RayError:
            return 1

    def stop(self) -> None:
        self._ray.cancel(self._reference, force=False)


class Submitit:
    """Jobs of SLURM by submitit, or its processes of this machine that behave like them."""

    def __init__(
        self,
        cluster: str,
        max_parallel: int | None,
        folder: pathlib.Path,
        options: Mapping[str, Any],
    ):
        """Find the cluster.

        Raises:
          UserError: submitit or SLURM is not there, or does not take the options.
        """
        try:
            import submitit
        except ImportError:
            raise _missing("submitit", "slurm") from None
        self._job = _LocalSubmititJob if cluster == "local" else _SubmititJob
        self.max_parallel = max_parallel or (1 if cluster == "local" else 64)
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self._executor.update_parameters(**{"timeout_min": 24 * 60, **options})
        except (TypeError, ValueError, NameError, RuntimeError) as error:
            raise UserError(f"submitit: {' '.join(str(error).split())}") from None

    def start(self, command: Sequence[str], log: pathlib.Path) -> Job:
        """As `Executor`.

        Raises:
          UserError: SLURM does not take the job, such as one for a partition that it has not.
        """
        try:
            job = self._executor.submit(
                run_command, list(command), str(log.absolute()), os.getcwd()
            )
        except (RuntimeError, OSError) as error:
            raise UserError(f"submitit: {' '.join(str(error).split())}") from None
        return self._job(job)

    def close(self) -> None:
        """As `Executor`; nothing is held."""


class _SubmititJob:
    def __init__(self, job: Any):
        self._job = job
        self._stopped = False

    def poll(self) -> int | None:
        if not self._job.done():
            return None
        try:
            return self._job.result()
        except Exception:
            # Cancelled, out of time or lost: submitit has many exceptions for it.
            return -signal.SIGTERM if self._stopped else 1

    def stop(self) -> None:
        self._stopped = True
        self._job.cancel(check=False)


class _LocalSubmititJob(_SubmititJob):
    """Stopped by a signal: submitit's own cancelling of a process kills it after a second."""

    def poll(self) -> int | None:
        code = super().poll()
        if code is None and self._stopped:
            # Again: submitit passes over a signal that comes before the command is up.
            self.stop()
        return code

    def stop(self) -> None:
        self._stopped = True
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(self._job.job_id), signal.SIGTERM)


def _missing(module: str, extra: str) -> UserError:
    return UserError(
        f"--executor needs {module}: pip install 'switchx[{extra}]', or give --executor=local"
    )


def _cores() -> list[int]:
    """The cores that this process may use; all of the machine's where the system does not say."""
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:
        return list(range(os.cpu_count() or 1))


def _gpus() -> list[str]:
    """The NVIDIA GPUs that this process may use, without waking them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [each for each in visible.split(",") if each.strip()]
    devices = pathlib.Path("/proc/driver/nvidia/gpus")
    return [str(number) for number, _ in enumerate(devices.iterdir())] if devices.is_dir() else []
