"""Numbers and parameters as text that a person reads."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_COLUMNS = ("path", "shape", "dtype", "parameters", "trainable", "decay", "lr_scale")
_RIGHT = {"parameters", "lr_scale", "decay"}


def format_count(count: float) -> str:
    """A count with a letter for thousands, millions and so on, three digits at the least.

    Example:
      >>> [format_count(n) for n in (0, 999, 1_000, 25_450, 1_234_567, 86_000_000, 7.2e9)]
      ['0', '999', '1.00K', '25.4K', '1.23M', '86.0M', '7.20B']
    """
    return _scaled(count, 1000, ["", "K", "M", "B", "T"])


def format_bytes(n_bytes: float) -> str:
    """A size in binary units.

    Example:
      >>> [format_bytes(n) for n in (512, 2048, 5 * 2**20, 1.5 * 2**30)]
      ['512 B', '2.00 KiB', '5.00 MiB', '1.50 GiB']
    """
    return _scaled(n_bytes, 1024, [" B", " KiB", " MiB", " GiB", " TiB"])


def _scaled(number: float, base: int, units: Sequence[str]) -> str:
    power = 0
    while abs(number) >= base * (1 - 5e-4) and power < len(units) - 1:  # 999.6K would round to 1000K
        number, power = number / base, power + 1
    digits = 0 if power == 0 else max(0, 3 - len(f"{int(abs(number))}"))
    return f"{number:.{digits}f}{units[power]}"


def format_duration(seconds: float) -> str:
    """A time in the two largest units that matter.

    Example:
      >>> [format_duration(s) for s in (0.0421, 3.14, 75, 3_725, 200_000)]
      ['42 ms', '3.1 s', '1m 15s', '1h 02m', '2d 07h']
    """
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, below, small in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // below:02d}{small}"
    raise AssertionError(f"unreachable: {seconds}")


def format_number(value: Any) -> str:
    """A metric's value: four significant digits, integers whole.

    Example:
      >>> [format_number(v) for v in (0.123456, 3.0, 1e-5, float("nan"), True, None, 1234.5, 12345678)]
      ['0.1235', '3', '1e-05', 'nan', 'yes', '', '1234', '12,345,678']
    """
    if value is None:
        return ""
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    return f"{float(value):.4g}" if isinstance(value, (float, np.floating)) else str(value)


def parameter_table(rows: Sequence[Mapping[str, Any]], *, max_rows: int | None = 40) -> str:
    """The verdict on every parameter as aligned text, with totals.

    A table longer than `max_rows` is shortened in two steps: rows that differ only in the numbers of their path
    (`layer_0`, `layer_1`) and agree in all else become one row `layer_*` with their count; if that is not enough, rows
    are left out in the middle. The totals are always those of all rows.

    Args:
      rows: one dict a leaf with any of `path`, `shape` (tuple), `dtype`, `parameters` (int; the product of the shape if
        absent), `trainable` (bool), `decay`, `lr_scale`, and further columns (`sharding`, `source`), shown as given.
        Columns that no row has are not shown.
      max_rows: how many rows to show at the most; `None` shows all.

    Returns:
      Lines without a trailing newline or trailing blanks.

    Example:
      >>> print(parameter_table([
      ...     {"path": "body/kernel", "shape": (64, 32), "dtype": "float32", "trainable": False},
      ...     {"path": "head/kernel", "shape": (32, 10), "dtype": "float32", "trainable": True},
      ... ]))
      path         shape     dtype    parameters  trainable
      -----------------------------------------------------
      body/kernel  (64, 32)  float32       2,048  no
      head/kernel  (32, 10)  float32         320  yes
      -----------------------------------------------------
      2 arrays, 2,368 parameters (2.37K), 320 trainable (13.5%), 9.25 KiB
    """
    rows = [{**row, "parameters": n_parameters(row)} for row in rows]
    columns = parameter_columns(rows)
    shown = rows if max_rows is None or len(rows) <= max_rows else _shorten(rows, max_rows)
    cells = [[_cell(row.get(column)) for column in columns] for row in shown]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [_line(columns, columns, widths), *(_line(line, columns, widths) for line in cells)]
    rule = "-" * max(len(lines[0]), *map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:], rule, parameter_totals(rows)])


def n_parameters(row: Mapping[str, Any]) -> int:
    """The number of parameters of one row of a table: what it says, or the product of its shape.

    Example:
      >>> n_parameters({"path": "dense/kernel", "shape": (64, 10)})
      640
    """
    return int(row["parameters"] if "parameters" in row else np.prod(row.get("shape", ()), dtype=np.int64))


def parameter_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns that some row has: the usual ones in their usual order, then the others as they appear.

    Example:
      >>> parameter_columns([{"source": "fresh", "shape": (2,), "path": "bias"}])
      ['path', 'shape', 'source']
    """
    present = dict.fromkeys(name for row in rows for name in row)
    return [name for name in _COLUMNS if name in present] + [name for name in present if name not in _COLUMNS]


def parameter_totals(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line: arrays, parameters, the trainable share and the size in memory, as far as the rows say.

    Example:
      >>> parameter_totals([{"shape": (10, 100), "dtype": "bfloat16"}])
      '1 array, 1,000 parameters (1.00K), 1.95 KiB'
    """
    total = sum(map(n_parameters, rows))
    parts = [f"{len(rows)} array{'' if len(rows) == 1 else 's'}", f"{total:,} parameters"]
    if total >= 1000:
        parts[-1] += f" ({format_count(total)})"
    if any("trainable" in row for row in rows):
        moving = sum(n_parameters(row) for row in rows if row.get("trainable"))
        parts.append(f"{moving:,} trainable ({100 * moving / max(total, 1):.1f}%)")
    if rows and all("dtype" in row for row in rows):
        parts.append(format_bytes(sum(n_parameters(row) * _itemsize(row["dtype"]) for row in rows)))
    return ", ".join(parts)


def _itemsize(dtype: Any) -> int:
    import jax.numpy as jnp

    try:
        return jnp.dtype(dtype).itemsize
    except TypeError:
        return 0


def _cell(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(str, value)) + ("," if len(value) == 1 else "") + ")"
    return format_number(value)


def _line(cells: Sequence[str], columns: Sequence[str], widths: Sequence[int]) -> str:
    aligned = [
        cell.rjust(width) if column in _RIGHT else cell.ljust(width)
        for cell, column, width in zip(cells, columns, widths, strict=True)
    ]
    return "  ".join(aligned).rstrip()


def _shorten(rows: Sequence[Mapping[str, Any]], max_rows: int) -> list[Mapping[str, Any]]:
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        rest = tuple(str(value) for name, value in row.items() if name != "path")
        groups.setdefault((_without_numbers(row.get("path", "")), rest), []).append(row)
    merged: list[Mapping[str, Any]] = [_merge(pattern, group) for (pattern, _), group in groups.items()]
    if len(merged) <= max_rows:
        return merged
    n_first = max(1, (max_rows - 1) * 2 // 3)
    n_last = max(0, max_rows - 1 - n_first)
    left_out = merged[n_first : len(merged) - n_last]
    gap = {"path": f"... {len(left_out)} more rows", "parameters": sum(map(n_parameters, left_out))}
    return [*merged[:n_first], gap, *merged[len(merged) - n_last :]]


def _without_numbers(path: str) -> str:
    """`encoder/layer_11/kernel` -> `encoder/layer_*/kernel`; a name without a number stays."""
    bare = [(segment, segment.rstrip("0123456789")) for segment in path.split("/")]
    return "/".join(segment if segment == stem else stem + "*" for segment, stem in bare)


def _merge(pattern: str, group: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    if len(group) == 1:
        return group[0]
    return {**group[0], "path": f"{pattern} x{len(group)}", "parameters": sum(map(n_parameters, group))}
