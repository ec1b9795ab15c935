"""Faults done to small runs, each compared bit for bit with a run to which nothing was done.

    python -m tests.e2e.faults --kills=100 --seed=1

Runs are processes forked from this one, which has the imports behind it and nothing of JAX
started: what a run costs is its own work, so that a hundred can be killed in minutes. Prints a
line per kill and fault, and at the end one JSON object: what each fault led to, kills by what
the run was doing, and the number of bits in which parameters, optimizer, data position, metrics
and samples differ.
"""

import argparse
import collections
import contextlib
import ctypes
import functools
import json
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
LAST_STEP = 24
CHECKPOINT_PERIOD = 4
TIMING = ("tokens_per_second", "step_seconds", "mfu")
NAMESPACE = "SWITCHX_FAULTS_NAMESPACE"

Shim = Callable[[], None]


# What a run is doing ---------------------------------------------------------------------------

PHASES = ("start", "data", "initialisation", "restoring", "compilation", "training", "evaluation")
PHASES += ("saving", "checksums", "deletion")
fork = multiprocessing.get_context("fork")


class Activity:
    """What a forked run is doing, in memory shared with it, so that it outlives a kill."""

    def __init__(self):
        self._active = fork.RawArray(ctypes.c_byte, len(PHASES))

    def now(self, directory: pathlib.Path) -> set[str]:
        """Names of `PHASES` that are under way; "start" if none is."""
        found = {name for name, active in zip(PHASES, self._active, strict=True) if active > 0}
        # Orbax saves in threads of its own; what is on disk says when it does.
        if any((directory / "checkpoints").glob("*.orbax-checkpoint-tmp")):
            found.add("saving")
        return found or {"start"}

    def watch(self) -> None:
        """In the child: mark the functions that are the phases."""
        import orbax.checkpoint as ocp

        from switchx import run
        from switchx.data import pipeline, token_batches
        from switchx.training import checkpoint, checksums

        self._mark("data", pipeline, "build_train")
        self._mark("data", pipeline, "build_eval")
        self._mark("data", token_batches.TokenBatches, "__next__")
        self._mark("initialisation", run, "plan_state")
        self._mark("restoring", checkpoint, "_set_aside_damaged")
        self._mark("restoring", checkpoint.Checkpointer, "restore")
        self._mark("compilation", run, "compile_step")
        self._mark("training", run, "train_loop")
        self._mark("evaluation", run._Run, "_evaluate")
        self._mark("saving", checkpoint.Checkpointer, "save")
        self._mark("checksums", checksums, "write")
        self._mark("deletion", ocp.path.deleter.StandardCheckpointDeleter, "delete")

    def _mark(self, phase: str, owner: Any, name: str) -> None:
        index, function = PHASES.index(phase), getattr(owner, name)

        @functools.wraps(function)
        def marked(*args: Any, **kwargs: Any) -> Any:
            self._active[index] += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._active[index] -= 1

        setattr(owner, name, marked)


# Runs ------------------------------------------------------------------------------------------

# Flags of a model that takes seconds, on a file of text.
SMALL = (
    "--gin_file=gin_configs/switch_tiny.gin",
    "--gin_file=gin_configs/data/text_file.gin",
    "--gin.EVAL_STEPS=2",
    "--gin.BATCH_SIZE=8",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 40, 'targets': 16}",
    "--gin.DataConfig.vocabulary=bytes",
    "--gin.ModelConfig.vocab_size=384",
    "--gin.ModelConfig.d_model=16",
    "--gin.ModelConfig.d_ff=24",
    "--gin.ModelConfig.num_heads=2",
    "--gin.ModelConfig.head_dim=8",
    "--gin.ModelConfig.num_encoder_layers=1",
    "--gin.ModelConfig.num_decoder_layers=1",
    "--gin.ModelConfig.sparse_every=1",
    "--gin.NUM_EXPERTS=4",
    "--gin.MoeConfig.group_size=row",
    "--gin.Experiment.log_period=1",
)


class Run:
    """`scripts/train.py` on a tiny model, in a forked process, as often as it takes."""

    def __init__(self, directory: pathlib.Path, text: pathlib.Path):
        self.directory = directory
        self.log = directory.with_name(f"{directory.name}.log")
        self.activity = Activity()
        self._arguments = [
            *SMALL,
            f"--gin.TEXT_FILES={text}",
            f"--gin.MODEL_DIR={directory}",
            f"--gin.TOKEN_CACHE_DIR={directory.parent / 'tokens'}",
            f"--gin.TRAIN_STEPS={LAST_STEP}",
            f"--gin.CHECKPOINT_PERIOD={CHECKPOINT_PERIOD}",
            "--gin.EVAL_PERIOD=6",
            "--gin.DROPOUT_RATE=0.1",
            "--gin.Experiment.num_samples=1",
            "--gin.Experiment.sample_length=2",
        ]

    def start(self, *bindings: str, shims: tuple[Shim, ...] = ()) -> None:
        """Fork and begin, or go on."""
        # Through a pipe: what limits the files of a run does not limit what it says.
        with self.log.open("wb") as log:
            self._output = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
        assert self._output.stdin
        self._process = fork.Process(target=self._train, args=(bindings, shims))
        self._process.start()
        self._output.stdin.close()
        assert self._process.pid
        self.pid = self._process.pid

    def finish(self) -> tuple[int, str]:
        """Wait: exit code (-n after signal n) and everything it printed."""
        self._process.join(timeout=300)
        assert self._process.exitcode is not None, f"{self.directory} hangs"
        self._output.wait()
        return self._process.exitcode, self.log.read_text()

    def train(self, *bindings: str, shims: tuple[Shim, ...] = ()) -> tuple[int, str]:
        """`start` and `finish`."""
        self.start(*bindings, shims=shims)
        return self.finish()

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process.is_alive()

    def wait_for_step(self, step: int) -> bool:
        """Wait until the metrics of `step` are written; False if the process ended first."""
        while self.running:
            if any(row["step"] >= step for row in rows(self.directory / "metrics.jsonl")):
                return True
            time.sleep(0.002)
        return False

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Send a signal to it."""
        os.kill(self.pid, signum)

    def _train(self, bindings: tuple[str, ...], shims: tuple[Shim, ...]) -> None:
        assert self._output.stdin
        os.dup2(self._output.stdin.fileno(), 1)
        os.dup2(self._output.stdin.fileno(), 2)
        self._output.stdin.close()
        self.activity.watch()
        for shim in shims:
            shim()
        from switchx import configuration, run
        from switchx.experiment import Experiment

        sys.argv = ["scripts/train.py", *self._arguments, *bindings]
        configuration.main(Experiment, run.train, "")


def rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Whole rows of a file of JSON lines."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


# Comparison ------------------------------------------------------------------------------------


class Comparison:
    """A process that starts JAX, once, to read what runs have left."""

    def __init__(self):
        self._pipe, theirs = fork.Pipe()
        fork.Process(target=_compare, args=(theirs,), daemon=True).start()

    def differing_bits(self, run: pathlib.Path, reference: pathlib.Path) -> int:
        """Bits in which the last state of two runs differs, plus 1 for every row that does."""
        self._pipe.send((run, reference))
        return self._pipe.recv()


def _compare(pipe: Any) -> None:
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(_differing_bits(*pipe.recv()))


def _differing_bits(run: pathlib.Path, reference: pathlib.Path) -> int:
    import numpy as np
    import orbax.checkpoint as ocp

    def reproducible(path: pathlib.Path) -> list[dict[str, Any]]:
        return [{key: row[key] for key in row if key not in TIMING} for row in rows(path)]

    total = 0
    for name in ("metrics.jsonl", "samples.jsonl"):
        ours, theirs = reproducible(run / name), reproducible(reference / name)
        total += abs(len(ours) - len(theirs))
        total += sum(one != other for one, other in zip(ours, theirs, strict=False))
    last = pathlib.Path("checkpoints", str(LAST_STEP))
    position = pathlib.Path("data", "metadata")
    total += (run / last / position).read_text() != (reference / last / position).read_text()
    with ocp.StandardCheckpointer() as checkpointer:
        for item in ("params", "optimizer"):
            ours, theirs = (
                ocp.tree.to_flat_dict(checkpointer.restore(each / last / item))
                for each in (run, reference)
            )
            total += len(ours.keys() ^ theirs.keys())
            for name in ours.keys() & theirs.keys():
                one, other = (
                    np.frombuffer(np.asarray(each[name]).tobytes(), np.uint8)
                    for each in (ours, theirs)
                )
                total += int(np.bitwise_count(one ^ other).sum())
    return total


# Kills -----------------------------------------------------------------------------------------

# What each kill waits for, in turn; None is any moment at all.
TARGETS = (None, "saving", "evaluation", "data", "checksums", None, "training", "restoring")
TARGETS += ("saving", "compilation", "evaluation", "deletion", "data", "initialisation", None)


def kill(run: Run, target: str | None, rng: random.Random, seconds: float) -> set[str] | None:
    """SIGKILL at a random moment of `target`; what the run was doing, None if it ended before."""
    deadline = time.monotonic() + seconds * rng.random()
    # Of long phases later occurrences, and later moments; short ones are over before that.
    long = target in ("saving", "evaluation", "training", "compilation", "initialisation")
    skipped, waiting = rng.randrange(2) if target in ("saving", "evaluation") else 0, False
    while run.running:
        if target is None:
            time.sleep(0.001)
            if time.monotonic() >= deadline:
                break
        elif target not in run.activity.now(run.directory):
            waiting = False
            time.sleep(0.0002)
        elif not waiting and skipped:
            skipped, waiting = skipped - 1, True
        elif not waiting:
            if long:
                time.sleep(rng.choice((0.0, 0.001, 0.01, 0.05)) * rng.random())
            run.kill(signal.SIGSTOP)  # look again while nothing moves
            time.sleep(0.001)
            if target in run.activity.now(run.directory):
                break
            run.kill(signal.SIGCONT)
        else:
            time.sleep(0.0002)
    if not run.running:
        run.finish()
        return None
    run.kill()
    code, _ = run.finish()
    assert code == -signal.SIGKILL
    return run.activity.now(run.directory)


def kill_often(faults: "Faults", number: int, seed: int) -> dict[str, Any]:
    """Kill runs `number` times in all, then let each finish and compare it with the reference."""
    seconds = faults.reference.seconds
    rng = random.Random(seed)
    started = time.monotonic()
    tally: collections.Counter[str] = collections.Counter()
    killed = resumes = runs = bits = 0
    while killed < number:
        run = faults.run(f"killed{runs}")
        runs += 1
        # A run that is killed too often spends its kills on starting.
        for _ in range(min(KILLS_OF_A_RUN, number - killed)):
            target = TARGETS[killed % len(TARGETS)]
            run.activity = Activity()
            run.start(shims=(leave_cache,))
            doing = kill(run, target, rng, 0.8 * seconds)
            resumes += "resuming" in run.log.read_text()
            if doing is None:
                break
            killed += 1
            tally.update(doing)
            say(f"kill {killed}: {target or 'any moment'}, during {', '.join(sorted(doing))}")
        begun = time.monotonic()
        code, output = run.train(shims=(leave_cache,))
        assert code == 0, output
        if "is complete" not in output:
            seconds = min(seconds, time.monotonic() - begun)
        resumes += "resuming" in output
        differing = faults.differing_bits(run)
        bits += differing
        left = [path.name for path in (run.directory / "checkpoints").iterdir()]
        assert all(name.isdecimal() for name in left), left
        say(f"run {runs}: complete after {killed} kills in all, {differing} differing bits")
    return {
        "seed": seed,
        "kills": killed,
        "runs": runs,
        "resumes": resumes,
        "kills_by_phase": {name: tally[name] for name in PHASES},
        "differing_bits": bits,
        "seconds": round(time.monotonic() - started, 1),
    }


# Other faults ----------------------------------------------------------------------------------


def leave_cache() -> None:
    """Read compiled programs from the cache, but write none: a kill would leave half of one."""
    import jax

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)


def jumping_clock() -> None:
    """The wall clock is set by years, back and forth, twenty times a second."""
    now, now_ns = time.time, time.time_ns

    def offset() -> float:
        return random.Random(int(time.monotonic() * 20)).uniform(-3e8, 3e8)

    time.time = lambda: now() + offset()
    time.time_ns = lambda: now_ns() + int(1e9 * offset())


def small_files() -> None:
    """No file may grow beyond 30 KiB, as under a quota: writing fails half-way."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))


def nan_batch() -> None:
    """The tenth batch of the data weighs its tokens with NaN."""
    import dataclasses

    import numpy as np

    from switchx.data.token_batches import TokenBatches

    original = TokenBatches.__next__

    def damaged(self: Any) -> Any:
        batch = original(self)
        position = self.position()
        if (position["window"], position["row"]) != (0, 10 * len(batch.encoder_tokens)):
            return batch
        weights = np.full_like(batch.decoder_loss_weights, np.nan)
        return dataclasses.replace(batch, decoder_loss_weights=weights)

    TokenBatches.__next__ = damaged


class Reference(Run):
    """The run to which nothing happens."""

    def __init__(self, directory: pathlib.Path, text: pathlib.Path):
        super().__init__(directory, text)
        for _ in range(2):  # the first fills the cache of compiled programs
            shutil.rmtree(directory, ignore_errors=True)
            started = time.monotonic()
            code, output = self.train()
            self.seconds = time.monotonic() - started
            assert code == 0, output


class Faults:
    """One method a fault; each returns what it led to."""

    def __init__(self, folder: pathlib.Path, text: pathlib.Path):
        self.folder = folder
        self.text = text
        self.reference = Reference(folder / "reference", text)

        self.comparison = Comparison()
        # One run that was killed half-way, on a file of its own, is where many faults begin.
        self.own_text = folder / "own.txt"
        shutil.copy(text, self.own_text)
        self.half = Run(folder / "half", self.own_text)
        self.half.start(shims=(leave_cache,))
        assert self.half.wait_for_step(18), self.half.finish()[1]
        self.half.kill()
        self.half.finish()

    def run(self, name: str) -> Run:
        """A run of its own."""
        return Run(self.folder / name, self.text)

    def half_run(self, name: str) -> Run:
        """A run that was killed half-way."""
        run = Run(self.folder / name, self.own_text)
        shutil.copytree(self.half.directory, run.directory)
        return run

    def differing_bits(self, run: Run, reference: Run | None = None) -> int:
        """In comparison with the reference."""
        reference = reference or self.reference
        return self.comparison.differing_bits(run.directory, reference.directory)

    def outcome(self, run: Run, *bindings: str, shims: tuple[Shim, ...] = ()) -> dict[str, Any]:
        """Begin or go on: exit code, output and, of a complete run, differing bits."""
        code, output = run.train(*bindings, shims=(leave_cache, *shims))
        bits = self.differing_bits(run) if code == 0 else None
        return {"code": code, "output": output, "differing_bits": bits}

    def truncated_and_missing_files(self) -> list[dict[str, Any]]:
        """A file of the newest checkpoint lost its half; one of the checkpoint before is gone."""
        run = self.half_run("damaged")
        newer = newest(run.directory)
        older = newer.with_name(str(int(newer.name) - CHECKPOINT_PERIOD))
        array = largest(newer / "params")
        os.truncate(array, array.stat().st_size // 2)
        largest(older / "optimizer").unlink()
        return [{"checkpoints": [str(newer), str(older)]} | self.outcome(run)]

    def flipped_bit(self) -> list[dict[str, Any]]:
        """One bit of an array in the newest checkpoint is another."""
        run = self.half_run("flipped")
        checkpoint = newest(run.directory)
        flip_bit(largest(checkpoint / "params"))
        return [{"checkpoints": [str(checkpoint)]} | self.outcome(run)]

    def flipped_bit_in_a_complete_run(self) -> list[dict[str, Any]]:
        """The same in the last checkpoint of a complete run."""
        run = self.run("flipped_complete")
        shutil.copytree(self.reference.directory, run.directory)
        checkpoint = newest(run.directory)
        flip_bit(largest(checkpoint / "optimizer"))
        return [{"checkpoints": [str(checkpoint)]} | self.outcome(run)]

    def no_good_checkpoint(self) -> list[dict[str, Any]]:
        """Every checkpoint is damaged."""
        run = self.run("no_good")
        shutil.copytree(self.reference.directory, run.directory)
        (run.directory / "DONE").unlink()
        for checkpoint in (run.directory / "checkpoints").iterdir():
            os.truncate(checkpoint / "data" / "metadata", 3)
        before = everything(run.directory)
        outcomes = [self.outcome(run), self.outcome(run)]
        return [outcome | {"kept": everything(run.directory) == before} for outcome in outcomes]

    def nan(self) -> list[dict[str, Any]]:
        """A batch makes the loss NaN: the run stops, again and again, or skips it if told to."""
        unbroken, run = self.run("nan_unbroken"), self.run("nan")
        skip = "--gin.Experiment.on_nonfinite=skip"
        code, output = unbroken.train(skip, shims=(leave_cache, nan_batch))
        assert code == 0, output
        stopped = self.outcome(run, shims=(nan_batch,))
        skipped = self.outcome(run, skip, shims=(nan_batch,))
        return [stopped, skipped | {"differing_bits": self.differing_bits(run, unbroken)}]

    def data_changes_under_a_run(self) -> list[dict[str, Any]]:
        """The data file is overwritten, then removed, while the run that read it goes on."""
        text = self.folder / "changing.txt"
        shutil.copy(self.text, text)
        run = Run(self.folder / "data_changes", text)
        run.start(shims=(leave_cache,))
        run.wait_for_step(3)
        text.write_text("something else\n" * 400)
        run.wait_for_step(9)
        text.unlink()
        code, output = run.finish()
        bits = self.differing_bits(run) if code == 0 else None
        return [{"code": code, "output": output, "differing_bits": bits}]

    def data_vanishes(self) -> list[dict[str, Any]]:
        """The data file is gone when the run is to go on, and then is back."""
        run = self.half_run("data_vanishes")
        self.own_text.unlink()
        without = self.outcome(run)
        shutil.copy(self.text, self.own_text)
        return [without, self.outcome(run)]

    def data_changes_between(self) -> list[dict[str, Any]]:
        """The data file is another when the run is to go on, and then is back."""
        run = self.half_run("data_changes_between")
        lines = self.text.read_text().splitlines(keepends=True)
        self.own_text.write_text("".join(reversed(lines)))
        with_another = self.outcome(run)
        shutil.copy(self.text, self.own_text)
        return [with_another, self.outcome(run)]

    def two_processes(self) -> list[dict[str, Any]]:
        """A second process is started on the directory of one that runs."""
        run = self.run("two")
        run.start(shims=(leave_cache,))
        run.wait_for_step(2)
        second = Run(run.directory, self.text)
        second.log = run.log.with_name("second.log")
        run.kill(signal.SIGSTOP)  # lest it be complete before the other has begun
        code, output = second.train(shims=(leave_cache,))
        run.kill(signal.SIGCONT)
        first, _ = run.finish()
        assert first == 0
        return [{"code": code, "output": output}, self.outcome(run)]

    def clock(self) -> list[dict[str, Any]]:
        """The wall clock jumps, also between the parts of a run."""
        run = self.run("clock")
        run.start(shims=(leave_cache, jumping_clock))
        assert run.wait_for_step(11), run.finish()[1]
        run.kill()
        run.finish()
        outcome = self.outcome(run, shims=(jumping_clock,))
        kept, expected = (
            sorted(path.name for path in (each.directory / "checkpoints").iterdir())
            for each in (run, self.reference)
        )
        return [outcome | {"kept": kept == expected}]

    def file_size_limit(self) -> list[dict[str, Any]]:
        """Writing a checkpoint fails half-way; later there is room."""
        run = self.half_run("limited")
        checkpoint = newest(run.directory)
        before = everything(checkpoint)
        outcome = self.outcome(run, shims=(small_files,))
        after = everything(checkpoint)
        return [outcome | {"kept": before == after}, self.outcome(run)]

    def full_disk(self) -> list[dict[str, Any]]:
        """A run in a file system that is too small; later it is larger. Needs a namespace."""
        disk = self.folder / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            return []
        run = Run(disk / "run", self.text)
        run.log = self.folder / "disk.log"
        outcomes = [self.outcome(run), self.outcome(run)]
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        outcomes.append(self.outcome(run))
        subprocess.run(["umount", str(disk)], check=True)
        return outcomes


LARGEST_FILE = 30 * 2**10
KILLS_OF_A_RUN = 10
HELPERS = ("run", "half_run", "outcome", "differing_bits")
FAULTS = tuple(name for name in vars(Faults) if not name.startswith("_") and name not in HELPERS)


def largest(folder: pathlib.Path) -> pathlib.Path:
    """The largest file of arrays in an item of a checkpoint."""
    return max(folder.glob("**/d/*"), key=lambda path: path.stat().st_size)


def newest(directory: pathlib.Path) -> pathlib.Path:
    """The newest checkpoint of a run directory."""
    steps = [
        int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdecimal()
    ]
    return directory / "checkpoints" / str(max(steps))


def everything(folder: pathlib.Path) -> dict[str, bytes]:
    """Content of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def flip_bit(path: pathlib.Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def say(text: str) -> None:
    """One line of progress."""
    print(text, file=sys.stderr, flush=True)


def write_text(path: pathlib.Path) -> None:
    """Four hundred lines of twelve words."""
    words, rng = (
        ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "fat", "rat"),
        random.Random(0),
    )
    path.write_text("\n".join(" ".join(rng.choices(words, k=12)) for _ in range(400)))


def main() -> None:
    """Everything, in one process that nothing of JAX has touched."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", nargs="*", default=FAULTS, choices=FAULTS, metavar="FAULT")
    flags = parser.parse_args()
    if (
        NAMESPACE not in os.environ
        and not subprocess.run(
            ["unshare", "--map-root-user", "--mount", "true"], capture_output=True, check=False
        ).returncode
    ):
        # A namespace of its own, in which it may mount a small file system.
        os.environ[NAMESPACE] = "1"
        here = [sys.executable, "-m", "tests.e2e.faults", *sys.argv[1:]]
        os.execvp("unshare", ["unshare", "--map-root-user", "--mount", *here])
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="switchx-faults-") as name:
        folder = pathlib.Path(name)
        os.environ["JAX_PLATFORMS"] = "cpu"
        # What LLVM optimises changes no run against another, and takes half a minute.
        os.environ["XLA_FLAGS"] = (
            "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        )
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        import switchx.configuration
        import switchx.run  # noqa: F401

        write_text(folder / "text.txt")
        faults = Faults(folder, folder / "text.txt")
        say(f"a run takes {faults.reference.seconds:.1f} s")
        report: dict[str, Any] = {"faults": {}}
        for fault in flags.faults:
            started = time.monotonic()
            report["faults"][fault] = getattr(faults, fault)()
            codes = [outcome["code"] for outcome in report["faults"][fault]]
            bits = [outcome.get("differing_bits") for outcome in report["faults"][fault]]
            seconds = time.monotonic() - started
            say(f"{fault}: exit codes {codes}, differing bits {bits}, {seconds:.1f} s")
        report["kills"] = kill_often(faults, flags.kills, flags.seed)
        say(json.dumps(report["kills"]))
        print(json.dumps(report))


if __name__ == "__main__":
    main()
