"""Steps that let nothing into the state that is not finite; and where it came from: the leaf, the step, the rows."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdl.errors import JaxdlError
from jaxdl.losses import LossFn
from jaxdl.metrics import METRICS, Mean
from jaxdl.paths import Tree, flatten
from jaxdl.state import TrainState
from jaxdl.step import Step

Array = jax.Array
Tried = tuple[TrainState, dict[str, Any]]  # what a step returned
Choose = Callable[[Array, TrainState, TrainState], TrainState]


class NonFiniteError(JaxdlError):
    """A step produced a NaN or an infinity; the message names what, in which step, from which rows."""

    exit_code = 1


def guard(step: Step, policy: str = "stop") -> Step:
    """Makes a step that never lets a non-finite loss or gradient into the state.

    Args:
      step: `(state, batch) -> (state, metrics)`; its floating metrics (the loss, the gradient norm) are looked at.
      policy: `"stop"` holds the state as it was before the bad step, from then on: later calls change nothing, which
        a negative `state.step` (the bitwise complement of the step that failed) shows. `nonfinite.check` turns it
        into an error that names leaf, step and rows. `"skip"` leaves params, extra and opt_state as they were and
        goes on with the next step; the metric `skipped` is the share of steps this happened to.

    Raises:
      JaxdlError: an unknown policy.

    Example:
      >>> state = TrainState(jnp.int32(7), jnp.float32(1.0), {}, (), jax.random.key(0))
      >>> def step(state, batch):
      ...     return state.replace(step=state.step + 1, params=batch), {"loss": batch}
      >>> after, _ = guard(step)(state, jnp.float32(jnp.nan))
      >>> int(after.step), float(after.params)
      (-8, 1.0)
    """
    if policy not in ("stop", "skip"):
        raise JaxdlError(f"guard policy={policy!r} must be 'stop' or 'skip'.")
    decide = _stop if policy == "stop" else _skip
    halves: Any = getattr(step, "halves", None)
    is_whole = halves is not None and halves.step is step

    def update(state: TrainState, sums: Any) -> Tried:
        choose = functools.partial(_updated, halves.update, state, sums) if jax.default_backend() == "cpu" else _where
        return decide(state, halves.update(state, sums), choose)

    @functools.wraps(step)
    def guarded(state: TrainState, batch: Any) -> Tried:
        return update(state, halves.sums(state, batch)) if is_whole else decide(state, step(state, batch), _where)

    if halves is not None:
        guarded.halves = halves._replace(step=guarded, update=update)  # type: ignore[attr-defined]
    return guarded


def _stop(state: TrainState, tried: Tried, choose: Choose) -> Tried:
    new, metrics = tried
    is_held = state.step < 0
    held = state.replace(step=jnp.where(is_held, state.step, ~state.step))
    return choose(is_finite(metrics) & ~is_held, new, held), metrics


def _skip(state: TrainState, tried: Tried, choose: Choose) -> Tried:
    new, metrics = tried
    good = is_finite(metrics)
    kept = {name: _harmless(value, good) for name, value in metrics.items()}
    overflow = metrics["skipped"].total if "skipped" in metrics else 0.0  # that loss scaling has skipped itself
    skipped = Mean(jnp.maximum(1.0 - good.astype(jnp.float32), overflow), jnp.float32(1))
    return choose(good, new, state.replace(step=new.step)), {**kept, "skipped": skipped}


def _where(condition: Array, new: TrainState, old: TrainState) -> TrainState:
    chosen = jax.tree.map(lambda x, y: jnp.where(condition, x, y), new.replace(rng=None), old.replace(rng=None))
    return chosen.replace(rng=old.rng)


def _updated(
    update: Step, state: TrainState, sums: Any, condition: Array, new: TrainState, old: TrainState
) -> TrainState:
    """`_where` for an update on a CPU, computed where it is chosen.

    XLA copies the moments of an optimizer if it has to choose between the new and the old ones afterwards, a sixth of
    the step of an MLP, and else updates them in place. It drops what only `new` needs.
    """

    def updated(state: TrainState, sums: Any) -> TrainState:
        return update(state, sums)[0].replace(rng=None)

    chosen = jax.lax.cond(condition, updated, lambda *_: old.replace(rng=None), state, sums)
    return chosen.replace(rng=old.rng)


def _harmless(value: Any, good: Array) -> Any:
    """Empties the sums of a skipped step and puts 0 in the place of a non-finite number."""
    if isinstance(value, METRICS):
        return jax.tree.map(lambda x: jnp.where(good, x, jnp.zeros_like(x)), value)
    return jnp.where(jnp.isfinite(value), value, jnp.zeros_like(value))


def is_finite(tree: Tree) -> Array:
    """Whether every floating leaf of a tree is finite, as a bool scalar.

    Example:
      >>> bool(is_finite({"a": jnp.ones(2), "b": jnp.array([1.0, jnp.nan])}))
      False
    """
    leaves = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.bool_(True)


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
