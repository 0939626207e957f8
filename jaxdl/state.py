"""The state of a training run: arrays and nothing else."""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxdl import paths
from jaxdl.errors import JaxdlError
from jaxdl.paths import RuleError, Rules, Tree

ALL: Rules = ((".*", True),)


class TrainState(flax.struct.PyTreeNode):
    """Everything that a train step reads and writes.

    It holds no function, so two states can be tree-mapped together, saved, sharded and compared.

    Attributes:
      step: int32 scalar, the number of updates made.
      params: tree of float arrays; frozen leaves may be integers, such as the codes of a quantised base.
      extra: tree of arrays that the loss updates but no gradient reaches, such as `{"batch_stats": ...}`.
      opt_state: the optimizer's state, made from the trainable half of `params`.
      rng: typed PRNG key; it never changes, a step folds `step` into it.
    """

    step: jax.Array
    params: Tree
    extra: Tree
    opt_state: Tree
    rng: jax.Array


def create_state(
    params: Tree, extra: Tree, tx: optax.GradientTransformation, *, rng: jax.Array, trainable: Rules = ALL
) -> TrainState:
    """Makes the state before the first update, with copies of the arrays: a step that donates its state spares yours.

    Args:
      params: tree of float arrays, as `model.init(...)["params"]`; frozen leaves may be integers.
      extra: the other collections of the model, `{}` where there is none.
      tx: an Optax transformation; it is initialised with the trainable leaves only.
      rng: scalar typed key, `jax.random.key(seed)`.
      trainable: `(regex, bool)` rules over the paths of `params`; the same must be given to `make_train_step`.

    Raises:
      JaxdlError: no leaf is trainable, a trainable leaf is not floating, or `rng` is not a typed key.
      RuleError: the rules do not fit the tree.

    Example:
      >>> state = create_state({"w": jnp.ones(3)}, {}, optax.adam(0.1), rng=jax.random.key(0))
      >>> int(state.step)
      0
    """
    if not jnp.issubdtype(jnp.asarray(rng).dtype, jax.dtypes.prng_key) or rng.shape != ():
        raise JaxdlError(f"rng is {getattr(rng, 'dtype', type(rng))}; it must be one typed key: jax.random.key(seed).")
    moving, _ = split_trainable(params, trainable)
    params, extra, rng = jax.tree.map(jnp.copy, (params, extra, rng))
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, extra=extra, opt_state=tx.init(moving), rng=rng)


def split_trainable(params: Tree, trainable: Rules) -> tuple[Tree, Tree]:
    """Parts `params` into the leaves that train and those that do not, `None` where a leaf is in the other half.

    Raises:
      JaxdlError: nothing is trainable, a rule value is not a bool, or a trainable leaf is not floating.
      RuleError: the rules do not fit the tree.

    Example:
      >>> split_trainable({"body": jnp.ones(1), "head": jnp.ones(1)}, [("head", True), (".*", False)])[0]["body"]
    """
    wrong = [value for _, value in _pairs(trainable) if not isinstance(value, bool)]
    if wrong:
        raise JaxdlError(f"trainable rules have the values {wrong}; each must be True or False.")
    try:
        moving, frozen = paths.split(params, paths.match(trainable, params, what="trainable"))
    except RuleError as error:
        raise RuleError(f"{error}{_tied_hint(params, trainable)}") from None
    flat = paths.flatten(moving)
    if not flat:
        near = ", ".join(list(paths.flatten(params))[:3])
        raise JaxdlError(
            "trainable rules freeze every parameter; nothing would train. Add a rule with value True over some of the "
            f"paths: {near}, ..."
        )
    integer = [path for path, leaf in flat.items() if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    if integer:
        raise JaxdlError(f"these trainable leaves are not floating: {integer}; freeze them with (regex, False).")
    return moving, frozen


def check_opt_state(tx: optax.GradientTransformation, opt_state: Tree, moving: Tree) -> None:
    """Refuses an optimizer state that was made for other leaves than those that train.

    Args:
      tx: the transformation.
      opt_state: its state.
      moving: the trainable half of the parameters.

    Raises:
      JaxdlError: the leaves that only one of them has.

    Example:
      >>> tx = optax.trace(0.9)
      >>> check_opt_state(tx, tx.init({"body": None, "head": jnp.ones(1)}), {"body": jnp.ones(1), "head": jnp.ones(1)})
      Traceback (most recent call last):
      jaxdl.errors.JaxdlError: the optimizer state was made for other trainable leaves: 1 problem(s)
        - trace/body trains and is not in the state; give create_state and make_train_step the same rules.
    """
    had, wanted = paths.flatten(opt_state), paths.flatten(jax.eval_shape(tx.init, moving))
    problems = [f"{path} trains and is not in the state" for path in wanted if path not in had]
    problems += [f"{path} is in the state and does not train" for path in had if path not in wanted]
    if problems:
        more = f" (and {len(problems) - 6} more)" if len(problems) > 6 else ""
        problems = problems[:6]
        problems[-1] += f"{more}; give create_state and make_train_step the same rules."
        raise JaxdlError.listing("the optimizer state was made for other trainable leaves", problems)


def _pairs(rules: Rules) -> Sequence[tuple[Any, Any]]:
    return [rule for rule in rules if isinstance(rule, (tuple, list)) and len(rule) == 2]


def _tied_hint(params: Tree, trainable: Rules) -> str:
    """A line for rules that look for a head where a language model makes its logits with the token embedding."""
    flat = paths.flatten(params)
    tables = [path for path in flat if f"/{path}".endswith("/embed/token/embedding")]
    wants_head = any("head" in str(regex) for regex, _ in _pairs(trainable))
    if not tables or not wants_head or any("head" in path for path in flat):
        return ""
    return f"\n  - this model has no head of its own: its logits are tied to {tables[0]}; that leaf is the head."
