"""Averages of the parameters over time, and which parameters to evaluate."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdl.errors import JaxdlError
from jaxdl.optim.learning_rate import find_states
from jaxdl.paths import Tree, flatten

Array = jax.Array


class EmaState(NamedTuple):
    """State of `ema`.

    Attributes:
      weight: float scalar, the total weight of the parameters seen: `1 - decay^count`, or 1 without debiasing.
      average: the weighted sum of the parameters, in float32 or wider; the average is `average / weight`.

    Example:
      >>> ema(0.9).init({"kernel": jnp.ones(2)})._fields
      ('weight', 'average')
    """

    weight: Array
    average: Tree


def ema(decay: float, debias: bool = True) -> optax.GradientTransformationExtraArgs:
    """Keeps an exponential moving average of the parameters after the update; the update itself passes unchanged.

    Must be the last transformation of a chain. `average <- decay average + (1 - decay) (params + updates)`; with
    `debias` it starts at zero and is divided by its total weight (Kingma and Ba, 2015, section 3), without it
    starts at the initial parameters.

    Args:
      decay: in [0, 1); the average looks back over about `1 / (1 - decay)` updates.
      debias: see above.

    Raises:
      JaxdlError: `decay` outside of [0, 1), or `update` without the parameters.

    Example:
      >>> tx = optax.chain(optax.sgd(1.0), ema(0.5))
      >>> params = {"kernel": jnp.array([0.0])}
      >>> opt_state = tx.init(params)
      >>> for _ in range(2):  # the parameters become 1, then 2
      ...   updates, opt_state = tx.update({"kernel": jnp.array([-1.0])}, opt_state, params)
      ...   params = optax.apply_updates(params, updates)
      >>> print(ema_params(opt_state, params)["kernel"])  # (0.25 * 1 + 0.5 * 2) / 0.75
      [1.6666666]
    """
    if not 0 <= decay < 1:
        raise JaxdlError(f"ema decay={decay!r} must be in [0, 1), such as 0.999.")

    def init(params: Tree) -> EmaState:
        wide = jax.tree.map(lambda w: jnp.array(w, jnp.promote_types(w.dtype, jnp.float32), copy=True), params)
        weight = jnp.asarray(0.0 if debias else 1.0, jnp.result_type(float))
        return EmaState(weight, jax.tree.map(jnp.zeros_like, wide) if debias else wide)

    def update(updates: Tree, state: EmaState, params: Tree = None, **extra_args: Any) -> tuple[Tree, EmaState]:
        if params is None:
            raise JaxdlError("ema needs the parameters: call tx.update(grads, opt_state, params).")
        new_params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, w: a + (1 - decay) * (w - a), state.average, new_params)
        return updates, EmaState(state.weight + (1 - decay) * (1 - state.weight), average)

    return optax.GradientTransformationExtraArgs(init, update)


def ema_params(opt_state: Any, params: Tree) -> Tree:
    """The averaged parameters, in the structure and dtypes of `params`.

    Args:
      opt_state: an optimizer state with the state of `ema` anywhere in it.
      params: the full tree; leaves that the optimizer did not see (frozen, `None` there) are taken from it.

    Returns:
      A tree like `params`. Before the first update it is `params`.

    Raises:
      JaxdlError: there is no average in the state, or it has leaves that `params` lacks.

    Example:
      >>> opt_state = ema(0.9).init({"head": jnp.ones(1), "body": None})
      >>> print(ema_params(opt_state, {"head": jnp.ones(1), "body": jnp.zeros(1)})["body"])
      [0.]
    """
    found = find_states(opt_state, _is_ema)
    if not found:
        raise JaxdlError("the optimizer state holds no average; make the optimizer with ema_decay=0.999 or add ema().")
    averaged = {}
    for state in found:
        for path, average in flatten(state.average).items():
            averaged[path] = (state.weight, average)

    def swap(w: Array, weight: Array, average: Array) -> Array:
        return jnp.where(weight > 0, average / jnp.where(weight > 0, weight, 1), w).astype(w.dtype)

    return _swapped(params, averaged, swap)


def eval_params(opt_state: Any, params: Tree) -> Tree:
    """The parameters to evaluate and to deploy: the moving average, the schedule-free average, or `params`.

    Schedule-free training (Defazio et al., 2024) takes gradients at y and evaluates at x = (y - (1 - b1) z) / b1.

    Args:
      opt_state: any optimizer state.
      params: the full tree; leaves that the optimizer did not see are taken from it.

    Returns:
      A tree like `params`.

    Raises:
      JaxdlError: the average has leaves that `params` lacks.

    Example:
      >>> params = {"kernel": jnp.ones(2)}
      >>> eval_params(optax.sgd(0.1).init(params), params) is params
      True
    """
    if find_states(opt_state, _is_ema):
        return ema_params(opt_state, params)
    of_path = {}
    for state in find_states(opt_state, lambda node: isinstance(node, optax.contrib.ScheduleFreeState)):
        for path, z in flatten(state.z).items():
            of_path[path] = (state._replace(z=z),)

    def swap(w: Array, state: Any) -> Array:
        return optax.contrib.schedule_free_eval_params(state, w).astype(w.dtype)

    return _swapped(params, of_path, swap) if of_path else params


def _is_ema(node: Any) -> bool:
    return isinstance(node, EmaState)


def _swapped(params: Tree, of_path: dict[str, tuple[Any, ...]], swap: Any) -> Tree:
    flat = flatten(params)
    unknown = sorted(of_path.keys() - flat.keys())
    if unknown:
        raise JaxdlError(f"the average has leaves that params lacks: {unknown[:8]}; give the tree that was trained.")
    new = [swap(leaf, *of_path[path]) if path in of_path else leaf for path, leaf in flat.items()]
    return jax.tree.unflatten(jax.tree.structure(params), new)
