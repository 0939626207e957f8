"""The optimizers by name: Optax's own functions, opened where decay and the learning rate have their place."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import optax

from jaxdl.errors import JaxdlError
from jaxdl.paths import nearest

Tx: TypeAlias = optax.GradientTransformation
# (rate of this update, factor -> decoupled decay times factor, per-path scale of the rate, options) -> transformation
Build: TypeAlias = Callable[[jax.Array, Callable[[Any], Tx], Tx, dict[str, Any]], Tx]


def options_of(name: str) -> dict[str, Any]:
    """The options of an optimizer and their defaults: Optax's, less the rate and the decay that `make_optimizer` owns.

    Args:
      name: one of `OPTIMIZERS`.

    Raises:
      JaxdlError: an unknown name.

    Example:
      >>> options_of("lion")
      {'b1': 0.9, 'b2': 0.99, 'mu_dtype': None}
    """
    if name not in _OPTIMIZERS:
        raise JaxdlError(f"there is no optimizer {name!r}; nearest: {', '.join(nearest(str(name), OPTIMIZERS))}.")
    parameters = inspect.signature(_OPTIMIZERS[name][0]).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key not in _OWNED}


def build(
    name: str, rate: jax.Array, decay: Callable[[Any], Tx], lr_scale: Tx, options: dict[str, Any]
) -> optax.GradientTransformation:
    """Builds the optimizer proper: gradients in, updates (times minus the rate) out.

    Args:
      name: one of `OPTIMIZERS`.
      rate: the learning rate of this update, a float scalar array.
      decay: `factor -> transformation` that adds the decoupled decay times the factor.
      lr_scale: the transformation that scales the rate of each path.
      options: a part of `options_of(name)`.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = build("gd", jnp.float32(0.5), lambda _: optax.identity(), optax.identity(), {})
      >>> print(tx.update({"kernel": jnp.ones(1)}, tx.init({"kernel": jnp.ones(1)}))[0]["kernel"])
      [-0.5]
    """
    return _OPTIMIZERS[name][1](rate, decay, lr_scale, {**options_of(name), **options})


_OWNED = {"learning_rate", "adam_learning_rate", "warmup_steps"}
_OWNED |= {"weight_decay", "weight_decay_rate", "adam_weight_decay", "mask", "weight_decay_mask"}


def _gd(learning_rate: Any) -> Tx:
    return optax.sgd(learning_rate)


def _sgd(learning_rate: Any, *, momentum: float = 0.0, nesterov: bool = False, accumulator_dtype: Any = None) -> Tx:
    return optax.sgd(learning_rate, momentum or None, nesterov, accumulator_dtype)


def _momentum(learning_rate: Any, *, momentum: float = 0.9, accumulator_dtype: Any = None) -> Tx:
    return optax.sgd(learning_rate, momentum, False, accumulator_dtype)


def _nesterov(learning_rate: Any, *, momentum: float = 0.9, accumulator_dtype: Any = None) -> Tx:
    return optax.sgd(learning_rate, momentum, True, accumulator_dtype)


def _times_minus(rate: jax.Array) -> Tx:
    return optax.stateless_with_tree_map(lambda g, _: (-rate * g).astype(g.dtype))


def _rate_last(make: Callable[..., Tx]) -> Build:
    def build(rate: jax.Array, decay: Callable[[Any], Tx], lr_scale: Tx, options: dict[str, Any]) -> Tx:
        direction = optax.chain(make(1.0, **options), optax.scale(-1.0))
        return optax.chain(direction, decay(1.0), lr_scale, _times_minus(rate))

    return build


def _rmsprop(rate: jax.Array, decay: Callable[[Any], Tx], lr_scale: Tx, options: dict[str, Any]) -> Tx:
    ascent = optax.chain(optax.rmsprop(lambda _: rate, **options), optax.scale(-1.0), decay(rate), optax.scale(-1.0))
    return optax.chain(ascent, lr_scale)


def _adafactor(rate: jax.Array, decay: Callable[[Any], Tx], lr_scale: Tx, options: dict[str, Any]) -> Tx:
    ascent = optax.chain(optax.adafactor(lambda _: rate, **options), optax.scale(-1.0), decay(1.0), optax.scale(-1.0))
    return optax.chain(ascent, lr_scale)


def _lars(rate: jax.Array, decay: Callable[[Any], Tx], lr_scale: Tx, options: dict[str, Any]) -> Tx:
    return optax.chain(decay(1.0), optax.lars(lambda _: rate, **options), lr_scale)


def _lamb(rate: jax.Array, decay: Callable[[Any], Tx], lr_scale: Tx, options: dict[str, Any]) -> Tx:
    scaled = optax.chain(optax.scale_by_adam(**options), decay(1.0), optax.scale_by_trust_ratio())
    return optax.chain(scaled, lr_scale, _times_minus(rate))


def _schedule_free(rate: jax.Array, decay: Callable[[Any], Tx], lr_scale: Tx, options: dict[str, Any]) -> Tx:
    options = dict(options)
    scaling = optax.identity()
    if "b2" in options:
        b2, eps = options.pop("b2"), options.pop("eps")
        scaling = optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True)
    base = optax.chain(scaling, decay(1.0), lr_scale, _times_minus(rate))
    return optax.contrib.schedule_free(base, lambda _: rate, **options)


# name -> (the function whose signature lists the options, how it is built)
_OPTIMIZERS: dict[str, tuple[Callable[..., Tx], Build]] = {
    "gd": (_gd, _rate_last(_gd)),
    "sgd": (_sgd, _rate_last(_sgd)),
    "momentum": (_momentum, _rate_last(_momentum)),
    "nesterov": (_nesterov, _rate_last(_nesterov)),
    "rmsprop": (optax.rmsprop, _rmsprop),
    "adagrad": (optax.adagrad, _rate_last(optax.adagrad)),
    "adam": (optax.adam, _rate_last(optax.adam)),
    "adamw": (optax.adam, _rate_last(optax.adam)),
    "lion": (optax.lion, _rate_last(partial(optax.lion, weight_decay=0.0))),
    "lamb": (optax.lamb, _lamb),
    "lars": (optax.lars, _lars),
    "adafactor": (optax.adafactor, _adafactor),
    "muon": (optax.contrib.muon, _rate_last(optax.contrib.muon)),
    "schedule_free_sgd": (optax.contrib.schedule_free_sgd, _schedule_free),
    "schedule_free_adamw": (optax.contrib.schedule_free_adamw, _schedule_free),
}
OPTIMIZERS = tuple(_OPTIMIZERS)
"""The names that `make_optimizer` knows."""
