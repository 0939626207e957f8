"""Where a run stands, while it runs: a bar on a terminal, a few plain lines anywhere else."""

import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import IO, Any, Self

from jaxdl.report.table import format_count, format_duration, format_number

_DRAW_INTERVAL_S = 0.1  # of the bar
_N_RATE_POINTS = 50  # draws that the rate is measured over


class Progress:
    """Steps done, rate, time left and the latest metrics.

    On a terminal this is one live line at the bottom. In a pipe, a file or a test it is a plain line every `interval_s`
    seconds, and one for the first and the last step. Between two drawings `update` only looks at the clock. A stream
    that breaks (a closed pipe) ends the drawing, never the run.

    Use it as a context manager: an exception then takes the bar away and gives the cursor back. The rate counts from
    the first `update`, so that the time of compilation is not in it.

    Args:
      total_steps: the step at which the run ends.
      start_step: the step at which it starts, after a restore.
      stream: where to draw; standard error if `None`.
      examples_per_step: rows in a global batch; adds examples/s.
      interval_s: the least time between two plain lines, in seconds.
      clock: seconds since any moment; for tests.

    Example:
      >>> with Progress(100, stream=sys.stdout) as progress:
      ...     progress.update(100, {"loss": 0.25})
      step 100/100 (100%)  loss 0.25
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        stream: IO[str] | None = None,
        *,
        examples_per_step: float | None = None,
        interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total_steps, self.step = total_steps, start_step
        self._examples_per_step, self._clock = examples_per_step, clock
        self._stream = sys.stderr if stream is None else stream
        self._live = _open_live(self._stream)
        self._interval_s = interval_s if self._live is None else _DRAW_INTERVAL_S
        self._metrics: Mapping[str, float] = {}
        self._points: deque[tuple[float, int]] = deque(maxlen=_N_RATE_POINTS)
        self._next_draw = -float("inf")
        self._drawn_step: int | None = None
        self._closed = False
        if self._live is not None:  # a run that dies without `close` must still give the cursor back
            weakref.finalize(self, _take_away, self._live)

    def update(self, step: int, metrics: Mapping[str, float] | None = None, *, force: bool = False) -> None:
        """Says that `step` steps are done.

        Args:
          step: steps done since the beginning of training, not since the restore.
          metrics: the latest values (numbers on the host); the ones before stay if `None`.
          force: draw now, whatever the clock says.
        """
        self.step = step
        if metrics is not None:
            self._metrics = metrics
        now = self._clock()
        if force or now >= self._next_draw or (step >= self.total_steps and step != self._drawn_step):
            self._draw(now)

    def note(self, text: str) -> None:
        """Prints a line above the bar (an evaluation's result, a checkpoint's path)."""
        self._print(text)

    def close(self) -> None:
        """Draws the last state and lets go of the terminal; a second call does nothing."""
        if not self._closed and self._drawn_step not in (None, self.step):
            self._draw(self._clock())
        self._closed = True
        if self._live is not None:
            self._try(self._live.stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._closed = True
            if self._live is not None:
                _take_away(self._live)
        self.close()

    def steps_per_second(self) -> float | None:
        """The rate over the last drawings, or `None` before there are two."""
        if len(self._points) < 2:
            return None
        (then, first), (now, last) = self._points[0], self._points[-1]
        return (last - first) / (now - then) if now > then else None

    def _draw(self, now: float) -> None:
        if self._closed:
            return
        self._points.append((now, self.step))
        self._next_draw, self._drawn_step = now + self._interval_s, self.step
        if self._live is None:
            self._print("  ".join([f"step {self._fraction()}", *self._details()]))
        else:
            self._try(self._live.update, self._bar(), refresh=True)

    def _fraction(self) -> str:
        done = self.step / self.total_steps if self.total_steps else 1.0
        return f"{self.step:,}/{self.total_steps:,} ({100 * done:.0f}%)"

    def _details(self) -> list[str]:
        parts = [f"{name} {format_number(value)}" for name, value in self._metrics.items()]
        rate = self.steps_per_second()
        if rate:
            parts.append(f"{rate:.3g} steps/s")
            if self._examples_per_step:
                parts.append(f"{format_count(rate * self._examples_per_step)} examples/s")
            if self.step < self.total_steps:
                parts.append(f"ETA {format_duration((self.total_steps - self.step) / rate)}")
        return parts

    def _bar(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        line = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=max(self.total_steps, 1), completed=self.step, width=24)
        line.add_row(bar, Text(self._fraction(), style="bold"), Text("  ".join(self._details()), overflow="ellipsis"))
        return line

    def _print(self, text: str) -> None:
        if self._live is not None and not self._closed:
            self._try(self._live.console.print, text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._try(print, text, file=self._stream, flush=True)

    def _try(self, draw: Callable[..., Any], *args: Any, **keywords: Any) -> None:
        try:
            draw(*args, **keywords)
        except (OSError, ValueError):  # ValueError: the stream was closed
            self._closed = True


def _open_live(stream: IO[str]) -> Any:
    """A started live display, or `None` where the stream is no terminal that can move its cursor."""
    if not _is_terminal(stream):
        return None
    from rich.console import Console
    from rich.live import Live

    console = Console(file=stream)
    if not console.is_terminal or console.is_dumb_terminal:
        return None
    # What is printed to a file must go there, not to the terminal of the bar.
    out, err = _is_terminal(sys.stdout), _is_terminal(sys.stderr)
    live = Live(console=console, auto_refresh=False, redirect_stdout=out, redirect_stderr=err)
    live.start()
    return live


def _is_terminal(stream: IO[str] | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def _take_away(live: Any) -> None:
    live.transient = True
    with suppress(OSError, ValueError):
        live.stop()
