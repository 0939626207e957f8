"""How a network knows the order of its tokens: rotary, sinusoidal, relative and ALiBi positions.

Dimensions: `B` batch, `T` query time, `S` key time, `H` heads, `K` head size, `D` width.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021).

    Attributes:
      theta: base of the wavelengths.
      factor: the context is stretched by this factor; 1 leaves the wavelengths alone.
      kind: "linear" divides every frequency by `factor`; "llama3" divides the low ones, and blends between
        `low_frequency` and `high_frequency` (wavelengths as parts of `original_length`), as Llama 3.1 does.
      low_frequency, high_frequency, original_length: of the kind "llama3".
    """

    theta: float = 10_000.0
    factor: float = 1.0
    kind: str = "linear"
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_length: int = 8192

    def frequencies(self, head_size: int) -> np.ndarray:
        """Radians a position, (head_size // 2,) float64.

        Example:
          >>> Rotary().frequencies(4).tolist()
          [1.0, 0.01]
        """
        plain = 1.0 / self.theta ** (np.arange(0, head_size, 2) / head_size)
        if self.kind == "linear":
            return plain / self.factor
        turns = self.original_length * plain / (2 * math.pi)  # over the original context
        share = np.clip((turns - self.low_frequency) / (self.high_frequency - self.low_frequency), 0.0, 1.0)
        return share * plain + (1.0 - share) * plain / self.factor


def rotate(x_BTHK: Array, positions_BT: Array, rotary: Rotary) -> Array:
    """Turns each pair `(x[i], x[i + K/2])` by an angle that grows with the position.

    Args:
      x_BTHK: queries or keys, K even.
      positions_BT: int; B may be 1.
      rotary: the wavelengths.

    Returns:
      The shape and dtype of `x_BTHK`.

    Example:
      >>> x = jnp.ones((1, 2, 1, 2))
      >>> rotate(x, jnp.array([[0, 1]]), Rotary())[0, :, 0].round(3).tolist()
      [[1.0, 1.0], [-0.30100002884864807, 1.3820000886917114]]
    """
    dtype = jnp.promote_types(x_BTHK.dtype, jnp.float32)
    frequencies = jnp.asarray(rotary.frequencies(x_BTHK.shape[-1]), dtype)
    angle_BTK = positions_BT[..., None].astype(dtype) * frequencies.reshape(1, 1, -1)
    cos, sin = jnp.cos(angle_BTK)[:, :, None], jnp.sin(angle_BTK)[:, :, None]
    first, second = jnp.split(x_BTHK.astype(dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTHK.dtype)


def sinusoids(length: int, width: int) -> np.ndarray:
    """The fixed positions of Vaswani et al. 2017, section 3.5, sines first, then cosines.

    Returns:
      (length, width) float32; the width must be even.

    Example:
      >>> sinusoids(2, 4).round(2).tolist()
      [[0.0, 0.0, 1.0, 1.0], [0.8399999737739563, 0.009999999776482582, 0.5400000214576721, 1.0]]
    """
    angle = np.arange(length)[:, None] / 10_000 ** (np.arange(0, width, 2) / width)[None]
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def alibi_slopes(n_heads: int) -> np.ndarray:
    """The slopes of ALiBi (Press et al. 2022): a geometric series for a power of two, interleaved otherwise.

    Returns:
      (n_heads,) float32.

    Example:
      >>> alibi_slopes(4).tolist()
      [0.25, 0.0625, 0.015625, 0.00390625]
    """
    nearest = 2 ** math.floor(math.log2(n_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / nearest) for i in range(nearest)]
    more = [2.0 ** (-8.0 * (i + 1) / (2 * nearest)) for i in range(0, 2 * (n_heads - nearest), 2)]
    return np.array(slopes + more, np.float32)


def distances(query_slots_T: Array, key_slots_S: Array) -> Array:
    """How far each query stands behind each key: (T, S) int, negative where the key comes later.

    Example:
      >>> distances(jnp.arange(2), jnp.arange(3)).tolist()
      [[0, -1, -2], [1, 0, -1]]
    """
    return query_slots_T[:, None] - key_slots_S[None, :]


def relative_buckets(distance_TS: Array, *, n_buckets: int, max_distance: int, is_causal: bool) -> Array:
    """The buckets of T5's relative positions (Raffel et al. 2020): exact when near, logarithmic when far.

    Args:
      distance_TS: (T, S) int, of `distances`.
      n_buckets: of both directions together.
      max_distance: from here on all distances share the last bucket.
      is_causal: only keys at or before the query have buckets of their own.

    Returns:
      (T, S) int32 in [0, n_buckets).

    Example:
      >>> relative_buckets(jnp.array([[0, 1, 200, -1]]), n_buckets=32, max_distance=128, is_causal=False).tolist()
      [[0, 1, 15, 17]]
    """
    later = jnp.zeros_like(distance_TS)
    if is_causal:
        distance_TS = jnp.maximum(distance_TS, 0)
    else:
        n_buckets //= 2
        later = jnp.where(distance_TS < 0, n_buckets, 0)
        distance_TS = jnp.abs(distance_TS)
    exact = n_buckets // 2
    far = jnp.log(jnp.maximum(distance_TS, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    far = jnp.minimum(exact + (far * (n_buckets - exact)).astype(jnp.int32), n_buckets - 1)
    return (later + jnp.where(distance_TS < exact, distance_TS, far)).astype(jnp.int32)
