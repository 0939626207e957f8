"""One stop flag for SIGTERM and Ctrl-C, polled wherever the loop waits."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopFlag:
    """Turns the first SIGTERM or Ctrl-C into a flag while the context is open.

    Python answers a signal between two of its own instructions: during a compilation the flag goes up when that ends. A
    second Ctrl-C ends the process the usual way. A flag opened inside another begins as that stands. Outside the main
    thread signals cannot be caught; the flag stays down.

    Attributes:
      name: `"SIGTERM"` or `"SIGINT"` once one has arrived, else None.

    Example:
      >>> with StopFlag() as stop:
      ...     signal.raise_signal(signal.SIGTERM)
      ...     stop.name
      'SIGTERM'
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._raise_flag) for number in _STOP_SIGNALS}
            outer = [getattr(handler, "__self__", None) for handler in self._previous.values()]
            self.name = self.name or next((flag.name for flag in outer if isinstance(flag, StopFlag)), None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.name is not None

    def _raise_flag(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        os.write(2, f"\n{self.name}: saving and stopping after the current call\n".encode())
