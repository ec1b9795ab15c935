"""The page: one HTML file that holds all it needs and may not reach for anything else."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import altair
import jinja2
import vl_convert

from switchx.report.figures import Figure
from switchx.report.tables import Table, text

FOLDER = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph. A notice is about something missing, and stands where it would be."""

    text: str
    notice: bool = False


@dataclasses.dataclass(frozen=True)
class Figures:
    """Charts side by side where there is room."""

    figures: Sequence[Figure]


@dataclasses.dataclass(frozen=True)
class Listing:
    """Text as it is, such as a command."""

    text: str


@dataclasses.dataclass(frozen=True)
class Examples:
    """Decoded examples: ("inputs", text), … of each."""

    examples: Sequence[Sequence[tuple[str, str]]]


@dataclasses.dataclass(frozen=True)
class Folded:
    """What is read only on demand, under a title."""

    title: str
    blocks: Sequence["Block"]


Block = Text | Figures | Table | Listing | Examples | Folded


@dataclasses.dataclass(frozen=True)
class Section:
    """A title and what follows."""

    title: str
    blocks: Sequence[Block]


@dataclasses.dataclass(frozen=True)
class Chapter:
    """What is reported of one sweep, or of the runs.

    Attributes:
      title: what it is about.
      summary: sentences that say what was run, what is best and what went wrong.
      counts: state → how many runs.
      problems: what is missing or broken in the directories.
      sections: the rest.
    """

    title: str
    summary: Sequence[str]
    counts: dict[str, int]
    problems: Sequence[str]
    sections: Sequence[Section]

    def tables(self) -> Iterator[Table]:
        """All tables, in order."""
        for section in self.sections:
            yield from _tables(section.blocks)


def render(title: str, chapters: Sequence[Chapter], *, command: str) -> str:
    """The HTML of a report.

    Args:
      title: of the page.
      chapters: of the page.
      command: that makes it, for the foot.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"cell": text, "anchor": anchor}
    environment.tests |= {
        kind.__name__.lower(): functools.partial(_is, kind)
        for kind in (Text, Figures, Table, Listing, Examples, Folded)
    }
    return environment.get_template("page.html.jinja").render(
        title=title,
        chapters=chapters,
        command=command,
        style=(FOLDER / "page.css").read_text(encoding="utf-8"),
        script=(FOLDER / "page.js").read_text(encoding="utf-8"),
        library=library(),
    )


@functools.cache
def library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    version = ".".join(altair.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", version)
    return re.sub("</(?=script)", r"<\\/", script, flags=re.IGNORECASE)


def anchor(title: str) -> str:
    """A title as the name of a place on the page, or of a file."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:80] or "part"


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, kind)


def _tables(blocks: Sequence[Block]) -> Iterator[Table]:
    for block in blocks:
        if isinstance(block, Table):
            yield block
        elif isinstance(block, Folded):
            yield from _tables(block.blocks)
