"""Residual networks, after and before activation, of any width and depth."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.initializers import zeros
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

_STEMS = ("imagenet", "small", "pooled")


class _Block(nn.Module):
    """What every residual block takes, and its two shorthands."""

    features: int
    strides: int = 1
    norm: str | NormFn = "group"
    activation: str | ActivationFn = "relu"
    zero_init: bool = True
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    expansion = 1
    is_preactivation = False

    def _conv(self, x: Array, features: int, size: int, name: str, strides: int = 1, **kw: Any) -> Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return conv(x, features, size, strides=strides, use_bias=self.norm == "none", name=name, **dtypes, **kw)

    def _norm(self, x: Array, name: str, train: bool, zero_scale: bool = False) -> Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return make_norm(self.norm)(x, train=train, name=name, zero_scale=zero_scale, **dtypes)

    def _is_resized(self, x: Array) -> bool:
        return self.strides != 1 or x.shape[-1] != self.features * self.expansion


class _PostBlock(_Block):
    """`act(shortcut(x) + norm(conv(...)))`; a 1x1 convolution and a norm on the shortcut where the shape changes."""

    sizes: ClassVar[tuple[int, ...]] = (3, 3)
    strided = 0

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """(B, H, W, C) -> (B, ceil(H / strides), ceil(W / strides), features * expansion)."""
        activation, last = make_activation(self.activation), len(self.sizes) - 1
        y = x
        for i, size in enumerate(self.sizes):
            width = self.features * (self.expansion if i == last else 1)
            kw = {"kernel_init": zeros} if self.zero_init and i == last and self.norm == "none" else {}
            y = self._conv(y, width, size, f"conv_{i}", self.strides if i == self.strided else 1, **kw)
            y = self._norm(y, f"norm_{i}", train, zero_scale=self.zero_init and i == last)
            y = activation(y) if i != last else y
        if self._is_resized(x):
            x = self._conv(x, self.features * self.expansion, 1, "shortcut_conv", self.strides)
            x = self._norm(x, "shortcut_norm", train)
        return activation(x + y)


class _PreBlock(_Block):
    """`shortcut(x) + conv(act(norm(...)))`; a 1x1 convolution of the first activation where the shape changes."""

    sizes: ClassVar[tuple[int, ...]] = (3, 3)
    strided = 0
    is_preactivation = True

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """(B, H, W, C) -> (B, ceil(H / strides), ceil(W / strides), features * expansion)."""
        activation, last = make_activation(self.activation), len(self.sizes) - 1
        y = shortcut = x
        for i, size in enumerate(self.sizes):
            y = activation(self._norm(y, f"norm_{i}", train))
            if i == 0 and self._is_resized(x):
                shortcut = self._conv(y, self.features * self.expansion, 1, "shortcut_conv", self.strides)
            width = self.features * (self.expansion if i == last else 1)
            # A zero norm scale would stop here for good: relu has no gradient at its own zero.
            kw = {"kernel_init": zeros} if self.zero_init and i == last else {}
            y = self._conv(y, width, size, f"conv_{i}", self.strides if i == self.strided else 1, **kw)
        return shortcut + y


class BasicBlock(_PostBlock):
    """Two 3x3 convolutions, activation after the sum (He et al. 2015); the block of ResNet-18 and 34.

    Paths: `conv_0`, `norm_0`, `conv_1`, `norm_1`, and `shortcut_conv`, `shortcut_norm` where the shape changes.

    Args:
      features: channels.
      strides: of the first convolution and the shortcut.
      norm, activation, zero_init, dtype, param_dtype: as in `ResNet`.

    Example:
      >>> import jax
      >>> x = jnp.ones((1, 5, 5, 4))
      >>> jax.eval_shape(lambda: BasicBlock(8, strides=2).init_with_output(jax.random.key(0), x))[0].shape
      (1, 3, 3, 8)
    """


class BottleneckBlock(_PostBlock):
    """1x1, 3x3 (strided: version 1.5) and 1x1 convolution to 4 times the features; the block of ResNet-50.

    Paths and arguments as in `BasicBlock`, with `conv_2` and `norm_2`.

    Example:
      >>> import jax
      >>> x = jnp.ones((1, 5, 5, 4))
      >>> jax.eval_shape(lambda: BottleneckBlock(8, strides=2).init_with_output(jax.random.key(0), x))[0].shape
      (1, 3, 3, 32)
    """

    expansion = 4
    sizes: ClassVar[tuple[int, ...]] = (1, 3, 1)
    strided = 1


class PreActBasicBlock(_PreBlock):
    """`BasicBlock` with norm and activation before each convolution (He et al. 2016, arXiv:1603.05027).

    Example:
      >>> import jax
      >>> x = jnp.ones((1, 5, 5, 4))
      >>> variables = PreActBasicBlock(4).init(jax.random.key(0), x)
      >>> bool((PreActBasicBlock(4).apply(variables, x) == x).all())  # zero_init: the identity
      True
    """


class PreActBottleneckBlock(_PreBlock):
    """`BottleneckBlock` with norm and activation before each convolution.

    Example:
      >>> import jax
      >>> x = jnp.ones((1, 5, 5, 4))
      >>> jax.eval_shape(lambda: PreActBottleneckBlock(8).init_with_output(jax.random.key(0), x))[0].shape
      (1, 5, 5, 32)
    """

    expansion = 4
    sizes: ClassVar[tuple[int, ...]] = (1, 3, 1)
    strided = 1


class ResNet(nn.Module):
    """A residual network (He et al. 2015, arXiv:1512.03385; stride in the 3x3 convolution as in version 1.5).

    Paths: `stem_conv/kernel`, `stem_norm/scale`, `stage_<i>/block_<j>/...` (see the block), `final_norm/scale` (blocks
    with pre-activation only, which have no `stem_norm`), `head/kernel`, `head/bias`.

    Args:
      n_outputs: classes, or regression targets.
      stage_sizes: blocks in each stage; each stage but the first halves the image.
      block: the block's class, such as `BasicBlock`; a `partial` of it will do.
      width: features of the first stage, doubled from stage to stage.
      stem: "imagenet" (7x7 stride 2, then 3x3 max-pool stride 2), "small" (3x3, for images of 28 to 64 pixels) or
        "pooled" (3x3, then 2x2 max-pool: a quarter of the work of "small").
      norm: a name of `make_norm` (read there what "batch" means under jit, pmap and microbatches), or a function.
      activation: a name of `make_activation`, or a function.
      zero_init: starts each block as its shortcut: a zero scale in its last norm (Goyal et al. 2017); with
        pre-activation or norm "none" a zero kernel in its last convolution.
      dropout_rate: of the head's input, in [0, 1).
      dtype: of the computation; the head computes in float32 at least.
      param_dtype: of the parameters.

    Raises:
      ModelError: fields that make no network (at construction), or inputs that are no float images.

    Example:
      >>> import jax
      >>> model = ResNet18(n_outputs=10, width=8, stem="small")
      >>> x = jnp.ones((1, 8, 8, 3))
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), x)
      >>> sorted(variables["params"])[:3], variables["params"]["head"]["kernel"].shape
      (['head', 'stage_0', 'stage_1'], (64, 10))
    """

    n_outputs: int
    stage_sizes: Sequence[int] = (2, 2, 2, 2)
    block: Any = BasicBlock
    width: int = 64
    stem: str = "imagenet"
    norm: str | NormFn = "group"
    activation: str | ActivationFn = "relu"
    zero_init: bool = True
    dropout_rate: float = 0.0
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        check(
            "ResNet",
            count_problem("n_outputs", self.n_outputs),
            counts_problem("stage_sizes", self.stage_sizes),
            None if callable(self.block) else f"block={self.block!r} must be a block's class, such as BasicBlock.",
            count_problem("width", self.width),
            name_problem("stem", self.stem, _STEMS),
            name_problem("norm", self.norm, NORMS),
            name_problem("activation", self.activation, ACTIVATIONS),
            rate_problem("dropout_rate", self.dropout_rate),
        )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """(B, H, W, C) float images -> (B, n_outputs) float32 logits."""
        check_images("ResNet", x)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm, activation = make_norm(self.norm), make_activation(self.activation)
        block = partial(self.block, norm=self.norm, activation=self.activation, zero_init=self.zero_init, **dtypes)
        is_preactivation = getattr(block(1, parent=None), "is_preactivation", False)
        size, strides = (7, 2) if self.stem == "imagenet" else (3, 1)
        use_bias = self.norm == "none"
        x = conv(x.astype(self.dtype), self.width, size, strides=strides, use_bias=use_bias, name="stem_conv", **dtypes)
        if not is_preactivation:
            x = activation(norm(x, train=train, name="stem_norm", **dtypes))
        if self.stem != "small":
            x = max_pool(x, 3, 2, 1) if self.stem == "imagenet" else max_pool(x, 2)
        for i, n_blocks in enumerate(self.stage_sizes):
            x = _Stage(block, n_blocks, self.width * 2**i, 1 if i == 0 else 2, name=f"stage_{i}")(x, train=train)
        if is_preactivation:
            x = activation(norm(x, train=train, name="final_norm", **dtypes))
        x = dropout(x.mean((1, 2)), self.dropout_rate, train=train, name="dropout")
        return head(x, self.n_outputs, param_dtype=self.param_dtype)


class _Stage(nn.Module):
    block: Any
    n_blocks: int
    features: int
    strides: int

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        for j in range(self.n_blocks):
            x = self.block(self.features, self.strides if j == 0 else 1, name=f"block_{j}")(x, train=train)
        return x


ResNet18 = partial(ResNet, stage_sizes=(2, 2, 2, 2), block=BasicBlock)
ResNet34 = partial(ResNet, stage_sizes=(3, 4, 6, 3), block=BasicBlock)
ResNet50 = partial(ResNet, stage_sizes=(3, 4, 6, 3), block=BottleneckBlock)
