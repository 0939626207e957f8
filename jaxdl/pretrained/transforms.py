"""How one Hugging Face tensor becomes one leaf, and back: every transform knows its inverse and its shapes."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Transform(NamedTuple):
    """A bijection between a Hugging Face tensor and a jaxdl leaf.

    Attributes:
      name: for error messages.
      to_leaf: `(tensor, shape of the leaf) -> leaf`.
      to_tensor: `leaf -> tensor`, the inverse.
      tensor_shape: the shape of the tensor that a leaf of the given shape needs; a ValueError says why there is none.

    Example:
      >>> transpose.to_leaf(np.ones((3, 2)), (2, 3)).shape, transpose.tensor_shape((2, 3))
      ((2, 3), (3, 2))
    """

    name: str
    to_leaf: Callable[[np.ndarray, Shape], np.ndarray]
    to_tensor: Callable[[np.ndarray], np.ndarray]
    tensor_shape: Callable[[Shape], Shape]

    def then(self, other: "Transform") -> "Transform":
        """The transform that applies `self`, then `other`, on the way to the leaf.

        Example:
          >>> both = pad_rows(3).then(transpose)
          >>> both.to_leaf(np.ones((3, 2)), (2, 128)).shape, both.tensor_shape((2, 128))
          ((2, 128), (3, 2))
        """
        return Transform(
            f"{self.name}, {other.name}",
            lambda tensor, shape: other.to_leaf(self.to_leaf(tensor, other.tensor_shape(shape)), shape),
            lambda leaf: self.to_tensor(other.to_tensor(leaf)),
            lambda shape: self.tensor_shape(other.tensor_shape(shape)),
        )


def _of_rank(least: int, most: int, shape: Shape, what: str) -> None:
    if not least <= len(shape) <= most:
        rank = f"{least}" if least == most else f"{least} to {most}"
        raise ValueError(f"{what} needs {rank} dimensions")


def _transposed(shape: Shape) -> Shape:
    _of_rank(2, 2, shape, "transpose")
    return shape[::-1]


def _conv_shape(shape: Shape) -> Shape:
    _of_rank(3, 5, shape, "conv")
    *space, n_in, n_out = shape
    return (n_out, n_in, *space)


identity = Transform("identity", lambda tensor, _: tensor, lambda leaf: leaf, lambda shape: shape)
"""The tensor as it is: embeddings, norms, biases, and GPT-2's Conv1D kernels, which are (inputs, outputs) already."""

transpose = Transform("transpose", lambda tensor, _: tensor.T, lambda leaf: leaf.T, _transposed)
"""PyTorch's Linear weight (outputs, inputs) <-> a Dense kernel (inputs, outputs)."""

conv = Transform(
    "conv",
    lambda tensor, _: np.moveaxis(tensor, (0, 1), (-1, -2)),
    lambda leaf: np.moveaxis(leaf, (-1, -2), (0, 1)),
    _conv_shape,
)
"""PyTorch's convolution weight (O, I, H, W) <-> a Conv kernel (H, W, I, O); one or three spatial axes do as well."""


def reshape(*tensor_shape: int) -> Transform:
    """The same values in the same order; the tensor has the given shape, one of them may be -1.

    Example:
      >>> reshape(1, 1, -1).tensor_shape((6,))
      (1, 1, 6)
    """

    def shape_of(shape: Shape) -> Shape:
        known = math.prod(n for n in tensor_shape if n != -1)
        size = math.prod(shape)
        if size % known or (-1 not in tensor_shape and size != known):
            raise ValueError(f"{size} values do not reshape to {tensor_shape}")
        return tuple(size // known if n == -1 else n for n in tensor_shape)

    name = f"reshape{tensor_shape}"
    return Transform(
        name, lambda tensor, shape: tensor.reshape(shape), lambda x: x.reshape(shape_of(x.shape)), shape_of
    )


def patches(height: int, width: int) -> Transform:
    """A convolution whose stride is its size (O, I, H, W) <-> a Dense kernel over flat patches (H*W*I, O).

    Args:
      height: of a patch, in pixels.
      width: of a patch, in pixels.

    Example:
      >>> patches(4, 4).tensor_shape((48, 10))
      (10, 3, 4, 4)
    """

    def unflat(shape: Shape) -> Shape:
        _of_rank(2, 2, shape, "patches")
        if shape[0] % (height * width):
            raise ValueError(f"{shape[0]} rows are no whole number of channels of {height} x {width} pixels")
        return (height, width, shape[0] // (height * width), shape[1])

    flat = Transform(
        "flat", lambda tensor, shape: tensor.reshape(shape), lambda leaf: leaf.reshape(unflat(leaf.shape)), unflat
    )
    return conv.then(flat)._replace(name=f"patches({height}, {width})")


def pad_rows(n_rows: int) -> Transform:
    """The first `n_rows` rows of a leaf that has more: the rest are zeros on import and dropped on export.

    Args:
      n_rows: of the tensor, such as the vocabulary's real size.

    Example:
      >>> pad_rows(2).to_leaf(np.ones((2, 1)), (4, 1)).tolist()
      [[1.0], [1.0], [0.0], [0.0]]
    """
    return _pad(n_rows, 0)


def pad_columns(n_columns: int) -> Transform:
    """As `pad_rows`, along the last axis: a vocabulary's output kernel (D, V) or bias (V,).

    Example:
      >>> pad_columns(2).to_tensor(np.array([[1, 2, 0, 0]])).tolist()
      [[1, 2]]
    """
    return _pad(n_columns, -1)


def _pad(n: int, axis: int) -> Transform:
    what = "columns" if axis else "rows"

    def to_leaf(tensor: np.ndarray, shape: Shape) -> np.ndarray:
        missing = [(0, 0)] * tensor.ndim
        missing[axis] = (0, shape[axis] - n)
        return np.pad(tensor, missing) if shape[axis] > n else tensor

    def tensor_shape(shape: Shape) -> Shape:
        if not shape or shape[axis] < n:
            raise ValueError(f"it has fewer than the {n} {what} of the tensor")
        return (*shape[:-1], n) if axis else (n, *shape[1:])

    take = (lambda leaf: leaf[..., :n]) if axis else (lambda leaf: leaf[:n])
    return Transform(f"pad_{what}({n})", to_leaf, take, tensor_shape)
