"""Losses as sums: `(total, weight)`, divided once by whoever has seen the whole batch.

Each loss returns a `metrics.Mean`, so that `LossOut(*cross_entropy(logits, labels))` is a complete answer of a
`loss_fn`. Dimensions: B rows (any number of leading axes), C classes, T targets.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdl.errors import JaxdlError
from jaxdl.label_scores import score_labels
from jaxdl.metrics import Mean, mean
from jaxdl.paths import Tree

Array = jax.Array


class LossOut(NamedTuple):
    """What a `loss_fn` returns: sums, never means.

    Attributes:
      total: float32 scalar, the summed loss; its gradient over `weight` is what the optimizer sees.
      weight: float32 scalar, the summed weight.
      sums: further metrics by name, such as `{"accuracy": Mean(...)}`.
      extra: the new value of `TrainState.extra`, or None to leave it alone.
    """

    total: Array
    weight: Array
    sums: dict[str, Any] = {}  # noqa: RUF012
    extra: Tree = None


LossFn = Callable[[Tree, Tree, Any, Array], LossOut]


def squared_error(predictions: Array, targets: Array, weight: Array | None = None) -> Mean:
    """Squared error, whose mean is the MSE.

    Args:
      predictions: (B, ...) float.
      targets: the same shape.
      weight: (B,) float or None.

    Raises:
      JaxdlError: the shapes differ (they are never broadcast).

    Example:
      >>> squared_error(jnp.array([1.0, 2.0]), jnp.array([0.0, 0.0])).finish()
      2.5
    """
    return mean(_error(predictions, targets) ** 2, weight)


def absolute_error(predictions: Array, targets: Array, weight: Array | None = None) -> Mean:
    """Absolute error, whose mean is the MAE; shapes as in `squared_error`.

    Example:
      >>> absolute_error(jnp.array([1.0, -2.0]), jnp.array([0.0, 0.0])).finish()
      1.5
    """
    return mean(jnp.abs(_error(predictions, targets)), weight)


def huber(predictions: Array, targets: Array, weight: Array | None = None, *, delta: float = 1.0) -> Mean:
    """Huber's loss (1964): quadratic within `delta` of the target, linear beyond; shapes as in `squared_error`.

    Example:
      >>> huber(jnp.array([0.5, 3.0]), jnp.zeros(2)).finish()
      1.3125
    """
    if not delta > 0:
        raise JaxdlError(f"delta={delta} must be positive.")
    return mean(optax.losses.huber_loss(_error(predictions, targets), delta=delta), weight)


def _error(predictions: Array, targets: Array) -> Array:
    if predictions.shape != targets.shape:
        raise JaxdlError(f"predictions have shape {predictions.shape} and targets {targets.shape}; they must be equal.")
    return predictions.astype(jnp.float32) - targets.astype(jnp.float32)


def cross_entropy(
    logits_BC: Array,
    labels_B: Array,
    weight: Array | None = None,
    *,
    label_smoothing: float = 0.0,
    class_weights: Array | None = None,
    focal_gamma: float = 0.0,
    z_loss: float = 0.0,
) -> Mean:
    """Softmax cross-entropy in nats.

    Args:
      logits_BC: (B..., C) float; computed in float32.
      labels_B: (B...) int classes, or (B..., C) float probabilities (soft labels).
      weight: (B...) float or None; a row of weight 0 adds exactly nothing.
      label_smoothing: share of the probability spread over all classes (Szegedy et al. 2016).
      class_weights: (C,) float; a row counts with the weight of its class (a soft label with the mean of its
        classes'), in the total and in the weight, as in PyTorch.
      focal_gamma: the loss of a row times `(1 - p)**gamma`, p the probability of its label (Lin et al. 2017, eq. 4).
      z_loss: coefficient of `logsumexp(logits)**2`, which keeps logits near zero (Chowdhery et al. 2022, section 5).

    Raises:
      JaxdlError: shapes, dtypes or coefficients that make no sense, all at once.

    Example:
      >>> round(cross_entropy(jnp.zeros((3, 4)), jnp.array([0, 1, 2])).finish(), 4) == round(float(jnp.log(4.0)), 4)
      True
    """
    _check_cross_entropy(logits_BC, labels_B, label_smoothing, class_weights, focal_gamma)
    if labels_B.ndim == logits_BC.ndim or label_smoothing or class_weights is not None:
        logits_BC = logits_BC.astype(jnp.float32)
        log_z_B = jax.nn.logsumexp(logits_BC, -1)
        target_BC = _soft(labels_B, logits_BC, label_smoothing)
        loss_B = log_z_B * jnp.sum(target_BC, -1) - jnp.sum(target_BC * logits_BC, -1)
    else:
        log_z_B, at_label_B, _ = score_labels(logits_BC, labels_B)
        loss_B = log_z_B - at_label_B
    if focal_gamma:
        wrong_B = jnp.maximum(1.0 - jnp.exp(-loss_B), 1e-12)  # the derivative of 0**gamma is infinite below gamma = 1
        loss_B = loss_B * wrong_B**focal_gamma
    if z_loss:
        loss_B = loss_B + z_loss * log_z_B**2
    if class_weights is not None:
        row_B = jnp.sum(
            _soft(labels_B, logits_BC, 0.0) * jnp.reshape(class_weights, (1,) * (logits_BC.ndim - 1) + (-1,)), -1
        )
        weight = row_B if weight is None else row_B * weight
    return mean(loss_B, weight)


def _soft(labels_B: Array, logits_BC: Array, label_smoothing: float) -> Array:
    n_classes = logits_BC.shape[-1]
    is_soft = labels_B.ndim == logits_BC.ndim
    target_BC = labels_B.astype(jnp.float32) if is_soft else jax.nn.one_hot(labels_B, n_classes)
    return (1.0 - label_smoothing) * target_BC + label_smoothing / n_classes


def _check_cross_entropy(
    logits: Array, labels: Array, smoothing: float, class_weights: Array | None, gamma: float
) -> None:
    is_int = jnp.issubdtype(labels.dtype, jnp.integer)
    problems = []
    if not (is_int and labels.shape == logits.shape[:-1]) and not (not is_int and labels.shape == logits.shape):
        problems.append(
            f"labels are {labels.dtype}{list(labels.shape)} and logits {logits.dtype}{list(logits.shape)}; give int "
            f"classes of shape {list(logits.shape[:-1])} or float probabilities of shape {list(logits.shape)}."
        )
    if not 0.0 <= smoothing < 1.0:
        problems.append(f"label_smoothing={smoothing} must lie in [0, 1).")
    if class_weights is not None and class_weights.shape != logits.shape[-1:]:
        problems.append(f"class_weights have shape {class_weights.shape}; there are {logits.shape[-1]} classes.")
    if gamma < 0:
        problems.append(f"focal_gamma={gamma} must not be negative.")
    if problems:
        raise JaxdlError.listing("cross_entropy", problems)


def binary_cross_entropy(
    logits: Array,
    labels: Array,
    weight: Array | None = None,
    *,
    positive_weight: float = 1.0,
    focal_gamma: float = 0.0,
) -> Mean:
    """Sigmoid cross-entropy in nats, for binary and multi-label tasks.

    Args:
      logits: (B...) or (B..., C) float, one per decision.
      labels: the same shape, 0 or 1 (or a probability between).
      weight: (B...) float or None.
      positive_weight: factor of the loss of positive labels.
      focal_gamma: as in `cross_entropy`.

    Raises:
      JaxdlError: the shapes differ.

    Example:
      >>> round(binary_cross_entropy(jnp.zeros(2), jnp.array([0, 1])).finish(), 4)
      0.6931
    """
    if logits.shape != labels.shape:
        raise JaxdlError(f"logits have shape {logits.shape} and labels {labels.shape}; they must be equal.")
    logits, labels = logits.astype(jnp.float32), labels.astype(jnp.float32)
    no, yes = jax.nn.softplus(logits), jax.nn.softplus(-logits)
    if focal_gamma:
        no, yes = no * jax.nn.sigmoid(logits) ** focal_gamma, yes * jax.nn.sigmoid(-logits) ** focal_gamma
    return mean(positive_weight * labels * yes + (1.0 - labels) * no, weight)


def with_compute_dtype(loss_fn: LossFn, dtype: Any) -> LossFn:
    """Computes a loss in another floating type while parameters, gradients and sums stay in their own.

    Floating leaves of params and batch (but not `weight`) are cast; the cast is differentiated through, so float32
    parameters get float32 gradients.

    Args:
      loss_fn: `(params, extra, batch, rng) -> LossOut`.
      dtype: `jnp.bfloat16` or `jnp.float16` (the latter with `optim.dynamic_loss_scale`).

    Example:
      >>> def loss_fn(params, extra, batch, rng):
      ...     return LossOut(*squared_error(batch["x"] * params["w"], batch["x"]))
      >>> half = with_compute_dtype(loss_fn, jnp.bfloat16)
      >>> jax.grad(lambda p: half(p, {}, {"x": jnp.ones(2)}, None).total)({"w": jnp.zeros(2)})["w"].dtype
      dtype('float32')
    """

    def cast(tree: Tree) -> Tree:
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    def cast_loss_fn(params: Tree, extra: Tree, batch: Any, rng: Array) -> LossOut:
        weight = {"weight": batch["weight"]} if isinstance(batch, dict) and "weight" in batch else {}
        low = {**cast(batch), **weight} if isinstance(batch, dict) else cast(batch)
        out = loss_fn(cast(params), extra, low, rng)
        back = None if out.extra is None else jax.tree.map(lambda new, old: new.astype(old.dtype), out.extra, extra)
        return out._replace(extra=back)

    return cast_loss_fn
