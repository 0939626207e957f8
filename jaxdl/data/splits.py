"""Parting rows into a training and a held-out set, and checking labels."""

import numpy as np

from jaxdl.data.order import _SPLIT, permutation
from jaxdl.errors import JaxdlError


def split_rows(
    labels_or_n: int | np.ndarray, fraction: float = 0.2, seed: int = 0, stratify: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the rows that are held out.

    Stratified: every class gives `fraction` of its rows, rounded so that the total is `round(n * fraction)` (largest
    remainders). Without labels, or with `stratify=False`: a uniform draw of `round(n * fraction)` rows.

    Args:
      labels_or_n: integer labels (n,), or just n.
      fraction: the share that is held out, 0 < fraction < 1.
      seed: 0 <= seed < 2**64.
      stratify: keep the shares of the classes; needs labels.

    Returns:
      `(train_rows, held_out_rows)`: int64, sorted, disjoint, together every row.

    Raises:
      JaxdlError: a fraction out of range, no rows, or a side that would be empty.

    Example:
      >>> train, test = split_rows(np.array([0, 0, 0, 0, 1, 1, 1, 1]), fraction=0.25)
      >>> len(train), len(test), sorted((test // 4).tolist())
      (6, 2, [0, 1])
    """
    labels = np.zeros(labels_or_n, np.int64) if isinstance(labels_or_n, (int, np.integer)) else np.asarray(labels_or_n)
    n_rows = len(labels)
    n_held_out = round(n_rows * fraction)
    if not 0 < fraction < 1:
        raise JaxdlError(f"fraction={fraction} must be greater than 0 and less than 1: the share of held-out rows.")
    if not 0 < n_held_out < n_rows:
        raise JaxdlError(
            f"fraction={fraction} of {n_rows} rows leaves {n_rows - n_held_out} for training and {n_held_out} held out;"
            " neither side may be empty: take another fraction or more rows."
        )
    shuffled = permutation(n_rows, seed, 0, purpose=_SPLIT)
    held_out = shuffled[:n_held_out] if not stratify else _stratified(labels, shuffled, fraction, n_held_out)
    is_held_out = np.zeros(n_rows, bool)
    is_held_out[held_out] = True
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def _stratified(labels: np.ndarray, shuffled: np.ndarray, fraction: float, n_held_out: int) -> np.ndarray:
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    quota = np.floor(counts * fraction).astype(np.int64)
    by_remainder = np.argsort(quota - counts * fraction, kind="stable")
    quota[by_remainder[: n_held_out - quota.sum()]] += 1
    grouped = shuffled[np.argsort(classes[shuffled], kind="stable")]
    starts = np.cumsum(counts) - counts
    return np.concatenate([grouped[start : start + q] for start, q in zip(starts, quota, strict=True)])


def check_labels(labels: np.ndarray, n_classes: int) -> None:
    """Refuses labels that name no class; a loss would clip or wrap them without a word.

    Args:
      labels: integers (n,).
      n_classes: labels must lie in 0 .. n_classes - 1.

    Raises:
      JaxdlError: labels that are not integers, or out of range; names the values, the rows and the range.

    Example:
      >>> check_labels(np.array([0, 2, 1]), 3)
    """
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise JaxdlError(f"labels have dtype {labels.dtype}; class labels are integers: cast them, or one-hot decode.")
    wrong = np.flatnonzero((labels < 0) | (labels >= n_classes))
    if len(wrong):
        values = sorted({int(value) for value in labels[wrong]})
        remedy = f"set n_classes to at least {values[-1] + 1}" if values[0] >= 0 else "drop these rows"
        raise JaxdlError(
            f"label {_some(values)} at row {_some(wrong.tolist())} is not in 0..{n_classes - 1};"
            f" correct the labels, or {remedy}."
        )


def _some(values: list[int], n: int = 5) -> str:
    return ", ".join(map(str, values[:n])) + (f" and {len(values) - n} more" if len(values) > n else "")
