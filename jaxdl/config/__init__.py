"""Configuration: frozen dataclasses, config files, flags that override them, JSON, durations."""

from jaxdl.config.cli import Parsed, parse
from jaxdl.config.duration import Duration
from jaxdl.config.resume import Change, check_resume, diff, leaf_values
from jaxdl.config.schema import ConfigError
from jaxdl.config.values import from_json, to_json

__all__ = [
    "Change",
    "ConfigError",
    "Duration",
    "Parsed",
    "check_resume",
    "diff",
    "from_json",
    "leaf_values",
    "parse",
    "to_json",
]
