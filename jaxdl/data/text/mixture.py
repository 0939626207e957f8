"""Several sources as one, in given proportions."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdl.data.order import permutation
from jaxdl.data.sources import Arrays, Example, Source
from jaxdl.errors import JaxdlError


class Mixture:
    """A source that mixes others: `len(mixture)` rows, of which source i gives the share `weights[i]`, to within a row.

    The rows of the sources are spread evenly, so that every stretch has the proportions too; a `Pipeline` then shuffles
    as it does any source. Where a source has too few rows, they come again (in another order each time); where it has
    too many, a part of them is drawn.

    Args:
      sources: with rows of the same keys and shapes.
      weights: positive, one a source; they are divided by their sum.
      seed: of the order within each source.
      n_rows: rows of an epoch; None is the least number in which every row of every source comes at least once.

    Raises:
      JaxdlError: numbers that differ, weights that are not positive, an empty source; all at once.

    Example:
      >>> mixture = Mixture([[{"x": 1}], [{"x": 2}, {"x": 3}, {"x": 4}]], [1, 3])
      >>> len(mixture), sorted(mixture[row]["x"] for row in range(4))
      (4, [1, 2, 3, 4])
    """

    def __init__(
        self, sources: Sequence[Source], weights: Sequence[float], *, seed: int = 0, n_rows: int | None = None
    ) -> None:
        problems = _problems(sources, weights, n_rows)
        if problems:
            raise JaxdlError.listing("mixture", problems)
        shares = np.asarray(weights, np.float64) / np.sum(weights)
        sizes = np.array([len(source) for source in sources])
        n_rows = int(np.ceil((sizes / shares).max() - 1e-9)) if n_rows is None else n_rows
        self.sources, self.counts = list(sources), _quotas(shares, n_rows)
        fractions = [(np.arange(n) + 0.5) / max(n, 1) for n in self.counts]
        order = np.argsort(np.concatenate(fractions), kind="stable")
        self._source = np.repeat(np.arange(len(sources)), self.counts)[order]
        rows = [_repeated(n, size, seed, i) for i, (n, size) in enumerate(zip(self.counts, sizes, strict=True))]
        self._row = np.concatenate(rows)[order]
        if all(hasattr(source, "take") for source in sources):
            self.take = self._take

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, row: int) -> Example:
        return self.sources[self._source[row]][int(self._row[row])]

    def origin(self, row: int) -> tuple[int, int]:
        """Which source a row is from, and its row there.

        Example:
          >>> Mixture([[{"x": 1}], [{"x": 2}]], [1, 1]).origin(1)
          (1, 0)
        """
        return int(self._source[row]), int(self._row[row])

    def _take(self, rows: np.ndarray) -> Arrays:
        origin, inner = self._source[rows], self._row[rows]
        used = np.unique(origin)
        parts: list[Any] = [self.sources[i].take(inner[origin == i]) for i in used]
        if any(part.keys() != parts[0].keys() for part in parts):
            raise JaxdlError(f"the sources of a mixture differ in their keys: {[sorted(part) for part in parts]}.")
        back = np.argsort(np.concatenate([np.flatnonzero(origin == i) for i in used]), kind="stable")
        return {key: np.concatenate([part[key] for part in parts])[back] for key in parts[0]}


def _problems(sources: Sequence[Source], weights: Sequence[float], n_rows: int | None) -> list[str]:
    problems = []
    if len(sources) != len(weights) or not len(sources):
        problems.append(f"there are {len(sources)} sources and {len(weights)} weights; give one weight a source.")
    problems += [
        f"weight {i} is {w}; weights must be positive and finite: leave the source out instead."
        for i, w in enumerate(weights)
        if not 0 < w < np.inf
    ]
    problems += [f"source {i} has no rows; leave it out." for i, source in enumerate(sources) if len(source) == 0]
    if n_rows is not None and n_rows < 1:
        problems.append(f"n_rows={n_rows} must be at least 1.")
    return problems


def _quotas(shares: np.ndarray, n_rows: int) -> np.ndarray:
    """Whole numbers in these shares that add up to n_rows, by largest remainders."""
    quotas = np.floor(shares * n_rows + 1e-9).astype(np.int64)
    by_remainder = np.argsort(quotas - shares * n_rows, kind="stable")
    quotas[by_remainder[: n_rows - quotas.sum()]] += 1
    return quotas


def _repeated(n: int, size: int, seed: int, number: int) -> np.ndarray:
    """Rows of one source: a permutation, another one, and so on, n in all."""
    passes = [permutation(size, seed, (number << 32) + i) for i in range(-(-n // size))]
    return np.concatenate(passes)[:n] if passes else np.zeros(0, np.int64)
