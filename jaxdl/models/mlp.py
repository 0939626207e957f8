"""The multi-layer perceptron."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jaxdl.models.checks import check, count_problem, counts_problem, float_problem, name_problem, rate_problem
from jaxdl.models.layers import (
    ACTIVATIONS,
    NORMS,
    ActivationFn,
    Dtype,
    NormFn,
    dropout,
    head,
    make_activation,
    make_norm,
)


class MLP(nn.Module):
    """Dense layers, each followed by norm, activation and dropout, and a linear head.

    Paths: `dense_<i>/kernel`, `dense_<i>/bias` (without a norm only), `norm_<i>/scale`, `norm_<i>/bias`,
    `head/kernel`, `head/bias`.

    Args:
      widths: outputs of each hidden layer.
      n_outputs: classes, or regression targets.
      activation: a name of `make_activation`, or a function.
      dropout_rate: of each hidden layer's output, in [0, 1).
      norm: a name of `make_norm`, or a function such as it returns.
      residual: adds a hidden layer's input to its output, from the second layer on; all widths must be equal.
      dtype: of the computation; the head computes in float32 at least.
      param_dtype: of the parameters.

    Raises:
      ModelError: fields that make no network (at construction), or inputs that are no batch of float features.

    Example:
      >>> import jax
      >>> model = MLP(widths=(16, 16), n_outputs=3, residual=True)
      >>> x = jnp.ones((2, 4))
      >>> variables = model.init(jax.random.key(0), x)
      >>> model.apply(variables, x).shape, sorted(variables["params"])
      ((2, 3), ['dense_0', 'dense_1', 'head'])
    """

    widths: Sequence[int]
    n_outputs: int
    activation: str | ActivationFn = "relu"
    dropout_rate: float = 0.0
    norm: str | NormFn = "none"
    residual: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        widths = counts_problem("widths", self.widths)
        uneven = self.residual and not widths and len(set(self.widths)) > 1
        check(
            "MLP",
            widths,
            count_problem("n_outputs", self.n_outputs),
            name_problem("activation", self.activation, ACTIVATIONS),
            rate_problem("dropout_rate", self.dropout_rate),
            name_problem("norm", self.norm, NORMS),
            f"residual=True needs equal widths, not {self.widths}; make them equal." if uneven else None,
        )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """(B, ...) float features, flattened to (B, F) -> (B, n_outputs) float32 logits."""
        flat = None if x.ndim >= 2 else f"the input has shape {x.shape}; it must be (batch, features)."
        check("MLP", flat, float_problem("features", x))
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm, activation = make_norm(self.norm), make_activation(self.activation)
        x = x.reshape(x.shape[0], math.prod(x.shape[1:])).astype(self.dtype)
        for i, width in enumerate(self.widths):
            y = nn.Dense(width, use_bias=self.norm == "none", name=f"dense_{i}", **dtypes)(x)
            y = activation(norm(y, train=train, name=f"norm_{i}", **dtypes))
            y = dropout(y, self.dropout_rate, train=train, name=f"dropout_{i}")
            x = x + y if self.residual and i > 0 else y
        return head(x, self.n_outputs, param_dtype=self.param_dtype)
