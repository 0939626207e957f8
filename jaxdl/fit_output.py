"""What `fit` tells: rows to the writers, the headline to the progress line, notes to a person."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxdl import metrics as metrics_lib
from jaxdl.steplog import Row


class Output:
    """Everything that leaves the loop on its way.

    Args:
      writers: `report.writers`.
      progress: a `report.progress.Progress` or None.
      epochs_per_step: the share of the data that a step sees; each row says in which epoch it is.
    """

    def __init__(self, writers: Sequence[Any], progress: Any, epochs_per_step: float) -> None:
        self._writers, self._progress, self._epochs_per_step = writers, progress, epochs_per_step

    def resume(self, step: int) -> None:
        """Forgets the rows after `step`, which will be made again."""
        for writer in self._writers:
            writer.resume(step)

    def write(self, rows: list[Row]) -> None:
        """Rows of the step log; its metrics are named `train/...`, its gauges as they are."""
        for step, sums in rows:
            gauges = {name for name, value in sums.items() if not isinstance(value, metrics_lib.METRICS)}
            done = metrics_lib.scalars(metrics_lib.finish(sums))
            self.emit(step, {name if name in gauges else f"train/{name}": value for name, value in done.items()})

    def emit(self, step: int, scalars: Mapping[str, float]) -> None:
        """One row."""
        row = {"epoch": step * self._epochs_per_step, **scalars}
        for writer in self._writers:
            writer.write(step, row)
            writer.flush()
        if self._progress is not None:
            self._progress.update(step, headline(scalars))

    def progress_to(self, step: int) -> None:
        """So many steps are done."""
        if self._progress is not None:
            self._progress.update(step)

    def note(self, text: str) -> None:
        """A sentence for whoever watches."""
        if self._progress is not None:
            self._progress.note(text)

    def close(self) -> None:
        """All rows are on disk, and the progress line ends."""
        for writer in self._writers:
            writer.flush()
        if self._progress is not None:
            self._progress.close()


def headline(scalars: Mapping[str, Any]) -> dict[str, float]:
    """The metrics without the parts of composite ones.

    Example:
      >>> headline({"test/accuracy": 0.5, "test/confusion/f1": 0.25})
      {'test/accuracy': 0.5}
    """
    return {name: value for name, value in metrics_lib.scalars(scalars).items() if name.count("/") < 2}
