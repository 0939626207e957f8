"""Transforms with no chance in them: standardising, filling missing values, one-hot.

Each is a function of a dict of arrays that looks at trailing axes only, so the same one serves a single example, a
batch (`rng` is then ignored) and a whole `ArraySource.map`. A `fit_*` function looks at the training split and
returns the transform for every split.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from jaxdl.data.sources import Source, read_rows
from jaxdl.data.splits import check_labels
from jaxdl.errors import JaxdlError


@dataclass(frozen=True)
class Standardize:
    """`(x - mean) / std` of one key, in float32; made by `fit_standardize`.

    Attributes:
      key: the key it changes.
      mean: float64, broadcast against the trailing axes.
      std: likewise; 1 where the training data is constant, so that a constant becomes 0.
    """

    key: str
    mean: np.ndarray
    std: np.ndarray
    is_batched: ClassVar[bool] = True

    def __call__(self, arrays: dict[str, Any], rng: np.random.Generator | None = None) -> dict[str, Any]:
        value = np.asarray(arrays[self.key])
        work = np.float32 if value.dtype == np.uint8 else np.float64
        scaled = (value.astype(work) - self.mean.astype(work)) / self.std.astype(work)
        return {**arrays, self.key: scaled.astype(np.float32)}

    def inverse(self, values: np.ndarray) -> np.ndarray:
        """Back to the original units, as for the predictions of a standardised target.

        Example:
          >>> Standardize("target", np.array(10.0), np.array(2.0)).inverse(np.array([0.5])).tolist()
          [11.0]
        """
        return np.asarray(values) * self.std + self.mean


def fit_standardize(train_source: Source, key: str = "image", axis: int | tuple[int, ...] | None = -1) -> Standardize:
    """Fits a mean and a standard deviation on the training split, and on nothing else.

    Args:
      train_source: the training split only; fitting on more would leak the test set.
      key: which array.
      axis: the trailing axes that keep their own statistics, counted from the end: -1 is per channel for images and
        per column for tables; (-3, -2, -1) is per pixel; None is one pair of numbers for all (a target).

    Returns:
      A transform for `ArraySource.map`, `Pipeline(transforms=...)` or a batch; has `mean`, `std` and `inverse`.

    Raises:
      JaxdlError: an axis that is not negative, an unknown key, or NaN (fill it first).

    Example:
      >>> from jaxdl.data.sources import ArraySource
      >>> train = ArraySource({"features": np.array([[1.0, 5.0], [3.0, 5.0]])})
      >>> train.map(fit_standardize(train, "features")).arrays["features"].tolist()
      [[-1.0, 0.0], [1.0, 0.0]]
    """
    kept = () if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    if any(place >= 0 for place in kept):
        raise JaxdlError(f"axis={axis} must be negative, counted from the end: axis 0 of a batch are its rows.")
    n, mean, square = 0.0, np.zeros(()), np.zeros(())
    for chunk in _chunks(train_source, key):
        over = tuple(i for i in range(chunk.ndim) if i - chunk.ndim not in kept)
        n_new = float(np.prod([chunk.shape[i] for i in over]))
        mean_new = chunk.mean(over, keepdims=True)[0]
        square_new = np.square(chunk - mean_new).sum(over, keepdims=True)[0]
        gap = mean_new - mean
        square = square + square_new + gap**2 * (n * n_new / (n + n_new))
        mean, n = mean + gap * (n_new / (n + n_new)), n + n_new
    if not np.isfinite(mean).all():
        raise JaxdlError(f"{key} holds NaN or infinity; fill missing values first (fit_fill_missing).")
    std = np.sqrt(square / n)
    shape = mean.shape[len(mean.shape) + min(kept, default=0) :]
    is_constant = std <= 1e-12 * np.abs(mean)
    return Standardize(key, mean.reshape(shape), np.where(is_constant, 1.0, std).reshape(shape))


def _chunks(source: Source, key: str, n_rows: int = 2048) -> Iterator[np.ndarray]:
    if key not in source[0]:
        raise JaxdlError(f"the source has no key {key!r}; it has {', '.join(sorted(source[0]))}.")
    for first in range(0, len(source), n_rows):
        rows = np.arange(first, min(first + n_rows, len(source)))
        yield read_rows(source, rows)[key].astype(np.float64)


@dataclass(frozen=True)
class FillMissing:
    """Puts a value in the place of NaN; made by `fit_fill_missing`.

    Attributes:
      key: the key it changes.
      value: float32 (F,), one a column.
      has_indicator: bool (F,): columns that get a 0/1 column "was missing" appended at the end.
    """

    key: str
    value: np.ndarray
    has_indicator: np.ndarray
    is_batched: ClassVar[bool] = True

    def __call__(self, arrays: dict[str, Any], rng: np.random.Generator | None = None) -> dict[str, Any]:
        given = np.asarray(arrays[self.key], np.float32)
        is_missing = np.isnan(given)
        filled = np.where(is_missing, self.value, given)
        flags = is_missing[..., self.has_indicator].astype(np.float32)
        return {**arrays, self.key: np.concatenate([filled, flags], axis=-1)}


def fit_fill_missing(
    train_source: Source,
    key: str = "features",
    *,
    strategy: str = "mean",
    value: float = 0.0,
    indicator: bool = False,
) -> FillMissing:
    """Learns from the training split what to put in the place of NaN, column by column.

    Args:
      train_source: the training split only, read with `check_finite=False`.
      key: an array (n, F).
      strategy: "mean", "median" or "constant".
      value: the constant.
      indicator: append a 0/1 column for each column that has a missing value in the training split. Off: the number
        of columns stays.

    Returns:
      A transform for `ArraySource.map` and for batches.

    Raises:
      JaxdlError: an unknown strategy, or a column that is missing in every training row (no mean exists).

    Example:
      >>> from jaxdl.data.sources import ArraySource
      >>> train = ArraySource({"features": np.array([[1.0], [np.nan], [3.0]])}, check_finite=False)
      >>> train.map(fit_fill_missing(train, indicator=True)).arrays["features"].tolist()
      [[1.0, 0.0], [2.0, 1.0], [3.0, 0.0]]
    """
    if strategy not in ("mean", "median", "constant"):
        raise JaxdlError(f"strategy={strategy!r} must be 'mean', 'median' or 'constant'.")
    given = np.concatenate(list(_chunks(train_source, key)))
    is_missing = np.isnan(given)
    empty = np.flatnonzero(is_missing.all(axis=0))
    if len(empty) and strategy != "constant":
        raise JaxdlError(
            f"{key} column {', '.join(map(str, empty))} is missing in every training row, so it has no {strategy};"
            " drop it, or use strategy='constant'."
        )
    if strategy == "constant":
        fill = np.full(given.shape[1:], value)
    else:
        fill = np.nanmean(given, axis=0) if strategy == "mean" else np.nanmedian(given, axis=0)
    return FillMissing(key, fill.astype(np.float32), is_missing.any(axis=0) & indicator)


@dataclass(frozen=True)
class OneHot:
    """Integer labels to float32 rows with a single 1; made by `one_hot`."""

    n_classes: int
    key: str
    is_batched: ClassVar[bool] = True

    def __call__(self, arrays: dict[str, Any], rng: np.random.Generator | None = None) -> dict[str, Any]:
        labels = np.asarray(arrays[self.key])
        check_labels(labels.reshape(-1), self.n_classes)
        return {**arrays, self.key: np.eye(self.n_classes, dtype=np.float32)[labels]}


def one_hot(n_classes: int, *, key: str = "label") -> OneHot:
    """Makes integer labels (...,) into float32 (..., n_classes) with a single 1.

    Args:
      n_classes: labels must lie in 0 .. n_classes - 1.
      key: which array.

    Raises:
      JaxdlError: when applied to labels out of range.

    Example:
      >>> one_hot(3)({"label": np.array([2, 0])})["label"].tolist()
      [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    return OneHot(n_classes, key)
