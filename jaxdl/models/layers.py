"""What the vision networks and the MLP share: norms, activations, dropout, the head.

Dimensions: `B` batch, `H` height, `W` width, `C` channels. Images are NHWC. Dropout and drop path both draw from the
random stream `dropout`, so `rngs={"dropout": key}` is all that a training call needs.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jaxdl.models import activation_gpu
from jaxdl.models.checks import ModelError, check, name_problem
from jaxdl.models.convolution import convolution
from jaxdl.models.group_norm import GroupNorm
from jaxdl.models.product import product

Dtype = Any
NormFn = Callable[..., Array]
ActivationFn = Callable[[Array], Array]

_KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


@functools.cache
def make_norm(kind: str | NormFn, *, n_groups: int | None = None, epsilon: float = 1e-5) -> NormFn:
    """The norm of a network, chosen by name: a function to be called inside a compact Linen method.

    - "group" (Wu & He 2018): over groups of channels and all pixels of one image; the same in training and
      evaluation, for any batch size and any number of devices.
    - "layer" (Ba et al. 2016): over the channels of one pixel.
    - "batch" (Ioffe & Szegedy 2015, momentum 0.9, biased variance in the running statistics too): its statistics are
      global under `jit`, however the batch is sharded, but per shard under `pmap` and per chunk under microbatches,
      so that the same run differs between them. Keeps `batch_stats`, which the training loss must return as `extra`.
    - "none": nothing; the layer before keeps its bias.

    Args:
      kind: a name above, or a function of your own with the returned signature, which is handed back.
      n_groups: groups of a "group" norm. By default the largest divisor of the channels up to 32 that leaves a
        group at least 2 channels (8 if there are no pixels): a group of one value would always be zero.
      epsilon: added to the variance.

    Returns:
      `norm(x, *, train, name, dtype, param_dtype, zero_scale=False) -> x`; `zero_scale` starts the scale at 0.

    Raises:
      ModelError: an unknown name; at the call, groups that do not divide the channels or hold a single value.

    Example:
      >>> import jax
      >>> class Net(nn.Module):
      ...   @nn.compact
      ...   def __call__(self, x):
      ...     return make_norm("group", n_groups=2)(x, train=True, name="norm", dtype=x.dtype, param_dtype=x.dtype)
      >>> jax.tree.map(jnp.shape, Net().init(jax.random.key(0), jnp.ones((1, 5, 5, 4))))
      {'params': {'norm': {'bias': (4,), 'scale': (4,)}}}
    """
    if callable(kind):
        return kind
    check("make_norm", name_problem("norm", kind, NORMS))
    if kind == "group":
        return functools.partial(_group_norm, n_groups=n_groups, epsilon=epsilon)
    check("make_norm", None if n_groups is None else f"n_groups={n_groups} is for 'group', not {kind!r}; drop it.")
    return functools.partial(NORMS[kind], epsilon=epsilon)


def _group_norm(
    x: Array, *, train: bool, name: str, n_groups: int | None, zero_scale: bool = False, **kw: Any
) -> Array:
    n_channels, n_pixels = x.shape[-1], math.prod(x.shape[1:-1])
    smallest = 2 if x.ndim > 2 else 8
    n = n_groups or max(d for d in range(1, 33) if n_channels % d == 0 and (d == 1 or n_channels // d >= smallest))
    if n < 1 or n_channels % n:
        divisors = [d for d in range(1, n_channels + 1) if n_channels % d == 0]
        raise ModelError(f"{name}: n_groups={n} does not divide {n_channels} channels; use one of {divisors}.")
    if n_channels * n_pixels == n:
        raise ModelError(
            f"{name}: each of {n} groups holds a single value, which a norm turns into 0; use fewer groups."
        )
    return GroupNorm(n, name=name, scale_init=_scale_init(zero_scale), **kw)(x)


def _layer_norm(x: Array, *, train: bool, name: str, zero_scale: bool = False, **kw: Any) -> Array:
    return nn.LayerNorm(name=name, scale_init=_scale_init(zero_scale), **kw)(x)


def _batch_norm(x: Array, *, train: bool, name: str, zero_scale: bool = False, **kw: Any) -> Array:
    norm = nn.BatchNorm(name=name, momentum=0.9, scale_init=_scale_init(zero_scale), **kw)
    return norm(x, use_running_average=not train)


def _no_norm(x: Array, **_: Any) -> Array:
    return x


def _scale_init(zero_scale: bool) -> nn.initializers.Initializer:
    return nn.initializers.zeros if zero_scale else nn.initializers.ones


NORMS: dict[str, NormFn] = {"group": _group_norm, "batch": _batch_norm, "layer": _layer_norm, "none": _no_norm}


def _gelu(x: Array) -> Array:
    """`x` times the normal distribution's share below it, by `erf` as in PyTorch: on a CPU the `erfc` that `nn.gelu`
    takes needs 2.7 times as long. In half precision `1 + erf` would lose the tail.
    """
    if jnp.result_type(x) in (jnp.bfloat16, jnp.float16):
        return nn.gelu(x, approximate=False)
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


def _or_on_gpu(plain: ActivationFn, on_gpu: ActivationFn) -> ActivationFn:
    def activation(x: Array) -> Array:
        is_low = jnp.result_type(x) in (jnp.bfloat16, jnp.float16)
        return on_gpu(x) if is_low and jax.default_backend() == "gpu" else plain(x)

    return activation


ACTIVATIONS: dict[str, ActivationFn] = {
    "relu": nn.relu,
    "gelu": _or_on_gpu(_gelu, activation_gpu.gelu),
    "gelu_tanh": _or_on_gpu(functools.partial(nn.gelu, approximate=True), activation_gpu.gelu_tanh),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # CLIP's
    "silu": nn.silu,
    "tanh": nn.tanh,
    "sigmoid": nn.sigmoid,
    "elu": nn.elu,
    "leaky_relu": nn.leaky_relu,
    "relu6": nn.relu6,
    "hard_swish": nn.hard_swish,
    "softplus": nn.softplus,
    "identity": lambda x: x,
}


def make_activation(activation: str | ActivationFn) -> ActivationFn:
    """The activation of a name; a function is handed back as it is.

    Args:
      activation: relu, gelu (the exact one, as in PyTorch), gelu_tanh, silu, tanh, sigmoid, elu, leaky_relu, relu6,
        hard_swish, softplus, identity, or any elementwise function.

    Raises:
      ModelError: an unknown name.

    Example:
      >>> float(make_activation("relu")(jnp.float32(-2.0)))
      0.0
      >>> make_activation("rleu")
      Traceback (most recent call last):
      jaxdl.models.checks.ModelError: activation: 1 problem(s)
        - activation='rleu' is unknown; did you mean 'relu', 'relu6' or 'elu'?
    """
    if callable(activation):
        return activation
    check("activation", name_problem("activation", activation, ACTIVATIONS))
    return ACTIVATIONS[activation]


def dropout(x: Array, rate: float, *, train: bool, name: str) -> Array:
    """Zeroes values at random in training and scales the rest by 1 / (1 - rate) (Srivastava et al. 2014).

    To be called inside a compact Linen method. Rate 0 and evaluation are the identity and need no key.

    Args:
      x: any shape.
      rate: the share of zeroes, in [0, 1).
      train: off if False.
      name: the name of the submodule, which makes its random numbers differ from those of another.

    Returns:
      `x`'s shape and dtype.

    Example:
      >>> import jax
      >>> class Net(nn.Module):
      ...   @nn.compact
      ...   def __call__(self, x, *, train=False):
      ...     return dropout(x, 0.5, train=train, name="dropout")
      >>> sorted(set(Net().apply({}, jnp.ones(100), train=True, rngs={"dropout": jax.random.key(0)}).tolist()))
      [0.0, 2.0]
    """
    return nn.Dropout(rate=rate, name=name)(x, deterministic=not train)


def drop_path(x: Array, rate: float, *, train: bool, name: str) -> Array:
    """Dropout of whole examples, for a residual branch: stochastic depth (Huang et al. 2016).

    Args:
      x: (B, ...) the branch's output, before it is added.
      rate: the share of examples that skip the branch, in [0, 1).
      train: off if False.
      name: the name of the submodule.

    Returns:
      `x`'s shape and dtype; an example is all zero, or scaled by 1 / (1 - rate).

    Example:
      >>> import jax
      >>> class Net(nn.Module):
      ...   @nn.compact
      ...   def __call__(self, x, *, train=False):
      ...     return drop_path(x, 0.5, train=train, name="drop_path")
      >>> y = Net().apply({}, jnp.ones((8, 3)), train=True, rngs={"dropout": jax.random.key(0)})
      >>> bool(((y == 0).all(1) | (y == 2).all(1)).all())
      True
    """
    return nn.Dropout(rate=rate, broadcast_dims=tuple(range(1, x.ndim)), name=name)(x, deterministic=not train)


def conv(
    x: Array,
    features: int,
    size: int,
    *,
    name: str,
    dtype: Dtype,
    param_dtype: Dtype,
    strides: int = 1,
    use_bias: bool = False,
    kernel_init: nn.initializers.Initializer = _KERNEL_INIT,
) -> Array:
    """A square convolution with `size // 2` zeros on every side, which is PyTorch's padding.

    With stride 2, "SAME" pads an even image at its end only: weights trained with the one are a pixel off in the other.

    Args:
      x: (B, H, W, C).
      features: channels out.
      size: of the kernel, odd.
      name: of the submodule.
      dtype: of the computation.
      param_dtype: of the parameters.
      strides: 1 or 2; the output has ceil(H / strides) rows.
      use_bias: False before a norm, which would take it out again.
      kernel_init: He et al. 2015 by default, by the outputs.

    Returns:
      (B, H', W', features) of `dtype`.

    Example:
      >>> import jax
      >>> class Net(nn.Module):
      ...   @nn.compact
      ...   def __call__(self, x):
      ...     return conv(x, 3, 3, strides=2, name="conv", dtype=x.dtype, param_dtype=x.dtype)
      >>> Net().init_with_output(jax.random.key(0), jnp.ones((1, 5, 8, 2)))[0].shape
      (1, 3, 4, 3)
    """
    module = nn.Conv(
        features, (size, size), (strides, strides), ((size // 2, size // 2),) * 2,
        use_bias=use_bias, kernel_init=kernel_init, dtype=dtype, param_dtype=param_dtype, name=name,
        conv_general_dilated=convolution,
    )  # fmt: skip
    return module(x)


def head(x: Array, n_outputs: int, *, param_dtype: Dtype) -> Array:
    """The last layer, `head`, in float32 whatever the compute dtype: (B, C) features -> (B, n_outputs) logits.

    Args:
      x: (B, C) features.
      n_outputs: classes, or regression targets.
      param_dtype: dtype of the parameters.

    Returns:
      (B, n_outputs) float32 (float64 for float64 features).

    Example:
      >>> import jax
      >>> class Net(nn.Module):
      ...   @nn.compact
      ...   def __call__(self, x):
      ...     return head(x, 3, param_dtype=jnp.float32)
      >>> Net().init_with_output(jax.random.key(0), jnp.ones((2, 4), jnp.bfloat16))[0].dtype
      dtype('float32')
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return nn.Dense(n_outputs, dtype=dtype, param_dtype=param_dtype, name="head", dot_general=product)(x)
