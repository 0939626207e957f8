"""The two matrices of LoRA, as jaxdl's leaves and as PEFT's tensors.

Dimensions: `I` inputs, `O` outputs, `R` rank.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxdl.pretrained.peft.places import Place

MAGNITUDE = "lora_magnitude_vector"


class Pair(NamedTuple):
    """The leaves of one adapted module.

    Attributes:
      a: (I..., R); the inputs of an embedding are its rows.
      b: (R, O).
      magnitude: (O,) of DoRA, or None.
    """

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None = None


def pair_tensors(place: Place, pair: Pair) -> dict[str, np.ndarray]:
    """PEFT's tensors of a module, by the end of their name; padding is cut off.

    Args:
      place: the module.
      pair: of the whole module (`join_pairs`).

    Example:
      >>> from jaxdl.pretrained.transforms import transpose
      >>> place = Place("fc", "linear", ("up/kernel",), (3,), transpose)
      >>> {name: x.shape for name, x in pair_tensors(place, Pair(np.ones((2, 1)), np.ones((1, 3)))).items()}
      {'lora_A.weight': (1, 2), 'lora_B.weight': (3, 1)}
    """
    a, b, n = pair.a, pair.b, sum(place.widths)
    if place.kind == "embedding":
        return {"lora_embedding_A": a[:n].T, "lora_embedding_B": b.T}
    if place.kind == "output":  # x (a b)^T = (x b^T) a^T
        return {"lora_A.weight": b, "lora_B.weight": a[:n]}
    first = place.transform.to_tensor(a) if place.kind == "conv" else a.T
    space = (1,) * (first.ndim - 2)
    tensors = {"lora_A.weight": first, "lora_B.weight": b[:, :n].T.reshape(n, -1, *space)}
    if pair.magnitude is not None:
        tensors[MAGNITUDE] = pair.magnitude[:n].reshape((1, n, *space) if space else (n,))
    return tensors


def tensor_pair(place: Place, tensors: Mapping[str, np.ndarray], inputs: tuple[int, ...]) -> Pair:
    """The inverse of `pair_tensors`, without padding.

    Args:
      place: the module.
      tensors: by the end of their name, of the right shapes (`expected_shapes`).
      inputs: the input axes of the leaf.
    """
    if place.kind == "embedding":
        return Pair(tensors["lora_embedding_A"].T, tensors["lora_embedding_B"].T)
    first, second = tensors["lora_A.weight"], tensors["lora_B.weight"]
    if place.kind == "output":
        return Pair(second, first)
    rank = len(first)
    a = place.transform.to_leaf(first, (*inputs, rank)) if place.kind == "conv" else first.T
    magnitude = tensors[MAGNITUDE].reshape(-1) if MAGNITUDE in tensors else None
    return Pair(a, second.reshape(-1, rank).T, magnitude)


def expected_shapes(place: Place, leaf: tuple[int, ...], rank: int, has_magnitude: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of PEFT's tensors of a module.

    Args:
      place: the module.
      leaf: the shape of its first leaf.
      rank: of the pair.
      has_magnitude: DoRA.
    """
    n = leaf[-1] if place.kind in ("embedding", "output") else sum(place.widths)
    magnitude = np.zeros(n) if has_magnitude else None
    zeros = Pair(np.zeros((*leaf[:-1], rank)), np.zeros((rank, n)), magnitude)
    return {name: tensor.shape for name, tensor in pair_tensors(place, zeros).items()}


def join_pairs(pairs: Sequence[Pair | None], widths: Sequence[int], scales: Sequence[float]) -> Pair:
    """Makes the pair of a fused module out of those of its parts.

    Parts with the same `a` keep it, and their `b` stand side by side. Otherwise the rank is the sum of theirs: the `a`
    stand side by side, and `b` has a block for each part and zeros elsewhere.

    Args:
      pairs: one a part, None where it has no adapter; with a magnitude none is None.
      widths: outputs of each part.
      scales: the factor of each part.

    Returns:
      The pair, whose factor is that of the first part that has one: blocks of another factor are multiplied to fit.

    Example:
      >>> one, two = Pair(np.full((2, 1), 3), np.full((1, 2), 4)), Pair(np.full((2, 1), 5), np.full((1, 1), 6))
      >>> pair = join_pairs([one, None, two], [2, 1, 1], [1.0, 1.0, 1.0])
      >>> pair.a.tolist(), pair.b.tolist()
      ([[3, 5], [3, 5]], [[4, 4, 0, 0], [0, 0, 0, 6]])
    """
    given = [(i, pair) for i, pair in enumerate(pairs) if pair is not None]
    first, scale = given[0][1], scales[given[0][0]]
    if len(pairs) == 1:
        return first
    magnitudes = [pair.magnitude for _, pair in given if pair.magnitude is not None]
    magnitude = np.concatenate(magnitudes) if magnitudes else None
    if len(given) == len(pairs) and all(np.array_equal(pair.a, first.a) for _, pair in given):
        return Pair(first.a, np.concatenate([pair.b for _, pair in given], 1), magnitude)
    starts = np.cumsum([0, *widths])
    blocks = [_within(scaled(pair.b, scales[i] / scale), starts[i], starts[-1]) for i, pair in given]
    return Pair(np.concatenate([pair.a for _, pair in given], -1), np.concatenate(blocks), magnitude)


def _within(b: np.ndarray, start: int, width: int) -> np.ndarray:
    return np.pad(b, [(0, 0), (start, width - start - b.shape[1])])


def scaled(b: np.ndarray, factor: float) -> np.ndarray:
    """`factor * b`; `b` itself where the factor is one but for rounding.

    Example:
      >>> scaled(np.ones(1, np.float32), 0.5)
      array([0.5], dtype=float32)
    """
    return b if abs(factor - 1) < 1e-12 else (b * factor).astype(b.dtype)


def split_pair(pair: Pair, widths: Sequence[int]) -> list[Pair | None]:
    """The inverse of `join_pairs`: the pair of each part of a fused module.

    Where every direction of the rank reaches one part only, and they stand in the order of the parts, `b` is made of
    blocks, and each part gets its own; a part without any gets None. Otherwise all parts share `a`.

    Args:
      pair: of the whole module, without padding.
      widths: outputs of each part.

    Example:
      >>> pair = Pair(np.array([[3, 5], [3, 5]]), np.array([[4, 4, 0, 0], [0, 0, 0, 6]]))
      >>> one, none, two = split_pair(pair, [2, 1, 1])
      >>> one.b.tolist(), none, two.a.tolist()
      ([[4, 4]], None, [[5], [5]])
    """
    if len(widths) == 1:
        return [pair]
    ends = np.cumsum(widths)[:-1]
    parts = np.split(pair.b, ends, 1)
    magnitudes = [None] * len(parts) if pair.magnitude is None else np.split(pair.magnitude, ends)
    reached = np.stack([part.any(1) for part in parts])  # (parts, R)
    owners = reached.argmax(0)
    is_blocks = (reached.sum(0) == 1).all() and (np.diff(owners) >= 0).all()
    if not is_blocks or (pair.magnitude is not None and not reached.any(1).all()):
        return [Pair(pair.a, part, m) for part, m in zip(parts, magnitudes, strict=True)]
    own = [owners == i for i in range(len(parts))]
    blocks = [Pair(pair.a[..., rows], part[rows], m) for rows, part, m in zip(own, parts, magnitudes, strict=True)]
    return [block if block.b.size else None for block in blocks]


def padded(pair: Pair, leaf: tuple[int, ...]) -> Pair:
    """The pair with zeros where the leaf has more rows or outputs than the module (a vocabulary); ones in a magnitude.

    Args:
      pair: of one leaf.
      leaf: its shape.

    Example:
      >>> padded(Pair(np.ones((3, 1)), np.ones((1, 2))), (4, 2)).a.tolist()
      [[1.0], [1.0], [1.0], [0.0]]
    """
    more_rows, more_outputs = leaf[0] - pair.a.shape[0], leaf[-1] - pair.b.shape[1]
    a = np.pad(pair.a, [(0, more_rows), *[(0, 0)] * (pair.a.ndim - 1)])
    b = np.pad(pair.b, [(0, 0), (0, more_outputs)])
    magnitude = None if pair.magnitude is None else np.pad(pair.magnitude, (0, more_outputs), constant_values=1)
    return Pair(a, b, magnitude)
