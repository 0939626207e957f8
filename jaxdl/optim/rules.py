"""Numbers for leaves, from rules over their paths, and transformations that follow them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxdl.errors import JaxdlError
from jaxdl.paths import RuleError, Rules, Tree, flatten, match

Array = jax.Array

_DECAYED = ("kernel", "embedding")
DECAY_RULES: Rules = ((rf"(.*/)?({'|'.join(_DECAYED)})", True), (r".*", False))
"""What decays and is penalised where no rules are given: kernels and embeddings, and no bias, scale or statistic."""


def multipliers(rules: Rules | None, params: Tree, *, what: str) -> Tree:
    """Gives every leaf the number that its rule multiplies a strength with.

    Args:
      rules: `(regex, bool or number)` pairs; None stands for `DECAY_RULES`, which (unlike a list of your own) may
        match nothing, because a trainable half may hold only kernels or only biases.
      params: any pytree; `None` stays `None`.
      what: the name of the rule list, for the error message.

    Returns:
      A tree of the same structure with float leaves.

    Raises:
      RuleError: a leaf without a rule, a rule without a leaf, or a value that is not a finite number >= 0.

    Example:
      >>> multipliers(None, {"dense": {"kernel": 1, "bias": 2}}, what="l2")
      {'dense': {'bias': 0.0, 'kernel': 1.0}}
      >>> multipliers([(".*", 0.5)], {"dense": {"kernel": 1, "bias": None}}, what="l2")
      {'dense': {'bias': None, 'kernel': 0.5}}
      >>> multipliers([("2/.*", 0), *DECAY_RULES], {"1": {"kernel": 1, "bias": 2}, "2": {"kernel": 3}}, what="l2")
      {'1': {'bias': 0.0, 'kernel': 1.0}, '2': {'kernel': 0.0}}
    """
    if rules is None:
        chosen = [float(path.rsplit("/", 1)[-1] in _DECAYED) for path in flatten(params)]
        return jax.tree.unflatten(jax.tree.structure(params), chosen)
    values = match(rules, params, what=what)
    wrong = [value for _, value in rules if not isinstance(value, (bool, int, float)) or not 0 <= value < math.inf]
    if wrong:
        raise RuleError.listing(
            f"{what} rules", [f"value {value!r} must be True, False or a finite number >= 0." for value in wrong]
        )
    return jax.tree.map(float, values)


def scale_by_rules(rules: Rules, *, what: str = "lr_scale") -> optax.GradientTransformationExtraArgs:
    """Multiplies the update of every leaf with the value of its rule: a learning rate for each path.

    Args:
      rules: `(regex, bool or number)` pairs over all leaves.
      what: the name of the rule list, for the error message.

    Raises:
      RuleError: from `init`, see `multipliers`.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"body": {"kernel": jnp.ones(1)}, "head": {"kernel": jnp.ones(1)}}
      >>> tx = scale_by_rules([("head/.*", 1.0), (".*", 0.1)])
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> print(updates["body"]["kernel"], updates["head"]["kernel"])
      [0.1] [1.]
    """
    return leafwise(lambda update, w, m: update * m, lambda params: multipliers(rules, params, what=what), identity=1.0)


def leafwise(
    change: Callable[[Array, Array, float], Array], strengths: Callable[[Tree], Tree], *, identity: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation without state out of a function of one leaf.

    Args:
      change: `(update, parameter, strength) -> new update`, all of the leaf's shape but the strength, a number.
      strengths: `params -> tree of numbers`; it also runs in `init`, so that its errors come early.
      identity: the strength at which the update passes unchanged, without arithmetic.

    Returns:
      A transformation that keeps the dtype of the updates, passes over `None` leaves and ignores extra arguments.

    Raises:
      JaxdlError: `update` without the parameters.

    Example:
      >>> tx = leafwise(lambda update, w, m: update + m * w, lambda params: {"kernel": 2.0})
      >>> print(tx.update({"kernel": jax.numpy.ones(1)}, tx.init({}), {"kernel": jax.numpy.ones(1)})[0]["kernel"])
      [3.]
    """

    def init(params: Tree) -> optax.EmptyState:
        strengths(params)
        return optax.EmptyState()

    def update(updates: Tree, state: optax.EmptyState, params: Tree = None, **extra_args: Any) -> tuple[Tree, Any]:
        if params is None:
            raise JaxdlError(
                "penalties, decay and rules need the parameters: call tx.update(grads, opt_state, params)."
            )

        def of_leaf(update: Array, w: Array, m: float) -> Array:
            return update if m == identity else change(update, w, m).astype(update.dtype)

        return jax.tree.map(of_leaf, updates, params, strengths(params)), state

    return optax.GradientTransformationExtraArgs(init, update)
