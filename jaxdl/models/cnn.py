"""A small convolutional network that is cheap enough to train on a laptop's CPU."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jaxdl.models.checks import check, check_images, count_problem, counts_problem, name_problem, rate_problem
from jaxdl.models.layers import (
    ACTIVATIONS,
    NORMS,
    ActivationFn,
    Dtype,
    NormFn,
    conv,
    dropout,
    head,
    make_activation,
    make_norm,
)
from jaxdl.models.pooling import max_pool

_POOLS = ("max", "mean")
_REDUCES = ("mean", "max", "flatten")


class CNN(nn.Module):
    """Stages of 3x3 convolutions that halve the image, then one vector per image, an optional dense layer, a head.

    A stage is `conv, pool, norm, activation`, then `conv, norm, activation` for each further convolution. Pooling
    directly after a stage's first convolution leaves the norm, the activation and the further convolutions a quarter
    of the pixels: two convolutions a stage of (32, 64, 128) cost 25 MFLOP a 28x28 image forward, against 58 with the
    pooling at the stage's end, and the narrow first layer is the only one to see full resolution.

    Paths: `stage_<i>/conv_<j>/kernel`, `stage_<i>/norm_<j>/scale`, ..., `dense/kernel`, `head/kernel`, `head/bias`.

    Args:
      n_outputs: classes, or regression targets.
      features: channels of each stage; (32, 64) suits 8x8 digits, (32, 64, 128) 28x28 clothes.
      convs_per_stage: convolutions in each stage.
      norm: a name of `make_norm`, or a function such as it returns.
      activation: a name of `make_activation`, or a function.
      pool: "max" or "mean", over 2x2 pixels; the last row or column of an odd size is dropped.
      reduce: how the last stage becomes a vector: "mean" or "max" over its pixels, or "flatten".
      dense_width: outputs of the dense layer before the head, with the activation; 0 for none.
      dropout_rate: of the head's input, in [0, 1).
      dtype: of the computation; the head computes in float32 at least.
      param_dtype: of the parameters.

    Raises:
      ModelError: fields that make no network (at construction), or inputs that are no float images or too small.

    Example:
      >>> import jax
      >>> model = CNN(n_outputs=10, features=(8, 16))
      >>> x = jnp.ones((2, 8, 8, 1))
      >>> logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
      >>> logits.shape, variables["params"]["stage_1"]["conv_0"]["kernel"].shape
      ((2, 10), (3, 3, 8, 16))
    """

    n_outputs: int
    features: Sequence[int] = (32, 64, 128)
    convs_per_stage: int = 2
    norm: str | NormFn = "group"
    activation: str | ActivationFn = "relu"
    pool: str = "max"
    reduce: str = "mean"
    dense_width: int = 0
    dropout_rate: float = 0.0
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        check(
            "CNN",
            count_problem("n_outputs", self.n_outputs),
            counts_problem("features", self.features),
            count_problem("convs_per_stage", self.convs_per_stage),
            name_problem("norm", self.norm, NORMS),
            name_problem("activation", self.activation, ACTIVATIONS),
            name_problem("pool", self.pool, _POOLS),
            name_problem("reduce", self.reduce, _REDUCES),
            count_problem("dense_width", self.dense_width, least=0),
            rate_problem("dropout_rate", self.dropout_rate),
        )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """(B, H, W, C) float images -> (B, n_outputs) float32 logits."""
        check_images("CNN", x, least=2 ** len(self.features))
        x = x.astype(self.dtype)
        for i, width in enumerate(self.features):
            x = _Stage(
                width, self.convs_per_stage, self.norm, self.activation, self.pool, self.dtype, self.param_dtype,
                name=f"stage_{i}",
            )(x, train=train)  # fmt: skip
        x = _to_vector(x, self.reduce)
        if self.dense_width:
            x = nn.Dense(self.dense_width, dtype=self.dtype, param_dtype=self.param_dtype, name="dense")(x)
            x = make_activation(self.activation)(x)
        x = dropout(x, self.dropout_rate, train=train, name="dropout")
        return head(x, self.n_outputs, param_dtype=self.param_dtype)


class _Stage(nn.Module):
    width: int
    n_convs: int
    norm: str | NormFn
    activation: str | ActivationFn
    pool: str
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm, activation = make_norm(self.norm), make_activation(self.activation)
        for j in range(self.n_convs):
            x = conv(x, self.width, 3, use_bias=self.norm == "none", name=f"conv_{j}", **dtypes)
            if j == 0:
                x = max_pool(x, 2) if self.pool == "max" else nn.avg_pool(x, (2, 2), (2, 2))
            x = activation(norm(x, train=train, name=f"norm_{j}", **dtypes))
        return x


def _to_vector(x: Array, reduce: str) -> Array:
    if reduce == "flatten":
        return x.reshape(x.shape[0], -1)
    return x.max((1, 2)) if reduce == "max" else x.mean((1, 2))
