"""What a report shows of a sweep: its settings against each other, and every trial."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from switchx.report import figures, run_sections
from switchx.report.arms import (
    Arm,
    Measurement,
    arms,
    base_of,
    evaluations,
    last_value,
    measurements,
    planned,
)
from switchx.report.figures import Axis, Figure
from switchx.report.page import Block, Chapter, Figures, Folded, Section, Text
from switchx.report.runs import Run, key, metric_value
from switchx.report.statistics import Estimate, estimate, paired_differences, pareto_front
from switchx.report.sweeps import Settings, Sweep, Trial, description, label, level, levels
from switchx.report.tables import Table, number, time_unit
from switchx.training.selection import Criterion, numbers

Quantity = Callable[[Measurement], float | None]

OF_EVALUATION: Mapping[str, Quantity] = {"dropped fraction": lambda each: each.dropped}
OF_TRAINING: Mapping[str, Quantity] = {
    "dropped in training": lambda each: each.trial.run.training_dropped,
    "step time (s)": lambda each: each.trial.run.step_seconds,
    "training time (s)": lambda each: each.trial.run.training_seconds,
}
# How many small multiples a setting of further axes may have.
MOST_PANELS = 9
# From how many seeds on an interval says something about a normal distribution's tails.
FEW_SEEDS = 3


def chapter(
    sweep: Sweep, metric: Criterion, *, split: str | None, base_arm: str | None, base: Run | None
) -> Chapter:
    """Everything about one sweep.

    Args:
      sweep: as it was read.
      metric: by which settings are compared.
      split: evaluations that the metric is taken from; None for those of the task.
      base_arm: NAME=VALUE,… of the setting that differences are to; None for the first.
      base: run whose configuration the trials are compared with; None for the first trial.

    Raises:
      UserError: no such base_arm.
    """
    split = run_sections.main_split(sweep.runs, metric.metric, split)
    own = arms(sweep, measurements(sweep, metric, split))
    under = arms(sweep, evaluations(sweep, metric, split), sweep.eval_axes)
    reference = base_of(base_arm, own)
    problems = list(sweep.problems)
    if split is None and any(run.rows for run in sweep.runs):
        problems.append(f"no row of any trial has the metric {metric.metric}")
    problems += [
        f"trials/{trial.name} is done, and its last row of {split} has no {metric.metric}"
        for trial in sweep.trials
        if trial.state == "done" and split and last_value(trial, metric, split) is None
    ]
    named = {f"#{trial.number}": trial.run for trial in sweep.trials}
    started = {name: run for name, run in named.items() if run.state != "waiting"}
    counts: dict[str, int] = {}
    for trial in sweep.trials:
        counts[trial.state] = counts.get(trial.state, 0) + 1
    if not sweep.trials:
        nothing = Section("Trials", [Text("The sweep has no trials yet.", notice=True)])
        return Chapter(
            f"Sweep {sweep.name}",
            summary(sweep, metric, split, own, under),
            counts,
            problems,
            [nothing],
        )
    sections = [
        Section(
            f"{_name(metric)} against each axis", effects(sweep, own, metric, sweep.axes, split)
        ),
        *(
            [Section("Evaluated under other settings", evaluated(sweep, under, metric, reference))]
            if under or sweep.eval_axes
            else []
        ),
        Section(
            "Differences, paired on seed", differences(sweep, own, reference, metric, sweep.axes)
        ),
        Section("Quality against cost", costs(sweep, own, metric)),
        Section("Quality against dropped tokens", drops(sweep, own, under, metric)),
        Section("Learning curves", curves(sweep, metric)),
        Section("Expert load", loads(sweep)),
        Section("All trials", [trials_table(sweep, metric, split)]),
        Section("What the experts specialise in", specialisation(sweep)),
        Section("Configuration", run_sections.differing_keys(started, base or _first(sweep))),
        Section("Versions and commands", run_sections.provenance(started)),
    ]
    lines = summary(sweep, metric, split, own, under)
    return Chapter(f"Sweep {sweep.name}", lines, counts, problems, sections)


def summary(
    sweep: Sweep, metric: Criterion, split: str | None, own: Sequence[Arm], under: Sequence[Arm]
) -> list[str]:
    """Sentences: what was run, the best, whether the next is told apart, what went wrong."""
    settings = {key(trial.settings) for trial in sweep.trials if trial.settings is not None}
    seeds = {trial.seed for trial in sweep.trials if trial.seed is not None}
    axes = f" over {', '.join(sweep.axes)}" if sweep.axes else ""
    lines = [
        f"{_count(len(settings), 'setting')}{axes}, {_count(len(seeds), 'seed')}, "
        f"{_count(len(sweep.trials), 'trial')} in {sweep.path}. The {metric.best} {metric.metric}"
        + (f" on {split}" if split else "")
        + " at the last step is the best; only trials that are done are in means, with 95 % "
        "intervals by Student's t over seeds."
    ]
    lines += _best(own, metric, "Best")
    if under:
        lines += _best(under, metric, "Best under other settings of evaluation")
    if not own:
        lines.append("No trial is done with this metric, so there is nothing to compare yet.")
    for state in ("diverged", "failed", "pruned"):
        trials = [trial for trial in sweep.trials if trial.state == state]
        if trials:
            some = "; ".join(_trial_name(trial) for trial in trials[:6])
            more = f"; and {len(trials) - 6} more" if len(trials) > 6 else ""
            lines.append(f"{state.capitalize()}: {some}{more}.")
    other = [t for t in sweep.trials if t.state not in ("done", "diverged", "failed", "pruned")]
    if other:
        lines.append(
            f"{_count(len(other), 'trial')} not finished: marked in charts, and in no mean."
        )
    return lines


def effects(
    sweep: Sweep, found: Sequence[Arm], metric: Criterion, axes: Sequence[str], split: str | None
) -> list[Block]:
    """The metric against each axis, other axes by colour and small multiples."""
    outside = _unfinished(sweep)
    panels: list[Figure] = []
    for axis in axes:
        panels += _effect(
            found,
            outside if axes == sweep.axes else [],
            metric,
            axis,
            [a for a in axes if a != axis],
        )
    blocks: list[Block] = []
    if not found:
        blocks.append(Text("No trial is done with this metric yet.", notice=True))
    if panels:
        blocks += [
            Text(_HOW_TO_READ + (_EDGE if outside and axes == sweep.axes else "")),
            Figures(panels),
        ]
    elif found:
        blocks.append(Text("The sweep has no axes: all trials have one setting."))
    if found:
        # What training dropped and cost stands in the table of the sweep's own settings.
        if axes == sweep.axes:
            what, quantities = "settings", {**OF_EVALUATION, **OF_TRAINING}
        else:
            what, quantities = "evaluations_settings", OF_EVALUATION
        blocks.append(arms_table(what, found, metric, axes, split, quantities))
    return blocks


def evaluated(
    sweep: Sweep, found: Sequence[Arm], metric: Criterion, base: Settings | None
) -> list[Block]:
    """The finished checkpoints evaluated under changed settings, as further axes.

    Differences are to the first of the settings that `base` has been evaluated under.
    """
    if not found:
        return [Text("No finished trial has evaluations.jsonl with this metric yet.", notice=True)]
    split = found[0].measurements[0].row["split"]
    axes = (*sweep.axes, *sweep.eval_axes)
    axes = [axis for axis in axes if any(axis in arm.settings for arm in found)]
    columns = ("trial", *axes, "seed", "step", metric.metric, "dropped fraction", "run directory")
    rows = [
        (
            f"#{each.trial.number}",
            *_values(each.settings, axes),
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
    blocks = effects(sweep, found, metric, tuple(axes), split)
    settings = [arm.settings for arm in found]
    fitting = [each for each in settings if (base or {}).items() <= each.items()]
    blocks += differences(
        sweep, found, (fitting or settings)[0], metric, axes, name="evaluations_differences"
    )
    return [*blocks, Folded("Every evaluation", [table])]


def differences(
    sweep: Sweep,
    found: Sequence[Arm],
    base: Settings | None,
    metric: Criterion,
    axes: Sequence[str],
    *,
    name: str = "differences",
) -> list[Block]:
    """Each setting minus the base setting, seed by seed."""
    first = next((trial.settings for trial in sweep.trials if trial.settings is not None), {})
    wanted = first if base is None else base
    reference = next((arm for arm in found if key(arm.settings) == key(wanted)), None)
    if reference is None:
        base_name = description(wanted) or "the first setting"
        return [Text(f"The base, {base_name}, has no finished trial to compare with.", notice=True)]
    points, means, rows = [], [], []
    for arm in found:
        if arm is reference:
            continue
        pairs = paired_differences(
            {seed: each.value for seed, each in arm.by_seed.items()},
            {seed: each.value for seed, each in reference.by_seed.items()},
        )
        made = estimate(list(pairs.values()))
        name_of = label(arm.settings, axes)
        rows.append(
            (
                *_values(arm.settings, axes),
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
        means.append({"setting": name_of, **_mean_row(made), "run": arm.directories})
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
                        f"{_name(metric)} minus that of {to}",
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


def costs(sweep: Sweep, found: Sequence[Arm], metric: Criterion) -> list[Block]:
    """Quality against measured time, with the settings that no other beats."""
    made = []
    for title, cost in (
        ("training time (step time × steps)", lambda each: each.trial.run.training_seconds),
        ("step time", lambda each: each.trial.run.step_seconds),
    ):
        times = [x for arm in found for each in arm.measurements if (x := cost(each)) is not None]
        unit, size = time_unit(max(times, default=0))
        figure = _trade(
            sweep,
            found,
            metric,
            f"{_name(metric)} against {title}",
            Axis(f"{title}, {unit}"),
            lambda each, cost=cost, size=size: None if cost(each) is None else cost(each) / size,
            front=True,
        )
        made += [figure] if figure else []
    if not made:
        return [Text("No finished trial has step times and the metric.", notice=True)]
    lead = (
        "The dashed line joins the means that no other setting beats in both. Step times are "
        "medians of what each run measured: they compare settings only if the trials had the "
        "machine to themselves, or shared it alike."
    )
    return [Text(lead), Figures(made)]


def drops(sweep: Sweep, own: Sequence[Arm], under: Sequence[Arm], metric: Criterion) -> list[Block]:
    """Quality against the share of choices that found their expert full."""
    axis = run_sections.axis("dropped_fraction")
    made = []
    for title, found, axes, share in (
        ("in training", own, sweep.axes, OF_TRAINING["dropped in training"]),
        ("at the end of training", own, sweep.axes, lambda each: each.dropped),
        (
            "under other settings of evaluation",
            under,
            (*sweep.axes, *sweep.eval_axes),
            lambda each: each.dropped,
        ),
    ):
        figure = _trade(
            sweep,
            found,
            metric,
            f"{_name(metric)} against dropped tokens, {title}",
            axis,
            share,
            axes=axes,
        )
        made += [figure] if figure else []
    if not made:
        return [
            Text("No finished trial has a dropped fraction: dense models, perhaps.", notice=True)
        ]
    return [
        Text(
            "Dropped in training: the mean over its logged steps, at the capacity of training. The "
            "others: in the evaluation that the metric is from, at its capacity."
        ),
        Figures(made),
    ]


def curves(sweep: Sweep, metric: Criterion) -> list[Block]:
    """The metric and training's loss over time, every trial a line."""
    runs = {f"#{trial.number}": trial.run for trial in sweep.trials}
    coloured = sweep.axes[-1:]
    planned = [trial.settings for trial in sweep.trials if trial.settings is not None]
    series = {f"#{t.number}": label(t.settings or {}, coloured) or "all" for t in sweep.trials}
    order = [*_series(planned, coloured), *series.values()]
    order = [each for each in dict.fromkeys(order) if each in series.values()]
    found = [
        run_sections.curve_figure(
            runs, metric.metric, lines=("evaluation",), series=series, ordered=order
        ),
        *(
            run_sections.curve_figure(runs, name, lines=("train",), series=series, ordered=order)
            for name in ("loss", "dropped_fraction", "grad_norm")
        ),
    ]
    shown = [figure for figure in found if figure]
    if not shown:
        return [Text("No trial has metrics yet.", notice=True)]
    return [
        Text(
            f"A line is a trial; its colour is its {coloured[0]}."
            if coloured
            else "A line is a trial."
        ),
        Figures(shown),
    ]


def loads(sweep: Sweep) -> list[Block]:
    """Expert load of every trial at the end, one heat map for each layer."""
    runs = {
        f"{label(t.settings or {}, sweep.axes)} #{t.number}".strip(): t.run
        for t in _by_setting(sweep)
    }
    found = run_sections.final_loads(runs, "setting and trial")
    if not found:
        return [
            Text(
                "No trial has logged expert loads: nothing logged yet, or dense models.",
                notice=True,
            )
        ]
    lead = (
        "The share of tokens that asked for each expert at the last evaluation, in fair shares: 1 "
        "is 1/E of the tokens, the neutral colour; 0 is an expert that nobody asks for."
    )
    return [Text(lead), Figures(found)]


def specialisation(sweep: Sweep) -> list[Block]:
    """Of the trials that were analysed."""
    runs = {f"#{t.number}": t.run for t in sweep.trials if t.run.analysis is not None}
    if runs:
        return run_sections.specialisation(runs)
    some = next((t.run.path for t in sweep.trials if t.state == "done"), sweep.path / "trials/NAME")
    return [
        Text(f"No trial has been analysed: python scripts/analyze_router.py {some}", notice=True)
    ]


def arms_table(
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
            *_values(arm.settings, axes),
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


def trials_table(sweep: Sweep, metric: Criterion, split: str | None) -> Table:
    """Every trial, whatever became of it."""
    columns = (
        "trial",
        *sweep.axes,
        "seed",
        "state",
        "attempts",
        "last step",
        metric.metric,
        "at step",
        "dropped fraction",
        "dropped in training",
        "step time (s)",
        "wall time (s)",
        "error",
        "run directory",
    )
    rows = []
    for trial in sweep.trials:
        run = trial.run
        last = next(
            (
                row
                for row in reversed(run.rows)
                if row["split"] == split and metric_value(row, metric.metric) is not None
            ),
            {},
        )
        values = numbers(last)
        rows.append(
            (
                f"#{trial.number}",
                *_values(trial.settings or {}, sweep.axes),
                trial.seed,
                trial.state,
                run.trial.get("attempts"),
                run.last_step if run.rows else None,
                values.get(metric.metric),
                last.get("step"),
                values.get("dropped_fraction"),
                run.training_dropped,
                run.step_seconds,
                run.trial.get("seconds"),
                run.trial.get("error") or None,
                str(run.path),
            )
        )
    caption = (
        f"{metric.metric} is the last finite one of {split}; of trials that are not done it is in "
        "no mean. Wall time is that of all attempts."
    )
    return Table("trials", caption, columns, rows, state_column=len(sweep.axes) + 2)


_HOW_TO_READ = (
    "A point is a trial with one seed, a dash the mean of a setting, a line its 95 % interval."
)
_EDGE = (
    " Along the upper edge stand trials without a final value: ✕ for each that diverged, failed, "
    "was pruned or stopped, ○ for each that has not finished."
)


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
            {**place(arm.settings), **_mean_row(each), "run": arm.directories}
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
        title = f"{_name(metric)} against {axis}"
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
                series=_series(settings, series) if series else (),
            )
        )
    return made


def _trade(
    sweep: Sweep,
    found: Sequence[Arm],
    metric: Criterion,
    title: str,
    axis: Axis,
    cost: Callable[[Measurement], float | None],
    *,
    front: bool = False,
    axes: Sequence[str] | None = None,
) -> Figure | None:
    axes = sweep.axes if axes is None else axes
    settings = [arm.settings for arm in found]
    # The last axis has the colours: evaluation's, where there is one.
    coloured = [axes[-1]] if axes else []
    points, means = [], []
    for arm in found:
        own = {"series": label(arm.settings, coloured), "setting": label(arm.settings, axes)}
        there = [(each, x) for each in arm.measurements if (x := cost(each)) is not None]
        points += [
            {**own, "x": x, "y": each.value, "seed": each.seed, "run": each.directory}
            for each, x in there
        ]
        if there:
            x = sum(x for _, x in there) / len(there)
            y = sum(each.value for each, _ in there) / len(there)
            means.append({**own, "x": x, "y": y, "n": len(there), "run": arm.directories})
    if not points:
        return None
    joined: list[dict[str, float]] = []
    caption = "Points are trials, diamonds the means of settings"
    caption += f", labelled by {' · '.join(axes)}." if axes else "."
    if front:
        indices = pareto_front([(row["x"], row["y"]) for row in means], best=metric.best)
        joined = [{"x": means[i]["x"], "y": means[i]["y"]} for i in indices]
        caption += f" On the front: {'; '.join(means[i]['setting'] for i in indices)}."
    return figures.trade(
        title,
        points,
        means,
        axis,
        run_sections.axis(metric.metric),
        series_title=coloured[0] if coloured else "",
        series=_series(settings, coloured),
        front=joined,
        caption=caption.strip(),
    )


def _best(found: Sequence[Arm], metric: Criterion, what: str) -> list[str]:
    ranked = [(arm, each) for arm in found if (each := arm.estimate) is not None]
    sign = 1 if metric.best == "lowest" else -1
    ranked.sort(key=lambda pair: sign * pair[1].mean)
    if not ranked:
        return []
    arm, made = ranked[0]
    within = ""
    if made.low is not None and made.high is not None:
        within = f", 95 % {number(made.low)} to {number(made.high)}"
    seeds = _count(made.n, "seed")
    name = description(arm.settings) or "all trials"
    line = f"{what}: {name}, mean {number(made.mean)} ({seeds}{within})."
    if len(ranked) > 1:
        line += " " + _against_next(arm, ranked[1][0], metric)
    if made.n < FEW_SEEDS:
        line += f" Fewer than {FEW_SEEDS} seeds: no claim."
    return [line]


def _against_next(arm: Arm, other: Arm, metric: Criterion) -> str:
    pairs = paired_differences(
        {seed: each.value for seed, each in arm.by_seed.items()},
        {seed: each.value for seed, each in other.by_seed.items()},
    )
    name = description(other.settings)
    made = estimate(list(pairs.values()))
    if made is None or made.low is None or made.high is None:
        return f"Next is {name}; too few seeds in common to tell them apart."
    resolved = made.low > 0 or made.high < 0
    verdict = "told apart" if resolved else "not told apart"
    return (
        f"It is {verdict} from the next, {name}: difference {number(made.mean)}, 95 % "
        f"{number(made.low)} to {number(made.high)} over {made.n} pairs."
    )


def _marks(trials: Sequence[Trial]) -> str:
    """A cross for each trial that ended badly, a circle for each that has not ended."""
    crosses = sum(trial.state in run_sections.ENDED_BADLY for trial in trials)
    signs = [(crosses, "✕"), (len(trials) - crosses, "○")]
    if len(trials) > 4:
        return " ".join(f"{count}{sign}" for count, sign in signs if count)
    return "".join(count * sign for count, sign in signs)


def _trials(trials: Sequence[Trial]) -> str:
    return "; ".join(f"seed {t.seed} {t.state}: {t.run.path}" for t in trials)


def _series(settings: Sequence[Settings], axes: Sequence[str]) -> list[str]:
    named = [level(value) for axis in axes for value in levels(settings, axis)]
    absent = any(axis not in each for axis in axes for each in settings)
    return [*named, "–"] if absent else named


def _unfinished(sweep: Sweep) -> list[Trial]:
    return [trial for trial in sweep.trials if trial.state != "done" and trial.settings is not None]


def _by_setting(sweep: Sweep) -> list[Trial]:
    order = [key(arm.settings) for arm in planned(sweep)]
    return sorted(
        sweep.trials,
        key=lambda t: (
            order.index(key(t.settings)) if t.settings is not None else len(order),
            t.number,
        ),
    )


def _first(sweep: Sweep) -> Run:
    return next((run for run in sweep.runs if run.config is not None), sweep.runs[0])


def _values(settings: Settings, axes: Sequence[str]) -> list[str | None]:
    return [level(settings[axis]) if axis in settings else None for axis in axes]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _by_seed(values: Mapping[Any, float]) -> str:
    return ", ".join(f"{seed}: {number(value)}" for seed, value in values.items())


def _estimated(made: Estimate | None) -> tuple[float | None, float | None, float | None, int]:
    return (made.mean, made.low, made.high, made.n) if made else (None, None, None, 0)


def _mean_row(made: Estimate) -> dict[str, Any]:
    return {"mean": made.mean, "low": made.low, "high": made.high, "n": made.n}


def _trial_name(trial: Trial) -> str:
    what = description(trial.settings or {}) or trial.name
    error = trial.run.trial.get("error")
    return f"#{trial.number} ({what}, seed {trial.seed}) at step {trial.run.last_step:,}" + (
        f": {error}" if isinstance(error, str) and error else ""
    )


def _name(metric: Criterion) -> str:
    title = run_sections.axis(metric.metric).title.partition(",")[0]
    return title[0].upper() + title[1:]
