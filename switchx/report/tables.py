"""Tables, and how they are written for people, spreadsheets, Markdown and LaTeX."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

MISSING = "–"
_LATEX = {
    "\\": r"\textbackslash{}",
    **{letter: "\\" + letter for letter in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "−": "$-$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "→": r"$\to$",
    "…": r"\dots{}",
    "▁": r"\textvisiblespace{}",
}


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under named columns.

    Attributes:
      name: of its files, without a suffix.
      caption: what it shows, and where the numbers are from.
      columns: with units.
      rows: text, numbers, or None where there is nothing.
      state_column: index of the column that holds states of runs, if one does.
    """

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Any]]
    state_column: int | None = None

    def csv(self) -> str:
        """Numbers with all their digits; nothing where there is nothing."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return buffer.getvalue()

    def markdown(self) -> str:
        """A pipe table under its caption."""
        numeric = [self.is_numeric(index) for index in range(len(self.columns))]
        rule = ["---:" if right else "---" for right in numeric]
        lines = [map(_markdown, self.columns), rule]
        lines += [[_markdown(text(cell)) for cell in row] for row in self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{_markdown(self.caption)}\n\n{table}\n"

    def latex(self) -> str:
        """A tabular with the rules of the package booktabs, in a table with its caption."""
        columns = "".join("r" if self.is_numeric(i) else "l" for i in range(len(self.columns)))
        lines = [" & ".join(_latex(text(cell)) for cell in row) + r" \\" for row in self.rows]
        head = " & ".join(map(_latex, self.columns)) + r" \\"
        return "\n".join(
            [
                "% needs \\usepackage{booktabs}",
                r"\begin{table}",
                rf"\caption{{{_latex(self.caption)}}}",
                rf"\begin{{tabular}}{{{columns}}}",
                r"\toprule",
                head,
                r"\midrule",
                *lines,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )

    def is_numeric(self, index: int) -> bool:
        """Whether a column has numbers and nothing else."""
        cells = [row[index] for row in self.rows if row[index] is not None]
        return bool(cells) and all(_is_number(cell) for cell in cells)


def text(cell: Any) -> str:
    """A cell as people read it: numbers in four digits."""
    if cell is None:
        return MISSING
    if _is_number(cell):
        return number(cell)
    return str(cell)


def number(value: float) -> str:
    """A number in four digits, whole ones in full."""
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if abs(value) >= 10_000 or (value and abs(value) < 1e-3):
        return f"{value:.3e}"
    return f"{value:#.4g}".rstrip(".")


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit that suits a time, and how many seconds it has."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return unit, size
    return ("s", 1.0) if seconds >= 0.1 else ("ms", 1e-3)


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    unit, size = time_unit(seconds)
    return f"{seconds / size:.3g} {unit}"


def _is_number(cell: Any) -> bool:
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def _markdown(value: str) -> str:
    # A backslash first: it would escape what follows it.
    for letter in "\\|`*_<[":
        value = value.replace(letter, "\\" + letter)
    return " ".join(value.split())


def _latex(value: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(value.split()))
