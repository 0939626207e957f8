"""A convolution whose gradient is fast on a CPU wherever it is computed.

Dimensions: `B` batch, `H` height, `W` width, `C` channels in, `O` channels out.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

Pads = tuple[tuple[int, int], tuple[int, int]]
_LAYOUT = ("NHWC", "HWIO", "NHWC")
_NUMBERS = lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), _LAYOUT)


def convolution(x: Array, kernel: Array, strides: Sequence[int], padding: Any, **options: Any) -> Array:
    """`jax.lax.conv_general_dilated`; give it to Flax as `nn.Conv(..., conv_general_dilated=convolution)`.

    On a CPU the gradients of a plain convolution are written as convolutions with channels last, too. XLA computes
    others quickly outside of loops only (jax#12868): in `repeat` a step of a small CNN would take 8 times as long, on
    two devices 15 times. There is no forward-mode derivative of these then, as of max-pooling.

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
    of_kernel = [(pads[i][0], whole[i] + reach[i] - 1 - size[i] - pads[i][0]) for i in (0, 1)]
    turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)  # (h, w, O, C)
    dx = lax.conv_general_dilated(dy, turned, (1, 1), of_x, lhs_dilation=strides, dimension_numbers=_LAYOUT)
    x_CHWB, dy_HWBO = x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3)
    dk = lax.conv_general_dilated(
        x_CHWB, dy_HWBO, (1, 1), of_kernel, rhs_dilation=strides, dimension_numbers=_LAYOUT
    )  # (C, h, w, O)
    return dx, dk.transpose(1, 2, 0, 3)


_convolve.defvjp(_forward, _backward)
