"""The one owner of the learning rate: it evaluates the schedule, applies the rate and keeps it in the state."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxdl.errors import JaxdlError

Array = jax.Array
Rate: TypeAlias = float | Array | optax.Schedule


class LearningRateState(NamedTuple):
    """State of `with_learning_rate`.

    Attributes:
      n_updates: int32 scalar, the number of updates made; the next update uses `schedule(n_updates)`.
      learning_rate: float scalar, the rate of the update that produced this state (before the first: of the first).
      plateau: the state of reduce-on-plateau, or `optax.EmptyState()`.
      inner: the state of the transformation that used the rate.

    Example:
      >>> with_learning_rate(optax.sgd, 0.5).init({"kernel": jnp.ones(2)})._fields
      ('n_updates', 'learning_rate', 'plateau', 'inner')
    """

    n_updates: Array
    learning_rate: Array
    plateau: Any
    inner: Any


def with_learning_rate(
    make_inner: Callable[[Array], optax.GradientTransformation],
    learning_rate: Rate,
    *,
    plateau: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds a transformation anew for each update from the rate of that update, and keeps the rate in the state.

    Whatever needs the rate (the step, the threshold of a proximal L1, an inner momentum) is built from one number,
    and the number that is logged is that number.

    Args:
      make_inner: `rate -> transformation`; `rate` is a float scalar array. The state must not depend on the rate.
      learning_rate: a number, or a schedule `count -> rate` that counts updates from 0.
      plateau: `optax.contrib.reduce_on_plateau(...)`; it then scales the rate, and `update` needs `value=loss`.

    Returns:
      A transformation with a `LearningRateState`. Extra arguments go on to the inner transformation.

    Raises:
      JaxdlError: in `update`, when there is a plateau but no `value=`.

    Example:
      >>> tx = with_learning_rate(optax.sgd, optax.linear_schedule(1.0, 0.0, 4))
      >>> grads, opt_state = {"kernel": jnp.ones(1)}, tx.init({"kernel": jnp.zeros(1)})
      >>> _, opt_state = tx.update(grads, opt_state)
      >>> updates, opt_state = tx.update(grads, opt_state)
      >>> print(updates["kernel"], learning_rate_of(opt_state))
      [-0.75] 0.75
    """
    plateau_tx = optax.with_extra_args_support(optax.identity() if plateau is None else plateau)

    def scheduled(count: Array) -> Array:
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        return jnp.asarray(rate, jnp.result_type(float))

    def init(params: Any) -> LearningRateState:
        count = jnp.zeros([], jnp.int32)
        rate = scheduled(count)
        return LearningRateState(count, rate, plateau_tx.init(rate), make_inner(rate).init(params))

    def update(updates: Any, state: LearningRateState, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if plateau is not None:
            if extra_args.get("value") is None:
                raise JaxdlError("reduce-on-plateau needs the loss: tx.update(grads, opt_state, params, value=loss).")
            extra_args["value"] = jnp.asarray(extra_args["value"])
        rate, plateau_state = plateau_tx.update(scheduled(state.n_updates), state.plateau, **extra_args)
        inner = optax.with_extra_args_support(make_inner(rate))
        updates, inner_state = inner.update(updates, state.inner, params, **extra_args)
        return updates, LearningRateState(optax.safe_increment(state.n_updates), rate, plateau_state, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def find_states(opt_state: Any, is_wanted: Callable[[Any], bool]) -> list[Any]:
    """The nodes of an optimizer state that satisfy a predicate, wherever wrappers and chains have put them.

    Args:
      opt_state: any optimizer state.
      is_wanted: a predicate over nodes; the search does not go below a node that satisfies it.

    Example:
      >>> opt_state = optax.chain(optax.clip(1.0), optax.adam(0.1)).init({"kernel": jnp.ones(2)})
      >>> [int(found.count) for found in find_states(opt_state, lambda x: isinstance(x, optax.ScaleByAdamState))]
      [0]
    """
    return [node for node in jax.tree.leaves(opt_state, is_leaf=is_wanted) if is_wanted(node)]


def learning_rate_of(opt_state: Any) -> Array | None:
    """The learning rate of the update that produced `opt_state`.

    Finds the state of `make_optimizer` (of `with_learning_rate`), or of an `optax.inject_hyperparams` that holds a
    `learning_rate`. A reduce-on-plateau that stands elsewhere in the chain multiplies it. Where several rates are
    in use (`optax.partition`), the first in the order of the state is returned.

    Args:
      opt_state: any optimizer state.

    Returns:
      A float scalar, or None where the state holds no rate.

    Example:
      >>> injected = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
      >>> print(learning_rate_of(injected.init({"kernel": jnp.ones(2)})))
      0.5
      >>> print(learning_rate_of(optax.sgd(0.5).init({"kernel": jnp.ones(2)})))
      None
    """
    owners = find_states(opt_state, _is_owner)
    if not owners:
        return None
    first = owners[0]
    rate = first.learning_rate if isinstance(first, LearningRateState) else first.hyperparams["learning_rate"]
    injected = [owner.inner_state for owner in owners if not isinstance(owner, LearningRateState)]
    outside = find_states(opt_state, lambda node: _is_plateau(node) or _is_owner(node))
    for node in [node for node in outside if _is_plateau(node)] + find_states(injected, _is_plateau):
        rate = rate * node.scale
    return rate


def _is_owner(node: Any) -> bool:
    return isinstance(node, LearningRateState) or "learning_rate" in getattr(node, "hyperparams", ())


def _is_plateau(node: Any) -> bool:
    return isinstance(node, optax.contrib.ReduceLROnPlateauState)
