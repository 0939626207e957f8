"""Tables of results: Markdown for people, JSON for programs."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks.harness import Result, Spread


@dataclass
class Table:
    """A part of the report.

    Attributes:
      title: its heading.
      columns: the header; the first column is aligned left, the others right.
      rows: text cells.
      notes: paragraphs below the table.
      results: what the cells were made from, for JSON.
    """

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    results: Sequence[Result] = ()

    def to_markdown(self) -> str:
        """A heading, the table, the notes."""
        lines = [self.columns, ["---"] + ["---:"] * (len(self.columns) - 1), *self.rows]
        table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
        return "\n\n".join([f"## {self.title}", table, *self.notes]) + "\n"

    def to_json(self) -> dict[str, Any]:
        """The table and every round behind it."""
        results = [dataclasses.asdict(result) for result in self.results]
        cells = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return {"title": self.title, "rows": cells, "notes": self.notes, "results": results}


class Aim(NamedTuple):
    """Throughput that jaxdl should reach, as a multiple of another's."""

    floor: float
    aim: float


def judge(ratio: Spread | None, aim: Aim) -> str:
    """How a ratio stands to floor and aim, in words.

    Example:
      >>> judge(Spread(1.5, 1.4, 1.6), Aim(1.2, 1.45)), judge(Spread(1.0, 0.9, 1.1), Aim(1.2, 1.45))
      ('aim reached (1.50)', 'below the floor (1.00)')
    """
    if ratio is None:
        return "not run"
    word = "below the floor" if ratio.median < aim.floor else "above the floor" if ratio.median < aim.aim else ""
    return f"{word or 'aim reached'} ({ratio.median:.2f})"


def not_run(name: str, failure: str, n_columns: int) -> list[str]:
    """The row of a competitor without figures."""
    return [f"{name}: **not run** ({failure})", *["-"] * (n_columns - 1)]


def time_cell(value: Spread) -> str:
    """Median and range in a unit that suits.

    Example:
      >>> time_cell(Spread(0.0021, 0.002, 0.0025))
      '2.10 ms (2.00 .. 2.50)'
    """
    unit, factor = ("s", 1.0) if value.median >= 1 else ("ms", 1e3) if value.median >= 1e-3 else ("µs", 1e6)
    median, low, high = (_digits(x * factor) for x in value)
    return f"{median} {unit} ({low} .. {high})"


def ratio_cell(value: Spread | None, digits: int = 2) -> str:
    """Median and range of a ratio; a dash where there is none.

    Example:
      >>> ratio_cell(Spread(1.5, 1.4, 1.6)), ratio_cell(None)
      ('1.50 (1.40 .. 1.60)', '-')
    """
    if value is None:
        return "-"
    return f"{value.median:.{digits}f} ({value.low:.{digits}f} .. {value.high:.{digits}f})"


def _digits(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"
