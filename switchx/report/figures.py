"""Charts as Vega-Lite specifications. Colours are named by role; the page says what they are.

A specification is drawn at the width of its place on the page. Tooltips name the run directory
behind each point.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

# How many points a curve and how many cells a heat map has at most, so that pages stay small.
MOST_POINTS = 400
MOST_CELLS = 12_000
# The longest list of values of an axis that is drawn one beside the other.
MOST_LEVELS = 12
# The most settings that are labelled where they lie.
MOST_LABELS = 16
# Bounds between the colours of an expert's load, in fair shares 1 / E.
LOAD_BOUNDS = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0)
# A run that is not done is a cross of this shape, wherever it is drawn.
CROSS = "M-1,-1L1,1M1,-1L-1,1"
HEIGHT = 260


@dataclasses.dataclass(frozen=True)
class Figure:
    """A chart and the words under it.

    Attributes:
      title: what is plotted.
      spec: Vega-Lite, its data in "datasets".
      caption: how to read it, and where the numbers are from.
    """

    title: str
    spec: dict[str, Any]
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Axis:
    """A quantity on an axis: its name with the unit, and a format of d3-format."""

    title: str
    format: str = "~g"
    zero: bool = False


Rows = Sequence[Mapping[str, Any]]


def curves(
    title: str, rows: Rows, axis: Axis, *, ordered: Sequence[str] | None, caption=""
) -> Figure:
    """Lines over training steps.

    Args:
      title: of the figure.
      rows: "step", "value" (None leaves a gap), "series" (has its colour), "line" (has its dash,
        "train" first), "run" (the directory) and "end": on the last row of a run that did not end
        well, how it ended. One value at least.
      axis: of the values.
      ordered: the series in the order of a quantity, which get the colours of a scale; None for
        series without an order.
      caption: of the figure.
    """
    ill = {row["run"] for row in rows if row["end"]}
    well = [row["value"] for row in rows if row["value"] is not None and row["run"] not in ill]
    values = [row["value"] for row in rows if row["value"] is not None]
    shown = well or values
    beyond = max(values) > max(shown) + 0.5 * (max(shown) - min(shown))
    logarithmic = min(shown) > 0 and max(shown) / min(shown) > 50
    scale = alt.Scale(
        type="log" if logarithmic else "linear",
        zero=alt.Undefined if logarithmic else axis.zero,
        domain=[min(shown), max(shown)] if beyond else alt.Undefined,
        clamp=beyond,
    )
    if beyond:
        caption = f"{caption} What lies above the others' range is drawn on the edge.".strip()
    y_title = f"{axis.title}, log scale" if logarithmic else axis.title
    y_axis = alt.Axis(format=axis.format, tickCount=5 if logarithmic else alt.Undefined)
    middle = (min(row["step"] for row in rows) + max(row["step"] for row in rows)) / 2
    lines = [name for name in ("train", "evaluation") if any(r["line"] == name for r in rows)]
    base = alt.Chart(_data("rows")).encode(
        x=alt.X("step:Q", title="training step", axis=alt.Axis(format="~s", grid=False)),
        y=alt.Y("value:Q", title=y_title, scale=scale, axis=y_axis),
        color=_colour("series", ordered, many=len({row["series"] for row in rows}) > 1),
        tooltip=[
            alt.Tooltip("series:N", title="series"),
            alt.Tooltip("line:N", title="split"),
            alt.Tooltip("step:Q", title="step", format=",d"),
            alt.Tooltip("value:Q", title=axis.title, format=".5~g"),
            alt.Tooltip("run:N", title="run directory"),
        ],
    )
    dash = alt.StrokeDash(
        "line:N",
        title=None,
        sort=lines,
        scale=alt.Scale(domain=lines, range=[[4, 3], [1, 0]][-len(lines) :]),
        legend=None,  # the caption has it
    )
    line = base.mark_line(strokeWidth=1.7).encode(strokeDash=dash, detail="run:N")
    few = len(rows) <= 30 * len({(row["run"], row["line"], row["series"]) for row in rows})
    dots = base.mark_circle(size=28, opacity=1 if few else 0)
    layers = [each.transform_flatten(["step", "value"]) for each in (line, dots)]
    ends = [row for row in rows if row["end"]]
    labels = [row["series"] for row in rows]
    if ends:
        end = base.properties(data=_data("ends"))
        layers += [
            end.mark_point(shape=CROSS, size=110, strokeWidth=2.2, opacity=1),
            end.mark_text(
                dy=-13,
                fontSize=11,
                align=alt.ExprRef(f"datum.step < {middle} ? 'left' : 'right'"),
            ).encode(text="end:N", tooltip=alt.value(None)),
        ]
    return Figure(
        title, _spec(alt.layer(*layers), labels=labels, rows=_columns(rows), ends=ends), caption
    )


def thinned(points: Sequence[Any], most: int = MOST_POINTS) -> list[Any]:
    """At most so many of a sequence, evenly, with the first and the last."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def load_map(title: str, rows: Rows, *, y_title: str, order: Sequence[Any], caption="") -> Figure:
    """Expert load as a heat map, an expert in each column or row.

    Args:
      title: of the figure.
      rows: "y" (a step or a run), "load" (a list with each expert's share of the tokens) and
        "run".
      y_title: what the other side is. "training step" lies along x, anything else along y.
      order: of that side.
      caption: of the figure.
    """
    over_time = y_title == "training step"
    experts = alt.Axis(labelOverlap="greedy", labelAngle=0, grid=False, ticks=False, domain=False)
    side = alt.Axis(
        labelOverlap="greedy", grid=False, labelAngle=0, format="~s" if over_time else alt.Undefined
    )
    expert: dict[str, Any] = {"title": "expert", "axis": experts}
    other: dict[str, Any] = {"title": y_title, "axis": side, "sort": list(order)}
    if over_time:
        x, y = alt.X("y:O", **other), alt.Y("expert:O", **expert)
        most = max(len(row["load"]) for row in rows)
        height = min(max(14 * most, 96), 320)
    else:
        x, y = alt.X("expert:O", **expert), alt.Y("y:O", **other)
        height = min(max(18 * len(rows), 60), 720)
    pairs = zip(LOAD_BOUNDS[:-1], LOAD_BOUNDS[1:], strict=True)
    between = [f"{low:g}–{high:g}" for low, high in pairs]
    bands = [f"under {LOAD_BOUNDS[0]:g}", *between, f"over {LOAD_BOUNDS[-1]:g}"]
    chart = (
        alt.Chart(_data("rows"))
        .transform_calculate(expert="sequence(length(datum.load))", fair="length(datum.load)")
        .transform_flatten(["load", "expert"])
        .transform_calculate(relative="datum.load * datum.fair")
        .transform_calculate(band=_band(bands))
        .mark_rect()
        .encode(
            x=x,
            y=y,
            color=alt.Color(
                "band:O",
                title="load, in fair shares",
                sort=bands,
                scale=alt.Scale(domain=bands, range="diverging"),
                legend=alt.Legend(symbolType="square", symbolStrokeWidth=0),
            ),
            tooltip=[
                alt.Tooltip("expert:O", title="expert"),
                alt.Tooltip("y:O", title=y_title),
                alt.Tooltip("load:Q", title="share of tokens", format=".2%"),
                alt.Tooltip("relative:Q", title="of a fair share", format=".2f"),
                alt.Tooltip("run:N", title="run directory"),
            ],
        )
    )
    return Figure(title, _spec(chart, height=height, labels=bands, rows=rows), caption)


def effect(
    title: str,
    points: Rows,
    means: Rows,
    unfinished: Rows,
    axis: Axis,
    *,
    x_title: str,
    x_values: Sequence[Any],
    series_title: str = "",
    series: Sequence[str] = (),
    caption: str = "",
) -> Figure:
    """A metric against an axis of a sweep: every seed, mean and interval.

    Args:
      title: of the figure.
      points: "x", "series", "value", "seed" and "run" of each finished trial.
      means: "x", "series", "mean", "low", "high" and "n" of each setting.
      unfinished: "x", "series", "text" and "trials" of all others, written along the upper edge.
      axis: of the metric.
      x_title: name of the axis.
      x_values: its levels as text, in order; or numbers, which are then drawn to scale.
      series_title: name of the axis that has colours.
      series: its levels as text, in order; none for one colour.
      caption: of the figure.
    """
    to_scale = bool(x_values) and not isinstance(x_values[0], str)
    if to_scale:
        wide = min(x_values) > 0 and max(x_values) / min(x_values) > 50
        x_scale = alt.Scale(type="log") if wide else alt.Scale(zero=False)
        name = f"{x_title}, log scale" if wide else x_title
        x: Any = alt.X("x:Q", title=name, scale=x_scale, axis=alt.Axis(format="~g", grid=False))
    else:
        turn = -30 if sum(len(value) + 2 for value in x_values) > 60 else 0
        x_axis = alt.Axis(labelAngle=turn, grid=False)
        x = alt.X(
            "x:N",
            title=x_title,
            sort=list(x_values),
            axis=x_axis,
            scale=alt.Scale(domain=list(x_values), padding=0.2 if series else 0.5),
        )
    y = _quality(
        axis,
        [row["value"] for row in points],
        [v for r in means for v in (r["low"], r["high"]) if v is not None],
    )
    encoding: dict[str, Any] = {"x": x}
    if series:
        encoding["color"] = _colour("series", series, many=True, title=series_title)
        if not to_scale:
            encoding["xOffset"] = alt.XOffset(
                "series:N", sort=list(series), scale=alt.Scale(domain=list(series))
            )
    where = [alt.Tooltip("x:N", title=x_title)]
    where += [alt.Tooltip("series:N", title=series_title)] if series else []
    behind = [alt.Tooltip("seed:N", title="seed"), alt.Tooltip("run:N", title="run directory")]
    value = alt.Tooltip("value:Q", title=axis.title, format=".5~g")
    # Seeds stand beside their mean, so that neither hides the other.
    aside = 0 if to_scale else -5 if len(x_values) * max(len(series), 1) > 8 else -9
    seeds = (
        alt.Chart(_data("points"))
        .mark_circle(size=46, opacity=0.6, xOffset=aside)
        .encode(y=alt.Y("value:Q", **y), tooltip=[*where, value, *behind], **encoding)
    )
    summary = alt.Chart(_data("means")).encode(
        tooltip=[
            *where,
            alt.Tooltip("mean:Q", title="mean", format=".5~g"),
            alt.Tooltip("low:Q", title="95 % from", format=".5~g"),
            alt.Tooltip("high:Q", title="to", format=".5~g"),
            alt.Tooltip("n:Q", title="seeds"),
            alt.Tooltip("run:N", title="run directories"),
        ],
        **encoding,
    )
    mean = alt.Y("mean:Q", **y)
    layers: list[Any] = []
    if to_scale:
        means = [row for row in means if row["n"] > 1]  # of one seed the point says it all
    if means and not to_scale:  # numbers to scale have no order of settings to be joined in
        line = summary.mark_line(strokeWidth=1.4, opacity=0.55)
        layers.append(line.encode(y=mean, tooltip=alt.value(None)))
    if _has_intervals(means):
        rule = summary.mark_rule(strokeWidth=2)
        layers.append(rule.encode(y=alt.Y("low:Q", **y), y2="high:Q"))
    if means:
        dash = summary.mark_tick(orient="horizontal", size=14, thickness=3, opacity=1)
        layers.append(dash.encode(y=mean))
    if points:
        layers.append(seeds)
    if unfinished:
        marks = {k: v for k, v in encoding.items() if k != "color"}
        tips = [*where, alt.Tooltip("trials:N", title="not done")]
        layers.append(
            alt.Chart(_data("unfinished"))
            .mark_text(fontSize=14, fontWeight="bold", baseline="top")
            .encode(y=alt.value(0), text="text:N", tooltip=tips, **marks)
        )
    chart = alt.layer(*layers)
    spec = _spec(chart, labels=series, points=points, means=means, unfinished=unfinished)
    return Figure(title, spec, caption)


def differences(
    title: str,
    points: Rows,
    means: Rows,
    axis: Axis,
    *,
    y_title: str,
    order: Sequence[str],
    caption: str = "",
) -> Figure:
    """Differences to a base setting: every pair, mean and interval, about a line at zero.

    Args:
      title: of the figure.
      points: "setting", "value", "seed", "run" and "base" (both directories) of each pair.
      means: "setting", "mean", "low", "high", "n" and "run".
      axis: of the difference.
      y_title: names of the axes whose values a setting is labelled with.
      order: of the settings.
      caption: of the figure.
    """
    y = alt.Y(
        "setting:N",
        title=y_title,
        sort=list(order),
        scale=alt.Scale(domain=list(order)),
        axis=alt.Axis(
            grid=False,
            ticks=False,
            titleAngle=0,
            titleAlign="left",
            titleAnchor="end",
            titleY=-8,
            titleX=0,
        ),
    )
    x = alt.X(
        "value:Q", title=axis.title, axis=alt.Axis(format=axis.format), scale=alt.Scale(zero=True)
    )
    zero = (
        alt.Chart(_data("zero"))
        .mark_rule(strokeDash=[3, 3], strokeWidth=1.4)
        .encode(x=alt.datum(0))
    )
    pairs = (
        alt.Chart(_data("points"))
        .mark_circle(size=46, opacity=0.5)
        .encode(
            x=x,
            y=y,
            tooltip=[
                alt.Tooltip("setting:N", title=y_title),
                alt.Tooltip("value:Q", title="difference", format="+.5~g"),
                alt.Tooltip("seed:N", title="seed"),
                alt.Tooltip("run:N", title="run directory"),
                alt.Tooltip("base:N", title="minus"),
            ],
        )
    )
    summary = alt.Chart(_data("means")).encode(
        y=y,
        tooltip=[
            alt.Tooltip("setting:N", title=y_title),
            alt.Tooltip("mean:Q", title="mean", format="+.5~g"),
            alt.Tooltip("low:Q", title="95 % from", format="+.5~g"),
            alt.Tooltip("high:Q", title="to", format="+.5~g"),
            alt.Tooltip("n:Q", title="pairs"),
            alt.Tooltip("run:N", title="run directories"),
        ],
    )
    layers: list[Any] = [zero]
    if _has_intervals(means):
        rule = summary.mark_rule(strokeWidth=2)
        layers.append(rule.encode(x=alt.X("low:Q", title=axis.title), x2="high:Q"))
    dash = summary.mark_tick(orient="vertical", size=14, thickness=3, opacity=1)
    layers += [dash.encode(x=alt.X("mean:Q", title=axis.title)), pairs]
    chart = alt.layer(*layers)
    return Figure(
        title,
        _spec(chart, height=max(34 * len(order), 80), points=points, means=means, zero=[{}]),
        caption,
    )


def trade(
    title: str,
    points: Rows,
    means: Rows,
    x_axis: Axis,
    y_axis: Axis,
    *,
    series_title: str,
    series: Sequence[str],
    front: Rows = (),
    caption: str = "",
) -> Figure:
    """Quality against what it costs: every trial, the mean of each setting, and the Pareto front.

    Args:
      title: of the figure.
      points: "x", "y", "series", "setting", "seed" and "run" of each trial.
      means: "x", "y", "series", "setting" (its label), "n" and "run".
      x_axis: of the cost.
      y_axis: of the quality.
      series_title: name of the axis that has colours.
      series: its levels in order.
      front: "x" and "y" of the means that no other beats, by cost.
      caption: of the figure.
    """
    wide = [row["x"] for row in points]
    logarithmic = bool(wide) and min(wide) > 0 and max(wide) / min(wide) > 50
    scale = alt.Scale(type="log") if logarithmic else alt.Scale(zero=False)
    ticks = alt.Axis(format=x_axis.format, tickCount=5 if logarithmic else alt.Undefined)
    name = f"{x_axis.title}, log scale" if logarithmic else x_axis.title
    x = alt.X("x:Q", title=name, axis=ticks, scale=scale)
    y = alt.Y("y:Q", **_quality(y_axis, [row["y"] for row in points], []))
    colour = _colour("series", series, many=True, title=series_title)
    tips = [
        alt.Tooltip("setting:N", title="setting"),
        alt.Tooltip("x:Q", title=x_axis.title, format=".4~g"),
        alt.Tooltip("y:Q", title=y_axis.title, format=".5~g"),
    ]
    layers: list[Any] = []
    if front:
        layers.append(
            alt.Chart(_data("front"))
            .mark_line(interpolate="step-after", strokeWidth=1.4, strokeDash=[5, 3])
            .encode(x=x, y=y)
        )
    layers.append(
        alt.Chart(_data("points"))
        .mark_circle(size=40, opacity=0.5)
        .encode(
            x=x,
            y=y,
            color=colour,
            tooltip=[
                *tips,
                alt.Tooltip("seed:N", title="seed"),
                alt.Tooltip("run:N", title="run directory"),
            ],
        )
    )
    mean = alt.Chart(_data("means")).encode(
        x=x,
        y=y,
        tooltip=[
            *tips,
            alt.Tooltip("n:Q", title="seeds"),
            alt.Tooltip("run:N", title="run directories"),
        ],
    )
    layers.append(
        mean.mark_point(shape="diamond", size=130, filled=True, opacity=1).encode(color=colour)
    )
    if len(means) <= MOST_LABELS:
        layers.append(
            mean.mark_text(align="left", dx=9, dy=-7, fontSize=11).encode(
                text="setting:N", tooltip=alt.value(None)
            )
        )
    chart = alt.layer(*layers)
    spec = _spec(chart, height=320, labels=series, points=points, means=means, front=front)
    return Figure(title, spec, caption)


def histogram(title: str, rows: Rows, *, x_title: str, caption: str = "") -> Figure:
    """Bars over intervals: rows have "low", "high" and "count"."""
    chart = (
        alt.Chart(_data("rows"))
        .mark_bar(binSpacing=1)
        .encode(
            x=alt.X("low:Q", bin="binned", title=x_title, axis=alt.Axis(grid=False)),
            x2="high:Q",
            y=alt.Y("count:Q", title="tokens", axis=alt.Axis(format="~s")),
            tooltip=[
                alt.Tooltip("low:Q", title="from", format=".3~g"),
                alt.Tooltip("high:Q", title="to", format=".3~g"),
                alt.Tooltip("count:Q", title="tokens", format=",d"),
            ],
        )
    )
    return Figure(title, _spec(chart, height=140, rows=rows), caption)


def is_numeric_scale(values: Sequence[Any]) -> bool:
    """Whether the values of an axis are too many to stand one beside the other, and numbers."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return numbers and len(values) > MOST_LEVELS and all(map(math.isfinite, values))


def _data(name: str) -> Any:
    return alt.NamedData(name=name)


def _colour(
    field: str, ordered: Sequence[str] | None, *, many: bool, title: str | None = None
) -> Any:
    if not many:
        return alt.Undefined
    kind = "N" if ordered is None else "O"
    domain = alt.Scale(domain=list(ordered)) if ordered else alt.Undefined
    return alt.Color(f"{field}:{kind}", title=title or None, scale=domain, sort=ordered or None)


def _has_intervals(means: Rows) -> bool:
    return any(row["low"] is not None for row in means)


def _band(bands: Sequence[str]) -> str:
    """Expression of the band between two of `LOAD_BOUNDS` that a row's "relative" lies in."""
    cases = zip(LOAD_BOUNDS, bands[:-1], strict=True)
    return "".join(f"datum.relative < {bound} ? '{band}' : " for bound, band in cases) + (
        f"'{bands[-1]}'"
    )


def _columns(rows: Rows) -> list[dict[str, Any]]:
    """Rows of one line as one row with a list of steps and of values: a page of half the size."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        name = tuple(row[key] for key in ("series", "line", "run"))
        names = dict(zip(("series", "line", "run"), name, strict=True))
        own = found.setdefault(name, {**names, "step": [], "value": []})
        own["step"].append(row["step"])
        own["value"].append(row["value"])
    return list(found.values())


def _quality(axis: Axis, values: Sequence[float], more: Sequence[float]) -> dict[str, Any]:
    """Encoding of a metric on y, with room along the upper edge."""
    found = [*values, *more]
    scale = alt.Scale(zero=axis.zero)
    if found:
        low, high = min(found), max(found)
        margin = (high - low) or abs(high) or 1.0
        scale = alt.Scale(domain=[low - 0.06 * margin, high + 0.14 * margin], nice=False)
    return {"title": axis.title, "scale": scale, "axis": alt.Axis(format=axis.format)}


def _spec(
    chart: Any, *, height: int = HEIGHT, labels: Sequence[str] = (), **data: Rows
) -> dict[str, Any]:
    chart = chart.properties(
        width="container",
        height=height,
        padding={"left": 0, "right": 4, "top": 4, "bottom": 2},
        autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
    )
    spec = chart.to_dict()
    # How charts look is the page's business.
    spec.pop("config", None)
    # From the longest label the page knows how many columns of a legend there is room for.
    spec["usermeta"] = {"longestLabel": max(map(len, labels), default=0)}
    return spec | {"datasets": {name: [dict(row) for row in rows] for name, rows in data.items()}}
