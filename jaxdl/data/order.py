"""Which row stands where: the order of the rows as a pure function of (seed, step).

The stream of training rows is a sequence of positions `p = step * batch_size + j`. Position `p` lies in epoch
`p // n_rows`, and holds the row `permutation(seed, epoch)[p % n_rows]`. Hence every row comes exactly once an epoch, a
batch may straddle two epochs, nothing is dropped, and any step can be looked up without walking there.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxdl.errors import JaxdlError

# One number a purpose: the same seed never gives two purposes the same random bits.
_SHUFFLE, _EXAMPLE, _BATCH, _SPLIT = range(4)


def _philox(seed: int, purpose: int, index: int) -> np.random.Philox:
    """A counter-based generator at block `index` of the stream (seed, purpose); blocks are 2**128 draws apart."""
    if not 0 <= seed < 2**64:
        raise JaxdlError(f"seed={seed} must be at least 0 and less than 2**64; choose another.")
    return np.random.Philox(key=np.array([seed, purpose], np.uint64), counter=np.array([0, 0, index, 0], np.uint64))


def example_rng(seed: int, position: int) -> np.random.Generator:
    """The random numbers of one example: a function of the seed and the position in the stream, of nothing else.

    Args:
      seed: the seed of the pipeline, 0 <= seed < 2**64.
      position: `step * batch_size + j`, not the row id, so that a row is augmented anew each epoch.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox).

    Example:
      >>> bool(example_rng(0, 7).random() == example_rng(0, 7).random())
      True
    """
    return np.random.Generator(_philox(seed, _EXAMPLE, position))


class RowRngs(Sequence[np.random.Generator]):
    """`example_rng` of each position; made when the first is asked for, since not every transform draws.

    Example:
      >>> bool(RowRngs(0, np.array([7, 8]))[1].random() == example_rng(0, 8).random())
      True
    """

    def __init__(self, seed: int, positions: np.ndarray) -> None:
        self._seed, self._positions = seed, positions

    @functools.cached_property
    def _made(self) -> list[np.random.Generator]:
        return [example_rng(self._seed, position) for position in self._positions.tolist()]

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: Any) -> Any:
        return self._made[index]

    def __iter__(self) -> Iterator[np.random.Generator]:
        return iter(self._made)


def batch_rng(seed: int, step: int) -> np.random.Generator:
    """The random numbers of one batch: a function of the seed and the step; independent of `example_rng`.

    Args:
      seed: the seed of the pipeline, 0 <= seed < 2**64.
      step: the optimizer step that the batch is for.

    Example:
      >>> bool(batch_rng(0, 7).random() == example_rng(0, 7).random())
      False
    """
    return np.random.Generator(_philox(seed, _BATCH, step))


def permutation(n_rows: int, seed: int, epoch: int, *, purpose: int = _SHUFFLE) -> np.ndarray:
    """The order of the rows in one epoch.

    Sorts raw Philox words instead of calling `Generator.permutation`: NumPy promises that the raw words never change,
    and makes no such promise for the derived draws. A run therefore sees the same rows under every NumPy.

    Args:
      n_rows: how many rows.
      seed: 0 <= seed < 2**64.
      epoch: 0 for the first pass.
      purpose: keeps shuffles for different ends apart.

    Returns:
      int64 (n_rows,), every row id once.

    Example:
      >>> sorted(permutation(5, seed=0, epoch=3).tolist())
      [0, 1, 2, 3, 4]
    """
    return np.argsort(_philox(seed, purpose, epoch).random_raw(n_rows), kind="stable")


@dataclass(frozen=True)
class Order:
    """The endless stream of row ids, cut into batches, with random access to any step.

    Args:
      n_rows: rows of the source, at least 1.
      batch_size: rows of a batch, at least 1; may exceed `n_rows` (a full batch is `batch_size == n_rows`).
      seed: 0 <= seed < 2**64.
      shuffle: a new permutation every epoch; otherwise the order of the source, again and again.

    Raises:
      JaxdlError: no rows, a batch size below 1, a seed out of range; all at once.

    Example:
      >>> order = Order(n_rows=5, batch_size=2, shuffle=False)
      >>> order.rows(2).tolist()
      [4, 0]
    """

    n_rows: int
    batch_size: int
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        problems = []
        if self.n_rows < 1:
            problems.append(f"n_rows={self.n_rows}: the source is empty; give it at least one row.")
        if self.batch_size < 1:
            problems.append(f"batch_size={self.batch_size} must be at least 1.")
        if not 0 <= self.seed < 2**64:
            problems.append(f"seed={self.seed} must be at least 0 and less than 2**64.")
        if problems:
            raise JaxdlError.listing("order of the rows", problems)

    @functools.cached_property
    def _epoch_rows(self) -> Callable[[int], np.ndarray]:
        """The permutation of an epoch; the last two are kept, since batches straddle epochs."""
        return functools.lru_cache(maxsize=2)(lambda epoch: permutation(self.n_rows, self.seed, epoch))

    def positions(self, step: int) -> np.ndarray:
        """The places in the stream that a step takes: int64 (batch_size,), `step * batch_size + j`.

        Args:
          step: at least 0.

        Raises:
          JaxdlError: a negative step.

        Example:
          >>> Order(n_rows=5, batch_size=2).positions(3).tolist()
          [6, 7]
        """
        if step < 0:
            raise JaxdlError(f"step={step} must be at least 0; the stream of rows begins at step 0.")
        return np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)

    def rows(self, step: int) -> np.ndarray:
        """The row ids of a step, in the order in which the batch holds them.

        Args:
          step: at least 0.

        Returns:
          int64 (batch_size,).

        Raises:
          JaxdlError: a negative step.

        Example:
          >>> order = Order(n_rows=4, batch_size=4, seed=1)
          >>> sorted(order.rows(0).tolist()), sorted(order.rows(9).tolist())
          ([0, 1, 2, 3], [0, 1, 2, 3])
        """
        epochs, places = np.divmod(self.positions(step), self.n_rows)
        if not self.shuffle:
            return places
        rows = np.empty_like(places)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = slice(*np.searchsorted(epochs, [epoch, epoch + 1]))
            rows[here] = self._epoch_rows(epoch)[places[here]]
        return rows
