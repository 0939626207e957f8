"""Clipping by the global norm, where the gradients at hand may be a part of all."""

from typing import Any

import jax
import optax

from jaxdl.paths import Tree


def clip_by_norm_of_all(max_norm: float, *, clip_value: float | None = None) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm`, but for updates that are told of the gradients of other groups.

    A transformation that runs once for each group of leaves (`finetune.staged.staged`) passes `all_grads=`, the raw
    gradients of all groups. The norm is then theirs, so that groups share one clipping as they do without groups.

    Args:
      max_norm: the largest norm that passes.
      clip_value: what the updates were clipped to before, entry by entry; done to `all_grads` too.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = clip_by_norm_of_all(1.0)
      >>> mine, all_grads = ({"a": jnp.array([3.0]), "b": b} for b in (jnp.zeros(0), jnp.array([4.0])))
      >>> print(tx.update(mine, tx.init(mine), all_grads=all_grads)[0]["a"])  # 3 / 5
      [0.6]
    """
    by_norm, by_value = optax.clip_by_global_norm(max_norm), optax.clip(clip_value or 0.0)

    def update(
        updates: Tree, state: Any, params: Tree = None, *, all_grads: Tree = None, **extra_args: Any
    ) -> tuple[Tree, Any]:
        if all_grads is None:
            return by_norm.update(updates, state, params)
        if clip_value:
            all_grads, _ = by_value.update(all_grads, optax.EmptyState())
        clipped, state = by_norm.update(all_grads, state, params)
        return jax.tree.map(lambda mine, new: new if mine.size else mine, updates, clipped), state

    return optax.GradientTransformationExtraArgs(by_norm.init, update)
