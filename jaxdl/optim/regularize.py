"""L2, L1, elastic net and decoupled decay as transformations whose strength follows rules over parameter paths.

For a leaf `w` with multiplier `m` (the value of its rule; True is 1, False is 0):

    L2            (m l2 / 2) sum w^2     gradient   m l2 w           `add_l2`
    L1            m l1 sum |w|           gradient   m l1 sign(w)     `add_l1`, or exactly: `proximal_l1`
    elastic net   the sum of both        give l1 and l2 together     Zou and Hastie, 2005
    decay         no penalty             w <- w - rate m decay w     `decoupled_weight_decay`
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxdl.errors import JaxdlError
from jaxdl.optim.rules import leafwise, multipliers
from jaxdl.paths import Rules, Tree

Array = jax.Array


def add_l2(weight: float | Array, rules: Rules | None = None) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of an L2 penalty, `weight m w`; before the optimizer's scaling this is coupled L2.

    It is what PyTorch's `SGD` and `Adam` call `weight_decay`; with adaptive scaling it is not the same as
    `decoupled_weight_decay`.

    Args:
      weight: the strength, >= 0.
      rules: where, and with which multiplier; None: `DECAY_RULES`.

    Raises:
      JaxdlError: a negative or non-finite weight. RuleError: from `init`, see `multipliers`.

    Example:
      >>> params = {"kernel": jnp.array([2.0, -4.0]), "bias": jnp.array([1.0])}
      >>> tx = add_l2(0.5)
      >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
      >>> print(updates["kernel"], updates["bias"])
      [ 1. -2.] [0.]
    """
    weight = _checked("l2", weight)
    return _by_rules(lambda update, w, m: update + weight * m * w, rules, what="l2")


def add_l1(weight: float | Array, rules: Rules | None = None) -> optax.GradientTransformationExtraArgs:
    """Adds the subgradient of an L1 penalty, `weight m sign(w)` with `sign(0) = 0`.

    Weights oscillate around zero and are rarely exactly zero; `proximal_l1` gives exact zeros.

    Args:
      weight: the strength, >= 0.
      rules: where, and with which multiplier; None: `DECAY_RULES`.

    Raises:
      JaxdlError: a negative or non-finite weight. RuleError: from `init`, see `multipliers`.

    Example:
      >>> params = {"kernel": jnp.array([2.0, 0.0, -4.0])}
      >>> tx = add_l1(0.5)
      >>> updates, _ = tx.update({"kernel": jnp.zeros(3)}, tx.init(params), params)
      >>> print(updates["kernel"])
      [ 0.5  0.  -0.5]
    """
    weight = _checked("l1", weight)
    return _by_rules(lambda update, w, m: update + weight * m * jnp.sign(w), rules, what="l1")


def decoupled_weight_decay(weight: float | Array, rules: Rules | None = None) -> optax.GradientTransformationExtraArgs:
    """Adds `weight m w`, to stand between the optimizer's scaling and its learning rate.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019. As in Optax and PyTorch, and
    unlike the paper, the decay is multiplied with the whole learning rate, not only with its schedule.

    Args:
      weight: the strength, >= 0.
      rules: where, and with which multiplier; None: `DECAY_RULES`.

    Raises:
      JaxdlError: a negative or non-finite weight. RuleError: from `init`, see `multipliers`.

    Example:
      >>> params = {"kernel": jnp.array([2.0])}
      >>> tx = optax.chain(optax.scale_by_adam(), decoupled_weight_decay(0.1), optax.scale(-0.5))
      >>> updates, _ = tx.update({"kernel": jnp.zeros(1)}, tx.init(params), params)
      >>> print(updates["kernel"])
      [-0.1]
    """
    weight = _checked("weight_decay", weight)
    return _by_rules(lambda update, w, m: update + weight * m * w, rules, what="weight_decay")


def soft_threshold(x: Array, threshold: float | Array) -> Array:
    """The proximal operator of `threshold |x|`: `sign(x) max(|x| - threshold, 0)`, exactly zero inside.

    Args:
      x: any shape.
      threshold: >= 0, broadcast against `x`.

    Example:
      >>> print(soft_threshold(jnp.array([-3.0, -0.5, 0.5, 2.0]), 1.0) + 0.0)
      [-2.  0.  0.  1.]
    """
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - threshold, 0)


def proximal_l1(
    weight: float | Array,
    rules: Rules | None = None,
    *,
    learning_rate: float | Array,
    lr_scale_rules: Rules | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Ends a proximal step: soft-thresholds the new parameters by `learning_rate lr_scale weight m`.

    Must come after the learning rate. Penalised weights become exactly zero: `w + update` is 0.0. After plain
    gradient steps this is ISTA (Beck and Teboulle, 2009, eq. 1.4); with adaptive scaling it is the customary
    simplification that takes the proximal step in the plain metric.

    Args:
      weight: the strength, >= 0.
      rules: where, and with which multiplier; None: `DECAY_RULES`.
      learning_rate: the rate of this very update. It is a number, not a schedule: inside `with_learning_rate`, whose
        `make_inner` receives it, this transformation is built anew for each update.
      lr_scale_rules: the per-path scales that the update was multiplied with, if any.

    Raises:
      JaxdlError: a negative or non-finite weight. RuleError: from `init`, see `multipliers`.

    Example:
      >>> params = {"kernel": jnp.array([2.0, 0.1])}
      >>> tx = optax.chain(optax.sgd(0.5), proximal_l1(1.0, learning_rate=0.5))
      >>> updates, _ = tx.update({"kernel": jnp.zeros(2)}, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["kernel"])
      [1.5 0. ]
    """
    weight = _checked("l1", weight)

    def strengths(params: Tree) -> Tree:
        chosen = multipliers(rules, params, what="l1")
        if lr_scale_rules is None:
            return chosen
        return jax.tree.map(lambda m, scale: m * scale, chosen, multipliers(lr_scale_rules, params, what="lr_scale"))

    def shrink(update: Array, w: Array, m: float) -> Array:
        return soft_threshold(w + update, learning_rate * weight * m) - w

    return leafwise(shrink, strengths)


def penalty(params: Tree, *, l1: float = 0.0, l2: float = 0.0, rules: Rules | None = None) -> Array:
    """The value of the penalties, to be reported or added to a loss: `sum m (l1 sum|w| + l2/2 sum w^2)`.

    Its gradient is what `add_l1` and `add_l2` add. L1 and L2 under different rules are the sum of two calls.

    Args:
      params: parameters of any shapes; `None` leaves count nothing.
      l1: strength of the L1 penalty, >= 0.
      l2: strength of the L2 penalty, >= 0.
      rules: where, and with which multiplier; None: `DECAY_RULES`.

    Returns:
      A float32 scalar.

    Raises:
      JaxdlError: a negative or non-finite strength. RuleError: see `multipliers`.

    Example:
      >>> print(penalty({"kernel": jnp.array([3.0, -4.0]), "bias": jnp.ones(9)}, l1=1.0, l2=2.0))
      32.0
    """
    _checked("l1", l1)
    _checked("l2", l2)

    def of_leaf(w: Array, m: float) -> Array:
        w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
        return m * (l1 * jnp.sum(jnp.abs(w)) + l2 / 2 * jnp.sum(jnp.square(w)))

    chosen = multipliers(rules, params, what="penalty")
    values = [of_leaf(w, m) for w, m in zip(jax.tree.leaves(params), jax.tree.leaves(chosen), strict=True) if m]
    return jnp.asarray(sum(values), jnp.result_type(float))


def _by_rules(
    change: Callable[[Array, Array, float], Array], rules: Rules | None, *, what: str
) -> optax.GradientTransformationExtraArgs:
    return leafwise(change, lambda params: multipliers(rules, params, what=what))


def _checked(name: str, weight: float | Array) -> float | Array:
    if isinstance(weight, (int, float)) and not 0 <= weight < math.inf:
        raise JaxdlError(f"{name}={weight!r} must be a finite number >= 0.")
    return weight
