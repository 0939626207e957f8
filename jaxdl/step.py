"""The train step, a pure function of arrays, and the functions that take a step and return one.

They compose as JAX's own transformations do: `jax.jit(repeat(guard(make_train_step(loss_fn, tx)), 100))`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdl.errors import JaxdlError
from jaxdl.finetune.statistics import check_statistics, keep_statistics
from jaxdl.losses import LossFn, LossOut
from jaxdl.metrics import Mean
from jaxdl.optim import learning_rate_of, loss_scale_of
from jaxdl.paths import Rules, Tree, flatten, merge
from jaxdl.state import ALL, TrainState, check_opt_state, split_trainable

Array = jax.Array
Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
EvalStep = Callable[[TrainState, Any], dict[str, Any]]


class Sums(NamedTuple):
    """What a step knows of its rows before it divides.

    Attributes:
      grads: tree, the summed gradient of the trainable leaves, times `scale`.
      out: the summed loss, weight and metrics; `extra` is the new one, never None.
      scale: float32 scalar of loss scaling, or None.
    """

    grads: Tree
    out: LossOut
    scale: Array | None


class Halves(NamedTuple):
    """A step as the two functions that it is made of, for what comes between them: `guard`, and runners that compile
    them apart (`parallel.exact`).

    Attributes:
      step: the whole; a wrapper of it that copied its attributes is another function.
      sums: `(state, batch) -> Sums`, over all devices of a mapped axis.
      gradient: `(state, batch, rng) -> Sums` over the rows of this batch.
      update: `(state, sums) -> (state, metrics)`.
      loss_fn: the loss of `gradient`.
      microbatches: the parts into which `gradient` cuts its batch.
    """

    step: Step
    sums: Callable[[TrainState, Any], Sums]
    gradient: Callable[[TrainState, Any, Array], Sums]
    update: Callable[[TrainState, Sums], tuple[TrainState, dict[str, Any]]]
    loss_fn: LossFn
    microbatches: int


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    trainable: Rules = ALL,
    microbatches: int = 1,
    axis_name: str | None = None,
) -> Step:
    """Makes the function that computes one update; compile it with `jax.jit(step, donate_argnums=0)`.

    The parameters are split before they are differentiated, so frozen leaves meet neither the optimizer nor the
    gradient norm, and may be integers. The statistics of a frozen module, such as those of BatchNorm, must stay as they
    are: see `finetune.statistics`. Sums are divided by the summed weight once, so the result does not depend on how
    rows are spread over microbatches or devices.

    Args:
      loss_fn: `(params, extra, batch, rng) -> LossOut`; `rng` is a function of the seed and the step.
      tx: an Optax transformation, the one given to `create_state`; it is called with `value=loss`.
      trainable: `(regex, bool)` rules over parameter paths, the ones given to `create_state`.
      microbatches: the batch is cut into this many parts, one after the other in memory, with one update.
      axis_name: the mapped axis to sum over when the step runs under `pmap` or `shard_map`.

    Returns:
      `(state, batch) -> (state, metrics)`. Metrics are the loss and the sums of `loss_fn` as `Mean`s and the like,
      and the bare numbers `grad_norm` (over trainable leaves; 0 where loss scaling skipped an overflow) and, where
      the optimizer tells them, `learning_rate`, the rate of this update, and `loss_scale`, with `skipped`, the share of
      updates that overflowed. The function has the attributes `trainable` and `halves`.

    Raises:
      JaxdlError: microbatches < 1, or at tracing a batch that does not divide, or a loss that changes statistics of a
        frozen module.

    Example:
      >>> from jaxdl import create_state, losses
      >>> from jaxdl.metrics import finish
      >>> def loss_fn(params, extra, batch, rng):
      ...     return LossOut(*losses.squared_error(batch["x"] * params["w"], batch["y"]))
      >>> tx = optax.sgd(0.5)
      >>> state = create_state({"w": jnp.zeros(())}, {}, tx, rng=jax.random.key(0))
      >>> step = jax.jit(make_train_step(loss_fn, tx))
      >>> state, metrics = step(state, {"x": jnp.ones(4), "y": jnp.ones(4)})
      >>> float(state.params["w"]), finish(metrics)["loss"]
      (1.0, 1.0)
    """
    if microbatches < 1:
        raise JaxdlError(f"microbatches={microbatches} must be at least 1.")
    tx = optax.with_extra_args_support(tx)

    def gradient(state: TrainState, batch: Any, rng: Array) -> Sums:
        moving, frozen = split_trainable(state.params, trainable)
        scale = loss_scale_of(state.opt_state)
        if scale is not None:  # a loss is a sum over rows: without this a larger batch would overflow earlier
            scale = scale * microbatches / jax.tree.leaves(batch)[0].shape[0]

        def scaled_loss_fn(moving: Tree, extra: Tree, batch: Any, rng: Array) -> tuple[Array, LossOut]:
            params = merge(moving, frozen)
            out = loss_fn(params, extra, batch, rng)
            out = out._replace(extra=extra if out.extra is None else out.extra)
            check_statistics(params, extra, out.extra, trainable)
            return out.total if scale is None else out.total * scale, out

        return Sums(*_accumulate(scaled_loss_fn, moving, state.extra, batch, rng, microbatches), scale)

    def update(state: TrainState, sums: Sums) -> tuple[TrainState, dict[str, Any]]:
        grads, out, scale = sums
        moving, frozen = split_trainable(state.params, trainable)
        divisor = jnp.where(out.weight == 0, 1.0, out.weight)
        factor = divisor if scale is None else divisor * scale
        # Of the sums: on a CPU their quotients would be written for it alone. In float16 their squares would overflow.
        wide = jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), grads)
        norm = optax.tree.norm(wide) / factor
        grads = jax.tree.map(lambda g: g / factor.astype(g.dtype), grads)
        updates, opt_state = _update(tx, grads, state.opt_state, moving, out.total / divisor)
        new_state = state.replace(
            step=state.step + 1,
            params=merge(optax.apply_updates(moving, updates), frozen),
            extra=out.extra,
            opt_state=opt_state,
        )
        return new_state, _step_metrics(out, norm, opt_state)

    def sums_of(state: TrainState, batch: Any) -> Sums:
        rng = jax.random.fold_in(state.rng, state.step)
        if axis_name is None:
            return gradient(state, batch, rng)
        sums = gradient(state, batch, jax.random.fold_in(rng, jax.lax.axis_index(axis_name)))
        return _sum_over(axis_name, state, sums, trainable)

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        return update(state, sums_of(state, batch))

    halves = Halves(train_step, sums_of, gradient, update, loss_fn, microbatches)
    train_step.trainable, train_step.halves = trainable, halves  # type: ignore[attr-defined]
    return train_step


def _sum_over(axis_name: str, state: TrainState, sums: Sums, trainable: Rules) -> Sums:
    grads, out, scale = sums
    grads, total, weight, more = jax.lax.psum((grads, out.total, out.weight, out.sums), axis_name)
    extra = keep_statistics(state.params, state.extra, jax.lax.pmean(out.extra, axis_name), trainable)
    return Sums(grads, LossOut(total, weight, more, extra), scale)


def _accumulate(grad_of: Any, moving: Tree, extra: Tree, batch: Any, rng: Array, n: int) -> tuple[Tree, LossOut]:
    value_and_grad = jax.grad(grad_of, has_aux=True)
    if n == 1:
        return value_and_grad(moving, extra, batch, rng)
    parts = jax.tree.map(lambda x: _cut(x, n), batch)

    def add_part(carry: Any, part: Any) -> tuple[Any, None]:
        grads, sums, extra = carry
        i, rows = part
        new_grads, out = value_and_grad(moving, extra, rows, jax.random.fold_in(rng, i))
        new = (new_grads, (out.total, out.weight, out.sums))
        return (*jax.tree.map(jnp.add, (grads, sums), new), out.extra), None

    first = jax.tree.map(lambda x: x[0], parts)
    shapes, out = jax.eval_shape(value_and_grad, moving, extra, first, rng)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes, (out.total, out.weight, out.sums)))
    (grads, (total, weight, sums), extra), _ = jax.lax.scan(add_part, (*zeros, extra), (jnp.arange(n), parts))
    return grads, LossOut(total, weight, sums, extra)


def _cut(x: Array, n: int) -> Array:
    """Part i has the rows i, i + n, ...: where a batch lies over devices, every part then has rows of each of them."""
    if x.shape[0] % n:
        raise JaxdlError(f"a batch of {x.shape[0]} rows does not divide into microbatches={n}; use a divisor of it.")
    return x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1)


def _update(tx: Any, grads: Tree, opt_state: Tree, moving: Tree, loss: Array) -> tuple[Tree, Tree]:
    """`tx.update`; where it fails or answers with other leaves, the state may be of other trainable rules."""
    try:
        updates, new = tx.update(grads, opt_state, moving, value=loss)
    except (TypeError, ValueError) as error:
        if not isinstance(error, JaxdlError):
            check_opt_state(tx, opt_state, moving)
        raise
    if flatten(new).keys() != flatten(opt_state).keys():
        check_opt_state(tx, opt_state, moving)
    return updates, new


def _step_metrics(out: LossOut, norm: Array, opt_state: Tree) -> dict[str, Any]:
    rate, scale = learning_rate_of(opt_state), loss_scale_of(opt_state)
    skipped = {}
    if scale is not None:  # an overflow is that wrapper's daily business: it skips the update
        is_good = jnp.isfinite(norm)
        skipped = {"skipped": Mean(1.0 - is_good.astype(jnp.float32), jnp.float32(1))}
        norm = jnp.where(is_good, norm, 0.0)
    return {
        "loss": Mean(out.total, out.weight),
        **out.sums,
        "grad_norm": norm,
        **({} if rate is None else {"learning_rate": rate}),
        **({} if scale is None else {"loss_scale": scale}),
        **skipped,
    }


def make_eval_step(loss_fn: LossFn, *, axis_name: str | None = None) -> EvalStep:
    """Makes the function that computes the sums of one batch without an update.

    Args:
      loss_fn: as for `make_train_step`, with dropout off; its `extra` is discarded.
      axis_name: the mapped axis to sum over, if any.

    Returns:
      `(state, batch) -> metrics`; add the metrics of all batches with `metrics.add`, then `metrics.finish`.

    Example:
      >>> from jaxdl import losses
      >>> def loss_fn(params, extra, batch, rng):
      ...     return LossOut(*losses.squared_error(batch["x"], batch["y"]))
      >>> state = TrainState(step=0, params={}, extra={}, opt_state=(), rng=jax.random.key(0))
      >>> make_eval_step(loss_fn)(state, {"x": jnp.ones(2), "y": jnp.zeros(2)})["loss"].finish()
      1.0
    """

    def eval_step(state: TrainState, batch: Any) -> dict[str, Any]:
        out = loss_fn(state.params, state.extra, batch, state.rng)
        sums = {"loss": Mean(out.total, out.weight), **out.sums}
        return sums if axis_name is None else jax.lax.psum(sums, axis_name)

    return eval_step


def repeat(step: Step, n: int) -> Step:
    """Makes a step that makes `n` updates in one call, so that Python runs once for all of them.

    Args:
      step: `(state, batch) -> (state, metrics)`.
      n: how many updates, at least 1.

    Returns:
      `(state, batches) -> (state, metrics)`: every leaf of `batches` and of the returned metrics has a new first axis
      of length n.

    Raises:
      JaxdlError: n < 1, or at tracing a first axis that is not n long.

    Example:
      >>> count = repeat(lambda state, batch: (state + batch, {"sum": state + batch}), 3)
      >>> count(jnp.array(0), jnp.array([1, 2, 3]))[1]["sum"].tolist()
      [1, 3, 6]
    """
    if n < 1:
        raise JaxdlError(f"repeat n={n} must be at least 1.")

    @functools.wraps(step)
    def repeated(state: TrainState, batches: Any) -> tuple[TrainState, dict[str, Any]]:
        wrong = {path: leaf.shape for path, leaf in flatten(batches).items() if leaf.shape[:1] != (n,)}
        if wrong:
            raise JaxdlError(f"repeat(step, {n}) needs leaves with a first axis of {n}; these differ: {wrong}.")
        return jax.lax.scan(step, state, batches)

    vars(repeated).pop("halves", None)  # those of one update
    return repeated


def on_rows(step: Step, dataset: Any) -> Step:
    """Makes a step that takes row numbers in place of a batch and gathers them from arrays on the device.

    Args:
      step: `(state, batch) -> (state, metrics)`.
      dataset: tree of arrays with rows first. Pass it through `jit` as an argument: a closed-over array becomes a
        constant of the compiled program.

    Returns:
      `(state, rows) -> (state, metrics)`, rows int (B,).

    Example:
      >>> step = on_rows(lambda state, batch: (state + jnp.sum(batch), {}), jnp.array([10, 20, 30]))
      >>> int(step(jnp.array(0), jnp.array([0, 2]))[0])
      40
    """
    return lambda state, rows: step(state, jax.tree.map(lambda x: x[rows], dataset))
