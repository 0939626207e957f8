"""What the library chose by device and shape is said in the log, once: the logger `jaxdl`, level INFO."""

import contextlib
import functools
import logging
import sys
from collections.abc import Iterator

_LOGGER = logging.getLogger("jaxdl")


@functools.cache
def tell(what: str, choice: str, reason: str) -> None:
    """Logs a choice the first time that it is made for this reason.

    Args:
      what: what was chosen, such as `attention`.
      choice: the alternative taken, such as `cudnn`.
      reason: why.

    Example:
      >>> tell("attention", "xla", "the platform is cpu")
    """
    _LOGGER.info("%s: %s (%s)", what, choice, reason)


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Writes choices to standard error for a while, unless the user has given the logger a handler or a level.

    Example:
      >>> with shown(), contextlib.redirect_stderr(sys.stdout):
      ...     tell("layers", "scanned", "an example")
      layers: scanned (an example)
    """
    if _LOGGER.handlers or _LOGGER.level:
        yield
        return
    handler = _ToStandardError()
    _LOGGER.addHandler(handler)
    _LOGGER.setLevel(logging.INFO)
    _LOGGER.propagate = False  # other libraries give the root logger a handler, which would say it again
    try:
        yield
    finally:
        _LOGGER.removeHandler(handler)
        _LOGGER.setLevel(logging.NOTSET)
        _LOGGER.propagate = True


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """Collects choices for a while, also those that were told before.

    Example:
      >>> with heard() as told:
      ...     tell("attention", "xla", "the platform is cpu")
      >>> told
      ['attention: xla (the platform is cpu)']
    """
    lines: list[str] = []
    handler, level = logging.Handler(), _LOGGER.level
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    tell.cache_clear()
    _LOGGER.addHandler(handler)
    _LOGGER.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        _LOGGER.removeHandler(handler)
        _LOGGER.setLevel(level)


class _ToStandardError(logging.Handler):
    """Looks standard error up at each line: it may be another stream by then."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):  # a closed pipe ends the telling, never the run
            print(self.format(record), file=sys.stderr)
