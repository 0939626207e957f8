"""Where rows come from: anything with `len(source)` and `source[row] -> dict`.

A source that also has `take(rows) -> dict of arrays` lies in memory and is gathered in one go, some hundred times
faster than row by row. A Grain `MapDataset` of dicts, a TFDS `data_source` and a list of dicts are legal sources.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jaxdl.data.splits import _some
from jaxdl.errors import JaxdlError

Arrays = dict[str, np.ndarray]
Example = dict[str, Any]


class Source(Protocol):
    """What a pipeline reads: rows with ids 0 .. len - 1, each a dict of arrays, numbers or bytes."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Example: ...


class ArraySource:
    """Rows in memory: a dict of arrays with one leading axis.

    Args:
      arrays: name -> array (n, ...).
      check_finite: refuse NaN and infinity. Switch it off only to fill missing values (`fit_fill_missing`); a pipeline
        still refuses what is left of them.

    Raises:
      JaxdlError: no arrays, no rows, different lengths, NaN or infinity (names the key and the rows); all at once.

    Example:
      >>> source = ArraySource({"features": np.eye(3, dtype=np.float32), "label": np.arange(3)})
      >>> len(source), source.take(np.array([2, 0]))["label"].tolist()
      (3, [2, 0])
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], *, check_finite: bool = True) -> None:
        self.arrays: Arrays = {key: np.asarray(value) for key, value in arrays.items()}
        problems = _shape_problems(self.arrays)
        if check_finite and not problems:
            problems = _finite_problems(self.arrays)
        if problems:
            raise JaxdlError.listing("array source", problems)
        self._is_checked = check_finite

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, row: int) -> Example:
        return {key: value[row] for key, value in self.arrays.items()}

    def __repr__(self) -> str:
        parts = ", ".join(f"{key}: {value.dtype}{list(value.shape)}" for key, value in self.arrays.items())
        return f"ArraySource({parts})"

    def take(self, rows: np.ndarray) -> Arrays:
        """Gathers rows of every array in one go.

        Args:
          rows: int64 (k,), each in 0 .. len - 1.

        Returns:
          name -> array (k, ...), copies.

        Example:
          >>> ArraySource({"x": np.array([10, 20, 30])}).take(np.array([1, 1]))
          {'x': array([20, 20])}
        """
        return {key: value[rows] for key, value in self.arrays.items()}

    def map(self, fn: Callable[[Arrays], Arrays]) -> "ArraySource":
        """Applies a whole-array transform once, now, instead of to every batch.

        Args:
          fn: dict of arrays -> dict of arrays, such as the result of `fit_standardize`.

        Raises:
          JaxdlError: the result is no legal source (see the class).

        Example:
          >>> ArraySource({"x": np.array([1, 2])}).map(lambda a: {"x": a["x"] * 10}).arrays["x"].tolist()
          [10, 20]
        """
        return ArraySource(fn(dict(self.arrays)), check_finite=self._is_checked)

    def select(self, rows: np.ndarray) -> "ArraySource":
        """A new source with these rows, in this order.

        Args:
          rows: row ids (k,), or a bool mask (n,).

        Raises:
          JaxdlError: no row is selected.

        Example:
          >>> len(ArraySource({"x": np.arange(5)}).select(np.array([0, 4])))
          2
        """
        chosen = ArraySource(self.take(np.asarray(rows)), check_finite=False)
        chosen._is_checked = self._is_checked
        return chosen

    def check_finite(self) -> None:
        """Refuses NaN and infinity now; free where the source was already checked.

        Raises:
          JaxdlError: names the keys and the rows.

        Example:
          >>> ArraySource({"x": np.ones(2)}, check_finite=False).check_finite()
        """
        problems = [] if self._is_checked else _finite_problems(self.arrays)
        if problems:
            raise JaxdlError.listing("array source", problems)
        self._is_checked = True


def _shape_problems(arrays: Arrays) -> list[str]:
    if not arrays:
        return ["there are no arrays; give a dict such as {'image': ..., 'label': ...}."]
    scalars = [key for key, value in arrays.items() if value.ndim == 0]
    if scalars:
        return [f"{', '.join(scalars)} has no leading axis; every array holds one entry a row."]
    lengths = {key: len(value) for key, value in arrays.items()}
    if len(set(lengths.values())) > 1:
        return [f"the arrays differ in length: {lengths}; every array must have one entry a row."]
    return ["there are no rows; an empty split cannot be read."] if 0 in lengths.values() else []


def _finite_problems(arrays: Arrays) -> list[str]:
    problems = []
    for key, value in arrays.items():
        if not np.issubdtype(value.dtype, np.floating):
            continue
        wrong = np.flatnonzero(~np.isfinite(value).reshape(len(value), -1).all(axis=1))
        if len(wrong):
            problems.append(
                f"{key} holds NaN or infinity in row {_some(wrong.tolist())}; drop these rows with select, or read with"
                " check_finite=False and fill them (fit_fill_missing)."
            )
    return problems


class Subset:
    """Some rows of any source; for an `ArraySource`, use its `select`, which keeps the fast gather.

    Args:
      source: any source.
      rows: row ids (k,), at least one.

    Raises:
      JaxdlError: no rows.

    Example:
      >>> Subset([{"x": 1}, {"x": 2}, {"x": 3}], np.array([2, 0]))[0]
      {'x': 3}
    """

    def __init__(self, source: Source, rows: Sequence[int] | np.ndarray) -> None:
        if len(rows) == 0:
            raise JaxdlError("the subset has no rows; an empty split cannot be read.")
        self._source, self._rows = source, np.asarray(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Example:
        return self._source[int(self._rows[row])]


def read_rows(source: Source, rows: np.ndarray) -> Arrays:
    """Reads rows of any source as arrays: gathered at once where the source has `take`, else one by one.

    Args:
      source: any source.
      rows: int64 (k,).

    Returns:
      name -> array (k, ...).

    Raises:
      JaxdlError: the rows differ in their keys or shapes.

    Example:
      >>> read_rows([{"x": 1}, {"x": 2}], np.array([1, 0]))
      {'x': array([2, 1])}
    """
    take = getattr(source, "take", None)
    return take(rows) if take is not None else stack([source[int(row)] for row in rows])


def stack(examples: Sequence[Example]) -> Arrays:
    """Stacks examples to a batch; bytes and text become object arrays.

    Args:
      examples: dicts with the same keys, and the same shape under each key.

    Raises:
      JaxdlError: the keys or shapes differ.

    Example:
      >>> stack([{"x": np.zeros(2), "label": 1}, {"x": np.ones(2), "label": 0}])["x"].shape
      (2, 2)
    """
    keys = examples[0].keys()
    odd = next((i for i, example in enumerate(examples) if example.keys() != keys), None)
    if odd is not None:
        raise JaxdlError(
            f"examples differ in their keys: {sorted(keys)} and {sorted(examples[odd].keys())} (number {odd} of the"
            " batch); every row must have the same keys."
        )
    return {key: _stack_key(key, [example[key] for example in examples]) for key in keys}


def _stack_key(key: str, values: list[Any]) -> np.ndarray:
    if isinstance(values[0], (bytes, str)):
        return np.array(values, dtype=object)
    shapes = sorted({np.shape(value) for value in values})
    if len(shapes) > 1:
        raise JaxdlError(
            f"{key} has different shapes in one batch: {', '.join(map(str, shapes[:4]))}; crop, resize or pad them"
            " to one shape (for images: ImageFolder(size=...))."
        )
    return np.stack(values)
