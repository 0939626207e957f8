"""From the command line to an exit code: 0 done or stopped and saved, 1 failed under way, 2 refused before it began."""

import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jaxdl import choices
from jaxdl.compilation import enable_compile_cache
from jaxdl.config import Parsed, parse
from jaxdl.errors import JaxdlError
from jaxdl.parallel import processes, watchdog


def run_command(
    config_type: type,
    experiment: Callable[[Parsed], None],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
) -> int:
    """Parses flags, runs an experiment and turns what the user can mend into one message without a traceback.

    A section `parallel` of the configuration is initialized before anything touches JAX's devices, then a section
    `hardware`. Choices by device
    and shape, such as the implementation of attention, are shown while it runs. Of many processes the first one prints;
    one that fails tells the others.

    Args:
      config_type: the frozen dataclass of the experiment.
      experiment: does the work; it raises `JaxdlError` for what the user gave.
      argv: the words after the program's name; None takes those of the process.
      prog: the program's name in the help.

    Returns:
      The exit code, for `sys.exit`.

    Example:
      >>> import dataclasses
      >>> @dataclasses.dataclass(frozen=True)
      ... class Config:
      ...     n: int = 1
      >>> run_command(Config, lambda parsed: print(parsed.config.n), ["--config.n=3"])
      3
      0
    """
    try:
        parsed: Parsed = parse(config_type, argv, prog=prog)
        enable_compile_cache()
        if (parallel := getattr(parsed.config, "parallel", None)) is not None:
            parallel.initialize()
        with choices.shown(), _first_prints():
            if (hardware := getattr(parsed.config, "hardware", None)) is not None:
                hardware.initialize()
            experiment(parsed)
    except JaxdlError as error:
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        print(f"error: {error}{notes}", file=sys.stderr)
        watchdog.tell_failure(str(error))
        return error.exit_code
    except OSError as error:
        print(f"error: {error}. Free space or choose another folder; saved checkpoints are intact.", file=sys.stderr)
        watchdog.tell_failure(str(error))
        return 1
    except KeyboardInterrupt:
        print("stopped by Ctrl-C without saving; the last complete checkpoint is intact.", file=sys.stderr)
        watchdog.tell_failure("stopped by Ctrl-C")
        return 130
    return 0


def _first_prints() -> contextlib.AbstractContextManager[Any]:
    """What an experiment prints is the same in all processes; errors go another way."""
    if watchdog.current() is None or processes.is_first():
        return contextlib.nullcontext()
    return contextlib.redirect_stdout(io.StringIO())
