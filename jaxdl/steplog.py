"""Metrics on their way from the device to the log: summed by interval, fetched one interval late."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxdl import metrics as metrics_lib
from jaxdl.metrics import METRICS

Row = tuple[int, dict[str, Any]]
_BY_NAME: dict[str, Any] = {kind.__name__: kind for kind in METRICS}


class NonFiniteStep(Exception):
    """Internal signal of `StepLog` to the loop: the metrics of this step are not finite."""

    def __init__(self, step: int, names: list[str]) -> None:
        super().__init__(f"step {step}: {names}")
        self.step, self.names = step, names


class StepLog:
    """Collects the metrics of steps and sums them into one row every `every` steps.

    `push` keeps device arrays and waits for nothing. `drain` fetches them; the sums are float64 on the host and are
    added step by step, so a row does not depend on when it was drained, nor on a restart in the middle (`to_json`).

    Args:
      every: steps in a row of the log.

    Example:
      >>> from jaxdl.metrics import Mean
      >>> log = StepLog(every=2)
      >>> for step in range(3):
      ...     log.push(step, {"loss": Mean(np.float32(step), np.float32(1))})
      >>> [(step, metrics_lib.finish(sums)) for step, sums in log.drain()]
      [(2, {'loss': 0.5})]
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._pending: list[tuple[int, int, Any]] = []
        self._sums: dict[str, Any] = {}

    def push(self, step: int, metrics: Mapping[str, Any], n: int = 1) -> None:
        """Takes the metrics of the steps `step .. step + n - 1`; for n > 1 the leaves are stacked along axis 0."""
        self._pending.append((step, n, metrics))

    def drain(self, before: int | None = None) -> list[Row]:
        """Fetches the steps below `before` (all where None) and returns the rows that became complete.

        Returns:
          `(step, sums)` pairs, where `step` counts the updates made so far.

        Raises:
          NonFiniteStep: a sum of this step is NaN or infinite; the steps before it are in the sums, the rest is gone.
        """
        ready = [entry for entry in self._pending if before is None or entry[0] < before]
        self._pending = self._pending[len(ready) :]
        rows: list[Row] = []
        fetched = jax.device_get([metrics for _, _, metrics in ready])
        for (first, n, _), metrics in zip(ready, fetched, strict=True):
            for i in range(n):
                sums = metrics if n == 1 else jax.tree.map(lambda x, i=i: x[i], metrics)
                rows += self._add(first + i, sums)
        return rows

    def _add(self, step: int, sums: dict[str, Any]) -> list[Row]:
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
        bad = [name for name, value in sums.items() if not all(np.isfinite(x).all() for x in jax.tree.leaves(value))]
        if bad:
            self._pending = []
            raise NonFiniteStep(step, bad)
        self._sums = metrics_lib.add(self._sums, sums)
        if (step + 1) % self.every:
            return []
        row, self._sums = (step + 1, self._sums), {}
        return [row]

    def close_row(self, step: int) -> list[Row]:
        """The row of an interval that ends early, at the end of a run."""
        row, self._sums = self._sums, {}
        return [(step, row)] if row else []

    def to_json(self) -> dict[str, Any]:
        """The sums of the unfinished row, for the checkpoint; drain everything first."""
        return {
            name: [
                type(value).__name__ if isinstance(value, METRICS) else "",
                [x.tolist() for x in jax.tree.leaves(value)],
            ]
            for name, value in self._sums.items()
        }

    def from_json(self, saved: Mapping[str, Any]) -> None:
        """Continues the unfinished row of a checkpoint."""
        self._sums = {
            name: _BY_NAME[kind](*map(np.asarray, leaves)) if kind else np.asarray(leaves[0])
            for name, (kind, leaves) in saved.items()
        }
