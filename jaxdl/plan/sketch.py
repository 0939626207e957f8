"""What a configuration says of its training step without reading data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import optax

from jaxdl.errors import JaxdlError
from jaxdl.losses import LossFn
from jaxdl.parallel import REPLICATED
from jaxdl.paths import Rules, Tree
from jaxdl.state import ALL, TrainState


class NoSketch(JaxdlError):
    """A configuration whose shapes are only known once its data have been read."""


@dataclass(frozen=True)
class Remedy:
    """A change that may save memory.

    Attributes:
      what: for a person.
      flags: what to add to the command line.
    """

    what: str
    flags: tuple[str, ...]


def _whole(state: TrainState) -> Rules:
    return REPLICATED


@dataclass(frozen=True)
class Sketch:
    """All that a training step is made of, but for arrays. A configuration's method `sketch()` returns one.

    Attributes:
      init: `key -> (params, extra)`; it is traced, never run.
      loss_fn, tx, trainable, microbatches: as for `make_train_step`.
      batch: global shapes and dtypes by name, `jax.ShapeDtypeStruct`s.
      guard: as for `guard`.
      mesh: name of an axis -> devices along it, as for `make_mesh`.
      sharding: `state -> rules`, as for `state_shardings`.
      weight_decay_rules, lr_scale_rules: as for `make_optimizer`, for the table.
      source: rules over parameter paths: where each leaf's first value is from.
      n_rows: of the training set; None where that is not known yet.
      steps: of the run; None where it counts epochs of an unknown length.
      remedies: what may be changed where it does not fit, the one that changes least first.
      notes: what is assumed of the data.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxdl.losses import LossOut, squared_error
      >>> def loss_fn(params, extra, batch, rng):
      ...     return LossOut(*squared_error(batch["x"] * params["w"], batch["x"]))
      >>> sketch = Sketch(lambda key: ({"w": jnp.ones(())}, {}), loss_fn, optax.sgd(0.1), {"x": array((8,), "float32")})
      >>> sketch.batch["x"].shape, sketch.microbatches
      ((8,), 1)
    """

    init: Callable[[jax.Array], tuple[Tree, Tree]]
    loss_fn: LossFn
    tx: optax.GradientTransformation
    batch: Mapping[str, Any]
    trainable: Rules = ALL
    microbatches: int = 1
    guard: str = "stop"
    mesh: Mapping[str, int] = field(default_factory=lambda: {"data": -1})
    sharding: Callable[[TrainState], Rules] = _whole
    weight_decay_rules: Rules | None = None
    lr_scale_rules: Rules | None = None
    source: Rules = ((".*", "seed"),)
    n_rows: int | None = None
    steps: int | None = None
    remedies: tuple[Remedy, ...] = ()
    notes: tuple[str, ...] = ()


def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array of a batch.

    Example:
      >>> array((8, 28), "int32")
      ShapeDtypeStruct(shape=(8, 28), dtype=int32)
    """
    return jax.ShapeDtypeStruct(shape, dtype)
