"""Affine maps of the plane, and images under them. A map is a 2 x 2 matrix and a shift, in pixels about the centre."""

import numpy as np

Affine = tuple[np.ndarray, np.ndarray]


def rotation(degrees: float) -> Affine:
    """Counter-clockwise as seen (rows grow downwards).

    Example:
      >>> image = np.arange(4.0).reshape(2, 2, 1)
      >>> affine(image, rotation(90))[..., 0].round(6).tolist()
      [[1.0, 3.0], [0.0, 2.0]]
    """
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[cos, -sin], [sin, cos]]), np.zeros(2)


def shear(*, x: float = 0.0, y: float = 0.0) -> Affine:
    """Moves a pixel by `x` columns for each row from the centre, and by `y` rows for each column.

    Example:
      >>> affine(np.eye(3)[..., None], shear(x=-1.0))[..., 0].tolist()
      [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    """
    return np.array([[1.0, y], [x, 1.0]]), np.zeros(2)


def translation(*, x: float = 0.0, y: float = 0.0) -> Affine:
    """Moves the image `x` pixels to the right and `y` down.

    Example:
      >>> affine(np.array([[[1.0], [2.0]]]), translation(x=1))[..., 0].tolist()
      [[0.0, 1.0]]
    """
    return np.eye(2), np.array([y, x], np.float64)


def affine(image: np.ndarray, change: Affine) -> np.ndarray:
    """Moves the content of an image: the pixel at `p` comes from `inverse(p)`, bilinear, zero outside.

    Args:
      image: (H, W, C), uint8 or float.
      change: `(matrix, shift)` on (row, column) about the centre of the image; the matrix is invertible.

    Returns:
      An image of the same shape and dtype.

    Example:
      >>> image = np.arange(6.0).reshape(2, 3, 1)
      >>> bool((affine(image, (np.eye(2), np.zeros(2))) == image).all())
      True
    """
    height, width = image.shape[:2]
    centre = np.array([(height - 1) / 2, (width - 1) / 2])
    matrix, shift = change
    target = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1)
    origin = (target - centre - shift) @ np.linalg.inv(matrix).T + centre
    moved = _bilinear(image.astype(np.float64), origin[..., 0], origin[..., 1])
    return np.rint(moved).astype(np.uint8) if image.dtype == np.uint8 else moved.astype(image.dtype)


def _bilinear(image: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    # One pixel of zeros all round: a point further out than that sees zeros only.
    row = np.clip(row + 1, 0, image.shape[0] + 1)
    column = np.clip(column + 1, 0, image.shape[1] + 1)
    top = np.minimum(row.astype(np.int64), image.shape[0])
    left = np.minimum(column.astype(np.int64), image.shape[1])
    down, right = (row - top)[..., None], (column - left)[..., None]
    upper = padded[top, left] * (1 - right) + padded[top, left + 1] * right
    lower = padded[top + 1, left] * (1 - right) + padded[top + 1, left + 1] * right
    return upper * (1 - down) + lower * down
