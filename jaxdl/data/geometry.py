"""Affine maps of the plane, and images under them. A map is a 2 x 2 matrix and a shift, in pixels about the centre.

Dimensions: `H` height, `W` width, `C` channels; `...` stands for any leading axes, such as rows of a batch, each with a
map of its own.
"""

import numpy as np
from numpy.typing import ArrayLike

Affine = tuple[np.ndarray, np.ndarray]


def rotation(degrees: ArrayLike) -> Affine:
    """Counter-clockwise as seen (rows grow downwards).

    Example:
      >>> image = np.arange(4.0).reshape(2, 2, 1)
      >>> affine(image, rotation(90))[..., 0].round(6).tolist()
      [[1.0, 3.0], [0.0, 2.0]]
    """
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return _matrix(cos, -sin, sin, cos), np.zeros(2)


def shear(*, x: ArrayLike = 0.0, y: ArrayLike = 0.0) -> Affine:
    """Moves a pixel by `x` columns for each row from the centre, and by `y` rows for each column.

    Example:
      >>> affine(np.eye(3)[..., None], shear(x=-1.0))[..., 0].tolist()
      [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    """
    return _matrix(1.0, y, x, 1.0), np.zeros(2)


def translation(*, x: ArrayLike = 0.0, y: ArrayLike = 0.0) -> Affine:
    """Moves the image `x` pixels to the right and `y` down.

    Example:
      >>> affine(np.array([[[1.0], [2.0]]]), translation(x=1))[..., 0].tolist()
      [[0.0, 1.0]]
    """
    return np.eye(2), np.stack(np.broadcast_arrays(y, x), -1).astype(np.float64)


def _matrix(*entries: ArrayLike) -> np.ndarray:
    """Four numbers, or arrays (...), row after row -> (..., 2, 2)."""
    stacked = np.stack(np.broadcast_arrays(*entries), -1)
    return stacked.reshape(*stacked.shape[:-1], 2, 2)


def affine(image: np.ndarray, change: Affine) -> np.ndarray:
    """Moves the content of an image: the pixel at `p` comes from `inverse(p)`, bilinear, zero outside.

    Args:
      image: (..., H, W, C), uint8 or float.
      change: matrix (..., 2, 2) or (2, 2), and shift (..., 2) or (2,), on (row, column) about the centre of the image;
        the matrix is invertible.

    Returns:
      An image of the same shape and dtype.

    Example:
      >>> image = np.arange(6.0).reshape(2, 3, 1)
      >>> bool((affine(image, (np.eye(2), np.zeros(2))) == image).all())
      True
    """
    matrix, shift = np.linalg.inv(change[0])[..., None, None], change[1][..., None, None]
    centre = [(n - 1) / 2 for n in image.shape[-3:-1]]
    target = np.meshgrid(*(np.arange(n) for n in image.shape[-3:-1]), indexing="ij")
    # Written out, since a product of matrices rounds as the number of rows has it.
    row, column = (target[i] - centre[i] - shift[..., i, :, :] for i in (0, 1))
    row, column = (matrix[..., i, 0, :, :] * row + matrix[..., i, 1, :, :] * column + centre[i] for i in (0, 1))
    moved = _bilinear(image.astype(np.float64), row, column)
    return np.rint(moved).astype(np.uint8) if image.dtype == np.uint8 else moved.astype(image.dtype)


def _bilinear(image: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """(..., H, W, C) at places (..., H, W)."""
    *rows, height, width, n_channels = image.shape
    padded = np.pad(image, (*[(0, 0) for _ in rows], (1, 1), (1, 1), (0, 0)))
    # One pixel of zeros all round: a point further out than that sees zeros only.
    row = np.clip(row + 1, 0, height + 1)
    column = np.clip(column + 1, 0, width + 1)
    top = np.minimum(row.astype(np.int64), height)
    left = np.minimum(column.astype(np.int64), width)
    down, right = row - top, column - left
    first = np.arange(np.prod(rows, dtype=np.int64)).reshape(*rows, 1, 1) * (height + 2) * (width + 2)
    at = first + top * (width + 2) + left
    planes = np.moveaxis(padded, -1, 0).reshape(n_channels, -1)
    upper = planes.take(at, axis=1) * (1 - right) + planes.take(at + 1, axis=1) * right
    at += width + 2
    lower = planes.take(at, axis=1) * (1 - right) + planes.take(at + 1, axis=1) * right
    return np.moveaxis(upper * (1 - down) + lower * down, 0, -1)
