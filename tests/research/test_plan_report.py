import dataclasses
import html.parser

from switchx.research import plan_report
from switchx.research.topologies import parse
from switchx.sharding import Dropped
from tests.research.test_planning import PLANNER

PLANS = [
    PLANNER.analytic(parse("v5e:2x4"), shape)
    for shape in ({"data": 8}, {"expert": 4, "data": 2}, {"fsdp": 8})
]


def test_a_screen_of_text():
    text = plan_report.text(PLANS, ["MESH = {'data': 3} does not fill"])
    lines = text.splitlines()
    assert lines[0] == "plan         8 x TPU v5 lite (v5e:2x4), analytic"
    assert f"{PLANS[0].parameters:,}" in text and "GiB free" in text
    for kind in (*PLANS[0].memory._fields, *(part.name for part in PLANS[0].parts)):
        assert kind in text
    assert "all-reduce" in text and "over data of 8: gradients" in text
    # All meshes have a line in the ranking.
    assert [line.split("  ")[0] for line in lines[-4:-1]] == [
        "8 data",
        "2 data x 4 expert",
        "8 fsdp",
    ]
    assert lines[-1] == "impossible: MESH = {'data': 3} does not fill"
    assert all(line == line.rstrip() for line in lines)


def test_what_is_missing_is_loud():
    short = dataclasses.replace(PLANS[0], peak=3 * 2**30, available=2**30, largest_batch=0)
    text = plan_report.text([short])
    assert "2.00 GiB MISSING" in text and "not one row on every device fits" in text


def test_dropped_rules_are_shown_once_for_all_their_parameters():
    rule = "embed = 20 does not divide by fsdp = 8"
    names = [Dropped(name, "embed", 20, ("fsdp",), 8) for name in "abcde"]
    other = Dropped("f", "expert_embed", 9, ("fsdp", "expert"), 4)
    plan = dataclasses.replace(PLANS[0], dropped=[*names, other])
    shown = f"not split    {rule}, in a, b, c and 2 more\n             {other.rule}, in f"
    assert other.rule == "expert_embed = 9 does not divide by fsdp x expert = 4"
    assert shown in plan_report.text([plan])
    assert f"not split by 8 data: {rule}, in a" in plan_report.text([PLANS[1], plan])


def test_a_page():
    class Checker(html.parser.HTMLParser):
        open = []

        def handle_starttag(self, tag, attrs):
            if tag != "meta":
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    page = plan_report.html(PLANS, ["<b>"])
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    assert page.count("<h2>") == 4 and "&lt;b&gt;" in page


def test_numbers_as_people_read_them():
    assert plan_report.gib(3.5 * 2**30) == "3.50 GiB" and plan_report.gib(2**20) == "1.0 MiB"
    assert plan_report.seconds(1.234) == "1.23 s" and plan_report.seconds(0.0123) == "12.3 ms"
    assert plan_report.mesh({"data": 1, "model": 2}) == "2 model"
    assert plan_report.mesh({"data": 1}) == "one device"


def test_predicted_beside_measured():
    row = dict(
        name="tiny",
        predicted_seconds=0.5,
        measured_seconds=0.25,
        predicted_peak=2**30,
        compiled_peak=2**31,
    )
    last = plan_report.calibration([row]).splitlines()[-1].split("  ")
    assert [cell.strip() for cell in last if cell.strip()] == [
        *("tiny", "0.5 s", "0.25 s", "2.00", "1.00 GiB", "2.00 GiB")
    ]
