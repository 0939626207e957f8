"""From the command line to an exit code: 0 done or stopped and saved, 1 failed under way, 2 refused before it began."""

import sys
from collections.abc import Callable, Sequence

from jaxdl import choices
from jaxdl.compilation import enable_compile_cache
from jaxdl.config import Parsed, parse
from jaxdl.errors import JaxdlError


def run_command(
    config_type: type,
    experiment: Callable[[Parsed], None],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
) -> int:
    """Parses flags, runs an experiment and turns what the user can mend into one message without a traceback.

    A section `parallel` of the configuration is initialized before anything touches JAX's devices. Choices by device
    and shape, such as the implementation of attention, are shown while it runs.

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
        with choices.shown():
            experiment(parsed)
    except JaxdlError as error:
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        print(f"error: {error}{notes}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error}. Free space or choose another folder; saved checkpoints are intact.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped by Ctrl-C without saving; the last complete checkpoint is intact.", file=sys.stderr)
        return 130
    return 0
