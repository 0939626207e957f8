"""Matrices as 8- and 4-bit codes in blocks, each with its largest absolute value."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

BLOCK = 64
SMALLEST_BLOCK = 8

# 4-bit NormalFloat: quantiles of a normal distribution, scaled to [-1, 1] (Dettmers et al. 2023, appendix E).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class Quantized(flax.struct.PyTreeNode):
    """A matrix in blocks along its last axis, each with its largest absolute value. The dtype of the codes is the kind.

    Leading axes are those of the matrix, so a stack of layers can be sliced by `nn.scan`.

    Attributes:
      codes: int8 (..., n): the value is `codes / 127` of the block's largest; or, for NF4, uint8 (..., n / 2): two
        numbers of values in `NF4`, the first in the high four bits.
      absmax: uint32 (..., n / block), the bits of the float32 largest absolute value of each block.
    """

    codes: Array
    absmax: Array

    @property
    def kind(self) -> str:
        """What the codes mean: "int8" or "nf4"."""
        return "int8" if self.codes.dtype == jnp.int8 else "nf4"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        *leading, last = self.codes.shape
        return (*leading, last if self.kind == "int8" else 2 * last)


def is_quantized(x: Any) -> bool:
    """Whether this is a `Quantized` node.

    Example:
      >>> is_quantized(jnp.zeros(2))
      False
    """
    return isinstance(x, Quantized)


def block_size(n: int) -> int:
    """The size of the blocks of an axis of n: 64, or the largest power of two below that divides it.

    Example:
      >>> block_size(768), block_size(96), block_size(10)
      (64, 32, 2)
    """
    return min(BLOCK, n & -n)


@functools.partial(jax.jit, static_argnums=1)
def encode(leaf: Array, kind: str) -> Quantized | Array:
    """A leaf in a kind of `quantize`.

    Example:
      >>> encode(jnp.array([[-127.0, 1.0, 0, 0, 0, 0, 0, 63.6]]), "int8").codes.tolist()
      [[-127, 1, 0, 0, 0, 0, 0, 64]]
    """
    if kind == "bfloat16":
        return leaf.astype(jnp.bfloat16)
    blocks = leaf.astype(jnp.float32).reshape(*leaf.shape[:-1], -1, block_size(leaf.shape[-1]))
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    unit = (blocks / jnp.where(absmax == 0, 1.0, absmax)[..., None]).reshape(leaf.shape)
    if kind == "int8":
        codes = jnp.round(unit * 127).astype(jnp.int8)
    else:
        steps = jnp.asarray(NF4)
        nearest_step = jnp.searchsorted((steps[1:] + steps[:-1]) / 2, unit).astype(jnp.uint8)
        codes = nearest_step[..., 0::2] << 4 | nearest_step[..., 1::2]
    return Quantized(codes, jax.lax.bitcast_convert_type(absmax, jnp.uint32))


def decode(leaf: Quantized, dtype: Any) -> Array:
    """The matrix that the codes stand for.

    Example:
      >>> decode(encode(jnp.array([[-127.0, 1.0, 0, 0, 0, 0, 0, 63.6]]), "int8"), jnp.float32).tolist()
      [[-127.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 64.0]]
    """
    absmax, codes, shape = jax.lax.bitcast_convert_type(leaf.absmax, jnp.float32), leaf.codes, leaf.shape
    if leaf.kind == "int8":
        values, absmax = codes.astype(jnp.float32), absmax / 127
    else:
        pairs = jnp.stack([codes >> 4, codes & 15], axis=-1).reshape(shape)
        values = jnp.asarray(NF4).at[pairs].get(mode="promise_in_bounds")
    blocks = values.reshape(*absmax.shape, -1) * absmax[..., None]
    return blocks.reshape(shape).astype(dtype)
