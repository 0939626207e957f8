"""Evaluation: the sums of every batch, added on the host, divided once."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxdl import metrics as metrics_lib
from jaxdl.compilation import Compiled
from jaxdl.losses import LossFn
from jaxdl.optim import eval_params
from jaxdl.parallel.mesh import DATA, put
from jaxdl.signals import StopFlag
from jaxdl.state import TrainState
from jaxdl.step import make_eval_step

Evaluator = Callable[[TrainState, StopFlag], dict[str, Any] | None]


def make_evaluator(loss_fn: LossFn, batches: Iterable[Mapping[str, np.ndarray]]) -> Evaluator:
    """Makes a function that evaluates a state on all batches.

    It uses the averaged parameters where the optimizer keeps some (EMA, schedule-free). On a mesh, rows lie over
    its axis `data` where they divide; every process reads all of them.

    Args:
      loss_fn: the loss with dropout off, as for `make_eval_step`.
      batches: host batches of one shape; padding rows have `weight` 0.

    Returns:
      `(state, stop) -> finished metrics`, or None if `stop` was raised before the last batch.
    """
    plain = make_eval_step(loss_fn)

    @functools.cache
    def eval_step(sharding: Any) -> Compiled:
        return Compiled(lambda state, batch: _readable(plain(state, batch), sharding), name="eval_step")

    def evaluate_state(state: TrainState, stop: StopFlag) -> dict[str, Any] | None:
        sharding = _data_sharding(state)
        state = state.replace(params=eval_params(state.opt_state, state.params), opt_state=())
        on_device = []
        for batch in batches:
            if stop:
                return None
            on_device.append(eval_step(sharding)(state, _placed(dict(batch), sharding)))
        total: dict[str, Any] = {}
        for sums in jax.device_get(on_device):
            total = metrics_lib.add(total, jax.tree.map(lambda x: np.asarray(x, np.float64), sums))
        return metrics_lib.finish(total)

    return evaluate_state


def _placed(batch: Any, whole: Any) -> Any:
    """Rows over the axis `data` where they divide, else whole on every device."""
    n_devices = whole.mesh.shape.get(DATA, 1) if isinstance(whole, jax.NamedSharding) else 1
    is_cut = n_devices > 1 and all(np.shape(leaf)[0] % n_devices == 0 for leaf in jax.tree.leaves(batch))
    sharding = jax.NamedSharding(whole.mesh, jax.P(DATA)) if is_cut else whole
    return jax.tree.map(lambda leaf: put(leaf, sharding), batch)


def _readable(sums: Any, sharding: Any) -> Any:
    """Where there are several processes, the sums whole in each of them."""
    is_spread = sharding is not None and not sharding.is_fully_addressable
    return jax.lax.with_sharding_constraint(sums, sharding) if is_spread else sums


def _data_sharding(state: TrainState) -> Any:
    sharding = state.step.sharding
    return sharding if len(sharding.device_set) > 1 else None


def evaluate(loss_fn: LossFn, state: TrainState, batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Evaluates a state on all batches, once.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxdl import LossOut, losses
      >>> def loss_fn(params, extra, batch, rng):
      ...     return LossOut(*losses.squared_error(batch["x"], batch["y"], batch["weight"]))
      >>> state = TrainState(jnp.int32(0), {}, {}, (), jax.random.key(0))
      >>> batch = {"x": np.ones(2, np.float32), "y": np.zeros(2, np.float32), "weight": np.ones(2, np.float32)}
      >>> evaluate(loss_fn, state, [batch, batch])
      {'loss': 1.0}
    """
    return make_evaluator(loss_fn, batches)(state, StopFlag()) or {}
