"""Dynamic loss scaling, so that float16 gradients neither underflow nor poison the parameters."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdl.errors import JaxdlError
from jaxdl.optim.learning_rate import find_states

Array = jax.Array


class DynamicLossScaleState(NamedTuple):
    """State of `dynamic_loss_scale`.

    Attributes:
      scale: float32 scalar, what the next loss is multiplied with.
      good_steps: int32 scalar, updates since the scale last changed; 0 directly after a skipped update.
      inner: the state of the wrapped transformation.

    Example:
      >>> dynamic_loss_scale(optax.sgd(0.1)).init({"kernel": jnp.ones(2)})._fields
      ('scale', 'good_steps', 'inner')
    """

    scale: Array
    good_steps: Array
    inner: Any


def dynamic_loss_scale(
    tx: optax.GradientTransformation,
    *,
    initial: float = 2.0**15,
    factor: float = 2.0,
    growth_interval: int = 2000,
    minimum: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Skips updates with non-finite gradients and adapts the scale of the loss.

    The step multiplies the loss with `loss_scale_of(opt_state)`, differentiates, and divides the gradients by the
    same number; `update` receives these unscaled gradients. If any of them is inf or NaN, the update is zero, the
    inner state stays as it was bit for bit (no schedule, moment, average or count advances) and the scale is
    divided by `factor`. After `growth_interval` good updates in a row it is multiplied with `factor`.
    Source: Micikevicius et al., "Mixed precision training", ICLR 2018, section 3.2.

    Args:
      tx: the transformation to wrap; it must be wrapped whole, with its clipping and its average.
      initial: the first scale, > 0. Powers of two make scaling exact.
      factor: > 1.
      growth_interval: in updates, >= 1.
      minimum: the scale never goes below it, 0 < minimum <= initial.

    Returns:
      A transformation with a `DynamicLossScaleState`.

    Raises:
      JaxdlError: options outside of these ranges, all in one message.

    Example:
      >>> tx = dynamic_loss_scale(optax.sgd(1.0))
      >>> opt_state = tx.init({"kernel": jnp.ones(2)})
      >>> updates, opt_state = tx.update({"kernel": jnp.array([jnp.inf, 1.0])}, opt_state)
      >>> print(updates["kernel"], loss_scale_of(opt_state))
      [0. 0.] 16384.0
    """
    _check(initial, factor, growth_interval, minimum)
    wrapped = optax.with_extra_args_support(tx)

    def init(params: Any) -> DynamicLossScaleState:
        return DynamicLossScaleState(jnp.float32(initial), jnp.zeros([], jnp.int32), wrapped.init(params))

    def update(grads: Any, state: DynamicLossScaleState, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        is_good = _all_finite(grads)
        updates, inner = wrapped.update(grads, state.inner, params, **extra_args)
        updates = jax.tree.map(lambda u: jnp.where(is_good, u, jnp.zeros_like(u)), updates)
        inner = jax.tree.map(lambda new, old: jnp.where(is_good, new, old), inner, state.inner)
        return updates, DynamicLossScaleState(*_next_scale(state.scale, state.good_steps, is_good), inner)

    def _next_scale(scale: Array, good_steps: Array, is_good: Array) -> tuple[Array, Array]:
        is_due = good_steps + 1 >= growth_interval
        grown = jnp.where(is_due & jnp.isfinite(scale * factor), scale * factor, scale)
        lowered = jnp.maximum(scale / factor, minimum)
        return jnp.where(is_good, grown, lowered), jnp.where(is_good & ~is_due, good_steps + 1, 0)

    return optax.GradientTransformationExtraArgs(init, update)


def loss_scale_of(opt_state: Any) -> Array | None:
    """The scale that the next loss must be multiplied with, or None where the optimizer scales no loss.

    Args:
      opt_state: any optimizer state.

    Returns:
      A float32 scalar, or None.

    Example:
      >>> params = {"kernel": jnp.ones(2)}
      >>> print(loss_scale_of(dynamic_loss_scale(optax.sgd(0.1), initial=8.0).init(params)))
      8.0
      >>> print(loss_scale_of(optax.sgd(0.1).init(params)))
      None
    """
    found = find_states(opt_state, lambda node: isinstance(node, DynamicLossScaleState))
    return found[0].scale if found else None


def _all_finite(tree: Any) -> Array:
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)], bool))


def _check(initial: float, factor: float, growth_interval: int, minimum: float) -> None:
    problems = []
    if not 0 < initial < math.inf:
        problems.append(f"initial={initial!r} must be a finite number > 0.")
    if not 1 < factor < math.inf:
        problems.append(f"factor={factor!r} must be a finite number > 1.")
    if isinstance(growth_interval, bool) or not isinstance(growth_interval, int) or growth_interval < 1:
        problems.append(f"growth_interval={growth_interval!r} must be a whole number >= 1.")
    if not 0 < minimum <= initial:
        problems.append(f"minimum={minimum!r} must be > 0 and at most initial={initial!r}.")
    if problems:
        raise JaxdlError.listing("dynamic_loss_scale", problems)
