"""Metrics as sums and counts: exact under padding, microbatches and any number of devices.

A metric is a value made of sums. `add` puts two of them together, `finish` divides once at the end.

Dimensions: B rows (any number of leading axes), C classes, N bins, T targets.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdl.errors import JaxdlError

Array = jax.Array


class Mean(NamedTuple):
    """A weighted mean: `total / weight`.

    Attributes:
      total: float scalar, the sum of value times weight.
      weight: float scalar, the sum of the weights.
    """

    total: Array
    weight: Array

    def finish(self) -> float:
        return _divide(self.total, self.weight)


class Perplexity(NamedTuple):
    """`exp(total / weight)` of a summed negative log-likelihood in nats."""

    total: Array
    weight: Array

    def finish(self) -> float:
        return float(np.exp(_divide(self.total, self.weight)))


class Confusion(NamedTuple):
    """Weighted counts by class: rows are the true classes, columns the predicted ones.

    Attributes:
      matrix: (C, C) float32.
    """

    matrix: Array

    def finish(self) -> dict[str, Any]:
        """Accuracy, the matrix, and per class precision, recall and F1 with their unweighted (macro) means.

        A class that was never predicted has precision 0, one that never occurs recall 0; classes that neither occur
        nor are predicted are left out of the macro means.
        """
        matrix = np.asarray(self.matrix, np.float64)
        hit, true, predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)
        precision, recall = _ratio(hit, predicted), _ratio(hit, true)
        f1 = _ratio(2 * hit, true + predicted)
        seen = (true + predicted) > 0
        macro = {"precision": precision, "recall": recall, "f1": f1}
        return {
            "matrix": matrix,
            "accuracy": _divide(hit.sum(), matrix.sum()),
            **{name: float(values[seen].mean()) if seen.any() else float("nan") for name, values in macro.items()},
            **{f"{name}_by_class": values for name, values in macro.items()},
        }


class BinaryCounts(NamedTuple):
    """Weighted counts of binary decisions, for binary and multi-label tasks.

    Attributes:
      true_positive, false_positive, false_negative, true_negative: float32, scalar or (C,).
    """

    true_positive: Array
    false_positive: Array
    false_negative: Array
    true_negative: Array

    def finish(self) -> dict[str, float]:
        """Precision, recall, F1 and accuracy over all decisions (micro average)."""
        hit, false, missed, right = (float(np.asarray(count, np.float64).sum()) for count in self)
        return {
            "precision": _divide(hit, hit + false),
            "recall": _divide(hit, hit + missed),
            "f1": _divide(2 * hit, 2 * hit + false + missed),
            "accuracy": _divide(hit + right, hit + right + false + missed),
        }


class R2(NamedTuple):
    """The coefficient of determination, `1 - residual / variance`, averaged over targets.

    The sums are kept about a fixed shift of zero in float32: standardise targets whose mean is far from zero.

    Attributes:
      weight: scalar; target, target_squared, residual_squared: (T,) sums.
    """

    weight: Array
    target: Array
    target_squared: Array
    residual_squared: Array

    def finish(self) -> float:
        weight, target, squared, residual = (np.asarray(value, np.float64) for value in self)
        spread = squared - target**2 / np.maximum(weight, 1e-300)
        return float(np.mean(1.0 - residual / np.where(spread > 0, spread, np.nan)))


class Calibration(NamedTuple):
    """Confidence against correctness in equal-width bins of confidence.

    Attributes:
      weight, confidence, correct: (N,) sums of weight, weight x confidence, weight x is-correct.
      squared_error: scalar sum of the squared distance of the probabilities from the one-hot label.
    """

    weight: Array
    confidence: Array
    correct: Array
    squared_error: Array

    def finish(self) -> dict[str, Any]:
        """Expected calibration error (Guo et al. 2017, eq. 3), the Brier score (sum over classes) and the bins."""
        weight, confidence, correct, squared = (np.asarray(value, np.float64) for value in self)
        return {
            "ece": _divide(np.abs(confidence - correct).sum(), weight.sum()),
            "brier": _divide(squared, weight.sum()),
            "bin_weight": weight,
            "bin_confidence": _ratio(confidence, weight),
            "bin_accuracy": _ratio(correct, weight),
        }


Metric = Mean | Perplexity | Confusion | BinaryCounts | R2 | Calibration
METRICS = (Mean, Perplexity, Confusion, BinaryCounts, R2, Calibration)


def mean(values: Array, weight: Array | None = None) -> Mean:
    """The weighted sum of per-row values.

    Args:
      values: (B...) numbers.
      weight: broadcastable to values from the left, e.g. (B,) for values (B, T); None counts every value once.

    Example:
      >>> mean(jnp.array([1.0, 3.0, 100.0]), jnp.array([1.0, 1.0, 0.0])).finish()
      2.0
    """
    values = values.astype(jnp.float32)
    weight = spread_weight(weight, values.shape)
    return Mean(total_where(values, weight), jnp.sum(weight))


def spread_weight(weight: Array | None, shape: tuple[int, ...]) -> Array:
    """Broadcasts a weight from the left: (B,) to (B, T) by repeating it along T.

    Raises:
      JaxdlError: the weight's shape is not a prefix of `shape`.
    """
    if weight is None:
        return jnp.ones(shape, jnp.float32)
    if weight.shape != shape[: weight.ndim]:
        raise JaxdlError(f"weight has shape {weight.shape}; it must be the first axes of the values' shape {shape}.")
    expanded = weight.reshape(weight.shape + (1,) * (len(shape) - weight.ndim))
    return jnp.broadcast_to(expanded, shape).astype(jnp.float32)


def total_where(values: Array, weight: Array) -> Array:
    """Sums value times weight, where a row of weight 0 adds an exact 0 even if its value is not finite."""
    return jnp.sum(jnp.where(weight == 0, 0.0, values) * weight)


def accuracy(logits_BC: Array, labels_B: Array, weight: Array | None = None) -> Mean:
    """The share of rows whose largest logit is at the label.

    Args:
      logits_BC: (B..., C) float.
      labels_B: (B...) int classes, or (B..., C) float soft labels, of which the largest counts.
      weight: (B...) float or None.

    Example:
      >>> accuracy(jnp.eye(2), jnp.array([0, 0])).finish()
      0.5
    """
    return mean(jnp.argmax(logits_BC, -1) == hard_labels(logits_BC, labels_B), weight)


def hard_labels(logits_BC: Array, labels_B: Array) -> Array:
    """Integer classes of integer or soft labels."""
    return jnp.argmax(labels_B, -1) if labels_B.ndim == logits_BC.ndim else labels_B


def top_k_accuracy(logits_BC: Array, labels_B: Array, k: int, weight: Array | None = None) -> Mean:
    """The share of rows whose label is among the k largest logits.

    Raises:
      JaxdlError: k is not in 1..C.

    Example:
      >>> top_k_accuracy(jnp.array([[3.0, 2.0, 1.0]]), jnp.array([1]), k=2).finish()
      1.0
    """
    n_classes = logits_BC.shape[-1]
    if not 1 <= k <= n_classes:
        raise JaxdlError(f"k={k} must lie in 1..{n_classes}, the number of classes.")
    _, best_BK = jax.lax.top_k(logits_BC, k)
    return mean(jnp.any(best_BK == hard_labels(logits_BC, labels_B)[..., None], -1), weight)


def confusion(logits_BC: Array, labels_B: Array, weight: Array | None = None) -> Confusion:
    """Counts every (true class, predicted class) pair; precision, recall and F1 come from it.

    Example:
      >>> confusion(jnp.eye(2), jnp.array([0, 0])).finish()["recall_by_class"].tolist()
      [0.5, 0.0]
    """
    n_classes = logits_BC.shape[-1]
    labels_B = hard_labels(logits_BC, labels_B)
    weight_B = spread_weight(weight, labels_B.shape)
    cell = labels_B * n_classes + jnp.argmax(logits_BC, -1)
    matrix = jnp.zeros(n_classes * n_classes, jnp.float32).at[cell.reshape(-1)].add(weight_B.reshape(-1))
    return Confusion(matrix.reshape(n_classes, n_classes))


def binary_counts(
    logits_B: Array, labels_B: Array, weight: Array | None = None, threshold: float = 0.5
) -> BinaryCounts:
    """Counts true and false positives and negatives of sigmoid decisions, for binary and multi-label tasks.

    Args:
      logits_B: (B...) or (B..., C) float.
      labels_B: the same shape, 0 or 1.
      weight: (B...) float or None.
      threshold: a probability above it is a positive decision.

    Example:
      >>> binary_counts(jnp.array([2.0, -2.0, 2.0]), jnp.array([1, 0, 0])).finish()["precision"]
      0.5
    """
    weight_B = spread_weight(weight, logits_B.shape)
    says, is_true = jax.nn.sigmoid(logits_B.astype(jnp.float32)) > threshold, labels_B > 0.5
    cells = (says & is_true, says & ~is_true, ~says & is_true, ~says & ~is_true)
    return BinaryCounts(*(jnp.sum(cell * weight_B) for cell in cells))


def r2(predictions_BT: Array, targets_BT: Array, weight: Array | None = None) -> R2:
    """Sums for the coefficient of determination.

    Args:
      predictions_BT, targets_BT: (B,) or (B, T) float.
      weight: (B,) float or None.

    Example:
      >>> r2(jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 2.0, 3.0])).finish()
      1.0
    """
    n_rows = targets_BT.shape[0]
    targets, predictions = targets_BT.reshape(n_rows, -1), predictions_BT.reshape(n_rows, -1)
    weight_B1 = spread_weight(weight, (n_rows,))[:, None]
    residual = jnp.sum((predictions - targets) ** 2 * weight_B1, 0)
    return R2(jnp.sum(weight_B1), jnp.sum(targets * weight_B1, 0), jnp.sum(targets**2 * weight_B1, 0), residual)


def calibration(logits_BC: Array, labels_B: Array, weight: Array | None = None, n_bins: int = 15) -> Calibration:
    """Bins the confidence (the largest softmax probability) and counts how often it was right.

    Example:
      >>> round(calibration(jnp.array([[9.0, 0.0], [9.0, 0.0]]), jnp.array([0, 1])).finish()["ece"], 2)
      0.5
    """
    labels_B = hard_labels(logits_BC, labels_B).reshape(-1)
    logits_BC = logits_BC.reshape(-1, logits_BC.shape[-1]).astype(jnp.float32)
    weight_B = jnp.ones(labels_B.shape) if weight is None else weight.reshape(-1)
    probability_BC = jax.nn.softmax(logits_BC)
    confidence_B = jnp.max(probability_BC, -1)
    correct_B = (jnp.argmax(logits_BC, -1) == labels_B).astype(jnp.float32)
    bin_B = jnp.clip((confidence_B * n_bins).astype(jnp.int32), 0, n_bins - 1)
    error_B = jnp.sum((probability_BC - jax.nn.one_hot(labels_B, logits_BC.shape[-1])) ** 2, -1)
    rows = (weight_B, confidence_B * weight_B, correct_B * weight_B)
    weight_N, confidence_N, correct_N = (jnp.zeros(n_bins).at[bin_B].add(row_B) for row_B in rows)
    return Calibration(weight_N, confidence_N, correct_N, jnp.sum(error_B * weight_B))


def add(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the metrics of two batches; a bare number (`learning_rate`) is replaced by the later one.

    Args:
      a: metrics by name, or `{}` to start.
      b: metrics by name, of the same names unless `a` is empty.

    Raises:
      JaxdlError: the names differ.

    Example:
      >>> one = {"loss": Mean(2.0, 1.0), "learning_rate": 0.1}
      >>> finish(add(one, {"loss": Mean(4.0, 1.0), "learning_rate": 0.2}))
      {'loss': 3.0, 'learning_rate': 0.2}
    """
    if not a:
        return dict(b)
    if a.keys() != b.keys():
        raise JaxdlError(
            f"metrics differ between batches: {sorted(a)} and {sorted(b)}; a loss must name the same ones."
        )
    return {name: _add_one(a[name], b[name]) for name in a}


def _add_one(a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: x + y, a, b) if isinstance(b, METRICS) else b


def finish(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Divides: every metric becomes a float, or several named `metric/part`.

    Example:
      >>> finish({"loss": Mean(6.0, 4.0)})
      {'loss': 1.5}
    """
    done: dict[str, Any] = {}
    for name, value in metrics.items():
        result = value.finish() if isinstance(value, METRICS) else float(value)
        if isinstance(result, dict):
            done.update({f"{name}/{part}": entry for part, entry in result.items()})
        else:
            done[name] = result
    return done


def scalars(finished: Mapping[str, Any]) -> dict[str, float]:
    """The entries that are single numbers, for writers and the progress line.

    Example:
      >>> scalars({"loss": 1.5, "confusion/matrix": np.eye(2)})
      {'loss': 1.5}
    """
    return {name: value for name, value in finished.items() if isinstance(value, float)}


def _divide(total: Any, weight: Any) -> float:
    weight = float(weight)
    return float(total) / weight if weight != 0 else float("nan")


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros_like(a, dtype=np.float64), where=b != 0)
