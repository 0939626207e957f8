"""Flash attention of NVIDIA's cuDNN, in the shapes that JAX's binding of it takes.

Dimensions: `B` batch, `T` query time, `S` key time, `H` query heads, `G` key/value heads, `K` head size.
"""

import jax
import jax.numpy as jnp
from jax import Array


def cudnn_attention(
    query_BTHK: Array,
    key_BSGK: Array,
    value_BSGK: Array,
    *,
    mask: Array | None,
    bias: Array | None,
    scale: float,
    is_causal: bool,
    lengths: Array | None = None,
) -> Array:
    """Softmax attention as `attention.attend` defines it, of bfloat16 or float16 on an NVIDIA GPU.

    The binding refuses a mask that is broadcast over queries (jax-ml/jax#28974), and in training an odd number of
    tokens: those get one more, which nobody sees.

    Args:
      query_BTHK, key_BSGK, value_BSGK: H is a multiple of G; K a multiple of 8 up to 128.
      mask: (B or 1, 1, T or 1, S) bool, True where a query sees a key.
      bias: (B or 1, H or 1, T or 1, S), added to the scaled scores.
      scale: factor of the scores.
      is_causal: what lies ahead is hidden, and cuDNN leaves that work out.
      lengths: (B,) int, the keys of each row that are real, the first ones; None: all.

    Returns:
      (B, T, H, K), the dtype of the values.
    """
    T, S = query_BTHK.shape[1], key_BSGK.shape[1]
    more_T, more_S = T % 2, S % 2
    if more_S and mask is None and lengths is None and not is_causal:
        lengths = jnp.full(len(query_BTHK), S, jnp.int32)
    out_BTHK = jax.nn.dot_product_attention(
        _lengthened(query_BTHK, more_T),
        _lengthened(key_BSGK, more_S),
        _lengthened(value_BSGK, more_S),
        bias=_of_pairs(bias, T, S, more_T, more_S),
        mask=_of_pairs(mask, T, S, more_T, more_S),
        scale=scale,
        is_causal=is_causal,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return out_BTHK[:, :T] if more_T else out_BTHK


def _lengthened(x_BTHK: Array, n: int) -> Array:
    return jnp.pad(x_BTHK, ((0, 0), (0, n), (0, 0), (0, 0))) if n else x_BTHK


def _of_pairs(x: Array | None, T: int, S: int, more_T: int, more_S: int) -> Array | None:
    """A mask or a bias with the axes T and S in full; in a mask, what was added is False."""
    if x is None:
        return None
    whole = jnp.broadcast_to(x, (*x.shape[:2], T, S))
    return jnp.pad(whole, ((0, 0), (0, 0), (0, more_T), (0, more_S))) if more_T or more_S else whole
