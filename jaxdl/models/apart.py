"""What XLA computes by itself on a GPU, so that cuBLAS does not add to it what the next pass adds for nothing.

cuBLAS adds a bias as it multiplies, at no cost where it writes little. A residual it adds to a copy that XLA makes of
it, and the bias of the wide half of a feed-forward network costs a seventh of the product; the sums of a norm and the
activation, which come next, read both anyway.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxdl.models.product import product


def apart(x: Array) -> Array:
    """`x`; bfloat16 and float16 on a GPU behind a barrier that its gradient does not have.

    Example:
      >>> apart(jnp.ones(2)).tolist()
      [1.0, 1.0]
    """
    is_low = x.dtype in (jnp.bfloat16, jnp.float16)
    return _barred(x) if is_low and jax.default_backend() == "gpu" else x


def product_apart(inputs: Array, kernel_DF: Array, *args: Any, **options: Any) -> Array:
    """As `product`, `apart` from the bias."""
    return apart(product(inputs, kernel_DF, *args, **options))


@jax.custom_jvp
def _barred(x: Array) -> Array:
    return jax.lax.optimization_barrier(x)


@_barred.defjvp
def _barred_jvp(primals: tuple[Array], tangents: tuple[Any]) -> tuple[Array, Any]:
    return _barred(*primals), tangents[0]
