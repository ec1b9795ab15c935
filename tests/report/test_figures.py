import pytest

from switchx.report import figures
from switchx.report.figures import Axis

AXIS = Axis("loss, nats")


def row(step, value, series="a", end=None, line="train", run="runs/a"):
    found = {"step": step, "value": value, "series": series, "line": line, "run": run}
    return found | {"end": end}


def layers(figure):
    return figure.spec["layer"]


def test_curves_hold_every_point_with_its_run():
    rows = [
        row(1, 4.0),
        row(2, None),
        row(3, 3.0),
        row(3, 3.5, "b", line="evaluation", run="runs/b"),
    ]
    figure = figures.curves("Loss", rows, AXIS, ordered=None)
    assert figure.spec["datasets"]["rows"] == [
        {
            "series": "a",
            "line": "train",
            "run": "runs/a",
            "step": [1, 2, 3],
            "value": [4.0, None, 3.0],
        },
        {"series": "b", "line": "evaluation", "run": "runs/b", "step": [3], "value": [3.5]},
    ]
    assert figure.spec["width"] == "container" and "config" not in figure.spec
    titles = [tip["title"] for tip in layers(figure)[0]["encoding"]["tooltip"]]
    assert "run directory" in titles and "step" in titles
    assert figure.spec["datasets"]["ends"] == []


def test_a_curve_that_ends_badly_is_marked_and_does_not_squeeze_the_others():
    rows = [
        row(1, 4.0),
        row(9, 2.0),
        row(1, 4.0, "b", run="b"),
        row(5, 900.0, "b", "diverged", run="b"),
    ]
    figure = figures.curves("Loss", rows, AXIS, ordered=None, caption="As is.")
    assert [r["run"] for r in figure.spec["datasets"]["ends"]] == ["b"]
    scale = layers(figure)[0]["encoding"]["y"]["scale"]
    assert scale["domain"] == [2.0, 4.0] and scale["clamp"] is True
    assert figure.caption == "As is. What lies above the others' range is drawn on the edge."


@pytest.mark.parametrize(("last", "kind"), [(2.0, "linear"), (0.01, "log")])
def test_wide_ranges_are_logarithmic_and_say_so(last, kind):
    figure = figures.curves("Loss", [row(1, 4.0), row(9, last)], AXIS, ordered=None)
    y = layers(figure)[0]["encoding"]["y"]
    assert y["scale"]["type"] == kind
    assert y["title"] == ("loss, nats" if kind == "linear" else "loss, nats, log scale")


def test_thinned_keeps_the_ends():
    assert figures.thinned([1, 2, 3], 3) == [1, 2, 3]
    assert figures.thinned(list(range(101)), 5) == [0, 25, 50, 75, 100]


@pytest.mark.parametrize(
    ("relative", "band"),
    [(0.0, "under 0.25"), (0.25, "0.25–0.5"), (1.0, "0.8–1.25"), (3.99, "2–4"), (4.0, "over 4")],
)
def test_bands_of_load(relative, band):
    # Vega's conditionals, read as Python's by a loop over the bounds.
    figure = figures.load_map(
        "encoder/1", [{"y": 1, "load": [1.0], "run": "a"}], y_title="training step", order=[1]
    )
    expression = next(t["calculate"] for t in figure.spec["transform"] if t.get("as") == "band")
    *cases, otherwise = expression.split(" : ")
    for case in cases:
        condition, _, value = case.partition(" ? ")
        if relative < float(condition.removeprefix("datum.relative < ")):
            break
    else:
        value = otherwise
    assert value == f"'{band}'"
    colour = figure.spec["encoding"]["color"]
    assert len(colour["scale"]["domain"]) == len(figures.LOAD_BOUNDS) + 1


def test_a_load_map_has_time_along_x_and_runs_along_y():
    rows = [{"y": 1, "load": [0.5, 0.5], "run": "a"}]
    over_time = figures.load_map("l", rows, y_title="training step", order=[1]).spec["encoding"]
    by_run = figures.load_map("l", rows, y_title="trial", order=[1]).spec["encoding"]
    assert (over_time["x"]["field"], by_run["y"]["field"]) == ("y", "y")


def effect(**more):
    point = {"x": "1", "series": "s", "value": 2.0, "seed": 0, "run": "a"}
    mean = {"x": "1", "series": "s", "mean": 2.0, "low": 1.5, "high": 2.5, "n": 2, "run": "a"}
    cross = {"x": "2", "series": "s", "text": "✕", "trials": "seed 0 diverged: b"}
    arguments = {"points": [point], "means": [mean], "unfinished": [cross], "x_values": ["1", "2"]}
    return figures.effect("E", axis=AXIS, x_title="X", **(arguments | more))


def test_an_effect_has_seeds_means_intervals_and_what_is_not_done():
    figure = effect()
    kinds = [layer["mark"]["type"] for layer in layers(figure)]
    assert kinds == ["line", "rule", "tick", "circle", "text"]
    assert layers(figure)[0]["encoding"]["x"]["scale"]["domain"] == ["1", "2"]
    # Room for the interval, and for the marks along the upper edge.
    low, high = layers(figure)[3]["encoding"]["y"]["scale"]["domain"]
    assert low < 1.5 and high > 2.5
    assert "color" not in layers(figure)[3]["encoding"]
    coloured = effect(series=["s"], series_title="S")
    assert layers(coloured)[3]["encoding"]["xOffset"]["field"] == "series"


def test_many_numbers_are_drawn_to_scale():
    values = [float(2**i) for i in range(13)]
    assert figures.is_numeric_scale(values)
    assert not figures.is_numeric_scale(values[:5])
    assert not figures.is_numeric_scale([*values, "none"])
    x = layers(effect(x_values=values))[0]["encoding"]["x"]
    assert (x["type"], x["scale"]["type"], x["title"]) == ("quantitative", "log", "X, log scale")


def test_differences_lie_about_zero():
    point = {"setting": "2", "value": -0.5, "seed": 0, "run": "a", "base": "b"}
    mean = {"setting": "2", "mean": -0.5, "low": None, "high": None, "n": 1, "run": "a"}
    figure = figures.differences("D", [point], [mean], AXIS, y_title="X", order=["2"])
    assert layers(figure)[0]["encoding"]["x"] == {"datum": 0}
    assert figure.spec["datasets"]["zero"] == [{}]


def test_a_trade_joins_the_front():
    point = {"x": 1.0, "y": 2.0, "series": "s", "setting": "s", "seed": 0, "run": "a"}
    arguments = {"series_title": "S", "series": ["s"]}
    without = figures.trade("T", [point], [point | {"n": 1}], AXIS, AXIS, **arguments)
    joined = figures.trade("T", [point], [point | {"n": 1}], AXIS, AXIS, front=[point], **arguments)
    assert [layer["mark"]["type"] for layer in layers(without)] == ["circle", "point", "text"]
    assert layers(joined)[0]["mark"]["interpolate"] == "step-after"


def test_histogram():
    figure = figures.histogram("H", [{"low": 0.0, "high": 0.5, "count": 3}], x_title="p")
    assert figure.spec["mark"]["type"] == "bar"
