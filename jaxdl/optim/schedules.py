"""Learning-rate schedules by name: a warm-up, then a decay, out of Optax's schedule functions."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import optax

from jaxdl.errors import JaxdlError
from jaxdl.paths import nearest


def make_schedule(
    name: str = "cosine", *, peak: float, steps: int, warmup_steps: int = 0, end: float = 0.0, **options: Any
) -> optax.Schedule:
    """Makes a schedule `step -> rate`: a linear warm-up from 0, then the decay that `name` says.

    With t = (step - warmup_steps) / (steps - warmup_steps), the rate after the warm-up is

        constant      peak                                              (`end` must not be given)
        cosine        end + (peak - end) (1 + cos(pi t)) / 2            Loshchilov and Hutter, 2017
        linear        peak + (end - peak) t
        exponential   peak (end / peak)^t                               (`end` > 0)
        polynomial    end + (peak - end) (1 - t)^power                  power=2.0
        one_cycle     as cosine; its rise is a half cosine too,         div_factor=25.0; Smith and Topin, 2018
                      from peak / div_factor; `warmup_steps=0` gives the rise 30 % of the steps

    The rate is `peak` at step `warmup_steps`, `end` at step `steps`, and stays there. Steps are optimizer updates,
    counted from 0, so that the first update of a warm-up has rate 0. For a rate that reacts to the loss see
    `plateau` of `make_optimizer`.

    Args:
      name: one of `SCHEDULES`.
      peak: the highest rate, > 0.
      steps: the length of the run, warm-up included, >= 1.
      warmup_steps: the length of the rise, at most `steps`.
      end: the last rate, >= 0.
      **options: see the table.

    Returns:
      A function from a step (int or integer array) to a float scalar.

    Raises:
      JaxdlError: an unknown name or option (with the nearest), or a value out of range; all in one message.

    Example:
      >>> rate = make_schedule("linear", peak=1.0, steps=10, warmup_steps=2)
      >>> print(*(float(rate(step)) for step in (0, 1, 2, 6, 10, 99)))
      0.0 0.5 1.0 0.5 0.0 0.0
    """
    problems = _problems(name, peak, steps, warmup_steps, end, options)
    if problems:
        raise JaxdlError.listing("make_schedule", problems)
    if name == "one_cycle":
        return _one_cycle(peak, steps, warmup_steps, end, **options)
    decay = _DECAYS[name](peak, max(1, steps - warmup_steps), end, **options)
    if warmup_steps == 0:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), decay], [warmup_steps])


def _constant(peak: float, steps: int, end: float) -> optax.Schedule:
    return optax.constant_schedule(peak)


def _cosine(peak: float, steps: int, end: float) -> optax.Schedule:
    return optax.cosine_decay_schedule(peak, steps, alpha=end / peak)


def _linear(peak: float, steps: int, end: float) -> optax.Schedule:
    return optax.linear_schedule(peak, end, steps)


def _exponential(peak: float, steps: int, end: float) -> optax.Schedule:
    if end == peak:
        return optax.constant_schedule(peak)
    return optax.exponential_decay(peak, steps, decay_rate=end / peak, end_value=end)


def _polynomial(peak: float, steps: int, end: float, *, power: float = 2.0) -> optax.Schedule:
    return optax.polynomial_schedule(peak, end, power, steps)


def _one_cycle(peak: float, steps: int, warmup_steps: int, end: float, *, div_factor: float = 25.0) -> optax.Schedule:
    # Optax truncates pct_start * steps; the half step keeps rounding from shortening the rise by one.
    steps = max(steps, warmup_steps + 1)
    pct_start = (warmup_steps + 0.5) / steps if warmup_steps else 0.3
    final = peak / (div_factor * end) if end else math.inf
    return optax.cosine_onecycle_schedule(steps, peak, pct_start, div_factor, final)


_DECAYS: dict[str, Callable[..., optax.Schedule]] = {
    "constant": _constant,
    "cosine": _cosine,
    "linear": _linear,
    "exponential": _exponential,
    "polynomial": _polynomial,
    "one_cycle": _one_cycle,
}
SCHEDULES = tuple(_DECAYS)
"""The names that `make_schedule` knows."""


def _problems(name: str, peak: float, steps: int, warmup_steps: int, end: float, options: dict[str, Any]) -> list[str]:
    problems = []
    if not _is_number(peak) or not 0 < peak < math.inf:
        problems.append(f"peak={peak!r} must be a finite number > 0.")
    if not _is_number(end) or not 0 <= end < math.inf:
        problems.append(f"end={end!r} must be a finite number >= 0.")
    problems += _step_problems(steps, warmup_steps)
    if name == "constant" and end != 0.0:
        problems.append(f"end={end!r} has no meaning for a constant schedule; leave it out or use 'linear'.")
    if name == "exponential" and end == 0.0:
        problems.append("end=0.0 is never reached by an exponential; give an end > 0, such as peak / 100.")
    if name not in SCHEDULES:
        return [*problems, f"there is no schedule {name!r}; nearest: {', '.join(nearest(name, SCHEDULES))}."]
    return problems + _option_problems(name, options)


def _step_problems(steps: int, warmup_steps: int) -> list[str]:
    problems = []
    if not _is_count(steps) or steps < 1:
        problems.append(f"steps={steps!r} must be a whole number >= 1.")
    if not _is_count(warmup_steps) or warmup_steps < 0:
        problems.append(f"warmup_steps={warmup_steps!r} must be a whole number >= 0.")
    if not problems and warmup_steps > steps:
        problems.append(f"warmup_steps={warmup_steps} is longer than steps={steps}; the peak would never be reached.")
    return problems


def _option_problems(name: str, options: dict[str, Any]) -> list[str]:
    parameters = inspect.signature(_DECAYS[name]).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    problems = []
    for option, value in options.items():
        if option not in known:
            near = ", ".join(nearest(option, [*known, "warmup_steps", "steps", "peak", "end"]))
            problems.append(f"schedule {name!r} has no option {option!r}; nearest: {near}.")
        elif not _is_number(value) or not 0 < value < math.inf:
            problems.append(f"{option}={value!r} must be a finite number > 0.")
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
