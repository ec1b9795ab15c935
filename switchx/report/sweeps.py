"""Sweep directories as a report reads them."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from switchx.report.runs import Run, key, read_object, read_run
from switchx.training.selection import DIRECTIONS, Criterion

Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
      number: its place in the sweep, from 1; how tables name it.
      settings: the value of each axis that applies; None where nothing tells.
      seed: pairs trials of different settings; None where nothing tells.
      run: what its directory holds.
    """

    number: int
    name: str
    settings: Settings | None
    seed: int | None
    run: Run

    @property
    def state(self) -> str:
        """Of the run; "waiting" while it has no directory."""
        return self.run.state


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep directory holds, as far as it can be read.

    Attributes:
      axes: names of what the trials differ in, in order.
      eval_axes: names of what finished trials were evaluated under.
      metric: what the sweep is about, and which direction of it is best.
      trials: in the order of sweep.json, then those it does not list.
      problems: a line for each thing that is missing or broken, in the sweep and in its trials.
    """

    path: pathlib.Path
    name: str
    axes: tuple[str, ...]
    eval_axes: tuple[str, ...]
    metric: Criterion
    trials: tuple[Trial, ...]
    problems: tuple[str, ...]

    @property
    def runs(self) -> list[Run]:
        """Of its trials."""
        return [trial.run for trial in self.trials]


def is_sweep(path: pathlib.Path) -> bool:
    """Whether a directory is a sweep, be it a broken one."""
    return (path / "sweep.json").exists() or (path / "trials").is_dir()


def read_sweep(path: pathlib.Path) -> Sweep:
    """Read a sweep directory. Raises nothing for what is in it: see `Sweep.problems`."""
    problems: list[str] = []
    plan = read_object(path / "sweep.json", problems) or {}
    written = plan.get("trials")
    written = written if isinstance(written, list) else []
    listed = [each for each in written if _is_entry(each)]
    if broken := len(written) - len(listed):
        problems.append(f"sweep.json: {broken} of its trials have no valid name; left out")
    folders = sorted(each.name for each in _folders(path / "trials", problems))
    known = {entry["name"] for entry in listed}
    strangers = [name for name in folders if name not in known]
    trials = tuple(
        _trial(path, number, entry)
        for number, entry in enumerate([*listed, *({"name": name} for name in strangers)], 1)
    )
    if plan and strangers and not listed:
        problems.append("sweep.json lists no trials; those that are there are taken")
    if listed:
        # What the same folder held under an earlier configuration is not to be averaged with this.
        problems += [
            f"trials/{name} is not listed in sweep.json: of an earlier configuration; in no mean"
            for name in strangers
        ]
        trials = tuple(
            trial if trial.name in known else dataclasses.replace(trial, settings=None, seed=None)
            for trial in trials
        )
    for trial in trials:
        problems += [f"trials/{trial.name}: {problem}" for problem in trial.run.problems]
        if trial.settings is None and not (listed and trial.name in strangers):
            problems.append(f"trials/{trial.name}: nothing tells its settings; in no mean")
    return Sweep(
        path=path,
        name=plan["name"] if isinstance(plan.get("name"), str) else path.resolve().name,
        axes=_names(plan.get("axes"), (trial.settings or {} for trial in trials)),
        eval_axes=_names(
            plan.get("eval_axes"),
            (row["settings"] for trial in trials for row in trial.run.evaluations),
        ),
        metric=_criterion(plan),
        trials=trials,
        problems=tuple(problems),
    )


def level(value: Any) -> str:
    """A value of an axis as people write it; of numbers drawn at random the first six digits."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def label(settings: Settings, axes: Iterable[str]) -> str:
    """Settings in few letters: the values in the order of the axes, "–" where one is absent."""
    return " · ".join(level(settings[axis]) if axis in settings else "–" for axis in axes)


def description(settings: Settings) -> str:
    """Settings in full: NAME=VALUE, …"""
    return ", ".join(f"{name}={level(value)}" for name, value in settings.items())


def levels(settings: Iterable[Settings], axis: str) -> list[Any]:
    """The different values of an axis: numbers by size, then the rest as they come."""
    found = {key({axis: each[axis]}): each[axis] for each in settings if axis in each}
    values = list(found.values())
    size = [value for value in values if _is_number(value)]
    return sorted(size) + [value for value in values if not _is_number(value)]


def shown_levels(settings: Sequence[Settings], axes: Iterable[str]) -> list[str]:
    """`levels` of axes as `label` writes them, last "–" if an axis is absent anywhere."""
    axes = list(axes)
    shown = [level(value) for axis in axes for value in levels(settings, axis)]
    absent = any(axis not in each for axis in axes for each in settings)
    return [*shown, "–"] if absent else shown


def cells(settings: Settings, axes: Iterable[str]) -> list[str | None]:
    """Settings as cells of a table's row: a value for each axis, None where it is absent."""
    return [level(settings[axis]) if axis in settings else None for axis in axes]


def _trial(sweep: pathlib.Path, number: int, entry: Mapping[str, Any]) -> Trial:
    path = sweep / "trials" / entry["name"]
    if path.is_dir():
        run = read_run(path)
        within = run.trial.get("run_directory")
        if isinstance(within, str) and within not in ("", "."):
            # Of a regime the last run is the result.
            run = dataclasses.replace(read_run(path / within), trial=run.trial, state=run.state)
        if not run.trial and not any("trial.json" in problem for problem in run.problems):
            there = (path / "trial.json").exists()
            problem = "trial.json says nothing" if there else "no trial.json"
            run = dataclasses.replace(run, problems=(problem, *run.problems))
    else:
        run = Run(path, "waiting", [], [], [], None, None, {}, None, ())
    settings, seed = (
        next(
            (source[name] for source in (entry, run.trial) if isinstance(source.get(name), t)), None
        )
        for name, t in (("settings", dict), ("seed", int))
    )
    return Trial(number, entry["name"], settings, seed, run)


def _is_entry(value: Any) -> bool:
    name = value.get("name") if isinstance(value, dict) else None
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name


def _folders(path: pathlib.Path, problems: list[str]) -> list[pathlib.Path]:
    try:
        return [each for each in path.iterdir() if each.is_dir() and not each.name.startswith(".")]
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(f"trials cannot be read: {error.strerror}")
        return []


def _names(listed: Any, settings: Iterable[Settings]) -> tuple[str, ...]:
    listed = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    return tuple(dict.fromkeys([*listed, *(name for each in settings for name in each)]))


def _criterion(plan: Mapping[str, Any]) -> Criterion:
    metric = plan.get("metric")
    direction = plan.get("direction")
    return Criterion(
        metric if isinstance(metric, str) else "cross_entropy",
        direction if direction in DIRECTIONS else None,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
