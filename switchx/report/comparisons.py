"""A sweep's settings beside each other: charts by axis, means, differences paired on seed."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from switchx.report import figures, run_sections
from switchx.report.arms import Arm, Measurement
from switchx.report.figures import Axis, Figure
from switchx.report.page import Block, Figures, Folded, Text
from switchx.report.runs import key
from switchx.report.statistics import Estimate, estimate
from switchx.report.sweeps import (
    Settings,
    Sweep,
    Trial,
    cells,
    description,
    label,
    level,
    levels,
    shown_levels,
)
from switchx.report.tables import Table, number
from switchx.training.selection import Criterion

Quantity = Callable[[Measurement], float | None]

OF_EVALUATION: Mapping[str, Quantity] = {"dropped fraction": lambda each: each.dropped}
OF_TRAINING: Mapping[str, Quantity] = {
    "dropped in training": lambda each: each.trial.run.training_dropped,
    "step time (s)": lambda each: each.trial.run.step_seconds,
    "training time (s)": lambda each: each.trial.run.training_seconds,
}
# How many small multiples a setting of further axes may have.
MOST_PANELS = 9
_HOW_TO_READ = (
    "A point is a trial with one seed, a dash the mean of a setting, a line its 95 % interval."
)
_EDGE = (
    " Along the upper edge stand trials without a final value: ✕ for each that diverged, failed, "
    "was pruned or stopped, ○ for each that has not finished."
)


def trained(
    sweep: Sweep, found: Sequence[Arm], metric: Criterion, split: str | None
) -> list[Block]:
    """The sweep's own settings at the end of training, with what training dropped and cost."""
    outside = [t for t in sweep.trials if t.state != "done" and t.settings is not None]
    blocks = effects(found, metric, sweep.axes, outside)
    if found:
        quantities = {**OF_EVALUATION, **OF_TRAINING}
        blocks.append(settings_table("settings", found, metric, sweep.axes, split, quantities))
    return blocks


def evaluated(sweep: Sweep, found: Sequence[Arm], metric: Criterion, base: Settings) -> list[Block]:
    """The finished checkpoints evaluated under changed settings, as further axes.

    Differences are to the first of the settings that `base` has been evaluated under.
    """
    if not found:
        return [Text("No finished trial has evaluations.jsonl with this metric yet.", notice=True)]
    split = found[0].measurements[0].row["split"]
    axes = [
        axis
        for axis in (*sweep.axes, *sweep.eval_axes)
        if any(axis in arm.settings for arm in found)
    ]
    columns = ("trial", *axes, "seed", "step", metric.metric, "dropped fraction", "run directory")
    rows = [
        (
            f"#{each.trial.number}",
            *cells(each.settings, axes),
            each.seed,
            each.row["step"],
            each.value,
            each.dropped,
            each.directory,
        )
        for arm in found
        for each in arm.measurements
    ]
    table = Table("evaluations", f"Rows of evaluations.jsonl, split {split}.", columns, rows)
    settings = [arm.settings for arm in found]
    fitting = [each for each in settings if base.items() <= each.items()]
    return [
        *effects(found, metric, axes),
        settings_table("evaluations_settings", found, metric, axes, split, OF_EVALUATION),
        *differences(found, (fitting or settings)[0], metric, axes, name="evaluations_differences"),
        Folded("Every evaluation", [table]),
    ]


def effects(
    found: Sequence[Arm], metric: Criterion, axes: Sequence[str], outside: Sequence[Trial] = ()
) -> list[Block]:
    """The metric against each axis, other axes by colour and small multiples.

    Args:
      found: settings with their measurements.
      metric: that was measured.
      axes: each has its own charts.
      outside: trials without a final value, marked along the edge.
    """
    panels: list[Figure] = []
    for axis in axes:
        panels += _effect(found, outside, metric, axis, [a for a in axes if a != axis])
    blocks: list[Block] = []
    if not found:
        blocks.append(Text("No trial is done with this metric yet.", notice=True))
    if panels:
        blocks += [Text(_HOW_TO_READ + (_EDGE if outside else "")), Figures(panels)]
    elif found:
        blocks.append(Text("The sweep has no axes: all trials have one setting."))
    return blocks


def differences(
    found: Sequence[Arm],
    base: Settings,
    metric: Criterion,
    axes: Sequence[str],
    *,
    name: str = "differences",
) -> list[Block]:
    """Each setting minus the base setting, seed by seed."""
    reference = next((arm for arm in found if key(arm.settings) == key(base)), None)
    if reference is None:
        base_name = description(base) or "the first setting"
        return [Text(f"The base, {base_name}, has no finished trial to compare with.", notice=True)]
    points, means, rows = [], [], []
    for arm in found:
        if arm is reference:
            continue
        pairs = arm.minus(reference)
        made = estimate(list(pairs.values()))
        name_of = label(arm.settings, axes)
        rows.append(
            (
                *cells(arm.settings, axes),
                *_estimated(made),
                _by_seed(pairs),
                arm.trials,
                reference.trials,
            )
        )
        if made is None:
            continue
        points += [
            {
                "setting": name_of,
                "value": value,
                "seed": seed,
                "run": arm.by_seed[seed].directory,
                "base": reference.by_seed[seed].directory,
            }
            for seed, value in pairs.items()
        ]
        means.append({"setting": name_of, **dataclasses.asdict(made), "run": arm.directories})
    if not rows:
        return [Text("Only the base setting has finished trials.", notice=True)]
    to = description(reference.settings) or "all trials"
    better = "Left of" if metric.best == "lowest" else "Right of"
    blocks: list[Block] = []
    if means:
        what = run_sections.axis(metric.metric)
        caption = (
            f"{better} the line is better than {to}. A point is a pair of trials with one seed, "
            "a dash their mean, a line its 95 % interval."
        )
        axis = Axis(", ".join(["difference", *what.title.split(", ")[1:]]), what.format)
        blocks.append(
            Figures(
                [
                    figures.differences(
                        f"{run_sections.heading(metric.metric)} minus that of {to}",
                        points,
                        means,
                        axis,
                        y_title=" · ".join(axes),
                        order=[row["setting"] for row in means],
                        caption=caption,
                    )
                ]
            )
        )
    columns = (
        *axes,
        "mean difference",
        "95 % from",
        "to",
        "pairs",
        "by seed",
        "trials",
        "minus trials",
    )
    caption = (
        f"{metric.metric} minus that of {to}, paired on seed; Student's t over the pairs, one "
        "interval at a time: of many, one in twenty misses its mark."
    )
    return [*blocks, Table(name, caption, columns, rows)]


def settings_table(
    name: str,
    found: Sequence[Arm],
    metric: Criterion,
    axes: Sequence[str],
    split: str | None,
    quantities: Mapping[str, Quantity],
) -> Table:
    """Every setting: mean, interval, seeds, means of other quantities."""
    columns = (
        *axes,
        f"mean {metric.metric}",
        "95 % from",
        "to",
        "seeds",
        "by seed",
        *quantities,
        "trials",
    )
    rows = [
        (
            *cells(arm.settings, axes),
            *_estimated(arm.estimate),
            _by_seed({each.seed: each.value for each in arm.measurements}),
            *map(arm.mean_of, quantities.values()),
            arm.trials,
        )
        for arm in found
    ]
    caption = (
        f"{metric.metric} of {split} by setting, over finished trials. # is a row of All trials."
    )
    return Table(name, caption, columns, rows)


def _effect(
    found: Sequence[Arm],
    outside: Sequence[Trial],
    metric: Criterion,
    axis: str,
    others: Sequence[str],
) -> list[Figure]:
    settings = [arm.settings for arm in found] + [
        t.settings for t in outside if t.settings is not None
    ]
    values = levels(settings, axis)
    if not values:
        return []
    to_scale = figures.is_numeric_scale(values)
    x_values = values if to_scale else [level(value) for value in values]
    if not to_scale and any(axis not in each for each in settings):
        x_values.append("–")
    series, panels = (others[:1], others[1:])
    panel_names = list(dict.fromkeys(label(each, panels) for each in settings))
    if (
        to_scale
        or len(panel_names) > MOST_PANELS
        or (series and len(levels(settings, series[0])) > figures.MOST_LEVELS)
    ):
        series, panels, panel_names = [], [], [""]

    def place(each: Settings) -> dict[str, Any]:
        x = each[axis] if to_scale else label(each, [axis])
        return {"x": x, "series": label(each, series)}

    made = []
    for panel in panel_names:
        chosen = [
            arm
            for arm in found
            if label(arm.settings, panels) == panel and (axis in arm.settings or not to_scale)
        ]
        points = [
            {**place(arm.settings), "value": each.value, "seed": each.seed, "run": each.directory}
            for arm in chosen
            for each in arm.measurements
        ]
        estimates = [(arm, arm.estimate) for arm in chosen]
        means = [
            {**place(arm.settings), **dataclasses.asdict(each), "run": arm.directories}
            for arm, each in estimates
            if each is not None
        ]
        # Means of different settings at one place would be joined by a line.
        if not to_scale and not series and others:
            means = []
        apart: dict[tuple[Any, str], list[Trial]] = {}
        for t in outside:
            own = t.settings or {}
            if label(own, panels) == panel and (axis in own or not to_scale):
                at = place(own)
                apart.setdefault((at["x"], at["series"]), []).append(t)
        crosses = [
            {"x": x, "series": of, "text": _marks(trials), "trials": _trials(trials)}
            for (x, of), trials in apart.items()
        ]
        title = f"{run_sections.heading(metric.metric)} against {axis}"
        if panel:
            title += f", {' · '.join(panels)} = {panel}"
        made.append(
            figures.effect(
                title,
                points,
                means,
                crosses,
                run_sections.axis(metric.metric),
                x_title=axis,
                x_values=x_values,
                series_title=series[0] if series else "",
                series=shown_levels(settings, series) if series else (),
            )
        )
    return made


def _marks(trials: Sequence[Trial]) -> str:
    """A cross for each trial that ended badly, a circle for each that has not ended."""
    crosses = sum(trial.state in run_sections.ENDED_BADLY for trial in trials)
    signs = [(crosses, "✕"), (len(trials) - crosses, "○")]
    if len(trials) > 4:
        return " ".join(f"{count}{sign}" for count, sign in signs if count)
    return "".join(count * sign for count, sign in signs)


def _trials(trials: Sequence[Trial]) -> str:
    return "; ".join(f"seed {t.seed} {t.state}: {t.run.path}" for t in trials)


def _by_seed(values: Mapping[Any, float]) -> str:
    return ", ".join(f"{seed}: {number(value)}" for seed, value in values.items())


def _estimated(made: Estimate | None) -> tuple[float | None, float | None, float | None, int]:
    return (made.mean, made.low, made.high, made.n) if made else (None, None, None, 0)
