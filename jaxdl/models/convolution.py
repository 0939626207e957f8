"""A convolution whose gradient is fast on a CPU wherever it is computed.

Dimensions: `B` batch, `H` height, `W` width, `C` channels in, `O` channels out.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxdl.models import winograd
from jaxdl.models.uninlined import uninlined

Pads = tuple[tuple[int, int], tuple[int, int]]
_LAYOUT = ("NHWC", "HWIO", "NHWC")
_NARROW = 32  # inputs of a kernel: height, width and channels
_CACHED, _MOST_PARTS = 2**19, 16  # bytes, convolutions
_NUMBERS = lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), _LAYOUT)


def convolution(x: Array, kernel: Array, strides: Sequence[int], padding: Any, **options: Any) -> Array:
    """`jax.lax.conv_general_dilated`; give it to Flax as `nn.Conv(..., conv_general_dilated=convolution)`.

    On a CPU the gradients of a plain convolution are written as convolutions with channels last, too. XLA computes
    others quickly outside of loops only (jax#12868): in `repeat` a step of a small CNN would take 8 times as long, on
    two devices 15 times. A wide kernel of 3x3 with stride 1 takes 4 multiplications an output there instead of 9, in
    float32 (`jaxdl.models.winograd`). There is no forward-mode derivative of these then, as of max-pooling.

    Args:
      x: (B, H, W, C).
      kernel: (h, w, C, O).
      strides: in height and width.
      padding: a pair (before, after) for height and for width, or "SAME" or "VALID".
      options: of `jax.lax.conv_general_dilated`.

    Returns:
      (B, H', W', O).

    Example:
      >>> convolution(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5)), (2, 2), ((1, 1), (1, 1))).shape
      (1, 2, 2, 5)
    """
    usual: dict[str, tuple[Any, ...]] = {"dimension_numbers": (None, _NUMBERS, _LAYOUT), "feature_group_count": (1,)}
    usual |= {"lhs_dilation": (None, (1, 1)), "rhs_dilation": (None, (1, 1)), "batch_group_count": (1,)}
    is_usual = all(value in usual.get(name, (None,)) for name, value in options.items())
    if not is_usual or x.ndim != 4 or jax.default_backend() != "cpu":
        options.setdefault("dimension_numbers", _LAYOUT)
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    (top, bottom), (left, right) = padding
    return _convolve(x, kernel, (strides[0], strides[1]), ((top, bottom), (left, right)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: Array, kernel: Array, strides: tuple[int, int], pads: Pads) -> Array:
    if winograd.is_faster(x, kernel, strides, pads):
        return uninlined(_by_winograd, x, kernel, pads)
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=_LAYOUT)


def _forward(x: Array, kernel: Array, strides: tuple[int, int], pads: Pads) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(x, kernel, strides, pads), (x, kernel)


def _backward(strides: tuple[int, int], pads: Pads, kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    """What a stride left out is filled with zeros: of length `(n - 1) stride + 1` in each direction."""
    x, kernel = kept
    whole = [(dy.shape[1 + i] - 1) * strides[i] + 1 for i in (0, 1)]
    reach, size = kernel.shape[:2], x.shape[1:3]
    before = [reach[i] - 1 - pads[i][0] for i in (0, 1)]
    of_x = [(before[i], size[i] + reach[i] - 1 - whole[i] - before[i]) for i in (0, 1)]
    if winograd.is_faster(x, kernel, strides, pads):
        dx = uninlined(_by_winograd, dy, kernel, (of_x[0], of_x[1]), True)
    else:
        turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)  # (h, w, O, C)
        dx = lax.conv_general_dilated(dy, turned, (1, 1), of_x, lhs_dilation=strides, dimension_numbers=_LAYOUT)
    if winograd.is_faster(x, kernel, strides, pads, for_kernel=True):
        return dx, uninlined(_gradient_by_winograd, x, dy, pads)
    is_narrow = math.prod(kernel.shape[:3]) <= _NARROW
    return dx, uninlined(_by_product if is_narrow else _by_convolutions, x, dy, reach, strides, pads)


_by_winograd = jax.jit(winograd.convolve, static_argnums=(2, 3))
_gradient_by_winograd = jax.jit(winograd.gradient_of_kernel, static_argnums=2)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _by_product(x: Array, dy: Array, reach: tuple[int, int], strides: tuple[int, int], pads: Pads) -> Array:
    """The gradient of a kernel of few inputs: what each number of it meets, times `dy`."""
    padding = ((0, 0, 0), *((before, after, 0) for before, after in pads), (0, 0, 0))
    x_CBHW = lax.pad(x, jnp.zeros((), x.dtype), padding).transpose(3, 0, 1, 2)
    spans = [(dy.shape[1 + i] - 1) * strides[i] + 1 for i in (0, 1)]
    places = itertools.product(range(reach[0]), range(reach[1]))
    met = [x_CBHW[:, :, i : i + spans[0] : strides[0], j : j + spans[1] : strides[1]] for i, j in places]
    n_outputs = dy.shape[-1]
    dk = jnp.stack(met).reshape(-1, dy[..., 0].size) @ dy.reshape(-1, n_outputs)
    return dk.reshape(*reach, x.shape[-1], n_outputs)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _by_convolutions(x: Array, dy: Array, reach: tuple[int, int], strides: tuple[int, int], pads: Pads) -> Array:
    """The gradient of a kernel: x convolved with `dy`, where the batch is what is summed over.

    Columns and channels of x are one axis, over which the convolution steps from column to column: so it makes the
    numbers of all channels in one, and in the order of the kernel. It is done a few rows of `dy` at a time, as many as
    the cache of a core holds.
    """
    (n_rows, n_columns, n_channels), n_outputs = x.shape[1:], dy.shape[-1]
    x_1HWB = x.transpose(1, 2, 3, 0).reshape(1, n_rows, n_columns * n_channels, -1)
    dy_HWBO = dy.transpose(1, 2, 0, 3)
    after = (dy.shape[2] - 1) * strides[1] + reach[1] - n_columns - pads[1][0]
    columns = (pads[1][0] * n_channels, after * n_channels)
    step = max(1, _CACHED * len(dy_HWBO) // dy.nbytes, -(-len(dy_HWBO) // _MOST_PARTS))
    parts = [jnp.zeros((1, reach[0], reach[1] * n_channels, n_outputs), jnp.promote_types(x.dtype, jnp.float32))]
    for i in range(0, len(dy_HWBO), step):
        part = dy_HWBO[i : i + step]
        first = i * strides[0] - pads[0][0]
        end = first + (len(part) - 1) * strides[0] + reach[0]
        if end <= 0 or first >= n_rows:
            continue  # it meets padding only
        rows = (max(-first, 0), max(end - n_rows, 0))
        parts.append(
            lax.conv_general_dilated(
                x_1HWB[:, max(first, 0) : min(end, n_rows)], part, (1, 1), (rows, columns),
                rhs_dilation=(strides[0], strides[1] * n_channels), dimension_numbers=_LAYOUT,
                preferred_element_type=parts[0].dtype,
            )
        )  # fmt: skip
    dk_1HWO = functools.reduce(jnp.add, parts)
    return dk_1HWO.reshape(*reach, n_channels, n_outputs).astype(x.dtype)


_convolve.defvjp(_forward, _backward)
