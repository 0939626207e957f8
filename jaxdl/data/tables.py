"""Tables from CSV and Parquet files: numeric and categorical columns, missing values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxdl.data.digits import every_fifth
from jaxdl.data.sources import ArraySource
from jaxdl.data.splits import _some
from jaxdl.errors import JaxdlError
from jaxdl.paths import nearest


@dataclass(frozen=True)
class Table:
    """What `read_table` read.

    Attributes:
      source: "features" float32 (n, F), NaN where a value is missing; "categories" int32 (n, K), -1 where missing (only
        with categorical columns); "target" float32 (n,), or "label" int32 (n,) for a target of text.
      numeric: the names of the F columns.
      categories: column -> its values, in the order of their codes, for the K categorical columns.
      classes: the values of a text target, in the order of their labels; empty for a numeric target.
    """

    source: ArraySource
    numeric: tuple[str, ...]
    categories: dict[str, tuple[str, ...]] = field(default_factory=dict)
    classes: tuple[str, ...] = ()

    def one_hot(self) -> "Table":
        """Turns the categorical columns into 0/1 columns `column=value` of "features"; a missing value is all zeros.

        Example:
          >>> source = ArraySource({"features": np.zeros((2, 1), np.float32), "categories": np.array([[1], [-1]])})
          >>> table = Table(source, ("x",), {"c": ("a", "b")}).one_hot()
          >>> table.numeric, table.source.arrays["features"].tolist()
          (('x', 'c=a', 'c=b'), [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
        """
        if not self.categories:
            return self
        arrays = dict(self.source.arrays)
        codes = arrays.pop("categories")
        hot = [codes[:, [i]] == np.arange(len(values)) for i, values in enumerate(self.categories.values())]
        arrays["features"] = np.concatenate([arrays["features"], *hot], axis=1).astype(np.float32)
        names = tuple(f"{column}={value}" for column, values in self.categories.items() for value in values)
        return Table(ArraySource(arrays, check_finite=False), self.numeric + names, {}, self.classes)


def read_table(
    path: str | Path,
    *,
    target: str,
    categorical: Sequence[str] = (),
    drop: Sequence[str] = (),
    categories: Mapping[str, Sequence[str]] | None = None,
    classes: Sequence[str] = (),
) -> Table:
    """Reads a CSV or Parquet file.

    Missing values (empty cells, "NA", "NaN", "null", ...) are kept as NaN or -1 for `fit_fill_missing` and
    `Table.one_hot`; nothing is filled or dropped here. Infinity is refused.

    Args:
      path: ends in `.csv` (comma separated, one header row), `.parquet` or `.pq`.
      target: the column to predict: numbers give "target", text gives "label".
      categorical: columns to read as categories; their values become codes in sorted order. All others are numeric.
      drop: columns to leave out.
      categories: the values of the categorical columns, from the training table (`Table.categories`), to read a second
        file with the same codes; an unknown value is then an error.
      classes: likewise the values of a text target (`Table.classes`).

    Returns:
      A `Table`; take `table.source`, `split_rows` and `ArraySource.select` from here.

    Raises:
      JaxdlError: no such file or column (with the nearest names), text in a numeric column, infinity, a missing target,
        an unknown value; all problems of the columns at once.

    Example:
      >>> table = read_table(Path(__file__).with_name("diabetes.csv"), target="progression", categorical=["sex"])
      >>> table.categories, table.source.arrays["features"].shape
      ({'sex': ('1', '2')}, (442, 9))
    """
    columns = _columns(Path(path))
    _check_names(path, columns, [target, *categorical, *drop])
    numeric = [name for name in columns if name not in {target, *categorical, *drop}]
    problems: list[str] = []
    features = [_numbers(name, columns[name], problems) for name in numeric]
    known = {name: list((categories or {}).get(name, ())) or _values(columns[name]) for name in categorical}
    codes = [_codes(name, columns[name], known[name], problems) for name in categorical]
    is_text = _is_text(columns[target])
    labels = (list(classes) or _values(columns[target])) if is_text else []
    y = _codes(target, columns[target], labels, problems) if is_text else _numbers(target, columns[target], problems)
    lacking = np.flatnonzero((y == -1) if is_text else np.isnan(y))
    if len(lacking) and not problems:
        problems.append(f"the target {target!r} is missing in row {_some(lacking.tolist())}; remove these rows.")
    if problems:
        raise JaxdlError.listing(f"table {path}", problems)
    arrays = {"features": np.stack(features, 1) if features else np.zeros((len(y), 0), np.float32)}
    arrays |= {"categories": np.stack(codes, 1)} if codes else {}
    arrays |= {"label": y} if is_text else {"target": y}
    named = {name: tuple(values) for name, values in known.items()}
    return Table(ArraySource(arrays, check_finite=False), tuple(numeric), named, tuple(labels))


def _columns(path: Path) -> dict[str, Any]:
    import pyarrow as pa
    from pyarrow import parquet

    if path.suffix not in (".csv", ".parquet", ".pq"):
        raise JaxdlError(f"{path} must end in .csv, .parquet or .pq; convert it.")
    try:
        table = _read_csv(path) if path.suffix == ".csv" else parquet.ParquetFile(path).read()
    except FileNotFoundError as error:
        raise JaxdlError(f"{path} does not exist; check the path.") from error
    except pa.ArrowInvalid as error:
        raise JaxdlError(f"{path} cannot be read as a table: {error}") from error
    if len(set(table.column_names)) < len(table.column_names):
        twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
        raise JaxdlError(f"{path} has several columns of the name {', '.join(twice)}; rename them.")
    if table.num_rows == 0:
        raise JaxdlError(f"{path} has no rows; an empty table cannot be read.")
    return {name: table.column(name).combine_chunks() for name in table.column_names}


def _read_csv(path: Path) -> Any:
    from pyarrow import csv

    return csv.read_csv(path, convert_options=csv.ConvertOptions(strings_can_be_null=True))


def _check_names(path: str | Path, columns: Mapping[str, Any], wanted: Sequence[str]) -> None:
    problems = [
        f"there is no column {name!r}; nearest: {', '.join(nearest(name, columns))}."
        for name in dict.fromkeys(wanted)
        if name not in columns
    ]
    problems += [f"column {name!r} is named twice; give it one role." for name in set(wanted) if wanted.count(name) > 1]
    if problems:
        raise JaxdlError.listing(f"table {path}", problems)


def _is_text(column: Any) -> bool:
    import pyarrow.types as types

    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    return types.is_string(kind) or types.is_large_string(kind)


def _numbers(name: str, column: Any, problems: list[str]) -> np.ndarray:
    """float32 (n,), NaN where missing."""
    import pyarrow.types as types

    is_number = types.is_integer(column.type) or types.is_floating(column.type) or types.is_boolean(column.type)
    if not is_number and not types.is_null(column.type):
        shown = ", ".join(repr(value) for value in _values(column)[:3])
        problems.append(f"column {name!r} is {column.type} ({shown}), not numbers; add it to categorical= or drop=.")
        return np.zeros(len(column), np.float32)
    wide = column.cast("float64").to_numpy(zero_copy_only=False)
    is_too_big = np.abs(wide) > np.finfo(np.float32).max
    if is_too_big.any():
        rows = _some(np.flatnonzero(is_too_big).tolist())
        problems.append(f"column {name!r} is infinite or exceeds float32 in row {rows}; rescale or remove these rows.")
    return np.where(is_too_big, 0, wide).astype(np.float32)


def _values(column: Any) -> list[str]:
    return [str(value) for value in sorted({value for value in column.to_pylist() if not _is_missing(value)})]


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or value != value


def _codes(name: str, column: Any, values: Sequence[str], problems: list[str]) -> np.ndarray:
    """int32 (n,), -1 where missing."""
    place = {value: code for code, value in enumerate(values)} | {"": -1}
    texts = ["" if _is_missing(value) else str(value) for value in column.to_pylist()]
    unknown = [row for row, text in enumerate(texts) if text not in place]
    if unknown:
        shown = ", ".join(repr(value) for value in sorted({texts[row] for row in unknown})[:3])
        problems.append(f"column {name!r} holds {shown} in row {_some(unknown)}, not one of {list(values)[:8]}.")
    return np.array([place.get(text, -1) for text in texts], np.int32)


def load_diabetes() -> tuple[ArraySource, ArraySource]:
    """442 patients: ten measurements (age, sex, body mass, blood pressure, six serum values) and the progression of
    their diabetes a year later, in raw units; a small regression from inside the package.

    The split is drawn by counting: every fifth row (the 5th, 10th, ...) is in the test set.

    Returns:
      `(train, test)` with 354 and 88 rows: "features" float32 (n, 10), "target" float32 (n,) in 25..346.

    Source: Efron, Hastie, Johnstone, Tibshirani 2004, "Least angle regression"; see `digits.NOTICE`.

    Example:
      >>> train, test = load_diabetes()
      >>> len(train), len(test), train.arrays["features"].shape[1]
      (354, 88, 10)
    """
    source = read_table(Path(__file__).with_name("diabetes.csv"), target="progression").source
    is_test = every_fifth(np.zeros(len(source), np.int64))
    return source.select(~is_test), source.select(is_test)
