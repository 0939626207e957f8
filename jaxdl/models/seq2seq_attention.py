"""What a decoder attends to, and how: additive and multiplicative scores over the outputs of an encoder.

Dimensions: `B` batch, `S` source time, `T` target time, `D` width of the queries, `E` width of the values.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jaxdl.models.layers import Dtype


class AdditiveAttention(nn.Module):
    """Scores `v . tanh(W q + U k + b)` (Bahdanau et al. 2015, appendix A.1.2).

    All scores of a batch take `B T S D` values at once. Paths: `query/kernel`, `key/{kernel,bias}`, `score/kernel`.

    Args:
      width: of the hidden layer.
      dtype: of the computation.
      param_dtype: of the parameters.

    Example:
      >>> import jax
      >>> attention = AdditiveAttention(4)
      >>> q, values = jnp.ones((2, 3, 4)), jnp.ones((2, 5, 6))
      >>> scores, variables = attention.init_with_output(jax.random.key(0), q, values)
      >>> scores.shape, sorted(variables["params"])
      ((2, 3, 5), ['key', 'query', 'score'])
    """

    width: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        kw: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.query = nn.Dense(self.width, use_bias=False, **kw)
        self.key = nn.Dense(self.width, **kw)
        self.score = nn.Dense(1, use_bias=False, **kw)

    def keys(self, values_BSE: Array) -> Array:
        """What is computed once a source: (B, S, width)."""
        return self.key(values_BSE)

    def scores(self, query_BTD: Array, keys_BSD: Array) -> Array:
        """(B, T, S), before the softmax."""
        return self.score(jnp.tanh(self.query(query_BTD)[:, :, None] + keys_BSD[:, None]))[..., 0]

    def __call__(self, query_BTD: Array, values_BSE: Array) -> Array:
        """(B, T, D) queries and (B, S, E) encoder outputs -> (B, T, S) scores."""
        return self.scores(query_BTD, self.keys(values_BSE))


class MultiplicativeAttention(nn.Module):
    """Scores `q . U k`, the "general" form of Luong et al. 2015, equation 8. Path: `key/kernel`.

    Args:
      width: of the queries.
      dtype: of the computation.
      param_dtype: of the parameters.

    Example:
      >>> import jax
      >>> attention = MultiplicativeAttention(4)
      >>> attention.init_with_output(jax.random.key(0), jnp.ones((2, 3, 4)), jnp.ones((2, 5, 6)))[0].shape
      (2, 3, 5)
    """

    width: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        self.key = nn.Dense(self.width, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)

    def keys(self, values_BSE: Array) -> Array:
        """What is computed once a source: (B, S, width)."""
        return self.key(values_BSE)

    def scores(self, query_BTD: Array, keys_BSD: Array) -> Array:
        """(B, T, S), before the softmax."""
        return query_BTD @ jnp.swapaxes(keys_BSD, 1, 2)

    def __call__(self, query_BTD: Array, values_BSE: Array) -> Array:
        """(B, T, D) queries and (B, S, E) encoder outputs -> (B, T, S) scores."""
        return self.scores(query_BTD, self.keys(values_BSE))


ATTENTIONS: dict[str, Callable[..., Any]] = {"additive": AdditiveAttention, "multiplicative": MultiplicativeAttention}


class Memory(NamedTuple):
    """What the decoder sees of a source.

    Attributes:
      keys: (B, S, D) for the scores.
      values: (B, S, E) the encoder's outputs.
      mask: (B, S) bool, or None.
    """

    keys: Array
    values: Array
    mask: Array | None


def attend(scores_BTS: Array, memory: Memory) -> tuple[Array, Array]:
    """The mean of the values under the softmax of the scores; padding has weight exactly 0.

    Args:
      scores_BTS: (B, T, S) float.
      memory: values and mask of the source.

    Returns:
      `(context_BTE, weights_BTS)`.

    Example:
      >>> memory = Memory(jnp.zeros((1, 2, 1)), jnp.array([[[1.0], [5.0]]]), jnp.array([[True, False]]))
      >>> [x.tolist() for x in attend(jnp.zeros((1, 1, 2)), memory)]
      [[[[1.0]]], [[[1.0, 0.0]]]]
    """
    dtype = jnp.promote_types(scores_BTS.dtype, jnp.float32)
    scores_BTS = scores_BTS.astype(dtype)
    if memory.mask is not None:
        scores_BTS = jnp.where(memory.mask[:, None], scores_BTS, jnp.finfo(dtype).min)
    weights_BTS = nn.softmax(scores_BTS)
    return weights_BTS.astype(memory.values.dtype) @ memory.values, weights_BTS
