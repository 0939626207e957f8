"""GELU of bfloat16 and float16 on a GPU, where it costs as much as is read and written.

XLA keeps what is dear to compute, such as a tanh that value and gradient share, as a third array beside input and
output. Here the gradient is computed from the input alone, by another formula of the same function (`erf` of `-x`, the
logistic of `-x`), so that nothing is shared. All is computed in float32: in bfloat16 a cube has two digits.
"""

from collections.abc import Callable
from math import pi, sqrt
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Formula = Callable[[Array], Array]


def _from_input(value: Formula, slope: Formula) -> Formula:
    @jax.custom_jvp
    def activation(x: Array) -> Array:
        return value(x.astype(jnp.float32)).astype(x.dtype)

    @activation.defjvp
    def of_change(primals: tuple[Array], tangents: tuple[Any]) -> tuple[Array, Array]:
        (x,), (change,) = primals, tangents
        return activation(x), (slope(x.astype(jnp.float32)) * change).astype(x.dtype)

    return activation


def _cubic(x: Array) -> Array:
    return sqrt(2 / pi) * (x + 0.044715 * x**3)


def _slope_of_gelu_tanh(x: Array) -> Array:
    """`gelu_tanh(x) = x sigmoid(2 cubic(x))`."""
    share = jax.nn.sigmoid(2 * _cubic(x))
    return share + x * share * (1 - share) * 2 * sqrt(2 / pi) * (1 + 3 * 0.044715 * x**2)


def _slope_of_gelu(x: Array) -> Array:
    return 0.5 - 0.5 * jax.lax.erf(x * -sqrt(0.5)) + x * jnp.exp(-0.5 * x**2) / sqrt(2 * pi)


gelu = _from_input(lambda x: 0.5 * x * (1 + jax.lax.erf(x * sqrt(0.5))), _slope_of_gelu)
gelu_tanh = _from_input(lambda x: x - x * jax.nn.sigmoid(-2 * _cubic(x)), _slope_of_gelu_tanh)
