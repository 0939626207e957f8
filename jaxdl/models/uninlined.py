"""A function that stays a function in the program that XLA makes for a CPU."""

from collections.abc import Callable
from typing import Any

from jax import Array
from jax.experimental.xla_metadata import set_xla_metadata


def uninlined(function: Callable[..., Array], *arguments: Any) -> Array:
    """Calls a jitted function so that XLA neither merges it into its surroundings nor makes its arguments again.

    A loop that XLA fuses computes what its arguments are made of wherever it reads them: the gradient of a max-pool
    computed what comes from the norm behind it, and which pixel was the largest, four times.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> float(uninlined(jax.jit(jnp.sin), jnp.zeros(())))
      0.0
    """
    with set_xla_metadata(inlineable="false"):
        return function(*arguments)
