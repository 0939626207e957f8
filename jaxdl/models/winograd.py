"""Convolutions of 3x3 with 4 multiplications an output instead of 9, as products of matrices.

Winograd's F(2x2, 3x3) (Lavin & Gray 2015, arXiv:1509.09308): a tile d of 4x4 inputs and a kernel g give 2x2 outputs,
`A^T [(G g G^T) * (B^T d B)] A`; over channels and tiles, `*` is a product of matrices at each of the 16 places of a
tile. The gradient of the kernel is `G^T [(B^T d B) * (A dy A^T)] G`.

Dimensions: `B` batch, `H` height, `W` width, `C` channels in, `O` channels out, `h` and `w` tiles in height and width.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

Pads = tuple[tuple[int, int], tuple[int, int]]
_Matrix = Sequence[Sequence[float]]
_Grid = Sequence[Sequence[Array]]  # an array for each place
_OF_INPUT: _Matrix = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))  # B^T
_OF_KERNEL: _Matrix = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))  # G
_OF_OUTPUT: _Matrix = ((1, 1, 1, 0), (0, 1, -1, -1))  # A^T
# Below these, transforms take what the products save.
_LEAST_WIDTH, _LEAST_WIDTH_FOR_KERNEL, _LEAST_TILES = 20, 40, 32
_CACHED, _CACHED_MAPPED = 2**23, 2**21  # bytes of the transformed tiles at work at a time, on all cores or on one


def is_faster(x: Array, kernel: Array, strides: Sequence[int], pads: Pads, for_kernel: bool = False) -> bool:
    """Whether `convolve`, or `gradient_of_kernel`, is faster than XLA's convolutions on a CPU.

    It was measured on two cores with AVX-512, on one and two devices, of 1 to 128 images, 4 to 32 pixels and 32 to 512
    channels.

    Example:
      >>> x, kernel, pads = jnp.ones((8, 16, 16, 64)), jnp.ones((3, 3, 64, 64)), ((1, 1), (1, 1))
      >>> is_faster(x, kernel, (1, 1), pads), is_faster(x[..., :3], kernel[:, :, :3], (1, 1), pads)
      (True, False)
    """
    if kernel.shape[:2] != (3, 3) or tuple(strides) != (1, 1):
        return False
    (h, w), (n_in, n_out) = _n_tiles(x, pads), kernel.shape[2:]
    least = _LEAST_WIDTH_FOR_KERNEL if for_kernel else _LEAST_WIDTH
    n_whole, n_outputs = 4 * h * w, math.prod(_output_size(x, pads))  # an odd size fills its last tiles with zeros
    is_wide = n_in * n_out * n_outputs >= least * (n_in + n_out) * n_whole and len(x) * h * w >= _LEAST_TILES
    return is_wide and x.dtype == kernel.dtype and x.dtype in (jnp.float32, jnp.float64)


def convolve(x: Array, kernel: Array, pads: Pads, is_turned: bool = False) -> Array:
    """(B, H, W, C) and (3, 3, C, O) -> (B, H', W', O), with stride 1.

    If it `is_turned`, the kernel is (3, 3, O, C), and its first row and column are taken as its last: as its gradient
    with respect to the input needs it, without a copy.

    Example:
      >>> float(convolve(jnp.ones((1, 5, 4, 2)), jnp.ones((3, 3, 2, 1)), ((0, 0), (1, 1)))[0, 1, 1, 0])
      18.0
    """
    order = -1 if is_turned else 1
    height, width = _output_size(x, pads)
    kernels = _transform(_OF_KERNEL, [list(row)[::order] for row in kernel][::order])

    def times(tile: Array, kernel: Array) -> Array:
        return tile @ (kernel.T if is_turned else kernel)

    def of_group(x: Array) -> Array:
        products = _pairwise(times, _input_tiles(x, pads), kernels)
        return _joined(_transform(_OF_OUTPUT, products))[:, :height, :width]

    n_groups = _n_groups(x, pads, width=max(kernel.shape[2:]))
    return _ungrouped(lax.map(of_group, _grouped(x, n_groups)))


def gradient_of_kernel(x: Array, dy: Array, pads: Pads) -> Array:
    """(B, H, W, C) and the gradient (B, H', W', O) of what `convolve` gave -> (3, 3, C, O)."""
    (h, w), (height, width) = _n_tiles(x, pads), dy.shape[1:3]

    def of_group(x: Array, dy: Array) -> _Grid:
        dy = _padded(dy, ((0, 2 * h - height), (0, 2 * w - width)))
        dy_tiles = _transform(_turned(_OF_OUTPUT), _places(dy, 2, h, w))
        return _pairwise(_over_tiles, _input_tiles(x, pads), dy_tiles)

    def add(sums: _Grid, group: tuple[Array, Array]) -> tuple[_Grid, None]:
        return _pairwise(jnp.add, sums, of_group(*group)), None

    n_groups = _n_groups(x, pads, width=max(x.shape[3], dy.shape[3]))
    if n_groups == 1:
        sums = of_group(x, dy)
    else:
        zeros: _Grid = [[jnp.zeros_like(x, shape=(x.shape[3], dy.shape[3]))] * 4] * 4
        sums, _ = lax.scan(add, zeros, (_grouped(x, n_groups), _grouped(dy, n_groups)))
    return jnp.stack([jnp.stack(row) for row in _transform(_turned(_OF_KERNEL), sums)])


def _over_tiles(x: Array, dy: Array) -> Array:
    return x.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])


def _output_size(x: Array, pads: Pads) -> tuple[int, int]:
    return x.shape[1] + sum(pads[0]) - 2, x.shape[2] + sum(pads[1]) - 2


def _n_tiles(x: Array, pads: Pads) -> tuple[int, int]:
    height, width = _output_size(x, pads)
    return -(-height // 2), -(-width // 2)


def _input_tiles(x: Array, pads: Pads) -> _Grid:
    """(B, H, W, C) -> 4 x 4 of (B, h, w, C); an odd size gets one more row or column of zeros."""
    h, w = _n_tiles(x, pads)
    after = (2 * h + 2 - x.shape[1] - pads[0][0], 2 * w + 2 - x.shape[2] - pads[1][0])
    x = _padded(x, ((pads[0][0], after[0]), (pads[1][0], after[1])))
    return _transform(_OF_INPUT, _places(x, 4, h, w))


def _padded(x: Array, pads: Pads) -> Array:
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((before, after, 0) for before, after in pads), (0, 0, 0)))


def _places(x: Array, n: int, h: int, w: int) -> _Grid:
    """What lies at each of n x n places of the tiles, which begin at every other pixel."""
    return [[x[:, i : i + 2 * h - 1 : 2, j : j + 2 * w - 1 : 2] for j in range(n)] for i in range(n)]


def _joined(grid: _Grid) -> Array:
    """2 x 2 of (B, h, w, O) -> (B, 2 h, 2 w, O)."""
    b, h, w, n_outputs = grid[0][0].shape
    rows = [jnp.concatenate(row, -1).reshape(b, h, 1, 2 * w * n_outputs) for row in grid]
    return jnp.concatenate(rows, 2).reshape(b, 2 * h, 2 * w, n_outputs)


def _n_groups(x: Array, pads: Pads, width: int) -> int:
    """Of images whose transformed tiles fit into the cache."""
    h, w = _n_tiles(x, pads)
    cached = _CACHED_MAPPED if _is_mapped() else _CACHED
    least = -(-len(x) * 16 * h * w * width * x.itemsize // cached)
    return next(n for n in range(min(least, len(x)), len(x) + 1) if len(x) % n == 0)


def _grouped(x: Array, n_groups: int) -> Array:
    """(B, ...) -> (groups, B / groups, ...); every nth image in one, if not mapped: a batch on devices stays there."""
    if _is_mapped():
        return x.reshape(n_groups, -1, *x.shape[1:])
    return x.reshape(-1, n_groups, *x.shape[1:]).swapaxes(0, 1)


def _ungrouped(groups: Array) -> Array:
    return (groups if _is_mapped() else groups.swapaxes(0, 1)).reshape(-1, *groups.shape[2:])


def _is_mapped() -> bool:
    """Whether this runs in `jax.shard_map`, which gives every device images of its own."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def _transform(matrix: _Matrix, grid: _Grid) -> _Grid:
    """`matrix @ grid @ matrix.T`, of arrays."""
    rows = [_combine(matrix, row) for row in grid]
    return _turned([_combine(matrix, column) for column in _turned(rows)])


def _combine(matrix: _Matrix, parts: Sequence[Array]) -> list[Array]:
    terms = [[factor * part for factor, part in zip(row, parts, strict=True) if factor] for row in matrix]
    return [sum(row[1:], row[0]) for row in terms]


def _pairwise(function: Callable[[Array, Array], Array], a: _Grid, b: _Grid) -> _Grid:
    return [[function(x, y) for x, y in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]


def _turned(grid: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    return list(zip(*grid, strict=True))
