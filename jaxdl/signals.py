"""One stop flag for SIGTERM and Ctrl-C, polled wherever the loop waits."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from jaxdl.parallel import watchdog

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopFlag:
    """Turns the first SIGTERM or Ctrl-C into a flag while the context is open.

    Python answers a signal between two of its own instructions: during a compilation the flag goes up when that ends. A
    second Ctrl-C ends the process the usual way. A flag opened inside another begins as that stands. Outside the main
    thread signals cannot be caught; the flag stays down.

    Where a run has many processes, a signal to one of them raises the flags of all, and at the same look: each look at
    a flag is counted, so all processes must look equally often, as they do when they run the same program.

    Example:
      >>> with StopFlag() as stop:
      ...     signal.raise_signal(signal.SIGTERM)
      ...     stop.name
      'SIGTERM'
    """

    def __init__(self) -> None:
        self._caught: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._raise_flag) for number in _STOP_SIGNALS}
            outer = [getattr(handler, "__self__", None) for handler in self._previous.values()]
            self._caught = self._caught or next((flag._caught for flag in outer if isinstance(flag, StopFlag)), None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def name(self) -> str | None:
        """`"SIGTERM"` or `"SIGINT"` once one has arrived (and all processes stop for it), else None."""
        link = watchdog.current()
        return self._caught if link is None else link.poll()

    def __bool__(self) -> bool:
        return self.name is not None

    def _raise_flag(self, number: int, frame: FrameType | None) -> None:
        if self._caught is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._caught = signal.Signals(number).name
        if (link := watchdog.current()) is not None:
            link.request_stop(self._caught)
        os.write(2, f"\n{self._caught}: saving and stopping after the current call\n".encode())
