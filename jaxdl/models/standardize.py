"""What layer and RMS norms do before they scale."""

import jax
import jax.numpy as jnp
from jax import Array


def standardized(x: Array, epsilon: float, *, is_centered: bool) -> Array:
    """The last axis with mean square 1 (Zhang & Sennrich 2019) and, if centered, mean 0 (Ba et al. 2016).

    Args:
      x: (..., D) float.
      epsilon: added to the mean square.
      is_centered: subtract the mean.

    Returns:
      (..., D) float32, or x's dtype if that is wider.

    Example:
      >>> standardized(jnp.array([1.0, 3.0]), 0.0, is_centered=True).tolist()
      [-1.0, 1.0]
    """
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if jax.default_backend() == "gpu" and x.dtype in (jnp.bfloat16, jnp.float16):
        return _by_statistics(y, epsilon, is_centered)
    if is_centered:
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    return y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)


def _by_statistics(y: Array, epsilon: float, is_centered: bool) -> Array:
    """The statistics are arrays of their own here: XLA then sums the gradient of a scale in the pass that makes the
    input's, and writes no standardized array for it. Both come of one pass: what a difference of float32 loses where
    the mean is many deviations from 0, an input of half precision has lost before.
    """
    mean = jnp.mean(y, axis=-1, keepdims=True) if is_centered else jnp.zeros_like(y[..., :1])
    variance = jnp.mean(y * y, axis=-1, keepdims=True) - mean * mean
    rate = jax.lax.rsqrt(jnp.maximum(variance, 0.0) + epsilon)
    mean, rate = jax.lax.optimization_barrier((mean, rate))
    return (y - mean) * rate
