"""The product of a linear layer, in the form whose gradient is fast on a CPU.

Dimensions: `D` inputs, `F` outputs; `...` stands for any leading axes, such as batch and time.
"""

from typing import Any

import jax
from jax import Array


def product(inputs: Array, kernel_DF: Array, dimension_numbers: Any = None, **options: Any) -> Array:
    """Inputs (..., D) times a kernel (D, F); give it to Flax as `nn.Dense(..., dot_general=product)`.

    On a CPU the leading axes are merged into one: XLA's gradient of a kernel over batch and time runs at 53 to 71
    GFLOP/s, the same sum over one axis at 80 to 96. Elsewhere it is `jax.lax.dot_general`.

    Args:
      inputs: (..., D).
      kernel_DF: (D, F).
      dimension_numbers: as of `jax.lax.dot_general`; None for the last axis of the inputs and the first of the kernel.
      options: of `jax.lax.dot_general`, such as `precision`.

    Returns:
      (..., F).

    Example:
      >>> import jax.numpy as jnp
      >>> product(jnp.ones((2, 5, 3)), jnp.ones((3, 4))).shape
      (2, 5, 4)
    """
    usual = (((inputs.ndim - 1,), (0,)), ((), ()))
    numbers = usual if dimension_numbers is None else dimension_numbers
    is_long = jax.sharding.get_abstract_mesh().shape.get("sequence", 1) > 1  # merged, time cannot be cut over devices
    is_merged = numbers == usual and inputs.ndim > 2 and kernel_DF.ndim == 2 and jax.default_backend() == "cpu"
    is_merged = is_merged and not is_long
    rows = inputs.reshape(-1, inputs.shape[-1]) if is_merged else inputs
    out = jax.lax.dot_general(rows, kernel_DF, (((1,), (0,)), ((), ())) if is_merged else numbers, **options)
    return out.reshape(*inputs.shape[:-1], kernel_DF.shape[1]) if is_merged else out
