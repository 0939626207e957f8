"""Where a value stopped being finite: the leaf, the step and the rows."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdl.errors import JaxdlError
from jaxdl.losses import LossFn
from jaxdl.paths import Tree, flatten
from jaxdl.state import TrainState


class NonFiniteError(JaxdlError):
    """A step produced a NaN or an infinity; the message names what, in which step, from which rows."""

    exit_code = 1


def is_held(state: TrainState) -> bool:
    """Whether `guard(step, "stop")` has met a non-finite value; waits for the device.

    Example:
      >>> is_held(TrainState(jnp.int32(-8), {}, {}, (), jax.random.key(0)))
      True
    """
    return int(state.step) < 0


def release(state: TrainState) -> TrainState:
    """The last good state, before the step that failed.

    Example:
      >>> int(release(TrainState(jnp.int32(-8), {}, {}, (), jax.random.key(0))).step)
      7
    """
    return state.replace(step=jnp.where(state.step < 0, ~state.step, state.step))


def check(state: TrainState, loss_fn: LossFn, batch: Any, rows: Sequence[int] | None = None) -> None:
    """Raises if a guarded state is held, after finding out where the value came from.

    It computes the failed step's loss again, row by row, and its gradient leaf by leaf; nothing is donated.

    Args:
      state: a state that came out of `guard(step, "stop")`.
      loss_fn: the loss of that step.
      batch: the batch of the failed step, `data[~state.step]`.
      rows: the row numbers of the batch in the dataset; positions in the batch where None.

    Raises:
      NonFiniteError: the state is held.
    """
    if not is_held(state):
        return
    state = release(state)
    numbers = np.arange(len(jax.tree.leaves(batch)[0])) if rows is None else np.asarray(rows)
    raise NonFiniteError(
        f"step {int(state.step)} produced a non-finite value; the state before it is kept.\n"
        + "\n".join(f"  - {line}" for line in _evidence(state, loss_fn, batch, numbers))
        + "\n  Remedy: clean these rows, lower the learning rate, clip the gradient, or continue with guard='skip'."
    )


def _evidence(state: TrainState, loss_fn: LossFn, batch: Any, rows: np.ndarray) -> list[str]:
    rng = jax.random.fold_in(state.rng, state.step)
    lines = []
    bad_params = [path for path, leaf in flatten(state.params).items() if not np.isfinite(leaf).all()]
    if bad_params:
        lines.append(f"parameters are already non-finite: {_some(bad_params)}; the update before made them so")
    for path, leaf in flatten(batch).items():
        values = np.asarray(leaf)
        if np.issubdtype(values.dtype, np.floating):
            bad = ~np.isfinite(values).reshape(len(values), -1).all(1)
            if bad.any():
                lines.append(f"batch[{path!r}] is non-finite in rows {_some(rows[bad])}")
    losses = np.asarray(_loss_by_row(loss_fn, state, batch, rng))
    if not np.isfinite(losses).all():
        lines.append(f"the loss is non-finite for rows {_some(rows[~np.isfinite(losses)])}")
    grads = jax.jit(jax.grad(lambda p: loss_fn(p, state.extra, batch, rng).total, allow_int=True))(state.params)
    bad_grads = [
        path
        for path, leaf in flatten(grads).items()
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not np.isfinite(leaf).all()
    ]
    if bad_grads:
        lines.append(f"gradients are non-finite at {_some(bad_grads)}")
    return lines or ["the value is finite when recomputed in another compilation: it sits at the edge of the range"]


def _loss_by_row(loss_fn: LossFn, state: TrainState, batch: Any, rng: Tree) -> jax.Array:
    def of_row(row: Any) -> jax.Array:
        alone = jax.tree.map(lambda x: x[None], row)
        return loss_fn(state.params, state.extra, alone, rng).total

    return jax.jit(lambda rows: jax.lax.map(of_row, rows))(jax.tree.map(jnp.asarray, batch))


def _some(values: Sequence[Any] | np.ndarray, n: int = 8) -> str:
    shown = ", ".join(str(value) for value in list(values)[:n])
    return shown + (f" and {len(values) - n} more" if len(values) > n else "")
