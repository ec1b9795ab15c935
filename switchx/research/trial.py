"""One trial of a sweep, in a process of its own: train, evaluate, and say how it ended."""

import ctypes
import dataclasses
import fcntl
import json
import os
import pathlib
import signal
import sys
import time
from typing import Any

from switchx import configuration, regime, scorecard
from switchx.errors import UserError, parse_json
from switchx.experiment import Experiment, read_experiment
from switchx.research.sweep import KINDS, Trial, assignments, fingerprint
from switchx.run import train
from switchx.trained import find_checkpoints
from switchx.training.loop import Interrupted
from switchx.training.progress import Diverged

# Set by whoever started a trial and wants it to end, saved, when that process is gone.
PARENT = "SWITCHX_SWEEP_PROCESS"

_PR_SET_PDEATHSIG = 1


def read(folder: pathlib.Path) -> Trial:
    """The trial that a folder holds.

    Raises:
      UserError: no trial.json, or one that is damaged.
    """
    path = folder / "trial.json"
    try:
        found = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{str(folder)!r} has no trial.json; sweep.py makes such folders") from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read: {reason}; remove it to begin again") from None
    names = {field.name for field in dataclasses.fields(Trial)}
    if not isinstance(found, dict) or found.keys() != names:
        raise UserError(f"{path} is no trial of this version; remove it to begin again")
    try:
        return Trial(**found)
    except UserError as error:
        raise UserError(f"{path}: {error}; remove it to begin again") from None


def write(folder: pathlib.Path, trial: Trial) -> None:
    """Write trial.json, all of it or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    # A new sweep and a trial that a killed one left may write at the same time.
    temporary = folder / f".trial.json.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(dataclasses.asdict(trial), indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "trial.json")


def run(folder: pathlib.Path) -> None:
    """Run a trial to its end, or go on where it stopped; trial.json says how it went.

    Waits for a process that has the trial already: one whose sweep was killed is saving.

    Raises:
      UserError: its configuration is no longer what the sweep saw, or as `run.train`.
      Interrupted: as `run.train`; saved.
    """
    _end_with_parent()
    read(folder)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _run(folder)


def _run(folder: pathlib.Path) -> None:
    trial = read(folder)
    started, before = time.monotonic(), trial.seconds
    trial.state, trial.error = "running", ""
    trial.attempts += 1
    write(folder, trial)

    def ended(state: str, error: str = "") -> None:
        trial.state, trial.error = state, error
        trial.seconds = before + time.monotonic() - started
        write(folder, trial)

    try:
        _train(folder, trial)
        _evaluate(folder / trial.run_directory, trial)
    except Diverged as error:
        ended("diverged", str(error))
        raise
    except (Interrupted, KeyboardInterrupt):
        ended("stopped")
        raise
    except UserError as error:
        ended("failed", str(error))
        raise
    except BaseException as error:
        ended("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
        raise
    ended("done")


def _train(folder: pathlib.Path, trial: Trial) -> None:
    config: Any = configuration.build(
        KINDS[trial.kind], trial.gin_files, [*trial.bindings, f"MODEL_DIR={str(folder)!r}"]
    )
    if fingerprint(config) != trial.hash:
        raise UserError(
            f"{folder}: {', '.join(trial.gin_files)} changed since the sweep began; start the "
            "sweep again, which makes new trials of what they say now"
        )
    if isinstance(config, Experiment):
        train(config, configuration.operative_config())
    else:
        regime.run(config, configuration.operative_config())


def _evaluate(directory: pathlib.Path, trial: Trial) -> None:
    """Write evaluations.jsonl: the last checkpoint under the settings of the eval axes."""
    rows = []
    for settings in trial.eval_settings:
        for each in scorecard.evaluate(
            read_experiment(str(directory), assignments(settings)),
            checkpoints=find_checkpoints(str(directory)),
            metrics=("loss",),
        ):
            rows.append(json.dumps(each.row | {"settings": settings}) + "\n")
            print(f"evaluated with {settings}: {each.row['cross_entropy']:.4f}", flush=True)
    if rows:
        temporary = directory / ".evaluations.jsonl.tmp"
        temporary.write_text("".join(rows), encoding="utf-8")
        os.replace(temporary, directory / "evaluations.jsonl")


def _end_with_parent() -> None:
    """Have Linux send SIGTERM, which saves, when the process that runs the sweep is killed."""
    parent = os.environ.get(PARENT)
    if parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):
            sys.exit(128 + signal.SIGTERM)
