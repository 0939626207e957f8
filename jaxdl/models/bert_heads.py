"""The heads of the BERT family, and the check of its ids.

Dimensions: `B` batch, `T` time, `D` width, `V` vocabulary, `N` outputs.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdl.models.block import Block, Norm
from jaxdl.models.embedding import padded_size
from jaxdl.models.layers import Dtype, make_activation
from jaxdl.models.product import product

POOLINGS = ("mean", "first")


def dense(block: Block, features: int, *, dtype: Dtype, name: str) -> nn.Dense:
    """A linear layer with the block's initial spread and parameter dtype."""
    init = nn.initializers.normal(block.init_std)
    dtypes = {"dtype": dtype, "param_dtype": block.param_dtype}
    return nn.Dense(features, kernel_init=init, dot_general=product, name=name, **dtypes)


class Classifier(nn.Module):
    """A dense layer, an activation and a linear layer: RoBERTa's ("tanh") or DistilBERT's ("relu") classifier.

    Paths: `dense/{kernel,bias}`, `output/{kernel,bias}`.
    """

    block: Block
    n_outputs: int
    activation: str
    dropout_rate: float

    @nn.compact
    def __call__(self, x_BD: Array, *, train: bool = False) -> Array:
        drop = nn.Dropout(self.dropout_rate, deterministic=not train, name="dropout")
        x_BD = drop(x_BD) if self.activation == "tanh" else x_BD
        x_BD = dense(self.block, self.block.width, dtype=self.block.dtype, name="dense")(x_BD)
        x_BD = drop(make_activation(self.activation)(x_BD))
        dtype = jnp.promote_types(x_BD.dtype, jnp.float32)
        return dense(self.block, self.n_outputs, dtype=dtype, name="output")(x_BD)


class MaskedLM(nn.Module):
    """What stands between hidden states and the tied embedding: dense, activation, norm; and a bias a token.

    Paths: `dense/{kernel,bias}`, `norm/{scale,bias}`, `bias` (padded V), whose rows beyond V are never read nor moved.
    """

    block: Block
    vocab_size: int

    def setup(self) -> None:
        self.dense = dense(self.block, self.block.width, dtype=self.block.dtype, name="dense")
        self.norm = Norm(self.block, name="norm")
        self.bias = self.param("bias", nn.initializers.zeros, (padded_size(self.vocab_size),), self.block.param_dtype)

    def __call__(self, x: Array) -> Array:
        """(..., D) -> (..., D)."""
        return self.norm(make_activation(self.block.activation)(self.dense(x)))

    def add_bias(self, logits: Array) -> Array:
        """Adds the bias of each token to (..., V) logits."""
        bias = self.bias[: self.vocab_size].astype(logits.dtype)
        return logits + bias.reshape((1,) * (logits.ndim - 1) + bias.shape)


def embed_rows(hidden_BTD: Array, mask: Array | None, *, pooling: str, is_normalized: bool) -> Array:
    """One vector a row out of its hidden states (Reimers & Gurevych 2019), in float32 at least.

    Args:
      hidden_BTD: (B, T, D).
      mask: (B, T), 0 for padding; None where all tokens are real.
      pooling: "mean" over real tokens, 0 for a row without any; or the "first" token.
      is_normalized: divided by the Euclidean length.

    Returns:
      (B, D).

    Example:
      >>> x = jnp.array([[[3.0, 0.0], [3.0, 8.0], [9.0, 9.0]]])
      >>> embed_rows(x, jnp.array([[1, 1, 0]]), pooling="mean", is_normalized=True).round(3).tolist()
      [[0.6000000238418579, 0.800000011920929]]
    """
    hidden_BTD = hidden_BTD.astype(jnp.promote_types(hidden_BTD.dtype, jnp.float32))
    if pooling == "first":
        x_BD = hidden_BTD[:, 0]
    elif mask is None:
        x_BD = hidden_BTD.mean(axis=1)
    else:
        weight_BT1 = mask.astype(hidden_BTD.dtype)[..., None]
        x_BD = (hidden_BTD * weight_BT1).sum(1) / jnp.maximum(weight_BT1.sum(1), 1.0)
    if not is_normalized:
        return x_BD
    return x_BD * jax.lax.rsqrt(jnp.maximum((x_BD * x_BD).sum(axis=-1, keepdims=True), 1e-24))


def ids_problem(name: str, ids: Array, n: int, field: str) -> str | None:
    """None, or what is wrong with ids whose values are known; inside `jit` they are not, and pass.

    Example:
      >>> ids_problem("tokens", jnp.array([[3, 9]]), 5, "vocab_size")
      'tokens run from 3 to 9; with vocab_size=5 they must lie in 0 to 4.'
    """
    is_hidden = isinstance(ids, jax.core.Tracer) or (isinstance(ids, jax.Array) and not ids.is_fully_addressable)
    if is_hidden or ids.size == 0 or not jnp.issubdtype(ids.dtype, jnp.integer):
        return None
    values = np.asarray(ids)  # under jit, jnp's minimum of known values would be an unknown one
    least, most = values.min(), values.max()
    rule = f"they must lie in 0 to {n - 1}"
    return None if least >= 0 and most < n else f"{name} run from {least} to {most}; with {field}={n} {rule}."
