"""Trials become results: started as places come free, watched, tried again, and stopped in time.

What is known of a trial is in its folder, so the same call goes on where an earlier one was killed:
what is done stays, what was running resumes from its checkpoint.
"""

import collections
import dataclasses
import datetime
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table

from switchx.errors import UserError, closest, parse_json
from switchx.research import trial as trials
from switchx.research.executors import Executor, Job
from switchx.research.sweep import Sweep, Trial, describe
from switchx.training.loop import Interrupted, StopSignals
from switchx.training.selection import numbers

POLL_SECONDS = 0.5

# A trial that ends in one of these is not started again.
FINAL = ("done", "diverged", "pruned")


class Scheduler:
    """Runs trials on an executor.

    Attributes:
      folder: of the sweep.
      trials: all of them by name, as they are now.
    """

    def __init__(self, sweep: Sweep, executor: Executor, *, max_attempts: int = 3):
        self.folder = pathlib.Path(sweep.model_dir)
        self.trials: dict[str, Trial] = {}
        self._metric = sweep.metric
        self._executor = executor
        self._max_attempts = max_attempts
        self._queue: collections.deque[str] = collections.deque()
        self._jobs: dict[str, Job] = {}
        self._attempts: collections.Counter[str] = collections.Counter()
        self._asked: dict[str, str] = {}
        self._followers: dict[str, Follower] = {}
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)

    def add(self, trial: Trial) -> None:
        """Take a trial up as its folder says it is, or as new.

        Raises:
          UserError: the folder holds another trial.
        """
        if trial.name in self.trials:
            return
        folder = self._folder(trial.name)
        if (folder / "trial.json").exists():
            found = trials.read(folder)
            if found.hash != trial.hash:
                raise UserError(
                    f"{folder} holds another configuration; remove it, or give the sweep another "
                    "MODEL_DIR"
                )
            # The axes of evaluation are not part of the hash: a trained trial may get new ones.
            evaluated = found.eval_settings == trial.eval_settings
            state = found.state if found.state in FINAL else "waiting"
            state = "waiting" if state == "done" and not evaluated else state
            kept = {name: getattr(found, name) for name in ("attempts", "error", "seconds")}
            trial = dataclasses.replace(trial, state=state, **kept)
        trials.write(folder, trial)
        self.trials[trial.name] = trial
        self._followers[trial.name] = Follower(
            folder / trial.run_directory / "metrics.jsonl", trial.task, self._metric
        )
        if trial.state == "waiting":
            self._queue.append(trial.name)

    def add_ended(self, trial: Trial) -> bool:
        """Take a trial up, for the tables, if an earlier call has ended it.

        Returns:
          Whether an earlier call has begun it.
        """
        folder = self._folder(trial.name)
        if not (folder / "trial.json").exists():
            return False
        if trials.read(folder).state in FINAL:
            self.add(trial)
        return True

    def prune(self, name: str) -> None:
        """End a trial that is not worth going on with."""
        if name in self._jobs:
            self._asked[name] = "pruned"
            self._jobs[name].stop()
        elif name in self._queue:
            self._queue.remove(name)
            self._note(name, state="pruned")

    def evaluations(self, name: str) -> dict[int, float]:
        """The sweep's metric in every evaluation of a trial so far, by step."""
        return self._followers[name].look().evaluations

    def ended(self, those: Sequence[Trial]) -> bool:
        """Whether nothing more will come of some trials."""
        names = {trial.name for trial in those}
        return not names & self._jobs.keys() and not names & set(self._queue)

    def run(self, between: Callable[[], None] = lambda: None) -> None:
        """Run until nothing waits.

        Args:
          between: called before every look at the jobs; may `add` and `prune`.

        Raises:
          Interrupted: SIGINT or SIGTERM; the trials have saved and ended.
        """
        stop = StopSignals()
        console = Console(stderr=True)
        with stop.caught(), Live(console=console, auto_refresh=False, transient=True) as live:
            between()
            while self._queue or self._jobs:
                while self._queue and len(self._jobs) < self._executor.max_parallel:
                    self._start(self._queue.popleft())
                time.sleep(POLL_SECONDS)
                if stop.received is not None:
                    break
                self._collect()
                between()
                if console.is_terminal:
                    live.update(self.table(), refresh=True)
            if stop.received is not None:
                self._stop(stop.received)

    def table(self) -> Table:
        """Every trial that has begun: state, step, loss, the metric, time left."""
        counts = collections.Counter(
            "running" if trial.name in self._jobs else trial.state for trial in self.trials.values()
        )
        title = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
        table = Table("trial", "state", "step", "loss", self._metric, "left", title=title)
        for name, trial in self.trials.items():
            if trial.state == "waiting" and name not in self._jobs:
                continue
            seen = self._followers[name].look()
            running = name in self._jobs
            left = (trial.steps - seen.step) * seen.step_seconds if running else None
            latest = next(reversed(seen.evaluations.values()), None)
            table.add_row(
                f"{describe(trial.settings)}, seed {trial.seed}",
                "running" if running else trial.state,
                f"{seen.step} of {trial.steps}",
                "" if seen.loss is None else f"{seen.loss:.4f}",
                "" if latest is None else f"{latest:.4f}",
                "" if not left else str(datetime.timedelta(seconds=round(left))),
            )
        return table

    def _folder(self, name: str) -> pathlib.Path:
        return self.folder / "trials" / name

    def _note(self, name: str, **fields: str) -> None:
        self.trials[name] = dataclasses.replace(self.trials[name], **fields)
        trials.write(self._folder(name), self.trials[name])

    def _start(self, name: str) -> None:
        script = pathlib.Path(__file__).parents[2] / "scripts" / "trial.py"
        command = [sys.executable, str(script), str(self._folder(name).absolute())]
        self._attempts[name] += 1
        self._jobs[name] = self._executor.start(command, self.folder / "logs" / f"{name}.log")
        self._say(name, "starts")

    def _collect(self) -> None:
        """Take back the jobs that have ended."""
        for name, job in list(self._jobs.items()):
            code = job.poll()
            if code is not None:
                del self._jobs[name]
                self._take_back(name, code)

    def _take_back(self, name: str, code: int) -> None:
        self.trials[name] = trials.read(self._folder(name))
        asked = self._asked.pop(name, "")
        if code == 0:
            return self._say(name, "done")
        if asked:
            self._note(name, state=asked)
            return self._say(name, asked)
        if self.trials[name].state == "diverged":
            return self._say(name, "diverged")
        if self.trials[name].state != "failed":
            # It did not live to say so.
            self._note(name, state="failed", error=_reason(code))
        # What the user has to mend does not mend itself.
        if code != 2 and self._attempts[name] < self._max_attempts:
            self._queue.append(name)
            return self._say(name, "fails, and is tried again")
        self._say(name, "failed")

    def _stop(self, signum: int) -> None:
        print(
            f"\n{signal.Signals(signum).name}: {len(self._jobs)} trial(s) save and end", flush=True
        )
        for name, job in self._jobs.items():
            self._asked[name] = "stopped"
            job.stop()
        while self._jobs:
            time.sleep(POLL_SECONDS)
            self._collect()
        print(f"stopped; the same command goes on in {self.folder}", flush=True)
        raise Interrupted(signum, 0)

    def _say(self, name: str, what: str) -> None:
        trial = self.trials[name]
        latest = next(reversed(self.evaluations(name).values()), None)
        parts = [f"{trial.name} {what}"]
        if what == "done" and latest is not None:
            parts.append(f"{self._metric} {latest:.4f}")
        if trial.error and what != "starts":
            parts.append(trial.error)
        ended = sum(each.state in FINAL for each in self.trials.values())
        print(f"[{ended}/{len(self.trials)}] {': '.join(parts)}", flush=True)


@dataclasses.dataclass
class Seen:
    """What a run has written so far.

    Attributes:
      step, loss, step_seconds: of the latest row of training.
      evaluations: the metric in every evaluation of the run's own task, by step.
    """

    step: int = 0
    loss: float | None = None
    step_seconds: float = 0.0
    evaluations: dict[int, float] = dataclasses.field(default_factory=dict)


class Follower:
    """Reads a metrics.jsonl that grows."""

    def __init__(self, path: pathlib.Path, task: str, metric: str):
        self._path, self._split, self._metric = path, f"eval/{task}", metric
        self._position = self._file = 0
        self._seen = Seen()

    def look(self) -> Seen:
        """Everything so far.

        Raises:
          UserError: an evaluation without the metric.
        """
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return self._seen
        if found.st_size < self._position or found.st_ino != self._file:
            # A run that goes on cuts off what came after its checkpoint, in a new file.
            self._position, self._file, self._seen = 0, found.st_ino, Seen()
        with open(self._path, "rb") as file:
            file.seek(self._position)
            lines = file.read().splitlines(keepends=True)
        for line in lines:
            if not line.endswith(b"\n"):
                break
            self._position += len(line)
            self._note(line)
        return self._seen

    def _note(self, line: bytes) -> None:
        try:
            row = parse_json(line)
            step, split = int(row["step"]), row["split"]
        except (ValueError, KeyError, TypeError):
            return
        found = numbers(row)
        if split == "train":
            self._seen.step = step
            self._seen.loss = found.get("loss")
            self._seen.step_seconds = found.get("step_seconds", 0.0)
        elif split == self._split and self._metric in found:
            self._seen.evaluations[step] = found[self._metric]
        elif split == self._split and self._metric.partition("/")[0] not in row:
            # One that is there and no number is not finite.
            known = [name for name in found if "by_layer/" not in name]
            raise UserError(
                f"Sweep.metric = {self._metric!r} is no number of an evaluation"
                f"{closest(self._metric, known)} ({self._path}); trials go on where they are"
            )


def _reason(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
