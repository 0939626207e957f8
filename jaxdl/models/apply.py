"""The bridge from a Linen module to the functions that the train step knows."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from jaxdl.finetune.statistics import freeze_statistics
from jaxdl.losses import LossFn, LossOut
from jaxdl.objectives import Objective
from jaxdl.paths import Rules, Tree
from jaxdl.state import ALL

Array = jax.Array


def init_model(model: nn.Module, rng: Array, inputs: Any, **more_inputs: Any) -> tuple[Tree, Tree]:
    """Initialises a Linen module inside one `jit`.

    Args:
      model: a Linen module whose call takes `inputs`.
      rng: typed key.
      inputs: an example batch of inputs; only shapes and dtypes matter.
      more_inputs: keyword arguments of the call, such as `mask`.

    Returns:
      `(params, extra)`, where `extra` holds every other collection, such as `{"batch_stats": ...}`.

    Example:
      >>> import jax.numpy as jnp
      >>> params, extra = init_model(nn.Dense(2), jax.random.key(0), jnp.ones((1, 3)))
      >>> params["kernel"].shape, extra
      ((3, 2), {})
    """
    is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((rng, inputs, more_inputs)))
    with contextlib.nullcontext() if is_traced else threefry_by_kernel():
        variables = dict(jax.jit(model.init)(rng, inputs, **more_inputs))
    return variables.pop("params", {}), variables


@contextlib.contextmanager
def threefry_by_kernel() -> Iterator[None]:
    """What is compiled meanwhile for an NVIDIA GPU draws its random bits, the same ones, by a kernel that JAX brings.

    XLA would write them out for each parameter: initialising a GPT-2 compiled for a minute, its step for 12 s. The
    kernel cannot be cut over devices, so this is not for what is drawn into shardings.

    Example:
      >>> import jax.numpy as jnp
      >>> with threefry_by_kernel():
      ...     params = jax.jit(nn.Dense(2).init)(jax.random.key(0), jnp.ones((1, 3)))
    """
    name = "jax_threefry_gpu_kernel_lowering"
    before = getattr(jax.config, name)
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)


def select_inputs(batch: Mapping[str, Any], inputs: str | Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """What a model takes of a batch: the first input, and the others as keyword arguments where the batch has them.

    Example:
      >>> select_inputs({"tokens": 1, "mask": 2, "label": 3}, ("tokens", "mask", "positions"))
      (1, {'mask': 2})
    """
    first, *others = [inputs] if isinstance(inputs, str) else inputs
    return batch[first], {name: batch[name] for name in others if name in batch}


def make_loss_fn(
    model: nn.Module, objective: Objective, *, inputs: str | Sequence[str], train: bool, trainable: Rules = ALL
) -> LossFn:
    """Makes the `loss_fn` of a Linen module that is called as `model(inputs, train=...)`.

    Args:
      model: the module. With `train=True` it gets a `dropout` key and may change every collection in `extra`.
      objective: `(outputs, batch) -> LossOut`.
      inputs: the key of the batch that the model takes, such as `"image"`; or several, such as `("tokens", "mask")`:
        the first is positional, the others are keyword arguments, each where the batch has it.
      train: passed on to the model.
      trainable: the rules given to `make_train_step`; BatchNorm in a frozen module then uses its averages and keeps
        them, see `freeze_statistics`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxdl.models import MLP
      >>> from jaxdl.objectives import regression
      >>> model = MLP(widths=(4,), n_outputs=1)
      >>> params, extra = init_model(model, jax.random.key(0), jnp.ones((2, 3)))
      >>> loss_fn = make_loss_fn(model, regression(), inputs="features", train=True)
      >>> batch = {"features": jnp.ones((2, 3)), "target": jnp.ones(2)}
      >>> float(loss_fn(params, extra, batch, jax.random.key(1)).weight)
      2.0
    """

    def loss_fn(params: Tree, extra: Tree, batch: Mapping[str, Array], rng: Array) -> LossOut:
        variables = {"params": params, **extra}
        first, others = select_inputs(batch, inputs)
        if not train:
            outputs: Any = model.apply(variables, first, **others, train=False)
            return objective(outputs, batch)
        mutable = list(extra)
        outputs, changed = model.apply(variables, first, **others, train=True, rngs={"dropout": rng}, mutable=mutable)
        return objective(outputs, batch)._replace(extra=dict(changed) if mutable else None)

    return freeze_statistics(loss_fn, trainable) if train else loss_fn
