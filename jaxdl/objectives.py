"""What a model's outputs are judged by: loss and metrics of a batch, in the form that a `loss_fn` returns.

An objective is `(outputs, batch) -> LossOut`. It reads `label` or `target`, and `weight` where the batch has one.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxdl import losses, metrics
from jaxdl.errors import JaxdlError
from jaxdl.losses import LossOut
from jaxdl.paths import nearest

Array = jax.Array
Objective = Callable[[Array, Mapping[str, Array]], LossOut]

_REGRESSION = {"squared_error": losses.squared_error, "absolute_error": losses.absolute_error, "huber": losses.huber}


def classification(
    *,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    z_loss: float = 0.0,
    class_weights: Array | None = None,
    is_detailed: bool = False,
) -> Objective:
    """Cross-entropy and accuracy over `batch["label"]`, (B,) int or (B, C) probabilities.

    Args:
      label_smoothing, focal_gamma, z_loss, class_weights: as for `losses.cross_entropy`.
      is_detailed: also the confusion matrix and the calibration, for evaluation.

    Example:
      >>> import jax.numpy as jnp
      >>> out = classification()(jnp.eye(2) * 9, {"label": jnp.array([0, 1])})
      >>> out.sums["accuracy"].finish()
      1.0
    """

    def objective(logits_BC: Array, batch: Mapping[str, Array]) -> LossOut:
        label, weight = batch["label"], batch.get("weight")
        loss = losses.cross_entropy(
            logits_BC,
            label,
            weight,
            label_smoothing=label_smoothing,
            focal_gamma=focal_gamma,
            z_loss=z_loss,
            class_weights=class_weights,
        )
        sums: dict[str, Any] = {"accuracy": metrics.accuracy(logits_BC, label, weight)}
        if is_detailed:
            sums["confusion"] = metrics.confusion(logits_BC, label, weight)
            sums["calibration"] = metrics.calibration(logits_BC, label, weight)
        return LossOut(*loss, sums)

    return objective


def regression(*, loss: str = "squared_error", is_detailed: bool = False) -> Objective:
    """A distance to `batch["target"]`, (B,) or (B, T) float, with the mean absolute error beside it.

    Args:
      loss: `squared_error`, `absolute_error` or `huber`.
      is_detailed: also the coefficient of determination, for evaluation.

    Raises:
      JaxdlError: an unknown loss.

    Example:
      >>> import jax.numpy as jnp
      >>> out = regression()(jnp.array([[1.0], [3.0]]), {"target": jnp.array([0.0, 0.0])})
      >>> float(out.total), float(out.weight)
      (10.0, 2.0)
    """
    if loss not in _REGRESSION:
        raise JaxdlError(f"loss={loss!r} is unknown; nearest: {', '.join(nearest(loss, _REGRESSION))}.")

    def objective(outputs: Array, batch: Mapping[str, Array]) -> LossOut:
        target, weight = batch["target"], batch.get("weight")
        predictions = outputs[:, 0] if outputs.ndim == target.ndim + 1 and outputs.shape[-1] == 1 else outputs
        sums: dict[str, Any] = {"mean_absolute_error": losses.absolute_error(predictions, target, weight)}
        if is_detailed:
            sums["r2"] = metrics.r2(predictions, target, weight)
        return LossOut(*_REGRESSION[loss](predictions, target, weight), sums)

    return objective
