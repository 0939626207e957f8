"""Metric rows: how they are checked, written as text and read back.

A row is a dict of `"step"` (int) and named floats. Floats are written with `repr`, the shortest text that reads back to
the same float64. JSON has no NaN or infinity, so a JSON row holds the strings `"NaN"`, `"Infinity"` and `"-Infinity"`:
unlike `null` they lose nothing, and `read_history` turns them into floats again. CSV holds `nan`, `inf` and `-inf`.
"""

import csv
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdl.errors import JaxdlError

Row = dict[str, Any]

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class WriterError(JaxdlError):
    """A metric row, a metrics file or a missing extra package that a writer cannot work with."""


def read_history(path: str | os.PathLike[str]) -> list[Row]:
    """Reads the rows that `JsonlWriter` or `CsvWriter` wrote, in file order.

    Args:
      path: a `.csv` file, or any other name for JSON lines.

    Returns:
      One dict a row: `"step"` (int) and the metrics that the row holds (float, bit for bit as written). A last line
      torn by a kill is left out.

    Raises:
      WriterError: no such file, or a line other than the last that is not a row.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
      >>> _ = path.write_text('{"step": 1, "loss": 0.5}\\n{"step": 2, "lo')
      >>> read_history(path)
      [{'step': 1, 'loss': 0.5}]
    """
    path = Path(path)
    if not path.is_file():
        raise WriterError(f"no metrics file at {str(path)!r}; give the path of a metrics.jsonl or metrics.csv.")
    text = path.read_text(encoding="utf-8", errors="replace")
    return list(_read_csv(text, path) if path.suffix == ".csv" else _read_jsonl(text, path))


def series(history: Iterable[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """One metric of a history as a curve.

    Args:
      history: rows as `read_history` gives them; rows without the metric are passed over.
      name: the metric.

    Returns:
      `(steps, values)`: int64 `(N,)` and float64 `(N,)`, in the order of the rows.

    Example:
      >>> series([{"step": 1, "loss": 2.0}, {"step": 1, "eval/loss": 3.0}, {"step": 2, "loss": 1.0}], "loss")
      (array([1, 2]), array([2., 1.]))
    """
    points = [(row["step"], row[name]) for row in history if name in row]
    return np.array([step for step, _ in points], np.int64), np.array([value for _, value in points], np.float64)


def _read_jsonl(text: str, path: Path) -> Iterator[Row]:
    lines = text.split("\n")
    n_lines = len(lines) if lines[-1] else len(lines) - 1
    for number, line in enumerate(lines[:n_lines], start=1):
        try:
            yield _parse_row(line)
        except (ValueError, AttributeError, KeyError, TypeError):
            if number < n_lines:
                raise WriterError(f"{path}:{number} is not a metric row: {line[:80]!r}; delete the line.") from None


def _parse_row(line: str) -> Row:
    values = json.loads(line)
    row: Row = {"step": int(values.pop("step"))}
    for name, value in values.items():
        value = _NON_FINITE.get(value, value) if isinstance(value, str) else value
        row[name] = float(value) if isinstance(value, int) else value
    return row


def _read_csv(text: str, path: Path) -> Iterator[Row]:
    whole = text[: text.rfind("\n") + 1]  # a torn number can look whole; only the line's end proves it
    lines = list(csv.reader(whole.splitlines()))
    for number, cells in enumerate(lines[1:], start=2):
        try:
            named = dict(zip(lines[0], cells, strict=True))
            step = int(named.pop("step"))
            yield {"step": step, **{name: float(cell) for name, cell in named.items() if cell}}
        except (ValueError, KeyError):
            raise WriterError(f"{path}:{number} does not fit the header: {cells}; delete the line.") from None


def checked_row(step: int, scalars: Mapping[str, float]) -> Row:
    """The row of `scalars` at `step`, every value a Python float.

    Args:
      step: the optimizer step.
      scalars: name -> number, or an array of one number of any dtype.

    Raises:
      WriterError: every value that is not one number and every name that is empty, unprintable or "step".

    Example:
      >>> checked_row(3, {"loss": np.float32(0.5)})
      {'step': 3, 'loss': 0.5}
    """
    row: Row = {"step": int(step)}
    problems = []
    for name, value in scalars.items():
        if not isinstance(name, str) or not name or not name.isprintable() or name == "step":
            problems.append(f"{name!r} is not a metric's name; use printable text other than 'step'.")
        elif np.size(value) != 1 or np.asarray(value).dtype.kind not in "biufV":  # V: bfloat16
            problems.append(f"{name}={value!r} is not one number; log arrays as a figure of the report instead.")
        else:
            row[name] = float(np.asarray(value).reshape(()))
    if problems:
        raise WriterError.listing(f"metrics of step {step}", problems)
    return row


def json_line(row: Row) -> str:
    """A row as one line of JSON.

    Example:
      >>> json_line({"step": 3, "loss": math.nan})
      '{"step": 3, "loss": "NaN"}\\n'
    """
    return json.dumps({name: _json_value(value) for name, value in row.items()}, allow_nan=False) + "\n"


def _json_value(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
