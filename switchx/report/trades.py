"""A sweep's quality against what it cost, and against what was dropped."""

from collections.abc import Callable, Sequence

from switchx.report import figures, run_sections
from switchx.report.arms import Arm, Measurement
from switchx.report.figures import Axis, Figure
from switchx.report.page import Block, Figures, Text
from switchx.report.statistics import pareto_front
from switchx.report.sweeps import Sweep, label, shown_levels
from switchx.report.tables import time_unit
from switchx.training.selection import Criterion


def costs(found: Sequence[Arm], metric: Criterion, axes: Sequence[str]) -> list[Block]:
    """Quality against measured time, with the settings that no other beats."""
    made = []
    for title, cost in (
        ("training time (step time × steps)", lambda each: each.trial.run.training_seconds),
        ("step time", lambda each: each.trial.run.step_seconds),
    ):
        times = [x for arm in found for each in arm.measurements if (x := cost(each)) is not None]
        unit, size = time_unit(max(times, default=0))
        figure = _trade(
            found,
            metric,
            f"{run_sections.heading(metric.metric)} against {title}",
            Axis(f"{title}, {unit}"),
            lambda each, cost=cost, size=size: None if cost(each) is None else cost(each) / size,
            axes,
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
        ("in training", own, sweep.axes, lambda each: each.trial.run.training_dropped),
        ("at the end of training", own, sweep.axes, lambda each: each.dropped),
        (
            "under other settings of evaluation",
            under,
            (*sweep.axes, *sweep.eval_axes),
            lambda each: each.dropped,
        ),
    ):
        figure = _trade(
            found,
            metric,
            f"{run_sections.heading(metric.metric)} against dropped tokens, {title}",
            axis,
            share,
            axes,
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


def _trade(
    found: Sequence[Arm],
    metric: Criterion,
    title: str,
    axis: Axis,
    cost: Callable[[Measurement], float | None],
    axes: Sequence[str],
    *,
    front: bool = False,
) -> Figure | None:
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
        series=shown_levels(settings, coloured),
        front=joined,
        caption=caption.strip(),
    )
