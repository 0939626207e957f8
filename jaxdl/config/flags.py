"""The words of the command line as flags, checked against the fields of a configuration all at once."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxdl.config.schema import describe, leaves, members, names, nearest_names
from jaxdl.config.text import read_text
from jaxdl.errors import JaxdlError

_FLAG = re.compile(r"--?[A-Za-z]")


@dataclass(frozen=True)
class Flag:
    """One flag with the words of its value.

    Args:
      written: as the user wrote it, without the value.
      name: without dashes in front, `-` as `_`.
      words: the value as the shell split it; one word if it was written with `=`.

    Example:
      >>> Flag("--config.drop-out", "config.drop_out", ("0.1",)).name
      'config.drop_out'
    """

    written: str
    name: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.written}={' '.join(self.words)!r}" if self.words else self.written


def split_flags(argv: Sequence[str]) -> tuple[list[Flag], list[str]]:
    """Splits the command line into flags, and lists what is no flag and which flags are given twice.

    A word that starts with a dash and a letter begins a flag; write `--flag=-word` for such a value.

    Example:
      >>> flags, problems = split_flags(["7", "--config.widths", "64", "-1", "--config.lr=3"])
      >>> [str(flag) for flag in flags], problems
      (["--config.widths='64 -1'", "--config.lr='3'"], ["'7' belongs to no flag; a flag starts with '--'."])
    """
    flags: list[Flag] = []
    problems = []
    open_words: list[str] | None = None
    found: list[tuple[str, list[str]]] = []
    for word in argv:
        if _FLAG.match(word):
            written, equals, value = word.partition("=")
            found.append((written, [value] if equals else []))
            open_words = None if equals else found[-1][1]
        elif open_words is not None:
            open_words.append(word)
        else:
            problems.append(f"{word!r} belongs to no flag; a flag starts with '--'.")
    for written, words in found:
        flags.append(Flag(written, written.lstrip("-").replace("-", "_"), tuple(words)))
        if not written.startswith("--") and written != "-h":
            problems.append(f"{written} has one dash; write -{written}, or --flag={written} if it is a value.")
    return flags, problems


def read_flags(flags: Sequence[Flag], config_type: type, config: Any) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Checks the values of the flags `--config.*`, each on its own.

    Args:
      flags: the flags that override fields, names starting with `config.`.
      config_type: the dataclass of the configuration.
      config: the configuration that they override, or None to accept the fields of every variant.

    Returns:
      `(words, problems)`: the words of the good flags by dotted path, for `read_text`; and a line for each flag that
      is unknown, given twice, without a value or with one of the wrong type.

    Example:
      >>> @dataclass(frozen=True)
      ... class Loop:
      ...     seed: int = 0
      >>> read_flags([Flag("--config.seed", "config.seed", ("x",))], Loop, Loop())
      ({}, ["--config.seed='x': expected int."])
    """
    fields = leaves(config_type, config)
    given: dict[str, list[Flag]] = {}
    for flag in flags:
        given.setdefault(_target(flag, fields)[0], []).append(flag)
    words: dict[str, tuple[str, ...]] = {}
    problems = []
    for path, same in given.items():
        if path not in fields:
            problems += [_unknown(flag, path, config_type, config, fields) for flag in same]
        elif len(same) > 1:
            problems.append(f"--config.{path} is given {len(same)} times ({', '.join(map(str, same))}); give it once.")
        else:
            try:
                words[path] = _checked_words(same[0], fields)
            except JaxdlError as error:
                problems.append(f"{same[0]}: {str(error).removesuffix('.')}.")
    return words, problems


def _target(flag: Flag, fields: Mapping[str, Any]) -> tuple[str, bool]:
    """The path that a flag sets, and whether it is the `--config.x.no-flag` form."""
    path = flag.name.removeprefix("config.")
    section, _, last = path.rpartition(".")
    positive = f"{section}.{last.removeprefix('no_')}".lstrip(".")
    negated = path not in fields and last.startswith("no_") and bool in members(fields.get(positive))
    return (positive, True) if negated else (path, False)


def _checked_words(flag: Flag, fields: Mapping[str, Any]) -> tuple[str, ...]:
    path, negated = _target(flag, fields)
    kinds = members(fields[path])
    if negated and flag.words:
        raise JaxdlError("it takes no value; leave out 'no-' or the value")
    words = flag.words or (("false",) if negated else ("true",) if bool in kinds else ())
    if not words or (words == ("",) and str not in kinds):
        raise JaxdlError(f"its value is missing; write {flag.written}=VALUE, {describe(fields[path])}")
    read_text(fields[path], words)
    return words


def _unknown(flag: Flag, path: str, config_type: type, config: Any, fields: Mapping[str, Any]) -> str:
    known = names(config_type)
    inside = [field for field in fields if field.startswith(f"{path}.")]
    if path in known and inside:
        return f"{flag.written} is a section; set one of its fields: {', '.join(_flags(inside))}."
    if path in known:
        return f"{flag.written}: {_held_section(config, path.split('.'))}; choose another in the config file."
    return f"{flag.written}: no such field; nearest: {', '.join(_flags(nearest_names(path, fields)))}; see --help."


def _held_section(config: Any, parts: list[str]) -> str:
    """Says which section of `config` holds another variant than the one with this field."""
    for i, name in enumerate(parts):
        if not hasattr(config, name):
            return f"{'.'.join(['config', *parts[:i]])} holds {_kind(config)}, which has no field {name}"
        config = getattr(config, name)
    return f"config.{'.'.join(parts)} holds {_kind(config)}, which has no fields"


def _kind(section: Any) -> str:
    return "None" if section is None else type(section).__name__


def _flags(paths: Sequence[str]) -> list[str]:
    return [f"--config.{path}" for path in paths]
