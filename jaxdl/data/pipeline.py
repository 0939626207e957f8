"""A batch is a function of (seed, step).

`Pipeline` puts a source, an order and transforms together. It has no iterator and no state to save: resuming is
asking for another step. Random numbers belong to positions in the stream, so neither the number of processes, nor
threads, nor a restart changes a batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from jaxdl.data.order import Order, RowRngs, batch_rng
from jaxdl.data.sources import Arrays, ArraySource, Example, Source, read_rows, stack
from jaxdl.errors import JaxdlError

ExampleTransform = Callable[[Example, np.random.Generator], Example]
BatchTransform = Callable[[Arrays, np.random.Generator], Arrays]


@dataclass(frozen=True)
class Pipeline:
    """Training batches: `data[step]` is a dict of NumPy arrays, the same whenever and wherever it is asked for.

    Args:
      source: anything with `len` and `[row] -> dict`; see `jaxdl.data.sources`.
      batch_size: rows of the *global* batch, over all processes.
      seed: 0 <= seed < 2**64; of the order and of the augmentation.
      shuffle: a new order each epoch.
      transforms: `(example, rng) -> example`, applied in turn to each example; `rng` depends on (seed, position) only.
        One with an attribute `is_batched = True`, as all of `jaxdl.data` have it, is called once for all rows:
        `(arrays, rngs) -> arrays`, with a list of each row's `rng`.
      batch_transforms: `(batch, rng) -> batch` on the global batch; `rng` depends on (seed, step) only. Rows of
        different processes may be mixed, so with these every process reads the whole global batch and keeps its block.
      process_index: which block of the global batch `data[step]` holds; set by `shard`.
      process_count: into how many blocks the global batch is cut.

    Raises:
      JaxdlError: an empty source, a batch size below 1 or one that the process count does not divide, NaN that no
        transform can fill.

    Example:
      >>> from jaxdl.data.sources import ArraySource
      >>> data = Pipeline(ArraySource({"x": np.arange(10)}), batch_size=4, shuffle=False)
      >>> data[2]["x"].tolist(), data.steps_per_epoch
      ([8, 9, 0, 1], 2.5)
    """

    source: Source
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    transforms: Sequence[ExampleTransform] = ()
    batch_transforms: Sequence[BatchTransform] = ()
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        _ = self.order
        _check_shard(self.batch_size, self.process_index, self.process_count)
        if not (self.transforms or self.batch_transforms):
            _check_finite(self.source)

    @cached_property
    def order(self) -> Order:
        """The order of the rows of the global batches."""
        return Order(len(self.source), self.batch_size, self.seed, self.shuffle)

    @property
    def n_rows(self) -> int:
        """Rows of the source: an epoch."""
        return len(self.source)

    @property
    def steps_per_epoch(self) -> float:
        """`n_rows / batch_size`; seldom a whole number, and nothing is dropped."""
        return self.n_rows / self.batch_size

    def shard(self, process_index: int, process_count: int) -> "Pipeline":
        """The same data, of which `data[step]` gives this process's contiguous block of each global batch.

        The blocks of all processes, one after the other, are the global batch bit for bit.

        Args:
          process_index: 0 .. process_count - 1, as `jax.process_index()`.
          process_count: must divide `batch_size`.

        Raises:
          JaxdlError: an index out of range, or a batch size that does not divide.

        Example:
          >>> from jaxdl.data.sources import ArraySource
          >>> data = Pipeline(ArraySource({"x": np.arange(8)}), batch_size=4, shuffle=False)
          >>> data.shard(1, 2)[0]["x"].tolist()
          [2, 3]
        """
        return replace(self, process_index=process_index, process_count=process_count)

    @property
    def _block(self) -> slice:
        size = self.batch_size // self.process_count
        return slice(self.process_index * size, (self.process_index + 1) * size)

    def rows(self, step: int) -> np.ndarray:
        """The row ids that `data[step]` holds, in its order; `data.order.rows(step)` are those of the global batch.

        Args:
          step: at least 0.

        Returns:
          int64 (batch_size // process_count,).

        Example:
          >>> from jaxdl.data.sources import ArraySource
          >>> Pipeline(ArraySource({"x": np.arange(8)}), batch_size=2, shuffle=False).rows(3).tolist()
          [6, 7]
        """
        return self.order.rows(step)[self._block]

    def __getitem__(self, step: int) -> Arrays:
        needed = slice(None) if self.batch_transforms else self._block
        batch = self._read(self.order.rows(step)[needed], self.order.positions(step)[needed])
        if not self.batch_transforms:
            return batch
        rng = batch_rng(self.seed, step)
        for transform in self.batch_transforms:
            batch = transform(batch, rng)
        return {key: value[self._block] for key, value in batch.items()}

    def _read(self, rows: np.ndarray, positions: np.ndarray) -> Arrays:
        return _transformed(self.source, rows, self.transforms, self.seed, positions)


def _check_shard(batch_size: int, process_index: int, process_count: int) -> None:
    if process_count < 1 or not 0 <= process_index < process_count:
        raise JaxdlError(
            f"process_index={process_index} of process_count={process_count} does not exist;"
            " take 0 .. process_count - 1."
        )
    if batch_size % process_count:
        near = max(process_count, round(batch_size / process_count) * process_count)
        raise JaxdlError(
            f"batch_size={batch_size} does not divide over {process_count} processes;"
            f" use a multiple of {process_count}, such as {near}."
        )


def _check_finite(source: Source) -> None:
    if isinstance(source, ArraySource):
        source.check_finite()


def _transformed(
    source: Source, rows: np.ndarray, transforms: Sequence[ExampleTransform], seed: int, positions: np.ndarray
) -> Arrays:
    """Reads rows and applies the transforms to each; those that say `is_batched` take all rows in one call."""
    if not transforms:
        return read_rows(source, rows)
    rngs = RowRngs(seed, positions)
    take = getattr(source, "take", None)
    data: Arrays | list[Example] = take(rows) if take is not None else [source[int(row)] for row in rows]
    for transform in transforms:
        if getattr(transform, "is_batched", False):
            data = _all_at_once(transform, data, rngs)
        else:
            examples = data if isinstance(data, list) else _unstack(data)
            data = [transform(example, rng) for example, rng in zip(examples, rngs, strict=True)]
    return stack(data) if isinstance(data, list) else data


def _all_at_once(transform: Any, data: Arrays | list[Example], rngs: Sequence[Any]) -> Arrays | list[Example]:
    if not isinstance(data, list):
        return transform(data, rngs)
    if len({tuple(map(np.shape, example.values())) for example in data}) == 1:
        return transform(stack(data), rngs)
    return [_unstack(transform(stack([example]), [rng]))[0] for example, rng in zip(data, rngs, strict=True)]


def _unstack(batch: Arrays) -> list[Example]:
    return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]


@dataclass(frozen=True)
class EvalBatches:
    """Every row once, in order; made by `eval_batches`. Has `len`, `[i]` and can be iterated any number of times."""

    source: Source
    batch_size: int
    transforms: Sequence[ExampleTransform] = ()
    process_index: int = 0
    process_count: int = 1

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def __iter__(self) -> Iterator[Arrays]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Arrays:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        size = self.batch_size // self.process_count
        first = index * self.batch_size + self.process_index * size
        wanted = np.arange(first, first + size, dtype=np.int64)
        rows = np.minimum(wanted, len(self.source) - 1)
        batch = _transformed(self.source, rows, self.transforms, 0, rows)
        is_real = (wanted < len(self.source)).astype(np.float32)
        weight = np.asarray(batch.get("weight", np.ones(size)), np.float32)
        return {**batch, "weight": weight * is_real.reshape(size, *[1] * (weight.ndim - 1))}


def eval_batches(
    source: Source,
    batch_size: int,
    *,
    transforms: Sequence[ExampleTransform] = (),
    process_index: int = 0,
    process_count: int = 1,
) -> EvalBatches:
    """Cuts a source into batches of one size, in order; the last is padded, so that one shape is compiled once.

    Padding rows repeat the last row and have `weight` 0; all others have the source's `weight`, or 1. A loss or
    metric that sums `value * weight` is therefore exact.

    Args:
      source: any source.
      batch_size: rows of the global batch; the process count must divide it.
      transforms: `(example, rng) -> example`; `rng` is a function of the row, the same at every evaluation.
      process_index: which block of each batch to give.
      process_count: into how many blocks each batch is cut.

    Returns:
      An `EvalBatches`: iterate it as often as needed, index it, or give it to `prefetch`.

    Raises:
      JaxdlError: an empty source, a batch size below 1 or one that the process count does not divide.

    Example:
      >>> from jaxdl.data.sources import ArraySource
      >>> [batch["weight"].tolist() for batch in eval_batches(ArraySource({"x": np.arange(3)}), 2)]
      [[1.0, 1.0], [1.0, 0.0]]
    """
    Order(len(source), batch_size, shuffle=False)
    _check_shard(batch_size, process_index, process_count)
    if not transforms:
        _check_finite(source)
    return EvalBatches(source, batch_size, tuple(transforms), process_index, process_count)
