"""Optimizers by name: Optax's own, with decay, L1, L2, per-path rates and an average added in one stated order."""

import inspect
import math
from typing import Any

import jax
import optax

from jaxdl.errors import JaxdlError
from jaxdl.optim.averages import ema
from jaxdl.optim.catalog import Tx, build, options_of
from jaxdl.optim.clipping import clip_by_norm_of_all
from jaxdl.optim.learning_rate import Rate, with_learning_rate
from jaxdl.optim.regularize import add_l1, add_l2, decoupled_weight_decay, proximal_l1
from jaxdl.optim.rules import scale_by_rules
from jaxdl.paths import Rules, nearest


def make_optimizer(
    name: str = "adamw",
    *,
    learning_rate: Rate,
    weight_decay: float = 0.0,
    weight_decay_rules: Rules | None = None,
    l2: float = 0.0,
    l2_rules: Rules | None = None,
    l1: float = 0.0,
    l1_rules: Rules | None = None,
    l1_method: str = "proximal",
    clip_value: float | None = None,
    clip_norm: float | None = None,
    lr_scale_rules: Rules | None = None,
    plateau: optax.GradientTransformation | None = None,
    ema_decay: float | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Makes an optimizer. One update does this, in this order:

    1. clip each gradient entry to `[-clip_value, clip_value]`;
    2. scale the gradients to a global norm of at most `clip_norm`, which is thus the norm of the data gradient;
    3. add coupled L2 (`l2 w`) and, with `l1_method="subgradient"`, `l1 sign(w)`;
    4. the optimizer's own scaling (momentum, moments, ...);
    5. add decoupled decay, `weight_decay w`;
    6. multiply with the leaf's value in `lr_scale_rules`;
    7. multiply with minus the learning rate;
    8. with `l1_method="proximal"`, soft-threshold the new parameters by `learning_rate lr_scale l1`: exact zeros;
    9. update the moving average of the new parameters.

    `l1` and `l2` together are the elastic net. Five optimizers keep the order of their source (as Optax has it)
    between 4 and 7: LAMB decays before its trust ratio; LARS decays before its trust ratio and has the rate inside
    its momentum; RMSprop has the rate inside its momentum; Adafactor scales the rate with the parameters' RMS and
    its decay is not multiplied with the rate; schedule-free does 4 to 7 on its sequence z, then averages. There
    `lr_scale_rules` multiplies the finished update (for schedule-free: that of z). Muon orthogonalizes the 2-D
    leaves and uses Adam for the others, under one rate and one set of decay rules.

    Args:
      name: one of `jaxdl.optim.OPTIMIZERS`. `gd` and `sgd` are the same update; it is gradient descent on full batches.
      learning_rate: a number >= 0, or a schedule `update count -> rate`; `learning_rate_of` finds what was applied.
      weight_decay: strength of decoupled decay. For `adam` it is an error: decoupled it is `adamw`, coupled `l2`.
      weight_decay_rules: where it decays, and with which multiplier; None: kernels and embeddings (`DECAY_RULES`).
      l2: strength of the penalty `l2/2 sum w^2`.
      l2_rules: as `weight_decay_rules`.
      l1: strength of the penalty `l1 sum |w|`.
      l1_rules: as `weight_decay_rules`.
      l1_method: `proximal` or `subgradient`.
      clip_value: see above; > 0.
      clip_norm: see above; > 0.
      lr_scale_rules: a factor for the learning rate of each path.
      plateau: `optax.contrib.reduce_on_plateau(...)`, to scale the rate; `update` then needs `value=loss`.
      ema_decay: in [0, 1); see `ema_params` and `eval_params`.
      **options: what `options_of(name)` lists, with Optax's names and defaults.

    Returns:
      A transformation with a `LearningRateState`. `update` needs the parameters, and ignores extra arguments.

    Raises:
      JaxdlError: an unknown name or option (with the nearest), or a value out of range; all in one message.
      RuleError: from `init`, a rule list that does not fit the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = make_optimizer("sgd", learning_rate=0.5, weight_decay=0.1)
      >>> params = {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}
      >>> grads = {"kernel": jnp.array([1.0]), "bias": jnp.array([1.0])}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(updates["kernel"], updates["bias"])  # -0.5 (1 + 0.1 * 2), -0.5 * 1
      [-0.6] [-0.5]
    """
    numbers = {"weight_decay": weight_decay, "l2": l2, "l1": l1, "clip_value": clip_value, "clip_norm": clip_norm}
    problems = _rate_problems(learning_rate) + _number_problems(numbers, ema_decay)
    problems += _name_problems(name, options) + _combination_problems(name, weight_decay, l1, l1_method, ema_decay)
    if problems:
        raise JaxdlError.listing("make_optimizer", problems)
    prox = l1_method == "proximal"

    def decay(factor: Any) -> Tx:
        return decoupled_weight_decay(weight_decay * factor, weight_decay_rules) if weight_decay else optax.identity()

    def shrink(rate: jax.Array) -> Tx:
        return proximal_l1(l1, l1_rules, learning_rate=rate, lr_scale_rules=lr_scale_rules)

    def make_inner(rate: jax.Array) -> Tx:
        lr_scale = optax.identity() if lr_scale_rules is None else scale_by_rules(lr_scale_rules)
        steps = [
            optax.clip(clip_value) if clip_value else None,
            clip_by_norm_of_all(clip_norm, clip_value=clip_value) if clip_norm else None,
            add_l2(l2, l2_rules) if l2 else None,
            add_l1(l1, l1_rules) if l1 and not prox else None,
            build(name, rate, decay, lr_scale, options),
            shrink(rate) if l1 and prox else None,
            None if ema_decay is None else ema(ema_decay),
        ]
        return optax.chain(*(step for step in steps if step is not None))

    return with_learning_rate(make_inner, learning_rate, plateau=plateau)


_L1_METHODS = ("proximal", "subgradient")
_FRACTIONS = {"b1", "b2", "momentum", "decay", "beta", "adam_b1", "adam_b2"}
_NOT_NEGATIVE = {"eps", "eps_root", "adam_eps_root", "initial_scale", "initial_accumulator_value", "trust_coefficient"}


def _rate_problems(learning_rate: Any) -> list[str]:
    if callable(learning_rate) or isinstance(learning_rate, jax.Array):
        return []
    if not isinstance(learning_rate, (int, float)) or isinstance(learning_rate, bool):
        return [f"learning_rate={learning_rate!r} must be a number or a schedule (step -> rate)."]
    ok = 0 <= learning_rate < math.inf
    return [] if ok else [f"learning_rate={learning_rate!r} must be a finite number >= 0."]


def _number_problems(numbers: dict[str, float | None], ema_decay: float | None) -> list[str]:
    problems = []
    for key, value in numbers.items():
        is_clip = key.startswith("clip")
        if value is None and is_clip:
            continue
        if not isinstance(value, (int, float)) or not (value > 0 if is_clip else value >= 0) or value == math.inf:
            problems.append(f"{key}={value!r} must be a finite number {'> 0, or None' if is_clip else '>= 0'}.")
    if ema_decay is not None and not 0 <= ema_decay < 1:
        problems.append(f"ema_decay={ema_decay!r} must be in [0, 1), such as 0.999, or None.")
    return problems


def _name_problems(name: str, options: dict[str, Any]) -> list[str]:
    try:
        known = options_of(name)
    except JaxdlError as error:
        return [str(error)]
    keywords = [key for key, p in inspect.signature(make_optimizer).parameters.items() if p.kind is p.KEYWORD_ONLY]
    problems = []
    for key, value in options.items():
        if key not in known:
            near = ", ".join(nearest(key, [*known, *keywords]))
            problems.append(f"{name} has no option {key!r}; nearest: {near}.")
        elif key in _FRACTIONS and isinstance(value, (int, float)) and not 0 <= value < 1:
            problems.append(f"{key}={value!r} must be in [0, 1).")
        elif key in _NOT_NEGATIVE and isinstance(value, (int, float)) and not 0 <= value < math.inf:
            problems.append(f"{key}={value!r} must be a finite number >= 0.")
    return problems


def _combination_problems(
    name: str, weight_decay: float, l1: float, l1_method: str, ema_decay: float | None
) -> list[str]:
    problems = []
    if l1_method not in _L1_METHODS:
        problems.append(
            f"there is no l1_method {l1_method!r}; nearest: {', '.join(nearest(str(l1_method), _L1_METHODS))}."
        )
    if name == "adam" and weight_decay:
        problems.append("adam has no weight_decay: use name='adamw' for decoupled decay, or l2= for coupled L2.")
    if str(name).startswith("schedule_free"):
        if ema_decay is not None:
            problems.append(f"{name} keeps its own average (see eval_params); leave ema_decay out.")
        if l1 and l1_method == "proximal":
            problems.append(f"{name} cannot threshold its average; use l1_method='subgradient'.")
    return problems
