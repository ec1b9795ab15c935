import pytest

from switchx.report.tables import Table, duration, number, text, time_unit

TABLE = Table(
    "runs",
    "Means of loss_a & b",
    ("run", "loss (nats)", "n"),
    [("a|b_1", 2.123456, 3), ("ü%, x", None, 12345)],
)


def test_csv_has_every_digit_and_nothing_for_nothing():
    assert TABLE.csv() == 'run,loss (nats),n\na|b_1,2.123456,3\n"ü%, x",,12345\n'


def test_markdown():
    lines = TABLE.markdown().splitlines()
    assert lines[0] == r"Means of loss\_a & b"
    assert lines[2:] == [
        "| run | loss (nats) | n |",
        "| --- | ---: | ---: |",
        r"| a\|b\_1 | 2.123 | 3 |",
        "| ü%, x | – | 12,345 |",
    ]


def test_latex():
    lines = TABLE.latex().splitlines()
    assert r"\caption{Means of loss\_a \& b}" in lines
    assert r"\begin{tabular}{lrr}" in lines
    assert r"a|b\_1 & 2.123 & 3 \\" in lines
    assert r"ü\%, x & -- & 12,345 \\" in lines


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0.000"),
        (1.25, "1.250"),
        (1234.0, "1234"),
        (12345.6, "1.235e+04"),
        (0.000123456, "1.235e-04"),
        (-0.05, "-0.05000"),
        (7, "7"),
        (70000, "70,000"),
    ],
)
def test_numbers_have_four_digits(value, expected):
    assert number(value) == expected


def test_cells():
    assert [text(cell) for cell in (None, "x", 2.0, True)] == ["–", "x", "2.000", "True"]


def test_durations():
    assert [duration(s) for s in (0.0312, 12.0, 119.0, 150.0, 9000.0)] == [
        "31.2 ms",
        "12 s",
        "119 s",
        "2.5 min",
        "2.5 h",
    ]
    assert time_unit(7200) == ("h", 3600.0)
