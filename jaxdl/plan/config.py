"""From words of the command line to a configuration and its sketch, whichever experiment it is of."""

from collections.abc import Sequence
from typing import Any

from jaxdl.config import ConfigError, Parsed, parse
from jaxdl.config.files import config_type_of
from jaxdl.config.flags import split_flags
from jaxdl.plan.sketch import NoSketch, Sketch


def resolve(words: Sequence[str]) -> tuple[Parsed, Sketch]:
    """Reads the config file, the flags over it, and asks the configuration for its sketch.

    Args:
      words: `--config=FILE` and any `--config.field=value`.

    Raises:
      ConfigError: no file, or a configuration that is wrong: everything at once.
      NoSketch: it cannot say its shapes without reading data.
    """
    flags, _ = split_flags(words)
    files = [flag.words[0] for flag in flags if flag.name == "config" and flag.words]
    if not files:
        raise ConfigError("a plan needs a configuration: give --config=configs/NAME.py.")
    kind, problems = config_type_of(files[0])
    if kind is None:
        raise ConfigError.listing("config", problems)
    parsed: Parsed[Any] = parse(kind, words)
    sketch: Any = getattr(parsed.config, "sketch", None)
    if sketch is None:
        raise NoSketch(f"{files[0]}: a {kind.__module__}.Config has no sketch(), so its step cannot be planned.")
    return parsed, sketch()
