"""What a report shows of a sweep: its settings against each other, and every trial."""

from collections.abc import Sequence

from switchx.report import comparisons, run_sections, trades
from switchx.report.arms import Arm, arms, base_of, evaluations, last_value, measurements, planned
from switchx.report.page import Block, Chapter, Figures, Section, Text
from switchx.report.runs import Run, key, metric_value
from switchx.report.statistics import estimate
from switchx.report.sweeps import Sweep, Trial, cells, description, label, shown_levels
from switchx.report.tables import Table, number
from switchx.training.selection import Criterion, numbers

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
    if reference is None:
        reference = next((t.settings for t in sweep.trials if t.settings is not None), {})
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
            f"{run_sections.heading(metric.metric)} against each axis",
            comparisons.trained(sweep, own, metric, split),
        ),
        *(
            [
                Section(
                    "Evaluated under other settings",
                    comparisons.evaluated(sweep, under, metric, reference),
                )
            ]
            if under or sweep.eval_axes
            else []
        ),
        Section(
            "Differences, paired on seed",
            comparisons.differences(own, reference, metric, sweep.axes),
        ),
        Section("Quality against cost", trades.costs(own, metric, sweep.axes)),
        Section("Quality against dropped tokens", trades.drops(sweep, own, under, metric)),
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


def curves(sweep: Sweep, metric: Criterion) -> list[Block]:
    """The metric and training's loss over time, every trial a line."""
    runs = {f"#{trial.number}": trial.run for trial in sweep.trials}
    coloured = sweep.axes[-1:]
    planned = [trial.settings for trial in sweep.trials if trial.settings is not None]
    series = {f"#{t.number}": label(t.settings or {}, coloured) or "all" for t in sweep.trials}
    order = [*shown_levels(planned, coloured), *series.values()]
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
                *cells(trial.settings or {}, sweep.axes),
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
        line += " " + _against_next(arm, ranked[1][0])
    if made.n < FEW_SEEDS:
        line += f" Fewer than {FEW_SEEDS} seeds: no claim."
    return [line]


def _against_next(arm: Arm, other: Arm) -> str:
    name = description(other.settings)
    made = estimate(list(arm.minus(other).values()))
    if made is None or made.low is None or made.high is None:
        return f"Next is {name}; too few seeds in common to tell them apart."
    resolved = made.low > 0 or made.high < 0
    verdict = "told apart" if resolved else "not told apart"
    return (
        f"It is {verdict} from the next, {name}: difference {number(made.mean)}, 95 % "
        f"{number(made.low)} to {number(made.high)} over {made.n} pairs."
    )


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


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _trial_name(trial: Trial) -> str:
    what = description(trial.settings or {}) or trial.name
    error = trial.run.trial.get("error")
    return f"#{trial.number} ({what}, seed {trial.seed}) at step {trial.run.last_step:,}" + (
        f": {error}" if isinstance(error, str) and error else ""
    )
