"""Every executor runs a command, tells its end, and stops it; Ray and submitit on this machine."""

import contextlib
import os
import signal
import sys
import time

import pytest

from switchx.errors import UserError
from switchx.research import executors

# Like a trial: told to end, it takes its time to save.
SLEEP = """
import signal, sys, time
def save(*_):
    time.sleep(2)
    print("saved")
    sys.exit(6)
signal.signal(signal.SIGTERM, save)
print("up", flush=True)
time.sleep(600)
"""


def python(code):
    return [sys.executable, "-c", code]


def wait(job, seconds=120.0):
    deadline = time.monotonic() + seconds
    while (code := job.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return code


@contextlib.contextmanager
def executor(name, tmp_path, max_parallel=1, **options):
    made = executors.make(name, max_parallel, tmp_path, options)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def background():
    """Ctrl-C ignored, as by all that a script starts with & and by their children."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", ["local", "ray", "submitit_local"])
@pytest.mark.usefixtures("background")
def test_commands_end_with_their_code_and_their_output_is_kept(tmp_path, name):
    log = tmp_path / "log"
    with executor(name, tmp_path, max_parallel=2) as made:
        assert made.max_parallel == 2
        assert wait(made.start(python("print('one')"), log)) == 0
        assert wait(made.start(python("import sys; print('two'); sys.exit(5)"), log)) == 5
        job = made.start(python(SLEEP), log)
        while b"up" not in log.read_bytes():
            assert job.poll() is None
            time.sleep(0.02)
        job.stop()
        assert wait(job) != 0
    assert log.read_text().split() == ["one", "two", "up", "saved"]


def test_a_killed_process_has_its_signal(tmp_path):
    with executor("local", tmp_path) as made:
        job = made.start(python("import os; os.kill(os.getpid(), 9)"), tmp_path / "log")
        assert wait(job) == -signal.SIGKILL


def test_cores_are_dealt_out(tmp_path, monkeypatch):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core")
    monkeypatch.setattr(executors, "_gpus", list)
    show = "import os, time; time.sleep(0.3); print(*sorted(os.sched_getaffinity(0)))"
    with executor("local", tmp_path, max_parallel=2) as made:
        jobs = [made.start(python(show), tmp_path / str(number)) for number in range(2)]
        assert [wait(job) for job in jobs] == [0, 0]
    shown = [set(map(int, (tmp_path / str(number)).read_text().split())) for number in range(2)]
    assert shown[0] | shown[1] == set(cores)
    assert not shown[0] & shown[1]


@pytest.mark.parametrize(
    ("max_parallel", "expected"), [(None, ["0", "1", "2"]), (1, ["0,1,2"]), (2, ["0,2", "1"])]
)
def test_gpus_are_dealt_out(tmp_path, monkeypatch, max_parallel, expected):
    monkeypatch.setattr(executors, "_gpus", lambda: ["0", "1", "2"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    show = "import os; print(os.environ['CUDA_VISIBLE_DEVICES']); import time; time.sleep(0.5)"
    with executor("local", tmp_path, max_parallel) as made:
        assert made.max_parallel == len(expected)
        jobs = [made.start(python(show), tmp_path / str(n)) for n in range(len(expected))]
        assert {wait(job) for job in jobs} == {0}
    assert [(tmp_path / str(n)).read_text().strip() for n in range(len(expected))] == expected


def test_a_system_that_does_not_bind_cores_runs_commands_all_the_same(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "sched_setaffinity")
    with executor("local", tmp_path) as made:
        assert wait(made.start(python("pass"), tmp_path / "log")) == 0


class NoGpu:
    """Ray, of a machine with two cores."""

    def init(self, **_):
        pass

    def remote(self, **_):
        return lambda function: function

    def cluster_resources(self):
        return {"CPU": 2.0}

    def shutdown(self):
        pass


def test_ray_does_not_wait_for_what_this_machine_has_not(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", NoGpu())
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match="--option=num_gpus=1: this machine has 0"):
        executors.make("ray", None, tmp_path, {"num_gpus": 1})
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert executors.make("ray", None, tmp_path, {"num_gpus": 1}).max_parallel == 1


def test_a_job_that_slurm_refuses_is_one_line(tmp_path, monkeypatch):
    made = executors.Submitit("local", 1, tmp_path, {})

    def refuse(*_):
        raise RuntimeError("sbatch: error: invalid partition\nspecified: gup")

    monkeypatch.setattr(made._executor, "submit", refuse)
    with pytest.raises(UserError, match="submitit: .* invalid partition specified: gup"):
        made.start(python("pass"), tmp_path / "log")


def test_what_cannot_be_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cores; give"):
        executors.make("local", 10**6, tmp_path, {})
    with pytest.raises(UserError, match="--option=num_gpus"):
        executors.make("local", 1, tmp_path, {"num_gpus": 1})
    with pytest.raises(UserError, match="submitit"):
        executors.make("submitit_local", 1, tmp_path, {"no_such": 1})
    with pytest.raises(UserError, match="submitit"):
        executors.make("slurm", 1, tmp_path, {})


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("ray", "ray", "ray"), ("slurm", "submitit", "slurm")]
)
def test_an_engine_that_is_not_installed_is_named(tmp_path, monkeypatch, name, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"pip install 'switchx\[{extra}\]'"):
        executors.make(name, 1, tmp_path, {})
