"""Metrics on their way from the device to the log: one small vector a step, fetched one interval late."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdl.metrics import METRICS
from jaxdl.step import Step

Row = tuple[int, dict[str, Any]]


class NonFiniteStep(Exception):
    """Internal signal of `StepLog` to the loop: the metrics of this step are not finite."""

    def __init__(self, step: int, names: list[str]) -> None:
        super().__init__(f"step {step}: {names}")
        self.step, self.names = step, names


class Packing:
    """How the metrics of a step lie in one float32 vector, so that a step costs one transfer and not one a metric.

    Example:
      >>> from jaxdl.metrics import Mean
      >>> packing = Packing()
      >>> vector = packing.pack({"loss": Mean(jnp.float32(3), jnp.float32(2)), "rate": jnp.float32(0.5)})
      >>> vector.tolist(), packing.unpack(np.asarray(vector))["loss"].finish()
      ([3.0, 2.0, 0.5], 1.5)
    """

    def __init__(self) -> None:
        self._treedef: Any = None
        self._shapes: list[tuple[int, ...]] = []
        self.is_summed = np.zeros(0, bool)

    def pack(self, metrics: Mapping[str, Any]) -> jax.Array:
        """Joins the leaves, at tracing, and remembers how."""
        leaves, self._treedef = jax.tree.flatten(dict(metrics))
        self._shapes = [np.shape(leaf) for leaf in leaves]
        summed = [
            np.full(np.size(leaf), isinstance(metrics[name], METRICS))
            for name in sorted(metrics)
            for leaf in jax.tree.leaves(metrics[name])
        ]
        self.is_summed = np.concatenate(summed)
        return jnp.concatenate([jnp.ravel(leaf).astype(jnp.float32) for leaf in leaves])

    def unpack(self, vector: np.ndarray) -> dict[str, Any]:
        """The metrics again, by name."""
        ends = np.cumsum([int(np.prod(shape)) for shape in self._shapes])
        parts = np.split(vector, ends[:-1])
        leaves = [part.reshape(shape) for part, shape in zip(parts, self._shapes, strict=True)]
        return jax.tree.unflatten(self._treedef, leaves)

    def packed(self, step: Step) -> Step:
        """The step with its metrics as one vector."""

        def packed_step(state: Any, batch: Any) -> Any:
            state, metrics = step(state, batch)
            return state, self.pack(metrics)

        if hasattr(step, "halves"):
            update = self.packed(step.halves.update)
            packed_step.halves = step.halves._replace(update=update)  # type: ignore[attr-defined]
        return packed_step


class StepLog:
    """Collects the metrics of steps and sums them into one row every `every` steps.

    `push` keeps device arrays and waits for nothing. `drain` fetches them; the sums are float64 on the host and are
    added step by step, so a row does not depend on when it was drained, nor on a restart in the middle (`to_json`).

    Args:
      every: steps in a row of the log.
      packing: how a step's metrics lie in its vector.

    Example:
      >>> from jaxdl import metrics
      >>> packing = Packing()
      >>> log = StepLog(every=2, packing=packing)
      >>> for step in range(3):
      ...     log.push(step, packing.pack({"loss": metrics.Mean(jnp.float32(step), jnp.float32(1))}))
      >>> [(step, metrics.finish(sums)) for step, sums in log.drain()]
      [(2, {'loss': 0.5})]
    """

    def __init__(self, every: int, packing: Packing) -> None:
        self.every, self._packing = every, packing
        self._pending: list[tuple[int, Any]] = []
        self._sums: np.ndarray | None = None

    def push(self, step: int, vectors: Any) -> None:
        """Takes the vector of a step, (M,), or those of several steps from `step` on, (n, M)."""
        self._pending.append((step, vectors))

    def drain(self, before: int | None = None) -> list[Row]:
        """Fetches the steps below `before` (all where None) and returns the rows that became complete.

        Returns:
          `(step, sums)` pairs, where `step` counts the updates made so far.

        Raises:
          NonFiniteStep: a number of this step is NaN or infinite; the steps before it are in the sums.
        """
        ready = [entry for entry in self._pending if before is None or entry[0] < before]
        self._pending = self._pending[len(ready) :]
        rows: list[Row] = []
        fetched = jax.device_get([vectors for _, vectors in ready])
        for (first, _), vectors in zip(ready, fetched, strict=True):
            for i, vector in enumerate(np.atleast_2d(vectors)):
                rows += self._add(first + i, vector)
        return rows

    def _add(self, step: int, vector: np.ndarray) -> list[Row]:
        if not np.isfinite(vector).all():
            self._pending = []
            values = self._packing.unpack(vector).items()
            raise NonFiniteStep(step, [name for name, value in values if not _is_finite(value)])
        kept = np.zeros(1) if self._sums is None or self._sums.shape != vector.shape else self._sums
        self._sums = np.where(self._packing.is_summed, kept, 0.0) + vector.astype(np.float64)
        return self.close_row(step + 1) if (step + 1) % self.every == 0 else []

    def close_row(self, step: int) -> list[Row]:
        """The row of the interval that ends here, if there is anything in it."""
        sums, self._sums = self._sums, None
        return [] if sums is None else [(step, self._packing.unpack(sums))]

    def to_json(self) -> list[float] | None:
        """The sums of the unfinished row, for the checkpoint; drain everything first."""
        return None if self._sums is None else self._sums.tolist()

    def from_json(self, saved: list[float] | None) -> None:
        """Continues the unfinished row of a checkpoint."""
        self._sums = None if saved is None else np.asarray(saved, np.float64)


def _is_finite(value: Any) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(value))
