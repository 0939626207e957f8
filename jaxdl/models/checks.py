"""What a model refuses, before anything is compiled: one ModelError that lists every problem."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxdl.errors import JaxdlError
from jaxdl.paths import nearest


class ModelError(JaxdlError):
    """The fields of a model, or the shape of its input, make no network; the message lists every problem."""


def check(title: str, *problems: str | None) -> None:
    """Raises one ModelError with all problems that are not None.

    Example:
      >>> check("MLP", None, rate_problem("dropout_rate", 1.5))
      Traceback (most recent call last):
      jaxdl.models.checks.ModelError: MLP: 1 problem(s)
        - dropout_rate=1.5 must be in [0, 1).
    """
    found = [problem for problem in problems if problem]
    if found:
        raise ModelError.listing(title, found)


def count_problem(name: str, value: Any, *, least: int = 1) -> str | None:
    """None, or what is wrong with one whole number.

    Example:
      >>> count_problem("n_outputs", 0)
      'n_outputs=0 must be a whole number of at least 1.'
    """
    is_fine = isinstance(value, int) and not isinstance(value, bool) and value >= least
    return None if is_fine else f"{name}={value!r} must be a whole number of at least {least}."


def counts_problem(name: str, values: Sequence[Any]) -> str | None:
    """None, or what is wrong with a non-empty list of positive whole numbers.

    Example:
      >>> counts_problem("widths", ())
      'widths=() is empty; give one whole number of at least 1 for each layer or stage, such as (64,).'
    """
    is_fine = isinstance(values, Sequence) and len(values) > 0 and not any(count_problem(name, v) for v in values)
    what = "is empty" if isinstance(values, Sequence) and len(values) == 0 else "is no list of sizes"
    rule = "give one whole number of at least 1 for each layer or stage, such as (64,)."
    return None if is_fine else f"{name}={values!r} {what}; {rule}"


def rate_problem(name: str, rate: float) -> str | None:
    """None, or what is wrong with a dropout rate.

    Example:
      >>> rate_problem("dropout_rate", -0.1)
      'dropout_rate=-0.1 must be in [0, 1).'
    """
    return None if 0 <= rate < 1 else f"{name}={rate} must be in [0, 1)."


def name_problem(field: str, value: Any, known: Iterable[str]) -> str | None:
    """None for a known name or a function; else the nearest names.

    Example:
      >>> name_problem("norm", "bacth", ["batch", "group", "none"])
      "norm='bacth' is unknown; did you mean 'batch', 'none' or 'group'?"
    """
    if callable(value) or value in (known := list(known)):
        return None
    *first, last = [repr(name) for name in nearest(str(value), known)]
    near = f"{', '.join(first)} or {last}" if first else last
    return f"{field}={value!r} is unknown; did you mean {near}?"


def check_images(title: str, x: Array, *, least: int = 1) -> None:
    """Refuses what is no batch of float images with at least `least` pixels on a side.

    Raises:
      ModelError: a rank other than 4, integer pixels, or images that the strides would shrink to nothing.

    Example:
      >>> check_images("CNN", jnp.zeros((2, 4, 4, 1), jnp.uint8), least=8)
      Traceback (most recent call last):
      jaxdl.models.checks.ModelError: CNN: 2 problem(s)
        - pixels are uint8; scale them to floats first, as in x.astype(jnp.float32) / 255.
        - images of 4 x 4 are too small: this network halves them to nothing below 8 x 8; use fewer stages.
    """
    if x.ndim != 4:
        check(title, f"the input has shape {x.shape}; it must be (batch, height, width, channels).")
    height, width = x.shape[1:3]
    small = f"images of {height} x {width} are too small: this network halves them to nothing below {least} x {least}"
    check(title, float_problem("pixels", x), f"{small}; use fewer stages." if min(height, width) < least else None)


def float_problem(what: str, x: Array) -> str | None:
    """None, or the remedy for an input of whole numbers.

    Example:
      >>> float_problem("features", jnp.zeros(3))
    """
    remedy = "scale them to floats first, as in x.astype(jnp.float32) / 255."
    return None if jnp.issubdtype(x.dtype, jnp.floating) else f"{what} are {x.dtype}; {remedy}"
