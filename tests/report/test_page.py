import html
import json
import re

from switchx.report import page
from switchx.report.figures import Axis, curves
from switchx.report.page import Chapter, Examples, Figures, Folded, Listing, Section, Text
from switchx.report.tables import Table

EVIL = "</script><script>alert('x')</script>"


def chapter():
    rows = [{"step": 1, "value": 2.0, "series": EVIL, "line": "train", "run": EVIL, "end": None}]
    figure = curves(EVIL, rows, Axis("loss"), ordered=None, caption="seen")
    inner = Table("inner", "Inner.", ("x", "state"), [(1.5, "done"), (None, EVIL)], state_column=1)
    blocks = [
        Text("plain"),
        Text("is missing", notice=True),
        Figures([figure]),
        Table("outer", "Outer.", (EVIL,), [(EVIL,)]),
        Listing(f"python {EVIL}"),
        Examples([[("inputs", EVIL)]]),
        Folded("more", [inner]),
    ]
    problems = [f"problem {number}" for number in range(14)]
    return Chapter(
        EVIL, [f"Best: {EVIL}"], {"done": 2}, problems, [Section("All & sundry", blocks)]
    )


def test_nothing_that_is_read_becomes_markup(monkeypatch):
    monkeypatch.setattr(page, "library", lambda: "")
    text = page.render(EVIL, [chapter()], command=f"python x {EVIL}")
    assert EVIL not in text
    assert text.count("<script") == 3  # a chart's data, the library, the page's own
    assert html.escape(EVIL, quote=True).replace("&#x27;", "&#39;") in text


def test_every_kind_of_block_is_on_the_page(monkeypatch):
    monkeypatch.setattr(page, "library", lambda: "")
    text = page.render("title", [chapter()], command="python x")
    for part in (
        "plain",
        '<p class="notice">is missing',
        "<h4>",
        "seen",
        "<pre>",
        "<dl",
        "<summary>more",
    ):
        assert part in text, part
    assert '<span class="state done">done</span>' in text
    assert '<td class="number">1.500</td>' in text
    assert "problem 13" in text and "2 more" in text
    (spec,) = re.findall(r'<script type="application/json">(.*?)</script>', text)
    assert json.loads(spec)["datasets"]["rows"][0]["run"] == EVIL


def test_the_page_reaches_for_nothing(monkeypatch):
    monkeypatch.setattr(page, "library", lambda: "")
    text = page.render("title", [chapter()], command="python x")
    assert not re.search(r"""(src|href)=["'](?!#)""", text)
    assert "default-src 'none'" in text
    assert "@import" not in text and "url(" not in text


def test_the_library_is_whole_and_cannot_end_its_script():
    script = page.library()
    assert len(script) > 500_000 and "</script" not in script.lower()
    assert "window.vegaEmbed" in script


def test_tables_are_found_in_what_is_folded():
    assert [table.name for table in chapter().tables()] == ["outer", "inner"]


def test_anchors():
    assert page.anchor("All & sundry (s)") == "all-sundry-s"
    assert page.anchor("–") == "part"
