"""A sweep's results by setting: what was measured of each trial, and the settings in order."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from switchx.errors import UserError, closest, parse_json
from switchx.report.runs import key, metric_value
from switchx.report.statistics import Estimate, estimate, paired_differences
from switchx.report.sweeps import Settings, Sweep, Trial, description, level, levels
from switchx.training.selection import Criterion


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The metric of one trial, under one setting, at the end.

    Attributes:
      settings: of the trial, and of the evaluation if it was one under changed settings.
      value: of the metric.
      row: of metrics.jsonl or evaluations.jsonl that it is from.
    """

    settings: Settings
    trial: Trial
    value: float
    row: Mapping[str, Any]

    @property
    def seed(self) -> Any:
        """Of the trial."""
        return self.trial.seed

    @property
    def dropped(self) -> float | None:
        """Dropped fraction of the same row."""
        return metric_value(self.row, "dropped_fraction")

    @property
    def directory(self) -> str:
        """Of the trial."""
        return str(self.trial.run.path)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One setting with the measurements of all its seeds."""

    settings: Settings
    measurements: Sequence[Measurement]

    @property
    def estimate(self) -> Estimate | None:
        """Mean and interval over seeds."""
        return estimate([each.value for each in self.measurements])

    @property
    def by_seed(self) -> dict[Any, Measurement]:
        """The measurement of each seed."""
        return {each.seed: each for each in self.measurements if each.seed is not None}

    def minus(self, other: "Arm") -> dict[Any, float]:
        """Differences of the metric, by the seeds that both have."""
        return paired_differences(
            {seed: each.value for seed, each in self.by_seed.items()},
            {seed: each.value for seed, each in other.by_seed.items()},
        )

    @property
    def trials(self) -> str:
        """Numbers of the trials behind it."""
        return " ".join(f"#{each.trial.number}" for each in self.measurements)

    @property
    def directories(self) -> str:
        """Of these trials."""
        return ", ".join(each.directory for each in self.measurements)

    def mean_of(self, quantity: Callable[[Measurement], float | None]) -> float | None:
        """Mean of another quantity over the measurements that have it."""
        found = estimate([x for each in self.measurements if (x := quantity(each)) is not None])
        return found.mean if found else None


def measurements(sweep: Sweep, metric: Criterion, split: str | None) -> list[Measurement]:
    """The metric at the end of every trial that is done, of its last row of the split."""
    found = []
    for trial in sweep.trials:
        value = last_value(trial, metric, split) if split else None
        if trial.state == "done" and trial.settings is not None and value is not None:
            row = trial.run.last(split or "") or {}
            found.append(Measurement(trial.settings, trial, value, row))
    return found


def evaluations(sweep: Sweep, metric: Criterion, split: str | None) -> list[Measurement]:
    """The metric of every row of evaluations.jsonl of trials that are done, of one split."""
    splits = dict.fromkeys(row["split"] for run in sweep.runs for row in run.evaluations)
    task = (split or "").partition("/")[2]
    chosen = next(
        (each for each in splits if each.partition("/")[2] == task), next(iter(splits), None)
    )
    return [
        Measurement({**trial.settings, **row["settings"]}, trial, found, row)
        for trial in sweep.trials
        for row in trial.run.evaluations
        if trial.state == "done" and trial.settings is not None and row["split"] == chosen
        if (found := metric_value(row, metric.metric)) is not None
    ]


def arms(sweep: Sweep, found: Sequence[Measurement], more: Sequence[str] = ()) -> list[Arm]:
    """Measurements by setting, in the order of the axes' values; `more` are further axes."""
    groups: dict[str, list[Measurement]] = {}
    for each in found:
        groups.setdefault(key(each.settings), []).append(each)
    return _ordered(
        [Arm(group[0].settings, group) for group in groups.values()], (*sweep.axes, *more)
    )


def base_of(base_arm: str | None, found: Sequence[Arm]) -> Settings | None:
    """The settings that differences are to; None for those of the first trial.

    Raises:
      UserError: not NAME=VALUE,…, or no setting, or several, that it fits.
    """
    if base_arm is None:
        return None
    wanted: dict[str, Any] = {}
    # A value may have commas of its own.
    for part in re.split(r",(?=\s*[\w./]+=)", base_arm):
        name, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"--base_arm={base_arm}: {part!r} is not NAME=VALUE")
        try:
            wanted[name.strip()] = parse_json(value)
        except ValueError:
            wanted[name.strip()] = value.strip()
    fitting = [
        arm
        for arm in found
        if all(_same(arm.settings, name, value) for name, value in wanted.items())
    ]
    names = [description(arm.settings).replace(", ", ",") for arm in found]
    if not fitting and found:
        raise UserError(
            f"--base_arm={base_arm}: no finished trial has it{closest(base_arm, names)}"
        )
    if len(fitting) > 1:
        several = " or ".join(description(arm.settings).replace(", ", ",") for arm in fitting)
        raise UserError(
            f"--base_arm={base_arm}: {len(fitting)} settings fit; name one of {several}"
        )
    return fitting[0].settings if fitting else None


def planned(sweep: Sweep) -> list[Arm]:
    """Every setting that a trial has, measured or not, by the axes' values."""
    found = {key(t.settings): Arm(t.settings, ()) for t in sweep.trials if t.settings is not None}
    return _ordered(list(found.values()), sweep.axes)


def last_value(trial: Trial, metric: Criterion, split: str) -> float | None:
    """The metric in the last row of a split."""
    return metric_value(trial.run.last(split) or {}, metric.metric)


def _ordered(found: Sequence[Arm], axes: Sequence[str]) -> list[Arm]:
    """By the axes' values; where an axis is absent first."""
    settings = [arm.settings for arm in found]
    places = {axis: [key({"": value}) for value in levels(settings, axis)] for axis in axes}
    return sorted(
        found,
        key=lambda arm: [
            places[axis].index(key({"": arm.settings[axis]})) if axis in arm.settings else -1
            for axis in axes
        ],
    )


def _same(settings: Settings, name: str, value: Any) -> bool:
    return name in settings and (settings[name] == value or level(settings[name]) == level(value))
