"""Reading ahead in background threads, through Grain."""

import sys
from collections.abc import Callable, Generator
from typing import Any, Protocol

from jaxdl.data.sources import Arrays
from jaxdl.errors import JaxdlError


class Batches(Protocol):
    """Anything with `data[step] -> dict of arrays`: a `Pipeline`, `EvalBatches`, a list."""

    def __getitem__(self, step: int, /) -> Arrays: ...


class _Window:
    """The steps start .. stop - 1 as a Grain source."""

    def __init__(self, data: Batches, start: int, n_steps: int, put: Callable[[Arrays], Any]) -> None:
        self._data, self._start, self._n_steps, self._put = data, start, n_steps, put

    def __len__(self) -> int:
        return self._n_steps

    def __getitem__(self, index: int) -> Any:
        return self._put(self._data[self._start + index])


def prefetch(
    data: Batches,
    start_step: int = 0,
    stop_step: int | None = None,
    *,
    put: Callable[[Arrays], Any] | None = None,
    n_ahead: int = 2,
    n_threads: int = 1,
) -> Generator[Any, None, None]:
    """Yields `put(data[step])` for start_step <= step < stop_step, in order, read ahead in the background.

    The threads change the time at which a batch is made, never what is in it. An exception in the source, a
    transform or `put` comes out here at its own step, with its own type. Reading begins at the first `next`; closing
    the iterator, or leaving the loop, cancels what is not yet begun.

    Args:
      data: gives the batch of any step.
      start_step: the first step.
      stop_step: the step before which to end; None for no end.
      put: moves a batch to the devices, as `lambda batch: jax.device_put(batch, sharding)`; runs in the background
        thread, so that the transfer overlaps the step too. None leaves NumPy arrays.
      n_ahead: batches held ready; 0 reads in the foreground.
      n_threads: batches made at the same time. One is best for arrays in memory, more for decoding files.

    Raises:
      JaxdlError: negative numbers, or a stop before the start.

    Example:
      >>> list(prefetch([{"x": 1}, {"x": 2}, {"x": 3}], 1, 3, put=lambda batch: batch["x"] * 10))
      [20, 30]
    """
    if min(start_step, n_ahead) < 0 or n_threads < 1:
        raise JaxdlError(
            f"start_step={start_step} and n_ahead={n_ahead} must be at least 0, n_threads={n_threads} at least 1."
        )
    if stop_step is not None and stop_step < start_step:
        raise JaxdlError(f"stop_step={stop_step} lies before start_step={start_step}; nothing could be read.")
    n_steps = (sys.maxsize if stop_step is None else stop_step) - start_step
    window = _Window(data, start_step, n_steps, put or (lambda batch: batch))
    return _read_ahead(window, n_ahead, n_threads)


def _read_ahead(window: _Window, n_ahead: int, n_threads: int) -> Generator[Any, None, None]:
    import grain

    if len(window) == 0:
        return
    options = grain.ReadOptions(num_threads=n_threads if n_ahead else 0, prefetch_buffer_size=n_ahead)
    iterator = iter(grain.MapDataset.source(window).to_iter_dataset(options))
    try:
        for _ in range(len(window)):
            yield next(iterator)
    finally:
        iterator.close()
