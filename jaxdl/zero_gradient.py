"""A first gradient that is exactly zero: nothing would train, and why that may be."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdl import paths
from jaxdl.errors import JaxdlError
from jaxdl.losses import LossFn
from jaxdl.metrics import Mean
from jaxdl.paths import Rules
from jaxdl.state import TrainState


class ZeroGradientError(JaxdlError):
    """The gradient of a run's first step is exactly zero; the message names what trains and the likely causes."""

    exit_code = 1


def is_zero(metrics: Mapping[str, Any]) -> bool:
    """Whether the metrics of a step tell a gradient of exactly zero that was computed, not skipped.

    A learning rate of 0, as at the start of a warm-up, has no say in it.

    Args:
      metrics: of one step, on the host.

    Example:
      >>> is_zero({"grad_norm": np.float32(0)}), is_zero({"grad_norm": np.float32(1e-30)}), is_zero({})
      (True, False, False)
    """
    if "grad_norm" not in metrics or float(metrics["grad_norm"]) != 0.0:
        return False
    is_skipped = "skipped" in metrics and float(metrics["skipped"].total) != 0.0
    return not is_skipped and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(dict(metrics)))


def explain(
    metrics: Mapping[str, Any], state: TrainState, loss_fn: LossFn | None, batch: Any, trainable: Rules | None
) -> ZeroGradientError:
    """The error to raise, with what a second look at the first batch tells.

    Args:
      metrics: of the first step, on the host.
      state: the state after it.
      loss_fn: the loss of the step; with it the gradient of every parameter is computed, frozen ones too.
      batch: the first batch.
      trainable: the rules of the step, where they are known.
    """
    lines = []
    if trainable is not None:
        moving, _ = paths.split(state.params, paths.match(trainable, state.params, what="trainable"))
        lines.append(f"trainable: {_some(list(paths.flatten(moving)))}")
    if isinstance(metrics.get("loss"), Mean) and float(metrics["loss"].weight) == 0.0:
        lines.append("every row of the first batch has the weight 0: look at `weight` or the mask")
    if loss_fn is not None:
        lines.append(_reach(state, loss_fn, batch))
    return ZeroGradientError(
        "the gradient of the first step is exactly 0, so nothing trains."
        + "".join(f"\n  - {line}" for line in lines)
        + "\n  Likely causes: the loss does not use these parameters, or a stop_gradient, argmax or integer cast lies "
        "between; they only meet frozen zeros, such as a fresh head that starts at 0 and is frozen; both factors of an "
        "adapter are 0; all units of a relu are off; the first batch is fitted without error."
    )


def _reach(state: TrainState, loss_fn: LossFn, batch: Any) -> str:
    rng = jax.random.fold_in(state.rng, 0)
    grads = jax.jit(jax.grad(lambda p: loss_fn(p, state.extra, batch, rng).total, allow_int=True))(state.params)
    reached = [
        path
        for path, leaf in paths.flatten(grads).items()
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and bool(jnp.any(leaf != 0))
    ]
    return f"the loss reaches {_some(reached)}" if reached else "the loss reaches no parameter at all, frozen or not"


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
