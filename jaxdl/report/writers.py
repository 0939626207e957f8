"""Where metric rows go: JSON lines, CSV, TensorBoard, Weights & Biases, MLflow.

A row is a step and some named floats. The two text formats hold nothing else, above all no clock, so that two equal
runs write equal bytes and a run that was killed and resumed writes the bytes of one that was not.

`jaxdl.report.history` says how a row is checked, written and read back.
"""

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

from jaxdl.report.event_files import event_files
from jaxdl.report.history import Row, checked_row, json_line, read_history
from jaxdl.report.services import MlflowWriter, WandbWriter

__all__ = ["CsvWriter", "JsonlWriter", "MlflowWriter", "TensorBoardWriter", "WandbWriter", "Writer"]


@runtime_checkable
class Writer(Protocol):
    """What the training loop asks of a place where metrics go."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds one row: `scalars` at `step` (counted in optimizer updates)."""

    def flush(self) -> None:
        """Hands everything written so far to the disk or the service."""

    def close(self) -> None:
        """Flushes and lets go of files and connections; a second call does nothing."""

    def resume(self, step: int) -> None:
        """Forgets every row beyond `step`; call it before the first `write` of a run restored at `step`."""


class _RowFile:
    """A text file of rows; the subclasses say how a row looks."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._file: IO[str] | None = None
        self._resumed_rows: set[str] = set()  # of the step that was resumed: an evaluation may be made again there

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        row = checked_row(step, scalars)
        if json_line(row) not in self._resumed_rows:
            self._append(row)

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def resume(self, step: int) -> None:
        self.close()
        if self.path.exists():
            rows = [row for row in read_history(self.path) if row["step"] <= step]
            self._rewrite(rows)
            self._resumed_rows = {json_line(row) for row in rows if row["step"] == step}

    def _open(self) -> IO[str]:
        """Opens for appending, one system write a row; a torn last line of an earlier run is cut off first."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
                self._rewrite(read_history(self.path))
            self._file = self.path.open(
                "a", buffering=1, encoding="utf-8", newline=""
            )  # a row reaches the system at once
        return self._file

    def _append(self, row: Row) -> None:
        raise NotImplementedError

    def _rewrite(self, rows: Sequence[Row]) -> None:
        raise NotImplementedError


class JsonlWriter(_RowFile):
    """One JSON object a line: `{"step": 10, "loss": 0.25}`.

    A row is handed to the operating system as it is written, so a killed process loses none but the one it was writing;
    that torn line is dropped by `resume`, by the next `write` and by `read_history`.

    Args:
      path: the file; made with its folders at the first row, appended to if it exists.

    Raises:
      WriterError: (`write`) a value is not a single number or a name is empty, "step" or unprintable; (`resume`) a line
        other than the last is not a row.

    Example:
      >>> import tempfile
      >>> writer = JsonlWriter(Path(tempfile.mkdtemp()) / "metrics.jsonl")
      >>> writer.write(10, {"loss": 0.1 + 0.2, "grad_norm": float("inf")})
      >>> writer.close()
      >>> print(writer.path.read_text(), end="")
      {"step": 10, "loss": 0.30000000000000004, "grad_norm": "Infinity"}
      >>> read_history(writer.path)
      [{'step': 10, 'loss': 0.30000000000000004, 'grad_norm': inf}]
    """

    def _append(self, row: Row) -> None:
        self._open().write(json_line(row))

    def _rewrite(self, rows: Sequence[Row]) -> None:
        _replace(self.path, map(json_line, rows))


class CsvWriter(_RowFile):
    """A table with a header, for spreadsheets.

    A metric that appears later widens the table: the file is rewritten with the new column at the end, blank in the old
    rows. A blank cell means that the row did not hold the metric.

    Args:
      path: the file; made with its folders at the first row, appended to if it exists.

    Raises:
      WriterError: as `JsonlWriter`.

    Example:
      >>> import tempfile
      >>> writer = CsvWriter(Path(tempfile.mkdtemp()) / "metrics.csv")
      >>> writer.write(1, {"loss": 2.5})
      >>> writer.write(2, {"loss": 2.0, "eval/loss": 2.25})
      >>> writer.close()
      >>> print(writer.path.read_text(), end="")
      step,loss,eval/loss
      1,2.5,
      2,2.0,2.25
    """

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path)
        self._columns: list[str] = []

    def _append(self, row: Row) -> None:
        file = self._open()
        if not self._columns:
            self._columns = _header(self.path)
        if not row.keys() <= set(self._columns):
            rows = read_history(self.path)
            self.close()
            self._rewrite(rows, also=[name for name in row if name not in self._columns])
            file = self._open()
        csv.writer(file, lineterminator="\n").writerow(_cells(row, self._columns))

    def _rewrite(self, rows: Sequence[Row], also: Sequence[str] = ()) -> None:
        used = {name for row in rows for name in row}
        self._columns = [name for name in _header(self.path) if name in used] + list(also)
        table = [self._columns, *(_cells(row, self._columns) for row in rows)] if self._columns else []
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(table)
        _replace(self.path, [text.getvalue()])


class TensorBoardWriter:
    """Event files that `tensorboard --logdir` shows (float32, and stamped with the time, as the format wants).

    Every opening makes a new event file. After `resume(step)` its first record tells TensorBoard to hide what older
    files hold beyond `step` (`purge_step = step + 1`).

    Args:
      directory: the folder of the event files; made at the first row.

    Raises:
      WriterError: (`write`) as `JsonlWriter`.

    Example:
      >>> import tempfile
      >>> writer = TensorBoardWriter(tempfile.mkdtemp())
      >>> writer.write(1, {"loss": 2.5})
      >>> writer.close()
      >>> [path.name.split(".")[2] for path in writer.directory.iterdir()]
      ['tfevents']
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory, self._files = Path(directory), event_files()
        self._events: Any = None
        self._purge_step: int | None = None

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        row, made = checked_row(step, scalars), self._files.summary.Summary
        values = [made.Value(tag=name, simple_value=value) for name, value in row.items() if name != "step"]
        self._record(row["step"], summary=made(value=values))

    def flush(self) -> None:
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None

    def resume(self, step: int) -> None:
        self.close()
        self._purge_step = step + 1

    def _record(self, step: int, **content: Any) -> None:
        import time

        if self._events is None:
            self._events = self._open()
        self._events.write_event(self._files.event.Event(step=step, wall_time=time.time(), **content))

    def _open(self) -> Any:
        """The synchronous half of tensorboardX: its `SummaryWriter.flush` does not wait for the thread behind it."""
        writer, event, _ = self._files
        self.directory.mkdir(parents=True, exist_ok=True)
        n_before = sum(1 for _ in self.directory.glob("events.out.tfevents.*"))
        # The library names files by the second and would overwrite the one of a run restarted within it.
        self._events = writer.EventsWriter(str(self.directory / "events"), filename_suffix=f".{n_before:06d}")
        if self._purge_step is not None:
            self._record(self._purge_step, session_log=event.SessionLog(status=event.SessionLog.START))
            self._purge_step = None
        return self._events


def _header(path: Path) -> list[str]:
    first, newline, _ = (
        path.read_text(encoding="utf-8", errors="replace").partition("\n") if path.exists() else ("", "", "")
    )
    return next(csv.reader([first])) if newline and first else []


def _cells(row: Row, columns: Sequence[str]) -> list[str]:
    return [repr(row[name]) if name in row else "" for name in columns]


def _replace(path: Path, texts: Iterable[str]) -> None:
    """Writes beside the file and renames over it, so that a kill leaves either the old file or the new one."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8", newline="") as file:
        file.writelines(texts)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
