"""ConvNeXt: convolutional networks in the shape of a transformer (Liu et al. 2022, arXiv:2201.03545)."""

import functools
import operator
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxdl.models.checks import check, check_images, count_problem, counts_problem, rate_problem
from jaxdl.models.convolution import convolution
from jaxdl.models.layers import Dtype, drop_path, head, make_activation, make_norm


class ConvNeXtBlock(nn.Module):
    """`x + drop_path(layer_scale * project(gelu(expand(norm(depthwise(x))))))`.

    Paths: `depthwise/kernel`, `depthwise/bias`, `norm/scale`, `norm/bias`, `expand/kernel`, `expand/bias`,
    `project/kernel`, `project/bias`, `layer_scale`.

    Args:
      features: channels in and out.
      kernel_size: of the depthwise convolution, odd.
      layer_scale_init: what the branch is scaled with at first.
      drop_path_rate: the share of examples that skip the branch in training, in [0, 1).
      dtype: of the computation.
      param_dtype: of the parameters.

    Example:
      >>> x = jnp.ones((1, 4, 4, 8))
      >>> variables = ConvNeXtBlock(8, layer_scale_init=0.0).init(jax.random.key(0), x)
      >>> bool((ConvNeXtBlock(8).apply(variables, x) == x).all())
      True
    """

    features: int
    kernel_size: int = 7
    layer_scale_init: float = 1e-6
    drop_path_rate: float = 0.0
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """(B, H, W, features) -> the same shape."""
        n, size, dtypes = self.features, self.kernel_size, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        scale = self.param("layer_scale", nn.initializers.constant(self.layer_scale_init), (n,), self.param_dtype)
        y = _Depthwise(size, **dtypes, name="depthwise")(x)
        y = make_norm("layer", epsilon=1e-6)(y, train=train, name="norm", **dtypes)
        y = make_activation("gelu")(nn.Dense(4 * n, kernel_init=_kernel_init, name="expand", **dtypes)(y))
        y = (
            nn.Dense(n, kernel_init=_kernel_init, name="project", **dtypes)(y)
            * scale.astype(self.dtype)[None, None, None, :]
        )
        return x + drop_path(y, self.drop_path_rate, train=train, name="drop_path")


class ConvNeXt(nn.Module):
    """Non-overlapping patches, stages of `ConvNeXtBlock` with halving between them, mean over pixels, norm, head.

    Paths: `stem_conv/kernel`, `stem_norm/scale`, `stage_<i>/downsample_norm/scale`, `stage_<i>/downsample_conv/kernel`
    (from the second stage on), `stage_<i>/block_<j>/...`, `final_norm/scale`, `head/kernel`, each with its bias.

    Args:
      n_outputs: classes, or regression targets.
      depths: blocks in each stage. ConvNeXt-T has (3, 3, 9, 3).
      widths: channels of each stage. ConvNeXt-T has (96, 192, 384, 768).
      stem_size: pixels of a patch's side: 4 for large images, 2 or 1 for small ones.
      kernel_size: of the depthwise convolutions, odd.
      layer_scale_init: what each block's branch is scaled with at first.
      drop_path_rate: of the last block; it grows linearly from 0 at the first.
      dtype: of the computation; the head computes in float32 at least.
      param_dtype: of the parameters.

    Raises:
      ModelError: fields that make no network (at construction), or inputs that are no float images or too small.

    Example:
      >>> model = ConvNeXt(n_outputs=10, depths=(1, 1), widths=(8, 16))
      >>> x = jnp.ones((1, 8, 8, 3))
      >>> jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), x))[0].shape
      (1, 10)
    """

    n_outputs: int
    depths: Sequence[int] = (2, 2, 2)
    widths: Sequence[int] = (32, 64, 128)
    stem_size: int = 2
    kernel_size: int = 7
    layer_scale_init: float = 1e-6
    drop_path_rate: float = 0.0
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        sizes = [counts_problem("depths", self.depths), counts_problem("widths", self.widths)]
        differ = not any(sizes) and len(self.depths) != len(self.widths)
        check(
            "ConvNeXt",
            count_problem("n_outputs", self.n_outputs),
            *sizes,
            f"depths={self.depths} and widths={self.widths} must be of one length." if differ else None,
            count_problem("stem_size", self.stem_size),
            None if self.kernel_size % 2 else f"kernel_size={self.kernel_size} must be odd.",
            rate_problem("drop_path_rate", self.drop_path_rate),
        )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """(B, H, W, C) float images -> (B, n_outputs) float32 logits."""
        check_images("ConvNeXt", x, least=self.stem_size * 2 ** (len(self.depths) - 1))
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm, n_blocks, n_before = make_norm("layer", epsilon=1e-6), sum(self.depths), 0
        x = _patches(x.astype(self.dtype), self.widths[0], self.stem_size, "stem_conv", self.dtype, self.param_dtype)
        x = norm(x, train=train, name="stem_norm", **dtypes)
        for i, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            rates = [self.drop_path_rate * (n_before + j) / max(n_blocks - 1, 1) for j in range(depth)]
            stage = _Stage(width, rates, i > 0, self.kernel_size, self.layer_scale_init, **dtypes, name=f"stage_{i}")
            x, n_before = stage(x, train=train), n_before + depth
        x = norm(x.mean((1, 2)), train=train, name="final_norm", **dtypes)
        return head(x, self.n_outputs, param_dtype=self.param_dtype)


class _Depthwise(nn.Module):
    size: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", _kernel_init, (self.size, self.size, 1, x.shape[-1]), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        return depthwise_conv(x, kernel.astype(self.dtype)) + bias.astype(self.dtype)[None, None, None, :]


class _Stage(nn.Module):
    width: int
    rates: Sequence[float]
    downsamples: bool
    kernel_size: int
    layer_scale_init: float
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.downsamples:
            x = make_norm("layer", epsilon=1e-6)(x, train=train, name="downsample_norm", **dtypes)
            x = _patches(x, self.width, 2, "downsample_conv", self.dtype, self.param_dtype)
        for j, rate in enumerate(self.rates):
            block = ConvNeXtBlock(
                self.width, self.kernel_size, self.layer_scale_init, rate, **dtypes, name=f"block_{j}"
            )
            x = block(x, train=train)
        return x


_kernel_init = nn.initializers.truncated_normal(0.02)


def _patches(x: Array, features: int, size: int, name: str, dtype: Dtype, param_dtype: Dtype) -> Array:
    conv = nn.Conv(
        features, (size, size), (size, size), ((0, 0), (0, 0)),
        kernel_init=_kernel_init, dtype=dtype, param_dtype=param_dtype, name=name, conv_general_dilated=convolution,
    )  # fmt: skip
    return conv(x)


@jax.custom_vjp
def depthwise_conv(x: Array, kernel: Array) -> Array:
    """Convolves each channel with its own kernel, with zero padding to the same size.

    On a CPU it is a sum of shifted products: XLA's grouped convolution takes 25 times as long there, and 9 times with
    its gradients. Other devices take the grouped convolution. Reverse mode only.

    Args:
      x: (B, H, W, C).
      kernel: (K, K, 1, C) with an odd K, as `flax.linen.Conv` stores it.

    Returns:
      (B, H, W, C) of `x`'s dtype.

    Example:
      >>> x = jnp.arange(4.0).reshape(1, 2, 2, 1)
      >>> depthwise_conv(x, jnp.ones((3, 3, 1, 1))).ravel().tolist()
      [6.0, 6.0, 6.0, 6.0]
    """
    return lax.platform_dependent(x, kernel, cpu=_shifted, default=_grouped)


def _depthwise_fwd(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return depthwise_conv(x, kernel), (x, kernel)


def _depthwise_bwd(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    return lax.platform_dependent(*saved, grad, cpu=_shifted_grads, default=_grouped_grads)


depthwise_conv.defvjp(_depthwise_fwd, _depthwise_bwd)


def _grouped(x: Array, kernel: Array) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    half = kernel.shape[0] // 2
    pads = ((half, half), (half, half))
    return lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=layout, feature_group_count=x.shape[-1])


def _grouped_grads(x: Array, kernel: Array, grad: Array) -> tuple[Array, Array]:
    return jax.vjp(_grouped, x, kernel)[1](grad)


def _shifted(x: Array, kernel: Array) -> Array:
    size, _, _, n_channels = kernel.shape
    n_rows, n_columns = x.shape[1:3]
    padded = _padded(x, size // 2)
    weights = kernel.astype(padded.dtype).reshape(size, size, 1, 1, 1, n_channels)
    shifts = ((i, j) for i in range(size) for j in range(size))
    products = (padded[:, i : i + n_rows, j : j + n_columns] * weights[i, j] for i, j in shifts)
    return functools.reduce(operator.add, products).astype(x.dtype)


def _shifted_grads(x: Array, kernel: Array, grad: Array) -> tuple[Array, Array]:
    size, (n_rows, n_columns) = kernel.shape[0], x.shape[1:3]
    padded = _padded(x, size // 2)

    def kernel_row(_: None, i: Array) -> tuple[None, Array]:
        rows = lax.dynamic_slice_in_dim(padded, i, n_rows, axis=1)
        shifts = [rows[:, :, j : j + n_columns] * grad for j in range(size)]
        return None, jnp.stack([product.sum((0, 1, 2)) for product in shifts])

    # A scan over rows: all products at once compile twice as long and run three times as long.
    _, kernel_grad = lax.scan(kernel_row, None, jnp.arange(size))
    return _shifted(grad, kernel[::-1, ::-1]), kernel_grad.reshape(kernel.shape).astype(kernel.dtype)


def _padded(x: Array, half: int) -> Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.pad(wide, ((0, 0), (half, half), (half, half), (0, 0)))
